"""Outside identity providers as operators describe them: a TOML file."""

import ipaddress
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Signatures by a private key. With the others, whoever can check a token can make one."""

OurRole = Literal["STAFF", "ADMIN", "SERVICE", "BOARD"]


class TrustedIssuer(BaseModel):
    """One provider, whose tokens are good here."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern="^[a-z0-9-]{1,40}$")]
    """Its name here: its people are issuers/NAME/SUBJECT in the log."""
    issuer: Annotated[str, Field(min_length=1, max_length=500)]
    """The claim `iss` of its tokens."""
    jwks: Annotated[str, Field(min_length=1)]
    """Its public keys (RFC 7517): an https URL, or a file, relative to the TOML file."""
    audience: Annotated[str, Field(min_length=1, max_length=500)]
    """What the claim `aud` must contain."""
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)]
    roles_claim: str = "roles"
    """The claim with the roles; dots lead into nested ones, such as realm_access.roles."""
    roles: Annotated[dict[str, OurRole], Field(min_length=1)]
    """Our roles by the provider's."""
    clinic_ids: tuple[UUID, ...] = ()
    """The clinics where the roles hold; none means every clinic."""

    @field_validator("jwks")
    @classmethod
    def _check_jwks(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme == "http" and not _is_loopback(parts.hostname or ""):
            raise ValueError("is not an https URL or a file")
        return value


def read_issuers(path: Path) -> Sequence[TrustedIssuer]:
    """Read the file, and those of keys that it names. Raises ValueError with one line that says what is wrong."""
    try:
        found = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if found.keys() != {"issuer"} or not isinstance(found["issuer"], list):
        raise ValueError(f"{path}: has something else than [[issuer]] tables")
    issuers = [_read(path, number, table) for number, table in enumerate(found["issuer"], 1)]
    for attribute in ("name", "issuer"):
        if len({getattr(one, attribute) for one in issuers}) < len(issuers):
            raise ValueError(f"{path}: two issuers have the same {attribute}")
    if any(one.issuer == "frontdesk.clinic" for one in issuers):
        raise ValueError(f"{path}: frontdesk.clinic is the issuer of this service's own tokens")
    return issuers


def _read(path: Path, number: int, table: object) -> TrustedIssuer:
    try:
        issuer = TrustedIssuer.model_validate(table)
    except ValidationError as bad:
        first = bad.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: issuer {number}: {field}: {message}") from None
    if re.match("https?://", issuer.jwks):
        return issuer
    keys = path.parent / issuer.jwks
    try:
        if not json.loads(keys.read_text())["keys"]:
            raise ValueError
    except OSError as error:
        raise ValueError(f"{keys}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{keys}: is not a set of keys (JWKS)") from None
    return issuer.model_copy(update={"jwks": str(keys)})


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
