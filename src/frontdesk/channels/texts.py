"""The words of notifications: templates of Jinja2, in English, Spanish and Portuguese.

`templates/LANGUAGE/KIND.jinja` has the words of a kind, as blocks. It extends `LANGUAGE/base.jinja`, which has what the
kinds of a language share, and that extends the layout: of a mail in HTML or as text, of its subject, of a short
message. A file of the same name in the operator's directory takes the place of ours.
"""

from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

import jinja2
import phonenumbers

from frontdesk.core.notification import Outgoing

LANGUAGES = ("en", "es", "pt")

_OF_COUNTRY = {
    "es": frozenset(("AR", "BO", "CL", "CO", "CR", "CU", "DO", "EC", "ES", "GQ", "GT", "HN", "MX", "NI", "PA", "PE",
                     "PR", "PY", "SV", "UY", "VE")),
    "pt": frozenset(("AO", "BR", "CV", "GW", "MZ", "PT", "ST", "TL")),
}  # fmt: skip

_WEEKDAYS = {
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "es": ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"),
    "pt": (
        "segunda-feira", "terça-feira", "quarta-feira", "quinta-feira", "sexta-feira", "sábado", "domingo",
    ),
}  # fmt: skip
_MONTHS = {
    "en": (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    ),
    "es": (
        "enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto", "septiembre", "octubre", "noviembre",
        "diciembre",
    ),
    "pt": (
        "janeiro", "fevereiro", "março", "abril", "maio", "junho", "julho", "agosto", "setembro", "outubro", "novembro",
        "dezembro",
    ),
}  # fmt: skip
_DAY = {
    "en": "{weekday}, {day} {month} {year}",
    "es": "{weekday}, {day} de {month} de {year}",
    "pt": "{weekday}, {day} de {month} de {year}",
}


@dataclass(frozen=True, slots=True)
class Texts:
    """What a notification says."""

    language: str
    subject: str
    text: str
    html: str
    event: str
    """What the entry in a calendar is called."""


class Wording:
    """Puts notifications into words."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` has the operator's own templates."""
        own = [] if directory is None else [jinja2.FileSystemLoader(directory)]
        loader = jinja2.ChoiceLoader([*own, jinja2.PackageLoader("frontdesk.channels")])
        # Whether names are escaped is fixed when a template is compiled, so each kind of text has its own.
        self._text, self._html = (
            jinja2.Environment(
                loader=loader,
                autoescape=escaped,
                undefined=jinja2.StrictUndefined,
                trim_blocks=True,
                lstrip_blocks=True,
            )
            for escaped in (False, True)
        )

    def mail(self, one: Outgoing, code: str = "") -> Texts:
        """The texts of a mail. Raises jinja2.TemplateError for a bad template of the operator's."""
        return Texts(
            language_of(one),
            _line(self._render(self._text, "subject.txt", one, code)),
            self._render(self._text, "mail.txt", one, code).strip() + "\n",
            self._render(self._html, "mail.html", one, code).strip() + "\n",
            _line(self._render(self._text, "event.txt", one, code)),
        )

    def short(self, one: Outgoing) -> str:
        """The text of a short message, on one line. Raises jinja2.TemplateError, as `mail` does."""
        return _line(self._render(self._text, "sms.txt", one, ""))

    def _render(self, environment: jinja2.Environment, layout: str, one: Outgoing, code: str) -> str:
        language = language_of(one)
        day = "" if one.date is None else day_in_words(one.date, language)
        time = _clock(one.local_start)
        return environment.get_template(f"{language}/{one.kind.lower()}.jinja").render(
            layout=f"{layout}.jinja",
            kind=one.kind,
            language=language,
            name=_line(one.name),
            doctor=_line(one.doctor),
            clinic=_line(one.clinic),
            place=[*filter(None, map(_line, one.address.splitlines())), *filter(None, [_line(one.city)])],
            phone=_phone(one.phone),
            email=one.email,
            day=day,
            time=time,
            when=", ".join(filter(None, (day, time))),
            code=code,
            until="" if one.until is None else f"{day_in_words(one.until.date(), language)}, {_clock(one.until)}",
        )


def language_of(one: Outgoing) -> str:
    """The language of a notification: the patient's, else that of the clinic's country, else English."""
    wanted = one.language.partition("-")[0]
    if wanted in LANGUAGES:
        return wanted
    return next((language for language, countries in _OF_COUNTRY.items() if one.country in countries), "en")


def day_in_words(day: date, language: str) -> str:
    """The date with its weekday."""
    weekday, month = _WEEKDAYS[language][day.weekday()], _MONTHS[language][day.month - 1]
    return _DAY[language].format(weekday=weekday, day=day.day, month=month, year=day.year)


def _clock(local: datetime | None) -> str:
    return "" if local is None else f"{local:%H:%M}"


def _phone(number: str) -> str:
    """The number as people read it."""
    if not number:
        return ""
    try:
        return phonenumbers.format_number(phonenumbers.parse(number), phonenumbers.PhoneNumberFormat.INTERNATIONAL)
    except phonenumbers.NumberParseException:
        return number


def _line(text: str) -> str:
    """The text on one line: what becomes a header has no second one."""
    return " ".join(text.split())
