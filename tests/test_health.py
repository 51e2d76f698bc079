"""`frontdesk health`, and the cause in the line when no frontdesk answers."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clinic.frontdesk.v1 import clinic_pb2
from clinic.frontdesk.v1.clinic_pb2_grpc import ClinicServiceStub
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings, SettingsError
from tests.servers import Service, free_port
from tests.waiting import until_true

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("FRONTDESK_")}
SERVING = (0, "SERVING (access: required)\n", "")


async def frontdesk(*arguments: str, **settings: str | Path) -> tuple[int | None, str, str]:
    """Run the command to its end with these FRONTDESK_* settings: status, output, errors."""
    environment = {f"FRONTDESK_{name.upper()}": str(value) for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "frontdesk.cli", *arguments),
        env={**CLEAN, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


class Files:
    """The clinic's authority, a server's certificate for `front.clinic.example`, a client's, and a stranger's."""

    def __init__(self, directory: Path) -> None:
        self.authority = self._file(directory / "ca.pem", (ours := trustme.CA()).cert_pem.bytes())
        self.stranger = self._file(directory / "stranger.pem", (theirs := trustme.CA()).cert_pem.bytes())
        self.server = self._pair(directory / "server", ours.issue_cert("front.clinic.example"))
        self.client = self._pair(directory / "client", ours.issue_cert("probe.example"))
        self.intruder = self._pair(directory / "intruder", theirs.issue_cert("probe.example"))

    @property
    def settings(self) -> dict[str, str]:
        """Of a service with the server's certificate, for clients of the authority."""
        certificate, key = map(str, self.server)
        return {"tls_cert": certificate, "tls_key": key, "tls_client_ca": str(self.authority)}

    def _file(self, path: Path, content: bytes) -> Path:
        path.write_bytes(content)
        return path

    def _pair(self, path: Path, leaf: trustme.LeafCert) -> tuple[Path, Path]:
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        return self._file(path.with_suffix(".pem"), chain), self._file(
            path.with_suffix(".key"), leaf.private_key_pem.bytes()
        )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def tls(files: Files) -> dict[str, str]:
    """Settings of a service beyond loopback."""
    return {"listen": "0.0.0.0:0", **files.settings}


@pytest.fixture
async def port(conninfo: str, settings: Settings, tls: dict[str, str]) -> AsyncIterator[int]:
    """The port of a service with TLS that listens on every address."""
    worker = Worker(Settings.load(**{**settings.model_dump(), **tls}), conninfo)
    yield await worker.start("0.0.0.0:0")
    await worker.stop()


def client(files: Files) -> dict[str, Path | str]:
    """Settings of a command that is welcome at the service."""
    return {
        "client_ca": files.authority,
        "client_cert": files.client[0],
        "client_key": files.client[1],
        "client_server_name": "front.clinic.example",
    }


async def test_a_service_on_every_address(port: int, files: Files, tls: dict[str, str]) -> None:
    """With the settings of a service on 0.0.0.0 with TLS, commands reach it on loopback."""
    given = {**tls, **client(files), "listen": f"0.0.0.0:{port}"}
    assert await frontdesk("health", **given) == SERVING
    watch = ("watch", "--doctor", "DR-NOBODY")
    assert "there is no doctor" in (await frontdesk(*watch, **given))[2]
    assert "there is no doctor" in (await frontdesk(*watch, "--target", f"127.0.0.1:{port}", **client(files)))[2]


