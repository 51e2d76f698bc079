"""Relays: each sends all events to a message broker, in their order, one process at a time.

A relay has the position of a reader of the log. It moves on when the broker has acknowledged everything before it, so
an event is sent at least once; its id tells a twin. Events are sent without waiting for one another, in ways that keep
their order: a broker takes an event only after the one before it. What a broker refuses for good is set aside.

The process that works holds the relay for some seconds at a time, by the row of the reader. No transaction is open
meanwhile, since that would hold up the sealing of the log.
"""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import structlog

from frontdesk.core.event import Event, read_events
from frontdesk.db.database import Database, Transaction
from frontdesk.jobs.circuit import Circuit
from frontdesk.settings.brokers import KafkaTopic, NatsServers

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Producer
    from nats.aio.client import Client
    from nats.aio.msg import Msg

BATCH = 1_000
"""Rows of the log that are sent together."""
PAUSE_SECONDS = 0.1
"""Between two batches that are not full: changes meanwhile share the cost of one."""
POLL_SECONDS = 1.0
"""The longest pause; a hint of a change ends it."""
HOLD_SECONDS = 10.0
"""After a process was killed another one goes on so much later. No single step may take as long."""
_KEEP_SECONDS = 2.0
"""Between two renewals."""
_STEP_SECONDS = 0.5
"""A process waits no longer for a broker before it looks whether it still holds the relay."""
_STALLED_SECONDS = 10.0
"""After so long without an answer the log says so."""
_MEASURE_SECONDS = 5.0
_MOST_COUNTED = 10_000
_REDRIVEN = 100
_LAST_SECONDS = 2.0
"""How long a process that ends waits for the answers to what it has sent."""

_take = f"""
insert into log_reader as r (name, position, holder, held_until)
values (
    %(name)s,
    -- A relay that is new begins with the oldest event that is kept.
    coalesce((select position from log_reader where name = %(name)s), (select position from event_place(%(keep)s))),
    %(holder)s, clock_timestamp() + interval '{HOLD_SECONDS} s')
on conflict (name) do update set holder = excluded.holder, held_until = excluded.held_until
where r.holder is null or r.holder = excluded.holder or r.held_until < clock_timestamp()
returning position
"""
# Not if somebody has set the position meanwhile.
_advance = f"""
update log_reader set position = %(end)s, update_time = moment(),
    held_until = clock_timestamp() + interval '{HOLD_SECONDS} s'
where name = %(name)s and holder = %(holder)s and position = %(position)s
"""
_release = "update log_reader set holder = null, held_until = null where name = %(name)s and holder = %(holder)s"
_set_aside = """
insert into relay_refusal (relay, position, event_id, type, resource, reason) values (%s, %s, %s, %s, %s, %s)
on conflict (relay, position) do update set reason = excluded.reason, again = false
"""
_again = "select position from relay_refusal where relay = %s and again order by position limit %s"
_taken = "delete from relay_refusal where relay = %s and position = %s"
_behind = """
select count(l.id), coalesce(extract(epoch from moment() - min(l.time)), 0)::float8
from (select id from seal where position > coalesce((select position from log_reader where name = %s), 0)
      order by position limit %s) s
join log l on l.id = s.id and is_event(l.type)
"""

_set = """
insert into log_reader (name, position) values (%s, %s)
on conflict (name) do update
set position = excluded.position, update_time = moment(), holder = null, held_until = null
"""
_refused = "select relay, event_id::text, type, resource, reason from relay_refusal order by relay, position"
_try_again = "update relay_refusal set again = true"

_log = structlog.get_logger("frontdesk.relay")


class Away(Exception):
    """The broker does not take events now. The message is a code, and never an address."""


class _Lost(Exception):
    """Another process relays now, or somebody has set the position."""


@dataclass(slots=True, eq=False)
class Parcel:
    """An event on its way."""

    position: int
    id: str
    type: str
    """As the broker's consumers know it: clinic.frontdesk.v1.appointment.booked."""
    resource: str
    body: bytes
    content_type: str
    done: bool = False
    refusal: str = ""
    """Why the broker has refused it for good, as a code."""


