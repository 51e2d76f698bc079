"""What happens in the background: one process beside the workers, put together by plain constructors.

Every replica runs one. The database decides who does a piece of work, so each is done once, and another replica goes on
with what a killed one has left.
"""

import asyncio
import gc
import random
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import structlog
import uvloop

from frontdesk.core.leave import Leaves
from frontdesk.db.database import Database
from frontdesk.jobs.horizon import keep_ahead
from frontdesk.jobs.maintenance import clean, retention
from frontdesk.jobs.notifying import Channel, Planner, Sender
from frontdesk.jobs.offering import Offering
from frontdesk.jobs.relaying import Broker, Kafka, Nats, Relay
from frontdesk.jobs.sealing import Sealer
from frontdesk.jobs.settling import go_on
from frontdesk.live.hints import QUEUE, SEALED, Hints
from frontdesk.process.log import configure_log, failure
from frontdesk.process.stopping import stop_event
from frontdesk.settings import Settings
from frontdesk.tasks import Background

if TYPE_CHECKING:
    from frontdesk.process.metrics import BackgroundMetrics, Files

CLEAN_SECONDS = 3600.0
"""Seconds between two cleanings by a process; several do not hinder one another."""

SAMPLE_SECONDS = 1.0
"""Seconds between two writes of the gauges."""

_POOL_SIZE = 6
"""Database connections: each kind of work has one statement at a time; a relay has two more."""

_LAST_SECONDS = 2.0
"""How long a process that ends tries to seal the last of the log."""

_log = structlog.get_logger("frontdesk.background")


class BackgroundWork:
    """All background work of one process. Create it inside the running loop, after any fork."""

    def __init__(self, settings: Settings, conninfo: str, *, metrics: "BackgroundMetrics | None" = None) -> None:
        self._settings = settings
        self._metrics = metrics
        self._db = Database(
            conninfo,
            pool_size=_POOL_SIZE
            + 2 * sum(broker is not None for broker in (settings.nats, settings.kafka))
            + 3 * len(settings.channels),
            pooled=settings.pooler == "transaction",
            direct=settings.direct_database_url,
        )
        self._hints = Hints(self._db)
        channels = _channels(settings)
        self._senders = [Sender(self._db, channel, settings.retry_hours * 3600) for channel in channels]
        self._planner = Planner(self._db, [channel.name for channel in channels], self._planned)
        self._sealer = Sealer(self._db, self._sealed)
        self._relays = _relays(settings, self._db)
        # Most changes are of doctor-days, which workers hint at.
        self._hints.hear(QUEUE, lambda _: self._sealer.changed(), self._sealer.changed)
        self._hints.hear(SEALED, lambda _: self._look_at_the_log(), self._look_at_the_log)
        self._leaves = Leaves(self._db, lambda doctor_id, day: self._hints.send(QUEUE, f"{doctor_id}/{day}"))
        self._offering = Offering(self._db)
        self._tasks = Background()

    async def start(self) -> None:
        """Connect and begin."""
        await self._db.open()
        self._hints.start()
        self._tasks.start(self._sealer.follow)
        self._tasks.start(self._keep_clean)
        self._tasks.start(self._settle)
        self._tasks.start(self._planner.follow)
        for sender in self._senders:
            self._tasks.start(sender.follow)
        self._tasks.start(self._offering.follow)
        if self._settings.slot_horizon_days:
            self._tasks.start(self._keep_ahead)
        for relay in self._relays:
            self._tasks.start(relay.work)
        if self._metrics is not None:
            self._tasks.start(self._keep_measuring)
            for relay in self._relays:
                self._tasks.start(relay.measure)
            for sender in self._senders:
                self._tasks.start(sender.measure)

    async def stop(self) -> None:
        """End; whatever was begun is done, or will be begun again."""
        await self._tasks.close()
        await asyncio.gather(*map(_finish, self._relays))
        for sender in self._senders:
            await sender.finish()
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                await self._sealer.finish()
        except Exception as error:
            # Whatever the database says: the end goes on, and the next process seals.
            _log.warning("last_of_the_log_unsealed", **failure(error))
        await self._hints.close()
        await self._db.close()

    def _sealed(self) -> None:
        self._hints.send(SEALED)
        self._look_at_the_log()

    def _look_at_the_log(self) -> None:
        for relay in self._relays:
            relay.changed()
        self._planner.changed()

    def _planned(self) -> None:
        for sender in self._senders:
            sender.planned()

    async def _keep_clean(self) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * CLEAN_SECONDS)
            removed = await clean(self._db, **retention(self._settings))
            _log.info("cleaned", keys=removed.keys, audit_events=removed.audit_events)

    async def _settle(self) -> None:
        await go_on(self._leaves)

    async def _keep_ahead(self) -> None:
        await keep_ahead(self._db, self._settings.slot_horizon_days)

    async def _keep_measuring(self) -> None:
        assert self._metrics is not None
        while True:
            open_transaction = await self._sealer.oldest_transaction()
            self._metrics.sample(unsealed=self._sealer.age, open_transaction=open_transaction)
            for relay in self._relays:
                self._metrics.sample_relay(
                    relay.name,
                    backlog=relay.backlog,
                    age=relay.age,
                    sent=relay.sent,
                    set_aside=relay.set_aside,
                )
            for sender in self._senders:
                self._metrics.sample_channel(
                    sender.name, due=sender.due, age=sender.age, sent=sender.sent, dead=sender.dead
                )
            await asyncio.sleep(SAMPLE_SECONDS)


