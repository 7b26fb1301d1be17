"""What every route has in common: prefix, ids of requests, timings, methods, unknown fields, formats."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import msgspec
import pytest
from litestar.routes import HTTPRoute

from pgshelf.app import create_app
from tests.rest.asking import at, document, library, ok, problem

SHELF = at("libraries", "shelf")
UNKNOWN_ID = "00000000-0000-4000-8000-000000000000"


async def test_the_prefix_may_be_empty(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, api_prefix=""))
    response = await client.post("/libraries", json={"name": "shelf"})
    ok(response, 201)
    assert response.headers["location"].startswith("/libraries/")
    body = {"key": "a/b", "text": "VACUUM reclaims storage."}
    response = await client.post("/libraries/shelf/documents", json=body)
    assert response.headers["location"] == f"/libraries/shelf/documents/{ok(response, 201)['id']}"
    assert ok(await client.get("/libraries/shelf/documents/a%2Fb"))["key"] == "a/b"
    assert len(ok(await client.post("/libraries/shelf/search", json={"query": "storage"}))["hits"]) == 1
    problem(await client.get("/v1/libraries"), 404, "route_not_found")
    for path in ("/health", "/ready", "/schema"):
        ok(await client.get(path))


async def test_the_prefix_may_be_deep(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, api_prefix="/api/pgshelf.v1"))
    response = await client.post("/api/pgshelf.v1/libraries", json={"name": "shelf"})
    assert ok(await client.get(response.headers["location"])) == ok(response, 201)
    assert "/api/pgshelf.v1/libraries" in ok(await client.get("/schema"))["paths"]


def test_what_a_handler_asks_for_is_had_without_tasks(make_settings: Any) -> None:
    """Litestar makes a task for each thing that could be had beside another: a quarter of a short request's time."""
    settings = make_settings("postgresql://nobody@localhost/nothing")
    beside = {
        handler.operation_id: batches
        for route in create_app(settings).routes
        if isinstance(route, HTTPRoute)
        for handler, wanted in route.route_handler_map.values()
        if (batches := [sorted(each.key for each in batch) for batch in wanted.dependency_batches if len(batch) > 1])
    }
    # few ask for these, and seldom
    assert set(beside) <= {"listLibraries", "listChanges", "getCache", "clearCache", "metrics"}


PATHS = ["/v1/libraries", "/v1/libraries/none", "/nowhere", "/health", "/schema", "/v1/%FF"]


