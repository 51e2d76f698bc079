"""Access tokens: JSON Web Tokens (RFC 9068) that each process signs with a key of its own.

The private key is made in memory and never stored. The public one is in `signing_key` before the first token, so that
every process can check it.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frontdesk.db.database import Database
from frontdesk.errors import CredentialsExpired, CredentialsInvalid

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ISSUER = AUDIENCE = "frontdesk.clinic"
MOST_SECONDS = 900
"""The longest life of a token that is believed."""

_KEY_SECONDS = 24 * 3600.0
"""How long a process signs with one key."""
_AHEAD_SECONDS = 10.0
"""By how much the clock of another process may be ahead."""
MOST_LENGTH = 8_192
TYPES = {"at+jwt", "application/at+jwt"}
_MALFORMED = (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What PyJWT raises beside its own errors for what somebody invented."""
_MOST_KEYS = 1_000
_REQUIRED = ("iss", "aud", "sub", "exp", "iat", "jti", "sid", "roles")

_publish = """
insert into signing_key (id, public_key, expire_time)
values (%s, %s, moment() + make_interval(secs => %s))
"""
_public_key = "select public_key from signing_key where id = %s and expire_time > moment()"


def header_of(token: str, types: Collection[str]) -> Mapping[str, Any]:
    """The header of a token that is not proved yet. Raises CredentialsInvalid, also if the type is none of these."""
    import jwt

    if len(token) > MOST_LENGTH:
        raise CredentialsInvalid
    try:
        header = jwt.get_unverified_header(token)
        if header.get("typ", "jwt").lower() not in types or "crit" in header:
            raise CredentialsInvalid
    except (jwt.PyJWTError, *_MALFORMED):
        raise CredentialsInvalid from None
    return header


def proved(
    token: str, key: Any, algorithms: Sequence[str], audience: str, issuer: str, required: Sequence[str]
) -> Mapping[str, Any]:
    """The claims of a token that this key proves; its times are for `check_times`. Raises CredentialsInvalid."""
    import jwt

    # The times: by PyJWT they would have no leeway.
    options: Any = {"require": [*required], "verify_iat": False, "verify_nbf": False, "verify_exp": False}
    try:
        return jwt.decode(token, key, algorithms=[*algorithms], audience=audience, issuer=issuer, options=options)
    except (jwt.PyJWTError, *_MALFORMED):
        raise CredentialsInvalid from None


def check_times(claims: Mapping[str, Any], most: float, now: float) -> float:
    """When the token expires.

    Raises CredentialsInvalid for one that is to be good later, or longer than `most` seconds, or has times that are no
    numbers; CredentialsExpired.
    """
    exp, iat = _number(claims["exp"]), _number(claims["iat"])
    begins = max(iat, _number(claims.get("nbf", iat)))
    # In this form also for numbers that are none (NaN).
    if not (exp - iat <= most and begins <= now + _AHEAD_SECONDS):
        raise CredentialsInvalid
    if exp <= now:
        raise CredentialsExpired
    return exp


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CredentialsInvalid
    try:
        return float(value)
    except OverflowError:
        raise CredentialsInvalid from None


@dataclass(frozen=True, slots=True)
class _Signer:
    kid: str
    key: "Ed25519PrivateKey"
    until: float


class Tokens:
    """Makes and checks access tokens."""

    def __init__(self, db: Database, *, seconds: int, clock: Callable[[], float] = time.time) -> None:
        """`seconds` is the life of a token."""
        self._db = db
        self.seconds = seconds
        self._clock = clock
        self._signer: _Signer | None = None
        self._making = asyncio.Lock()
        self._public: dict[str, Ed25519PublicKey] = {}

    async def ready(self) -> None:
        """Have a key that is published: before a transaction in which `issue` is called. Raises DatabaseUnavailable."""
        async with self._making:
            if self._signer is not None and self._signer.until > time.monotonic():
                return
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

            key = Ed25519PrivateKey.generate()
            kid = secrets.token_hex(16)
            until = time.monotonic() + _KEY_SECONDS
            # A token of its last moment, and then as long again.
            kept = _KEY_SECONDS + 2 * MOST_SECONDS
            await self._db.run(_publish, (kid, key.public_key().public_bytes_raw(), kept))
            self._signer = _Signer(kid, key, until)

    def issue(self, claims: Mapping[str, Any]) -> str:
        """A token with these claims beside those of every token. `ready` comes first."""
        import jwt

        assert self._signer is not None
        now = int(self._clock())
        every = {"iss": ISSUER, "aud": AUDIENCE, "iat": now, "exp": now + self.seconds, "jti": str(uuid.uuid4())}
        return jwt.encode(
            {**every, **claims}, self._signer.key, "EdDSA", headers={"kid": self._signer.kid, "typ": "at+jwt"}
        )

    async def claims(self, token: str) -> Mapping[str, Any]:
        """The claims of a token that some process of ours signed.

        Raises CredentialsExpired if nothing else is wrong with it, CredentialsInvalid.
        """
        header = header_of(token, TYPES)
        claims = proved(token, await self._key(header.get("kid")), ["EdDSA"], AUDIENCE, ISSUER, _REQUIRED)
        check_times(claims, MOST_SECONDS, self._clock())
        return claims

    async def _key(self, kid: object) -> "Ed25519PublicKey":
        if not isinstance(kid, str) or not 0 < len(kid) <= 64 or not kid.isalnum():
            raise CredentialsInvalid
        if kid not in self._public:
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

            raw = await self._db.row(_public_key, (kid,), bytes)
            if raw is None:
                raise CredentialsInvalid
            if len(self._public) >= _MOST_KEYS:
                self._public.clear()
            self._public[kid] = Ed25519PublicKey.from_public_bytes(raw)
        return self._public[kid]
