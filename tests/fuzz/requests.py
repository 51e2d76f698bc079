"""Requests that nobody should send: for every method, messages built from its descriptor, with damaged bytes.

Every text in a hostile request contains the canary, so that one search shows whether a refusal or the log repeats any
of them.
"""

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from tests.hostile.methods import METHODS, VALID, World

CANARY = "Qzx7"

_T = FieldDescriptor
_VARINTS = {_T.TYPE_INT32, _T.TYPE_INT64, _T.TYPE_UINT32, _T.TYPE_UINT64, _T.TYPE_SINT32, _T.TYPE_SINT64,
            _T.TYPE_BOOL, _T.TYPE_ENUM}  # fmt: skip

_ODD = (
    "\0", "\x01", "\x1b[2J", "\x7f", "\x85", "\n", "\r\n", "\t", " ", "\u00a0", "\u200b", "\u200d", "\u202e", "\u2066",
    "\u2028", "\ufeff", "\ufffe", "\uffff", "\U0010ffff", "\U0001f469\u200d\U0001f9b0", "e\u0301", "\u0130", "ß", "ﬃ",
    "\u0390", "\u1fb7", "ǅ", "Σς", "０１２", "٠١٢", "²", "%", "_", "\\", "'", '"', "$1", "%s", "{}", "\\x00", "\\u0000",
    "')--", "../", "NaN", "null", "العربية", "漢字", "ᄀ" * 3,
)  # fmt: skip
LENGTHS = (0, 1, 49, 50, 51, 64, 65, 199, 200, 201, 255, 256, 1024, 1999, 2000, 2001, 4000, 4001, 20_000)
INTEGERS = (0, 1, -1, 2, 10, 100, 101, 500, 1000, 1001, 32767, 32768, 65536, 2**31 - 1, -(2**31), 2**31, 2**32,
            2**53, 2**63 - 1, -(2**63), 2**63, 2**64 - 1)  # fmt: skip
INSTANTS = (0, 1, -1, -62135596800, -62135596801, 253402300799, 253402300800, 2**63 - 1, -(2**63), 1_800_000_000)
NANOS = (0, 1, 999, 999_999_999, 10**9, -1, 2**31 - 1, -(2**31))
DATES = (
    (2026, 2, 29), (2028, 2, 29), (1, 1, 1), (9999, 12, 31), (10000, 1, 1), (0, 0, 0), (2026, 0, 0), (0, 1, 1),
    (-1, 1, 1), (1900, 2, 29), (1582, 10, 10), (4714, 1, 1), (2**31 - 1, 12, 31), (2026, 2**31 - 1, -(2**31)),
)  # fmt: skip
PLAUSIBLE: Mapping[str, Sequence[str]] = {
    "country": ("PE", "CL", "BR", "US"),
    "default_country": ("PE", "CL", "BR", "US", "GB"),
    "phone": (
        "+5511987654321",
        "(11) 98765-4321",
        "+51987654321",
        "987654321",
        "tel:+5511987654321",
        "+1 800 FLOWERS",
        "",
        "\u202a+52 1 55 1234 5678\u202c",
        "+14244172469#619",
    ),
    "time_zone": ("UTC", "America/Lima", "Pacific/Kiritimati", "Etc/GMT+12", "localtime", "Factory", "EST5EDT"),
    "number": ("00123", "12345", "1"),
    "etag": ("1", "2", "999999999", "9999999999", "١"),
    "code": ("X", "Y"),
    "idempotency_key": ("k", "k2", "~" * 255),
    "paths": ("*", "name", "phone", "code", "given_name", "notes", "insurances", "emergency_contact.name", "active"),
    "name_prefix": ("R", "p", "%"),
    "specialty": ("Cardiology",),
    "room": ("1",),
}


