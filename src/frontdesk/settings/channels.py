"""Where notifications go out: what the settings of the channels say."""

import base64
import binascii
import re
from dataclasses import dataclass, field
from email.errors import MessageError
from email.headerregistry import Address
from email.utils import parseaddr
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

_SCHEMES: dict[str, tuple[Literal["none", "starttls", "tls"], int]] = {
    "smtp": ("none", 25),
    "smtp+starttls": ("starttls", 587),
    "smtps": ("tls", 465),
}


@dataclass(frozen=True, slots=True)
class SmtpServer:
    """A mail server."""

    host: str
    port: int
    security: Literal["none", "starttls", "tls"]
    user: str
    password: str = field(repr=False)


def parse_smtp(value: str) -> SmtpServer:
    """Read smtp://, smtp+starttls:// or smtps:// with USER:PASSWORD@HOST:PORT. Raises ValueError, without the value."""
    url = _split(value)
    if url.scheme not in _SCHEMES or not url.hostname or url.path not in ("", "/") or url.query or url.fragment:
        raise ValueError(
            "is not smtp://, smtp+starttls:// or smtps:// and HOST or HOST:PORT, with USER:PASSWORD@ if need be"
        )
    security, port = _SCHEMES[url.scheme]
    if (url.username is None) != (url.password is None):
        raise ValueError("has a user or a password alone: USER:PASSWORD@ go together")
    if url.username is not None and security == "none" and not _is_loopback(url.hostname):
        raise ValueError("would send the password in plain text: use smtp+starttls:// or smtps://")
    return SmtpServer(
        url.hostname, url.port or port, security, unquote(url.username or ""), unquote(url.password or "")
    )


def parse_sender(value: str) -> Address:
    """Read an address, or NAME <ADDRESS>. Raises ValueError."""
    name, address = parseaddr(value)
    try:
        sender = Address(name, addr_spec=address)
    except (MessageError, ValueError, IndexError):
        sender = Address()
    if not sender.username or not re.fullmatch(r"[A-Za-z0-9.-]+", sender.domain) or "\n" in value or "\r" in value:
        raise ValueError("is not an e-mail address, or NAME <ADDRESS>")
    return sender


def check_webhook(value: str) -> None:
    """Raise ValueError, without the value, unless it is an http or https URL."""
    url = _split(value)
    if url.scheme not in ("http", "https") or not url.hostname or url.fragment:
        raise ValueError("is not an http:// or https:// URL")


def parse_secrets(value: str) -> list[bytes]:
    """Read secrets of Standard Webhooks, separated by blanks. Raises ValueError, without the value."""
    secrets = []
    for one in value.split():
        try:
            secret = base64.b64decode(one.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            secret = b""
        if not one.startswith("whsec_") or not 24 <= len(secret) <= 64:
            raise ValueError("is not whsec_ and 24 to 64 bytes in base64, or several of these with blanks between")
        secrets.append(secret)
    if not secrets:
        raise ValueError("is not whsec_ and 24 to 64 bytes in base64, or several of these with blanks between")
    return secrets


def check_templates(directory: Path) -> None:
    """Raise ValueError, which names the first file at fault, unless these are templates of Jinja2."""
    import jinja2

    if not directory.is_dir():
        raise ValueError(f"{directory}: is not a directory")
    environment = jinja2.Environment(autoescape=True)
    for path in sorted(directory.rglob("*.jinja")):
        try:
            environment.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{path}: {type(error).__name__}") from None
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{path}: line {error.lineno}: {error.message}") from None


def _split(value: str) -> SplitResult:
    try:
        url = urlsplit(value)
        _ = url.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if not value.isascii() or any(character.isspace() for character in value):
        raise ValueError("is not a URL")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
