"""What many checks watch: a day with every kind of change, and a rush of callers."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing

from clinic.frontdesk.v1 import queue_pb2
from frontdesk.tools.conformance.expect import Mismatch, Priority, State
from frontdesk.tools.conformance.harness import Day, Desk, Step, Watch, together

CALLERS = 24
LONG_QUEUE = 80
"""Entries of a queue of some 40 KB."""


async def play(desk: Desk, day: Day) -> AsyncGenerator[Step]:
    """A day with every kind of change, one after another, from every queue state in which each is allowed."""
    tomorrow, other = desk.day_after(day), await desk.day()
    # Before everybody else, and so first wherever handed over to.
    early = await other.arrive()
    yield await day.availability()
    booked = []
    for _ in range(7):
        step = await day.book()
        booked.append(step.appointment_id)
        yield step
    a, b, c, d, e, f, g = booked
    yield await day.update(a)
    yield await day.move(b, day, await desk.slot(day))
    yield await day.move(c, tomorrow)
    await tomorrow.move(c, day)
    yield day.steps[-1]
    yield await day.do("CancelAppointment", d)
    yield await day.do("MarkNoShow", e)
    for one in (a, b, c, f, g):
        yield await day.do("CheckIn", one)
    yield await day.update(f)
    yield await day.call_next("1")
    yield await day.do("CallAgain", a)
    yield await day.do("ReturnToLine", a)
    # The returned patient is first again and is called again; then missed, and so goes to the end.
    yield await day.call_next("2")
    yield await day.do("MarkMissed", a)
    yield await day.do("ReturnToLine", a)
    yield await day.do("ParkPatient", c)
    yield await day.call_next("1")
    yield await day.do("ParkPatient", b)
    yield await day.do("ReturnToLine", b)
    yield await day.call_next("1")
    yield await day.do("StartAppointment", b)
    yield await day.call_next("2")
    yield await day.do("MarkMissed", f)
    # From here on each of the five states has a patient.
    yield await day.call_next("2")
    step = await day.book()
    yield step
    h = step.appointment_id
    yield await day.do("CheckIn", h)
    # The one at the end of the queue is first of all, then the end of another priority.
    yield await day.set_priority(a, Priority.PRIORITY_URGENT)
    yield await day.set_priority(h, Priority.PRIORITY_PRIORITY)
    yield await day.set_priority(a, Priority.PRIORITY_PRIORITY)
    yield await day.set_priority(c, Priority.PRIORITY_NORMAL)
    yield await day.do("ParkPatient", h)
    yield await day.undo(h, State.STATE_WAITING)
    await other.transfer(early, day)
    yield day.steps[-1]
    step = await day.book()
    yield step
    i = step.appointment_id
    yield await day.do("CheckIn", i)
    yield await day.undo(i, State.STATE_LEFT)
    yield await day.do("CancelAppointment", i)
    yield await day.transfer(early, other)
    yield await day.do("CompleteAppointment", b)
    yield await day.undo(b, State.STATE_IN_CONSULTATION)
    yield await day.do("CompleteAppointment", b)
    yield await day.do("StartAppointment", a)
    yield await day.do("LeaveQueue", h)
    yield await day.do("CancelAppointment", g)
    yield await day.do("LeaveQueue", c)
    yield await day.do("ReturnToLine", f)
    yield await day.do("CancelAppointment", f)
    yield await day.do("CompleteAppointment", a)


async def step_by_step(desk: Desk) -> tuple[Day, Watch]:
    """Play a day, reading the update of each step before the next step."""
    day = await desk.day()
    async with desk.watch(day) as watch, aclosing(play(desk, day)) as steps:
        await watch.next()
        async for step in steps:
            await watch.reach(step.revision)
    return day, watch


def told_change(watch: Watch, step: Step) -> queue_pb2.QueueChange:
    """The change that the watcher saw under the step's answered revision."""
    for change in watch.changes:
        if change.revision == step.revision:
            return change
    raise Mismatch(
        f"changes after {step.verb}", [one.revision for one in watch.changes], f"one of revision {step.revision}"
    )


def shown_queue(watch: Watch, step: Step) -> queue_pb2.Queue:
    """The queue that the watcher saw at the step's revision."""
    for update in watch.updates:
        if update.revision == step.revision:
            return update.update.queue
    raise Mismatch(
        f"updates after {step.verb}", [one.revision for one in watch.updates], f"one of revision {step.revision}"
    )


def rush_changes() -> int:
    """How many changes a rush makes."""
    return sum(2 if caller % 4 == 3 else 4 for caller in range(CALLERS))


async def rush(day: Day) -> None:
    """Many callers change one doctor-day at once."""

    async def caller(number: int) -> None:
        appointment_id = (await day.book()).appointment_id
        if number % 4 == 3:
            await day.do("CancelAppointment", appointment_id)
            return
        await day.do("CheckIn", appointment_id)
        # The queue is never empty: each caller checks in before calling.
        called = (await day.call_next(str(number))).appointment_id
        await day.do("StartAppointment" if number % 2 else "ParkPatient", called)

    await together(*(caller(number) for number in range(CALLERS)))


async def watched_rush(desk: Desk, watchers: int) -> tuple[Day, list[Watch]]:
    """A rush on a new doctor-day, and the watchers that saw all of it."""
    day = await desk.day()
    async with AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(desk.watch(day)) for _ in range(watchers)]
        for watch in watches:
            await watch.next()
        await together(rush(day), *(watch.reach(1 + rush_changes()) for watch in watches))
    return day, watches


async def long_queue(desk: Desk) -> Day:
    """A day with LONG_QUEUE patients in the queue."""
    day = await desk.day()

    async def arrive() -> None:
        await day.do("CheckIn", (await day.book(await desk.patient(padding="x" * 200))).appointment_id)

    await together(*(arrive() for _ in range(LONG_QUEUE)))
    return day
