"""Keyset paging: a page is what comes after the last row of the page before, so rows that come and go shift nothing."""

import base64
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from frontdesk.db.database import Database

T = TypeVar("T")

NO_INSTANT = "-infinity"
"""An absent instant in a sort key, as PostgreSQL writes what comes before all others."""


@dataclass(frozen=True, slots=True)
class Page:
    """What is asked for: at most `size` rows after the row whose sort key is `after`."""

    size: int
    after: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Listing(Generic[T]):
    """One page, and the sort key of its last row where more follow."""

    items: Sequence[T]
    next: tuple[str, ...] | None


def cut(page: Page, found: Sequence[T], key: Callable[[T], tuple[str, ...]]) -> Listing[T]:
    """The page out of the `size` + 1 rows that were asked for; the one too many says that more follow."""
    if len(found) <= page.size:
        return Listing(found, None)
    return Listing(found[: page.size], key(found[page.size - 1]))


class PageTokens:
    """Makes the tokens of pages: nobody can read, change or forge one, because a place may be a patient's name."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESSIV(key)

    def token(self, place: Sequence[str], *owners: bytes) -> str:
        """The token of the place, good for those who name the same owners."""
        return base64.urlsafe_b64encode(self._cipher.encrypt(json.dumps(place).encode(), list(owners))).decode()

    def place(self, token: str, *owners: bytes) -> tuple[str, ...]:
        """The place of a token. Raises ValueError if it is none, or has other owners."""
        try:
            sealed = base64.b64decode(token, altchars=b"-_", validate=True)
            if base64.urlsafe_b64encode(sealed).decode() != token:
                raise ValueError
            return tuple(json.loads(self._cipher.decrypt(sealed, list(owners))))
        except InvalidTag:
            raise ValueError from None


KEY = "select value from secret where name = 'page_tokens'"
MAKE_KEY = "insert into secret (name, value) values ('page_tokens', %s) on conflict do nothing"


class SharedPageTokens:
    """The page tokens of all replicas. Their key is in the database, and the first who needs it makes it."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._page_tokens: PageTokens | None = None

    async def get(self) -> PageTokens:
        """The tokens, after the first time without a round trip. Raises DatabaseUnavailable."""
        if self._page_tokens is None:
            key = await self._db.row(KEY, (), bytes)
            if key is None:
                await self._db.run(MAKE_KEY, (secrets.token_bytes(32),))
                key = await self._db.row(KEY, (), bytes)
            assert key is not None
            self._page_tokens = PageTokens(key)
        return self._page_tokens
