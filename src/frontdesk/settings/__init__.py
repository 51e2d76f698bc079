"""The operator's settings, from the environment (``FRONTDESK_*``) or the command line.

This package and `frontdesk.cli` are the only readers of the environment and of argv.
"""

import re
from collections.abc import Sequence
from email.headerregistry import Address as MailAddress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import available_timezones

import platformdirs
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from frontdesk.settings.addresses import Address, parse
from frontdesk.settings.brokers import KafkaTopic, NatsServers, parse_kafka, parse_nats
from frontdesk.settings.certificates import check_certificates, check_pair, read
from frontdesk.settings.channels import (
    SmtpServer,
    check_templates,
    check_webhook,
    parse_secrets,
    parse_sender,
    parse_smtp,
)
from frontdesk.settings.database_url import check_database_url
from frontdesk.settings.issuers import TrustedIssuer, read_issuers
from frontdesk.settings.proxies import Proxy, parse_proxies


class SettingsError(Exception):
    """A setting cannot be used; the message is one line that names it."""


class Settings(BaseSettings):
    """Every setting of the service, with its default and range."""

    model_config = SettingsConfigDict(env_prefix="FRONTDESK_", frozen=True, extra="forbid", env_ignore_empty=True)

    listen: str = "127.0.0.1:50051"
    """HOST:PORT or unix:PATH to serve on; port 0 takes a free one."""
    access: Literal["open", "required"] | None = None
    """Whether calls need credentials; not set: `open` on loopback, `required` beyond it, where `open` is refused."""
    access_token_seconds: Annotated[int, Field(ge=60, le=900)] = 900
    """Seconds for which an access token is good."""
    trusted_issuers: Path | None = None
    """TOML file of outside identity providers whose tokens are good here."""
    user_requests_per_minute: Annotated[int, Field(ge=1, le=100_000)] = 300
    """The calls that a user may make in each minute; an API key has its own limit."""
    address_requests_per_minute: Annotated[int, Field(ge=1, le=100_000)] = 20
    """The calls that an address may make in each minute to methods that need no credentials; and likewise those with
    credentials that are refused."""
    trusted_proxies: str | None = None
    """The proxies whose x-forwarded-for is believed: addresses, networks and `unix`, separated by commas."""
    plaintext: Literal["on", "off"] = "off"
    """`on` serves beyond loopback without TLS, because a proxy beside the service ends it."""
    data_dir: Path | None = None
    """Directory of the embedded PostgreSQL; by default below the user's data directory. See `embedded_dir`."""
    database_url: str | None = None
    """A PostgreSQL 15 or newer to use instead of the embedded one, as a libpq URL or key=value string."""
    pooler: Literal["none", "transaction"] = "none"
    """The pooler between `database_url` and PostgreSQL: `transaction` for PgBouncer in its transaction mode."""
    direct_database_url: str | None = None
    """The same database without the pooler, for hints and migrations, which need their own session. Without it
    watchers learn of another replica's change from the poll, up to 0.2 s later."""
    background: Literal["on", "off"] = "on"
    """`off` runs no process for background work here; another replica must run one."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share the port."""
    default_time_zone: str = "UTC"
    """IANA zone of the clinic that the first migration creates."""
    pool_size: Annotated[int, Field(ge=1, le=200)] = 8
    """Database connections of one worker."""
    max_in_flight: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    """Unary calls that one worker handles at once; one more is UNAVAILABLE with a pushback."""
    max_watchers: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000
    """Streams of one worker; one more is RESOURCE_EXHAUSTED. Unary calls do not count."""
    max_watchers_per_caller: Annotated[int, Field(ge=1, le=1_000_000)] = 50
    """Streams of one worker that one identity may have open; one more is RESOURCE_EXHAUSTED. Callers without
    credentials are not told apart, so theirs are not limited by it."""
    max_streams_per_connection: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """HTTP/2 streams that one connection may have open."""
    drain_seconds: Annotated[float, Field(ge=0, le=600)] = 10.0
    """Seconds that SIGTERM waits for running calls and streams before it ends them."""
    reflection: Literal["auto", "on", "off"] = "auto"
    """Server reflection; auto means on loopback only."""
    keep_keys_hours: Annotated[float, Field(ge=72, le=24 * 366)] = 24 * 7
    """Hours for which an idempotency key is kept."""
    keep_events_days: Annotated[float, Field(ge=1, le=36_600)] = 90.0
    """Days after its date for which the changes of a doctor-day are kept, for watchers that resume."""
    health_listen: str | None = None
    """HOST:PORT of a second port, in plain text and open to all, that answers gRPC health and nothing else. For probes
    that have no client certificate, like those of Kubernetes; port 0 takes a free one."""
    keep_audit_days: Annotated[float, Field(ge=365, le=36_600)] = 2_190.0
    """Days for which the audit is kept."""
    keep_log_days: Annotated[float, Field(ge=1, le=36_600)] = 90.0
    """Days for which events are shown to readers of EventService. Their rows stay as long as the audit."""
    events_nats: str | None = Field(default=None, repr=False)
    """nats://HOST:PORT of a NATS with JetStream, to which all events go; needs the extra `events`."""
    events_kafka: str | None = None
    """HOST:PORT/TOPIC of a Kafka to which all events go; needs the extra `events`."""
    events_format: Literal["json", "protobuf"] = "json"
    """The form of the CloudEvents that go there."""
    slot_horizon_days: Annotated[int, Field(ge=0, le=366)] = 30
    """Days from today on for which the slots of doctors with a weekly schedule are generated; 0 generates none."""
    tls_cert: Path | None = None
    """PEM file of the server's certificate chain; needs `tls_key`."""
    tls_key: Path | None = None
    """PEM file of the server's private key."""
    tls_client_ca: Path | None = None
    """PEM file of the authority that signs client certificates, each of which makes its client a service of all clinics
    unless that brings other credentials. Every client must present one (mTLS), or with `certificate_listen` those who
    come there."""
    certificate_listen: str | None = None
    """HOST:PORT of another address of the service, where every client must present a certificate; `listen` asks for
    none then. gRPC cannot ask at one address for certificates that it does not require. Port 0 takes a free one."""
    client_ca: Path | None = None
    """PEM file of the authority that signed the service's certificate; if set, `watch`, `demo` and `health` use TLS."""
    client_server_name: str | None = None
    """Name that the service's certificate must have; by default the host of the address. Needs `client_ca`."""
    client_cert: Path | None = None
    """PEM file of the certificate that they present to the service; needs `client_key`."""
    client_key: Path | None = None
    """PEM file of that certificate's private key."""
    api_key: str | None = Field(default=None, repr=False)
    """The API key with which `watch`, `demo` and `conformance` call the service."""
    smtp_url: str | None = Field(default=None, repr=False)
    """The mail server by which patients are told: smtp, smtp+starttls or smtps://USER:PASSWORD@HOST:PORT; needs
    `mail_from` and the extra `notify`. Without it no mail is sent."""
    mail_from: str | None = None
    """The sender of the mails: an address, or NAME <ADDRESS>; without a name the clinic's stands there."""
    template_dir: Path | None = None
    """Directory of templates that take the place of the built-in ones of the same name."""
    webhook_url: str | None = Field(default=None, repr=False)
    """The URL to which each notification is posted, for an SMS or WhatsApp gateway; needs `webhook_secret` and the
    extra `notify`."""
    webhook_secret: str | None = Field(default=None, repr=False)
    """The secrets that sign these posts (Standard Webhooks): whsec_…, several separated by blanks."""
    retry_hours: Annotated[float, Field(ge=0.001, le=24 * 30)] = 24.0
    """Hours after which something is given up that cannot be sent."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The lowest level that is logged."""
    metrics_listen: str | None = None
    """HOST:PORT of the page of metrics, on loopback only; port 0 takes a free one. Without it nothing is measured."""
    traces: Literal["on", "off"] = "off"
    """OpenTelemetry traces, sent by OTLP over HTTP as the standard OTEL_* variables say; needs the extra `otel`."""

    @classmethod
    def load(cls, **given: Any) -> "Settings":
        """Read the environment; `given` values that are not None win. An error is one line that names the setting.

        Raises SettingsError.
        """
        given = {name: value for name, value in given.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as bad:
            first = bad.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "settings"
            label = f"--{name.replace('_', '-')}" if name in given else f"FRONTDESK_{name.upper()}"
            message = first["msg"].removeprefix("Value error, ")
            raise SettingsError(f"{label}: {message}" if first["loc"] else message) from None

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        return str(parse(value))

    @field_validator("database_url", "direct_database_url")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is not None:
            check_database_url(value)
        return value

    @field_validator("api_key")
    @classmethod
    def _check_api_key(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch("[!-~]{1,200}", value):
            # The value is a secret, so no message may quote it.
            raise ValueError("does not look like an API key")
        return value

    @field_validator("health_listen", "certificate_listen")
    @classmethod
    def _check_other_listen(cls, value: str | None) -> str | None:
        if value is None:
            return None
        address = parse(value)
        if address.path:
            raise ValueError("is not HOST:PORT")
        return str(address)

    @field_validator("trusted_issuers")
    @classmethod
    def _check_issuers(cls, value: Path | None) -> Path | None:
        if value is not None:
            read_issuers(value)
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, value: str | None) -> str | None:
        if value is not None:
            parse_proxies(value)
        return value

    @field_validator("metrics_listen")
    @classmethod
    def _check_metrics_listen(cls, value: str | None) -> str | None:
        if value is None:
            return None
        address = parse(value)
        if address.path:
            raise ValueError("is not HOST:PORT")
        if not address.loopback:
            raise ValueError(f"{address}: the page of metrics has no credentials, so only loopback is served")
        return str(address)

    @field_validator("traces")
    @classmethod
    def _check_traces(cls, value: str) -> str:
        if value == "on" and not all(
            map(_is_installed, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"))
        ):
            raise ValueError("on needs more packages: pip install 'frontdesk[otel]'")
        return value

    @field_validator("events_nats", "events_kafka")
    @classmethod
    def _check_broker(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            # No message may quote the value: it may have a password.
            parse, module = (
                (parse_nats, "nats") if info.field_name == "events_nats" else (parse_kafka, "confluent_kafka")
            )
            parse(value)
            if not _is_installed(module):
                raise ValueError("needs more packages: pip install 'frontdesk[events]'")
        return value

    @field_validator("smtp_url", "webhook_url")
    @classmethod
    def _check_channel(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            if info.field_name == "smtp_url":
                parse_smtp(value)
            else:
                check_webhook(value)
            if not all(map(_is_installed, ("aiosmtplib", "httpx", "icalendar", "jinja2"))):
                raise ValueError("needs more packages: pip install 'frontdesk[notify]'")
        return value

    @field_validator("mail_from")
    @classmethod
    def _check_sender(cls, value: str | None) -> str | None:
        if value is not None:
            parse_sender(value)
        return value

    @field_validator("webhook_secret")
    @classmethod
    def _check_secrets(cls, value: str | None) -> str | None:
        if value is not None:
            parse_secrets(value)
        return value

    @field_validator("template_dir")
    @classmethod
    def _check_templates(cls, value: Path | None) -> Path | None:
        if value is not None and _is_installed("jinja2"):
            check_templates(value)
        return value

    @field_validator("default_time_zone")
    @classmethod
    def _check_time_zone(cls, value: str) -> str:
        if value not in available_timezones():
            raise ValueError(f"{value!r} is not an IANA time zone")
        return value

    @field_validator("tls_cert", "tls_client_ca", "client_ca", "client_cert")
    @classmethod
    def _check_certificates(cls, value: Path | None) -> Path | None:
        if value is not None:
            check_certificates(value)
        return value

    @field_validator("tls_key", "client_key")
    @classmethod
    def _check_key(cls, value: Path | None) -> Path | None:
        if value is not None:
            read(value)
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> "Settings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("FRONTDESK_TLS_CERT and FRONTDESK_TLS_KEY go together")
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("FRONTDESK_CLIENT_CERT and FRONTDESK_CLIENT_KEY go together")
        self.check_files()
        if self.client_cert is not None and self.client_ca is None:
            raise ValueError("FRONTDESK_CLIENT_CERT needs FRONTDESK_CLIENT_CA")
        if self.client_server_name is not None and self.client_ca is None:
            raise ValueError("FRONTDESK_CLIENT_SERVER_NAME needs FRONTDESK_CLIENT_CA")
        if self.database_url is None and (self.pooler != "none" or self.direct_database_url is not None):
            raise ValueError("FRONTDESK_POOLER and FRONTDESK_DIRECT_DATABASE_URL need FRONTDESK_DATABASE_URL")
        if (self.smtp_url is None) != (self.mail_from is None):
            raise ValueError("FRONTDESK_SMTP_URL and FRONTDESK_MAIL_FROM go together")
        if (self.webhook_url is None) != (self.webhook_secret is None):
            raise ValueError("FRONTDESK_WEBHOOK_URL and FRONTDESK_WEBHOOK_SECRET go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("FRONTDESK_TLS_CLIENT_CA needs FRONTDESK_TLS_CERT")
        if self.certificate_listen is not None and self.tls_client_ca is None:
            raise ValueError("FRONTDESK_CERTIFICATE_LISTEN needs FRONTDESK_TLS_CLIENT_CA")
        if self.address.path and self.workers > 1:
            raise ValueError(
                f"--listen {self.listen}: a Unix socket has one worker, because its connections are not spread"
            )
        if not self.loopback and self.access == "open":
            beyond = (
                f"--listen {self.listen}"
                if not self.address.loopback
                else f"FRONTDESK_CERTIFICATE_LISTEN {self.certificate_listen}"
            )
            raise ValueError(f"FRONTDESK_ACCESS=open: beyond loopback ({beyond}) calls need credentials")
        if not self.address.loopback and self.tls_cert is None and self.plaintext == "off":
            raise ValueError(
                f"--listen {self.listen}: beyond loopback FRONTDESK_TLS_CERT and FRONTDESK_TLS_KEY are needed, or "
                "FRONTDESK_PLAINTEXT=on if a proxy beside the service ends TLS"
            )
        return self

    def check_files(self) -> None:
        """Raise ValueError unless each certificate has its key. The files may have changed since the start."""
        for name, cert, key in (("TLS", self.tls_cert, self.tls_key), ("CLIENT", self.client_cert, self.client_key)):
            if cert is not None and key is not None:
                try:
                    check_pair(cert, key)
                except ValueError as error:
                    raise ValueError(f"FRONTDESK_{name}_KEY: {error}") from None

    @property
    def channels(self) -> Sequence[str]:
        """The channels on which patients are told, by the names that notifications have."""
        urls = {"EMAIL": self.smtp_url, "WEBHOOK": self.webhook_url}
        return [name for name, url in urls.items() if url is not None]

    @property
    def mail_server(self) -> SmtpServer | None:
        """`smtp_url`, read."""
        return None if self.smtp_url is None else parse_smtp(self.smtp_url)

    @property
    def mail_sender(self) -> "MailAddress | None":
        """`mail_from`, read."""
        return None if self.mail_from is None else parse_sender(self.mail_from)

    @property
    def webhook_secrets(self) -> Sequence[bytes]:
        """`webhook_secret`, read."""
        return [] if self.webhook_secret is None else parse_secrets(self.webhook_secret)

    @property
    def address(self) -> Address:
        """`listen`, read."""
        return parse(self.listen)

    @property
    def access_mode(self) -> Literal["open", "required"]:
        """Whether calls need credentials."""
        return self.access or ("open" if self.loopback else "required")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can make calls."""
        return self.address.loopback and (self.certificate_address is None or self.certificate_address.loopback)

    @property
    def certificate_address(self) -> Address | None:
        """`certificate_listen`, read."""
        return None if self.certificate_listen is None else parse(self.certificate_listen)

    @property
    def health_address(self) -> Address | None:
        """`health_listen`, read."""
        return None if self.health_listen is None else parse(self.health_listen)

    @property
    def embedded_dir(self) -> Path:
        """The directory of the embedded PostgreSQL. Raises SettingsError if this user has no data directory."""
        if self.data_dir is not None:
            return self.data_dir
        try:
            return platformdirs.user_data_path("frontdesk")
        except RuntimeError:
            raise SettingsError(
                "FRONTDESK_DATA_DIR is needed, or FRONTDESK_DATABASE_URL: this user has no home directory"
            ) from None

    @property
    def nats(self) -> NatsServers | None:
        """`events_nats`, read."""
        return None if self.events_nats is None else parse_nats(self.events_nats)

    @property
    def kafka(self) -> KafkaTopic | None:
        """`events_kafka`, read."""
        return None if self.events_kafka is None else parse_kafka(self.events_kafka)

    @property
    def issuers(self) -> Sequence[TrustedIssuer]:
        """`trusted_issuers`, read."""
        return [] if self.trusted_issuers is None else read_issuers(self.trusted_issuers)

    @property
    def proxies(self) -> Sequence[Proxy]:
        """`trusted_proxies`, read."""
        return [] if self.trusted_proxies is None else parse_proxies(self.trusted_proxies)

    @property
    def serves_reflection(self) -> bool:
        """Whether the server answers reflection."""
        return self.loopback if self.reflection == "auto" else self.reflection == "on"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
