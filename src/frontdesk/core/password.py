"""Passwords: which are accepted, and their hashes, which take 50 ms of a thread each and never block the event loop."""

import asyncio
import os
import secrets
import threading
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, TypeVar

from frontdesk.db.change import Key
from frontdesk.errors import InvalidField, Overloaded

if TYPE_CHECKING:
    from argon2 import PasswordHasher

T = TypeVar("T")

_MOST_WAITING = 200
"""Hashes that are under way or wait: those of ten seconds, after which their callers have given up."""
_NICE = 5
"""Below the threads that answer calls, but not so far that a busy machine lets no one in."""
_NOBODYS = "$argon2id$v=19$m=19456,t=2,p=1$vJ8jgMB1Zh1pWFd3mRKtEQ$OR3AXVj/+bMHXovvEp/23JV612NiVpNXJX/hrXVS7GY"
"""The hash of a random text, for users who do not exist: checking takes the same time."""


def require_acceptable(password: str, email: str, field: str, old: str = "") -> None:
    """Raise InvalidField for a password that is the e-mail, the old one, or among the most common."""
    if _normal(password) == _normal(old):
        raise InvalidField((field, "is the old password"))
    comparable = _normal(password).casefold()
    names = {email.casefold(), email.casefold().partition("@")[0]}
    if comparable in names:
        raise InvalidField((field, "is the e-mail"))
    if comparable in _common():
        raise InvalidField((field, "is among the most common passwords"))


class Passwords:
    """Hashes and checks passwords, one at a time in this process, so that they take one core at most."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._for_keys: dict[object, asyncio.Future[str]] = {}
        """The hashes under way for keyed requests."""
        self._one_time: dict[object, str] = {}
        """The passwords that `one_time` hashes for them."""

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among those who wait, for as long as the block lasts. Raises Overloaded if there is none left."""
        if self._waiting >= _MOST_WAITING:
            raise Overloaded
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def hashed(self, password: str, key: Key) -> str:
        """The hash to store, once for all copies of a keyed request that wait together. Raises Overloaded."""
        same = (key.caller, key.method, key.name, password)
        if same in self._for_keys:
            return await asyncio.shield(self._for_keys[same])
        with self.place():
            hashing = asyncio.ensure_future(self._do(lambda: _hasher().hash(_normal(password))))
            if key.name:
                self._for_keys[same] = hashing
                hashing.add_done_callback(lambda _: self._for_keys.pop(same, None))
            return await asyncio.shield(hashing)

    async def one_time(self, key: Key) -> tuple[str, str]:
        """A new password and its hash, the same for all copies of a keyed request that wait together.

        Raises Overloaded.
        """
        same = (key.caller, key.method, key.name)
        password = self._one_time.get(same) if key.name else None
        if password is not None:
            return password, await self.hashed(password, key)
        password = secrets.token_urlsafe(12)
        if key.name:
            self._one_time[same] = password
        try:
            return password, await self.hashed(password, key)
        finally:
            self._one_time.pop(same, None)

    async def matches(self, stored: str | None, password: str) -> bool:
        """Whether it is the password of this hash; None is nobody's. Takes the same time whatever the answer.

        The caller has a `place`.
        """
        known = await self._do(lambda: _verify(stored or _NOBODYS, password))
        return known and stored is not None

    async def _do(self, work: Callable[[], T]) -> T:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "frontdesk-password", _step_back)
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Begin no further hash."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


@cache
def _hasher() -> "PasswordHasher":
    # Imported when the first user logs in, because it takes time.
    from argon2 import PasswordHasher

    # OWASP's second choice of parameters for argon2id.
    return PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)


def _verify(stored: str, password: str) -> bool:
    from argon2.exceptions import VerificationError

    try:
        return _hasher().verify(stored, _normal(password))
    except VerificationError:
        return False


def _normal(password: str) -> str:
    # Keyboards write the same letter in different ways.
    return unicodedata.normalize("NFKC", password)


def _step_back() -> None:
    # On Linux a thread has a priority of its own.
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


@cache
def _common() -> frozenset[str]:
    text = resources.files("frontdesk.core").joinpath("common_passwords.txt").read_text(encoding="utf-8")
    return frozenset(line for line in text.splitlines() if not line.startswith("#"))
