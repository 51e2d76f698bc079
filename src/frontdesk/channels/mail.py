"""The channel EMAIL: a mail with text, HTML and, for an appointment, an entry for the calendar."""

import asyncio
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP, SMTPUTF8
from email.utils import format_datetime

import aiosmtplib
import icalendar

from frontdesk.channels.texts import Texts, Wording
from frontdesk.core.notification import EMAIL, Outgoing, Unsent
from frontdesk.settings.channels import SmtpServer

_SECONDS = 10.0
"""For each answer of the mail server."""
_IDLE_SECONDS = 5.0
"""How long a connection is kept for the next mail."""


@dataclass(frozen=True, slots=True)
class _Line:
    """An open connection."""

    client: aiosmtplib.SMTP
    used: float


class Mail:
    """Sends notifications by a mail server."""

    name = EMAIL

    def __init__(self, server: SmtpServer, sender: Address, wording: Wording) -> None:
        """`sender` without a display name gets the clinic's."""
        self._server = server
        self._sender = sender
        self._wording = wording
        self._context = ssl.create_default_context()
        self._idle: list[_Line] = []

    async def send(self, one: Outgoing, code: str) -> None:
        """Raises Unsent unless the mail server has taken the mail."""
        mail = self.message(one, code)
        international = not one.to.isascii() and not _ascii_domain(one.to).isascii()
        content = mail.as_bytes(policy=(SMTPUTF8 if international else SMTP).clone(cte_type="7bit"))
        try:
            async with self._connection() as client:
                await self._hand_in(client, _ascii_domain(one.to), content, international)
        except Unsent:
            raise
        except aiosmtplib.SMTPAuthenticationError as error:
            raise Unsent(f"SMTP_{error.code}_LOGIN", away=True) from error
        except aiosmtplib.SMTPResponseException as error:
            raise Unsent(f"SMTP_{error.code}", away=True) from error
        except (aiosmtplib.SMTPTimeoutError, TimeoutError) as error:
            raise Unsent("TIMEOUT", away=True) from error
        except (aiosmtplib.SMTPException, OSError) as error:
            raise Unsent("TLS_FAILED" if _is_of_tls(error) else "CONNECTION_FAILED", away=True) from error

    async def _hand_in(self, client: aiosmtplib.SMTP, to: str, content: bytes, international: bool) -> None:
        if international and not client.supports_extension("smtputf8"):
            raise Unsent("SMTPUTF8_UNSUPPORTED", for_good=True)
        # Whoever refuses the sender refuses every mail.
        await client.mail(self._sender.addr_spec, options=["SMTPUTF8"] if international else [])
        try:
            await client.rcpt(to)
            await client.data(content)
        except (aiosmtplib.SMTPRecipientRefused, aiosmtplib.SMTPDataError) as error:
            raise Unsent(f"SMTP_{error.code}", for_good=error.code >= 500, away=error.code == 421) from error
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            raise Unsent("CONNECTION_LOST", away=True, perhaps=True) from error

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosmtplib.SMTP]:
        client = await self._kept() or await self._opened()
        try:
            yield client
        except BaseException:
            client.close()
            raise
        self._idle.append(_Line(client, time.monotonic()))
        asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        """Close the connections that nobody has used for a while."""
        now = time.monotonic()
        for line in self._idle:
            if now - line.used >= _IDLE_SECONDS:
                line.client.close()
        self._idle = [line for line in self._idle if now - line.used < _IDLE_SECONDS]

    async def _kept(self) -> aiosmtplib.SMTP | None:
        """A connection of an earlier mail that still answers."""
        while self._idle:
            line = self._idle.pop()
            if time.monotonic() - line.used < _IDLE_SECONDS:
                with suppress(aiosmtplib.SMTPException, OSError, TimeoutError):
                    await line.client.rset()
                    return line.client
            line.client.close()
        return None

    async def _opened(self) -> aiosmtplib.SMTP:
        server = self._server
        client = aiosmtplib.SMTP(
            hostname=server.host,
            port=server.port,
            use_tls=server.security == "tls",
            start_tls=server.security == "starttls",
            tls_context=self._context,
            timeout=_SECONDS,
            # Its own way to the name asks the DNS, and blocks.
            local_hostname=socket.gethostname(),
        )
        try:
            await client.connect()
            if server.user:
                await client.login(server.user, server.password)
        except BaseException:
            client.close()
            raise
        return client

    async def close(self) -> None:
        """Close the connections."""
        while self._idle:
            client = self._idle.pop().client
            with suppress(aiosmtplib.SMTPException, OSError, TimeoutError):
                await client.quit()
            client.close()

    def message(self, one: Outgoing, code: str = "") -> EmailMessage:
        """The mail. Raises Unsent if the address is none."""
        texts = self._wording.mail(one, code)
        mail = EmailMessage(policy=SMTP.clone(cte_type="7bit"))
        try:
            mail["From"] = Address(self._sender.display_name or one.clinic, addr_spec=self._sender.addr_spec)
            mail["To"] = Address(_one_line(one.name), addr_spec=_ascii_domain(one.to))
            if one.email:
                mail["Reply-To"] = Address(_one_line(one.clinic), addr_spec=_ascii_domain(one.email))
        except (MessageError, ValueError, IndexError):
            raise Unsent("BAD_ADDRESS", for_good=True) from None
        mail["Subject"] = texts.subject
        mail["Message-ID"] = f"<{one.id}@{self._sender.domain}>"
        mail["Date"] = format_datetime(datetime.now(UTC))
        mail["Auto-Submitted"] = "auto-generated"
        mail["Content-Language"] = texts.language
        mail.set_content(texts.text)
        mail.add_alternative(texts.html, subtype="html")
        if one.appointment_id is not None:
            calendar = self._calendar(one, texts)
            method = str(calendar["method"])
            entry = calendar.to_ical().decode()
            mail.add_alternative(entry, subtype="calendar", params={"method": method, "name": "appointment.ics"})
        return mail

    def _calendar(self, one: Outgoing, texts: Texts) -> icalendar.Calendar:
        """The appointment as iTIP has it (RFC 5546): later ones with the same UID take the place of earlier ones."""
        cancelled = one.kind == "CANCELLATION"
        assert one.date is not None
        event = icalendar.Event()
        event.add("uid", f"{one.appointment_id}@frontdesk")
        event.add("sequence", one.sequence)
        event.add("dtstamp", datetime.now(UTC))
        event.add("summary", texts.event)
        if one.start_time is None or one.end_time is None:
            event.add("dtstart", one.date)
            event.add("dtend", one.date + timedelta(days=1))
            event.add("transp", "TRANSPARENT")
        else:
            event.add("dtstart", one.start_time.astimezone(UTC))
            event.add("dtend", one.end_time.astimezone(UTC))
        event.add("location", ", ".join(filter(None, map(_one_line, (one.clinic, one.address, one.city)))))
        event.add("status", "CANCELLED" if cancelled else "CONFIRMED")
        organizer = icalendar.vCalAddress(f"mailto:{self._sender.addr_spec}")
        organizer.params["cn"] = _one_line(one.clinic).replace('"', "'")
        event["organizer"] = organizer
        attendee = icalendar.vCalAddress(f"mailto:{_ascii_domain(one.to)}")
        attendee.params.update(
            {"cn": _one_line(one.name).replace('"', "'"), "role": "REQ-PARTICIPANT", "partstat": "ACCEPTED"}
        )
        event["attendee"] = attendee
        calendar = icalendar.Calendar()
        calendar.add("prodid", "-//frontdesk//appointments//EN")
        calendar.add("version", "2.0")
        calendar.add("method", "CANCEL" if cancelled else "REQUEST")
        calendar.add_component(event)
        return calendar


def _is_of_tls(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, ssl.SSLError) or _is_of_tls(error.__cause__))


def _ascii_domain(address: str) -> str:
    """The address with its domain as DNS has it."""
    local, at, domain = address.rpartition("@")
    try:
        return f"{local}{at}{domain.encode('idna').decode()}"
    except UnicodeError:
        return address


def _one_line(text: str) -> str:
    return " ".join(text.split())
