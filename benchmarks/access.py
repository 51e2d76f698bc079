"""Measure what credentials cost: the same calls in the mode open, with users' access tokens, and with an API key."""

import secrets
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from typing import Any

import jwt
import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message
from google.type.date_pb2 import Date

from benchmarks import people
from benchmarks.calls import Kind, spend
from benchmarks.load import unary_client
from benchmarks.people import DOCTOR, PATIENT, TO_MOVE, make_id
from benchmarks.stage import Child, ServerProcess, Stage
from clinic.frontdesk.v1 import appointment_pb2, queue_pb2
from frontdesk.core.credential import hash_of
from frontdesk.core.token import AUDIENCE, ISSUER, MOST_SECONDS

IN_FLIGHT = (16, 64)
MODES = ("open", "token", "key")
_USERS = 100
"""Users who call in turns, so that none of them reaches the limit of a user."""


def measure(stage: Stage, *, calls: int, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run everything of this part. The modes take turns with each kind of call."""
    zone = people.noon_zone()
    day = people.today(zone)
    total = len(MODES) * len(IN_FLIGHT) * (rounds + 1) * calls
    doctors = max(10, total // 10)
    progress("prepare a database")
    conninfo = stage.database("access")
    with psycopg.connect(conninfo) as connection:
        people.found(connection, zone, doctors, total)
        people.history(connection, total, doctors, total, day)
        people.booked(connection, TO_MOVE, total, doctors, day + timedelta(days=10))
        people.booked(connection, 100, doctors * 10, doctors, day + timedelta(days=40), checked_in=True)
        key, tokens = key_of(connection), tokens_of(connection)
    people.settle(conninfo)
    rows = []
    with (
        stage.serve(conninfo, log_level="info") as free,
        stage.serve(conninfo, log_level="info", access="required") as locked,
        Child(unary_client) as client,
    ):
        modes = {"open": (free, ()), "token": (locked, tokens), "key": (locked, (key,))}
        kinds = [[*_kinds(server, given, n, day, doctors)] for n, (server, given) in enumerate(modes.values())]
        for in_flight in IN_FLIGHT:
            for of_modes in zip(*kinds, strict=True):
                progress(f"{of_modes[0].name}, {in_flight} in flight")
                spent: list[list[float]] = [[] for _ in MODES]
                refused: Counter[str] = Counter()
                for turn in range(rounds + 1):
                    for kind, found in zip(of_modes, spent, strict=True):
                        one = spend(stage, [client], kind, calls, in_flight)
                        refused += one.refused
                        if turn:  # the first one warms up
                            found.append((one.server + one.postgres) / calls * 1e6)
                middle = dict(zip(MODES, map(statistics.median, spent), strict=True))
                rows.append({
                    "name": of_modes[0].name, "in_flight": in_flight, "cpu_us": middle, "refused": refused,
                })  # fmt: skip
    return {"calls": rows}


def key_of(connection: psycopg.Connection[Any], requests_per_minute: int = 100_000) -> str:
    """A new API key of a service."""
    key_id, secret = uuid.uuid4(), secrets.token_urlsafe(32)
    connection.execute(
        "insert into api_key (id, name, secret_hash, roles, requests_per_minute)"
        " values (%s, 'bench', %s, '{SERVICE}', %s)",
        (key_id, hash_of(secret), requests_per_minute),
    )
    return f"fdk_{key_id}_{secret}"


def tokens_of(connection: psycopg.Connection[Any]) -> tuple[str, ...]:
    """Access tokens of as many users, as a process of the service would sign them."""
    key = Ed25519PrivateKey.generate()
    connection.execute(
        "insert into signing_key (id, public_key, expire_time) values ('bench', %s, 'infinity')",
        (key.public_key().public_bytes_raw(),),
    )
    now = int(time.time())
    tokens = []
    for n in range(_USERS):
        user, session = str(uuid.uuid4()), str(uuid.uuid4())
        email = f"bench-{n}@example.com"
        connection.execute(
            "insert into user_account (id, email, email_key, roles, password_hash) values (%s, %s, %s, '{STAFF}', '')",
            (user, email, email),
        )
        connection.execute("insert into session (id, user_id) values (%s, %s)", (session, user))
        claims = {
            "iss": ISSUER, "aud": AUDIENCE, "sub": user, "sid": session, "jti": str(uuid.uuid4()), "iat": now,
            "exp": now + MOST_SECONDS, "roles": ["STAFF"], "patient_id": None, "doctor_id": None, "clinic_ids": [],
        }  # fmt: skip
        tokens.append(jwt.encode(claims, key, "EdDSA", headers={"kid": "bench", "typ": "at+jwt"}))
    return tuple(tokens)


def get_appointment(n: int) -> appointment_pb2.GetAppointmentRequest:
    """Read the n-th of the appointments that are there."""
    return appointment_pb2.GetAppointmentRequest(appointment_id=make_id(TO_MOVE, n))


def _kinds(server: ServerProcess, credentials: tuple[str, ...], mode: int, day: date, doctors: int) -> Iterator[Kind]:
    appointments, queues = "/clinic.frontdesk.v1.AppointmentService/", "/clinic.frontdesk.v1.QueueService/"

    def doctor_day(n: int, later: int) -> appointment_pb2.DoctorDay:
        on = day + timedelta(days=later)
        return appointment_pb2.DoctorDay(
            doctor_id=make_id(DOCTOR, n % doctors), date=Date(year=on.year, month=on.month, day=on.day)
        )

    def book(n: int) -> Message:
        n = len(MODES) * n + mode
        return appointment_pb2.BookAppointmentRequest(
            patient_id=make_id(PATIENT, n), doctor_day=doctor_day(n, 5), idempotency_key=f"book-{n}"
        )

    def get(n: int) -> Message:
        return get_appointment(len(MODES) * n + mode)

    def get_queue(n: int) -> Message:
        line = doctor_day(n, 40)
        return queue_pb2.GetQueueRequest(doctor_id=line.doctor_id, date=line.date)

    for name, method, request in (
        ("BookAppointment by doctor-day", appointments + "BookAppointment", book),
        ("GetAppointment", appointments + "GetAppointment", get),
        ("GetQueue (10 waiting)", queues + "GetQueue", get_queue),
    ):
        yield Kind(name, server, server.port, method, request, credentials=credentials)
