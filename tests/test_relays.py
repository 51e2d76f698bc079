"""Relays: real brokers get every event, in order, whatever dies on the way."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, timestamp_pb2
from google.protobuf.json_format import ParseDict
from nats.js.api import DiscardPolicy, StorageType, StreamConfig
from nats.js.errors import NotFoundError
from psycopg.conninfo import conninfo_to_dict

from clinic.frontdesk.v1 import event_pb2
from frontdesk.core.event import Cursor
from frontdesk.errors import DatabaseUnavailable
from frontdesk.jobs.relaying import Relay
from frontdesk.settings import Settings, SettingsError
from frontdesk.settings.brokers import KafkaTopic, NatsServers, parse_kafka, parse_nats
from tests.brokers import KafkaCluster, NatsServer
from tests.clinic import Front
from tests.hostile.wire import Line, working
from tests.servers import Service
from tests.waiting import until, until_true

TYPE = "clinic.frontdesk.v1.appointment.updated"


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A NATS server without streams."""
    with NatsServer(tmp_path / "nats") as server:
        yield server


@pytest.fixture
def kafka() -> Iterator[KafkaCluster]:
    """A Kafka."""
    with KafkaCluster() as cluster:
        yield cluster


@pytest.fixture
def replica(tmp_path: Path, conninfo: str) -> Iterator[Callable[..., Service]]:
    """Starts `frontdesk serve` on the test's database."""
    with ExitStack() as stack:
        names = iter("abcdef")

        def start(**settings: Any) -> Service:
            return stack.enter_context(Service(tmp_path / f"{next(names)}.log", conninfo, **settings))

        yield start


