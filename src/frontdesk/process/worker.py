"""The composition root: one worker, put together by plain constructors. Production and tests use the same one."""

import asyncio
import gc
import resource
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import structlog
import uvloop

from frontdesk.core.credential import Credentials
from frontdesk.core.event import Events
from frontdesk.core.issuer import Issuer, Issuers
from frontdesk.core.limit import Limits
from frontdesk.core.notes import Notes
from frontdesk.core.password import Passwords
from frontdesk.core.token import Tokens
from frontdesk.db.database import Database
from frontdesk.db.paging import SharedPageTokens
from frontdesk.errors import Refused
from frontdesk.live.feed import Feed
from frontdesk.live.hints import Hints
from frontdesk.live.tail import Tail
from frontdesk.live.watcher import Watchers
from frontdesk.process.log import configure_log, dropped, failure
from frontdesk.process.stopping import stop_event
from frontdesk.rpc.access import Access
from frontdesk.rpc.origin import Origins
from frontdesk.rpc.pipeline import Pipeline
from frontdesk.rpc.server import Server
from frontdesk.rpc.services import servicers
from frontdesk.rpc.services.event import message_of
from frontdesk.rpc.services.queue import Updates
from frontdesk.settings import Settings
from frontdesk.settings.issuers import TrustedIssuer
from frontdesk.tasks import Background

if TYPE_CHECKING:
    from frontdesk.process.metrics import Files, WorkerMetrics
    from frontdesk.process.tracing import Tracing

HEALTH_SECONDS = 1.0
"""Seconds between two checks of the database."""

SAMPLE_SECONDS = 1.0
"""Seconds between two writes of the gauges: written at intervals, they cost no call anything."""

_LAST_SECONDS = 2.0
"""How long a worker that ends tries to write the last of the log."""

_log = structlog.get_logger("frontdesk.worker")

_health = """
select current_setting('transaction_read_only')::boolean, coalesce(current_setting('frontdesk.now', true), '') <> ''
"""


