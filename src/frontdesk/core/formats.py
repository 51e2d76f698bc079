"""What the world has agreed on: countries, time zones, phone numbers; and how names are compared. Pure."""

import unicodedata
from functools import cache
from importlib.resources import files
from zoneinfo import available_timezones

import phonenumbers

from frontdesk.errors import InvalidField


@cache
def countries() -> frozenset[str]:
    """The ISO 3166-1 alpha-2 codes, from the table that the IANA time zone database carries."""
    table = files("tzdata").joinpath("zoneinfo", "iso3166.tab").read_text(encoding="utf-8")
    return frozenset(line[:2] for line in table.splitlines() if line and not line.startswith("#"))


@cache
def zones() -> frozenset[str]:
    """The names of the IANA time zone database."""
    return frozenset(available_timezones())


def require_country(code: str, field: str) -> None:
    """Raise InvalidField where `code` is neither empty nor a country's."""
    if code and code not in countries():
        raise InvalidField((field, "is no ISO 3166-1 alpha-2 code"))


def require_zone(name: str, field: str) -> None:
    """Raise InvalidField where there is no such time zone."""
    if name not in zones():
        raise InvalidField((field, "is no IANA time zone"))


def e164(number: str, country: str, field: str) -> str:
    """The number in E.164, such as +5511987654321.

    `country` reads a number written without its country code; an empty number stays empty. Raises InvalidField where
    it is no possible number there.
    """
    if not number:
        return ""
    if any(character.isalpha() for character in number):
        # The library reads letters as keys of the phone, as in 1-800-CLINIC; here they are a slip.
        raise InvalidField((field, "has letters"))
    try:
        parsed = phonenumbers.parse(number, country or None)
    except phonenumbers.NumberParseException:
        raise InvalidField((field, "is no phone number" + ("" if country else "; without + give a country"))) from None
    if not phonenumbers.is_valid_number(parsed):
        raise InvalidField((field, "is no phone number of its country"))
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)


def folded(*names: str) -> str:
    """Names as they are compared: compatibility-normalised, case-folded, single spaces (Unicode 3.13)."""
    return " ".join(unicodedata.normalize("NFKC", " ".join(names)).casefold().split())
