"""A user's session in a client: logs in, and refreshes the access token in time. Pure: the clients do the talking."""

import time
from collections.abc import Callable, Generator
from typing import Any

import grpc
from google.protobuf.message import Message

from clinic.frontdesk.v1 import auth_pb2
from frontdesk.client.errors import FrontdeskError

_EARLY_SECONDS = 60.0
"""A token is refreshed when so little of its life is left, or half of a shorter life."""
_ENDED = {"REFRESH_REUSED", "CREDENTIALS_INVALID", "CREDENTIALS_EXPIRED"}
"""The session is over. Only a password begins another one."""

Steps = Generator[tuple[str, Message], Any, None]
"""Yields a method of AuthService and its request; is sent the response, or thrown the FrontdeskError."""


class Login:
    """A user's credentials, for one client.

    Give `email` and `password`, or the `refresh_token` of a session that began elsewhere, or both: then the password is
    used when that session is over. `on_refresh` is called with each new refresh token, so that a program can store it
    for its next start; the one before it stops to be good after 10 s.
    """

    def __init__(
        self,
        email: str = "",
        password: str = "",
        *,
        refresh_token: str = "",
        on_refresh: Callable[[str], None] | None = None,
    ) -> None:
        """Raises ValueError without an e-mail and a password, and without a refresh token."""
        if not (refresh_token or (email and password)):
            raise ValueError("a login needs an e-mail and a password, or a refresh token")
        self._email = email
        self._password = password
        self._refresh_token = refresh_token
        self._on_refresh = on_refresh or (lambda token: None)
        self._due = 0.0
        self.access_token = ""
        """Empty before the first login."""

    @property
    def due(self) -> bool:
        """Whether the access token should be renewed before the next call."""
        return time.monotonic() >= self._due

    def expire(self) -> None:
        """Renew before the next call: the service wants another access token."""
        self._due = 0.0

    def renewal(self) -> Steps:
        """The calls that renew the access token. Raises FrontdeskError."""
        if self._refresh_token:
            try:
                answer = yield "RefreshToken", auth_pb2.RefreshTokenRequest(refresh_token=self._refresh_token)
            except FrontdeskError as error:
                if error.reason not in _ENDED or not self._password:
                    raise
            else:
                self._take(answer.session)
                return
        answer = yield "Login", auth_pb2.LoginRequest(email=self._email, password=self._password)
        if answer.HasField("second_factor"):
            # A program has no app that shows codes.
            needed = "the user has a second factor: log in by hand, and give the client that session's refresh token"
            raise FrontdeskError(grpc.StatusCode.UNAUTHENTICATED, message=needed)
        self._take(answer.session)

    def _take(self, session: auth_pb2.Session) -> None:
        life = session.expires_in.ToNanoseconds() / 1e9
        self._due = time.monotonic() + life - min(_EARLY_SECONDS, life / 2)
        self.access_token = session.access_token
        self._refresh_token = session.refresh_token
        self._on_refresh(session.refresh_token)