class Broker(Protocol):
    """Where events go."""

    @property
    def name(self) -> str:
        """The relay's: not that of a host, so that another one goes on where the last has ended."""

    async def send(self, parcels: Sequence[Parcel]) -> None:
        """Begin to send these, or as many of the first as it likes, in order; what was sent before is answered.

        An event that the broker takes was preceded by all before it that are not refused. Raises Away, and then nothing
        is under way any more.
        """

    async def answered(self, seconds: float) -> bool:
        """Wait so long, at most, for the answers; whether all are there. They are in the parcels.

        A parcel without one, though all are there, is to be sent again. Raises Away, as `send` does.
        """

    async def close(self) -> None:
        """Leave the broker. Harmless if there is no connection."""


@dataclass(slots=True)
class _Batch:
    start: int
    parcels: Sequence[Parcel]
    end: int


class Relay:
    """One relay of a process. Use it in one task."""

    def __init__(
        self,
        db: Database,
        broker: Broker,
        encode: Callable[[Event], tuple[str, bytes]],
        content_type: str,
        *,
        keep_seconds: float,
    ) -> None:
        """`encode` makes the type and the message of an event. A new relay begins with the oldest of `keep_seconds`."""
        self.name = broker.name
        self.sent = self.set_aside = 0
        """Events that the broker has taken, and that it has refused for good, since the process began."""
        self.backlog, self.age = 0, 0.0
        """The events that are still to be sent, up to 10,000, and the seconds for which the first has waited."""
        self._db = db
        self._broker = broker
        self._encode = encode
        self._content_type = content_type
        self._circuit = Circuit()
        self._who = {"name": self.name, "holder": uuid.uuid4(), "keep": keep_seconds}
        self._kept = 0.0
        self._batch: _Batch | None = None
        """What is under way; also while the database is away, so that it need not be sent again."""
        self._wake = asyncio.Event()

    def changed(self) -> None:
        """The sealed log may have grown: look soon."""
        self._wake.set()

    async def work(self) -> None:
        """Relay for ever, whenever no other process does. Raises DatabaseUnavailable."""
        while True:
            position = await self._take()
            if position is None:
                await asyncio.sleep(_KEEP_SECONDS)
                continue
            with suppress(_Lost):
                await self._relay(position)
            # What is under way is the affair of another process, or of another position.
            self._batch = None
            await self._broker.close()

    async def finish(self) -> None:
        """End, after `work` was cancelled: note what the broker has taken, and let another process go on."""
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                if self._batch is not None:
                    with suppress(Away):
                        while not await self._broker.answered(_STEP_SECONDS / 5):
                            pass
        except TimeoutError:
            pass
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                if self._batch is not None:
                    with suppress(_Lost):
                        await self._note(self._batch)
                await self._db.run(_release, self._who)
        finally:
            await self._broker.close()

    async def measure(self) -> None:
        """Look for ever how far behind the relay is, whichever process works. Raises DatabaseUnavailable."""
        while True:
            found = await self._db.row(_behind, (self.name, _MOST_COUNTED), lambda *columns: columns)
            assert found is not None
            self.backlog, self.age = found[0], max(found[1], 0.0)
            await asyncio.sleep(_MEASURE_SECONDS)

    async def _take(self) -> int | None:
        """The position, if no other process holds the relay; this one does now."""
        began = time.monotonic()
        position = await self._db.row(_take, self._who, int)
        if position is not None:
            self._kept = began
        return position

    async def _keep(self, position: int) -> None:
        if time.monotonic() - self._kept > _KEEP_SECONDS and await self._take() != position:
            raise _Lost

    async def _relay(self, position: int) -> None:
        if self._batch is not None and self._batch.start != position:
            raise _Lost
        while True:
            self._wake.clear()
            batch = self._batch or await self._next(position)
            if batch.end > position:
                self._batch = batch
                await self._deliver(batch.parcels, position)
                await self._note(batch)
                position, self._batch = batch.end, None
            await self._redrive(position)
            if batch.end - batch.start < BATCH:
                await asyncio.sleep(PAUSE_SECONDS)
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS - PAUSE_SECONDS):
                        await self._wake.wait()
            await self._keep(position)

    async def _next(self, position: int) -> _Batch:
        stretch = await read_events(self._db, position, BATCH)
        return _Batch(position, [self._parcel(event) for event in stretch.events], stretch.end)

    def _parcel(self, event: Event) -> Parcel:
        parcel = Parcel(event.position, str(event.id), event.type, event.resource, b"", self._content_type)
        try:
            parcel.type, parcel.body = self._encode(event)
        except Exception:
            # A fault of ours may stop one event, but none behind it.
            parcel.done, parcel.refusal = True, "INTERNAL"
        return parcel

    async def _deliver(self, parcels: Sequence[Parcel], position: int) -> None:
        """Send until the broker has answered each, however long that takes."""
        since, told = time.monotonic(), False
        left = sum(not parcel.done for parcel in parcels)
        while left:
            cause = "no answer"
            try:
                if self._circuit.wait_seconds:
                    await asyncio.sleep(min(self._circuit.wait_seconds, _STEP_SECONDS))
                elif await self._broker.answered(_STEP_SECONDS):
                    await self._keep(position)
                    await self._broker.send([parcel for parcel in parcels if not parcel.done])
            except Away as error:
                self._circuit.failed()
                cause = str(error)
            still = sum(not parcel.done for parcel in parcels)
            if still < left:
                left, since = still, time.monotonic()
                self._circuit.worked()
                if told:
                    told = False
                    _log.info("relay_goes_on", relay=self.name)
            elif not told and (cause != "no answer" or time.monotonic() - since > _STALLED_SECONDS):
                told = True
                _log.warning("relay_waits", relay=self.name, cause=cause)
            await self._keep(position)

    async def _note(self, batch: _Batch) -> None:
        """Move the position to where everything before is answered, and set aside what was refused."""
        done = []
        for parcel in batch.parcels:
            if not parcel.done:
                break
            done.append(parcel)
        end = batch.end if len(done) == len(batch.parcels) else done[-1].position if done else batch.start
        if end == batch.start:
            return
        refused = [parcel for parcel in done if parcel.refusal]

        async def note(tx: Transaction) -> None:
            if not await tx.run(_advance, {**self._who, "position": batch.start, "end": end}):
                raise _Lost
            for parcel in refused:
                await tx.run(_set_aside, self._refusal(parcel))

        began = time.monotonic()
        await self._db.transaction(note)
        self._kept = began
        self.sent += len(done) - len(refused)
        self.set_aside += len(refused)
        for parcel in refused:
            _log.warning("event_set_aside", relay=self.name, event_id=parcel.id, reason=parcel.refusal)

    def _refusal(self, parcel: Parcel) -> tuple[object, ...]:
        return (self.name, parcel.position, parcel.id, parcel.type, parcel.resource, parcel.refusal)

    async def _redrive(self, position: int) -> None:
        """Send late what an operator wants to be sent again."""
        for place in await self._db.rows(_again, (self.name, _REDRIVEN), int):
            stretch = await read_events(self._db, place - 1, 1)
            # None if it is older than the log is kept.
            for parcel in map(self._parcel, stretch.events):
                await self._deliver([parcel], position)
                if parcel.refusal:
                    await self._db.run(_set_aside, self._refusal(parcel))
                    break
                self.sent += 1
            else:
                await self._db.run(_taken, (self.name, place))


