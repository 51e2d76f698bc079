"""Keyset paging: a page is what comes after the last row of the page before, so rows that come and go shift nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

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