@dataclass(frozen=True)
class Known:
    """The resources of a running service, for requests to name."""

    worlds: Sequence[World]
    today: tuple[int, int, int]
    noon: int
    """Noon tomorrow, in seconds since 1970."""
    tokens: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Genuine tokens of pages and streams, by method."""

    @property
    def ids(self) -> list[str]:
        return [value for world in self.worlds for value in vars(world).values()]


_texts = st.one_of(
    st.sampled_from(_ODD).map(lambda odd: CANARY + odd),
    st.lists(st.sampled_from(_ODD), max_size=6).map(lambda parts: CANARY.join(["", *parts])),
    st.tuples(st.sampled_from(_ODD), st.sampled_from(LENGTHS)).map(lambda p: (CANARY + p[0] * p[1])[: p[1]]),
    st.text(max_size=20).map(lambda text: text + CANARY),
    st.just(""),
)
_numbers = st.sampled_from(INTEGERS) | st.integers(-(2**63), 2**64 - 1) | st.integers(0, 20)


def _ids(known: Known) -> SearchStrategy[str]:
    real = st.sampled_from(known.ids)
    return st.one_of(
        real,
        real,
        real.map(str.upper),
        real.map(lambda value: value[:-1] + chr(ord(value[-1]) ^ 1)),
        st.uuids().map(str),
        st.sampled_from(("", "0" * 36, "00000000-0000-0000-0000-000000000000", "f" * 8 + "-ffff" * 3 + "-" + "f" * 12)),
        st.tuples(real, st.sampled_from(_ODD)).map(lambda p: p[0] + p[1]),
        _texts,
    )


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.sampled_from(_ODD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.just("a"), inner, max_size=1),
    max_leaves=6,
)


@st.composite
def _page_or_resume(draw: DrawFn, method: str, known: Known) -> str:
    """A genuine token, or one with a part replaced."""
    every = [token for found in known.tokens.values() for token in found]
    token = draw(st.sampled_from(list(known.tokens.get(method, ())) or every) | st.sampled_from(every))
    if draw(st.booleans()):
        return token
    data = base64.urlsafe_b64decode(token)
    try:
        parts = json.loads(data)
    except ValueError:
        # The token of a page is sealed.
        at = draw(st.integers(0, len(data) - 1))
        return base64.urlsafe_b64encode(data[:at] + draw(st.binary(max_size=4)) + data[at + 1 :]).decode()
    at = draw(st.integers(0, len(parts) - 1))
    parts[at] = draw(_JSON)
    return base64.urlsafe_b64encode(json.dumps(parts, separators=(",", ":")).encode()).decode()


def _string(method: str, name: str, known: Known) -> SearchStrategy[str]:
    if name in ("page_token", "resume_token"):
        return _page_or_resume(method, known) | _texts
    if name in ("id", "slot_ids") or name.endswith("_id"):
        return _ids(known)
    if name in PLAUSIBLE:
        return st.sampled_from(PLAUSIBLE[name]) | _texts
    return _texts


def _parts(method: str, kind: Descriptor, known: Known) -> SearchStrategy[dict[str, int]] | None:
    """The fields of a date, an instant or a duration, as numbers."""
    if kind.full_name == "google.type.Date":
        year, month, day = known.today
        near = st.sampled_from([(year, month, day), *((year, month, n) for n in range(1, 29))])
        return (near | st.sampled_from(DATES)).map(lambda d: {"year": d[0], "month": d[1], "day": d[2]})
    if kind.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
        soon = st.integers(-96, 960).map(lambda quarters: known.noon + quarters * 900)
        seconds = soon | st.sampled_from(INSTANTS) | st.integers(-(2**63), 2**63 - 1)
        return st.builds(lambda s, n: {"seconds": s, "nanos": n}, seconds, st.just(0) | st.sampled_from(NANOS))
    return None


def _fits(value: int, kind: int) -> int:
    """The value, cut to the width of its type."""
    if kind in (_T.TYPE_INT64, _T.TYPE_SINT64):
        return (value + 2**63) % 2**64 - 2**63
    return (value + 2**31) % 2**32 - 2**31


@st.composite
def _filled(draw: DrawFn, method: str, kind: Descriptor, known: Known, base: Message | None, depth: int) -> Message:
    """A message of this kind: the base with some fields changed, or without a base only the changes."""
    made: Any = message_factory.GetMessageClass(kind)()
    if base is not None:
        made.CopyFrom(base)
    if not kind.fields:
        return made  # type: ignore[no-any-return]
    for one in draw(st.lists(st.sampled_from(list(kind.fields)), max_size=4 if depth else 3, unique_by=id)):
        if one.message_type is not None and depth > 3:
            continue
        count = draw(st.sampled_from((0, 1, 1, 2, 3, 21, 101))) if one.is_repeated else 1
        values = [draw(_value(method, one, known, made, depth)) for _ in range(min(count, 3))]
        if one.is_repeated:
            made.ClearField(one.name)
            getattr(made, one.name).extend((values * 40)[:count])
        elif one.message_type is not None:
            getattr(made, one.name).CopyFrom(values[0])
        else:
            setattr(made, one.name, values[0])
    return made  # type: ignore[no-any-return]


def _value(method: str, one: FieldDescriptor, known: Known, holder: Any, depth: int) -> SearchStrategy[Any]:
    if one.message_type is not None:
        kind = one.message_type
        parts = _parts(method, kind, known)
        if parts is not None:
            return parts.map(lambda found: message_factory.GetMessageClass(kind)(**found))
        base = None if one.is_repeated or not holder.HasField(one.name) else getattr(holder, one.name)
        return _filled(method, kind, known, base, depth + 1)
    if one.type == _T.TYPE_STRING:
        return _string(method, one.name, known)
    if one.type == _T.TYPE_BOOL:
        return st.booleans()
    if one.enum_type is not None:
        numbers = [value.number for value in one.enum_type.values]
        return st.sampled_from(numbers) | st.sampled_from((99, -1, 2**31 - 1, -(2**31)))
    assert one.type in _VARINTS, one.full_name
    return _numbers.map(lambda value: _fits(value, one.type))


# Bytes


def _varint(value: int) -> bytes:
    value %= 2**64
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@st.composite
def _field(draw: DrawFn, numbers: Sequence[int]) -> bytes:
    """One field with any number and any wire type."""
    number = draw(st.sampled_from(numbers) | st.sampled_from((0, 1000, 19_000, 2**29 - 1, 2**29)))
    wire = draw(st.integers(0, 7))
    tag = _varint(number << 3 | wire)
    match wire:
        case 0:
            return tag + draw(_numbers.map(_varint) | st.just(b"\xff" * 10 + b"\x01"))
        case 1:
            return tag + struct.pack("<d", draw(st.floats()))
        case 2:
            inner = draw(_texts.map(lambda text: text.encode(errors="replace")) | st.binary(max_size=30) | _ill_formed)
            return tag + _varint(len(inner) + draw(st.sampled_from((0, 0, 0, 1, -1, 2**31)))) + inner
        case 3:
            deep = draw(st.sampled_from((1, 2, 99, 100, 101, 5000)))
            closed = draw(st.booleans())
            return tag * deep + (_varint(number << 3 | 4) * deep if closed else b"")
        case 5:
            return tag + draw(st.binary(min_size=4, max_size=4))
    return tag


_ill_formed = st.sampled_from(
    (b"\xed\xa0\x80", b"\xed\xb0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xff", b"abc\xe2")
)


def _cut(draw: DrawFn, whole: bytes) -> tuple[int, int]:
    start = draw(st.integers(0, len(whole)))
    return start, draw(st.integers(start, min(len(whole), start + 40)))


@st.composite
def _spoiled(draw: DrawFn, whole: bytes, numbers: Sequence[int]) -> bytes:
    """The bytes of a request, damaged in one way."""
    start, end = _cut(draw, whole)
    match draw(st.integers(0, 6)):
        case 0:
            return whole[:start]
        case 1:
            return whole[:start] + whole[end:]
        case 2:
            return whole + whole[start:end]
        case 3:
            # All bytes twice, the second half first: fields come out of order, and the last one wins.
            return whole[start:] + whole + whole[:start]
        case 4:
            return whole[:start] + draw(st.binary(max_size=8)) + whole[end:]
        case 5:
            return draw(_field(numbers)) + whole
    return whole + draw(_field(numbers))


@st.composite
def requests(draw: DrawFn, method: str, known: Known) -> bytes:
    """A request of this method: a valid one or an empty one, with changed fields, and sometimes with damaged bytes."""
    kind = METHODS[method].input_type
    base = VALID[method](draw(st.sampled_from(known.worlds))) if draw(st.integers(0, 3)) else None
    whole = draw(_filled(method, kind, known, base, 0)).SerializeToString()
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2)))):
        whole = draw(_spoiled(whole, [one.number for one in kind.fields] or [1]))
    return whole


METADATA: SearchStrategy[tuple[tuple[str, str | bytes], ...]] = st.one_of(
    st.just(()),
    st.just(()),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=80).map(
        lambda text: (("frontdesk-caller", text),)
    ),
    st.sampled_from(
        (
            "",
            "00",
            "00-" + "0" * 32 + "-" + "0" * 16 + "-01",
            "00-" + "g" * 32 + "-1-1",
            "ff-" + "a" * 32 + "-" + "b" * 16,
        )
    ).map(lambda text: (("traceparent", text), ("tracestate", f"{text}={text}"))),
    st.binary(max_size=40).map(lambda raw: (("x-noise-bin", raw), ("frontdesk-caller-bin", raw))),
)
"""The metadata of a call."""
