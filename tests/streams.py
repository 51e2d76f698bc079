"""What goes on while servers come and go: a stream of bookings, and a watcher of a queue."""

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
    """The ids of so many new patients, registered without a rush."""
    people: list[str] = []
    while len(people) < count:
        people += [person.id for person in await front.people(20)]
    return people


class Bookings:
    """A stream of bookings, each with a key and repeated until it is answered."""

    def __init__(self, wanted: Iterator[tuple[str, str]]) -> None:
        """Of these patients with these doctors."""
        self._wanted = wanted
        self.acknowledged: dict[str, str] = {}
        self.refusals: Counter[str] = Counter()
        self.fronts: list[Front] = []
        """Whom to ask, in turn; may be changed meanwhile."""
        self.ended = False
        self._name = uuid.uuid4().hex

    async def lane(self, number: int) -> None:
        """Book one after another until told to end."""
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
            # A stream, and not all that the machine can do.
            await asyncio.sleep(0.02)

    async def more(self, count: int) -> None:
        """Wait for so many further bookings."""
        wanted = len(self.acknowledged) + count
        await until(lambda: len(self.acknowledged) >= wanted)


class Watcher:
    """What a stream tells of a doctor-day, as long as it is open."""

    def __init__(self, front: Front, doctor_id: str) -> None:
        self.doctor_id = doctor_id
        self._watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor_id))
        self.told: list[tuple[int, str]] = []
        self.known = 0
        self.begun = 0
        self.closed = False

    async def run(self) -> None:
        """Follow until the server drains or the task is cancelled."""
        self.begun = self.known = (await self._watch.read()).revision
        while (message := await self._watch.read()) is not grpc.aio.EOF:
            if message.HasField("closing"):
                assert message.closing.reason == queue_pb2.StreamClosing.REASON_DRAINING
                self.closed = True
            elif message.HasField("update"):
                assert message.previous_revision == self.known
                self.known = message.revision
                self.told += [(change.revision, change.appointment_id) for change in message.update.changes]
