"""Continuous work while servers start and stop: a stream of bookings, and a watcher of a queue."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc

from clinic.frontdesk.v1 import queue_pb2
from tests.clinic import Front
from tests.waiting import until


async def many_people(front: Front, count: int) -> list[str]:
    """The ids of `count` new patients, registered a few at a time."""
    people: list[str] = []
    while len(people) < count:
        people += [person.id for person in await front.people(20)]
    return people


class Bookings:
    """A stream of bookings, each with a key and retried until it is answered."""

    def __init__(self, wanted: Iterator[tuple[str, str]]) -> None:
        """Book the given pairs of patient and doctor."""
        self._wanted = wanted
        self.acknowledged: dict[str, str] = {}
        self.refusals: Counter[str] = Counter()
        self.fronts: list[Front] = []
        """The clients to use, in turn. The list may change while bookings run."""
        self.ended = False
        self._name = uuid.uuid4().hex

    async def lane(self, number: int) -> None:
        """Book one after another until `ended` is set."""
        count = 0
        while not self.ended:
            count += 1
            key = f"{self._name}/{number}/{count}"
            person, doctor = next(self._wanted)
            while key not in self.acknowledged:
                front = self.fronts[(number + count) % len(self.fronts)]
                try:
                    answer = await front.book(person, doctor, idempotency_key=key)
                except grpc.aio.AioRpcError as error:
                    self.refusals[error.code().name] += 1
                    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED):
                        raise
                    await asyncio.sleep(0.02)
                else:
                    self.acknowledged[key] = answer.appointment.id
            # A steady stream, not the maximum load.
            await asyncio.sleep(0.02)

    async def more(self, count: int) -> None:
        """Wait for `count` more bookings."""
        wanted = len(self.acknowledged) + count
        await until(lambda: len(self.acknowledged) >= wanted)


class Watcher:
    """The changes of a doctor-day that a stream reports while it is open."""

    def __init__(self, front: Front, doctor_id: str) -> None:
        self.doctor_id = doctor_id
        self._watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor_id))
        self.told: list[tuple[int, str]] = []
        self.known = 0
        self.begun = 0
        self.closed = False

    async def run(self) -> None:
        """Watch until the server drains or the task is cancelled."""
        self.begun = self.known = (await self._watch.read()).revision
        while (message := await self._watch.read()) is not grpc.aio.EOF:
            if message.HasField("closing"):
                assert message.closing.reason == queue_pb2.StreamClosing.REASON_DRAINING
                self.closed = True
            elif message.HasField("update"):
                assert message.previous_revision == self.known
                self.known = message.revision
                self.told += [(change.revision, change.appointment_id) for change in message.update.changes]
