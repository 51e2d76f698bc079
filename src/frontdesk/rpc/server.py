"""Put the gRPC server together: limits, credentials, health, reflection, drain."""

import grpc
from grpc_health.v1 import health_pb2_grpc

from frontdesk.live.watcher import Watchers
from frontdesk.rpc import health
from frontdesk.rpc.health import Health, HealthPort
from frontdesk.rpc.pipeline import Pipeline
from frontdesk.rpc.reflection import Reflection
from frontdesk.settings import Settings

MAX_REQUEST_BYTES = 1024 * 1024
MAX_METADATA_BYTES = 16 * 1024
STREAM_AGE_GRACE_SECONDS = 31 * 60
"""How long a connection at its maximal age waits for its streams: longer than any stream lives."""

LEAST_PING_SECONDS = 8.0
"""Clients that ping more often are sent away. They are told that they may ping every 10 s, and pings that are 10 s
apart at the client can be somewhat closer here."""


def options(settings: Settings, *, reuse_port: bool) -> list[tuple[str, int]]:
    """The channel arguments of the server."""
    return [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        # If on, it counts streams until the server has forgotten them, and refuses some of a client that keeps to the
        # number it was told: 200 calls at once on one connection failed. gRPC limits resets by itself.
        ("grpc.http.overload_protection", 0),
        # A burst of reconnecting watchers waits its turn instead of being cancelled.
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 40_000),
        # The server notices within half a minute that a client is gone, and lets clients do the same.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(LEAST_PING_SECONDS * 1000)),
        ("grpc.http2.max_ping_strikes", 3),
        # Clients connect anew now and then, so that a balancer can spread the load.
        ("grpc.max_connection_age_ms", 60 * 60 * 1000),
        ("grpc.max_connection_age_grace_ms", STREAM_AGE_GRACE_SECONDS * 1000),
        ("grpc.max_connection_idle_ms", 30 * 60 * 1000),
    ]


class Server:
    """One worker's gRPC server."""

    def __init__(self, settings: Settings, pipeline: Pipeline, watchers: Watchers, *, reuse_port: bool) -> None:
        self._settings = settings
        self._pipeline = pipeline
        self._watchers = watchers
        self._server = grpc.aio.server(options=options(settings, reuse_port=reuse_port))
        self._server.add_generic_rpc_handlers(tuple(pipeline.handlers))
        self._health = Health(pipeline.services, settings.access_mode)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health_port = HealthPort(self._health, reuse_port=reuse_port) if settings.health_listen else None
        self._reflection = Reflection((*pipeline.services, health.SERVICE)) if settings.serves_reflection else None
        if self._reflection is not None:
            self._server.add_generic_rpc_handlers(self._reflection.handlers)

    async def start(
        self, address: str, *, certificate_address: str | None = None, health_address: str | None = None
    ) -> int:
        """Serve on `address`, and on the others what the settings ask for; the port of the first.

        Raises OSError if one of them cannot be served.
        """
        settings = self._settings
        apart = settings.certificate_listen is not None
        port = self._listen(
            address, _credentials(settings, certificates=settings.tls_client_ca is not None and not apart)
        )
        if apart:
            address = certificate_address or str(settings.certificate_address)
            self._listen(address, _credentials(settings, certificates=True))
        if self._health_port is not None:
            await self._health_port.start(health_address or str(settings.health_address))
        await self._server.start()
        return port

    def _listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        """Raises OSError."""
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if port == 0:
            raise OSError(f"cannot listen on {address}")
        return port

    def serving(self, is_serving: bool) -> None:
        """Whether health says SERVING, overall and for each service; at first it does not."""
        self._health.serving(is_serving)

    async def drain(self) -> None:
        """Take no new calls, tell the watchers to go, let the running calls end, and stop."""
        self._health.drain()
        self._pipeline.draining = True
        self._watchers.drain()
        if self._reflection is not None:
            self._reflection.drain()
        # The watchers' closing messages and the running calls go out within the grace; stop() does not tell handlers.
        await self._server.stop(self._settings.drain_seconds)
        await self._stop_health_port()

    async def stop(self) -> None:
        """Stop at once."""
        await self._server.stop(0)
        await self._stop_health_port()

    async def _stop_health_port(self) -> None:
        if self._health_port is not None:
            await self._health_port.stop()


def _credentials(settings: Settings, *, certificates: bool) -> grpc.ServerCredentials | None:
    """`certificates`: clients must present one; else they are not asked, because gRPC knows nothing in between."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    authority = settings.tls_client_ca.read_bytes() if certificates and settings.tls_client_ca is not None else None
    return grpc.ssl_server_credentials(
        [(settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())],
        root_certificates=authority,
        require_client_auth=authority is not None,
    )
