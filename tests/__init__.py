"""Tests against real servers, all of them on this machine."""

import os

# Their plain gRPC channels, unlike our clients' own, would go through a proxy that the environment names.
os.environ.update(no_grpc_proxy="127.0.0.1,localhost")
