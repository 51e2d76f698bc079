"""The checks: a function each, whose docstring names the rule and states the fact."""

import itertools
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from clinic.frontdesk.v1 import appointment_pb2, queue_pb2
from frontdesk.client.watch import DEFAULT_HEARTBEAT_SECONDS, HEARTBEAT_SECONDS, STREAM_AGE_SECONDS, WRITE_SECONDS
from frontdesk.tools.conformance.expect import (
    Kind,
    Mismatch,
    Skipped,
    State,
    expect,
    expect_chain,
    expect_cover,
    expect_refusal,
    expect_same,
    kind_name,
    state_name,
)
from frontdesk.tools.conformance.harness import DEPARTED, Day, Desk, QueueOrder, ask, together, wire_date
from frontdesk.tools.conformance.scenarios import (
    long_queue,
    play,
    rush,
    rush_changes,
    shown_queue,
    step_by_step,
    told_change,
    watched_rush,
)

_MARGIN = 2.0
"""Seconds by which a server's timing may be late, because of the network."""
_MANY_CHANGES = 120


@dataclass(frozen=True, slots=True)
class Check:
    """One fact that is true of every server of the contract."""

    name: str
    rule: str
    """Its place in the contract: the rules of WatchQueue by number, other sections by name."""
    fact: str
    run: Callable[[Desk], Awaitable[None]]
    """Raises Mismatch if the fact is not true of this server, Skipped if that cannot be found out."""


CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order of a run."""


def check(run: Callable[[Desk], Awaitable[None]]) -> Callable[[Desk], Awaitable[None]]:
    """Add this function to the checks."""
    rule, _, fact = " ".join((run.__doc__ or "").split()).partition(": ")
    name = run.__name__.replace("_", "-")
    CHECKS[name] = Check(name, re.sub("^Rules? ", "", rule), fact, run)
    return run


# Rule 1: how a stream begins


@check
async def starts_empty(desk: Desk) -> None:
    """Rules 1, 2: the first message of an untouched doctor-day is its empty queue at revision 1."""
    day = await desk.day()
    async with desk.watch(day) as watch:
        first = await watch.next()
    expect("event", first.WhichOneof("event"), "update")
    expect("revision", first.revision, 1)
    expect("previous_revision", first.previous_revision, 0)
    expect("number of changes", len(first.update.changes), 0)
    empty = queue_pb2.Queue(doctor_id=day.doctor_id, date=wire_date(day.date), revision=1)
    expect_same("queue", first.update.queue, empty)


@check
async def starts_whole(desk: Desk) -> None:
    """Rules 1, 2: the first message has all changes acknowledged before the stream was opened, as a fresh start."""
    day = await desk.day()
    for _ in range(3):
        await day.arrive()
    await day.book()
    await day.call_next("1")
    async with desk.watch(day) as watch:
        first = await watch.next()
    expect("event", first.WhichOneof("event"), "update")
    expect("revision", first.revision, day.revision)
    expect("previous_revision", first.previous_revision, 0)
    expect("number of changes", len(first.update.changes), 0)
    expect_same("queue", first.update.queue, await day.queue())
    expect("number of entries", len(first.update.queue.entries), 3)


@check
async def default_date(desk: Desk) -> None:
    """Rule 1: a request without a date watches the clinic's today."""
    day = await desk.day()
    async with desk.stream(queue_pb2.WatchQueueRequest(doctor_id=day.doctor_id)) as watch:
        expect_same("date", (await watch.next()).update.queue.date, wire_date(day.date))
        step = await day.book()
        await watch.reach(step.revision)


@check
async def unknown_doctor(desk: Desk) -> None:
    """Errors: a watch of a doctor that does not exist is refused as NOT_FOUND, with or without a date."""
    nobody = Day(desk, str(uuid.uuid4()), (await desk.day()).date)
    async with desk.watch(nobody) as watch:
        await expect_refusal(watch.next(), grpc.StatusCode.NOT_FOUND, "DOCTOR_NOT_FOUND")
    async with desk.stream(queue_pb2.WatchQueueRequest(doctor_id=nobody.doctor_id)) as watch:
        await expect_refusal(watch.next(), grpc.StatusCode.NOT_FOUND, "DOCTOR_NOT_FOUND")


