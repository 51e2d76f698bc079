"""OpenTelemetry traces: a span for each call, and below it one for each statement in the database.

Names and attributes follow the semantic conventions for RPC and for databases. A span holds no text of a request, no
parameter of a statement and no text of an exception, because these may be about a patient.
"""

import logging
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import psycopg
import structlog
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from psycopg import AsyncConnection
from psycopg.abc import Params

from frontdesk.db.database import Transaction

T = TypeVar("T")

FLUSH_SECONDS = 3.0
"""Seconds that an ending worker waits for the collector to take its last spans."""

_SERVER_FAULTS = {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
"""The codes that make a server's span an error, by the conventions; the others are errors of the caller."""

_FIRST_WORD = re.compile(r"\s*([a-z]+)", re.IGNORECASE)
_TARGET = re.compile(r"^\s*select\s+([a-z_]+)\(|\b(?:from|into|update)\s+([a-z_]+)\b(?!\.)", re.IGNORECASE)

_log = structlog.get_logger("frontdesk.tracing")
_propagator = TraceContextTextMapPropagator()


class _Context(Protocol):
    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]] | None: ...


class Tracing:
    """Creates the spans of one worker."""

    def __init__(self, provider: trace.TracerProvider) -> None:
        self._tracer = provider.get_tracer("frontdesk", version("frontdesk"))

    def around(
        self, method: str, behaviour: Callable[[bytes, Any], Awaitable[T]]
    ) -> Callable[[bytes, Any], Awaitable[T]]:
        """The behaviour of a method (`package.Service/Method`), in a span below that of the caller."""
        attributes = {"rpc.system.name": "grpc", "rpc.method": method}

        async def traced(raw: bytes, context: _Context) -> T:
            # Not tracestate: the caller writes its text, which would be in spans and, if malformed, in the log.
            caller = {
                key: value
                for key, value in context.invocation_metadata() or ()
                if key == "traceparent" and isinstance(value, str)
            }
            with self._tracer.start_as_current_span(
                method,
                context=_propagator.extract(caller),
                kind=trace.SpanKind.SERVER,
                attributes=attributes,
                record_exception=False,
                set_status_on_exception=False,
            ):
                return await behaviour(raw, context)

        return traced

    def ended(self, code: str, reason: str) -> str:
        """Record the status of the call whose span is the current one; `reason` is that of a refusal, or empty.

        Returns its trace id in hexadecimal.
        """
        span = trace.get_current_span()
        if span.is_recording():
            span.set_attribute("rpc.response.status_code", code)
            if reason:
                span.set_attribute("frontdesk.refusal.reason", reason)
            if code in _SERVER_FAULTS:
                span.set_attribute("error.type", code)
                span.set_status(trace.StatusCode.ERROR)
        return self.trace_id()

    def trace_id(self) -> str:
        """The present trace's id in hexadecimal."""
        return trace.format_trace_id(trace.get_current_span().get_span_context().trace_id)

    def transaction(self, connection: AsyncConnection[Any]) -> Transaction:
        """A Transaction with a span around each of its statements."""
        return _TracedTransaction(connection, self)

    @contextmanager
    def statement(self, query: str) -> Iterator[None]:
        """A span around a statement that the current call waits for."""
        # A statement outside a call, such as the tailer's polls, would be a trace of one span.
        if not trace.get_current_span().is_recording():
            yield
            return
        name, attributes = _described(query)
        with self._tracer.start_as_current_span(
            name,
            kind=trace.SpanKind.CLIENT,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except BaseException as error:
                state = error.sqlstate if isinstance(error, psycopg.Error) else None
                if state is not None:
                    span.set_attribute("db.response.status_code", state)
                span.set_attribute("error.type", state or type(error).__name__)
                span.set_status(trace.StatusCode.ERROR)
                raise


class _TracedTransaction(Transaction):
    def __init__(self, connection: AsyncConnection[Any], tracing: Tracing) -> None:
        super().__init__(connection)
        self._statement = tracing.statement

    async def row(self, query: str, params: Params, make: Callable[..., T]) -> T | None:
        with self._statement(query):
            return await super().row(query, params, make)

    async def rows(self, query: str, params: Params, make: Callable[..., T]) -> list[T]:
        with self._statement(query):
            return await super().rows(query, params, make)

    async def run(self, query: str, params: Params) -> int:
        with self._statement(query):
            return await super().run(query, params)


@cache
def _described(query: str) -> tuple[str, dict[str, str]]:
    """Name and attributes of a statement; the cache holds one entry for each statement in the source."""
    word, target = _FIRST_WORD.match(query), _TARGET.search(query)
    operation = word.group(1).upper() if word else "?"
    name = f"{operation} {target.group(1) or target.group(2)}" if target else operation
    return name, {"db.system.name": "postgresql", "db.operation.name": operation, "db.query.summary": name}


class Exporter:
    """Sends spans by OTLP over HTTP, as the standard OTEL_* variables say: endpoint, headers, sampler, resource.

    Create it in the worker's process, because it has a thread. Needs the extra `otel`.
    """

    def __init__(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        # Its warnings about the collector go to our log, in its form.
        logger = logging.getLogger("opentelemetry")
        logger.addHandler(_LogHandler())
        logger.propagate = False
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "frontdesk"}))
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))

    def close(self) -> None:
        """Send the remaining spans, for at most FLUSH_SECONDS."""
        # The SDK's own limit is half a minute, which is longer than an ending worker has.
        last = threading.Thread(target=self.provider.shutdown, daemon=True)
        last.start()
        last.join(FLUSH_SECONDS)


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _log.warning("opentelemetry", said=record.getMessage())