def happen(conninfo: str, count: int, *, size: int = 0, of: str | None = None, days: int = 0) -> None:
    """So many changes of appointments, or `of` one, each in a transaction; an event has `size` more bytes."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for _ in range(count):
            connection.execute(
                "insert into log (id, time, actor, method, type, resource, appointment_id, data)"
                " select log_id(t), t, 'users/1', 'Test', 'appointment.updated', 'appointments/' || id, id,"
                " jsonb_build_object('state', rpad('BOOKED', 6 + %s))"
                " from coalesce(%s::uuid, new_id()) id, (select now() - make_interval(days => %s)) moment (t)",
                (size, of, days),
            )


def ids(conninfo: str) -> list[str]:
    """All events in the order of the log."""
    with psycopg.connect(conninfo) as connection:
        found = connection.execute(
            "select s.id::text from seal s join log l using (id) where l.type is not null order by position"
        )
        return [row for (row,) in found.fetchall()]


def position(conninfo: str, relay: str = "nats") -> int:
    """How far the relay has come."""
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("select position from log_reader where name = %s", (relay,)).fetchone()
        return row[0] if row else 0


def refused(conninfo: str) -> list[tuple[Any, ...]]:
    """What was set aside."""
    with psycopg.connect(conninfo) as connection:
        return connection.execute(
            "select relay, event_id::text, reason from relay_refusal order by position"
        ).fetchall()


def sealed(conninfo: str) -> bool:
    """Whether every change is sealed."""
    with psycopg.connect(conninfo) as connection:
        return connection.execute("select 1 from log where id not in (select id from seal)").fetchone() is None


async def relayed(
    conninfo: str, server: NatsServer, *, stream: str = "FRONTDESK", but: Sequence[str] = ()
) -> list[Any]:
    """The messages of the stream, once it has everything `but` these, in order and without twins."""

    async def complete() -> bool:
        return sealed(conninfo) and await server.count(stream) >= len(ids(conninfo)) - len(but)

    await until_true(complete)
    found: list[Any] = await server.messages(stream)
    assert [message.headers["Nats-Msg-Id"] for message in found] == [id for id in ids(conninfo) if id not in but]
    return found


def event_in(message: Any) -> event_pb2.Event:
    """The event in a message."""
    return ParseDict(json.loads(message.data)["data"], event_pb2.Event())


async def test_nats_has_every_event_in_order(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """The stream is made, the oldest event comes first, and each message is a CloudEvent."""
    happen(conninfo, 2500)
    async with working(settings, conninfo, events_nats=nats.url):
        found = await relayed(conninfo, nats)
        happen(conninfo, 3)
        await relayed(conninfo, nats)
    message = found[0]
    assert message.subject == f"frontdesk.{TYPE}"
    assert message.headers["content-type"] == "application/cloudevents+json; charset=utf-8"
    read = JSONFormat().read(CloudEvent, message.data)
    event = event_in(message)
    assert (read.get_id(), read.get_source(), read.get_type()) == (message.headers["Nats-Msg-Id"], "/frontdesk", TYPE)
    assert read.get_subject() == event.resource == f"appointments/{event.appointment_id}"
    assert read.get_datacontenttype() == "application/json"
    assert read.get_time() == event.time.ToDatetime(tzinfo=UTC)
    assert event.id == read.get_id()
    assert event.data == {"state": "BOOKED"}
    async with nats.client() as client:
        stream = (await client.jetstream().stream_info("FRONTDESK")).config
        assert (stream.subjects, stream.storage) == (["frontdesk.>"], StorageType.FILE)
    assert position(conninfo) == 2503


async def test_kill_background(nats: NatsServer, conninfo: str, replica: Callable[..., Service]) -> None:
    """A killed process loses nothing, and the next one begins where it must."""
    service = await asyncio.to_thread(replica, events_nats=nats.url)
    for _ in range(3):
        await asyncio.to_thread(happen, conninfo, 300)
        (pid,) = service.workers("background")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: service.workers("background") not in ([], [pid]))  # noqa: B023
    await relayed(conninfo, nats)


async def test_a_process_dies_that_waits(nats: NatsServer, conninfo: str, replica: Callable[..., Service]) -> None:
    """What a process had in hand, but not delivered, is delivered by the next one."""
    nats.kill()
    service = await asyncio.to_thread(replica, events_nats=nats.url)
    await asyncio.to_thread(happen, conninfo, 300)
    await until(lambda: sealed(conninfo) and "relay_waits" in service.log.read_text())
    (pid,) = service.workers("background")
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(nats.start)
    await relayed(conninfo, nats)


async def test_nats_is_killed(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """A broker that dies, or is not there yet, is waited for; what it had taken is not sent twice."""
    nats.kill()
    async with working(settings, conninfo, events_nats=nats.url):
        happen(conninfo, 500)
        nats.start()
        for _ in range(3):
            before = await nats.count()
            happen(conninfo, 700)
            await until_true(lambda: more_than(nats, before))  # noqa: B023
            nats.kill()
            happen(conninfo, 50)
            nats.start()
        await relayed(conninfo, nats)


async def more_than(server: NatsServer, count: int) -> bool:
    """Whether the stream has more messages than this."""
    return await server.count() > count


async def test_nats_does_not_answer(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """A broker that takes bytes and answers nothing is waited for, and one that is slow is not given up."""
    async with working(settings, conninfo, events_nats=nats.url) as work:
        happen(conninfo, 10)
        await relayed(conninfo, nats)
        nats.pause()
        happen(conninfo, 2000)
        await until(lambda: work._relays[0]._circuit.open, 40)
        nats.go_on()
        await relayed(conninfo, nats)


class Narrow(Line):
    """A link that carries little at a time."""

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        while data := await source.read(2_000):
            sink.write(data)
            await asyncio.sleep(0.005)
        sink.close()


async def test_a_narrow_way(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """A broker that is slow, but answers, is not given up: everything is sent once."""
    happen(conninfo, 1000)
    async with Narrow(nats.port) as line, working(settings, conninfo, events_nats=f"nats://127.0.0.1:{line.port}"):
        await relayed(conninfo, nats)
    async with nats.client() as client:
        state = (await client.jetstream().stream_info("FRONTDESK")).state
        assert (state.messages, state.last_seq) == (1000, 1000)


async def test_answers_are_lost(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """What the broker has taken without our knowing is sent again, which it notices by the id."""
    async with Line(nats.port) as line, working(settings, conninfo, events_nats=f"nats://127.0.0.1:{line.port}"):
        for _ in range(3):
            # So that there is a connection.
            happen(conninfo, 1)
            await relayed(conninfo, nats)
            before = await nats.count()
            line.muted = True
            happen(conninfo, 300)
            await until_true(lambda: more_than(nats, before + 299))  # noqa: B023
            assert position(conninfo) < last(conninfo)
            line.muted = False
            line.cut()
            await until(lambda: position(conninfo) == last(conninfo))
        await relayed(conninfo, nats)


async def test_a_user_who_may_only_publish(tmp_path: Path, conninfo: str, settings: Settings) -> None:
    """If the operator has made the stream, the relay needs no right but to publish and to hear answers."""
    rights = "permissions: { publish: 'frontdesk.>', subscribe: '_INBOX.>' }"
    users = f"{{ user: relay, password: pw, {rights} }}"
    with NatsServer(tmp_path / "guarded", user="operator", password="pw", users=users) as server:
        async with server.client() as client:
            await client.jetstream().add_stream(StreamConfig(name="FRONTDESK", subjects=["frontdesk.>"]))
        happen(conninfo, 50)
        async with working(settings, conninfo, events_nats=f"nats://relay:pw@127.0.0.1:{server.port}"):
            await relayed(conninfo, server)


async def test_the_oldest_that_is_kept(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """A new relay begins with the oldest event that is shown to readers."""
    happen(conninfo, 3, days=2)
    happen(conninfo, 3)
    async with working(settings, conninfo, events_nats=nats.url, keep_log_days=1):
        await relayed(conninfo, nats, but=ids(conninfo)[:3])


async def test_what_nats_refuses_is_set_aside(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """An event that is too large for the stream stops none behind it, and those keep their order."""
    async with nats.client() as client:
        await client.jetstream().add_stream(StreamConfig(name="OURS", subjects=["frontdesk.>"], max_msg_size=1500))
    for size in (0, 2000, 2000, 0):
        happen(conninfo, 5, size=size)
    async with working(settings, conninfo, events_nats=nats.url):
        await until(lambda: position(conninfo) == 20)
        large = ids(conninfo)[5:15]
        await relayed(conninfo, nats, stream="OURS", but=large)
    assert refused(conninfo) == [("nats", one, "10054") for one in large]
    async with nats.client() as client:
        with pytest.raises(NotFoundError):
            await client.jetstream().stream_info("FRONTDESK")


async def test_an_event_that_cannot_be_written(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """A row that no release of ours writes stops one event, and none behind it."""
    happen(conninfo, 3)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("update log set data = '[1]' where id = (select max(id::text)::uuid from log)")
    happen(conninfo, 3)
    async with working(settings, conninfo, events_nats=nats.url):
        await until(lambda: position(conninfo) == 6)
        broken = ids(conninfo)[2]
        await relayed(conninfo, nats, but=[broken])
    assert refused(conninfo) == [("nats", broken, "INTERNAL")]


async def test_what_no_stream_of_nats_may_take(tmp_path: Path, conninfo: str, settings: Settings) -> None:
    """An event that is larger than any message of the server is set aside too."""
    with NatsServer(tmp_path / "small", more="max_payload: 8192") as server:
        for size in (0, 9000, 0):
            happen(conninfo, 2, size=size)
        async with working(settings, conninfo, events_nats=server.url):
            await until(lambda: position(conninfo) == 6)
            large = ids(conninfo)[2:4]
            await relayed(conninfo, server, but=large)
    assert refused(conninfo) == [("nats", one, "MAX_PAYLOAD") for one in large]


async def test_a_full_stream_is_waited_for(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """A stream at its limit refuses for now. Once it has room, nothing is missing and nothing is out of order."""
    limited = StreamConfig(name="FRONTDESK", subjects=["frontdesk.>"], max_msgs=150, discard=DiscardPolicy.NEW)
    async with nats.client() as client:
        await client.jetstream().add_stream(limited)
    happen(conninfo, 400)
    async with working(settings, conninfo, events_nats=nats.url) as work:
        await until(lambda: work._relays[0]._circuit.open)
        assert await nats.count() == 150
        async with nats.client() as client:
            await client.jetstream().update_stream(limited.evolve(max_msgs=-1))
        await relayed(conninfo, nats)
    assert refused(conninfo) == []


async def test_a_large_event_is_not_overtaken(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """Where there is no room for an event now, but for smaller ones behind it, those wait too."""
    limited = StreamConfig(name="FRONTDESK", subjects=["frontdesk.>"], max_bytes=20_000, discard=DiscardPolicy.NEW)
    async with nats.client() as client:
        await client.jetstream().add_stream(limited)
    happen(conninfo, 5)
    happen(conninfo, 1, size=30_000)
    happen(conninfo, 5)
    async with working(settings, conninfo, events_nats=nats.url) as work:
        await until(lambda: work._relays[0]._circuit.open)
        assert await nats.count() == 5
        async with nats.client() as client:
            await client.jetstream().update_stream(limited.evolve(max_bytes=-1))
        await relayed(conninfo, nats)
    assert refused(conninfo) == []


async def test_others_publish_into_the_stream(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """A stream that takes our subjects among others is used; what others publish there takes nothing away."""
    async with nats.client() as client:
        await client.jetstream().add_stream(StreamConfig(name="ALL", subjects=["frontdesk.>", "other"]))
        async with working(settings, conninfo, events_nats=nats.url):
            happen(conninfo, 1500)
            while position(conninfo) < 1500:
                await client.jetstream().publish("other", b"")
    found = [message for message in await nats.messages("ALL") if message.subject != "other"]
    assert [message.headers["Nats-Msg-Id"] for message in found if message.headers] == ids(conninfo)


async def test_one_replica_relays(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """Of two processes one relays; the other goes on when it ends."""
    async with working(settings, conninfo, events_nats=nats.url) as one:
        happen(conninfo, 100)
        await relayed(conninfo, nats)
        async with working(settings, conninfo, events_nats=nats.url) as other:
            assert await other._relays[0]._take() is None
            happen(conninfo, 100)
            await relayed(conninfo, nats)
            await until(lambda: (one._relays[0].sent, other._relays[0].sent) == (200, 0))
            await one._tasks.close()
            await one._relays[0].finish()
            happen(conninfo, 100)
            await relayed(conninfo, nats)
            await until(lambda: (one._relays[0].sent, other._relays[0].sent) == (200, 100))


async def test_a_process_that_slept(nats: NatsServer, conninfo: str, replica: Callable[..., Service]) -> None:
    """A process that stands still loses the relay to another one, and does no harm when it goes on."""
    first = await asyncio.to_thread(replica, events_nats=nats.url)
    await asyncio.to_thread(happen, conninfo, 10)
    await relayed(conninfo, nats)
    await asyncio.to_thread(replica, events_nats=nats.url)
    (pid,) = first.workers("background")
    await asyncio.to_thread(happen, conninfo, 1000)
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.to_thread(happen, conninfo, 1000)
        await relayed(conninfo, nats)
    finally:
        os.kill(pid, signal.SIGCONT)
    await asyncio.to_thread(happen, conninfo, 500)
    await relayed(conninfo, nats)


async def test_off_and_elsewhere(nats: NatsServer, tmp_path: Path, conninfo: str, settings: Settings) -> None:
    """A relay goes on where it was when it was switched off, also to another host."""
    happen(conninfo, 20)
    async with working(settings, conninfo, events_nats=nats.url):
        await relayed(conninfo, nats)
    happen(conninfo, 10)
    async with working(settings, conninfo):
        await until(lambda: sealed(conninfo))
    with NatsServer(tmp_path / "elsewhere", user="desk", password="p@ss") as elsewhere:
        async with working(settings, conninfo, events_nats=elsewhere.url):
            await relayed(conninfo, elsewhere, but=ids(conninfo)[:20])
    assert await nats.count() == 20


RELAY = f"kafka/{KafkaCluster.TOPIC}"


async def in_kafka(conninfo: str, cluster: KafkaCluster, *, but: Sequence[str] = (), twins: bool = False) -> list[Any]:
    """The messages of the topic, once the relay has sent everything: everything `but` these, each resource in order."""
    await until(lambda: sealed(conninfo) and position(conninfo, RELAY) == last(conninfo), 60)
    found: list[Any] = await asyncio.to_thread(cluster.messages)
    order = {id: number for number, id in enumerate(ids(conninfo))}
    seen: dict[int, list[str]] = {}
    for message in found:
        of = seen.setdefault(message.partition(), [])
        id = json.loads(message.value())["id"]
        if id not in of:
            of.append(id)
        else:
            assert twins
    assert all(of == sorted(of, key=order.__getitem__) for of in seen.values())
    assert sorted((id for of in seen.values() for id in of), key=order.__getitem__) == [
        id for id in ids(conninfo) if id not in but
    ]
    return found


def last(conninfo: str) -> int:
    """The end of the log."""
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("select coalesce(max(position), 0) from seal").fetchone()
        assert row is not None
        return int(row[0])


async def test_kafka_has_every_event_in_order(kafka: KafkaCluster, conninfo: str, settings: Settings) -> None:
    """Each resource has its events in one partition, in order, as CloudEvents."""
    happen(conninfo, 2500)
    async with working(settings, conninfo, events_kafka=kafka.url):
        await in_kafka(conninfo, kafka)
        happen(conninfo, 3)
        message, *rest = await in_kafka(conninfo, kafka)
    assert {one.partition() for one in rest} == set(range(kafka.PARTITIONS))
    assert message.headers() == [("content-type", b"application/cloudevents+json; charset=utf-8")]
    read = JSONFormat().read(CloudEvent, message.value())
    assert (read.get_type(), read.get_subject()) == (TYPE, message.key().decode())
    assert refused(conninfo) == []


async def test_kafka_judges_the_size(kafka: KafkaCluster, conninfo: str, settings: Settings) -> None:
    """An event above librdkafka's own limit is sent, because the broker's limit counts."""
    happen(conninfo, 1, size=1_500_000)
    async with working(settings, conninfo, events_kafka=kafka.url):
        await in_kafka(conninfo, kafka)
    assert refused(conninfo) == []


async def test_kafka_is_away(kafka: KafkaCluster, conninfo: str, settings: Settings) -> None:
    """A broker that is away, slow or silent is waited for, without twins."""
    kafka.tell("down")
    async with working(settings, conninfo, events_kafka=kafka.url):
        happen(conninfo, 300)
        await until(lambda: sealed(conninfo))
        kafka.tell("up")
        await in_kafka(conninfo, kafka)
        for leave, come in ((("down",), ("up",)), (("delay", 800), ("delay", 0))):
            happen(conninfo, 700)
            kafka.tell(*leave)
            happen(conninfo, 100)
            await until(lambda: sealed(conninfo))
            kafka.tell(*come)
            await in_kafka(conninfo, kafka)
        happen(conninfo, 500)
        kafka.pause()
        happen(conninfo, 100)
        await until(lambda: sealed(conninfo))
        kafka.go_on()
        await in_kafka(conninfo, kafka)


NOT_NOW = {"NOT_ENOUGH_REPLICAS": 19, "NOT_LEADER_FOR_PARTITION": 6, "THROTTLING_QUOTA_EXCEEDED": 89}


@pytest.mark.parametrize("code", NOT_NOW.values(), ids=NOT_NOW)
async def test_kafka_refuses_for_now(code: int, kafka: KafkaCluster, conninfo: str, settings: Settings) -> None:
    """What is refused for now is sent again, and nothing overtakes it."""
    # Several requests are under way for one partition.
    happen(conninfo, 900, size=4000, of="01900000-0000-7000-8000-000000000009")
    kafka.tell("refuse", code, 1)
    async with working(settings, conninfo, events_kafka=kafka.url):
        await in_kafka(conninfo, kafka)
    assert refused(conninfo) == []


REFUSED = {"MSG_SIZE_TOO_LARGE": 10, "INVALID_RECORD": 87}


@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED)
async def test_what_kafka_refuses_is_set_aside(
    code: int, kafka: KafkaCluster, conninfo: str, settings: Settings, request: pytest.FixtureRequest
) -> None:
    """Kafka refuses what was sent together as a whole: the one that is to blame is found, and stops none behind it."""
    # In one partition: together, and then the first alone.
    happen(conninfo, 20, of="01900000-0000-7000-8000-000000000009")
    kafka.tell("refuse", code, 2)
    async with working(settings, conninfo, events_kafka=kafka.url):
        await until(lambda: position(conninfo, RELAY) == 20)
        ((relay, dead, reason),) = refused(conninfo)
        assert (relay, reason) == (RELAY, request.node.callspec.id)
        happen(conninfo, 100)
        await in_kafka(conninfo, kafka, but=[dead])


async def test_a_killed_process_and_kafka(kafka: KafkaCluster, conninfo: str, replica: Callable[..., Service]) -> None:
    """After a kill what was under way may come twice, but nothing is missing, and nothing overtakes."""
    service = await asyncio.to_thread(replica, events_kafka=kafka.url)
    await asyncio.to_thread(happen, conninfo, 1000)
    (pid,) = service.workers("background")
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(happen, conninfo, 100)
    await in_kafka(conninfo, kafka, twins=True)


async def test_the_database_is_cut_off(
    kafka: KafkaCluster, postgres: str, conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way while the database is away is not sent again once it is back."""
    failures = 0

    async def take() -> int | None:
        nonlocal failures
        try:
            return await Relay._take(relay)
        except DatabaseUnavailable:
            failures += 1
            raise

    kafka.tell("delay", 100)
    async with working(settings, conninfo, events_kafka=kafka.url) as work:
        (relay,) = work._relays
        monkeypatch.setattr(relay, "_take", take)
        happen(conninfo, 200)
        await until(lambda: bool(relay._batch))
        name = conninfo_to_dict(conninfo)["dbname"]
        with psycopg.connect(postgres, autocommit=True) as admin:
            admin.execute(f"alter database {name} allow_connections false".encode())
            admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
            await until(lambda: failures > 0)
            assert relay._batch is not None
            assert {parcel.done for parcel in relay._batch.parcels} == {True}
            admin.execute(f"alter database {name} allow_connections true".encode())
        kafka.tell("delay", 0)
        await in_kafka(conninfo, kafka)


