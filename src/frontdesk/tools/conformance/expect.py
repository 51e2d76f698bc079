"""How a check says what it expects, and what a server says instead."""

import itertools
from collections.abc import Awaitable, Sequence
from typing import Any

import grpc
from google.protobuf import text_format
from google.protobuf.message import Message

from clinic.frontdesk.v1 import queue_pb2
from frontdesk.client import FrontdeskError

State = queue_pb2.QueueEntry.State
Kind = queue_pb2.QueueChange.Kind
Priority = queue_pb2.Priority
Response = queue_pb2.WatchQueueResponse


class Mismatch(Exception):
    """The server does not do what the contract says; the message names the expected and the seen."""

    def __init__(self, subject: str, seen: object, expected: object) -> None:
        super().__init__(f"{subject}: expected {as_text(expected)}, seen {as_text(seen)}")


class Skipped(Exception):
    """The check cannot be made now; the message says why."""


def expect(subject: str, seen: object, expected: object) -> None:
    """Raises Mismatch if they differ."""
    if seen != expected:
        raise Mismatch(subject, seen, expected)


def expect_same(subject: str, seen: Message, expected: Message) -> None:
    """Like `expect`, and names the first field that differs. Estimates may differ between two reads of one revision."""
    seen, expected = _without_estimates(seen), _without_estimates(expected)
    if seen != expected:
        raise Mismatch(*_difference(subject, seen, expected))


def _without_estimates(message: Message) -> Message:
    bare = type(message)()
    bare.CopyFrom(message)
    for name in ("estimate", "next_estimate"):
        if name in bare.DESCRIPTOR.fields_by_name:
            bare.ClearField(name)
    for entry in getattr(bare, "entries", ()):
        entry.ClearField("estimate")
    return bare


def _difference(path: str, seen: Any, expected: Any) -> tuple[str, Any, Any]:
    if isinstance(expected, Message):
        for name in expected.DESCRIPTOR.fields_by_name:
            if getattr(seen, name) != getattr(expected, name):
                return _difference(f"{path}.{name}", getattr(seen, name), getattr(expected, name))
    elif not isinstance(expected, str | bytes) and isinstance(expected, Sequence) and len(seen) == len(expected):
        for place, (left, right) in enumerate(zip(seen, expected, strict=True)):
            if left != right:
                return _difference(f"{path}[{place}]", left, right)
    return path, seen, expected


async def expect_refusal(call: Awaitable[object], code: grpc.StatusCode, reason: str) -> None:
    """Raises Mismatch if the call is not refused in this way."""
    expected = f"{code.name} {reason}"
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        refused = FrontdeskError.of(error)
        expect("refusal", f"{refused.code.name} {refused.reason}", expected)
    else:
        raise Mismatch("refusal", answer, expected)


def expect_chain(updates: Sequence[Response]) -> None:
    """Each update goes on from the one before it, and lists one change for each revision since."""
    for before, update in itertools.pairwise(updates):
        expect(f"previous_revision at revision {update.revision}", update.previous_revision, before.revision)
        expect_cover(update)


def expect_cover(update: Response) -> None:
    """The update lists one change for each revision after its previous one."""
    expect(
        f"revisions of the changes from {update.previous_revision} to {update.revision}",
        [change.revision for change in update.update.changes],
        [*range(update.previous_revision + 1, update.revision + 1)],
    )


def as_text(value: object) -> str:
    """A value for the report, at most some 300 characters."""
    if isinstance(value, Message):
        text = text_format.MessageToString(value, as_one_line=True) or "an empty message"
    elif isinstance(value, str):
        text = value or "nothing"
    elif isinstance(value, list):
        text = f"[{', '.join(map(as_text, value))}]"
    else:
        text = str(value)
    return text if len(text) <= 300 else f"{text[:300]} …"


def state_name(number: State.ValueType | None) -> str:
    """The state of an entry, for the report."""
    # An enum of proto3 is open: another server may send a number that is unknown here.
    if number is None:
        return "no entry"
    return State.Name(number).removeprefix("STATE_") if number in State.values() else str(number)


def kind_name(number: Kind.ValueType) -> str:
    """The kind of a change, for the report."""
    return Kind.Name(number).removeprefix("KIND_") if number in Kind.values() else str(number)
