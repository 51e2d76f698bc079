"""What both clients add to every call."""

import uuid
from typing import Any, cast

from google.protobuf.message import Message

DEFAULT_TIMEOUT = 10.0
"""Seconds that a unary call may take, its retries included."""


class CallDefaults:
    """The caller's name, a deadline, and an idempotency key for each change that has none."""

    def __init__(self, caller: str | None, timeout: float | None) -> None:
        """Raises ValueError for a caller that is not 1 to 64 printable ASCII characters."""
        if caller is not None and not (0 < len(caller) <= 64 and caller.isascii() and caller.isprintable()):
            raise ValueError("caller is not 1 to 64 printable ASCII characters")
        self._caller = () if caller is None else (("frontdesk-caller", caller),)
        self._timeout = timeout

    def request(self, request: Message) -> Message:
        """The request, with an idempotency key if its type has one."""
        if "idempotency_key" not in request.DESCRIPTOR.fields_by_name or cast(Any, request).idempotency_key:
            return request
        # A copy: with the key in the caller's own message, sending that again would not be another change.
        keyed: Any = type(request)()
        keyed.CopyFrom(request)
        keyed.idempotency_key = uuid.uuid4().hex
        return cast(Message, keyed)

    def options(self, given: dict[str, Any], *, unary: bool) -> dict[str, Any]:
        """The options of a call."""
        if unary and given.get("timeout") is None:
            given["timeout"] = self._timeout
        given["metadata"] = (*self._caller, *(given.get("metadata") or ()))
        return given
