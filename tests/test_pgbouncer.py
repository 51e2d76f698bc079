"""Two replicas behind PgBouncer in transaction mode, with fewer sessions than they have connections."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from clinic.frontdesk.v1 import appointment_pb2, doctor_pb2, event_pb2, queue_pb2
from frontdesk.db.migrate import SchemaError, check_schema, migrate
from frontdesk.settings import Settings, SettingsError
from tests.clinic import Front, day, outcome, reason_of, refusal, today
from tests.servers import Cluster, PgBouncer, Service, directories
from tests.streams import Bookings, Watcher, many_people
from tests.waiting import until, wait_for

pytestmark = pytest.mark.skipif(PgBouncer.PROGRAM is None, reason="pgbouncer is not installed (Debian: pgbouncer)")

SESSIONS = 3
DATABASE = "clinic"


@pytest.fixture(scope="module")
def pooled() -> Iterator[tuple[Cluster, PgBouncer]]:
    """A PostgreSQL with a database of this release, and PgBouncer before it."""
    with directories() as make, Cluster(make("primary")) as cluster:
        cluster.start()
        cluster.sql(f"create database {DATABASE}")
        with PgBouncer(make("pgbouncer"), cluster, sessions=SESSIONS) as bouncer:
            bouncer.start()
            # Through the pooler, to show that this works: it is one transaction.
            migrate(make_conninfo(bouncer.conninfo, dbname=DATABASE))
            yield cluster, bouncer


@pytest.fixture(scope="module", params=["direct", "poll alone"])
def services(
    request: pytest.FixtureRequest, pooled: tuple[Cluster, PgBouncer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Service]]:
    """Two replicas with two workers each, which exchange hints by LISTEN, or only poll."""
    cluster, bouncer = pooled
    url, direct = (make_conninfo(one.conninfo, dbname=DATABASE) for one in (bouncer, cluster))
    logs = tmp_path_factory.mktemp("logs")
    given: dict[str, Any] = {"pooler": "transaction"}
    if request.param == "direct":
        given["direct_database_url"] = direct
    with ExitStack() as stack:
        made = [stack.enter_context(Service(logs / name, url, workers=2, **given)) for name in ("one", "two")]
        listening = "select count(*)::integer from pg_stat_activity where application_name = 'frontdesk listen'"
        # Each worker, and each background process.
        wanted = 6 if request.param == "direct" else 0
        wait_for(lambda: cluster.sql(listening) == [(wanted,)], 30)
        yield made
        for service in made:
            service.stop()
    assert not any("Traceback" in (logs / name).read_text() for name in ("one", "two"))


@pytest.fixture
async def fronts(services: list[Service], pooled: tuple[Cluster, PgBouncer]) -> AsyncIterator[list[Front]]:
    """Clients of both replicas. Their `sql` bypasses the pooler."""
    direct = make_conninfo(pooled[0].conninfo, dbname=DATABASE)
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{one.port}")) for one in services
        ]
        yield [Front(channel, direct, one.port) for channel, one in zip(channels, services, strict=True)]


async def seen(front: Front, doctor_id: str, last: int, begun: asyncio.Event) -> list[tuple[int, int, str]]:
    """The changes that a watcher sees up to a revision of the doctor's today; each message continues from the last."""
    watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor_id))
    told: list[tuple[int, int, str]] = []
    known = (await watch.read()).revision
    assert known == 1
    begun.set()
    while known < last:
        message = await watch.read()
        assert message.previous_revision == known
        known = message.revision
        told += [(change.revision, change.kind, change.appointment_id) for change in message.update.changes]
    watch.cancel()
    return told


