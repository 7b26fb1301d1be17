"""Traces: what a collector gets of a request, over HTTP as in production, and what it never gets."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.cohere_server import CohereServer
from tests.conftest import MakeLiveServer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """OTLP's collector as far as traces go: `spans` are those that came in, with the resource they are of."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[tuple[dict[str, Any], Span]] = []
        self.raw = b""
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

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


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        server.thread.start()
        yield server
        server.shutdown()


def test_a_request_is_a_trace_from_the_caller_to_the_provider(
    database_url: str, make_live_server: MakeLiveServer, cohere_server: CohereServer, collector: Collector
) -> None:
    server = make_live_server(
        database_url,
        PGSHELF_TRACING="true",
        PGSHELF_LOG_FORMAT="json",
        PGSHELF_ACCESS_LOG="true",
        PGSHELF_COHERE_API_KEY=cohere_server.key,
        PGSHELF_COHERE_BASE_URL=cohere_server.url,
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_address[1]}",
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test",
        OTEL_BSP_SCHEDULE_DELAY="50",
    )
    made = {"name": "s3cret0", "embedder": {"provider": "cohere", "model": "embed-english-light-v3.0"}}
    assert httpx2.post(f"{server.url}/v1/libraries", json=made).status_code == 201
    into = f"{server.url}/v1/libraries/s3cret0"
    document = {"key": "s3cret1", "text": "s3cret2 text", "metadata": {"a": "s3cret3"}}
    assert httpx2.post(f"{into}/documents", json=document).status_code == 201
    search = {"query": "s3cret4", "mode": "vector", "filter": {"a": "s3cret5"}}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "traced"}
    answer = httpx2.post(f"{into}/search", json=search, headers=headers)
    assert answer.status_code == 200

    name = "POST /v1/libraries/{library}/search"
    spans = collector.of(TRACE, name)
    by_name = {span.name: span for span in spans}
    by_id = {span.span_id: span for span in spans}
    root = by_name[name]
    assert root.parent_span_id.hex() == PARENT and root.kind == Span.SPAN_KIND_SERVER
    told = attributes(root)
    assert told["http.route"] == "/v1/libraries/{library}/search"
    assert (told["http.request.method"], told["http.response.status_code"]) == ("POST", 200)
    assert (told["pgshelf.request_id"], told["pgshelf.strategy"]) == ("traced", "exact")
    assert {by_id[by_name[stage].parent_span_id].name for stage in ("decode", "embed", "encode")} == {name}
    [statement] = [span for span in spans if "pgshelf.search(" in attributes(span).get("db.query.text", "")]
    assert by_id[statement.parent_span_id].name == "sql" and statement.kind == Span.SPAN_KIND_CLIENT
    assert attributes(statement)["db.system.name"] == "postgresql"
    assert "filter => %s" in attributes(statement)["db.query.text"]
    # out to the provider, and the provider is told of the trace
    [called] = [span for span in spans if "/v2/embed" in str(attributes(span))]
    assert by_id[called.parent_span_id].name == "embed"
    sent = {header.lower(): value for header, value in cohere_server.asked[-1].headers.items()}
    assert sent["traceparent"] == f"00-{TRACE}-{called.span_id.hex()}-01"
    resource = collector.spans[-1][0]
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("pgshelf", "test")

    # a trace of its own where the caller has none; a log line has its id
    failed = httpx2.post(f"{into}/search", json={**search, "k": "s3cret6"}, headers={"X-Request-Id": "own"})
    assert failed.status_code == 400
    broken = httpx2.post(f"{into}/search", content=b"s3cret7", headers={"X-Request-Id": "own-2"})
    assert broken.status_code == 415
    server.stop()  # hands over what is left
    ends = {attributes(span).get("pgshelf.request_id"): span for _, span in collector.spans}
    own = ends["own"]
    assert not own.parent_span_id and attributes(own)["pgshelf.problem"] == "validation_failed"
    assert own.status.code == Status.STATUS_CODE_UNSET  # of the caller's making
    assert f'"trace_id": "{own.trace_id.hex()}"' in server.output

    assert len(collector.raw) > 1000 and b"s3cret" not in collector.raw
    assert cohere_server.key.encode() not in collector.raw
    # the worker looks for work all the time, and no look is a trace
    assert {span.name for _, span in collector.spans if not span.parent_span_id} <= {
        name, "POST /v1/libraries", "POST /v1/libraries/{library}/documents", "GET /ready", "GET /health", "GET none",
    }  # fmt: skip


@pytest.mark.watched
def test_failures_are_marked_and_say_no_more_than_their_type(
    database_url: str, make_live_server: MakeLiveServer, cohere_server: CohereServer, collector: Collector
) -> None:
    cohere_server.outage = None
    server = make_live_server(
        database_url,
        PGSHELF_TRACING="true",
        PGSHELF_STATEMENT_TIMEOUT="0.2",
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_address[1]}",
        OTEL_SERVICE_NAME="shelves-in-production",
        OTEL_TRACES_SAMPLER="parentbased_always_off",
        OTEL_BSP_SCHEDULE_DELAY="50",
    )
    assert httpx2.post(f"{server.url}/v1/libraries", json={"name": "one"}).status_code == 201  # not sampled
    import psycopg

    with psycopg.connect(database_url) as connection:
        connection.execute("lock table pgshelf.libraries")
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert httpx2.get(f"{server.url}/v1/libraries/one", headers=headers).status_code == 504
    spans = collector.of(TRACE, "GET /v1/libraries/{library}")
    root = next(span for span in spans if span.kind == Span.SPAN_KIND_SERVER)
    assert root.status.code == Status.STATUS_CODE_ERROR
    statements = [span for span in spans if attributes(span).get("db.operation.name") == "SELECT"]
    assert "QueryCanceled" in {attributes(span).get("error.type") for span in statements}
    assert all(not span.events and not span.status.message for span in spans)
    assert {resource["service.name"] for resource, _ in collector.spans} == {"shelves-in-production"}
    assert {span.trace_id.hex() for _, span in collector.spans} == {TRACE}
