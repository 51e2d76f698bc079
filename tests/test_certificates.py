"""Client certificates: at an address that requires them from everybody, or at one of their own."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
import trustme

from clinic.frontdesk.v1 import auth_pb2, clinic_pb2
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings, SettingsError
from tests.clinic import Front, outcome, tomorrow
from tests.identities import ADMIN_KEY, Metadata, auth, bearing, create_key
from tests.servers import Service
from tests.test_health import SERVING, Files, frontdesk
from tests.waiting import SOON, until


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def authority() -> trustme.CA:
    """The authority that signs the clinic's certificates."""
    return trustme.CA()


@pytest.fixture
async def secure(
    conninfo: str, settings: Settings, authority: trustme.CA, tmp_path: Path
) -> AsyncIterator[tuple[int, Settings]]:
    """A server that requires client certificates."""
    own = authority.issue_cert("localhost", "127.0.0.1")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    for index, blob in enumerate(own.cert_chain_pems):
        blob.write_to_path(tmp_path / "cert.pem", append=index > 0)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    files = {"tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem", "tls_client_ca": tmp_path / "ca.pem"}
    given = Settings.load(**{**settings.model_dump(), **files, "listen": "0.0.0.0:0"})
    worker = Worker(given, conninfo)
    yield await worker.start("127.0.0.1:0"), given
    await worker.stop()


def credentials(authority: trustme.CA, name: str | None) -> grpc.ChannelCredentials:
    """A client with a certificate of this name, or without one."""
    if name is None:
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    own = authority.issue_cert(name)
    return grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(), own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
    )


async def test_mutual_tls(secure: tuple[int, Settings], authority: trustme.CA, conninfo: str) -> None:
    """Only clients with a certificate of the authority are served, and the certificate's name is the caller."""
    port, given = secure
    assert not given.serves_reflection, "beyond loopback reflection is off"
    with psycopg.connect(conninfo) as connection:
        made = "insert into doctor (code, display_name, clinic_id) select 'D', 'D', id from clinic returning id::text"
        ((doctor_id,),) = connection.execute(made).fetchall()
    for name, key in (("kiosk.example", "k"), ("billing.example", "k")):
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials(authority, name)) as channel:
            front = Front(channel, conninfo, port)
            (patient,) = await front.people(1)
            booked = await front.book(patient.id, doctor_id, tomorrow("UTC"), idempotency_key=key)
            assert not booked.replayed, "another caller's key is another key"
            assert await outcome(front.clinic()) == "ROLE_REQUIRED", "a certificate is a service, and no administrator"
            unknown = auth_pb2.LoginRequest(email="nobody@example.com", password="a password")
            assert await outcome(auth(front).Login(unknown)) == "BAD_LOGIN", "people log in through such a client too"
    callers = front.sql("select caller from idempotency order by caller")
    assert callers == [("services/billing.example",), ("services/kiosk.example",)]
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials(authority, None)) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await Front(channel, conninfo, port).clinics.ListClinics(clinic_pb2.ListClinicsRequest(), timeout=5)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def address_in(service: Service) -> int:
    """The port for certificates, which the log names."""
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]
    return int(next(line["address"] for line in lines if line["event"] == "certificate").rpartition(":")[2])


@asynccontextmanager
async def calling(
    files: Files, conninfo: str, port: int, pair: tuple[Path, Path] | None = None
) -> AsyncIterator[Front]:
    """A client with this certificate and key, or without one, on a connection of its own."""
    own = (pair[1].read_bytes(), pair[0].read_bytes()) if pair else ()
    credentials = grpc.ssl_channel_credentials(files.authority.read_bytes(), *own)
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.ssl_target_name_override", "front.clinic.example"),
    ]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options) as channel:
        yield Front(channel, conninfo, port)


async def clinics(front: Front, metadata: Metadata = ()) -> str:
    """The outcome of a call that every identity may make; UNAVAILABLE if there is no connection."""
    request = clinic_pb2.ListClinicsRequest()
    try:
        await front.clinics.ListClinics(request, metadata=metadata, timeout=SOON)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return "UNAVAILABLE"
    return await outcome(front.clinics.ListClinics(request, metadata=metadata))