@check
async def present_token(desk: Desk) -> None:
    """Rule 1: a token of the present revision gets a heartbeat, and the next update goes on from there."""
    day = await desk.day()
    for _ in range(2):
        async with desk.watch(day) as watch:
            token = (await watch.next()).resume_token
        async with desk.watch(day, token) as watch:
            first = await watch.next()
            expect("event", first.WhichOneof("event"), "heartbeat")
            expect("revision", first.revision, day.revision)
            before = day.revision
            step = await day.book()
            update = await watch.reach(step.revision)
        expect("previous_revision", update.previous_revision, before)
        expect_cover(update)


@check
async def older_token(desk: Desk) -> None:
    """Rule 1: an older token, of revision 1 too, gets one update with exactly the changes since then."""
    day = await desk.day()
    tokens = []
    async with desk.watch(day) as watch:
        tokens.append(await watch.next())
        for _ in range(4):
            appointment_id = await day.arrive()
            tokens.append(await watch.reach(day.revision))
        await day.do("LeaveQueue", appointment_id)
        await watch.reach(day.revision)
    for known in tokens:
        async with desk.watch(day, known.resume_token) as watch:
            first = await watch.next()
        expect("event", first.WhichOneof("event"), "update")
        expect("previous_revision", first.previous_revision, known.revision)
        expect("revision", first.revision, day.revision)
        expect_cover(first)
        kinds = [kind_name(step.kind) for step in day.steps if step.revision > known.revision]
        expect("kinds of the changes", [kind_name(change.kind) for change in first.update.changes], kinds)
        expect_same("queue", first.update.queue, await day.queue())


@check
async def tokens_and_times(desk: Desk) -> None:
    """Rules 1, 2: updates and heartbeats carry a token and the server's time; a heartbeat's token resumes too."""
    day = await desk.day()
    token = ""
    for event in ("update", "heartbeat", "heartbeat"):
        async with desk.watch(day, token) as watch:
            message = await watch.next()
        expect("event", message.WhichOneof("event"), event)
        expect(f"whether the {event} has a token", bool(message.resume_token), True)
        expect(f"whether the {event} has a server_time", message.HasField("server_time"), True)
        token = message.resume_token


