"""Traces: what a collector gets of a request, over HTTP as in production, and what it never gets."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.cohere_server import CohereServer
from tests.collector import Collector, attributes, collecting
from tests.conftest import MakeLiveServer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


def test_a_request_is_a_trace_from_the_caller_to_the_provider(
    database_url: str, make_live_server: MakeLiveServer, cohere_server: CohereServer, collector: Collector
) -> None:
    server = make_live_server(
        database_url,
        PGSHELF_LOG_FORMAT="json",
        PGSHELF_ACCESS_LOG="true",
        PGSHELF_COHERE_API_KEY=cohere_server.key,
        PGSHELF_COHERE_BASE_URL=cohere_server.url,
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
        OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test",
        **collector.environment,
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
        PGSHELF_STATEMENT_TIMEOUT="0.2",
        OTEL_SERVICE_NAME="shelves-in-production",
        OTEL_TRACES_SAMPLER="parentbased_always_off",
        **collector.environment,
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
