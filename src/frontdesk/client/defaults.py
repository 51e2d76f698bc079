"""What both clients add to every call."""

import re
import uuid
from typing import Any, cast

from google.protobuf.message import Message

from frontdesk.client.login import Login

DEFAULT_TIMEOUT = 10.0
"""Seconds that a unary call may take, its retries included."""


_CREDENTIALS = ("authorization", "x-api-key")


class CallDefaults:
    """The caller's name and credentials, a deadline, and an idempotency key for each change that has none."""

    def __init__(
        self, caller: str | None, timeout: float | None, api_key: str | None = None, login: Login | None = None
    ) -> None:
        """Raises ValueError for a caller that is not 1 to 64 printable ASCII characters, and for a wrong API key."""
        if caller is not None and not (0 < len(caller) <= 64 and caller.isascii() and caller.isprintable()):
            raise ValueError("caller is not 1 to 64 printable ASCII characters")
        if api_key is not None and login is not None:
            raise ValueError("a client has an API key or a login, not both")
        if api_key is not None and not re.fullmatch("[!-~]{1,200}", api_key):
            # Not what was given: it may be a secret with a blank.
            raise ValueError("api_key does not look like an API key")
        self._caller = () if caller is None else (("frontdesk-caller", caller),)
        self._api_key = () if api_key is None else (("x-api-key", api_key),)
        self.login = login
        self._timeout = timeout

    def without_login(self) -> "CallDefaults":
        """These, for the calls that log in."""
        copy = CallDefaults(None, self._timeout)
        copy._caller = self._caller
        return copy

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
        metadata = tuple(given.get("metadata") or ())
        if not any(key in _CREDENTIALS for key, _ in metadata):
            metadata = (*self._credentials(), *metadata)
        given["metadata"] = (*self._caller, *metadata)
        return given

    def _credentials(self) -> tuple[tuple[str, str], ...]:
        if self.login is not None:
            return (("authorization", f"Bearer {self.login.access_token}"),)
        return self._api_key