@check
async def malformed_token(desk: Desk) -> None:
    """Rule 1: a malformed token is refused as INVALID_ARGUMENT."""
    day = await desk.day()
    async with desk.watch(day) as watch:
        token = (await watch.next()).resume_token
    for malformed in ("garbage", "~", "AAAA", "[]", token[: len(token) // 2], token * 2):
        async with desk.watch(day, malformed) as watch:
            await expect_refusal(watch.next(), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


@check
async def foreign_token(desk: Desk) -> None:
    """Rule 1: the token of another doctor, or of the same doctor's other date, is refused as INVALID_ARGUMENT."""
    day, other = await desk.day(), await desk.day()
    for foreign in (other, desk.day_after(day)):
        async with desk.watch(foreign) as watch:
            token = (await watch.next()).resume_token
        async with desk.watch(day, token) as watch:
            await expect_refusal(watch.next(), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


@check
async def lost_token(desk: Desk) -> None:
    """Rule 1: a token that is too old, from the future or from before a restore gets a fresh start."""
    raise Skipped("the API never gives such a token: it takes a restored database")


# Rule 2: the contents of an update


@check
async def chain(desk: Desk) -> None:
    """Rule 2: the previous_revision of each later update is the revision of the stream's last update."""
    day = await desk.day()
    async with desk.watch(day) as watch, aclosing(play(desk, day)) as steps:
        await watch.next()
        async for _ in steps:
            pass
        await watch.reach(day.revision)
    for before, update in itertools.pairwise(watch.updates):
        expect(f"previous_revision at revision {update.revision}", update.previous_revision, before.revision)


@check
async def changes_cover(desk: Desk) -> None:
    """Rule 2: an update lists one change for each revision after previous_revision up to its own, in order."""
    _, watch = await step_by_step(desk)
    for update in watch.updates[1:]:
        expect_cover(update)


@check
async def queue_identity(desk: Desk) -> None:
    """Rule 2: an update's queue has the watched doctor-day, and the revision of the message."""
    day, watch = await step_by_step(desk)
    for update in watch.updates:
        queue = update.update.queue
        expect("queue.revision", queue.revision, update.revision)
        expect("queue.doctor_id", queue.doctor_id, day.doctor_id)
        expect_same("queue.date", queue.date, wire_date(day.date))


@check
async def kinds_of_change(desk: Desk) -> None:
    """Rule 2: each verb's change has its kind and its appointment, under the answered revision."""
    day, watch = await step_by_step(desk)
    for step in day.steps:
        change = told_change(watch, step)
        expect(f"kind after {step.verb}", kind_name(change.kind), kind_name(step.kind))
        expect(f"appointment_id after {step.verb}", change.appointment_id, step.appointment_id)
    never = {*Kind.values()} - {step.kind for step in day.steps} - {Kind.KIND_UNSPECIFIED}
    # So that no kind that a later contract adds is forgotten here.
    expect("kinds that were not tried", [kind_name(kind) for kind in never], [])


@check
async def entries_of_changes(desk: Desk) -> None:
    """Rule 2: a change has an entry exactly if it touches the queue, in the state that the verb leads to."""
    day, watch = await step_by_step(desk)
    for step in day.steps:
        change = told_change(watch, step)
        state = change.entry.state if change.HasField("entry") else None
        expect(f"entry after {step.verb}", state_name(state), state_name(step.state))
        if step.state is not None:
            expect(f"entry.appointment_id after {step.verb}", change.entry.appointment_id, step.appointment_id)


@check
async def answered_entries(desk: Desk) -> None:
    """Rules 2, 3: the entry of a change is the entry in the caller's answer."""
    day, watch = await step_by_step(desk)
    for step in day.steps:
        if step.entry is not None:
            # Both are as of the change, since the update has this change alone.
            expect_same(f"entry after {step.verb}", told_change(watch, step).entry, step.entry)


@check
async def queue_order(desk: Desk) -> None:
    """Services: waiting in calling order (back from MISSED: last), then called, in consultation, parked, missed."""
    day, watch = await step_by_step(desk)
    for step in day.steps:
        shown = [(entry.appointment_id, entry.state) for entry in shown_queue(watch, step).entries]
        tickets = {entry.appointment_id: entry.ticket for entry in shown_queue(watch, step).entries}

        def told(order: list[tuple[str, State.ValueType]], tickets: dict[str, int] = tickets) -> list[str]:
            return [f"{tickets.get(appointment_id, '?')} {state_name(state)}" for appointment_id, state in order]

        if shown != step.order:
            raise Mismatch(f"tickets after {step.verb}", told(shown), told(step.order))


@check
async def queue_positions(desk: Desk) -> None:
    """Services: the waiting have the positions 1, 2, 3 … in the order of the queue, and all others 0."""
    day, watch = await step_by_step(desk)
    for step in day.steps:
        waits = [entry.state == State.STATE_WAITING for entry in shown_queue(watch, step).entries]
        positions = [entry.position for entry in shown_queue(watch, step).entries]
        expect(f"positions after {step.verb}", positions, [n if here else 0 for n, here in enumerate(waits, start=1)])


@check
async def ticket_numbers(desk: Desk) -> None:
    """Services: the tickets of a doctor-day are 1, 2, 3 … in the order of the arrivals, and stay with the patient."""
    day, watch = await step_by_step(desk)
    tickets: dict[str, int] = {}
    for step in day.steps:
        if step.kind in (Kind.KIND_CHECKED_IN, Kind.KIND_TRANSFERRED_IN):
            tickets[step.appointment_id] = len(tickets) + 1
        if step.state is not None:
            expect(f"ticket after {step.verb}", told_change(watch, step).entry.ticket, tickets[step.appointment_id])


@check
async def queue_counts(desk: Desk) -> None:
    """Services: waiting_count counts the waiting, expected_count the booked who are not here yet."""
    day, watch = await step_by_step(desk)
    for step in day.steps:
        queue = shown_queue(watch, step)
        waiting = sum(state == State.STATE_WAITING for _, state in step.order)
        expect(f"waiting_count after {step.verb}", queue.waiting_count, waiting)
        expect(f"expected_count after {step.verb}", queue.expected_count, step.expected_count)


@check
async def departed_entries(desk: Desk) -> None:
    """Services: an entry that is DONE, LEFT or TRANSFERRED appears in a change, and in no queue."""
    day, watch = await step_by_step(desk)
    gone: set[str] = set()
    for update in watch.updates:
        for change in update.update.changes:
            if change.entry.state in DEPARTED:
                gone.add(change.appointment_id)
            elif change.HasField("entry"):
                # An undo brings a patient back.
                gone.discard(change.appointment_id)
        shown = [
            f"{entry.ticket} {state_name(entry.state)}"
            for entry in update.update.queue.entries
            if entry.appointment_id in gone or entry.state in DEPARTED
        ]
        expect(f"departed entries in the queue of revision {update.revision}", shown, [])
    last = {step.appointment_id: step.state for step in day.steps if step.state is not None}
    expect("number of departed in the changes", len(gone), sum(state in DEPARTED for state in last.values()))


@check
async def calling_order(desk: Desk) -> None:
    """Services: CallNext takes the first patient of the queue that a watcher saw before."""
    day, watch = await step_by_step(desk)
    for before, step in itertools.pairwise(day.steps):
        if step.verb == "CallNext":
            first = shown_queue(watch, before).entries[0]
            called = told_change(watch, step).entry
            expect("called ticket", called.ticket, first.ticket)
            expect("called appointment", step.appointment_id, first.appointment_id)


@check
async def get_queue(desk: Desk) -> None:
    """Rule 2: after each change, the update's queue equals what GetQueue answers at the same revision."""
    day = await desk.day()
    async with desk.watch(day) as watch, aclosing(play(desk, day)) as steps:
        await watch.next()
        async for step in steps:
            update = await watch.reach(step.revision)
            expect_same(f"queue after {step.verb}", update.update.queue, await day.queue())


@check
async def folding(desk: Desk) -> None:
    """Rule 2: the changes, applied to the first queue, give each later queue, with its order and positions."""
    _, watch = await step_by_step(desk)
    # Not from the start, so that the first queue is not empty.
    first = next((number for number, update in enumerate(watch.updates) if update.update.queue.entries), 0)
    begin = watch.updates[first].update.queue
    entries = {entry.appointment_id: entry for entry in begin.entries}
    queue_order = QueueOrder(begin.entries)
    for update in watch.updates[first + 1 :]:
        for change in update.update.changes:
            if change.HasField("entry"):
                entries[change.appointment_id] = change.entry
                queue_order.take(change.appointment_id, change.entry.state, change.entry, change.revision)
        folded = queue_pb2.Queue()
        for place, (appointment_id, state) in enumerate(queue_order.order(), start=1):
            entry = folded.entries.add()
            entry.CopyFrom(entries[appointment_id])
            # It follows from later changes of others too, so it is derived.
            entry.position = place if state == State.STATE_WAITING else 0
        shown = queue_pb2.Queue(entries=update.update.queue.entries)
        expect_same(f"queue of revision {update.revision}", shown, folded)


# Rule 3: revisions


@check
async def one_revision_a_change(desk: Desk) -> None:
    """Rule 3: each change of a doctor-day, bookings included, makes the next revision, and its answer says which."""
    day = await desk.day()
    async with aclosing(play(desk, day)) as steps:
        async for _ in steps:
            pass
    expect("answered revisions", [step.revision for step in day.steps], [*range(2, len(day.steps) + 2)])
    expect("revision of GetQueue", (await day.queue()).revision, day.revision)


@check
async def refusals(desk: Desk) -> None:
    """Rule 3: refused calls, and calls with validate_only, change nothing."""
    day = await desk.day()
    precondition = grpc.StatusCode.FAILED_PRECONDITION
    async with desk.watch(day) as watch:
        await watch.next()
        patient_id, stranger_id = await desk.patient(), await desk.patient()
        booked = (await day.book(patient_id)).appointment_id
        wanted = appointment_pb2.GetAppointmentRequest(appointment_id=booked)
        etag = (await ask(desk.appointments.GetAppointment, wanted)).appointment.etag
        await day.update(booked)
        again = appointment_pb2.BookAppointmentRequest(patient_id=patient_id, doctor_day=day.target)
        start = appointment_pb2.StartAppointmentRequest(appointment_id=booked)
        empty = queue_pb2.CallNextRequest(doctor_id=day.doctor_id)
        wrong = queue_pb2.CheckInRequest(appointment_id=booked, patient_id=stranger_id)
        stale = appointment_pb2.CancelAppointmentRequest(appointment_id=booked, etag=etag)
        refused: list[tuple[Any, Message, grpc.StatusCode, str]] = [
            (desk.appointments.BookAppointment, again, grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_BOOKING"),
            (desk.appointments.StartAppointment, start, precondition, "INVALID_TRANSITION"),
            (desk.queues.CallNext, empty, precondition, "QUEUE_EMPTY"),
            (desk.queues.CheckIn, wrong, precondition, "PATIENT_MISMATCH"),
            (desk.appointments.CancelAppointment, stale, grpc.StatusCode.ABORTED, "ETAG_MISMATCH"),
        ]
        for method, request, code, reason in refused:
            await expect_refusal(ask(method, request), code, reason)
        again.patient_id, again.validate_only = stranger_id, True
        await ask(desk.appointments.BookAppointment, again)
        await day.do("CheckIn", booked)
        await watch.reach(day.revision)
    expect("changes", [kind_name(change.kind) for change in watch.changes], ["BOOKED", "UPDATED", "CHECKED_IN"])
    expect("answered revisions", [step.revision for step in day.steps], [2, 3, 4])


@check
async def replays(desk: Desk) -> None:
    """Rule 3, Conventions: a call repeated with its idempotency key answers the first revision and makes no other."""
    day = await desk.day()
    async with desk.watch(day) as watch:
        await watch.next()
        patient_id = await desk.patient()
        key = uuid.uuid4().hex
        book = appointment_pb2.BookAppointmentRequest(patient_id=patient_id, doctor_day=day.target, idempotency_key=key)
        booked = await ask(desk.appointments.BookAppointment, book)
        arrive = queue_pb2.CheckInRequest(appointment_id=booked.appointment.id, idempotency_key=key)
        call = queue_pb2.CallNextRequest(doctor_id=day.doctor_id, idempotency_key=key)
        again = queue_pb2.CallAgainRequest(appointment_id=booked.appointment.id, idempotency_key=key)
        repeated: list[tuple[Any, Message]] = [
            (desk.appointments.BookAppointment, book),
            (desk.queues.CheckIn, arrive),
            (desk.queues.CallNext, call),
            (desk.queues.CallAgain, again),
        ]
        for revision, (method, request) in enumerate(repeated, start=2):
            name = type(request).__name__.removesuffix("Request")
            first = booked if request is book else await ask(method, request)
            expect(f"revision of {name}", (first.revision, first.replayed), (revision, False))
            replay = await ask(method, request)
            expect(f"revision and replayed of {name} again", (replay.revision, replay.replayed), (revision, True))
        step = await day.update(booked.appointment.id)
        await watch.reach(step.revision)
    kinds = ["BOOKED", "CHECKED_IN", "CALLED", "CALLED_AGAIN", "UPDATED"]
    expect("changes", [kind_name(change.kind) for change in watch.changes], kinds)


@check
async def move_across_days(desk: Desk) -> None:
    """Rule 3: rescheduling across doctor-days makes one revision on each: first day MOVED_OUT, second day MOVED_IN."""
    day = await desk.day()
    for other in (desk.day_after(day), await desk.day()):
        async with desk.watch(day) as left, desk.watch(other) as entered:
            await left.next()
            await entered.next()
            booked = (await day.book()).appointment_id
            before = (day.revision, other.revision)
            await day.move(booked, other)
            expect("revisions answered", (day.revision, other.revision), (before[0] + 1, before[1] + 1))
            out = (await left.reach(day.revision)).update
            into = (await entered.reach(other.revision)).update
        for update, kind, expected_count in ((out, "MOVED_OUT", 0), (into, "MOVED_IN", 1)):
            last = update.changes[-1]
            expect(f"change of the {kind} day", (kind_name(last.kind), last.appointment_id), (kind, booked))
            expect(f"expected_count of the {kind} day", update.queue.expected_count, expected_count)


@check
async def move_within_a_day(desk: Desk) -> None:
    """Rule 3: rescheduling within a doctor-day makes one revision, and both revisions in the answer are that one."""
    day = await desk.day()
    async with desk.watch(day) as watch:
        await watch.next()
        booked = (await day.book()).appointment_id
        await day.move(booked, day, await desk.slot(day))
        await day.move(booked, day)
        await watch.reach((await day.update(booked)).revision)
    kinds = [(change.revision, kind_name(change.kind)) for change in watch.changes]
    expect("changes", kinds, [(2, "BOOKED"), (3, "MOVED_IN"), (4, "MOVED_IN"), (5, "UPDATED")])


@check
async def concurrent_changes(desk: Desk) -> None:
    """Rule 3: of many concurrent changes none is skipped or repeated, and each has its answered revision."""
    day, (watch,) = await watched_rush(desk, 1)
    every = [*range(2, 2 + rush_changes())]
    expect("answered revisions", sorted(step.revision for step in day.steps), every)
    expect("revisions of the changes", [change.revision for change in watch.changes], every)
    expect_chain(watch.updates)
    for step in day.steps:
        change = told_change(watch, step)
        told = (kind_name(change.kind), change.appointment_id)
        expect(f"change of revision {step.revision}", told, (kind_name(step.kind), step.appointment_id))
    expect_same("last queue", watch.updates[-1].update.queue, await day.queue())


@check
async def watchers_agree(desk: Desk) -> None:
    """Rules 3, 7: all watchers of a doctor-day see the same changes in one order, and the same queues."""
    _, watches = await watched_rush(desk, 3)
    first, *others = watches
    # Positions are as of the update, which may be a later one for another watcher.
    history = [(one.revision, one.kind, one.appointment_id, one.entry.state) for one in first.changes]
    queues = {update.revision: update.update.queue for update in first.updates}
    for other in others:
        told = [(one.revision, one.kind, one.appointment_id, one.entry.state) for one in other.changes]
        expect("changes of another watcher", told, history)
        for update in other.updates:
            if update.revision in queues:
                expect_same(
                    f"another's queue of revision {update.revision}", update.update.queue, queues[update.revision]
                )


@check
async def cut_streams(desk: Desk) -> None:
    """Rules 1, 3: a watcher that opens stream after stream with the last token during changes misses none of them."""
    day = await desk.day()
    last = 1 + rush_changes()
    changes: list[queue_pb2.QueueChange] = []
    async with desk.watch(day) as watch:
        begin = await watch.next()

    async def come_and_go() -> None:
        known = begin
        while known.revision < last:
            async with desk.watch(day, known.resume_token) as watch:
                await watch.reach(known.revision + 1)
            update = watch.updates[0]
            expect("previous_revision", update.previous_revision, known.revision)
            expect_cover(update)
            changes.extend(update.update.changes)
            known = update

    await together(come_and_go(), rush(day))
    expect("revisions of the changes", [change.revision for change in changes], [*range(2, last + 1)])


# Rule 4: slow consumers


@check
async def slow_reader(desk: Desk) -> None:
    """Rule 4: a slow reader gets fewer, newer updates, which leave out no change."""
    day = await long_queue(desk)
    begin = day.revision
    async with desk.unread(day) as watch, desk.watch(day) as quick:
        await watch.next()
        await quick.next()
        # 5 MB if each is sent: more than twice as much as a network and proxies hold of one stream.
        for _ in range(_MANY_CHANGES):
            await day.update(day.steps[0].appointment_id)
            # Else the service might tell several changes at once to quick readers too.
            await quick.reach(day.revision)
        await watch.reach(day.revision)
    expect_chain(watch.updates)
    expect("revisions", [change.revision for change in watch.changes], [*range(begin + 1, day.revision + 1)])
    if len(watch.updates) - 1 > _MANY_CHANGES // 2:
        raise Mismatch("updates", len(watch.updates) - 1, f"at most {_MANY_CHANGES // 2} for {_MANY_CHANGES} changes")


@check
async def blocked_reader(desk: Desk) -> None:
    """Rule 4: a stream whose write was blocked for 30 s ends as RESOURCE_EXHAUSTED."""
    desk.needs(WRITE_SECONDS + 5 * _MARGIN)
    day, clock = await long_queue(desk), await desk.day()
    async with desk.unread(day) as watch, desk.watch(clock, heartbeat=5) as ticks:
        await watch.next()
        for _ in range(_MANY_CHANGES):
            await day.update(day.steps[0].appointment_id)
        blocked_at = (await ticks.next()).server_time.ToSeconds()
        # The heartbeats of another stream tell the time.
        while (await ticks.next()).server_time.ToSeconds() < blocked_at + WRITE_SECONDS + _MARGIN:
            pass

        async def to_the_end() -> None:
            while True:
                await watch.next()

        await expect_refusal(to_the_end(), grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHER_TOO_SLOW")


# Rule 5: silence


@check
async def shortest_heartbeat(desk: Desk) -> None:
    """Rule 5: a request for more than one heartbeat in 5 s is clamped; they carry the revision and a token."""
    await _expect_heartbeat(desk, 1, HEARTBEAT_SECONDS[0])


@check
async def default_heartbeat(desk: Desk) -> None:
    """Rule 5: if nothing is requested, 15 s of silence end in a heartbeat."""
    await _expect_heartbeat(desk, None, DEFAULT_HEARTBEAT_SECONDS)


@check
async def longest_heartbeat(desk: Desk) -> None:
    """Rule 5: a request for less than one heartbeat in 60 s is clamped."""
    await _expect_heartbeat(desk, 600, HEARTBEAT_SECONDS[1])


async def _expect_heartbeat(desk: Desk, asked: int | None, seconds: float) -> None:
    desk.needs(seconds + _MARGIN)
    day = await desk.day()
    async with desk.watch(day, heartbeat=asked) as watch:
        await watch.next()
        # Silence begins with the last message, and further ones may follow the first.
        step = await day.book()
        await watch.reach(step.revision)
        silent = time.monotonic()
        message = await watch.next()
        waited = time.monotonic() - silent
    expect("event", message.WhichOneof("event"), "heartbeat")
    expect("revision", message.revision, step.revision)
    expect("previous_revision", message.previous_revision, step.revision)
    expect("whether it has a token", bool(message.resume_token), True)
    if not seconds - _MARGIN / 4 <= waited <= seconds + _MARGIN:
        raise Mismatch("seconds of silence", round(waited, 1), seconds)


# Rule 6: planned ends


@check
async def stream_age(desk: Desk) -> None:
    """Rule 6: at the age of 20 to 30 min a stream ends with a closing message, MAX_AGE, then with status OK."""
    desk.needs(STREAM_AGE_SECONDS[1] + _MARGIN)
    day = await desk.day()
    async with desk.watch(day, heartbeat=60) as watch:
        opened = time.monotonic()
        message = await watch.next()
        while not message.HasField("closing"):
            message = await watch.next()
        age = time.monotonic() - opened
        expect("reason", message.closing.reason, queue_pb2.StreamClosing.REASON_MAX_AGE)
        await watch.end()
    if not STREAM_AGE_SECONDS[0] - _MARGIN <= age <= STREAM_AGE_SECONDS[1] + _MARGIN:
        raise Mismatch(
            "age of the stream in seconds", round(age), f"{STREAM_AGE_SECONDS[0]:g} to {STREAM_AGE_SECONDS[1]:g}"
        )


# Rule 7: one doctor-day a stream


@check
async def one_doctor_day(desk: Desk) -> None:
    """Rule 7: a watcher does not see changes of other doctors, nor of the same doctor's other dates."""
    day, stranger = await desk.day(), await desk.day()
    async with desk.watch(day) as watch:
        await watch.next()
        for other in (stranger, desk.day_after(day)):
            await other.book()
            await other.availability()
        step = await day.book()
        update = await watch.reach(step.revision)
    expect("answered revision", step.revision, 2)
    expect("number of updates", len(watch.updates), 2)
    expect("changes", [change.appointment_id for change in update.update.changes], [step.appointment_id])