async def set_position(db: Database, name: str, position: int) -> None:
    """Let the relay go on with what follows this position, whether it is at work or not. Raises DatabaseUnavailable."""
    await db.run(_set, (name, position))


async def refused_events(db: Database) -> Sequence[tuple[str, str, str, str, str]]:
    """What brokers have refused for good: relay, event, type, resource and reason. Raises DatabaseUnavailable."""
    return await db.rows(_refused, (), lambda *columns: columns)


async def redrive(db: Database) -> int:
    """Let each relay send once more what its broker has refused; how many events that are."""
    return await db.run(_try_again, ())


class Nats:
    """NATS with JetStream.

    Each message but the first demands that the one before it is the last of the stream. So if one is not taken, those
    behind it are not either, and are sent again; another publisher into the same stream costs no more than that.
    """

    name = "nats"
    STREAM, SUBJECTS = "FRONTDESK", "frontdesk.>"

    _STEP_SECONDS = 2
    _PATIENCE_SECONDS = 10.0
    """A connection on which nothing is answered for so long is given up."""
    _HEADER_BYTES = 300
    _NOT_LAST = 10070
    """What the server says if the message before is not the last one."""

    def __init__(self, servers: NatsServers) -> None:
        self._servers = servers
        self._client: Client | None = None
        self._inbox = ""
        self._under_way: dict[str, Parcel] = {}
        self._first = ""
        self._next = 0
        self._heard = asyncio.Event()
        self._answer_time = 0.0
        self._trouble = ""

    async def send(self, parcels: Sequence[Parcel]) -> None:
        try:
            if self._client is None or not self._client.is_connected:
                await self.close()
                await self._connect()
            async with asyncio.timeout(self._STEP_SECONDS):
                await self._publish(parcels)
        except Exception as error:
            # Whatever the client and its TLS say.
            refused = "authorization violation" in str(error).lower()
            await self._away("authorization violation" if refused else type(error).__name__)

    async def answered(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._under_way and not self._trouble:
                    self._heard.clear()
                    await self._heard.wait()
        if not self._trouble and self._under_way and time.monotonic() - self._answer_time > self._PATIENCE_SECONDS:
            self._trouble = "no answer"
        if self._trouble:
            await self._away(self._trouble)
        return not self._under_way

    async def close(self) -> None:
        client, self._client = self._client, None
        self._under_way = {}
        self._trouble = ""
        if client is not None:
            with suppress(Exception):
                async with asyncio.timeout(self._STEP_SECONDS / 2):
                    await client.close()

    async def _away(self, cause: str) -> None:
        await self.close()
        raise Away(cause)

    async def _connect(self) -> None:
        from nats.aio.client import Client
        from nats.js.api import StorageType, StreamConfig
        from nats.js.errors import NotFoundError

        async def lost() -> None:
            if self._under_way:
                self._trouble = "connection lost"
            self._heard.set()

        async def ignore(error: Exception) -> None:
            """Whoever waits for an answer learns of it; the client's own way is to log it with its text."""

        user, password = self._servers.user, self._servers.password
        self._client = client = Client()
        async with asyncio.timeout(2 * self._STEP_SECONDS):
            await client.connect(
                list(self._servers.urls),
                name="frontdesk",
                # A new connection begins anew, in order.
                allow_reconnect=False,
                connect_timeout=self._STEP_SECONDS,
                user=user,
                password=password if user is not None else None,
                token=password if user is None else None,
                error_cb=ignore,
                disconnected_cb=lost,
                closed_cb=lost,
            )
            streams = client.jetstream(timeout=self._STEP_SECONDS / 2)
            try:
                # A server does not answer whoever may not ask: then somebody else has made the stream.
                with suppress(TimeoutError):
                    await streams.find_stream_name_by_subject(self.SUBJECTS)
            except NotFoundError:
                await streams.add_stream(
                    StreamConfig(name=self.STREAM, subjects=[self.SUBJECTS], storage=StorageType.FILE)
                )
            self._inbox = client.new_inbox()
            await client.subscribe(f"{self._inbox}.*", cb=self._hear)

    async def _publish(self, parcels: Sequence[Parcel]) -> None:
        assert self._client is not None
        self._answer_time = time.monotonic()
        before = ""
        for parcel in parcels:
            headers = {"Nats-Msg-Id": parcel.id, "content-type": parcel.content_type}
            if before:
                headers["Nats-Expected-Last-Msg-Id"] = before
            self._next += 1
            token = str(self._next)
            if not before:
                self._first = token
            if len(parcel.body) + self._HEADER_BYTES > self._client.max_payload:
                self._settle(parcel, "MAX_PAYLOAD")
                continue
            before = parcel.id
            self._under_way[token] = parcel
            await self._client.publish(f"frontdesk.{parcel.type}", parcel.body, f"{self._inbox}.{token}", headers)

    async def _hear(self, message: "Msg") -> None:
        token = message.subject.rpartition(".")[2]
        parcel = self._under_way.pop(token, None)
        if parcel is None:
            return
        self._answer_time = time.monotonic()
        answer = json.loads(message.data) if message.data else {"error": {"code": 503}}
        if (error := answer.get("error")) is None:
            parcel.done = True
        else:
            code = error.get("err_code", error["code"])
            if code == self._NOT_LAST and token != self._first:
                # To be sent again, since one before it was not taken.
                pass
            elif error["code"] == 400 and code != self._NOT_LAST:
                self._settle(parcel, str(code))
            else:
                self._trouble = str(code)
        if not self._under_way or self._trouble:
            self._heard.set()

    @staticmethod
    def _settle(parcel: Parcel, refusal: str) -> None:
        parcel.done, parcel.refusal = True, refusal


class Kafka:
    """A topic of Kafka. Events of one resource are in one partition, and each partition has its events in order.

    The producer is librdkafka's idempotent one, which waits for a broker that is away and goes on without twins. It
    stops for good rather than leave out an event of a partition; then a new one begins with that event.
    """

    _REFUSALS = ("MSG_SIZE_TOO_LARGE", "INVALID_RECORD")
    _CONSEQUENCES = ("_PURGE_QUEUE", "_PURGE_INFLIGHT", "_FATAL", "_INVALID_DIFFERENT_RECORD")
    """The errors of messages that fail because the producer has ended, or one beside them was refused."""

    def __init__(self, topic: KafkaTopic) -> None:
        self.name = f"kafka/{topic.topic}"
        self._topic = topic
        self._producer: Producer | None = None
        self._under_way: set[Parcel] = set()
        self._sent = 0
        self._singly = 0
        """So many are sent one by one: Kafka refuses what is sent together as a whole."""
        self._error = ""
        """Why the present producer has ended."""

    async def send(self, parcels: Sequence[Parcel]) -> None:
        if self._singly:
            self._singly -= 1
            parcels = parcels[:1]
        self._sent = len(parcels)
        try:
            if self._producer is None:
                self._producer = self._connect()
            for parcel in parcels:
                self._under_way.add(parcel)
                self._producer.produce(
                    self._topic.topic,
                    parcel.body,
                    parcel.resource.encode(),
                    headers={"content-type": parcel.content_type.encode()},
                    on_delivery=partial(self._hear, parcel),
                )
        except Exception as error:
            # Whatever the client says.
            await self.close()
            raise Away(type(error).__name__) from None

    async def answered(self, seconds: float) -> bool:
        await asyncio.to_thread(self._wait, seconds)
        if self._under_way or not self._error:
            return not self._under_way
        error = self._error
        await self.close()
        if error not in self._REFUSALS:
            raise Away(error)
        if self._sent > 1:
            self._singly = self._sent
        return True

    async def close(self) -> None:
        producer, self._producer = self._producer, None
        self._under_way = set()
        self._error = ""
        if producer is not None:
            await asyncio.to_thread(self._drop, producer)

    def _connect(self) -> "Producer":
        import confluent_kafka

        # Of its own: nobody sees what librdkafka writes. The answers say the same.
        nowhere = logging.Logger("librdkafka")
        nowhere.addHandler(logging.NullHandler())
        return confluent_kafka.Producer(
            {
                "bootstrap.servers": self._topic.servers,
                "client.id": "frontdesk",
                "enable.idempotence": True,
                "enable.gapless.guarantee": True,
                # A broker takes a new producer's second request though it has refused the first one.
                "max.in.flight.requests.per.connection": 1,
                # What waits longer would be left out.
                "message.timeout.ms": 0,
                # What is too large is for the broker to say.
                "message.max.bytes": 1_000_000_000,
                # That of the Java clients, so that both find the same partition.
                "partitioner": "murmur2_random",
                "socket.keepalive.enable": True,
            },
            logger=nowhere,
        )

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (producer := self._producer) is not None and self._under_way and time.monotonic() < end:
            # It says so if the producer has ended. Every message has its own answer.
            with suppress(Exception):
                producer.poll(max(0.0, end - time.monotonic()))

    def _hear(self, parcel: Parcel, error: "KafkaError | None", _: object) -> None:
        if parcel not in self._under_way:
            return
        if error is None:
            parcel.done = True
        else:
            if self._error in ("", *self._CONSEQUENCES):
                self._error = error.name()
            if self._sent == 1 and error.name() in self._REFUSALS:
                parcel.done, parcel.refusal = True, error.name()
        self._under_way.discard(parcel)

    @staticmethod
    def _drop(producer: "Producer") -> None:
        with suppress(Exception):
            producer.purge(blocking=False)
        with suppress(Exception):
            producer.flush(0)