async def test_every_answer_has_a_request_id(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    for path in PATHS:
        with subtests.test(path=path):
            sent = await client.get(path, headers={"X-Request-Id": "order-17:a/b=c+d.e_f"})
            assert sent.headers["x-request-id"] == "order-17:a/b=c+d.e_f"
            for useless in (b"", b"x" * 129, b"a b", b"<script>", b"a\tb", "é".encode()):
                own = (await client.get(path, headers=[(b"X-Request-Id", useless)])).headers
                assert re.fullmatch("[0-9a-f]{32}", own["x-request-id"])
            ids = {(await client.get(path)).headers["x-request-id"] for _ in range(3)}
            assert len(ids) == 3


async def test_stages_are_timed(client: httpx2.AsyncClient) -> None:
    def stages(response: httpx2.Response) -> dict[str, float]:
        parts = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
        return {name: float(spent) for name, spent in parts}

    assert set(stages(await client.get("/health"))) <= {"encode", "total"}
    await client.post("/v1/libraries", json={"name": "shelf"})
    await client.post(f"{SHELF}/documents", json={"text": "x"})
    spent = stages(await client.post(f"{SHELF}/search", json={"query": "x"}))
    assert set(spent) - {"receive"} == {"decode", "embed", "cache", "sql", "encode", "total"}
    assert spent["total"] >= spent["sql"] > 0
    assert "total" in stages(await client.get("/nowhere"))


METHODS = [
    ("/v1/libraries", {"GET", "POST"}),
    ("/v1/libraries/shelf", {"GET", "PATCH", "DELETE"}),
    ("/v1/libraries/shelf/stats", {"GET"}),
    ("/v1/libraries/shelf/documents", {"GET", "POST"}),
    ("/v1/libraries/shelf/documents/a%2Fb", {"GET", "PUT", "PATCH", "DELETE"}),
    ("/v1/libraries/shelf/documents/a%2Fb/chunks", {"GET"}),
    ("/v1/libraries/shelf/documents/delete/chunks", {"GET"}),
    (f"/v1/libraries/shelf/chunks/{UNKNOWN_ID}", {"GET", "PATCH", "DELETE"}),
    ("/v1/libraries/shelf/search", {"POST"}),
    ("/health", {"GET"}),
    ("/ready", {"GET"}),
]


async def test_methods(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    def allowed(response: httpx2.Response) -> set[str]:
        return set(response.headers["allow"].split(", "))

    for path, methods in METHODS:
        with subtests.test(path=path, methods=methods):
            every = methods | {"OPTIONS"} | ({"HEAD"} if "GET" in methods else set())
            options = await client.options(path)
            assert options.status_code == 204 and allowed(options) == every
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE"} - methods:
                response = await client.request(method, path, json={} if method in {"POST", "PUT", "PATCH"} else None)
                problem(response, 405, "method_not_allowed")
                assert allowed(response) == every


async def test_what_is_asked_of_many_documents_hides_none(client: httpx2.AsyncClient, make_settings: Any) -> None:
    """A document may be called as a route is: both have the address, each its methods."""
    found = f"{SHELF}/documents/"
    app = create_app(make_settings("postgresql://nobody@localhost/nothing"))
    templates = {route.path_format.replace("{library}", "shelf") for route in app.routes}
    routes = {path.removeprefix(found) for path in templates if path.startswith(found)} - {
        "{document}",
        "{document}/chunks",
    }
    assert routes == {"batch", "delete", "query", "update"}
    await library(client)
    for name in routes:
        options = await client.options(found + name)
        assert set(options.headers["allow"].split(", ")) == {"GET", "PUT", "PATCH", "DELETE", "POST", "HEAD", "OPTIONS"}
        missing = problem(await client.get(found + name), 404, "document_not_found")
        assert missing["instance"] == found + name
        made = await document(client, name)
        assert (
            ok(await client.get(f"{found}%{ord(name[0]):02X}{name[1:]}")) == ok(await client.get(found + name)) == made
        )
        assert (await client.head(found + name)).headers["etag"] == '"1"'
        problem(await client.get(f"{found}{name}/"), 404, "route_not_found")
    gone = {"filter": {"$key": {"$in": sorted(routes)}}}
    assert ok(await client.post(f"{found}query", json=gone | {"total": True}))["total"] == 4
    assert ok(await client.post(f"{found}delete", json=gone)) == {"affected": 4}


async def test_head_is_get_without_the_body(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "k")
    for path in ("/health", "/schema", "/v1/libraries", f"{SHELF}/documents/k", f"{SHELF}/documents/none"):
        head, get = await client.head(path), await client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        for name in ("content-type", "content-length", "etag"):
            assert head.headers.get(name) == get.headers.get(name)
    assert (await client.head(f"{SHELF}/search")).status_code == 405


async def test_nothing_at_an_address(client: httpx2.AsyncClient) -> None:
    for path in ("/", "/v1", "/v2/libraries", "/v1/libraries/a/b", "/v1/libraries/a/documents/b/c", "/metric"):
        body = problem(await client.get(path), 404, "route_not_found")
        assert "/schema" in body["detail"] and body["instance"] == path
        problem(await client.post(path, json={}), 404, "route_not_found")


async def test_a_slash_at_the_end_is_another_address(client: httpx2.AsyncClient) -> None:
    """Clients turn `.../documents/..` into the library's address with a slash: that must not be the library."""
    await library(client)
    for method in ("GET", "DELETE", "PATCH"):
        problem(await client.request(method, f"{SHELF}/", json={}), 404, "route_not_found")
    for dots in (".", ".."):
        problem(await client.post("/v1/libraries", json={"name": dots}), 400, "validation_failed")
        problem(await client.post(f"{SHELF}/documents", json={"key": dots, "text": "x"}), 400, "validation_failed")
    assert ok(await client.get(SHELF))["name"] == "shelf"


UNKNOWN = [
    ("POST", "/v1/libraries", {"name": "new", "dimensions": 3}),
    ("POST", "/v1/libraries", {"name": "new", "embedder": {"provider": "local", "key": "x"}}),
    ("POST", "/v1/libraries", {"name": "new", "chunking": {"length": 5}}),
    ("PATCH", SHELF, {"dimension": 4}),
    ("PATCH", SHELF, {"id": UNKNOWN_ID}),
    ("POST", f"{SHELF}/documents", {"text": "x", "id": UNKNOWN_ID}),
    ("POST", f"{SHELF}/documents", {"chunks": [{"text": "x", "vector": [1, 0, 0]}]}),
    ("PUT", f"{SHELF}/documents/k", {"text": "x", "Title": "T"}),
    ("PATCH", f"{SHELF}/documents/k", {"text": "x"}),
    ("PATCH", f"{SHELF}/chunks/{UNKNOWN_ID}", {"ordinal": 1}),
    ("POST", f"{SHELF}/search", {"vector": [1, 0, 0], "limit": 5}),
    ("POST", f"{SHELF}/search", {"vector": [1, 0, 0], "where": {}}),
]


async def test_unknown_fields_are_refused(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    await library(client)
    await document(client, "k")
    for method, path, body in UNKNOWN:
        for form, encode in (("json", msgspec.json.encode), ("msgpack", msgspec.msgpack.encode)):
            with subtests.test(method=method, path=path, body=body, form=form):
                headers = {"Content-Type": f"application/{form}"}
                answer = await client.request(method, path, content=encode(body), headers=headers)
                assert "unknown field" in problem(answer, 400, "validation_failed")["detail"]


ACCEPTED = [
    "*/*",
    "text/html",
    "image/png",
    "",
    "application/json;q=0",
    ";;;",
    ",",
    "a" * 5000,
    "application/xml, */*;q=0.1",
]


async def test_whatever_is_accepted_json_comes(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    for accept in ACCEPTED:
        with subtests.test(accept=accept):
            response = await client.get("/v1/libraries", headers={"Accept": accept})
            assert response.headers["content-type"] == "application/json" and ok(response)["items"] == []


async def test_problems_are_json_whatever_is_accepted(client: httpx2.AsyncClient) -> None:
    for accept in ("application/msgpack", "text/html"):
        problem(await client.get(at("libraries", "none"), headers={"Accept": accept}), 404, "library_not_found")


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "application/json; charset=utf-8", "Application/JSON", "application/json;charset=UTF-8"],
)
async def test_content_types_that_are_json(client: httpx2.AsyncClient, content_type: str) -> None:
    response = await client.post("/v1/libraries", content=b'{"name": "a"}', headers={"Content-Type": content_type})
    ok(response, 201)


async def test_a_body_without_a_content_type_is_refused(client: httpx2.AsyncClient) -> None:
    # a web page may send one to any address without asking first
    problem(await client.post("/v1/libraries", content=b'{"name": "a"}'), 415, "unsupported_media_type")


EMPTY = [  # what an open service without backups answers
    ("token", 403), ("keys/none/rotate", 404), ("replication/backups", 422),
    ("libraries/shelf/embeddings/retry", 200), ("libraries/shelf/documents/query", 200),
]  # fmt: skip


@pytest.mark.parametrize(("path", "status"), EMPTY)
async def test_where_nothing_need_be_said_a_body_may_be_left_out(
    client: httpx2.AsyncClient, path: str, status: int
) -> None:
    ok(await client.post("/v1/libraries", json={"name": "shelf"}), 201)
    json = {"Content-Type": "application/json"}
    for content, headers in ((b"", {}), (b"", json), (b"{}", json)):
        response = await client.post(f"/v1/{path}", content=content, headers=headers)
        assert response.status_code == status, response.text
    problem(await client.post(f"/v1/{path}", content=b"null", headers=json), 400, "validation_failed")


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"x=1", {"Content-Type": "text/plain"}),
        (b"", {"Content-Type": "text/plain"}),
        (b"", {"Content-Type": "application/x-www-form-urlencoded"}),
        (b"", {"Origin": "https://elsewhere.example"}),
        (b"", {"Origin": "null"}),
    ],
)
@pytest.mark.parametrize("path", [path for path, _ in EMPTY])
async def test_a_web_page_must_ask_first_even_to_send_nothing(
    client: httpx2.AsyncClient, path: str, content: bytes, headers: dict[str, str]
) -> None:
    response = await client.post(f"/v1/{path}", content=content, headers=headers)
    problem(response, 415, "unsupported_media_type")


WAIT = [
    ("wait=true", 201), ("wait=True", 201), ("wait=1", 201), ("wait=false", 202), ("wait=0", 202), ("wait=maybe", 400),
    ("wait=", 400), ("wait=2", 400), ("wait=true&wait=false", 202), ("other=1", 201),
]  # fmt: skip


async def test_wait_is_a_boolean(
    database_url: str, make_settings: Any, make_client: Any, subtests: pytest.Subtests
) -> None:
    client = await make_client(make_settings(database_url, worker_enabled=False))
    ok(await client.post("/v1/libraries", json={"name": "shelf"}), 201)
    for query, status in WAIT:
        with subtests.test(query=query):
            response = await client.post(f"{SHELF}/documents?{query}", json={"text": query})
            assert response.status_code == status, response.text
            if status == 400:
                assert problem(response, 400, "validation_failed")["errors"][0]["path"] == "wait"
