"""A collector of OpenTelemetry's traces, for tests."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(ThreadingHTTPServer):
    """OTLP's collector as far as traces go: `spans` are those that came in, with the resource they are of."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[tuple[dict[str, Any], Span]] = []
        self.raw = b""
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a service sends its traces here, soon."""
        return {
            "PGSHELF_TRACING": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self.server_address[1]}",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    def of(self, trace: str, until: str, seconds: float = 20) -> list[Span]:
        """The spans of a trace, once a span of that name is among them: it is the last to end."""
        deadline = time.monotonic() + seconds
        while True:
            found = [span for _, span in self.spans if span.trace_id.hex() == trace]
            if any(span.name == until for span in found):
                return found
            assert time.monotonic() < deadline, [span.name for span in found]
            time.sleep(0.05)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.raw += body
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = attributes(group.resource)
            self.server.spans += [(resource, span) for scope in group.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def attributes(of: Any) -> dict[str, Any]:
    """The attributes of a span or a resource."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in of.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that runs while the block does."""
    with Collector() as server:
        server.thread.start()
        yield server
        server.shutdown()
