"""Resume tokens: where a stream stood, as text that is opaque to the client."""

import base64
import binascii
import json
import uuid
from dataclasses import dataclass
from datetime import date
from typing import Any

from frontdesk.errors import InvalidField


def pack(*parts: str | int) -> str:
    """The parts as one text without blanks."""
    return base64.urlsafe_b64encode(json.dumps(parts, separators=(",", ":")).encode()).decode()


def unpack(text: str) -> Any:
    """The packed parts. Raises ValueError if the text is not what `pack` makes; the parts may still be of any type."""
    try:
        return json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
    except (binascii.Error, RecursionError) as error:
        raise ValueError from error


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """A revision of a doctor-day as a view shows it, and the time of that change.

    The time tells the revision from another of the same number, which a restored database may count up to.
    """

    doctor_id: str
    date: date
    revision: int
    change_micros: int
    """In microseconds since 1970; 0 at revision 1, which no change has made."""
    view: str

    def encode(self) -> str:
        """The text for the wire."""
        return pack(self.doctor_id, self.date.isoformat(), self.revision, self.change_micros, self.view)

    @classmethod
    def decode(cls, text: str) -> "ResumeToken":
        """Raises InvalidField if `encode` cannot have made the text."""
        try:
            doctor, day, revision, micros, view = unpack(text)
            token = cls(str(uuid.UUID(doctor)), date.fromisoformat(day), int(revision), int(micros), str(view))
        except (ValueError, TypeError, AttributeError, ArithmeticError):
            raise InvalidField(("resume_token", "is malformed")) from None
        if token.encode() != text:
            raise InvalidField(("resume_token", "is malformed"))
        return token