async def test_an_end_leaves_no_twins(kafka: KafkaCluster, conninfo: str, settings: Settings) -> None:
    """A process that ends notes what is acknowledged, so that the next one begins behind it."""
    kafka.tell("delay", 100)
    for _ in range(3):
        happen(conninfo, 300)
        async with working(settings, conninfo, events_kafka=kafka.url) as work:
            await until(lambda: bool(work._relays[0]._batch))
    kafka.tell("delay", 0)
    async with working(settings, conninfo, events_kafka=kafka.url):
        await in_kafka(conninfo, kafka)


async def test_a_visit_reaches_the_broker(front: Front, nats: NatsServer, settings: Settings) -> None:
    """What is done through the API arrives, in the form that consumers read, without a patient's data."""
    async with working(settings, front.conninfo, events_nats=nats.url):
        doctor = await front.doctor()
        patient = await front.patient(given_name="Zuleika", phone="+5511912345678")
        booked = await front.book(patient.id, doctor.id, reason="vertigo")
        found = await relayed(front.conninfo, nats)
    (message,) = [one for one in found if one.subject == "frontdesk.clinic.frontdesk.v1.appointment.booked"]
    assert event_in(message).appointment_id == booked.appointment.id
    for secret in ("Zuleika", "+5511912345678", "vertigo"):
        assert not [one for one in found if secret.encode() in one.data]


