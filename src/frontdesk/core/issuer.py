"""Tokens of outside identity providers, checked by the public keys that each of them publishes.

A provider does not tell the service of a revocation, so its tokens must be short-lived. Keys come from a file or a URL,
and are fetched in a thread. They are fetched again when they are old, and for an unknown key, but not more often than
twice a minute: anybody can invent the name of a key.
"""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from frontdesk.core.token import MOST_LENGTH, TYPES, check_times, header_of, proved
from frontdesk.errors import CredentialsInvalid

if TYPE_CHECKING:
    from jwt import PyJWK

MOST_SECONDS = 3600
"""The longest life of a token that is believed."""
_OLD_SECONDS = 600.0
"""When keys are fetched again, so that one that the provider has withdrawn is forgotten."""
_PAUSE_SECONDS = 30.0
"""The shortest time between two fetches."""
_FIRST_PAUSE_SECONDS = 2.0
"""The same until the first has succeeded."""
_FETCH_SECONDS = 5.0
_REQUIRED = ("iss", "aud", "sub", "exp", "iat")
_SUBJECT = re.compile("[-_.:|0-9A-Za-z]{1,200}")
"""An id. An e-mail is refused, because the subject is in the log."""

_log = structlog.get_logger("frontdesk.issuer")


@dataclass(frozen=True, slots=True)
class Issuer:
    """A provider."""

    name: str
    issuer: str
    jwks: str
    """A URL or a file."""
    audience: str
    algorithms: Sequence[str]
    roles_claim: str
    roles: Mapping[str, str]
    """Our roles by the provider's."""
    clinic_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Proved:
    """What a good token says."""

    name: str
    """issuers/NAME/SUBJECT."""
    roles: frozenset[str]
    clinic_ids: tuple[str, ...]
    exp: float
    life: float
    """Seconds from its issue to `exp`."""


class Issuers:
    """Checks the tokens of all providers that are trusted."""

    def __init__(self, issuers: Sequence[Issuer]) -> None:
        self._all = {one.issuer: (one, _Keys(one)) for one in issuers}

    def wrote(self, token: str) -> bool:
        """Whether the token says that it is of one of them; it may lie."""
        return bool(self._all) and _said(token) in self._all

    async def prove(self, token: str) -> Proved:
        """What a token says that `wrote`. Raises CredentialsExpired if nothing else is wrong, CredentialsInvalid."""
        issuer, keys = self._all[_said(token)]
        header = header_of(token, TYPES | {"jwt"})
        key = (await keys.key(header.get("kid"))).key
        claims = proved(token, key, issuer.algorithms, issuer.audience, issuer.issuer, _REQUIRED)
        subject = claims["sub"]
        if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
            raise CredentialsInvalid
        exp = check_times(claims, MOST_SECONDS, time.time())
        roles = frozenset(issuer.roles[given] for given in _roles(claims, issuer.roles_claim) if given in issuer.roles)
        return Proved(f"issuers/{issuer.name}/{subject}", roles, tuple(issuer.clinic_ids), exp, exp - claims["iat"])


class _Keys:
    """The public keys of a provider."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        self._keys: Mapping[str, PyJWK] = {}
        self._fetched = self._asked = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def key(self, kid: object) -> "PyJWK":
        """The key of this name. Raises CredentialsInvalid, which counts only if any keys are known."""
        if not isinstance(kid, str):
            raise CredentialsInvalid
        if kid not in self._keys or time.monotonic() - self._fetched > _OLD_SECONDS:
            await self._fetch()
        if kid not in self._keys:
            refused = CredentialsInvalid()
            # Until the first keys are there, good tokens are refused too.
            refused.counts = self._fetched > float("-inf")
            raise refused
        return self._keys[kid]

    async def _fetch(self) -> None:
        """Fetch the keys unless that was just tried; all who need them meanwhile wait for the same fetch."""
        if self._fetching is None or self._fetching.done():
            known = self._fetched > float("-inf")
            if time.monotonic() - self._asked < (_PAUSE_SECONDS if known else _FIRST_PAUSE_SECONDS):
                return
            self._asked = time.monotonic()
            self._fetching = asyncio.create_task(self._take())
        # One who gives up leaves the others undisturbed.
        await asyncio.shield(self._fetching)

    async def _take(self) -> None:
        import jwt

        try:
            found = await asyncio.to_thread(_load, self._issuer.jwks)
        except (jwt.PyJWTError, OSError, ValueError) as error:
            # Those that are known stay good: the provider's outage is not the end of its tokens.
            _log.warning("keys_not_fetched", issuer=self._issuer.name, error=type(error).__name__)
            return
        self._keys = {
            key.key_id: key
            for key in found
            # A secret is no public key, and one for encryption signs nothing.
            if key.key_id and key.key_type != "oct" and key.public_key_use in (None, "sig")
        }
        self._fetched = time.monotonic()


def _load(jwks: str) -> Sequence["PyJWK"]:
    import jwt

    if jwks.startswith(("https://", "http://")):
        return jwt.PyJWKClient(jwks, cache_jwk_set=False, timeout=_FETCH_SECONDS).get_jwk_set(refresh=True).keys
    return jwt.PyJWKSet.from_json(Path(jwks).read_text()).keys


def _said(token: str) -> str:
    """The `iss` of a token that is not proved yet; empty if there is none."""
    import jwt

    if len(token) > MOST_LENGTH:
        return ""
    try:
        said = jwt.decode(token, options={"verify_signature": False}).get("iss")
    except (jwt.PyJWTError, ValueError, ArithmeticError, RecursionError):
        return ""
    return said if isinstance(said, str) else ""


def _roles(claims: Mapping[str, Any], path: str) -> Sequence[str]:
    found: Any = claims
    for step in path.split("."):
        found = found.get(step) if isinstance(found, Mapping) else None
    if isinstance(found, str):
        return found.split()
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []
