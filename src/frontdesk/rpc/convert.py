"""Convert between messages and Python values: dates, instants, etags, masks, pages, keys."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, date, datetime, timedelta
from functools import cache
from operator import attrgetter
from typing import Any, TypeVar

from google.protobuf import duration_pb2, timestamp_pb2
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.type import date_pb2, timeofday_pb2

from frontdesk.db.change import Key
from frontdesk.db.paging import Page
from frontdesk.errors import InvalidField
from frontdesk.rpc.pipeline import Call

DEFAULT_PAGE = 50
MOST_PAGE = 100

M = TypeVar("M", bound=Message)

Columns = Callable[[Any], Mapping[str, Any]]

EVERY_FIELD = FieldMask(paths=["*"])

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def date_from(message: Message, field: str, within: str = "") -> date | None:
    """The date in this field; None if it is absent. Raises InvalidField if no such day exists.

    `within` is the path of the message in its request, ending with a dot; the refusal names it.
    """
    if not message.HasField(field):
        return None
    value: date_pb2.Date = getattr(message, field)
    try:
        return date(value.year, value.month, value.day)
    except ValueError:
        raise InvalidField((within + field, "is not a valid date")) from None


def required_date(message: Message, field: str, within: str = "") -> date:
    """The date in a required field. Raises InvalidField if it is absent or no such day exists."""
    found = date_from(message, field, within)
    if found is None:
        raise InvalidField((within + field, "is required"))
    return found


def date_to(value: date) -> date_pb2.Date:
    """The same civil day."""
    return date_pb2.Date(year=value.year, month=value.month, day=value.day)


def instant_from(message: Message, field: str, within: str = "") -> datetime | None:
    """The instant in this field, cut to microseconds; None if it is absent.

    Raises InvalidField for an instant outside the years 1970 to 9999.
    """
    if not message.HasField(field):
        return None
    value: timestamp_pb2.Timestamp = getattr(message, field)
    if not 0 <= value.nanos < 10**9 or not 0 <= value.seconds < 253402300800:
        raise InvalidField((within + field, "is not an instant in the years 1970 to 9999"))
    return _EPOCH + timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)


def required_instant(message: Message, field: str, within: str = "") -> datetime:
    """The instant in a required field. Raises InvalidField."""
    found = instant_from(message, field, within)
    if found is None:
        raise InvalidField((within + field, "is required"))
    return found


def minute_from(message: Message, field: str, within: str = "") -> int:
    """The time of day in a required field, as the minute of the day: 1,440 for 24:00. Raises InvalidField."""
    value: timeofday_pb2.TimeOfDay = getattr(message, field)
    minute: int = value.hours * 60 + value.minutes
    if value.hours < 0 or not 0 <= value.minutes < 60 or value.seconds or value.nanos or minute > 24 * 60:
        raise InvalidField((within + field, "is not a whole minute from 00:00 to 24:00"))
    return minute


def minute_to(minute: int) -> timeofday_pb2.TimeOfDay:
    """The time of day of this minute of the day."""
    return timeofday_pb2.TimeOfDay(hours=minute // 60, minutes=minute % 60)


def minutes_from(message: Message, field: str, within: str = "") -> int:
    """The length of time in a required field. Raises InvalidField unless it is whole minutes, 1 min to 24 h."""
    value: duration_pb2.Duration = getattr(message, field)
    if value.nanos or value.seconds % 60 or not 60 <= value.seconds <= 24 * 3600:
        raise InvalidField((within + field, "is not a number of whole minutes from 1 to 1,440"))
    return int(value.seconds) // 60


def length_from(message: Message, field: str) -> timedelta | None:
    """The length of time in this field, not negative and cut to microseconds; None if it is absent.

    Raises InvalidField if its parts are no such length.
    """
    if not message.HasField(field):
        return None
    value: duration_pb2.Duration = getattr(message, field)
    if value.seconds < 0 or not 0 <= value.nanos < 10**9:
        raise InvalidField((field, "is not a length of time"))
    return timedelta(seconds=value.seconds, microseconds=value.nanos // 1000)


def converter(message: type[M], shape: type[Any], **others: Callable[[Any], Any]) -> Callable[[Any], M]:
    """Make the function that turns a dataclass of the core into its message, field by field of the same name.

    Dates, instants and states become their protobuf types, and `version` becomes `etag`. `others` make the fields that
    the dataclass does not have.
    """
    plan: list[tuple[str, Callable[[Any], Any], Callable[[Any], Any] | None]] = []
    names = {field.name for field in fields(shape)}
    for field in message.DESCRIPTOR.fields:
        if field.name in others:
            plan.append((field.name, others[field.name], None))
        elif field.name == "etag":
            plan.append((field.name, attrgetter("version"), str))
        elif field.name not in names:
            raise TypeError(f"{shape.__name__} says nothing about {field.full_name}")
        elif field.enum_type is not None:
            plan.append((field.name, attrgetter(field.name), enum_numbers(field.enum_type).__getitem__))
        elif field.message_type is not None and field.message_type.full_name == "google.type.Date":
            plan.append((field.name, attrgetter(field.name), date_to))
        else:
            plan.append((field.name, attrgetter(field.name), None))

    def convert(record: Any) -> M:
        found = {}
        for name, get, wire in plan:
            value = get(record)
            if value is not None:
                found[name] = value if wire is None else wire(value)
        return message(**found)

    return convert


def enum_numbers(enum: Any) -> dict[str, int]:
    """The numbers of an enum by the names that the core uses, which lack the prefix of protobuf style."""
    prefix = len(enum.values_by_number[0].name) - len("UNSPECIFIED")
    return {value.name[prefix:]: value.number for value in enum.values}


def version_from(etag: str) -> int | None:
    """The version in an etag; None if the etag is empty, -1 (which matches no version) if it is not one of ours."""
    if not etag:
        return None
    return int(etag) if etag.isascii() and etag.isdigit() and len(etag) < 10 else -1


def key_of(request: Any, call: Call) -> Key:
    """The key, with the fingerprint of the request without it and without passwords. Clears the key in the request."""
    name = request.idempotency_key
    fingerprint = b""
    if name:
        request.ClearField("idempotency_key")
        if passwords := _passwords(request.DESCRIPTOR):
            # A copy: they are still needed.
            bare = type(request)()
            bare.CopyFrom(request)
            for field in passwords:
                bare.ClearField(field)
            request = bare
        fingerprint = _fingerprint(request)
    return Key(call.caller.identity, call.method, name, fingerprint, call.address, call.trace_id)


@cache
def _passwords(kind: Any) -> Sequence[str]:
    """The fields of a request that have passwords: no form of them is stored, but the slow hash."""
    return [field.name for field in kind.fields if field.name.endswith("password")]


def id_or_none(value: str) -> str | None:
    """An optional id; None if it is not given."""
    return value or None


def writable(*paths: str, **others: Callable[[Any], Mapping[str, Any]]) -> dict[str, Columns]:
    """The columns that each path of a resource sets: the column of its own name, or those that `others` return."""

    def same(path: str) -> Columns:
        return lambda resource: {path: getattr(resource, path)}

    return {path: same(path) for path in paths} | others


def active_from(resource: Any) -> dict[str, bool]:
    """The value of `active`; absent means true."""
    return {"active": resource.active if resource.HasField("active") else True}


def changes_from(resource: Any, mask: FieldMask, columns: Mapping[str, Columns]) -> dict[str, Any]:
    """The columns that an update changes, by the rules of the mask (AIP-134).

    `columns` maps each writable path to the columns that it sets. Without a mask, the fields that are set are changed;
    `*` changes all fields. Raises InvalidField for an unknown or output-only path.
    """
    paths: Sequence[str]
    if not mask.paths:
        paths = [field.name for field, _ in resource.ListFields() if field.name in columns]
    elif list(mask.paths) == ["*"]:
        paths = [path for path in columns if "." not in path]
    else:
        paths = mask.paths
        for path in paths:
            if path not in columns:
                raise InvalidField(("update_mask", "contains an unknown or output-only path"))
    changes: dict[str, Any] = {}
    for path in paths:
        changes |= columns[path](resource)
    return changes


async def page_from(request: Any, call: Call) -> Page:
    """The page that a List request asks for.

    Raises InvalidField for a token that was not made for this caller, method and filter.
    """
    size = min(request.page_size or DEFAULT_PAGE, MOST_PAGE)
    if not request.page_token:
        return Page(size)
    tokens = await call.page_tokens.get()
    try:
        place = tokens.place(request.page_token, *page_owners(request, call.caller.identity))
    except ValueError:
        raise InvalidField(("page_token", "is not a page token of this caller, method and filter")) from None
    return Page(size, place)


async def page_token(request: Any, call: Call, after: tuple[str, ...] | None) -> str:
    """The token for the page after this sort key; empty if `after` is None, which means the last page."""
    if after is None:
        return ""
    return (await call.page_tokens.get()).token(after, *page_owners(request, call.caller.identity))


def page_owners(request: Any, identity: str) -> tuple[bytes, bytes]:
    """What the page tokens of a request are bound to: the caller, and the method with its filter."""
    return identity.encode(), _filter_mark(request)


def _filter_mark(request: Any) -> bytes:
    bare = type(request)()
    bare.CopyFrom(request)
    bare.ClearField("page_size")
    bare.ClearField("page_token")
    return hashlib.blake2b(request.DESCRIPTOR.full_name.encode() + _fingerprint(bare), digest_size=12).digest()


def _fingerprint(request: Message) -> bytes:
    return hashlib.blake2b(request.SerializeToString(deterministic=True), digest_size=16).digest()