def frontdesk(conninfo: str, *arguments: str, status: int = 0) -> str:
    """What the command prints, or says if it fails with this status."""
    done = subprocess.run(
        [sys.executable, "-m", "frontdesk.cli", "events", *arguments],
        env={**os.environ, "FRONTDESK_DATABASE_URL": conninfo},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status, done
    return (done.stdout if status == 0 else done.stderr).strip()


async def test_from_where_a_relay_goes_on(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """`frontdesk events relay` moves a relay, at work or not: to now, to the start, behind a cursor."""
    happen(conninfo, 20)
    async with working(settings, conninfo):
        await until(lambda: sealed(conninfo))
    await asyncio.to_thread(frontdesk, conninfo, "relay", "nats", "--from", "now")
    async with working(settings, conninfo, events_nats=nats.url) as work:
        happen(conninfo, 5)
        found = await relayed(conninfo, nats, but=ids(conninfo)[:20])
        cursor = event_in(found[1]).cursor
        async with nats.client() as client:
            await client.jetstream().delete_stream("FRONTDESK")
        await asyncio.to_thread(frontdesk, conninfo, "relay", "nats", "--from", "start")
        await relayed(conninfo, nats)
        async with nats.client() as client:
            await client.jetstream().delete_stream("FRONTDESK")
        await asyncio.to_thread(frontdesk, conninfo, "relay", "nats", "--from", cursor)
        await relayed(conninfo, nats, but=ids(conninfo)[:22])
        await until(lambda: work._relays[0].sent == 5 + 25 + 3)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("rabbit", "--from", "now"), 2, "neither nats nor kafka/TOPIC"),
        (("kafka/", "--from", "now"), 2, "neither nats nor kafka/TOPIC"),
        (("nats",), 2, "--from"),
        (("nats", "--from", "yesterday"), 2, "nor a cursor"),
        (("nats", "--from", Cursor(7, bytes(15)).encode()), 1, "not lead to this cursor"),
    ],
)
def test_a_place_that_is_none(arguments: Sequence[str], status: int, said: str, conninfo: str) -> None:
    """An unknown relay, or a cursor that this log never had, is refused in one line, and moves nothing."""
    (line,) = frontdesk(conninfo, "relay", *arguments, status=status).splitlines()
    assert said in line
    with psycopg.connect(conninfo) as connection:
        assert connection.execute("select * from log_reader where name ~ '^(nats|kafka)'").fetchall() == []


