"""Public formats: countries, time zones, phone numbers; and the form in which names are compared. No I/O."""

import unicodedata
from datetime import date
from functools import cache
from importlib import resources
from zoneinfo import ZoneInfo

import phonenumbers

from frontdesk.errors import InvalidField


@cache
def countries() -> frozenset[str]:
    """The ISO 3166-1 alpha-2 codes, from the table in the IANA time zone database."""
    table = resources.files("tzdata").joinpath("zoneinfo", "iso3166.tab").read_text(encoding="utf-8")
    return frozenset(line[:2] for line in table.splitlines() if line and not line.startswith("#"))


def time_zone(name: str) -> ZoneInfo | None:
    """The zone of that name in the IANA time zone database, as its package on PyPI has it; None if there is none.

    The host's own files may have other names, such as localtime, and other rules.
    """
    if name not in _zones():
        return None
    *folders, file = name.split("/")
    with resources.files("tzdata").joinpath("zoneinfo", *folders, file).open("rb") as data:
        return ZoneInfo.from_file(data, key=name)


@cache
def _zones() -> frozenset[str]:
    return frozenset(resources.files("tzdata").joinpath("zones").read_text(encoding="utf-8").split())


def require_country(code: str, field: str) -> None:
    """Raise InvalidField unless `code` is empty or a country's code."""
    if code and code not in countries():
        raise InvalidField((field, "is not an ISO 3166-1 alpha-2 country code"))


def require_order(from_date: date | None, to_date: date | None) -> None:
    """Raise InvalidField if a range of dates ends before it begins."""
    if from_date and to_date and to_date < from_date:
        raise InvalidField(("to_date", "is before from_date"))


def e164(number: str, country: str, field: str) -> str:
    """The number in E.164, such as +5511987654321.

    A number without a country code is read as a number of `country`. An empty number stays empty. Raises InvalidField
    if the number is not valid in its country.
    """
    if not number:
        return ""
    if any(character.isalpha() for character in number):
        # The library reads letters as keys of a phone, as in 1-800-CLINIC. Here they are a mistake.
        raise InvalidField((field, "contains letters"))
    try:
        parsed = phonenumbers.parse(number, country or None)
    except phonenumbers.NumberParseException:
        hint = "" if country else "; give a country, or start with + and the country code"
        raise InvalidField((field, "is not a phone number" + hint)) from None
    if not phonenumbers.is_valid_number(parsed):
        raise InvalidField((field, "is not a valid phone number in its country"))
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)


def folded(*names: str) -> str:
    """Names in the form in which they are compared: NFKC-normalised, case-folded, single spaces (Unicode 3.13)."""
    return " ".join(unicodedata.normalize("NFKC", " ".join(names)).casefold().split())
