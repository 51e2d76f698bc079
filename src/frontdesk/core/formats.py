"""Public formats: countries, time zones, phone numbers, insured numbers. No I/O."""

import re
import unicodedata
from datetime import date
from functools import cache
from importlib import resources
from zoneinfo import ZoneInfo

import phonenumbers

from frontdesk.core.names import without_invisible
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


# Digits of any script and the signs between them. The library would drop the rest in silence, such as an extension
# after `#` or `,,`, or read it as part of the number.
_NUMBER = re.compile(r"[ (\[]*[+\uff0b]?[\d ()\[\]\uff08\uff09./\uff0e\uff0f\u30fc\u2212\uff0d\u2010-\u2015-]*")

_OLD_PREFIXES = {52: re.compile(r"(?:04[45]|01)?1?(\d{10})")}
"""By country code what was once dialled before a number and is no longer part of it: in Mexico until 2019."""


def e164(number: str, country: str, field: str) -> str:
    """The number in E.164, such as +5511987654321.

    A number without a country code is read as a number of `country`. An empty number stays empty. Invisible characters
    do not count. Raises InvalidField if the number is not valid in its country, or has an extension.
    """
    if not number:
        return ""
    number = "".join(" " if unicodedata.category(c) == "Zs" else c for c in without_invisible(number))
    if not _NUMBER.fullmatch(number):
        raise InvalidField((field, "has a character that no phone number has; extensions are not supported"))
    try:
        parsed = phonenumbers.parse(number, country or None)
    except phonenumbers.NumberParseException:
        hint = "" if country else "; give a country, or start with + and the country code"
        raise InvalidField((field, "is not a phone number" + hint)) from None
    old = _OLD_PREFIXES.get(parsed.country_code or 0)
    if old is not None and (found := old.fullmatch(phonenumbers.national_significant_number(parsed))):
        parsed = phonenumbers.PhoneNumber(country_code=parsed.country_code, national_number=int(found[1]))
    if not phonenumbers.is_valid_number(parsed):
        raise InvalidField((field, "is not a valid phone number in its country"))
    return phonenumbers.format_number(parsed, phonenumbers.PhoneNumberFormat.E164)


def insurance_key(country: str, number: str) -> str:
    """An insured number in the form in which it is sought: in capitals, without blanks and punctuation."""
    return country + re.sub("[^0-9A-Z]", "", number.upper())
