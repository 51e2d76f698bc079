"""The services as attributes: to add a service to both clients, add its line to `Stubs`."""

from typing import Any, Generic, Protocol, Self, TypeVar, overload

import grpc

from clinic.frontdesk.v1.access_pb2_grpc import AccessServiceStub
from clinic.frontdesk.v1.appointment_pb2_grpc import AppointmentServiceStub
from clinic.frontdesk.v1.audit_pb2_grpc import AuditServiceStub
from clinic.frontdesk.v1.auth_pb2_grpc import AuthServiceStub
from clinic.frontdesk.v1.clinic_pb2_grpc import ClinicServiceStub
from clinic.frontdesk.v1.doctor_pb2_grpc import DoctorServiceStub
from clinic.frontdesk.v1.event_pb2_grpc import EventServiceStub
from clinic.frontdesk.v1.notification_pb2_grpc import NotificationServiceStub
from clinic.frontdesk.v1.patient_pb2_grpc import PatientServiceStub
from clinic.frontdesk.v1.queue_pb2_grpc import QueueServiceStub
from clinic.frontdesk.v1.schedule_pb2_grpc import ScheduleServiceStub
from clinic.frontdesk.v1.slot_pb2_grpc import SlotServiceStub
from clinic.frontdesk.v1.waitlist_pb2_grpc import WaitlistServiceStub

ChannelT = TypeVar("ChannelT", grpc.Channel, grpc.aio.Channel)
SyncStub = TypeVar("SyncStub", covariant=True)
AioStub = TypeVar("AioStub", covariant=True)


class StubClass(Protocol[SyncStub, AioStub]):
    """A generated stub's class, which has other types for each kind of channel."""

    @overload
    def __call__(self, channel: grpc.Channel) -> SyncStub: ...
    @overload
    def __call__(self, channel: grpc.aio.Channel) -> AioStub: ...


class Service(Generic[SyncStub, AioStub]):
    """An attribute that is the service's stub, made at its first use."""

    def __init__(self, stub: StubClass[SyncStub, AioStub]) -> None:
        self._stub: Any = stub

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, stubs: None, owner: type) -> Self: ...
    @overload
    def __get__(self, stubs: "Stubs[grpc.Channel]", owner: type) -> SyncStub: ...
    @overload
    def __get__(self, stubs: "Stubs[grpc.aio.Channel]", owner: type) -> AioStub: ...
    def __get__(self, stubs: Any, owner: type) -> Any:
        if stubs is None:
            return self
        # Later reads find the stub in the object and do not come here.
        stub = vars(stubs)[self._name] = self._stub(stubs._channel)
        return stub


class Stubs(Generic[ChannelT]):
    """The stubs of all services on one channel."""

    clinics = Service(ClinicServiceStub)
    patients = Service(PatientServiceStub)
    doctors = Service(DoctorServiceStub)
    schedules = Service(ScheduleServiceStub)
    slots = Service(SlotServiceStub)
    appointments = Service(AppointmentServiceStub)
    queues = Service(QueueServiceStub)
    events = Service(EventServiceStub)
    waitlist = Service(WaitlistServiceStub)
    auth = Service(AuthServiceStub)
    access = Service(AccessServiceStub)
    audit = Service(AuditServiceStub)
    notifications = Service(NotificationServiceStub)

    def __init__(self, channel: ChannelT) -> None:
        self._channel: ChannelT = channel