async def test_redrive(nats: NatsServer, conninfo: str, settings: Settings) -> None:
    """What was refused is listed, and sent late once the broker takes it; if it refuses again, it stays listed."""
    small = StreamConfig(name="FRONTDESK", subjects=["frontdesk.>"], max_msg_size=1500)
    async with nats.client() as client:
        await client.jetstream().add_stream(small)
    happen(conninfo, 1)
    happen(conninfo, 2, size=2000)
    happen(conninfo, 1)
    assert frontdesk(conninfo, "dead") == ""
    async with working(settings, conninfo, events_nats=nats.url):
        await until(lambda: position(conninfo) == 4)
        first, second = ids(conninfo)[1:3]
        with psycopg.connect(conninfo) as connection:
            resources: dict[str, str] = dict(connection.execute("select id::text, resource from log").fetchall())
        listed = "\n".join(f"nats {one} {TYPE} {resources[one]} 10054" for one in (first, second))
        assert await asyncio.to_thread(frontdesk, conninfo, "dead") == listed
        assert await asyncio.to_thread(frontdesk, conninfo, "redrive") == "2 events are sent again"
        await until(lambda: waiting_again(conninfo) == 0)
        assert await asyncio.to_thread(frontdesk, conninfo, "dead") == listed
        async with nats.client() as client:
            await client.jetstream().update_stream(small.evolve(max_msg_size=-1))
        await asyncio.to_thread(frontdesk, conninfo, "redrive")
        await until(lambda: refused(conninfo) == [])
        found = await nats.messages()
    assert [message.headers["Nats-Msg-Id"] for message in found if message.headers] == [
        *(ids(conninfo)[number] for number in (0, 3)),
        first,
        second,
    ]
    assert position(conninfo) == 4


