"""What it costs to send every change to a message broker: `python -m benchmarks.relays`.

The changes are rows written straight into the log. The brokers are those of the tests, on the same machine.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack

import psycopg

from benchmarks.stage import Stage
from tests.brokers import KafkaCluster, NatsServer

RATE, SECONDS = 1_000, 20
_PIECES = 10
"""Times a second that changes come."""

_CHANGES = """
insert into log (id, time, actor, method, type, resource, appointment_id, clinic_id, doctor_id, patient_id, date, data)
select log_id(now()), now(), 'users/' || id, 'BookAppointment', 'appointment.booked', 'appointments/' || id,
       id, id, id, id, current_date,
       '{"state": "BOOKED", "number": "5", "start_time": "2026-11-27T10:00:00Z", "end_time": "2026-11-27T10:30:00Z"}'
from generate_series(1, %s) n, lateral (select new_id() id where n > 0) new
"""
_UNSENT = """
select (select count(*) from log) - coalesce((select position from log_reader where name = %s), 0)
"""
_UNSEALED = "select (select count(*) from log) - (select count(*) from seal)"


def main() -> None:
    """Measure, and print the tables."""
    with ExitStack() as stack:
        stage = stack.enter_context(Stage())
        nats = stack.enter_context(NatsServer(stage.directory / "nats"))
        kafka = stack.enter_context(KafkaCluster())
        ways: dict[str, tuple[str, dict[str, str]]] = {
            "no relay": ("", {}),
            "NATS, JSON": ("nats", {"events_nats": nats.url}),
            "NATS, protobuf": ("nats", {"events_nats": nats.url, "events_format": "protobuf"}),
            "Kafka, JSON": (f"kafka/{kafka.TOPIC}", {"events_kafka": kafka.url}),
        }
        print(f"{RATE:,} changes a second | CPU of the background process | behind at the end | catching up")
        print("---|---|---|---")
        for label, (relay, given) in ways.items():
            conninfo = stage.database("relays")
            with psycopg.connect(conninfo, autocommit=True) as connection:

                def left(relay: str = relay, connection: psycopg.Connection = connection) -> int:
                    question = _UNSENT if relay else _UNSEALED
                    row = connection.execute(question, (relay,) if relay else ()).fetchone()
                    assert row is not None
                    return int(row[0])

                with stage.work(conninfo, **given) as process:
                    before, began = process.cpu, time.monotonic()
                    for piece in range(1, SECONDS * _PIECES + 1):
                        connection.execute(_CHANGES, (RATE // _PIECES,))
                        time.sleep(max(0.0, began + piece / _PIECES - time.monotonic()))
                    ended = time.monotonic()
                    _empty(left)
                    behind = time.monotonic() - ended
                    share = (process.cpu - before) / (time.monotonic() - began)
                connection.execute(_CHANGES, (RATE * SECONDS,))
                with stage.work(conninfo, **given) as process:
                    began = time.monotonic()
                    _empty(left)
                    pace = RATE * SECONDS / (time.monotonic() - began)
            print(f"{label} | {share:.1%} of a core | {behind:.2f} s | {pace:,.0f} a second", flush=True)


def _empty(left: Callable[[], int]) -> None:
    while left() > 0:
        time.sleep(0.01)


if __name__ == "__main__":
    main()