async def _finish(relay: Relay) -> None:
    try:
        await relay.finish()
    except Exception as error:
        # The next process waits for a while, and sends twins of the last events.
        _log.warning("relay_unfinished", relay=relay.name, **failure(error))


def _relays(settings: Settings, db: Database) -> Sequence[Relay]:
    brokers: list[Broker] = []
    if settings.nats is not None:
        brokers.append(Nats(settings.nats))
    if settings.kafka is not None:
        brokers.append(Kafka(settings.kafka))
    if not brokers:
        return []
    from frontdesk.rpc.cloud_event import CONTENT_TYPES, ENCODERS

    encode, content_type = ENCODERS[settings.events_format], CONTENT_TYPES[settings.events_format]
    keep = settings.keep_log_days * 86400
    return [Relay(db, broker, encode, content_type, keep_seconds=keep) for broker in brokers]


def _channels(settings: Settings) -> list[Channel]:
    """The channels that are configured; their libraries are imported only then."""
    found: list[Channel] = []
    if settings.channels:
        from frontdesk.channels.texts import Wording

        wording = Wording(settings.template_dir)
        if (server := settings.mail_server) is not None and (sender := settings.mail_sender) is not None:
            from frontdesk.channels.mail import Mail

            found.append(Mail(server, sender, wording))
        if settings.webhook_url is not None:
            from frontdesk.channels.webhook import Webhook

            found.append(Webhook(settings.webhook_url, settings.webhook_secrets, wording))
    return found


def run_background(
    settings: Settings,
    conninfo: str,
    ready: Connection,
    handover: Connection | None = None,
    metrics: "Files | None" = None,
) -> None:
    """The whole life of the process: it sends 0 to `ready` once it works, and lives until SIGTERM.

    `handover` and `metrics` are as in `run_worker`, but a SIGTERM is obeyed at once.
    """
    configure_log(settings.log_level)
    try:
        measures = None
        if metrics is not None:
            from frontdesk.process.metrics import BackgroundMetrics

            measures = BackgroundMetrics(metrics)
        gc.collect()
        gc.freeze()
        uvloop.run(_serve(settings, conninfo, ready, measures))
    except Exception as error:
        # Not by multiprocessing, which would write the exception's text.
        _log.critical("background_failed", **failure(error))
        sys.exit(1)


async def _serve(settings: Settings, conninfo: str, ready: Connection, metrics: "BackgroundMetrics | None") -> None:
    stop = stop_event(None)
    work = BackgroundWork(settings, conninfo, metrics=metrics)
    await work.start()
    ready.send(0)
    _log.info("working")
    await stop.wait()
    await work.stop()