def waiting_again(conninfo: str) -> int:
    """How many refused events are to be sent again."""
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("select count(*) from relay_refusal where again").fetchone()
        assert row is not None
        return int(row[0])


async def test_how_far_behind(
    nats: NatsServer, conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay tells how many events wait, and for how long; not what a reader of patients leaves in the log."""
    monkeypatch.setattr("frontdesk.jobs.relaying._MEASURE_SECONDS", 0.05)
    nats.kill()
    happen(conninfo, 30)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("insert into log (id, time, actor, method) values (log_id(now()), now(), 'users/1', 'Test')")
    async with working(settings, conninfo, events_nats=nats.url) as work:
        (relay,) = work._relays
        measuring = asyncio.create_task(relay.measure())
        await until(lambda: relay.backlog == 30 and relay.age > 0)
        nats.start()
        await until(lambda: relay.backlog == 0 and relay.age == 0)
        await until(lambda: (relay.sent, relay.set_aside) == (30, 0))
        measuring.cancel()


SPECIFICATION = """
syntax = "proto3";
import "google/protobuf/any.proto";
import "google/protobuf/timestamp.proto";
message CloudEvent {
  message Value {
    oneof attr { string ce_string = 3; google.protobuf.Timestamp ce_timestamp = 7; }
  }
  string id = 1;
  string source = 2;
  string spec_version = 3;
  string type = 4;
  map<string, Value> attributes = 5;
  oneof data { bytes binary_data = 6; string text_data = 7; google.protobuf.Any proto_data = 8; }
}
"""
"""The numbers and types of CloudEvents' protobuf form, as its specification has them."""


def specified(directory: Path) -> Any:
    """The message of the specification."""
    (directory / "specification.proto").write_text(SPECIFICATION)
    out = directory / "specification.bin"
    protoc = [sys.executable, "-m", "grpc_tools.protoc", f"-I{directory}", f"--descriptor_set_out={out}"]
    subprocess.run([*protoc, "specification.proto"], check=True, timeout=60)
    pool = descriptor_pool.DescriptorPool()
    for known in (any_pb2, timestamp_pb2):
        pool.AddSerializedFile(known.DESCRIPTOR.serialized_pb)
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("CloudEvent"))


