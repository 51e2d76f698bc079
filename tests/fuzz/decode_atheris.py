"""Fuzz the decoding and checking of requests, guided by coverage: `python -m tests.fuzz.decode_atheris`.

Run it by hand, because atheris is not a dependency of the project: `pip install atheris`; `-max_total_time=60` ends it.
It needs neither server nor database, so it covers only the code before them: decoding, the rules of the contract, and
the reading of tokens, dates and instants must accept any request, or refuse it as INVALID_FIELD.
"""

import sys
from contextlib import suppress
from dataclasses import fields

import atheris  # type: ignore[import-not-found,import-untyped,unused-ignore]

with atheris.instrument_imports(include=["frontdesk"]):
    from frontdesk.db.paging import PageTokens
    from frontdesk.errors import InvalidField
    from frontdesk.live.tokens import ResumeToken
    from frontdesk.rpc import convert, status
    from frontdesk.rpc.requests import request_from

import hypothesis
from google.protobuf import message_factory
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.requests import CANARY, Known, requests
from tests.hostile.methods import METHODS, World

_IDS = [f"0192f5d1-7a5c-7b6e-8f00-0123456789{n:02x}" for n in range(len(fields(World)))]
_TOKENS = PageTokens(bytes(32))
_KNOWN = Known(
    [World(*_IDS)],
    (2026, 11, 20),
    1_800_000_000,
    {
        "WatchQueue": ["WyIwMTkyZjVkMS03YTVjLTdiNmUtOGYwMC0wMTIzNDU2Nzg5YTEiLCIyMDI2LTExLTIwIiwyLDEsIlNUQUZGIl0="],
    },
)


def _read(message: Message) -> None:
    """Read tokens, dates and instants as the servicers do."""
    for field, value in message.ListFields():
        if field.name == "page_token":
            with suppress(ValueError):
                _TOKENS.place(value, b"")
        elif field.name == "resume_token":
            ResumeToken.decode(value)
        elif field.name == "etag":
            convert.version_from(value)
        elif field.message_type is not None and not field.is_repeated:
            if field.message_type.full_name == "google.type.Date":
                convert.date_from(message, field.name)
            elif field.message_type.full_name == "google.protobuf.Timestamp":
                convert.instant_from(message, field.name)
            else:
                _read(value)


@hypothesis.settings(database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@given(st.data())
def one(data: st.DataObject) -> None:
    """Send one request of one method."""
    name = data.draw(st.sampled_from(sorted(METHODS)), "method")
    raw = data.draw(requests(name, _KNOWN), "request")
    try:
        _read(request_from(raw, message_factory.GetMessageClass(METHODS[name].input_type)))
    except InvalidField as refusal:
        code, text, trailers = status.status_of(refusal)
        assert code.name == "INVALID_ARGUMENT"
        assert sum(len(value) for _, value in trailers) < 8192
        assert CANARY not in text + repr(trailers)


if __name__ == "__main__":
    # Hypothesis builds little from few bytes.
    atheris.Setup([sys.argv[0], "-max_len=8192", "-len_control=0", *sys.argv[1:]], one.hypothesis.fuzz_one_input)  # type: ignore[attr-defined]
    atheris.Fuzz()