async def test_the_clinic_holds(fronts: list[Front], pooled: tuple[Cluster, PgBouncer]) -> None:
    """Over both replicas: never over capacity, a key acts once, tickets without gaps, one history for all watchers."""
    places, callers = 20, 60
    doctor = await fronts[0].doctor(max_patients_per_day=places)
    people = await fronts[0].people(callers)
    begun = [asyncio.Event() for _ in range(4)]
    last = 1 + places + places
    watchers = [
        asyncio.create_task(seen(fronts[number % 2], doctor.id, last, event)) for number, event in enumerate(begun)
    ]
    async with asyncio.timeout(60):
        await asyncio.gather(*(event.wait() for event in begun))

        async def twins(index: int) -> set[str]:
            """Ask both replicas at once, with one key."""
            key = f"k-{doctor.id}-{index}"
            answers = await asyncio.gather(
                *(front.book(people[index].id, doctor.id, idempotency_key=key) for front in fronts),
                return_exceptions=True,
            )
            refused = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
            assert {reason_of(error) for error in refused} <= {"DAY_FULL"}
            booked = [one for one in answers if isinstance(one, appointment_pb2.BookAppointmentResponse)]
            # Both get the same place, or neither gets one.
            assert not (booked and refused)
            assert Counter(one.replayed for one in booked) in (Counter(), Counter({True: 1, False: 1}))
            return {one.appointment.id for one in booked}

        made = await asyncio.gather(*map(twins, range(callers)))
        booked = [next(iter(ids)) for ids in made if ids]
        assert all(len(ids) <= 1 for ids in made)
        assert len(set(booked)) == len(booked) == places
        checked = await asyncio.gather(*(fronts[n % 2].check_in(one) for n, one in enumerate(booked)))
        assert sorted(answer.entry.ticket for answer in checked) == list(range(1, places + 1))
        histories = await asyncio.gather(*watchers)
    events = "select revision, appointment_id::text from log where revision > 0 and doctor_id = %s order by 1"
    stored = fronts[0].sql(events, doctor.id)
    assert [revision for revision, _ in stored] == list(range(2, last + 1))
    for history in histories:
        assert history == histories[0]
        assert [(revision, appointment) for revision, _, appointment in history] == stored
    assert await fronts[0].queue(doctor.id) == await fronts[1].queue(doctor.id)
    sessions = "select count(*) from pg_stat_activity where datname = %s and application_name = 'frontdesk'"
    assert fronts[0].sql(sessions, DATABASE)[0][0] <= SESSIONS


async def test_forms_do_not_depend_on_the_session(fronts: list[Front], pooled: tuple[Cluster, PgBouncer]) -> None:
    """Every session has our time zone and date style, whatever the database's own."""
    cluster, _ = pooled
    for setting in ("timezone = 'Asia/Tokyo'", "datestyle = 'German'"):
        cluster.sql(f"alter database {DATABASE} set {setting}")
    try:
        end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'frontdesk'"
        cluster.sql(end)
        doctor = await until_answered(fronts[0])
        (patient,) = await fronts[1].people(1)
        booked = (await fronts[1].book(patient.id, doctor.id)).appointment
        found = await asyncio.gather(*(fronts[n % 2].appointment(booked.id) for n in range(20)))
        assert all(one == booked for one in found)
        error = await refusal(fronts[0].book(patient.id, doctor.id))
        assert reason_of(error) == "DUPLICATE_BOOKING"
        error = await refusal(fronts[0].book((await fronts[0].patient()).id, doctor.id, on=today().replace(year=2001)))
        assert reason_of(error) == "DATE_IN_PAST"
    finally:
        for setting in ("timezone", "datestyle"):
            cluster.sql(f"alter database {DATABASE} reset {setting}")