async def test_certificates_beside_tokens(front: Front, files: Files, tmp_path: Path) -> None:
    """With an address for certificates, callers with tokens and keys need none, before and after an upgrade."""
    conninfo = front.conninfo
    board = bearing((await create_key(front, "BOARD")).key)
    more = {**files.settings, "listen": "127.0.0.1:0", "access": "required", "certificate_listen": "127.0.0.1:0"}
    service = await asyncio.to_thread(lambda: Service(tmp_path / "log", conninfo, workers=2, source=None, **more))
    with service:
        main, certified = service.port, address_in(service)
        commands: dict[str, Any] = {"client_ca": files.authority, "client_server_name": "front.clinic.example"}

        async def check() -> None:
            for pair in (None, files.client):
                async with calling(files, conninfo, main, pair) as caller:
                    assert await clinics(caller) == "CREDENTIALS_REQUIRED", "it asks for no certificate"
                    assert await clinics(caller, bearing(ADMIN_KEY)) == "OK"
            async with calling(files, conninfo, certified, files.client) as caller:
                assert await clinics(caller) == "OK"
                assert await outcome(caller.patient(given_name="Rosa")) == "OK"
                assert await outcome(caller.clinic()) == "ROLE_REQUIRED", "a certificate is a service"
                assert await clinics(caller, bearing("fdk_wrong")) == "CREDENTIALS_INVALID", "it makes up for nothing"
                assert await clinics(caller, board) == "OK", "other credentials come first"
            for pair in (None, files.intruder):
                async with calling(files, conninfo, certified, pair) as caller:
                    assert await clinics(caller, bearing(ADMIN_KEY)) == "UNAVAILABLE"
            assert await frontdesk("health", **commands, listen=f"127.0.0.1:{main}") == SERVING
            asked = ("health", "--target", f"127.0.0.1:{certified}")
            mine = {"client_cert": files.client[0], "client_key": files.client[1]}
            assert await frontdesk(*asked, **commands, **mine) == SERVING
            status, _, said = await frontdesk(*asked, **commands)
            assert (status, "may want a client certificate" in said) == (1, True)

        await check()
        assert front.sql("select distinct actor from log where method = 'RegisterPatient'") == [
            ("services/probe.example",)
        ]
        before = set(service.workers())
        os.kill(service.process.pid, signal.SIGHUP)
        await until(lambda: len(after := set(service.workers())) == 2 and not after & before)
        await check()
        await asyncio.to_thread(service.stop)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"certificate_listen": "127.0.0.1:1"}, "FRONTDESK_CERTIFICATE_LISTEN needs FRONTDESK_TLS_CLIENT_CA"),
        ({"certificate_listen": "unix:/tmp/s"}, "--certificate-listen"),
        ({"certificate_listen": "0.0.0.0:1", "access": "open"}, "FRONTDESK_CERTIFICATE_LISTEN 0.0.0.0:1"),
    ],
)
def test_wrong_addresses_for_certificates(files: Files, given: dict[str, str], said: str) -> None:
    """The address for certificates is HOST:PORT, needs their authority, and beyond loopback no call is open."""
    with pytest.raises(SettingsError, match=said):
        Settings.load(listen="127.0.0.1:1", **({} if "needs" in said else files.settings), **given)


def test_an_address_for_certificates_beyond_loopback(files: Files) -> None:
    """It closes the service to callers without credentials, and reflection, as if all calls came there."""
    given = Settings.load(listen="127.0.0.1:1", **files.settings, certificate_listen="0.0.0.0:2")
    assert (given.access_mode, given.serves_reflection) == ("required", False)
    given = Settings.load(listen="127.0.0.1:1", **files.settings, certificate_listen="127.0.0.1:2")
    assert (given.access_mode, given.serves_reflection) == ("open", True)
