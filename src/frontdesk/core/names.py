"""The form in which names of people, cities and specialties are compared and sought. No I/O.

It is computed here and stored beside the name, because the letter case of PostgreSQL depends on the database's locale.
"""

import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

_LONGEST = 250
"""Characters that count in a comparison. Names are shorter; a few characters stand for up to 18 others."""

LONGEST_WORD = 64
"""Characters by which a word is sought, as in `name_words` (`db/sql/patient.sql`)."""

# Default_Ignorable_Code_Point in Unicode's DerivedCoreProperties.txt, which `unicodedata` does not have.
_IGNORABLE = (
    (0x00AD, 0x00AD), (0x034F, 0x034F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip

# What people and keyboards write for U+0027, and for U+002D beside the dashes of category Pd.
_APOSTROPHES = (
    "\u0060\u00b4\u02b9\u02bb\u02bc\u02bd\u02be\u02bf\u02c8\u02ca\u02cb\u0374\u0384\u055a\u055d\u05f3\u07f4\u07f5"
    "\u1fbd\u1fbf\u1fef\u1ffd\u1ffe\u2018\u2019\u201a\u201b\u2032\u2035\ua78b\ua78c\uff07\uff40"
)
_HYPHENS = "\u02d7\u2043\u2212\u2796"

_WRITTEN_AS = {"ı": "i", "ȷ": "j", "ð": "d", "þ": "th", "æ": "ae", "œ": "oe"}
"""Letters that Unicode does not name as another letter with a mark, and people write as these."""


def folded(*names: str) -> str:
    """The names in the form in which they are compared.

    Equal are all spellings that differ in letter case (Turkish i's included), in compatibility variants (NFKC), in the
    accents of Latin, Greek and Cyrillic letters, in the kinds of apostrophes, hyphens and blanks, and in invisible
    characters. A mark of another script makes another letter, and stays.
    """
    text = " ".join(names)
    if text.isascii():
        return " ".join(text.lower().translate(_plain).split())[:_LONGEST]
    # Folding a letter may make one that has to be taken apart again.
    for _ in range(2):
        text = _bare(unicodedata.normalize("NFKD", text.translate(_plain)).translate(_plain)).casefold()
    return " ".join(unicodedata.normalize("NFC", text).split())[:_LONGEST]


def sought_words(prefix: str) -> Sequence[str]:
    """The words of a search, each of which must begin a word of the name; none of them begins another."""
    words = {word[:LONGEST_WORD] for word in folded(prefix).replace(",", " ").split()}
    return sorted(word for word in words if not any(other.startswith(word) for other in words - {word}))


def without_invisible(text: str) -> str:
    """The text without invisible characters, such as the marks around a number that was copied from a page."""
    return text.translate(_visible)


class _Visible(dict[int, int | None]):
    """A table for `str.translate` that drops invisible characters."""

    def __missing__(self, code: int) -> int | None:
        ignorable = any(first <= code <= last for first, last in _IGNORABLE)
        self[code] = None if ignorable else code
        return self[code]


class _Plain(_Visible):
    """The same, and one kind of apostrophe, hyphen and comma."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        if character in _APOSTROPHES:
            self[code] = ord("'")
        elif character in _HYPHENS or unicodedata.category(character) == "Pd":
            self[code] = ord("-")
        else:
            return super().__missing__(code)
        return self[code]


_visible = _Visible()
_plain = _Plain()


def _bare(text: str) -> str:
    """The decomposed text without the marks of Latin, Greek and Cyrillic letters."""
    kept = []
    bare = False
    for character in text:
        if not unicodedata.category(character).startswith("M"):
            base = _base(character)
            bare = base is not None
            kept.append(base or character)
        elif not bare:
            kept.append(character)
    return "".join(kept)


@cache
def _base(character: str) -> str | None:
    """The letter without its stroke, hook or other mark; None if it is not Latin, Greek or Cyrillic."""
    name = unicodedata.name(character, "")
    if not name.startswith(("LATIN ", "GREEK ", "CYRILLIC ")):
        return None
    bare, _, mark = name.partition(" WITH ")
    if mark:
        with suppress(KeyError):
            character = unicodedata.normalize("NFKD", unicodedata.lookup(bare))[0]
    return _WRITTEN_AS.get(character, character)