async def until_answered(front: Front) -> doctor_pb2.Doctor:
    """A new doctor, as soon as the database is available."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await front.doctor(max_patients_per_day=1000)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
            await asyncio.sleep(0.05)


async def test_a_deadline_ends_the_statement(fronts: list[Front], pooled: tuple[Cluster, PgBouncer]) -> None:
    """A cancel request passes through the pooler: the statement ends, and its session serves the next call."""
    doctor = await fronts[0].doctor()
    (patient,) = await fronts[0].people(1)
    waiting = "select count(*) from pg_stat_activity where datname = %s and wait_event_type = 'Lock'"
    async with await psycopg.AsyncConnection.connect(fronts[0].conninfo) as other:
        await other.execute("select lock_all(array[doctor_day_name(%s, %s)])", (doctor.id, today()))
        # As many calls as there are sessions, so that a session left busy would show.
        target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))
        request = appointment_pb2.BookAppointmentRequest(patient_id=patient.id, doctor_day=target)
        late = await asyncio.gather(
            *(refusal(fronts[0].appointments.BookAppointment(request, timeout=1)) for _ in range(SESSIONS))
        )
        assert {error.code() for error in late} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        await until(lambda: fronts[0].sql(waiting, DATABASE) == [(0,)])
        # The doctor-day is still locked, but no session is.
        assert await outcome(fronts[0].clinic()) == "OK"
    assert (await fronts[1].book(patient.id, doctor.id)).appointment.number == 1


async def test_a_killed_pgbouncer(fronts: list[Front], pooled: tuple[Cluster, PgBouncer]) -> None:
    """If PgBouncer is killed and restarted under a stream of bookings, acknowledged ones stay, and keys act once."""
    _, bouncer = pooled
    doctor = await fronts[0].doctor(max_patients_per_day=1000)
    people = await many_people(fronts[0], 400)
    bookings = Bookings((person, doctor.id) for person in people)
    bookings.fronts = fronts
    watcher = Watcher(fronts[1], doctor.id)
    async with asyncio.timeout(90), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(watcher.run())
        await until(lambda: watcher.begun == 1)
        lanes = [tasks.create_task(bookings.lane(number)) for number in range(8)]
        await bookings.more(40)
        bouncer.kill()
        error = await refusal(until_refused(fronts[0]))
        assert reason_of(error) == "DATABASE_UNAVAILABLE"
        await asyncio.to_thread(bouncer.start)
        await bookings.more(60)
        bookings.ended = True
        await asyncio.gather(*lanes)
        last = 1 + len(bookings.acknowledged)
        await until(lambda: watcher.known == last)
        running.cancel()
    own = "select key, result_id::text from idempotency i join appointment a on a.id = result_id where doctor_id = %s"
    assert dict(fronts[0].sql(own, doctor.id)) == bookings.acknowledged
    numbers = fronts[0].sql("select array_agg(number order by number) from appointment where doctor_id = %s", doctor.id)
    assert numbers == [(list(range(1, last)),)]
    assert {appointment for _, appointment in watcher.told} == set(bookings.acknowledged.values())
    assert set(bookings.refusals) <= {"UNAVAILABLE", "ABORTED"}


async def until_refused(front: Front) -> None:
    """Ask until the first refusal."""
    while True:
        await front.clinic()


def test_missing_safeguards_are_told(pooled: tuple[Cluster, PgBouncer], tmp_path: Path) -> None:
    """At its start the service logs the settings that the role should have, and nothing once it has them."""
    cluster, bouncer = pooled
    url = make_conninfo(bouncer.conninfo, dbname=DATABASE)
    user = cluster.sql("select current_user")[0][0]

    def said(name: str) -> list[str]:
        with Service(tmp_path / name, url, pooler="transaction") as service:
            service.stop()
        return [line for line in (tmp_path / name).read_text().splitlines() if "safeguard_is_off" in line]

    assert [("statement_timeout" in line, "check_interval" in line) for line in sorted(said("without"))] == [
        (False, True),
        (True, False),
    ]
    cluster.sql(f"alter role {user} in database {DATABASE} set statement_timeout = '10s'")
    cluster.sql(f"alter role {user} in database {DATABASE} set client_connection_check_interval = '2s'")
    try:
        # Sessions keep the settings with which they were opened. The service has them opened anew.
        cluster.sql("select pg_terminate_backend(pid) from pg_stat_activity where datname = 'clinic'")
        assert said("with") == []
    finally:
        cluster.sql(f"alter role {user} in database {DATABASE} reset all")


def test_defaults_that_cannot_work_are_refused(pooled: tuple[Cluster, PgBouncer]) -> None:
    """Behind a pooler a wrong default of the role is refused in one line, with the statements that mend it."""
    cluster, bouncer = pooled
    url = make_conninfo(bouncer.conninfo, dbname=DATABASE)
    user = cluster.sql("select current_user")[0][0]
    own = f"alter role {user} in database {DATABASE}"
    for setting in (
        "default_transaction_isolation = 'serializable'",
        "synchronous_commit = off",
        "lock_timeout = '1s'",
    ):
        cluster.sql(f"{own} set {setting}")
    end_sessions = f"select pg_terminate_backend(pid) from pg_stat_activity where datname = '{DATABASE}'"
    try:
        cluster.sql(end_sessions)
        with pytest.raises(SchemaError, match="behind a pooler") as refusal:
            check_schema(url, pooled=True)
        told = str(refusal.value)
        assert "\n" not in told
        statements = told[told.index("alter role") :].split("; ")
        assert len(statements) == 3
        for statement in statements:
            cluster.sql(statement)
        cluster.sql(end_sessions)
        check_schema(url, pooled=True)
    finally:
        cluster.sql(f"{own} reset all")


def test_a_pooler_needs_a_database() -> None:
    """The embedded PostgreSQL has no pooler."""
    for given in ({"pooler": "transaction"}, {"direct_database_url": "dbname=x"}):
        with pytest.raises(SettingsError, match="FRONTDESK_DATABASE_URL"):
            Settings.load(**given)


async def test_events_through_the_pooler(fronts: list[Front]) -> None:
    """Readers at both replicas are told every event once, in one order, with hints and without."""
    streams: list[Any] = [front.events.WatchEvents(event_pb2.WatchEventsRequest()) for front in fronts]
    for stream in streams:
        assert (await stream.read()).HasField("heartbeat")
    doctor = await fronts[0].doctor(max_patients_per_day=20)
    await asyncio.gather(*(front.arrive(doctor.id) for front in fronts for _ in range(5)))
    told: list[list[str]] = [[], []]
    async with asyncio.timeout(30):
        for stream, found in zip(streams, told, strict=True):
            while len(found) < 2 + 3 * 10:
                if (message := await stream.read()).HasField("event"):
                    found.append(message.event.id)
    assert told[0] == told[1]
    assert len(set(told[0])) == 32
    for stream in streams:
        stream.cancel()
