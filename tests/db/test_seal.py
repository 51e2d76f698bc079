"""Sealing the log: each row once, in one order, in a chain that shows whoever changes it."""

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from frontdesk.settings import Settings
from tests.clinic import Front, today
from tests.hostile.wire import working
from tests.waiting import until

DOCTOR = "01900000-0000-7000-8000-00000000000d"


@pytest.fixture
def connection(conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the test's database, in which no service runs."""
    with psycopg.connect(conninfo, autocommit=True) as found:
        yield found


@contextmanager
def another(conninfo: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction of somebody else, which has its id already."""
    with psycopg.connect(conninfo) as found:
        found.execute("select pg_current_xact_id()")
        yield found


def write(connection: psycopg.Connection[Any], revision: int = 0, **columns: object) -> str:
    """Append a row to the log, of a doctor-day if it has a revision; its id."""
    columns = {"actor": "users/1", "method": "Test", "type": "test.done", "revision": revision, **columns}
    if revision:
        columns |= {"doctor_id": DOCTOR, "date": "2026-11-26"}
    names, marks = ", ".join(columns), ", ".join(["%s"] * len(columns))
    (found,) = connection.execute(
        f"insert into log (id, time, {names}) values (log_id(now()), now(), {marks}) returning id".encode(),
        list(columns.values()),
    ).fetchall()
    return str(found[0])


def seal(connection: psycopg.Connection[Any]) -> int | None:
    """How many rows were sealed."""
    (found,) = connection.execute("select sealed from seal_log()").fetchall()
    return found[0]  # type: ignore[no-any-return]


def sealed(connection: psycopg.Connection[Any]) -> list[str]:
    """The ids of the sealed rows in their order, which has no gaps."""
    found = connection.execute("select position, id::text from seal order by position").fetchall()
    assert [position for position, _ in found] == list(range(1, len(found) + 1))
    return [row for _, row in found]


def test_a_chain(connection: psycopg.Connection[Any]) -> None:
    """Each row is sealed once; its chain is the hash of the chain before and of the row's own hash."""
    ids = [write(connection, data='{"state": "BOOKED"}', room="Sala 1 é") for _ in range(3)]
    assert (seal(connection), seal(connection)) == (3, 0)
    assert sealed(connection) == ids
    chain = bytes(32)
    for found, digest in connection.execute(
        "select s.chain, log_digest(l) from seal s join log l using (id) order by position"
    ).fetchall():
        chain = hashlib.sha256(chain + digest).digest()
        assert found == chain


def test_hashes_do_not_depend_on_the_session(connection: psycopg.Connection[Any]) -> None:
    """A row has the same hash whatever the session's settings are."""
    write(
        connection,
        check_in_time="2026-11-26 10:00+00",
        data='{"b": 1.50, "a": "2026-11-26T10:00:00+00:00"}',
        date="2026-11-26",
    )
    (before,) = connection.execute("select log_digest(l) from log l").fetchall()
    for setting, value in {
        "timezone": "Asia/Tokyo", "datestyle": "German", "bytea_output": "escape", "extra_float_digits": "-5",
        "intervalstyle": "iso_8601", "lc_numeric": "C", "xmlbinary": "hex",
    }.items():  # fmt: skip
        connection.execute(f"set {setting} = '{value}'".encode())
    assert connection.execute("select log_digest(l) from log l").fetchall() == [before]


def test_late_commits_are_not_skipped(conninfo: str, connection: psycopg.Connection[Any]) -> None:
    """A row waits as long as an older transaction may still write one, and says how long; none is skipped."""
    with another(conninfo) as slow:
        write(connection)
        (found,) = connection.execute("select sealed, waiting, age >= 0 from seal_log()").fetchall()
        assert found == (0, True, True)
        write(slow)
    assert seal(connection) == 2


@pytest.mark.parametrize("committed", [1, 2], ids=["one is committed", "both are committed"])
def test_a_doctor_day_is_in_order(conninfo: str, connection: psycopg.Connection[Any], committed: int) -> None:
    """A doctor-day's rows are sealed in the order of revisions, also if a transaction got its id before it waited."""
    first = write(connection, 2)
    with another(conninfo) as early:
        # It has the lower id, but waited for the lock, and made the later revision.
        second = write(connection, 3)
        if committed == 1:
            seal(connection)
        third = write(early, 4)
    fourth = write(connection, 5)
    seal(connection)
    assert sealed(connection) == [first, second, third, fourth]


def test_a_revision_waits_for_the_one_before(conninfo: str, connection: psycopg.Connection[Any]) -> None:
    """A revision of an early transaction waits if another one holds up the revision before, and so does the next.

    Rows that have nothing to do with it do not wait. In the end none is left out.
    """
    with (
        another(conninfo) as early,
        another(conninfo) as next_one,
        another(conninfo) as aside,
        another(conninfo) as slow,
    ):
        first = write(connection, 2)
        second = write(early, 3)
        early.commit()
        third = write(next_one, 4)
        next_one.commit()
        of_nothing = write(aside)
        aside.commit()
        assert (seal(connection), seal(connection)) == (1, 0)
        assert sealed(connection) == [of_nothing]
        last = write(slow)
    assert seal(connection) == 4
    found = sealed(connection)
    assert [row for row in found if row != last] == [of_nothing, first, second, third]
    assert last in found


def test_one_seals_at_a_time(conninfo: str, connection: psycopg.Connection[Any]) -> None:
    """Who comes while another one seals does nothing."""
    write(connection)
    with psycopg.connect(conninfo) as other:
        assert seal(other) == 1
        assert seal(connection) is None
    assert seal(connection) == 0
    assert len(sealed(connection)) == 1


def test_another_cluster(connection: psycopg.Connection[Any]) -> None:
    """After a restore into another cluster, old and new rows are sealed once, though ids of transactions begin anew."""
    old = [write(connection) for _ in range(3)]
    assert seal(connection) == 3
    # As a dump brings them: sealed ones, and ones that were not sealed yet; all from ids that are yet to come here.
    connection.execute("update log set transaction = transaction + 1000000")
    connection.execute("update seal set horizon = horizon + 1000000, cluster = 1")
    old += [write(connection, transaction=number) for number in (2000001, 2000000)]
    old[3:] = reversed(old[3:])
    new = [write(connection)]
    assert seal(connection) == 3
    new.append(write(connection))
    assert seal(connection) == 1
    assert sealed(connection)[:3] == old[:3]
    assert set(sealed(connection)[3:6]) == {*old[3:], new[0]}
    assert sealed(connection)[6:] == [new[1]]


def test_a_cluster_that_is_ahead(connection: psycopg.Connection[Any]) -> None:
    """After a restore into a cluster that has passed the horizon already, no row is missed."""
    write(connection)
    seal(connection)
    write(connection)
    connection.execute("update seal set horizon = horizon + 3, cluster = 1")
    for _ in range(5):
        connection.execute("select pg_current_xact_id()")
    assert seal(connection) == 1


def test_many_at_once(connection: psycopg.Connection[Any]) -> None:
    """Any number of rows is sealed in one run."""
    connection.execute(
        "insert into log (id, time, actor, method) select log_id(now()), now(), 'a', 'm' from generate_series(1, 2500)"
    )
    assert seal(connection) == 2500
    assert len(sealed(connection)) == 2500


async def test_a_service_seals_its_changes(settings: Settings, front: Front) -> None:
    """What a call has changed is sealed soon, in the order of revisions."""
    doctor = await front.doctor(max_patients_per_day=40)
    people = await front.people(20)
    async with working(settings, front.conninfo):
        await asyncio.gather(*(front.book(person.id, doctor.id) for person in people))

        def revisions() -> list[tuple[Any, ...]]:
            return front.sql(
                "select revision from seal join log using (id) where doctor_id = %s and date = %s order by position",
                doctor.id, today(),
            )  # fmt: skip

        await until(lambda: len(revisions()) == 20, 10)
    assert [revision for (revision,) in revisions()] == list(range(2, 22))
