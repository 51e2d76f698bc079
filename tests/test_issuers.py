"""Tokens of outside identity providers."""

import asyncio
import base64
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from clinic.frontdesk.v1 import auth_pb2, patient_pb2
from frontdesk.settings import Settings, SettingsError
from tests.clinic import Front, outcome
from tests.hostile.wire import serving
from tests.identities import auth, carrying, user_token
from tests.test_auth import clinics, comes_to
from tests.waiting import SOON, until

ISSUER = "https://login.example/realms/staff"
_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
_EC = ec.generate_private_key(ec.SECP256R1())
_ED = ed25519.Ed25519PrivateKey.generate()
_SECRET = b"a secret of thirty-two bytes, yes"


def jwks(**changed: Any) -> dict[str, Any]:
    """The provider's set of keys."""
    keys = {
        "rsa": RSAAlgorithm.to_jwk(_RSA.public_key(), as_dict=True),
        "ec": ECAlgorithm.to_jwk(_EC.public_key(), as_dict=True),
        "ed": OKPAlgorithm.to_jwk(_ED.public_key(), as_dict=True),
        "oct": {"kty": "oct", "k": base64.urlsafe_b64encode(_SECRET).decode().rstrip("=")},
        "enc": RSAAlgorithm.to_jwk(_RSA.public_key(), as_dict=True) | {"use": "enc"},
        **changed,
    }
    return {"keys": [{**key, "kid": kid} for kid, key in keys.items()]}


