"""The backend of a clinic's front desk: bookings, check-in and live queues over gRPC on PostgreSQL."""
