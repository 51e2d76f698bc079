"""The waiting room's board in a terminal, or a line of text for each update if the output is not a terminal."""

import datetime
import math
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clinic.frontdesk.v1 import doctor_pb2, queue_pb2
from frontdesk.client import FrontdeskClient, FrontdeskError

_State = queue_pb2.QueueEntry.State
_NAMES = {
    _State.STATE_WAITING: "waiting",
    _State.STATE_CALLED: "called",
    _State.STATE_IN_CONSULTATION: "in consultation",
    _State.STATE_PARKED: "parked",
    _State.STATE_MISSED: "missed",
}
_STYLES = {
    _State.STATE_CALLED: "bold black on yellow",
    _State.STATE_IN_CONSULTATION: "green",
    _State.STATE_PARKED: "dim",
    _State.STATE_MISSED: "dim red",
}
_PRIORITIES = {queue_pb2.PRIORITY_URGENT: "urgent", queue_pb2.PRIORITY_PRIORITY: "priority"}
# Called patients come first: they have to notice it.
_ORDER = [
    _State.STATE_CALLED,
    _State.STATE_IN_CONSULTATION,
    _State.STATE_WAITING,
    _State.STATE_PARKED,
    _State.STATE_MISSED,
]


class UnknownDoctor(Exception):
    """No doctor has this id or code; the message is one line that names it."""


async def follow(
    client: FrontdeskClient, wanted: str, day: datetime.date | None, console: Console, *, names: bool = True
) -> None:
    """Show the queue of the doctor with this id or code on `day` or the clinic's today, until cancelled.

    A board if the console is a terminal that can draw, else a line for each update. Without `names` the service sends
    none. Raises UnknownDoctor and FrontdeskError.
    """
    view = queue_pb2.QUEUE_VIEW_STAFF if names else queue_pb2.QUEUE_VIEW_BOARD
    doctor = await _find(client, wanted)
    board = Board(doctor.display_name, names=names)
    watch = client.watch_queue(doctor.id, day, view=view, on_connection=board.connection, on_estimates=board.estimates)
    async with aclosing(watch) as queues:
        if not console.is_terminal or console.is_dumb_terminal:
            async for queue in queues:
                print(line(queue), file=console.file, flush=True)
            return
        with Live(board, console=console, refresh_per_second=4, screen=True):
            async for queue in queues:
                board.queue = queue


async def _find(client: FrontdeskClient, wanted: str) -> doctor_pb2.Doctor:
    try:
        request = doctor_pb2.GetDoctorRequest(doctor_id=str(uuid.UUID(wanted)))
        return (await client.doctors.GetDoctor(request)).doctor
    except ValueError:
        pass
    except FrontdeskError as error:
        if error.reason != "DOCTOR_NOT_FOUND":
            raise
    found = (await client.doctors.ListDoctors(doctor_pb2.ListDoctorsRequest(code=wanted))).doctors if wanted else ()
    if not found:
        raise UnknownDoctor(f"there is no doctor with the id or code {wanted!r}")
    return found[0]


class Board:
    """The contents of the board; each time rich draws it, with the waiting times of that moment."""

    def __init__(self, doctor_name: str, *, names: bool = True) -> None:
        """Without `names` it is for the waiting room: tickets, rooms and estimates alone."""
        self._doctor_name = doctor_name
        self._names = names
        self.queue: queue_pb2.Queue | None = None
        """The latest queue; None before the first."""
        self.connected = False
        """Whether the queue is live."""

    def connection(self, lives: bool) -> None:
        """Note whether the queue is live."""
        self.connected = lives

    def estimates(self, heartbeat: queue_pb2.Heartbeat) -> None:
        """Take over the estimates of a queue that has not changed."""
        if self.queue is None:
            return
        now = {one.ticket: one for one in heartbeat.estimates}
        for entry in self.queue.entries:
            entry.ClearField("estimate")
            if entry.ticket in now and now[entry.ticket].HasField("estimate"):
                entry.estimate.CopyFrom(now[entry.ticket].estimate)
        self.queue.ClearField("next_estimate")
        if heartbeat.HasField("next_estimate"):
            self.queue.next_estimate.CopyFrom(heartbeat.next_estimate)

    def __rich__(self) -> RenderableType:
        return self.at(time.time())

    def at(self, now: float) -> RenderableType:
        """The board at this time, in seconds since 1970."""
        state = Text("● live", "green") if self.connected else Text("○ connecting …", "bold red")
        if self.queue is None:
            return Group(_heading(self._doctor_name, state))
        queue = self.queue
        table = Table(expand=True, header_style="bold")
        cells = _DESK if self._names else _WAITING_ROOM
        for name, column in cells.items():
            table.add_column(name, ratio=1 if name == "Name" else None, justify=column.justify)
        for entry in in_order(queue):
            table.add_row(*(column.cell(entry, now) for column in cells.values()), style=_STYLES.get(entry.state))
        if not queue.entries:
            table.add_row("", Text("nobody is here yet", "dim italic"))
        facts = f"{day(queue)}  ·  {queue.waiting_count} waiting, {queue.expected_count} expected"
        if queue.HasField("next_estimate"):
            facts += f"  ·  a newcomer waits {_span(queue.next_estimate, now)}"
        return Group(_heading(self._doctor_name, state), Text(facts), table, Text(f"revision {queue.revision}", "dim"))


