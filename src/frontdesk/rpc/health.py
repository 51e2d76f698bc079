"""grpc.health.v1: whether the server serves, overall and for each service."""

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from frontdesk.live.watcher import Watcher
from frontdesk.tasks import Timeout

SERVICE: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

WRITE_SECONDS = 30.0
"""How long a watcher may leave a message unread once gRPC takes no more for it."""

_LOOK_SECONDS = 3600.0


PROBES = 100
"""Calls that the port for probes handles at once."""


class Health:
    """One status for all services.

    Not the library's servicer: there one watcher that does not read keeps the news from all others, and keeps the
    server from stopping.
    """

    def __init__(self, services: Iterable[str], access: str) -> None:
        """`access` is the mode, which answers to Check name in their trailers as `frontdesk-access`."""
        self._trailers = (("frontdesk-access", access),)
        self._services = {"", *services}
        self._status: int = health_pb2.HealthCheckResponse.NOT_SERVING
        self._watchers: set[Watcher] = set()
        self._draining = False

    def serving(self, is_serving: bool) -> None:
        """Say so from now on."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        if status != self._status and not self._draining:
            self._status = status
            self._wake()

    def drain(self) -> None:
        """Say NOT_SERVING for good, and end every Watch after it has said so."""
        self.serving(False)
        self._draining = True
        self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.wake()

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        context.set_trailing_metadata(self._trailers)
        return health_pb2.HealthCheckResponse(status=self._status)

    async def List(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        answer = health_pb2.HealthCheckResponse(status=self._status)
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(self._services, answer))

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        watcher = Watcher()
        self._watchers.add(watcher)
        said: int | None = None
        try:
            while True:
                watcher.seen()
                # A draining server says no more after this message.
                last = self._draining
                known = request.service in self._services
                status = self._status if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                if status != said:
                    with Timeout(WRITE_SECONDS):
                        await context.write(health_pb2.HealthCheckResponse(status=status))
                    said = status
                if last:
                    return
                await watcher.news(_LOOK_SECONDS)
        except TimeoutError:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the watcher reads too slowly")
        except grpc.aio.InternalError:
            # The connection ended during the write; gRPC is about to cancel this as well.
            raise asyncio.CancelledError from None
        finally:
            self._watchers.discard(watcher)


class HealthPort:
    """A server of nothing but health, in plain text, for probes that have no client certificate."""

    def __init__(self, health: Health, *, reuse_port: bool) -> None:
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", int(reuse_port)),
                # Anybody may connect.
                ("grpc.max_receive_message_length", 4096),
                ("grpc.max_metadata_size", 4096),
                ("grpc.absolute_max_metadata_size", 8192),
                ("grpc.max_concurrent_streams", 4),
                ("grpc.max_connection_idle_ms", 60_000),
                ("grpc.max_connection_age_ms", 10 * 60_000),
                ("grpc.max_connection_age_grace_ms", 1_000),
            ],
            maximum_concurrent_rpcs=PROBES,
        )
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)

    async def start(self, address: str) -> int:
        """Serve on `address`; the port. Raises OSError if it cannot be served."""
        try:
            port: int = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise OSError(f"cannot listen on {address}")
        await self._server.start()
        return port

    async def stop(self) -> None:
        """Stop at once."""
        await self._server.stop(0)
