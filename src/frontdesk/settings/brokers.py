"""Message brokers as operators write them. No message may quote one: the URL of NATS may have a password."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

_HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):([0-9]{1,5})")
_TOPIC = re.compile(r"[a-zA-Z0-9._-]{1,249}")


@dataclass(frozen=True, slots=True)
class NatsServers:
    """The servers of one NATS."""

    urls: Sequence[str]
    """Without credentials."""
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    """With the user; without one it is a token."""


@dataclass(frozen=True, slots=True)
class KafkaTopic:
    """One topic of a Kafka."""

    servers: str
    """HOST:PORT of one server or more, with commas between."""
    topic: str


def parse_nats(text: str) -> NatsServers:
    """Read nats://[USER:PASSWORD@|TOKEN@]HOST[:PORT], or several with commas between. Raises ValueError."""
    urls = []
    user = password = None
    for part in text.split(","):
        try:
            url = urlsplit(part.strip())
            host, port = url.hostname, url.port
        except ValueError:
            # Python's own message quotes the URL.
            raise ValueError("is not nats://HOST:PORT") from None
        if url.scheme not in ("nats", "tls") or not host or url.path.strip("/") or url.query or url.fragment:
            raise ValueError("is not nats://HOST:PORT or tls://HOST:PORT; in a password / is %2F, @ is %40, # is %23")
        if "@" in url.netloc.rpartition("@")[0]:
            raise ValueError("has a user name or password that is not percent-encoded: @ is %40")
        name = f"[{host}]" if ":" in host else host
        urls.append(f"{url.scheme}://{name}:{4222 if port is None else port}")
        if url.username:
            user, password = (None, url.username) if url.password is None else (url.username, url.password)
    return NatsServers(urls, user and unquote(user), password and unquote(password))


def parse_kafka(text: str) -> KafkaTopic:
    """Read HOST:PORT/TOPIC, where several HOST:PORT have commas between. Raises ValueError."""
    servers, slash, topic = text.rpartition("/")
    found = [_HOST_PORT.fullmatch(one.strip()) for one in servers.split(",")]
    if not slash or not all(one is not None and int(one[2]) <= 65535 for one in found):
        raise ValueError("is not HOST:PORT/TOPIC")
    if not _TOPIC.fullmatch(topic) or topic in (".", ".."):
        raise ValueError("has a topic that is not 1 to 249 letters, digits, dots, _ or -")
    return KafkaTopic(",".join(one[0] for one in found if one is not None), topic)
