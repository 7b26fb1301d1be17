"""Traces by OpenTelemetry, where PGSHELF_TRACING asks for them: requests, their stages, their statements, their calls.

OTEL_* variables say where spans go, which are kept, and how contexts travel. Calls of providers are traced by
OpenTelemetry's own package for httpx. Its package for psycopg would trace each look of the worker for work, too, for
ever and as a trace of its own: here a statement has a span where it is part of something that is traced.

A span holds no parameter, name, key or text, and of an exception no more than its type: messages quote values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg

from pgshelf import __version__, timing

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanKind


class Traces:
    """The spans of a process; needs pgshelf[otel]."""

    def __init__(self) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):  # no variable says another one
            resource = resource.merge(Resource({"service.name": "pgshelf"}))
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("pgshelf", __version__)
        self._trace, self._propagate, self._calls = trace, propagate, HTTPXClientInstrumentor()
        self._calls.instrument(tracer_provider=self._provider)
        timing.span = self.stage

    def close(self) -> None:
        """Hand on what was recorded, and stop."""
        timing.span = None
        self._calls.uninstrument()
        self._provider.shutdown()

    @contextmanager
    def request(self, method: str, headers: Mapping[bytes, bytes]) -> Iterator[Span]:
        """Around a request; it goes on with the trace of the caller, if `headers` name one."""
        sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        context = self._propagate.extract(sent)
        with self._opened(method, self._trace.SpanKind.SERVER, context, {"http.request.method": method}) as span:
            yield span

    def trace_id(self, span: Span) -> str:
        """The id of a span's trace, as log lines carry it."""
        return self._trace.format_trace_id(span.get_span_context().trace_id)

    def answered(self, span: Span, method: str, route: str, status: int, told: Mapping[str, str]) -> None:
        """Say how a request ended; `told` is what else is known of it."""
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status})
        span.set_attributes({f"pgshelf.{name}": value for name, value in told.items()})
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Around a stage of what is traced."""
        if not self._trace.get_current_span().is_recording():
            yield
            return
        with self._opened(name, self._trace.SpanKind.INTERNAL):
            yield

    @contextmanager
    def statement(self, text: str) -> Iterator[None]:
        """Around a statement, as part of what is traced; its text has placeholders where values go."""
        if not self._trace.get_current_span().is_recording():
            yield
            return
        words = text.split(None, 2)
        known = {"db.system.name": "postgresql", "db.query.text": text, "db.operation.name": words[0].upper()}
        with self._opened("postgresql", self._trace.SpanKind.CLIENT, attributes=known):
            yield

    @contextmanager
    def _opened(
        self, name: str, kind: SpanKind, context: Any = None, attributes: dict[str, str] | None = None
    ) -> Iterator[Span]:
        start = self._tracer.start_as_current_span
        with start(name, context, kind, attributes, record_exception=False, set_status_on_exception=False) as span:
            try:
                yield span
            except Exception as error:
                span.set_attribute("error.type", type(error).__qualname__)
                span.set_status(self._trace.StatusCode.ERROR)
                raise

    def cursor(self) -> type[psycopg.AsyncCursor[Any]]:
        """Cursors that have a span for each statement."""
        traces = self

        class Cursor(psycopg.AsyncCursor[Any]):
            async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
                with traces.statement(_text(query)):
                    return await super().execute(query, params, **options)

            async def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
                with traces.statement(_text(query)):
                    await super().executemany(query, params_seq, **options)

        return Cursor


def _text(query: Any) -> str:
    return query.decode() if isinstance(query, bytes) else str(query)
