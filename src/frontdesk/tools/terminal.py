"""The terminal of the commands, which may know few characters, and whose reader may have gone."""

import codecs
import io
import sys
import unicodedata

from rich.console import Console

_SIMILAR = {"●": "*", "○": "o", "·": "-"}


class Terminal(Console):
    """Standard output. Writing raises BrokenPipeError if its reader has gone."""

    def on_broken_pipe(self) -> None:
        # rich would end the process here, with status 1.
        raise BrokenPipeError


def write_similar_characters() -> None:
    """From now on write a similar character, else a question mark, where the encoding of standard output lacks one.

    Only UTF-8 has them all, and a name without its accents is better than no queue.
    """
    codecs.register_error("frontdesk.similar", _similar)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="frontdesk.similar")


def _similar(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    similar = ""
    for character in error.object[error.start : error.end]:
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        similar += _SIMILAR.get(character) or plain or "?"
    return similar, error.end