class Worker:
    """One process's part of the service: pool, feed and server. Create it inside the running loop, after any fork."""

    def __init__(
        self,
        settings: Settings,
        conninfo: str,
        *,
        reuse_port: bool = False,
        metrics: "WorkerMetrics | None" = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._healthy = False
        self._db = Database(
            conninfo,
            pool_size=settings.pool_size,
            pooled=settings.pooler == "transaction",
            direct=settings.direct_database_url,
            tracing=tracing,
        )
        self._hints = Hints(self._db)
        self._feed = Feed(
            self._db,
            self._hints,
            Updates(),
            keep_seconds=settings.keep_events_days * 86400,
            seen=None if metrics is None else metrics.change_seen,
        )
        events = Events(self._db, keep_seconds=settings.keep_log_days * 86400)
        self._tail = Tail(events, self._hints, message_of, seen=None if metrics is None else metrics.event_seen)
        self._watchers = Watchers(most=settings.max_watchers, most_of_caller=settings.max_watchers_per_caller)
        self._passwords = Passwords()
        tokens = Tokens(self._db, seconds=settings.access_token_seconds)
        self._credentials = Credentials(
            self._db,
            tokens,
            Issuers([_issuer(one) for one in settings.issuers]),
            user_requests_per_minute=settings.user_requests_per_minute,
            mails=settings.smtp_url is not None,
        )
        self._limits = Limits(self._db)
        self._notes = Notes(self._db)
        origins = Origins(settings.proxies)
        self._pipeline = Pipeline(
            max_in_flight=settings.max_in_flight,
            notes=self._notes,
            page_tokens=SharedPageTokens(self._db),
            access=Access(
                self._credentials,
                self._limits,
                origins,
                required=settings.access_mode == "required",
                client_certificates=settings.tls_client_ca is not None,
                address_requests_per_minute=settings.address_requests_per_minute,
            ),
            origins=origins,
            metrics=metrics,
            tracing=tracing,
        )
        for servicer in servicers(
            self._db,
            self._feed,
            events,
            self._tail,
            self._watchers,
            self._passwords,
            tokens,
            channels=settings.channels,
        ):
            self._pipeline.add(servicer)
        self._server = Server(settings, self._pipeline, self._watchers, reuse_port=reuse_port)
        self._background = Background()

    async def start(self, address: str, **others: str) -> int:
        """Connect and serve; the port. Raises OSError if an address cannot be served.

        `others` are `certificate_address` and `health_address`: those of the settings, with a port that is not 0.
        """
        await self._db.open()
        self._hints.start()
        self._feed.start()
        self._tail.start()
        port = await self._server.start(address, **others)
        await self._check_database()
        self._background.start(self._keep_checking)
        self._background.start(self._credentials.follow)
        self._background.start(self._notes.follow)
        if self._metrics is not None:
            self._background.start(self._keep_measuring)
        return port

    async def stop(self, *, drain: bool = True) -> None:
        """End; with `drain`, let running calls finish and tell watchers to reconnect."""
        await self._background.close()
        await (self._server.drain() if drain else self._server.stop())
        self._passwords.close()
        await self._feed.close()
        await self._tail.close()
        await self._hints.close()
        await self._limits.close()
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                await self._notes.finish()
        except Exception as error:
            # Whatever the database says: the end goes on, and the text may quote a row.
            _log.error("last_of_the_log_lost", **failure(error))
        await self._db.close()

    async def _keep_checking(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            await self._check_database()

    async def _keep_measuring(self) -> None:
        assert self._metrics is not None
        while True:
            self._metrics.sample(
                healthy=self._healthy,
                in_flight=self._pipeline.in_flight,
                watchers=len(self._watchers),
                backlog=self._feed.backlog,
                age=self._feed.age,
                events_backlog=self._tail.backlog,
                notes_dropped=self._notes.dropped,
                pool=self._db.pool_stats(),
                lines_dropped=dropped(),
            )
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _check_database(self) -> None:
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                # A standby answers reads, and could take no booking.
                found = await self._db.row(_health, (), lambda *columns: columns)
            read_only, clock_is_set = found or (True, True)
        except (Refused, TimeoutError):
            read_only = clock_is_set = True
        if self._metrics is not None:
            self._metrics.clock_is_real = not clock_is_set
        self._healthy = not read_only
        self._server.serving(self._healthy)


def _issuer(trusted: TrustedIssuer) -> Issuer:
    given = trusted.model_dump()
    return Issuer(**{**given, "clinic_ids": [str(clinic_id) for clinic_id in trusted.clinic_ids]})


def run_worker(
    settings: Settings,
    conninfo: str,
    address: str,
    reuse_port: bool,
    ready: Connection,
    metrics: "Files | None" = None,
    handover: Connection | None = None,
    **others: str,
) -> None:
    """The whole life of a worker process. Sends its port to `ready`, or one line why it cannot start.

    It lives until SIGTERM. With `handover` it lives until that has a message, or ends, or until a second SIGTERM; on
    the first one it sends a message there.

    `others` as in `Worker.start`. With `metrics`, PROMETHEUS_MULTIPROC_DIR must be set as frontdesk.process.metrics
    requires.
    """
    configure_log(settings.log_level)
    try:
        _run_worker(settings, conninfo, address, reuse_port, ready, metrics, handover, others)
    except Exception as error:
        # Not by multiprocessing, which would write the exception's text.
        _log.critical("worker_failed", **failure(error))
        sys.exit(1)


def _run_worker(
    settings: Settings,
    conninfo: str,
    address: str,
    reuse_port: bool,
    ready: Connection,
    metrics: "Files | None",
    handover: Connection | None,
    others: Mapping[str, str],
) -> None:
    # Each connection is a file; the usual limit of 1,024 is meant for programs that use select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Metrics and traces that are off are not even imported, and cost a call two comparisons.
    measures: dict[str, Any] = {}
    exporter = None
    if metrics is not None:
        from frontdesk.process.metrics import WorkerMetrics

        measures["metrics"] = WorkerMetrics(metrics)
    if settings.traces == "on":
        from frontdesk.process.tracing import Exporter, Tracing

        exporter = Exporter()
        measures["tracing"] = Tracing(exporter.provider)
    # Imported modules live as long as the process, and a thousand streams are not garbage: scanning them as often as
    # Python does by default doubled the tail of a watcher's lag. But gRPC leaves five objects of each call to the
    # collector: freeing 50,000 at once took 60 ms, in which no call was answered.
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 500, 1000)
    uvloop.run(_serve(address, others, ready, handover, settings, conninfo, reuse_port=reuse_port, **measures))
    if exporter is not None:
        exporter.close()


async def _serve(
    address: str,
    others: Mapping[str, str],
    ready: Connection,
    handover: Connection | None,
    settings: Settings,
    conninfo: str,
    **more: Any,
) -> None:
    stop = stop_event(handover)
    try:
        settings.check_files()
    except ValueError as error:
        ready.send(str(error))
        return
    worker = Worker(settings, conninfo, **more)
    try:
        port = await worker.start(address, **others)
    except OSError as error:
        ready.send(str(error))
        await worker.stop(drain=False)
        return
    ready.send(port)
    _log.info("serving", port=port)
    await stop.wait()
    await worker.stop()
