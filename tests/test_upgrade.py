"""Upgrades without downtime: migrate the database under the servers of one release, which run on beside the next."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import grpc
import psycopg
import pytest

import frontdesk
from clinic.frontdesk.v1 import clinic_pb2
from frontdesk.db.migrate import SchemaError, check_schema, migrate, newest
from tests.clinic import Front
from tests.servers import Service
from tests.streams import Bookings, Watcher, many_people
from tests.waiting import until

THIS = Path(frontdesk.__file__).parent

STEP = '''"""An expanding step: room for what the next release knows of an appointment, its events and a decision."""

import sqlalchemy as sa
from alembic import op

revision = "{next:04}"
down_revision = "{this:04}"


def upgrade() -> None:
    op.add_column("log", sa.Column("source", sa.Text()))
    op.add_column("appointment", sa.Column("source", sa.Text()))
    if op.get_bind().exec_driver_sql("select to_regtype('decision')").scalar() is not None:
        op.execute("alter type decision add attribute source text")
'''


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The next release: its package, in a directory for PYTHONPATH. Its functions record who made a booking."""
    top = tmp_path / "later"
    package = top / "frontdesk"
    shutil.copytree(THIS, package, ignore=shutil.ignore_patterns("__pycache__"))
    number = newest() + 1
    step = package / "db" / "migrations" / "versions" / f"{number:04}_next.py"
    step.write_text(STEP.format(next=number, this=newest()))
    functions = package / "db" / "sql" / "appointment.sql"
    insert = re.compile(r"(insert into appointment\b[^(]*\()(.*?\bvalues \()", re.DOTALL)
    text, edits = insert.subn(r"\1source, \2'later', ", functions.read_text())
    assert edits >= 1
    functions.write_text(text)
    return top


def command(source: Path | None, conninfo: str, *arguments: str) -> "subprocess.Popen[str]":
    """Run `frontdesk` of this release, or of the one at `source`."""
    environment = {**os.environ, "FRONTDESK_DATABASE_URL": conninfo}
    if source is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "frontdesk.cli", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Its exit status and output."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


