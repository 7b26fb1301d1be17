"""/metrics and log lines: what an operator looks at, of every process, and never a text, a key or a vector."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import httpx2
import msgspec
import psutil
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg import conninfo, sql

from pgshelf import credentials, logs, pools, probing, shelves
from tests.cohere_server import CohereServer, status
from tests.conftest import LiveServer, MakeLiveServer
from tests.rest.asking import key, library, ok, until


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


async def test_searches_are_counted_by_the_way_they_went(client: httpx2.AsyncClient, settings: Any) -> None:
    await vectors(client, "small", {"type": "auto"})
    await vectors(client, "large", {"type": "hnsw"})
    await shelves.reconcile_all_async(settings)
    before = ok_text(await client.get("/metrics"))
    vector, few = [1.0, 0.5], {"n": {"$lt": 3}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("small", {"vector": vector}),
        ("large", {"vector": vector}),
        ("large", {"vector": vector, "exact": True}),
        ("large", {"vector": vector, "filter": few, "facets": ["n"], "total": True}),
        ("large", {"vector": vector, "query": "word", "mode": "hybrid"}),  # it fuses more than there are
        ("large", {"query": "nothing like it", "mode": "text"}),
        ("large", {"vector": vector, "k": 500}),  # the index has not as many
    ]
    for name, body in bodies:
        ok(await client.post(f"/v1/libraries/{name}/search", json=body))
    ok(await client.post("/v1/search", json={"libraries": ["small", "large"], "vector": vector}))
    after = ok_text(await client.get("/metrics"))
    ways = [("vector", "exact"), ("vector", "index"), ("vector", "index then exact"), ("vector", "several")]
    ways += [("hybrid", "index then exact"), ("text", "words")]
    grown = {
        way: count(after, "pgshelf_searches_total", mode=way[0], strategy=way[1])
        - count(before, "pgshelf_searches_total", mode=way[0], strategy=way[1])
        for way in ways
    }
    assert grown == dict(zip(ways, [3, 1, 1, 1, 1, 1], strict=True))


async def test_the_strategy_is_the_one_that_the_plan_shows(
    client: httpx2.AsyncClient, settings: Any, database_url: str
) -> None:
    await vectors(client, "large", {"type": "hnsw"})
    await shelves.reconcile_all_async(settings)
    with psycopg.connect(database_url) as connection:
        for k, exact in ((1, False), (1, True), (500, False)):
            plan = "select pgshelf.explain_search('large', '[1, 0.5]', k => %s, exact => %s) ->> 'strategy'"
            told = (
                "select current_setting('pgshelf.strategy') from (select) o left join"
                " pgshelf.search('large', '[1, 0.5]', k => %s, exact => %s) on true"
            )
            planned, said = [connection.execute(text.encode(), [k, exact]).fetchall()[0] for text in (plan, told)]
            assert planned == said, (k, exact)


async def test_libraries_are_sized_and_their_pending_chunks_counted(
    settings: Any, make_client: Any, database_url: str
) -> None:
    client = await make_client(msgspec.structs.replace(settings, worker_enabled=False, metrics_libraries=2))
    await vectors(client, "large", {"type": "hnsw"})
    await shelves.reconcile_all_async(settings)
    for name in ("older", "slow"):
        await library(client, name, embedder={"provider": "local"})
    ok(await client.post("/v1/libraries/slow/documents?wait=false", json={"chunks": [{"text": t} for t in "abc"]}), 202)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("update pgshelf.chunks set embed_after = 'infinity', embed_error = 'x' where text = 'b'")
    text = ok_text(await client.get("/metrics"))
    sizes = {
        dict(of)["library"]: value for (name, of), value in numbers(text).items() if name == "pgshelf_library_chunks"
    }
    assert sizes == {"large": sizes["large"], "slow": 3}  # the third is one too many, and nothing waits there
    assert sizes["large"] >= 40
    assert count(text, "pgshelf_library_bytes", library="large") > 10_000
    assert count(text, "pgshelf_library_pending", library="slow") == 2
    assert count(text, "pgshelf_library_failed", library="slow") == 1
    assert count(text, "pgshelf_index_builds_running") == 0
    assert count(text, "pgshelf_index_build_seconds_count", type="hnsw", outcome="built") >= 1


async def test_an_index_that_lost_links_is_seen(
    settings: Any, make_client: Any, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await make_client(msgspec.structs.replace(settings, worker_enabled=False))
    name = f"probed-{time.time()}"  # the counters are those of the whole run
    await vectors(client, name, {"type": "hnsw"})
    await shelves.reconcile_all_async(settings)
    with psycopg.connect(database_url, autocommit=True) as connection:
        for setting in ("enable_seqscan", "enable_sort"):  # of so few rows the planner would take all
            name_of = sql.SQL("alter database {} set {} = off")
            made = name_of.format(sql.Identifier(connection.info.dbname), sql.Identifier(setting))
            connection.execute(made)
    engine = pools.make_engine(settings, database_url)
    often, never = (msgspec.structs.replace(settings, recall_interval=each) for each in (1e-9, 0))

    async def probed() -> tuple[float, float, float, float]:
        probing._due[engine.pool] = 0
        assert not await probing.probe(engine, often)
        text = ok_text(await client.get("/metrics"))
        found = [count(text, f"pgshelf_recall_{each}_total", library=name) for each in
                 ("sampled", "found_self", "compared", "sum")]  # fmt: skip
        return found[0], found[1], found[2], found[3]

    try:
        assert not await probing.probe(engine, never)
        sampled, found_self, compared, recall = await probed()
        assert 1 <= sampled == found_self == compared == recall <= 20
        with psycopg.connect(database_url, autocommit=True) as connection:
            [(index,)] = connection.execute(
                "select format('pgshelf.chunks_s%%s_v%%s', shelf, index_actual ->> 'serial') from pgshelf.libraries"
                " where name = %s", [name]
            ).fetchall()  # fmt: skip
            ready = "update pg_index set indisready = %s where indexrelid = %s::regclass"
            connection.execute(ready, [False, index])
            for number in range(20):  # half of the rows get versions that the index knows nothing of
                change = "update pgshelf.chunks set embedding = %s where text = %s"
                connection.execute(change, [f"[-1, {number}]", f"word {number}"])
            connection.execute(ready, [True, index])
        before, missed = (sampled, found_self, compared, recall), 0.0
        for _ in range(5):  # one draw of 20 from 40, from a random place on, may hold good ones only
            sampled, found_self, compared, recall = await probed()
            missed = (sampled - before[0]) - (found_self - before[1])
            if missed:
                break
        assert missed > 0
        assert recall - before[3] < compared - before[2]
        assert "did not find themselves in the index" in caplog.text
    finally:
        await pools.close(engine)


async def test_calls_of_providers_and_their_circuits_are_counted(
    settings: Any, make_client: Any, cohere_server: CohereServer
) -> None:
    client = await make_client(
        msgspec.structs.replace(
            settings,
            cohere_api_key=cohere_server.key,
            cohere_base_url=cohere_server.url,
            circuit_failures=2,
            circuit_wait=1.0,
            worker_enabled=False,
        )
    )
    model = "embed-english-light-v3.0"
    await library(client, "away", dimension=384, embedder={"provider": "cohere", "model": model})
    before = ok_text(await client.get("/metrics"))

    async def search(query: str, **more: Any) -> int:
        path, body = "/v1/libraries/away/search", {"query": query, "mode": "vector", **more}
        return int((await client.post(path, json=body)).status_code)

    def grown(after: str, name: str, **labels: str) -> float:
        return count(after, name, **labels) - count(before, name, **labels)

    cohere_server.fail(*[status(400, "no")] * 2)
    assert await search("refused") in (422, 502)
    cohere_server.fail(status(418, "no"), status(418, "no"))
    assert [await search("one"), await search("two"), await search("three")] == [502, 502, 503]  # not asked any more
    open_now = ok_text(await client.get("/metrics"))
    assert count(open_now, "pgshelf_circuits_open", provider="cohere", model=model) == 1
    assert grown(open_now, "pgshelf_circuits_opened_total", provider="cohere") == 1
    assert grown(open_now, "pgshelf_provider_seconds_count", work="embed", outcome="failed") == 2
    assert grown(open_now, "pgshelf_provider_seconds_count", work="embed", outcome="refused") >= 1

    async def closed() -> bool:
        return await search("four") == 200

    await until(closed)
    assert await search("text", mode="text", rerank={"provider": "cohere"}) == 200  # no hits, and so no call
    assert await search("four", k=3) == 200  # another answer, of the same vector
    after = ok_text(await client.get("/metrics"))
    assert count(after, "pgshelf_circuits_open", provider="cohere", model=model) == 0
    assert grown(after, "pgshelf_provider_seconds_count", work="embed", outcome="answered") == 1
    assert grown(after, "pgshelf_embedding_cache_lookups_total", provider="cohere", outcome="hit") == 1


async def vectors(client: httpx2.AsyncClient, name: str, index: dict[str, Any]) -> None:
    """A library of 40 chunks with vectors in the plane, one a document."""
    await library(client, name, dimension=2, index=index)
    documents = [
        {"key": str(n), "metadata": {"n": n}, "chunks": [{"text": f"word {n}", "embedding": [1.0, n / 40]}]}
        for n in range(40)
    ]
    ok(await client.post(f"/v1/libraries/{name}/documents/batch", json={"documents": documents}))


def test_all_processes_are_added_up_and_dead_ones_forgotten(
    database_url: str, make_live_server: MakeLiveServer
) -> None:
    server = make_live_server(database_url, "--workers", "2")
    with httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0)) as client:
        for _ in range(40):
            client.get(f"{server.url}/health")  # a connection each: both processes get some
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


BREAK = """create function broken() returns trigger language plpgsql as $$
begin raise 'broken' using errcode = 'XX000', detail = new::text; end $$;
create trigger broken before insert or update on pgshelf.documents for each row execute function broken()"""


@pytest.mark.watched
def test_lines_hold_no_secret_and_nothing_of_what_is_stored_or_asked(
    database_url: str, make_live_server: MakeLiveServer, cohere_server: CohereServer
) -> None:
    """Whatever goes well or wrong, with everything logged that can be."""
    secret = {name: f"s3cret{index:02}{name}" for index, name in enumerate(
        ["library", "key", "title", "text", "metadata", "query", "filter", "source", "password", "body", "header"]
    )}  # fmt: skip
    number = 0.123456789
    dsn = conninfo.make_conninfo(database_url, password=secret["password"])
    server = make_live_server(
        dsn,
        PGSHELF_LOG_LEVEL="debug",
        PGSHELF_LOG_FORMAT="json",
        PGSHELF_ACCESS_LOG="true",
        PGSHELF_SLOW_REQUEST="0.000001",
        PGSHELF_COHERE_API_KEY=cohere_server.key,
        PGSHELF_COHERE_BASE_URL=cohere_server.url,
        PGSHELF_STATEMENT_TIMEOUT="2",
        PGSHELF_AUTH="on",
    )
    with psycopg.connect(database_url, autocommit=True) as connection:
        admin = key(database_url, "root", "admin")
        headers = {"Authorization": f"Bearer {admin}"}
        with httpx2.Client(base_url=server.url, headers=headers, timeout=30) as client:
            given = {"name": secret["library"], "embedder": {"provider": "none"}, "dimension": 2}
            assert client.post("/v1/libraries", json=given).status_code == 201
            given = {"name": "cohere", "embedder": {"provider": "cohere", "model": "embed-english-light-v3.0"}}
            assert client.post("/v1/libraries", json=given).status_code == 201
            into = f"/v1/libraries/{secret['library']}"
            document = {
                "key": secret["key"], "title": secret["title"], "source": secret["source"],
                "metadata": {"a": secret["metadata"]}, "chunks": [{"text": secret["text"], "embedding": [1, number]}],
            }  # fmt: skip
            assert client.post(f"{into}/documents", json=document).status_code == 201
            search = {"query": secret["query"], "vector": [1, number], "filter": {"a": secret["filter"]}}
            slow = client.post(f"{into}/search", json=search, headers={"X-Request-Id": "slow-2"})
            assert slow.status_code == 200
            assert client.post(f"{into}/search", content=secret["body"]).status_code == 415
            assert client.get(f"{into}/documents/{secret['key']}?{secret['query']}").status_code == 200
            wrong = {"Authorization": f"Bearer {secret['header']}"}
            assert client.get("/v1/libraries", headers=wrong).status_code == 401
            cohere_server.fail(status(401, "no"), status(400, "no"), status(500, "no"))
            for _ in range(3):
                found = client.post("/v1/libraries/cohere/search", json={"query": secret["query"]})
                assert found.status_code in (200, 422, 502, 503)
            assert client.post("/v1/libraries/cohere/documents", json={"text": secret["text"]}).status_code == 201
            # what nobody foresaw: the server names the whole row
            connection.execute(BREAK)
            assert client.post(f"{into}/documents", json=document).status_code == 500
            connection.execute("begin; lock table pgshelf.documents")
            assert client.post(f"{into}/documents", json=document).status_code in (503, 504)
            connection.execute("rollback")
    server.stop()
    line = line_of(server, "slow-2")
    assert (line["event"], line["mode"], line["strategy"]) == ("slow request", "hybrid", "exact")
    assert (line["filtered"], line["k"]) == ("true", "10")
    said = server.output
    assert "internal_error" in said and "Traceback" in said
    secrets = [*secret.values(), str(number), admin, credentials.digest(admin).hex(), cohere_server.key]
    assert not [each for each in secrets if each in said]


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
