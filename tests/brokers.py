"""Message brokers that tests run as processes: a NATS server with JetStream, and librdkafka's own cluster of Kafka.

`python -m tests.brokers TOPIC PARTITIONS` is that cluster. It prints its address, and obeys each line of its input.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import confluent_kafka
import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import NotFoundError

from tests.servers import free_port
from tests.waiting import wait_for

_BESIDE = Path(sys.executable).parent / "nats-server"
# Always there: it is a package of the tests.
_PROGRAM = str(_BESIDE) if _BESIDE.exists() else shutil.which("nats-server")


class NatsServer:
    """A NATS server whose streams survive a kill."""

    def __init__(self, directory: Path, *, user: str = "", password: str = "", users: str = "", more: str = "") -> None:
        """With `users` in the server's own form, `user` is the one who may do everything; `more` are other settings."""
        self.directory = directory
        self.port = free_port()
        self._user, self._password, self._users, self._more = user, password, users, more
        credentials = f"{user}:{quote(password)}@" if user else ""
        self.url = f"nats://{credentials}127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it on what is in its directory."""
        assert _PROGRAM is not None
        self.directory.mkdir(exist_ok=True)
        configuration = self.directory / "nats.conf"
        authorization = (
            f"authorization {{ users: [{{ user: '{self._user}', password: '{self._password}' }}, {self._users}] }}\n"
        )
        configuration.write_text(
            f"listen: 127.0.0.1:{self.port}\n{self._more}\n{authorization if self._user else ''}"
            f"jetstream {{ store_dir: '{self.directory}', sync_interval: '1h' }}\n"
        )
        log = self.directory / "log"
        before = log.read_text().count("Server is ready") if log.exists() else 0
        self._process = subprocess.Popen([_PROGRAM, "-c", configuration, "-l", log], stderr=subprocess.DEVNULL)
        wait_for(lambda: log.exists() and log.read_text().count("Server is ready") > before)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it take connections, and answer nothing, until `go_on`."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """After `pause`."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(30)
            self._process = None

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client of our own."""
        client = await nats.connect(f"127.0.0.1:{self.port}", user=self._user, password=self._password)
        try:
            yield client
        finally:
            await client.close()

    async def count(self, stream: str = "FRONTDESK") -> int:
        """How many messages the stream has; 0 if there is no stream."""
        async with self.client() as client:
            try:
                return (await client.jetstream().stream_info(stream)).state.messages
            except NotFoundError:
                return 0

    async def messages(self, stream: str = "FRONTDESK") -> list[Msg]:
        """All that the stream has, in its order."""
        count = await self.count(stream)
        async with self.client() as client:
            subscription = await client.jetstream().subscribe(">", stream=stream, ordered_consumer=True)
            return [await subscription.next_msg(timeout=10) for _ in range(count)]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(signal.SIGKILL)


class KafkaCluster:
    """A Kafka of one broker with one topic. It keeps the topic in memory, so it can be away, but not die."""

    TOPIC = "events"
    PARTITIONS = 3

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.brokers", self.TOPIC, str(self.PARTITIONS)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.servers = self._process.stdout.readline().strip()
        self.url = f"{self.servers}/{self.TOPIC}"

    def tell(self, *command: object) -> None:
        """`refuse CODE COUNT`: the next requests that bring messages; `down`; `up`; `delay MILLISECONDS`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(*command, file=self._process.stdin, flush=True)
        assert self._process.stdout.readline() == "done\n"

    def pause(self) -> None:
        """Let it take connections, and answer nothing, until `go_on`."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """After `pause`."""
        os.kill(self._process.pid, signal.SIGCONT)

    def messages(self) -> list[confluent_kafka.Message]:
        """All that the topic has; those of a partition in order."""
        consumer = confluent_kafka.Consumer(
            {"bootstrap.servers": self.servers, "group.id": "tests", "enable.partition.eof": True}
        )
        ends, found = 0, []
        try:
            consumer.assign(
                [confluent_kafka.TopicPartition(self.TOPIC, number, 0) for number in range(self.PARTITIONS)]
            )
            while ends < self.PARTITIONS:
                message = consumer.poll(10)
                assert message is not None
                error = message.error()
                if error is None:
                    found.append(message)
                else:
                    assert error.name() == "_PARTITION_EOF", error
                    ends += 1
            return found
        finally:
            consumer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()


def _kafka(topic: str, partitions: int) -> None:
    """Be the cluster, by the functions of librdkafka that the Python package has, but does not show."""
    (path,) = (Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs").glob("librdkafka*")
    library = ctypes.CDLL(str(path))
    for name in ("conf_new", "new", "mock_cluster_new"):
        getattr(library, f"rd_kafka_{name}").restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    producer, size = 0, 512
    client = library.rd_kafka_new(
        producer, ctypes.c_void_p(library.rd_kafka_conf_new()), ctypes.create_string_buffer(size), size
    )
    cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(ctypes.c_void_p(client), 1))
    assert library.rd_kafka_mock_topic_create(cluster, topic.encode(), partitions, 1) == 0
    print(library.rd_kafka_mock_cluster_bootstraps(cluster).decode(), flush=True)
    broker, produce = 1, ctypes.c_int16(0)
    for line in sys.stdin:
        command, *values = line.split()
        if command == "refuse":
            codes = [int(values[0])] * int(values[1])
            library.rd_kafka_mock_push_request_errors_array(
                cluster, produce, ctypes.c_size_t(len(codes)), (ctypes.c_int * len(codes))(*codes)
            )
        elif command == "delay":
            library.rd_kafka_mock_broker_set_rtt(cluster, broker, int(values[0]))
        else:
            getattr(library, f"rd_kafka_mock_broker_set_{command}")(cluster, broker)
        print("done", flush=True)


if __name__ == "__main__":
    _kafka(sys.argv[1], int(sys.argv[2]))
