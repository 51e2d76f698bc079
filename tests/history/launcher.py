"""`frontdesk serve` with workers that lack one safeguard, named by HISTORY_CHANGED; only for `mutants`.

The supervisor starts each worker in a fresh interpreter, so the safeguard is removed when the worker starts.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from frontdesk.core import access as _access
from frontdesk.core import appointment as _appointment
from frontdesk.core import queue as _queue
from frontdesk.core import user_session as _user_session
from frontdesk.core.limit import Limits
from frontdesk.core.token import Tokens
from frontdesk.db import batch as _batch
from frontdesk.db import records as _records
from frontdesk.db import session as _session
from frontdesk.db.change import Key
from frontdesk.live import feed as _feed
from frontdesk.live import subscription as _subscription
from frontdesk.process import supervisor
from frontdesk.process.background import run_background
from frontdesk.process.log import configure_log
from frontdesk.settings import Settings

feed: Any = _feed
subscription: Any = _subscription
batch: Any = _batch
session: Any = _session
queue: Any = _queue
access: Any = _access
appointment: Any = _appointment
user_session: Any = _user_session
records: Any = _records


def _no_poll() -> None:
    feed.POLL_SECONDS = 3600.0


def _changes_skipped() -> None:
    positions = subscription.as_of

    def skipping(changes: Sequence[Any], queue: Any) -> list[Any]:
        # Of several changes in one update, drop the first.
        told: list[Any] = positions(changes, queue)
        return told[1 if len(told) > 1 else 0 :]

    subscription.as_of = skipping


def _old_queue() -> None:
    read = feed.read_changes_of

    async def fewer(*args: Any) -> Any:
        found = await read(*args)
        return {key: [change for change in changes if change.kind != "PARKED"] for key, changes in found.items()}

    # Both reads: the tailer's, and that of changes which it has not kept.
    feed.read_changes_of = queue.read_changes_of = fewer


def _no_closing() -> None:
    from clinic.frontdesk.v1 import queue_pb2
    from frontdesk.rpc import stream as streams

    write = streams.write

    async def silent(call: Any, message: bytes) -> None:
        if not queue_pb2.WatchQueueResponse.FromString(message).HasField("closing"):
            await write(call, message)

    streams.write = silent


def _no_batches() -> None:
    batch.MOST, batch.PATIENCE = 1, 0.0


def _answers_swapped() -> None:
    # A name in the module hides the built-in one.
    batch.zip = lambda asked, rows, strict: zip(asked, reversed(rows), strict=strict)


def _refused_together() -> None:
    from frontdesk.errors import Refused

    def alike(asked: Any, rows: Any, strict: bool) -> Any:
        refusal = next((row for row in rows if isinstance(row, Refused)), None)
        return zip(asked, [refusal or row for row in rows], strict=strict)

    batch.zip = alike


def _database_defaults() -> None:
    # The settings of the database hold, where ours would have.
    session.RELIED_ON.clear()
    session._KEEP_COMMITS = "select 1"


def _read_everything() -> None:
    appointment.within = lambda parts, table: sa.true()


def _limit_each() -> None:
    admit = Limits.admit

    async def alone(self: Limits, subject: str, limit: int) -> None:
        await admit(self, f"{subject}/{os.getpid()}", limit)

    changed: Any = Limits
    changed.admit = alone


def _revocations_untold() -> None:
    async def silent(*args: Any) -> None:
        pass

    access.changed = user_session.changed = silent


def _streams_unjudged() -> None:
    from frontdesk.rpc.pipeline import Call

    async def never(self: Call) -> bool:
        return False

    changed: Any = Call
    changed.judged_anew = never


def _acts_unlogged() -> None:
    append = records.append

    async def forgetful(tx: Any, key: Any, event: str, *rest: Any) -> None:
        if event != "api_key.revoked":
            await append(tx, key, event, *rest)

    records.append = forgetful


def _tokens_forever() -> None:
    changed: Any = Tokens
    claims = changed.claims

    async def lasting(self: Any, token: str) -> Mapping[str, Any]:
        self._clock = lambda: 0.0
        said: Mapping[str, Any] = await claims(self, token)
        return {**said, "exp": said["exp"] + 3600}

    changed.claims = lasting
    # Its clock is early, so all begin later.
    import frontdesk.core.token

    frontdesk.core.token._AHEAD_SECONDS = 1e12


def _clock_ahead() -> None:
    changed: Any = Tokens
    claims = changed.claims

    async def early(self: Any, token: str) -> Any:
        self._clock = lambda: time.time() + 1.0
        return await claims(self, token)

    changed.claims = early


def _labels_logged() -> None:
    from frontdesk.core import decision

    asked = decision.asked
    changed: Any = appointment
    changed.asked = lambda *args, **more: asked(*args, **more) | {"actor": "services/desk"}


def _walk_in_in_two() -> None:
    add = queue.Queues.add_walk_in

    async def halves(self: Any, caller: Any, *place: Any, key: Key) -> Any:
        booked = await add(self, caller, *place, key=replace(key, name=""))
        return await self._appointments.decide(caller, key, appointment=booked.result.id)

    queue.Queues.add_walk_in = halves


CHANGES = {
    "read-everything": _read_everything, "limit-each": _limit_each, "revocations-untold": _revocations_untold,
    "acts-unlogged": _acts_unlogged, "tokens-forever": _tokens_forever, "clock-ahead": _clock_ahead,
    "labels-logged": _labels_logged, "streams-unjudged": _streams_unjudged,
    "database-defaults": _database_defaults, "walk-in-in-two": _walk_in_in_two,
    "no-poll": _no_poll, "changes-skipped": _changes_skipped, "old-queue": _old_queue, "no-closing": _no_closing,
    "answers-swapped": _answers_swapped, "refused-together": _refused_together, "no-batches": _no_batches,
}  # fmt: skip


def work(**task: Any) -> None:
    """Run a worker without its safeguard."""
    from frontdesk.process.worker import run_worker

    CHANGES[os.environ["HISTORY_CHANGED"]]()
    run_worker(**task)


def _announce(said: str) -> None:
    print(said, flush=True)


if __name__ == "__main__":
    settings = Settings.load(workers=2)
    configure_log(settings.log_level)
    nothing: Any = lambda conninfo: None  # noqa: E731
    sys.exit(
        supervisor.supervise(
            settings, worker=work, background=run_background, migrate=nothing, check_schema=nothing, announce=_announce
        )
    )
