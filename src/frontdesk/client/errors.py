"""The error of both clients."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Self

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2


class FieldViolation(NamedTuple):
    """One field of a request that the service does not accept."""

    field: str
    """The path, like `patient.phone`; empty if the message as a whole is wrong."""
    description: str


class FrontdeskError(Exception):
    """A call was refused or did not reach the service. `__cause__` is gRPC's own error."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        message: str = "",
        field_violations: Iterable[FieldViolation] = (),
        retry_after: float | None = None,
    ) -> None:
        field_violations = tuple(field_violations)
        super().__init__(code, reason, metadata, message, field_violations, retry_after)
        self.code = code
        self.reason = reason
        """A name of ErrorReason without its prefix, like `DAY_FULL`; empty if the service did not answer."""
        self.metadata: dict[str, str] = dict(metadata or {})
        """The subject of the reason: ids, dates and states."""
        self.message = message
        self.field_violations: tuple[FieldViolation, ...] = field_violations
        """The wrong fields of the request, for `INVALID_FIELD`."""
        self.retry_after = retry_after
        """Seconds after which another attempt may succeed; None if the service did not say."""

    def __str__(self) -> str:
        return f"{self.code.name}{' ' if self.reason else ''}{self.reason}: {self.message}"

    @property
    def error_id(self) -> str:
        """Finds an `INTERNAL` error in the service's log; empty for all other errors."""
        return self.metadata.get("error_id", "")

    @classmethod
    def of(cls, error: grpc.RpcError) -> Self:
        """Read the details that the service attached to gRPC's error."""
        # gRPC's errors are calls; their base class has the methods of neither.
        call: Any = error
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        for kind in (info, bad, retry):
            _unpack(call.trailing_metadata() or (), kind)
        return cls(
            call.code(),
            info.reason,
            dict(info.metadata),
            call.details() or "",
            tuple(FieldViolation(one.field, one.description) for one in bad.field_violations),
            retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        )


def _unpack(trailers: Iterable[tuple[str, str | bytes]], detail: Message) -> None:
    """Fill in `detail` if the trailers have one of its type."""
    for name, value in trailers:
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            # If it does not decode, something between us and the service wrote it.
            with suppress(DecodeError):
                for packed in status_pb2.Status.FromString(value).details:
                    packed.Unpack(detail)