async def test_two_releases_side_by_side(conninfo: str, later: Path, tmp_path: Path) -> None:
    """Expand under load, serve with both, drain the old: no call fails for good, nothing is lost or made twice."""
    with Service(tmp_path / "old.log", conninfo, workers=2) as old:
        target = f"127.0.0.1:{old.port}"
        async with grpc.aio.insecure_channel(target) as one, asyncio.timeout(120), asyncio.TaskGroup() as tasks:
            front = Front(one, conninfo, old.port)
            doctors = [(await front.doctor(max_patients_per_day=1000)).id for _ in range(20)]
            people = await many_people(front, 200)
            bookings = Bookings((person, doctor) for person in people for doctor in doctors)
            bookings.fronts = [front]
            watchers = [Watcher(front, doctors[0])]
            running = [tasks.create_task(watchers[0].run())]
            lanes = [tasks.create_task(bookings.lane(number)) for number in range(4)]
            await bookings.more(40)

            # Somebody's long report locks the table that the step changes: the step waits, and nobody waits for the
            # step.
            with psycopg.connect(conninfo) as report:
                report.execute("select count(*) from appointment")
                migration = command(later, conninfo, "migrate")
                assert migration.stderr is not None
                said = await asyncio.to_thread(migration.stderr.readline)
                assert "schema_is_held" in said
                await bookings.more(60)
                assert migration.poll() is None
            status, out, _ = await asyncio.to_thread(done, migration)
            assert (status, out) == (0, "the schema is up to date\n")
            assert front.sql("select schema from installation") == [(newest() + 1,)]
            await bookings.more(60)

            # The old release does not change the newer schema, and starts on it: a worker that died may come back.
            assert await asyncio.to_thread(done, command(None, conninfo, "migrate")) == (
                0,
                f"the schema, {newest() + 1}, is that of a later release than this one, {newest()}, and stays as it is"
                "\n",
                "",
            )
            assert migrate(conninfo) == newest() + 1
            check_schema(conninfo)

            new = await asyncio.to_thread(Service, tmp_path / "new.log", conninfo, workers=2, source=later)
            with new:
                two = grpc.aio.insecure_channel(f"127.0.0.1:{new.port}")
                beside = Front(two, conninfo, new.port)
                watchers.append(Watcher(beside, doctors[0]))
                running.append(tasks.create_task(watchers[1].run()))
                bookings.fronts = [front, beside]
                await bookings.more(100)
                # The callers move to the new release, then the old one drains.
                bookings.fronts = [beside]
                await bookings.more(20)
                await asyncio.to_thread(old.stop)
                await running[0]
                assert watchers[0].closed
                await bookings.more(40)
                bookings.ended = True
                await asyncio.gather(*lanes)
                last = (await beside.queue(doctors[0])).revision
                await until(lambda: watchers[1].known == last)
                running[1].cancel()
                await two.close()
                new.stop()

    stored = dict(front.sql("select key, result_id::text from idempotency where method = 'BookAppointment'"))
    assert stored == bookings.acknowledged
    for doctor in doctors:
        history = front.sql(
            "select revision, appointment_id::text from log where revision > 0 and doctor_id = %s order by 1", doctor
        )
        assert [revision for revision, _ in history] == list(range(2, len(history) + 2))
        taken = front.sql("select array_agg(number order by number) from appointment where doctor_id = %s", doctor)
        assert taken == [(list(range(1, len(history) + 1)),)]
        if doctor == doctors[0]:
            for watcher in watchers:
                assert watcher.told == [made for made in history if watcher.begun < made[0] <= watcher.known]
                assert watcher.told
    # From the migration on, both releases have called the functions of the later one.
    by = dict(front.sql("select source, count(*) from appointment group by 1"))
    assert by["later"] >= 160
    assert by[None] >= 100
    assert "Traceback" not in (tmp_path / "old.log").read_text() + (tmp_path / "new.log").read_text()
    assert not set(bookings.refusals) - {"UNAVAILABLE", "ABORTED"}


def test_a_schema_that_takes_leave_of_this_release(conninfo: str, later: Path) -> None:
    """If a later release has dropped what this one needs, this one says so, and neither serves nor migrates."""
    rules = later / "frontdesk" / "db" / "migrate.py"
    text, edits = re.subn(r"(?m)^SERVES_FROM = \d+$", f"SERVES_FROM = {newest() + 1}", rules.read_text())
    assert edits == 1
    rules.write_text(text)
    assert done(command(later, conninfo, "migrate"))[0] == 0
    for arguments in (["serve", "--listen", "127.0.0.1:0"], ["migrate"], ["maintain"]):
        status, out, err = done(command(None, conninfo, *arguments))
        assert (status, out) == (1, "")
        assert f"schema {newest() + 1}, which serves releases from {newest() + 1} on" in err
        assert err.count("\n") == 1
    with pytest.raises(SchemaError):
        check_schema(conninfo)


STALE: Mapping[str, str] = {
    "another type": "alter table clinic alter column name type varchar(300)",
    "and back": "alter table clinic alter column name type text",
}


@pytest.mark.parametrize("workers", [1, 8])
async def test_what_was_prepared_is_prepared_anew(front: Front, workers: int) -> None:
    """A step that changes the answer type of a prepared statement fails no call; PostgreSQL refuses to run it."""
    clinic = await front.clinic()

    async def read() -> str:
        request = clinic_pb2.GetClinicRequest(clinic_id=clinic.id)
        return (await front.clinics.GetClinic(request)).clinic.name

    async def edit() -> str:
        wanted = clinic_pb2.Clinic(id=clinic.id, name=clinic.name)
        return (await front.clinics.UpdateClinic(clinic_pb2.UpdateClinicRequest(clinic=wanted))).clinic.name

    for statement in (None, *STALE.values()):
        if statement is not None:
            front.sql(statement)
        # One at a time, on all connections.
        answers = await asyncio.gather(*(one() for _ in range(workers) for one in (read, edit)))
        assert set(answers) == {clinic.name}
