"""When a primary dies, its standby replaces it for a service that knows both."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from psycopg.conninfo import make_conninfo

from frontdesk.db.migrate import migrate
from tests.clinic import Front
from tests.servers import Cluster, Service, directories
from tests.streams import Bookings, Watcher, many_people
from tests.waiting import until, wait_for

DATABASE = "clinic"


@pytest.fixture
def pair() -> Iterator[tuple[Cluster, Cluster]]:
    """A primary with a database of this release, which acknowledges a commit only after its standby has it."""
    with directories() as make, Cluster(make("primary")) as primary:
        primary.start()
        primary.sql(f"create database {DATABASE}")
        migrate(make_conninfo(primary.conninfo, dbname=DATABASE))
        with Cluster(make("standby"), copy_of=primary) as standby:
            standby.start()
            primary.sql("alter system set synchronous_standby_names = 'standby'")
            primary.sql("select pg_reload_conf()")
            wait_for(lambda: primary.sql("select sync_state from pg_stat_replication") == [("sync",)], 30)
            yield primary, standby


async def test_the_primary_dies(pair: tuple[Cluster, Cluster], tmp_path: Path) -> None:
    """After kill -9 of the primary and promotion of the standby, no acknowledged booking is lost; streams continue."""
    primary, standby = pair
    both = make_conninfo(
        primary.conninfo,
        host="127.0.0.1,127.0.0.1",
        port=f"{primary.port},{standby.port}",
        dbname=DATABASE,
        target_session_attrs="read-write",
    )
    after = make_conninfo(standby.conninfo, dbname=DATABASE)
    with Service(tmp_path / "log", both, workers=2) as service:
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel,
            asyncio.timeout(120),
            asyncio.TaskGroup() as tasks,
        ):
            front = Front(channel, after, service.port)
            doctors = [(await front.doctor(max_patients_per_day=1000)).id for _ in range(10)]
            people = await many_people(front, 200)
            bookings = Bookings((person, doctor) for person in people for doctor in doctors)
            bookings.fronts = [front]
            watchers = [Watcher(front, doctor) for doctor in doctors[:3]]
            running = [tasks.create_task(watcher.run()) for watcher in watchers]
            lanes = [tasks.create_task(bookings.lane(number)) for number in range(8)]
            await bookings.more(100)
            primary.kill()
            await until(lambda: bookings.refusals["UNAVAILABLE"] > 0)
            before = dict(bookings.acknowledged)
            assert await asyncio.to_thread(standby.sql, "select pg_promote(), pg_is_in_recovery()")
            await bookings.more(100)
            bookings.ended = True
            await asyncio.gather(*lanes)
            last = [(await front.queue(watcher.doctor_id)).revision for watcher in watchers]
            await until(lambda: [watcher.known for watcher in watchers] == last)
            for task in running:
                task.cancel()
        service.stop()

    stored = dict(front.sql("select key, result_id::text from idempotency where method = 'BookAppointment'"))
    assert stored == bookings.acknowledged
    assert before.items() <= stored.items()
    for doctor in doctors:
        history = front.sql(
            "select revision, appointment_id::text from log where revision > 0 and doctor_id = %s order by 1", doctor
        )
        assert [revision for revision, _ in history] == list(range(2, len(history) + 2))
        taken = front.sql("select array_agg(number order by number) from appointment where doctor_id = %s", doctor)
        assert taken == [(list(range(1, len(history) + 1)),)]
        for watcher in watchers:
            if watcher.doctor_id == doctor:
                assert watcher.told == [made for made in history if made[0] > watcher.begun]
                assert len(watcher.told) > 10
    assert set(bookings.refusals) <= {"UNAVAILABLE", "ABORTED"}
    assert "Traceback" not in (tmp_path / "log").read_text()