def line(queue: queue_pb2.Queue) -> str:
    """The queue as one line of text."""
    parts = [f"{day(queue)} revision {queue.revision}: {queue.waiting_count} waiting, {queue.expected_count} expected"]
    for state in _ORDER:
        named = [
            " ".join(filter(None, (str(entry.ticket), entry.patient_name, entry.room and f"({entry.room})")))
            for entry in queue.entries
            if entry.state == state
        ]
        if named:
            parts.append(f"{_NAMES[state]}: {', '.join(named)}")
    return " | ".join(parts)


def day(queue: queue_pb2.Queue) -> str:
    """The date of the queue, as ISO 8601 has it."""
    return f"{queue.date.year:04}-{queue.date.month:02}-{queue.date.day:02}"


def in_order(queue: queue_pb2.Queue) -> list[queue_pb2.QueueEntry]:
    """The entries as the board lists them: called, in consultation, waiting in calling order, parked, missed."""
    # States of a later release are unknown here and come last.
    return sorted(queue.entries, key=lambda one: _ORDER.index(one.state) if one.state in _ORDER else len(_ORDER))


def _heading(doctor_name: str, state: Text) -> RenderableType:
    heading = Table.grid(expand=True)
    heading.add_column(ratio=1)
    heading.add_column(justify="right")
    heading.add_row(Text(doctor_name, "bold"), state)
    return heading


def _state(entry: queue_pb2.QueueEntry) -> str:
    return _NAMES.get(entry.state, "?")


def _span(estimate: queue_pb2.Estimate, now: float) -> str:
    """The range of an estimate in minutes from now."""
    first, last = ((time.ToMicroseconds() / 1e6 - now) / 60 for time in (estimate.earliest, estimate.latest))
    if last < 1:
        return "0–1 min"
    return f"{max(0, int(first))}–{math.ceil(last)} min"


def _wait(entry: queue_pb2.QueueEntry, now: float) -> str:
    """How long the patient has waited, or had to wait until the consultation began."""
    if entry.HasField("start_time"):
        now = entry.start_time.ToMicroseconds() / 1e6
    # This machine's clock may be behind the server's.
    minutes = max(0, int(now - entry.check_in_time.ToMicroseconds() / 1e6) // 60)
    return f"{minutes // 60}:{minutes % 60:02}" if minutes >= 60 else f"{minutes} min"


@dataclass(frozen=True, slots=True)
class _Column:
    """What a board shows of an entry. Names and rooms as text, because they are not markup."""

    cell: Callable[[queue_pb2.QueueEntry, float], str | Text]
    justify: Literal["left", "right"] = "left"


_TICKET = _Column(lambda entry, now: str(entry.ticket), "right")
_ROOM = _Column(lambda entry, now: Text(entry.room))
_TURN = _Column(lambda entry, now: _span(entry.estimate, now) if entry.HasField("estimate") else "", "right")
_DESK = {
    "Ticket": _TICKET,
    "Name": _Column(lambda entry, now: Text(entry.patient_name)),
    "State": _Column(lambda entry, now: " · ".join(filter(None, (_state(entry), _PRIORITIES.get(entry.priority))))),
    "Room": _ROOM,
    "Wait": _Column(lambda entry, now: _wait(entry, now), "right"),
    "Turn": _TURN,
}
_WAITING_ROOM = {"Ticket": _TICKET, "State": _Column(lambda entry, now: _state(entry)), "Room": _ROOM, "Turn": _TURN}
