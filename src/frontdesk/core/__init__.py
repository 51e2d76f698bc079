"""The clinic's rules, one file a noun. Nothing here depends on gRPC."""
