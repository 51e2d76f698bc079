"""The one table from refusals to gRPC status, with details in the form of google.rpc (AIP-193)."""

import math
from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from frontdesk import errors

DOMAIN = "frontdesk.clinic"
MOST_VIOLATIONS = 20
"""gRPC drops the details of an error if they exceed some 8 KB."""

_MOST_DESCRIPTION = 200

CODES: dict[type[errors.Refused], grpc.StatusCode] = {
    errors.InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
    errors.IdempotencyKeyReused: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    # DAY_FULL as well: clients would blindly retry RESOURCE_EXHAUSTED.
    errors.Precondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.EtagMismatch: grpc.StatusCode.ABORTED,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.CursorGone: grpc.StatusCode.OUT_OF_RANGE,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
}

_RETRY_AFTER: dict[type[errors.Refused], float] = {
    errors.Conflict: 0.1,
    errors.Unavailable: 0.5,
    errors.Exhausted: 1.0,
}

Trailers = tuple[tuple[str, str | bytes], ...]


def code_of(refusal: type[errors.Refused]) -> grpc.StatusCode:
    """The gRPC status of a refusal."""
    return next(CODES[kind] for kind in refusal.__mro__ if kind in CODES)


def status_of(refusal: errors.Refused) -> tuple[grpc.StatusCode, str, Trailers]:
    """Status, text and trailers of a refusal."""
    code = code_of(type(refusal))
    info = error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=refusal.metadata)
    details: list[Message] = [info]
    text = str(refusal)
    resource_type = f"clinic.frontdesk.v1.{refusal.resource.title().replace('_', '')}" if refusal.resource else ""
    match refusal:
        case errors.InvalidField():
            details.append(_bad_request(refusal.violations))
            if refusal.violations:
                field, wrong = refusal.violations[0]
                text = f"{field}: {wrong}" if field else wrong
        case errors.NotFound() | errors.AlreadyExists():
            details.append(
                error_details_pb2.ResourceInfo(
                    resource_type=resource_type, resource_name=refusal.subject or "", description=text
                )
            )
        case errors.Precondition():
            violation = error_details_pb2.PreconditionFailure.Violation(
                type=refusal.reason, subject=refusal.subject or "", description=text
            )
            details.append(error_details_pb2.PreconditionFailure(violations=[violation]))
        case errors.Exhausted():
            subject = refusal.subject or "server"
            quota = error_details_pb2.QuotaFailure.Violation(subject=subject, description=text)
            details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    trailers: Trailers = ()
    for kind, usual in _RETRY_AFTER.items():
        if isinstance(refusal, kind):
            seconds = usual if refusal.retry_after is None else refusal.retry_after
            delay = duration_pb2.Duration(nanos=int(seconds * 1e9) % 10**9, seconds=int(seconds))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
            if isinstance(refusal, errors.Overloaded | errors.Draining | errors.RateLimited):
                # gRPC's own retries obey this one and not RetryInfo (gRFC A6).
                trailers = (("grpc-retry-pushback-ms", str(math.ceil(seconds * 1000))),)
    if isinstance(refusal, errors.EtagMismatch):
        # ABORTED tells the caller to read again; gRPC would repeat the stale etag, so it is told not to (gRFC A6).
        trailers = (("grpc-retry-pushback-ms", "-1"),)
    return code, text, (*_packed(code, text, details), *trailers)


def internal(error_id: str) -> tuple[grpc.StatusCode, str, Trailers]:
    """The answer to an unforeseen failure. It tells nothing of the failure but an id, which the log has too."""
    code, text = grpc.StatusCode.INTERNAL, f"internal error {error_id}"
    info = error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id})
    return code, text, _packed(code, text, [info])


def _bad_request(violations: Sequence[tuple[str, str]]) -> error_details_pb2.BadRequest:
    return error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=field[:_MOST_DESCRIPTION], description=wrong[:_MOST_DESCRIPTION]
            )
            for field, wrong in violations[:MOST_VIOLATIONS]
        ]
    )


def _packed(code: grpc.StatusCode, text: str, details: Sequence[Message]) -> Trailers:
    packed = []
    for detail in details:
        holder = any_pb2.Any()
        holder.Pack(detail)
        packed.append(holder)
    status = status_pb2.Status(code=code.value[0], message=text, details=packed)
    return (("grpc-status-details-bin", status.SerializeToString()),)
