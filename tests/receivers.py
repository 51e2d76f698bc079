"""Where notifications go in tests: a mail server with logins and TLS, and a receiver of webhooks, in this process."""

import asyncio
import json
import ssl
import warnings
from collections.abc import Callable
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any, Self

import icalendar
from aiosmtpd.smtp import SMTP, AuthResult
from standardwebhooks import Webhook

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Receiver:
    """An HTTP server that takes webhooks, and judges their signatures as Standard Webhooks says."""

    def __init__(self, secret: str = SECRET) -> None:
        self._webhook = Webhook(secret)
        self.status = 200
        """What it answers."""
        self.posts: list[dict[str, Any]] = []
        """The bodies that it has answered 2xx, in their order."""
        self.ids: list[str] = []
        """`webhook-id` of every request, refused ones too."""
        self.gate = asyncio.Event()
        """It answers nothing while this is cleared."""
        self.gate.set()
        self.port = 0
        self.most = 0
        """The most requests that it had at once."""
        self._open = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, again on the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Go away, with every connection."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def kinds(self) -> list[str]:
        """The kinds of the notifications that it has taken."""
        return [post["data"]["notification"]["kind"] for post in self.posts]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {
                    name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)
                }
                body = await reader.readexactly(int(headers["content-length"]))
                self.ids.append(headers["webhook-id"])
                self._open += 1
                self.most = max(self.most, self._open)
                await self.gate.wait()
                self._open -= 1
                status = self.status
                if 200 <= status < 300:
                    # Raises, and so answers nothing, if the signature is wrong.
                    self.posts.append(self._webhook.verify(body, headers))
                    assert self.posts[-1] == json.loads(body)
                    assert self.posts[-1]["data"]["notification"]["id"] == headers["webhook-id"]
                writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\n\r\n".encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


class MailBox:
    """A mail server."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, starttls: ssl.SSLContext | None = None) -> None:
        """`tls` from the first byte, or `starttls`; with a login (clinic, "s3cret /") if either is given."""
        self._tls = tls
        self._starttls = starttls
        self.refuse: Callable[[str], str | None] = lambda address: None
        """The answer to a recipient, if it is none of welcome."""
        self.answer = "250 OK"
        """The answer to a whole mail."""
        self.mails: list[EmailMessage] = []
        """Those that it has taken."""
        self.tried: list[str] = []
        """Message-ID of every mail, refused ones too."""
        self.to: list[list[str]] = []
        """The recipients of the envelopes."""
        self.gate = asyncio.Event()
        """It answers no mail while this is cleared."""
        self.gate.set()
        self.secure = 0
        """How many mails came encrypted and with a login."""
        self.port = 0
        self._open: set[asyncio.BaseTransport] = set()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, again on the same port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._protocol, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Go away, with every connection."""
        self._server.close()
        for transport in list(self._open):
            if isinstance(transport, asyncio.Transport):
                transport.abort()
        await asyncio.sleep(0)

    def _protocol(self) -> SMTP:
        box = self

        class Line(SMTP):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                box._open.add(transport)
                super().connection_made(transport)

        secure = self._tls is not None or self._starttls is not None
        with warnings.catch_warnings():
            # It does not know that all of it is within TLS.
            warnings.simplefilter("ignore")
            return Line(
                self,
                hostname="mail.test",
                tls_context=self._starttls,
                require_starttls=self._starttls is not None,
                authenticator=self._authenticate,
                auth_required=secure,
                auth_require_tls=self._starttls is not None,
            )

    def _authenticate(self, server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
        # Without `handled` it would leave the refusal to us.
        return AuthResult(success=(data.login, data.password) == (b"clinic", b"s3cret /"), handled=False)

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if (refused := self.refuse(address)) is not None:
            return refused
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        mail: Any = message_from_bytes(envelope.content, policy=default)
        self.tried.append(mail["Message-ID"])
        await self.gate.wait()
        if self.answer.startswith("250"):
            self.mails.append(mail)
            self.to.append(envelope.rcpt_tos)
            self.secure += bool(session.authenticated)
        return self.answer

    @property
    def subjects(self) -> list[str]:
        """Those of the mails that it has taken."""
        return [str(mail["Subject"]) for mail in self.mails]


def body(mail: EmailMessage, kind: str) -> str:
    """The text, as plain or html."""
    part = mail.get_body((kind,))
    assert part is not None
    return str(part.get_content())


def calendar(mail: EmailMessage) -> tuple[str, Any]:
    """The method and the event of the calendar in a mail."""
    (part,) = (part for part in mail.walk() if part.get_content_type() == "text/calendar")
    found: Any = icalendar.Calendar.from_ical(part.get_content())
    assert part.get_param("method") == found["METHOD"]
    (event,) = found.walk("VEVENT")
    return str(found["METHOD"]), event