def toml(where: str = "keys.json", **changed: Any) -> str:
    """The operator's file; a value of None leaves its key out."""
    values: dict[str, Any] = {
        "name": "hospital",
        "issuer": ISSUER,
        "jwks": where,
        "audience": "frontdesk",
        "algorithms": ["RS256", "ES256", "EdDSA"],
        "roles_claim": "realm_access.roles",
        **changed,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
    return "\n".join(["[[issuer]]", *lines, 'roles = { front-desk = "STAFF", screen = "BOARD" }', ""])


def token(
    key: Any = _RSA, kid: str | None = "rsa", algorithm: str = "RS256", header: Any = None, **changed: Any
) -> str:
    """A token of the provider; claims that are None are left out."""
    now = int(time.time())
    claims = {
        "iss": ISSUER,
        "aud": ["account", "frontdesk"],
        "sub": "0b7e",
        "iat": now,
        "exp": now + 300,
        "realm_access": {"roles": ["front-desk", "unknown"]},
        **changed,
    }
    given = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(given, key, algorithm, headers={**({"kid": kid} if kid else {}), **(header or {})})


@pytest.fixture
async def trusting(conninfo: str, settings: Settings, tmp_path: Path) -> AsyncIterator[Front]:
    """A client of a server that trusts the provider, whose keys are in a file."""
    (tmp_path / "keys.json").write_text(json.dumps(jwks()))
    (tmp_path / "issuers.toml").write_text(toml())
    async with serving(settings, conninfo, trusted_issuers=tmp_path / "issuers.toml", access="required") as (_, front):
        yield front


async def registered(front: Front, given: str, key: str = "") -> patient_pb2.RegisterPatientResponse:
    """A patient whom the holder of the token registers."""
    patient = patient_pb2.Patient(given_name="Rosa", phone="+5511987654321")
    request = patient_pb2.RegisterPatientRequest(patient=patient, idempotency_key=key)
    answer: patient_pb2.RegisterPatientResponse = await front.patients.RegisterPatient(
        request, metadata=carrying(given)
    )
    return answer


async def test_roles_of_a_provider(trusting: Front) -> None:
    """A provider's roles become ours by the table; others give no rights, and a user of ours is as good as before."""
    desk, board, nobody = [
        token(sub=f"s{n}", realm_access={"roles": roles})
        for n, roles in enumerate((["front-desk"], ["screen"], ["ADMIN", "other"]))
    ]
    assert await clinics(trusting, carrying(desk)) == "OK"
    assert await outcome(registered(trusting, desk)) == "OK"
    assert await clinics(trusting, carrying(board)) == "OK"
    assert await outcome(registered(trusting, board)) == "ROLE_REQUIRED"
    assert await clinics(trusting, carrying(nobody)) == "ROLE_REQUIRED"
    assert await clinics(trusting, user_token()) == "OK"
    profile = auth(trusting).GetProfile(auth_pb2.GetProfileRequest(), metadata=carrying(desk))
    assert await outcome(profile) == "ROLE_REQUIRED", "users of another house have no profile here"


async def test_identities_of_a_provider(trusting: Front) -> None:
    """Each subject is an identity of its own, for keys and for the log, whichever token it brings."""
    first = await registered(trusting, token(sub="one"), "k")
    assert (await registered(trusting, token(sub="one", jti="another"), "k")).replayed
    assert not (await registered(trusting, token(sub="two"), "k")).replayed
    actors = trusting.sql("select actor from log where type = 'patient.registered'")
    assert actors == [("issuers/hospital/one",)]
    assert first.patient.id


@pytest.mark.parametrize(
    ("key", "kid", "algorithm"), [(_RSA, "rsa", "RS256"), (_EC, "ec", "ES256"), (_ED, "ed", "EdDSA")]
)
async def test_algorithms(trusting: Front, key: Any, kid: str, algorithm: str) -> None:
    """Tokens are good with each algorithm that the file names."""
    assert await clinics(trusting, carrying(token(key, kid, algorithm))) == "OK"


def _hs256(secret: bytes, kid: str) -> str:
    # By hand: the library refuses to sign with a public key.
    header, claims, _ = token().split(".")
    header = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": kid}).encode()).decode().rstrip("=")
    signature = hmac.digest(secret, f"{header}.{claims}".encode(), "sha256")
    return f"{header}.{claims}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"


_PEM = _RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

BAD: dict[str, Any] = {
    "alg none": lambda: token("", "rsa", "none"),
    "HS256 with the public key": lambda: _hs256(_PEM, "rsa"),
    "HS256 with a secret in the set": lambda: token(_SECRET, "oct", "HS256"),
    "an algorithm that the file does not name": lambda: token(_RSA, "rsa", "RS512"),
    "a key of another kind": lambda: token(_RSA, "ec", "RS256"),
    "a key for encryption": lambda: token(_RSA, "enc"),
    "another key": lambda: token(rsa.generate_private_key(public_exponent=65537, key_size=2048)),
    "unknown kid": lambda: token(kid="other"),
    "no kid": lambda: token(kid=None),
    "another audience": lambda: token(aud="billing"),
    "no audience": lambda: token(aud=None),
    "another issuer": lambda: token(iss="https://login.example/realms/others"),
    "no issuer": lambda: token(iss=None),
    "no subject": lambda: token(sub=None),
    "a subject that is an e-mail": lambda: token(sub="ana@example.com"),
    "no exp": lambda: token(exp=None),
    "no iat": lambda: token(iat=None),
    "a long life": lambda: token(exp=int(time.time()) + 3_700),
    "not yet valid": lambda: token(nbf=int(time.time()) + 120),
    "an exp that is a text": lambda: token(exp=str(int(time.time()) + 300)),
    "a huge exp": lambda: token(exp=10**400),
    "a huge nbf": lambda: token(nbf=10**400),
    "deep": lambda: "e30." + base64.urlsafe_b64encode(b'{"iss":' + b"[" * 5_000).decode().rstrip("=") + ".x",
    "endless": lambda: token(exp=float("nan")),
    "unknown crit": lambda: token(header={"crit": ["x"], "x": 1}),
    "typ of another token": lambda: token(header={"typ": "logout+jwt"}),
    "a token of ours with the provider's key": lambda: token(_ED, "ed", "EdDSA", iss="frontdesk.clinic"),
}


@pytest.mark.parametrize("kind", BAD)
async def test_bad_tokens(trusting: Front, kind: str) -> None:
    """A token that is not in order is refused."""
    assert await clinics(trusting, carrying(token())) == "OK"
    assert await clinics(trusting, carrying(BAD[kind]())) == "CREDENTIALS_INVALID"


async def test_expiry(trusting: Front) -> None:
    """A token is refused from its expiry on, also where it is known."""
    now = int(time.time())
    assert await clinics(trusting, carrying(token(iat=now - 300, exp=now))) == "CREDENTIALS_EXPIRED"
    brief = carrying(token(exp=now + 2))
    assert await clinics(trusting, brief) == "OK"
    await comes_to(trusting, brief, "CREDENTIALS_EXPIRED")


class Provider:
    """An identity provider that publishes its keys by HTTP."""

    def __init__(self) -> None:
        self.keys = jwks()
        self.fetches = 0
        self.answers = threading.Event()
        self.answers.set()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.fetches += 1
                provider.answers.wait(20)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(provider.keys).encode())

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/keys"


@pytest.fixture
def provider() -> Iterator[Provider]:
    """A provider that runs."""
    made = Provider()
    yield made
    made.answers.set()
    made.server.shutdown()
    made.server.server_close()


