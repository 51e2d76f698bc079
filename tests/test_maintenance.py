"""The deletion of old keys, the changes that are too old for watchers, and its effect on callers who return."""

import asyncio
import subprocess
import sys
from datetime import date
from typing import Any

from clinic.frontdesk.v1 import queue_pb2
from frontdesk.db.database import Database
from frontdesk.jobs.maintenance import Removed, clean
from frontdesk.live.tokens import ResumeToken
from tests.clinic import Front

DAY = 86400.0


async def test_old_keys_and_changes_go(front: Front) -> None:
    """Old keys are deleted, newer ones stay; a watch that resumes on a day of long ago starts afresh."""
    doctor = await front.doctor()
    people = await front.people(3)
    watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    first = await watch.read()
    for number, person in enumerate(people):
        await front.book(person.id, doctor.id, idempotency_key=f"k{number}")
    watch.cancel()

    db = Database(front.conninfo, pool_size=1)
    await db.open()
    assert await clean(db, keep_keys_seconds=3 * DAY, keep_audit_seconds=DAY) == Removed(0, 0)
    front.sql("update idempotency set create_time = create_time - interval '4 days' where key = 'k0'")
    assert await clean(db, keep_keys_seconds=3 * DAY, keep_audit_seconds=DAY) == Removed(1, 0)
    await db.close()
    # The same day a year ago.
    for table in ("log", "doctor_day", "appointment"):
        front.sql(f"update {table} set date = date - 365")
    front.sql("update log set time = time - interval '365 days'")
    assert front.sql("select count(*) from appointment") == [(3,)]

    old_day = first.update.queue.date
    old_day.year -= 1
    queue = (await front.queues.GetQueue(queue_pb2.GetQueueRequest(doctor_id=doctor.id, date=old_day))).queue
    assert (queue.revision, queue.expected_count) == (4, 3)
    ((micros,),) = front.sql("select (extract(epoch from time) * 1000000)::bigint from log where revision = 2")
    gone = ResumeToken(doctor.id, date(old_day.year, old_day.month, old_day.day), 2, micros, "STAFF").encode()
    again: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id, resume_token=gone))
    fresh = await again.read()
    assert (fresh.previous_revision, fresh.update.queue) == (0, queue)
    again.cancel()


async def test_many_rows_go_in_batches(front: Front) -> None:
    """Any number of old rows is deleted, and `frontdesk maintain` prints how many."""
    front.sql(
        "insert into idempotency (caller, method, key, fingerprint, create_time)"
        " select 'c', 'm', n::text, 'f', now() - interval '30 days' from generate_series(1, 5001) n"
    )
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "frontdesk.cli", "maintain", "--database-url", front.conninfo],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "removed 5001 idempotency keys and 0 events of the audit\n"
    assert front.sql("select count(*) from idempotency") == [(0,)]
