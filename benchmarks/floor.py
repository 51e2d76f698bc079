"""The floor: the least that booking over gRPC on PostgreSQL costs, without the rest of the service.

A bare servicer with the generated serialisers makes one prepared call of a bare function that takes the lock, counts,
and inserts the row. It has no validation, log, deadline, idempotency, event, revision, or reason of a refusal.
"""

import asyncio
import signal
from datetime import date
from multiprocessing.connection import Connection
from typing import Any

import grpc
import uvloop
from psycopg import AsyncConnection
from psycopg.types.string import TextLoader

from clinic.frontdesk.v1 import appointment_pb2 as pb

BARE_FUNCTION = """
create function bare_book(
    p_patient uuid, p_doctor uuid, p_date date,
    out id uuid, out clinic_id uuid, out number integer, out create_time timestamptz
) language plpgsql as $$
declare
    v_taken integer;
    v_highest integer;
begin
    perform pg_advisory_xact_lock(hashtextextended('doctor-day/' || p_doctor || '/' || p_date, 0));
    select count(*), coalesce(max(a.number), 0) into v_taken, v_highest from appointment a
    where a.doctor_id = p_doctor and a.date = p_date
      and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED');
    bare_book.number := v_taken + 1;
    if v_highest > v_taken then
        select min(n) into bare_book.number from generate_series(1, v_taken + 1) n
        where not exists (
            select from appointment a
            where a.doctor_id = p_doctor and a.date = p_date and a.number = n
              and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED'));
    end if;
    insert into appointment as a (patient_id, doctor_id, clinic_id, date, number, state)
    select p_patient, p_doctor, d.clinic_id, p_date, bare_book.number, 'BOOKED' from doctor d
    where d.id = p_doctor and v_taken < d.max_patients_per_day
    returning a.id, a.clinic_id, a.create_time into bare_book.id, bare_book.clinic_id, bare_book.create_time;
end
$$
"""

_CALL = b"select id, clinic_id, number, create_time from bare_book(%s, %s, %s)"


class _Bare:
    def __init__(self, idle: "asyncio.LifoQueue[AsyncConnection[Any]]") -> None:
        self._idle = idle

    async def book(self, request: pb.BookAppointmentRequest, context: Any) -> pb.BookAppointmentResponse:
        day = request.doctor_day.date
        connection = await self._idle.get()
        try:
            cursor = await connection.execute(
                _CALL, (request.patient_id, request.doctor_day.doctor_id, date(day.year, day.month, day.day))
            )
            booked, clinic, number, created = await cursor.fetchone() or ("", "", 0, None)
        finally:
            self._idle.put_nowait(connection)
        if not booked:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "full")
        return pb.BookAppointmentResponse(
            appointment=pb.Appointment(
                id=booked, patient_id=request.patient_id, doctor_id=request.doctor_day.doctor_id, clinic_id=clinic,
                date=day, number=number, state=pb.Appointment.STATE_BOOKED, create_time=created,
            )
        )  # fmt: skip


async def _serve(conninfo: str, connections: int, ready: Connection) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    idle: asyncio.LifoQueue[AsyncConnection[Any]] = asyncio.LifoQueue()
    for _ in range(connections):
        connection = await AsyncConnection.connect(conninfo, autocommit=True, prepare_threshold=0)
        connection.adapters.register_loader("uuid", TextLoader)
        idle.put_nowait(connection)
    server = grpc.aio.server()
    # Register the one method as generated code does.
    method = grpc.unary_unary_rpc_method_handler(
        _Bare(idle).book, pb.BookAppointmentRequest.FromString, pb.BookAppointmentResponse.SerializeToString
    )
    service = "clinic.frontdesk.v1.AppointmentService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"BookAppointment": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready.send(port)
    await stop.wait()
    await server.stop(0)
    while not idle.empty():
        await idle.get_nowait().close()


def serve(conninfo: str, connections: int, ready: Connection) -> None:
    """Run the bare server's process until SIGTERM."""
    uvloop.run(_serve(conninfo, connections, ready))