async def test_unknown_keys_fetch_seldom(conninfo: str, settings: Settings, tmp_path: Path, provider: Provider) -> None:
    """Keys are fetched once for many tokens; invented names of keys fetch no more; a new key is found after a pause."""
    (tmp_path / "issuers.toml").write_text(toml(provider.url))
    async with serving(settings, conninfo, trusted_issuers=tmp_path / "issuers.toml") as (worker, front):
        assert provider.fetches == 0
        outcomes = await asyncio.gather(*(clinics(front, carrying(token(sub=f"s{n}"))) for n in range(20)))
        assert set(outcomes) == {"OK"}
        assert provider.fetches == 1
        outcomes = await asyncio.gather(*(clinics(front, carrying(token(kid=f"k{n}"))) for n in range(20)))
        assert set(outcomes) == {"CREDENTIALS_INVALID"}
        assert provider.fetches == 1
        provider.keys = jwks(rsa={"kty": "RSA"}, new=RSAAlgorithm.to_jwk(_RSA.public_key(), as_dict=True))
        ((_, keys),) = worker._credentials._issuers._all.values()
        keys._asked = float("-inf")
        assert await clinics(front, carrying(token(kid="new"))) == "OK"
        assert await clinics(front, carrying(token(sub="late"))) == "CREDENTIALS_INVALID", "the old key was withdrawn"
        assert provider.fetches == 2


async def test_a_provider_that_is_away_at_the_start(
    conninfo: str, settings: Settings, tmp_path: Path, provider: Provider
) -> None:
    """Until its keys were fetched once, a provider's tokens are refused, and do not use up what an address may."""
    keys, provider.keys = provider.keys, {"keys": "none"}
    (tmp_path / "issuers.toml").write_text(toml(provider.url))
    changed = {"trusted_issuers": tmp_path / "issuers.toml", "address_requests_per_minute": 3}
    async with serving(settings, conninfo, **changed) as (_, front):
        for _ in range(10):
            assert await clinics(front, carrying(token())) == "CREDENTIALS_INVALID"
        provider.keys = keys
        async with asyncio.timeout(SOON):
            while await clinics(front, carrying(token())) != "OK":  # noqa: ASYNC110 - the next fetch
                await asyncio.sleep(0.1)
        outcomes = [await clinics(front, carrying(token(kid=f"k{n}"))) for n in range(4)]
        assert "RATE_LIMITED" in outcomes, "once they are known, wrong ones count"


async def test_a_provider_that_hangs(conninfo: str, settings: Settings, tmp_path: Path, provider: Provider) -> None:
    """While a provider does not answer, others are served; known keys stay good when it is gone."""
    (tmp_path / "issuers.toml").write_text(toml(provider.url))
    async with serving(settings, conninfo, trusted_issuers=tmp_path / "issuers.toml") as (worker, front):
        provider.answers.clear()
        waiting = asyncio.create_task(clinics(front, carrying(token())))
        await until(lambda: provider.fetches == 1)
        assert await clinics(front, user_token()) == "OK"
        health = health_pb2_grpc.HealthStub(front.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        assert not waiting.done()
        provider.answers.set()
        assert await waiting == "OK"
        provider.server.shutdown()
        provider.server.server_close()
        ((_, keys),) = worker._credentials._issuers._all.values()
        keys._asked = keys._fetched = float("-inf")
        assert await clinics(front, carrying(token(sub="later"))) == "OK"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("issuer = 1", "tables"),
        ("[[issuer]", "Expected"),
        ("", "tables"),
        (toml(algorithms=["HS256"]), "algorithms"),
        (toml(algorithms=["RS256", "none"]), "algorithms"),
        (toml(algorithms=[]), "algorithms"),
        (toml(algorithms=None), "algorithms"),
        (toml(audience=None), "audience"),
        (toml(name="a/b"), "name"),
        (toml(name=None), "name"),
        (toml(roles_clam="roles"), "roles_clam"),
        (toml().replace("BOARD", "PATIENT"), "roles"),
        (toml(clinic_ids=["all"]), "clinic_ids"),
        (toml("http://login.example/keys"), "https"),
        (toml("missing.json"), "missing.json: No such file"),
        (toml("issuers.toml"), "not a set of keys"),
        (toml(issuer="frontdesk.clinic"), "own tokens"),
        (toml() + toml(issuer="https://other.example"), "same name"),
        (toml() + toml(name="other"), "same issuer"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, wrong: str) -> None:
    """A file that cannot be used is refused at the start, in one line that says what is wrong."""
    (tmp_path / "keys.json").write_text(json.dumps(jwks()))
    path = tmp_path / "issuers.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"^--trusted-issuers: [^\n]+$") as error:
        Settings.load(trusted_issuers=path)
    assert wrong in str(error.value)
