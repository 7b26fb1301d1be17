"""/metrics and log lines: what an operator looks at, of every process, and never a text, a key or a vector."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import httpx2
import msgspec
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pgshelf import logs
from tests.conftest import LiveServer, MakeLiveServer
from tests.rest.asking import library, ok


def numbers(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def count(text: str, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (found, of), value in numbers(text).items() if found == name and wanted <= set(of))


async def test_requests_stages_and_connections_are_counted(client: httpx2.AsyncClient) -> None:
    before = ok_text(await client.get("/metrics"))
    await library(client, "counted")
    for _ in range(3):
        ok(await client.get("/v1/libraries/counted"))
    assert (await client.get("/v1/libraries/no-such-library")).status_code == 404
    assert (await client.get("/nowhere")).status_code == 404
    after = ok_text(await client.get("/metrics"))

    def grown(name: str, **labels: str) -> float:
        return count(after, name, **labels) - count(before, name, **labels)

    route = "/v1/libraries/{library}"
    assert grown("pgshelf_http_requests_total", route=route, method="GET", status="200") == 3
    assert grown("pgshelf_http_requests_total", route=route, status="404") == 1
    assert grown("pgshelf_http_requests_total", route="none", status="404") == 1
    assert grown("pgshelf_http_request_duration_seconds_count", route=route) == 4
    assert grown("pgshelf_http_stage_seconds_count", stage="sql") >= 5
    assert grown("pgshelf_problems_total", code="library_not_found") == 1
    assert grown("pgshelf_problems_total", code="route_not_found") == 1
    assert count(after, "pgshelf_pool_connections", state="open") >= 1
    assert "no-such-library" not in after


async def test_what_the_database_says(client: httpx2.AsyncClient) -> None:
    await library(client, "one")
    await library(client, "two", index={"type": "flat"})
    text = ok_text(await client.get("/metrics"))
    assert count(text, "pgshelf_libraries") == 2
    assert count(text, "pgshelf_libraries_waiting") == 0
    assert count(text, "pgshelf_pending_age_seconds") == 0


async def test_chunks_that_wait_are_seen_waiting(settings: Any, make_client: Any) -> None:
    client = await make_client(msgspec.structs.replace(settings, worker_enabled=False))
    await library(client, "slow", embedder={"provider": "local"})
    ok(await client.post("/v1/libraries/slow/documents?wait=false", json={"text": "later"}), 202)
    text = ok_text(await client.get("/metrics"))
    assert count(text, "pgshelf_libraries_waiting") == 1
    assert count(text, "pgshelf_pending_age_seconds") > 0


def test_all_processes_are_added_up_and_dead_ones_forgotten(
    database_url: str, make_live_server: MakeLiveServer
) -> None:
    server = make_live_server(database_url, "--workers", "2")
    for _ in range(40):
        httpx2.get(f"{server.url}/health")  # a connection each: both processes get some
    assert count(ok_text(httpx2.get(f"{server.url}/metrics")), "pgshelf_http_requests_total", route="/health") == 40
    serving = workers(server)
    assert len(serving) == 2
    serving[0].kill()
    deadline = time.monotonic() + 20
    while len(workers(server)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    server.wait_until_ready()
    text = ok_text(httpx2.get(f"{server.url}/metrics"))
    assert count(text, "pgshelf_http_requests_total", route="/health") == 40  # what was counted stays
    assert 1 <= count(text, "pgshelf_pool_connections", state="open") <= 20  # of those that live


def workers(server: LiveServer) -> list[psutil.Process]:
    """The processes that serve: those whose children they are not helpers of multiprocessing."""
    parent = psutil.Process(server.process.pid)
    living = [child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "resource_tracker" not in " ".join(child.cmdline())]


def test_lines_are_json_and_carry_the_request(database_url: str, make_live_server: MakeLiveServer) -> None:
    server = make_live_server(
        database_url, PGSHELF_LOG_FORMAT="json", PGSHELF_ACCESS_LOG="true", PGSHELF_LOG_LEVEL="info"
    )
    trace = "0af7651916cd43dd8448eb211c80319c"
    headers = {"X-Request-Id": "mine-1", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    httpx2.post(f"{server.url}/v1/libraries", json={"name": "s3cret"}, headers=headers)
    line = line_of(server, "mine-1")
    assert line["event"] == "request"
    assert (line["method"], line["route"], line["status"]) == ("POST", "/v1/libraries", 201)
    assert (line["trace_id"], line["level"], line["logger"]) == (trace, "info", "pgshelf.requests")
    assert 0 < line["sql_ms"] < line["total_ms"]
    assert "s3cret" not in server.output


def test_slow_requests_are_told_without_asking(database_url: str, make_live_server: MakeLiveServer) -> None:
    server = make_live_server(database_url, PGSHELF_LOG_FORMAT="json", PGSHELF_SLOW_REQUEST="0.000001")
    httpx2.get(f"{server.url}/health", headers={"X-Request-Id": "slow-1"})
    line = line_of(server, "slow-1")
    assert (line["event"], line["level"], line["route"]) == ("slow request", "warning", "/health")


def test_tracebacks_show_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    root, before = logging.getLogger(), (logging.getLogger().handlers[:], logging.getLogger().level)
    try:
        for form in ("console", "json"):
            root.handlers.clear()
            logs.configure("info", form)
            secret = "sec" + "ret"
            try:
                raise ValueError(f"wrong: {len(secret)}")
            except ValueError:
                with logs.bind(request_id="r-1"):
                    logging.getLogger("pgshelf").exception("it broke")
            said = capsys.readouterr().err
            assert "ValueError: wrong: 6" in said and "r-1" in said and "it broke" in said
            assert "secret" not in said.replace('"sec" + "ret"', "").replace("len(secret)", "")
    finally:
        root.handlers[:], root.level = before


def line_of(server: LiveServer, request: str) -> dict[str, Any]:
    """The one line of a request; it may come a moment after its answer."""
    deadline = time.monotonic() + 10
    while True:
        lines = [json.loads(line) for line in server.output.splitlines() if line.startswith("{")]
        found = [line for line in lines if line.get("request_id") == request]
        if found or time.monotonic() > deadline:
            [line] = found
            return line
        time.sleep(0.05)


def ok_text(response: httpx2.Response) -> str:
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return response.text
