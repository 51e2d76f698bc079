"""From the bytes of a request to a message that keeps the rules of the contract.

The size of a message does not bound the cost of decoding and checking it; the count of its parts does.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import protovalidate
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from buf.validate import validate_pb2
from frontdesk.errors import InvalidField
from frontdesk.rpc.status import MOST_VIOLATIONS

M = TypeVar("M", bound=Message)

MOST_ELEMENTS = 100
"""The most elements of a list for which the contract sets no maximum: that of an update mask."""

MOST_FIELDS = 2_000
"""The most fields of a request that has lists; each element of a list counts as one."""

_MALFORMED = ("", "the message is not valid protobuf of its type")

_validator = protovalidate.Validator()


def request_from(raw: bytes, kind: type[M]) -> M:
    """Decode and validate. Raises InvalidField, with at most MOST_VIOLATIONS of them."""
    # First: it takes 40 ms to decode a megabyte of empty slots, and many seconds to check its elements.
    _refuse_long_lists(raw, kind.DESCRIPTOR)
    try:
        request = kind.FromString(raw)
    except DecodeError:
        raise InvalidField(_MALFORMED) from None
    _lower_ids(request)
    if first := _validator.collect_violations(request, fail_fast=True):
        _cut_short(request, first[0].proto)
        violations = _validator.collect_violations(request)
        raise InvalidField(*(_violation(violation.proto) for violation in violations[:MOST_VIOLATIONS]))
    return request


def _lower_ids(message: Message) -> None:
    """Write every id in lower case, as the service keeps them: two spellings of an id make the same request."""
    for field in _fields_with_ids(message.DESCRIPTOR):
        value = getattr(message, field.name)
        if field.message_type is not None:
            for part in value if field.is_repeated else [value] if message.HasField(field.name) else ():
                _lower_ids(part)
        elif field.is_repeated:
            value[:] = [one.lower() for one in value]
        elif value and (lower := value.lower()) != value:
            setattr(message, field.name, lower)


@cache
def _fields_with_ids(kind: Any) -> Sequence[FieldDescriptor]:
    """The fields of a message that are UUIDs by their rules, or messages with such fields."""
    found = []
    for field in kind.fields:
        rules = field.GetOptions().Extensions[validate_pb2.field]
        one = rules.repeated.items if field.is_repeated else rules
        if one.string.uuid or (field.message_type is not None and _fields_with_ids(field.message_type)):
            found.append(field)
    return found


@cache
def _lists(kind: Any) -> Mapping[int, tuple[FieldDescriptor, int | None]]:
    """The lists of a message by field number, each with the most elements that it may have.

    With None in place of a number: the fields whose messages have lists themselves.
    """
    found: dict[int, tuple[FieldDescriptor, int | None]] = {}
    for field in kind.fields:
        further = field.message_type is not None and bool(_lists(field.message_type))
        if field.is_repeated:
            assert not further, "lists of messages with lists need a count for each"
            assert field.message_type or field.enum_type or field.type == FieldDescriptor.TYPE_STRING
            rules = field.GetOptions().Extensions[validate_pb2.field].repeated
            found[field.number] = field, rules.max_items if rules.HasField("max_items") else MOST_ELEMENTS
        elif further:
            found[field.number] = field, None
    return found


def _refuse_long_lists(raw: bytes, kind: Any) -> None:
    """Count the elements of each list, in the encoding that https://protobuf.dev/programming-guides/encoding describes.

    The decoder finds anything else that is wrong with the bytes.
    """
    counts: Counter[str] = Counter()
    fields = 0
    parts: list[tuple[bytes, Any, str]] = [(raw, kind, "")] if _lists(kind) else []
    while parts:
        part, kind, path = parts.pop()
        at = 0
        while at < len(part):
            fields += 1
            if fields > MOST_FIELDS:
                raise InvalidField(("", f"must contain no more than {MOST_FIELDS} fields and elements of lists"))
            number, value, at = _field(part, at)
            field, most = _lists(kind).get(number, (None, None))
            if field is None:
                continue
            name = path + field.name
            if most is None:
                parts.append((value, field.message_type, name + "."))
                continue
            # Enums may be packed, many in one field. The last byte of each is below 128.
            counts[name] += sum(byte < 128 for byte in value[: 10 * most + 1]) if field.is_packed else 1
            if counts[name] > most:
                raise InvalidField((name, f"must contain no more than {most} item(s)"))


def _field(part: bytes, at: int) -> tuple[int, bytes, int]:
    """The number of the field that begins at `at`, its value, and the place of the next one."""
    tag, at = _varint(part, at)
    match tag & 7:
        case 0:
            _, end = _varint(part, at)
        case 1:
            end = at + 8
        case 2:
            length, at = _varint(part, at)
            end = at + length
        case 5:
            end = at + 4
        case _:
            # Groups, which proto3 does not have.
            raise InvalidField(_MALFORMED)
    return tag >> 3, part[at:end], end


def _varint(part: bytes, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and the place after it."""
    number = 0
    for n, byte in enumerate(part[at : at + 10]):
        number |= (byte & 127) << (7 * n)
        if byte < 128:
            return number, at + n + 1
    raise InvalidField(_MALFORMED)


def _cut_short(request: Message, first: Any) -> None:
    """Shorten the list with the first violation: later elements' violations would not fit into the answer.

    It takes 11 ms to find 2,000 violations, and the process answers nobody meanwhile.
    """
    holder: Any = request
    for element in first.field.elements if first.field else ():
        # The name of a oneof gives None.
        holder = getattr(holder, element.field_name, None)
        if element.subscript is not None and element.subscript.field == "index":
            del holder[element.subscript.value + MOST_VIOLATIONS :]
            break


def _violation(found: Any) -> tuple[str, str]:
    path = ""
    for element in found.field.elements if found.field else ():
        path += f".{element.field_name}" if path else element.field_name
        if element.subscript is not None and element.subscript.field == "index":
            path += f"[{element.subscript.value}]"
    # The id of a rule of a whole request is the path of the field that it is about.
    return path or found.rule_id, found.message or found.rule_id