async def test_why_tls_fails(port: int, files: Files) -> None:
    """Each cause has its own line: the name, the authority, the client's certificate, plain text."""
    good = client(files)
    nameless = {name: value for name, value in good.items() if name != "client_server_name"}
    without = {name: value for name, value in good.items() if name not in ("client_cert", "client_key")}
    for given, cause in (
        (nameless, r"certificate is not accepted: .*not valid for '127\.0\.0\.1'.*FRONTDESK_CLIENT_SERVER_NAME"),
        (good | {"client_server_name": "desk.example"}, r"not valid for 'desk\.example'"),
        (good | {"client_ca": files.stranger}, r"certificate is not accepted: .*(self.signed|unable to get)"),
        (without, "may want a client certificate, FRONTDESK_CLIENT_CERT"),
        (
            good | {"client_cert": files.intruder[0], "client_key": files.intruder[1]},
            "may not know the authority of FRONTDESK_CLIENT_CERT",
        ),
        ({}, "speaks TLS: set FRONTDESK_CLIENT_CA"),
    ):
        for command in (["health"], ["demo"]):
            status, out, err = await frontdesk(*command, "--target", f"127.0.0.1:{port}", **given)
            assert (status, out) == (1, "")
            assert re.fullmatch(rf"frontdesk: no frontdesk answers at 127\.0\.0\.1:{port}: .*{cause}.*\n", err), err


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that is not gRPC; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held: list[socket.socket] = []

        def run() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                held.append(connection)
                answer(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


def _http1(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    connection.close()


async def test_why_nobody_answers(files: Files, tmp_path: Path) -> None:
    """What is not there, not a gRPC server, or silent, is told apart."""
    speaks_tls = {"client_ca": files.authority}
    with server(_http1) as http1, server(lambda one: one.close()) as closing, server(lambda one: None) as silent:
        for target, given, cause in (
            (f"127.0.0.1:{free_port()}", {}, "connection refused"),
            (f"unix:{tmp_path}/nothing", {}, "no such file or directory"),
            ("no-such-host.invalid:1", {}, "the name cannot be resolved"),
            (f"127.0.0.1:{http1}", {}, "it does not speak gRPC"),
            (f"127.0.0.1:{http1}", speaks_tls, "it does not speak TLS: unset FRONTDESK_CLIENT_CA"),
            (f"127.0.0.1:{closing}", {}, "it closes the connection"),
            (f"127.0.0.1:{silent}", {}, "it takes connections, and says nothing within 2 s"),
            (f"127.0.0.1:{silent}", speaks_tls, "it takes connections, and says nothing within 2 s"),
        ):
            assert await frontdesk("health", "--target", target, **given) == (
                1,
                "",
                f"frontdesk: no frontdesk answers at {target}: {cause}\n",
            )


async def test_plain_text_asked_by_tls(conninfo: str, settings: Settings, files: Files) -> None:
    """A service in plain text that is asked by TLS is told as such."""
    worker = Worker(settings, conninfo)
    port = await worker.start("127.0.0.1:0")
    status, _, err = await frontdesk("health", "--target", f"127.0.0.1:{port}", client_ca=files.authority)
    assert (status, err.strip().endswith("it does not speak TLS: unset FRONTDESK_CLIENT_CA")) == (1, True), err
    await worker.stop()


async def test_a_server_without_health() -> None:
    """A gRPC server that has no health service is told by its status."""
    other = grpc.aio.server()
    port = other.add_insecure_port("127.0.0.1:0")
    await other.start()
    assert await frontdesk("health", "--target", f"127.0.0.1:{port}") == (
        1,
        "",
        f"frontdesk: 127.0.0.1:{port} answers UNIMPLEMENTED, and not with its health\n",
    )
    await other.stop(0)


# --- The port for probes ---


def health_port(service: Service) -> int:
    """The port that the log names."""
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]
    return int(next(line["address"] for line in lines if line["event"] == "health").rpartition(":")[2])


async def asked(port: int, service: str = "") -> str:
    """What the port answers to a probe like that of Kubernetes: in plain text, with no certificate."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_probe_without_a_certificate(
    conninfo: str, files: Files, tls: dict[str, str], tmp_path: Path, workers: int
) -> None:
    """The port for probes answers health to everybody, and no other call; all else still needs a certificate."""
    service = await asyncio.to_thread(
        lambda: Service(tmp_path / "log", conninfo, workers=workers, health_listen="0.0.0.0:0", source=None, **tls)
    )
    with service:
        probe = health_port(service)

        async def serves() -> bool:
            return await asked(probe) == "SERVING"

        await until_true(serves)
        assert await asked(probe, "clinic.frontdesk.v1.QueueService") == "SERVING"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{probe}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ClinicServiceStub(channel).ListClinics(clinic_pb2.ListClinicsRequest())
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        # The command needs no certificate either.
        assert await frontdesk("health", health_listen=f"0.0.0.0:{probe}", **tls) == SERVING
        status, _, err = await frontdesk("health", **tls | {"listen": f"0.0.0.0:{service.port}"})
        assert (status, "speaks TLS" in err) == (1, True)
        await asyncio.to_thread(service.stop)
    with pytest.raises(grpc.aio.AioRpcError):
        await asked(probe)


def test_a_taken_port_for_probes(tmp_path: Path) -> None:
    """A port for probes that is in use is named in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "frontdesk.cli", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)],
            env={**CLEAN, "FRONTDESK_HEALTH_LISTEN": listen},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (
        1,
        f"frontdesk: FRONTDESK_HEALTH_LISTEN {listen}: in use by another process\n",
    )


@pytest.mark.parametrize("listen", ["unix:/tmp/s", "nowhere", "::1:5"])
def test_a_port_for_probes_is_host_and_port(listen: str) -> None:
    """Anything but HOST:PORT is refused by its name."""
    with pytest.raises(SettingsError, match="--health-listen"):
        Settings.load(health_listen=listen)