async def test_protobuf(nats: NatsServer, tmp_path: Path, conninfo: str, settings: Settings) -> None:
    """In the protobuf form the data is the message Event itself."""
    happen(conninfo, 1)
    async with working(settings, conninfo, events_nats=nats.url, events_format="protobuf"):
        (message,) = await relayed(conninfo, nats)
    assert message.headers["content-type"] == "application/cloudevents+protobuf"
    read = specified(tmp_path).FromString(message.data)
    event = event_pb2.Event()
    assert read.proto_data.type_url == "type.googleapis.com/clinic.frontdesk.v1.Event"
    event.ParseFromString(read.proto_data.value)
    assert (read.id, read.source, read.spec_version, read.type) == (event.id, "/frontdesk", "1.0", TYPE)
    assert {name: value.WhichOneof("attr") for name, value in read.attributes.items()} == {
        "subject": "ce_string",
        "time": "ce_timestamp",
        "datacontenttype": "ce_string",
    }
    assert read.attributes["subject"].ce_string == event.resource
    assert read.attributes["time"].ce_timestamp.ToMicroseconds() == event.time.ToMicroseconds()


def test_the_packages_are_needed(tmp_path: Path) -> None:
    """If the extra is not installed, one line says how to install it."""
    # An import hook hides the packages, as if they were not installed.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('nats', 'confluent_kafka'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    for name, value in (("NATS", "nats://user:secret@host"), ("KAFKA", "host:9092/events")):
        done = subprocess.run(
            [sys.executable, "-m", "frontdesk.cli", "serve", "--data-dir", str(tmp_path / "data")],
            env={
                **os.environ,
                f"FRONTDESK_EVENTS_{name}": value,
                "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = f"frontdesk: FRONTDESK_EVENTS_{name}: needs more packages: pip install 'frontdesk[events]'\n"
        assert (done.returncode, done.stderr) == (2, said)


def test_what_is_off_is_not_even_imported() -> None:
    """Without relays the process for background work does not load their packages."""
    code = (
        "import sys, frontdesk.process.background;"
        " print([m for m in ('nats', 'confluent_kafka', 'grpc') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_forms_of_settings() -> None:
    """Credentials are told apart from the servers, which may be several."""
    assert parse_nats("nats://a") == NatsServers(["nats://a:4222"])
    assert parse_nats("nats://u:p%40ss%2F@a:1,tls://b:2") == NatsServers(["nats://a:1", "tls://b:2"], "u", "p@ss/")
    assert parse_nats("nats://t%2Fken@[::1]:1") == NatsServers(["nats://[::1]:1"], None, "t/ken")
    assert parse_kafka("a:1,[::1]:2/front.desk-1") == KafkaTopic("a:1,[::1]:2", "front.desk-1")
    assert "p@ss" not in repr(parse_nats("nats://u:p%40ss@a"))
    assert "p%40ss" not in repr(Settings(events_nats="nats://u:p%40ss@a"))


SETTINGS = {
    "events_nats": [
        "nats:/x",
        "http://desk:secret@h",
        "nats://desk:sec@ret@h:1",
        "nats://desk:se/cret@h",
        "nats://h:secret",
    ],
    "events_kafka": ["kafka", "kafka:9092", "kafka:9092/", "kafka/topic", "kafka:99999/topic", "kafka:9092/a topic"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in SETTINGS.items() for value in values])
def test_bad_settings_are_one_line(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what is wrong, and never shows a password."""
    monkeypatch.setenv(f"FRONTDESK_{name.upper()}", value)
    with pytest.raises(SettingsError, match=f"FRONTDESK_{name.upper()}: ") as raised:
        Settings.load()
    assert "\n" not in str(raised.value)
    assert "sec" not in str(raised.value)


async def test_credentials_are_never_shown(tmp_path: Path, conninfo: str, replica: Callable[..., Service]) -> None:
    """Neither a broker that refuses them nor one that takes them makes the log show them."""
    with NatsServer(tmp_path / "guarded", user="desk", password="right") as server:
        happen(conninfo, 1)
        wrong = await asyncio.to_thread(replica, events_nats=server.url.replace("right", "s3cret-word"))
        await until(lambda: '"cause": "authorization violation"' in wrong.log.read_text())
        wrong.stop()
        assert "s3cret-word" not in wrong.log.read_text()
        assert "desk:" not in wrong.log.read_text()
        right = await asyncio.to_thread(replica, events_nats=server.url)
        await relayed(conninfo, server)
        right.stop()
        assert "right" not in right.log.read_text()
