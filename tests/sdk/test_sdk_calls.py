"""What each method sends, and what it makes of the answer."""

from __future__ import annotations

import inspect
import json
import uuid
from datetime import UTC, datetime
from typing import Any

import httpx2
import msgspec
import pytest

import pgshelf_client
from pgshelf_client import UNSET, AsyncClient, Client, UnexpectedAnswer, WaitedTooLong
from tests.sdk.script import CHUNK, DOCUMENT, EMBEDDER, HIT, INDEX, KEY, LIBRARY, Script, ok

pytestmark = pytest.mark.watched

FOUND = {
    "hits": [{**HIT, "embedding": [0.5, 1.0]}], "took_ms": 1.5, "cached": True, "total": 7,
    "facets": {"year": [{"value": 2026, "documents": 2}, {"value": None, "documents": 1}]},
    "explain": {"strategy": "index", "statement": "with", "plan": {"Plan": {}}, "rows_removed": 3, "recall": 0.9},
}  # fmt: skip
DOCUMENTS = "/v1/libraries/handbook/documents"
SEARCH = "/v1/libraries/handbook/search"
AUDIT = {
    "id": "a", "at": "2026-01-02T03:04:05Z", "action": "document.delete", "outcome": "done", "principal_kind": "key",
    "principal": "crawler", "library": "handbook", "document": "vacuum", "count": 1,
}  # fmt: skip
STATS = {
    "documents": 2, "chunks": 5, "pending": 1, "failed": 0, "bytes": 4096, "shelf": 0,
    "index": {"type": "flat", "state": "ready", "progress": 1.0},
}  # fmt: skip

CACHE = {
    "enabled": True, "max_bytes": 2**26, "ttl": 3600.0, "entries": 2, "bytes": 4096, "hits": 7, "misses": 3,
    "evictions": 1,
}  # fmt: skip
BACKUP = {
    "id": "20260105T090100Z",
    "label": None,
    "state": "running",
    "error": None,
    "started_at": "2026-01-05T09:01:00Z",
}
NEW_KEY = {**{name: value for name, value in KEY.items() if name != "secrets"}, "secret": "pgs_x"}
SERVER = dict.fromkeys(pgshelf_client.Server.__struct_fields__)

# method, arguments, options; what the server answers; what it was asked, and the body
CALLS = [
    ("health", (), {}, {"status": "ok", "version": "0.1.0"}, "GET /health", None),
    ("ready", (), {}, {"status": "ready", "checks": {"database": "ok"}}, "GET /ready", None),
    ("create_library", ("handbook",), {}, LIBRARY, "POST /v1/libraries", {"name": "handbook"}),
    (
        "create_library", ("h",),
        {"embedder": {"provider": "none"}, "dimension": 3, "metric": "l2", "language": "german", "description": "d",
         "chunking": {"size": 500}, "metadata": {"a": None}, "index": {"type": "lsh", "bits": 64},
         "attributes": {"year": "number"}},
        LIBRARY, "POST /v1/libraries",
        {"name": "h", "embedder": {"provider": "none"}, "dimension": 3, "metric": "l2", "language": "german",
         "description": "d", "chunking": {"size": 500}, "metadata": {"a": None}, "index": {"type": "lsh", "bits": 64},
         "attributes": {"year": "number"}},
    ),
    ("get_library", ("handbook",), {}, LIBRARY, "GET /v1/libraries/handbook", None),
    ("update_library", ("handbook",), {"name": "book"}, LIBRARY, "PATCH /v1/libraries/handbook", {"name": "book"}),
    (
        "update_library", ("handbook",), {"description": None, "chunking": {"size": 9}, "metadata": {"a": None}},
        LIBRARY, "PATCH /v1/libraries/handbook",
        {"description": None, "chunking": {"size": 9}, "metadata": {"a": None}},
    ),
    (
        "update_library", ("handbook",), {"attributes": {"year": "number"}},
        LIBRARY, "PATCH /v1/libraries/handbook", {"attributes": {"year": "number"}},
    ),
    (
        "update_library", ("handbook",), {"attributes": None}, LIBRARY,
        "PATCH /v1/libraries/handbook", {"attributes": None},
    ),
    (
        "create_key", ("crawler", "writer"), {}, NEW_KEY,
        "POST /v1/keys", {"name": "crawler", "role": "writer"},
    ),
    (
        "create_key", ("crawler", "writer"),
        {"libraries": ("team-*", "a"), "expires_at": datetime(2030, 1, 2, tzinfo=UTC)}, NEW_KEY,
        "POST /v1/keys",
        {"name": "crawler", "role": "writer", "libraries": ["team-*", "a"], "expires_at": "2030-01-02T00:00:00Z"},
    ),
    (
        "replication", (), {},
        {"role": "primary", "written_lsn": "0/5000560", "overall": "lagging", "hidden": None,
         "replicas": [{**SERVER, "role": "replica", "name": "near", "lag_bytes": 8, "health": "lagging"}]},
        "GET /v1/replication", None,
    ),
    ("start_backup", (), {}, BACKUP, "POST /v1/replication/backups", {}),
    ("start_backup", (), {"label": "weekly"}, BACKUP, "POST /v1/replication/backups", {"label": "weekly"}),
    ("get_key", ("crawler",), {}, KEY, "GET /v1/keys/crawler", None),
    ("rotate_key", ("crawler",), {}, NEW_KEY, "POST /v1/keys/crawler/rotate", {}),
    (
        "rotate_key", ("a/b",), {"overlap": 0, "expires_at": None}, NEW_KEY,
        "POST /v1/keys/a%2Fb/rotate", {"overlap": 0, "expires_at": None},
    ),
    (
        "create_token", (), {}, {"token": "pgt_x", "role": "reader", "expires_at": "2030-01-02T00:00:00Z"},
        "POST /v1/token", {},
    ),
    (
        "create_token", (), {"role": "reader", "libraries": "a", "expires_in": 60},
        {"token": "pgt_x", "role": "reader", "libraries": ["a"], "expires_at": "2030-01-02T00:00:00Z"},
        "POST /v1/token", {"role": "reader", "libraries": ["a"], "expires_in": 60},
    ),
    ("get_index", ("handbook",), {}, INDEX, "GET /v1/libraries/handbook/index", None),
    ("set_index", ("handbook", "flat"), {}, INDEX, "PUT /v1/libraries/handbook/index", {"type": "flat"}),
    (
        "set_index", ("handbook", "hnsw"),
        {"storage": "bit", "m": 8, "ef_construction": 32, "lists": 7, "bits": 64, "seed": 0}, INDEX,
        "PUT /v1/libraries/handbook/index",
        {"type": "hnsw", "storage": "bit", "m": 8, "ef_construction": 32, "lists": 7, "bits": 64, "seed": 0},
    ),
    ("wait_for_index", ("handbook",), {"timeout": 1}, INDEX, "GET /v1/libraries/handbook/index", None),
    ("get_embedder", ("handbook",), {}, EMBEDDER, "GET /v1/libraries/handbook/embedder", None),
    ("cancel_embedder", ("handbook",), {}, EMBEDDER, "DELETE /v1/libraries/handbook/embedder", None),
    (
        "set_embedder", ("handbook", "local"), {"model": "m", "dimension": 64}, EMBEDDER,
        "PUT /v1/libraries/handbook/embedder", {"provider": "local", "model": "m", "dimension": 64},
    ),
    ("wait_for_embedder", ("handbook",), {"timeout": 1}, EMBEDDER, "GET /v1/libraries/handbook/embedder", None),
    ("library_stats", ("handbook",), {}, STATS, "GET /v1/libraries/handbook/stats", None),
    ("add_document", ("handbook",), {"text": "t"}, DOCUMENT, "POST /v1/libraries/handbook/documents", {"text": "t"}),
    (
        "add_document", ("handbook",),
        {"key": "k", "title": "T", "source": "s", "metadata": {"n": 1}, "wait": False,
         "chunks": [{"text": "a", "embedding": (1, 0.5), "metadata": {"x": "y"}}, {"text": "b", "embedding": None}]},
        DOCUMENT, "POST /v1/libraries/handbook/documents?wait=false",
        {"key": "k", "title": "T", "source": "s", "metadata": {"n": 1},
         "chunks": [{"text": "a", "embedding": "AACAPwAAAD8=", "metadata": {"x": "y"}}, {"text": "b"}]},
    ),
    (
        "put_document", ("handbook", "vacuum"), {"text": "t", "wait": True}, DOCUMENT,
        "PUT /v1/libraries/handbook/documents/vacuum?wait=true", {"text": "t"},
    ),
    ("get_document", ("handbook", "vacuum"), {}, DOCUMENT, "GET /v1/libraries/handbook/documents/vacuum", None),
    (
        "update_document", ("handbook", "vacuum"), {"title": None}, DOCUMENT,
        "PATCH /v1/libraries/handbook/documents/vacuum", {"title": None},
    ),
    (
        "update_document", ("handbook", "vacuum"), {"source": "s", "metadata": {"a": {"b": None}}}, DOCUMENT,
        "PATCH /v1/libraries/handbook/documents/vacuum", {"source": "s", "metadata": {"a": {"b": None}}},
    ),
    (
        "changes_page", ("handbook",), {"after": "c1", "limit": 3, "wait": 0.5},
        {"items": [{"cursor": "c2", "kind": "put", "version": 1, "at": "2025-01-02T03:04:05Z", "document_id": "d",
                    "key": "k", "created": True}], "next": "c2"},
        "GET /v1/libraries/handbook/changes?after=c1&limit=3&wait=0.5", None,
    ),
    (
        "add_event", ("handbook", "e1", "It happened."), {"metadata": {"n": 1}},
        {"id": "e1", "document_id": "d", "key": "e1", "duplicate": True},
        "POST /v1/libraries/handbook/events", {"id": "e1", "text": "It happened.", "metadata": {"n": 1}},
    ),
    ("get_chunk", ("handbook", "c"), {}, CHUNK, "GET /v1/libraries/handbook/chunks/c", None),
    (
        "get_chunk", ("handbook", "c"), {"include": "embedding"}, CHUNK,
        "GET /v1/libraries/handbook/chunks/c?include=embedding", None,
    ),
    (
        "update_chunk", ("handbook", "c"), {"text": "t", "wait": False}, CHUNK,
        "PATCH /v1/libraries/handbook/chunks/c?wait=false", {"text": "t"},
    ),
    (
        "update_chunk", ("handbook", "c"), {"embedding": [1, 2], "metadata": {"a": None}}, CHUNK,
        "PATCH /v1/libraries/handbook/chunks/c", {"embedding": "AACAPwAAAEA=", "metadata": {"a": None}},
    ),
    ("search", ("handbook", "rows"), {}, FOUND, f"POST {SEARCH}", {"query": "rows"}),
    (
        "search", ("handbook",),
        {"vector": [1, 0], "mode": "vector", "k": 3, "offset": 2, "max_distance": 0.5, "min_score": 0.0,
         "include": ("text", "embedding"), "exact": False, "ef_search": 200, "filter": {"year": {"$gte": 2020}},
         "mmr": {"lambda": 0.5}, "total": False, "explain": True, "facets": "year"},
        FOUND, f"POST {SEARCH}",
        {"vector": [1.0, 0.0], "mode": "vector", "k": 3, "offset": 2, "max_distance": 0.5, "min_score": 0.0,
         "include": ["text", "embedding"], "exact": False, "ef_search": 200, "filter": {"year": {"$gte": 2020}},
         "mmr": {"lambda": 0.5}, "total": False, "explain": True, "facets": ["year"]},
    ),
    (
        "search", ("handbook", "rows"),
        {"mode": "hybrid", "like": {"chunk": uuid.UUID(int=1)}, "fusion": {"method": "weighted", "weights": [1, 2]},
         "group_by": "document", "group_size": 2, "rerank": {"provider": "cohere"}, "facets": ("year", "lang")},
        FOUND, f"POST {SEARCH}",
        {"query": "rows", "mode": "hybrid", "like": {"chunk": str(uuid.UUID(int=1))},
         "fusion": {"method": "weighted", "weights": [1, 2]}, "group_by": "document", "group_size": 2,
         "rerank": {"provider": "cohere"}, "facets": ["year", "lang"]},
    ),
    (
        "facets", ("handbook", ["year", "lang"]), {},
        {"facets": {"year": [{"value": 2026, "documents": 2}], "lang": []}, "documents": 2},
        "POST /v1/libraries/handbook/facets", {"attributes": ["year", "lang"]},
    ),
    (
        "facets", ("handbook", "year"), {"filter": {"lang": "en"}, "limit": 3}, {"facets": {}, "documents": 0},
        "POST /v1/libraries/handbook/facets", {"attributes": ["year"], "filter": {"lang": "en"}, "limit": 3},
    ),
    ("cache_info", (), {}, CACHE, "GET /v1/cache", None),
    (
        "search_batch", ("handbook", [{"query": "a", "k": 1, "mode": None}, {"vector": (1, 2), "include": "text"}]), {},
        {"results": [{"answer": FOUND, "error": None},
                     {"answer": None, "error": {"status": 422, "code": "wrong_dimension", "detail": "It has 3."}}],
         "took_ms": 3.0},
        f"POST {SEARCH}/batch",
        {"searches": [{"query": "a", "k": 1}, {"vector": [1.0, 2.0], "include": ["text"]}]},
    ),
    (
        "search_libraries", (["a", uuid.UUID(int=2)], "rows"), {},
        {"hits": [{**HIT, "embedding": None, "library": "a"}], "took_ms": 1.0},
        "POST /v1/search", {"libraries": ["a", str(uuid.UUID(int=2))], "query": "rows"},
    ),
    (
        "search_libraries", ("a",),
        {"query": "rows", "vector": [1], "mode": "hybrid", "k": 3, "offset": 1, "filter": {}, "max_distance": 1.0,
         "min_score": 0.1, "fusion": {"k": 9}, "rerank": {"provider": "cohere"}, "exact": True, "ef_search": 9,
         "include": ["highlight"]},
        {"hits": [], "took_ms": 1.0}, "POST /v1/search",
        {"libraries": ["a"], "query": "rows", "vector": [1.0], "mode": "hybrid", "k": 3, "offset": 1, "filter": {},
         "max_distance": 1.0, "min_score": 0.1, "fusion": {"k": 9}, "rerank": {"provider": "cohere"}, "exact": True,
         "ef_search": 9, "include": ["highlight"]},
    ),
]  # fmt: skip


DELETIONS = [
    ("delete_library", ("handbook",), "DELETE /v1/libraries/handbook"),
    ("delete_document", ("handbook", "vacuum"), "DELETE /v1/libraries/handbook/documents/vacuum"),
    ("delete_chunk", ("handbook", "c"), "DELETE /v1/libraries/handbook/chunks/c"),
    ("revoke_key", ("crawler",), "DELETE /v1/keys/crawler"),
    ("clear_cache", (), "DELETE /v1/cache"),
    ("clear_cache", ("a/b",), "DELETE /v1/cache?library=a%2Fb"),
]
LISTS = [
    ("libraries", (), "/v1/libraries", LIBRARY),
    ("documents", ("handbook",), "/v1/libraries/handbook/documents", DOCUMENT),
    ("chunks", ("handbook", "vacuum"), "/v1/libraries/handbook/documents/vacuum/chunks", CHUNK),
    ("keys", (), "/v1/keys", KEY),
    ("audit", (), "/v1/audit", AUDIT),
]


@pytest.mark.parametrize(("method", "args", "options", "answer", "asked", "body"), CALLS)
async def test_a_call_asks_as_documented_and_gives_all_of_the_answer(
    connect, method, args, options, answer, asked, body
):
    script = Script(ok(answer))
    result = await getattr(connect(script), method)(*args, **options)
    assert script.asked == [asked]
    (request,) = script.requests
    assert request.headers.get("content-type") == (None if body is None else "application/json")
    assert (script.body if request.content else None) == body
    given = msgspec.json.decode(msgspec.json.encode(result))
    assert {name: value for name, value in given.items() if name in answer} == {
        **answer,
        **{name: value.replace("+00:00", "Z") for name, value in answer.items() if value and name.endswith("_at")},
    }


@pytest.mark.parametrize(("method", "args", "asked"), DELETIONS)
async def test_a_deletion_gives_nothing(connect, method, args, asked):
    script = Script(ok(status=204))
    assert await getattr(connect(script), method)(*args) is None
    assert script.asked == [asked]


@pytest.mark.parametrize(
    "method",
    ["add_document", "put_document", "update_document", "delete_document", "update_chunk", "delete_chunk"],
)
async def test_if_match_sends_the_version_as_an_etag(connect, method):
    script = Script(ok(CHUNK if method == "update_chunk" else DOCUMENT))
    named = ("handbook",) if method == "add_document" else ("handbook", "vacuum")
    await getattr(connect(script), method)(*named, if_match=3)
    await getattr(connect(script), method)(*named)
    assert [request.headers.get("if-match") for request in script.requests] == ['"3"', None]


@pytest.mark.parametrize(("method", "args", "path", "item"), LISTS)
async def test_a_list_goes_on_until_there_is_no_next_page(connect, method, args, path, item):
    pages = [{"items": [item, item], "next": "a b/="}, {"items": [], "next": "2"}, {"items": [item], "next": None}]
    script = Script(*map(ok, pages))
    found = await getattr(connect(script), method)(*args, page_size=2)
    assert [thing.id for thing in found] == [item["id"]] * 3
    assert [request.url.path for request in script.requests] == [path] * 3
    assert [dict(request.url.params) for request in script.requests] == [
        {"limit": "2"},
        {"limit": "2", "after": "a b/="},
        {"limit": "2", "after": "2"},
    ]


async def test_revoked_keys_are_listed_when_they_are_asked_for(connect):
    script = Script(ok({"items": [KEY], "next": None}))
    assert [key.name for key in await connect(script).keys(revoked=True)] == ["crawler"]
    assert script.asked == ["GET /v1/keys?revoked=true"]


async def test_the_audit_log_is_asked_for_a_part(connect):
    script = Script(ok({"items": [AUDIT], "next": None}))
    since = datetime(2030, 1, 2, tzinfo=UTC)
    found = await connect(script).audit(action="document.delete", library="handbook", since=since, outcome="done")
    assert [(entry.principal, entry.count) for entry in found] == [("crawler", 1)]
    assert script.asked == [
        "GET /v1/audit?action=document.delete&library=handbook&since=2030-01-02T00%3A00%3A00%2B00%3A00&outcome=done"
    ]


async def test_documents_that_match_come_page_by_page(connect):
    pages = [{"items": [DOCUMENT, DOCUMENT], "next": "a"}, {"items": [DOCUMENT], "next": None}]
    script = Script(*map(ok, pages))
    sort = ({"field": field, "order": "desc"} for field in ("year", "$key"))
    found = await connect(script).query_documents("handbook", {"lang": "en"}, sort=sort, page_size=2)
    assert [document.id for document in found] == [DOCUMENT["id"]] * 3
    assert script.asked == [f"POST {DOCUMENTS}/query"] * 2
    first, second = (json.loads(request.content) for request in script.requests)
    assert first == {
        "filter": {"lang": "en"}, "limit": 2,
        "sort": [{"field": "year", "order": "desc"}, {"field": "$key", "order": "desc"}],
    }  # fmt: skip
    assert second == {**first, "after": "a"}


@pytest.mark.parametrize(
    ("method", "args", "options", "asked", "body"),
    [
        ("count_documents", ("handbook",), {}, "query", {"limit": 1, "total": True}),
        (
            "count_documents", ("handbook",), {"filter": {"lang": "en"}}, "query",
            {"limit": 1, "total": True, "filter": {"lang": "en"}},
        ),
        (
            "count_documents", ("handbook", {"lang": "en"}), {}, "query",
            {"limit": 1, "total": True, "filter": {"lang": "en"}},
        ),
        (
            "update_documents", ("handbook", {"year": 1}, {"a": None}), {}, "update",
            {"filter": {"year": 1}, "patch": {"a": None}},
        ),
        (
            "update_documents", ("handbook", {}, {}), {"max_affected": 0, "dry_run": True}, "update",
            {"filter": {}, "patch": {}, "max_affected": 0, "dry_run": True},
        ),
        ("delete_documents", ("handbook", {"year": 1}), {}, "delete", {"filter": {"year": 1}}),
        (
            "delete_documents", ("handbook", {"year": 1}), {"max_affected": 7, "dry_run": True}, "delete",
            {"filter": {"year": 1}, "max_affected": 7, "dry_run": True},
        ),
    ],
)  # fmt: skip
async def test_what_is_done_by_filter_is_counted(connect, method, args, options, asked, body):
    script = Script(ok({"items": [DOCUMENT], "next": "a", "total": 3, "affected": 3}))
    assert await getattr(connect(script), method)(*args, **options) == 3
    assert (script.asked, script.body) == ([f"POST {DOCUMENTS}/{asked}"], body)


def page_of(*cursors: str, then: str) -> dict[str, Any]:
    items = [{"cursor": cursor, "kind": "library", "version": 1, "at": "2025-01-02T03:04:05Z"} for cursor in cursors]
    return {"items": items, "next": then}


async def test_changes_end_where_nothing_is_new(connect):
    script = Script(ok(page_of("c1", "c2", then="c2")), ok(page_of("c3", then="c3")), ok(page_of(then="c3")))
    found = await connect(script).changes("handbook", page_size=2)
    assert [change.cursor for change in found] == ["c1", "c2", "c3"]
    assert [dict(request.url.params) for request in script.requests] == [
        {"limit": "2"},
        {"limit": "2", "after": "c2"},
        {"limit": "2", "after": "c3"},
    ]


async def test_who_follows_waits_for_more():
    pages = [ok(page_of(then="c0")), ok(page_of("c1", then="c1")), ok(page_of(then="c1")), ok(page_of("c2", then="c2"))]
    for client in (AsyncClient, Client):
        script = Script(*pages)
        transport, seen = httpx2.MockTransport(script), []
        if client is AsyncClient:
            async for change in AsyncClient(transport=transport).changes("handbook", after="now", follow=True):
                seen.append(change.cursor)
                if len(seen) == 2:
                    break
        else:
            for change in Client(transport=transport).changes("handbook", after="now", follow=True):
                seen.append(change.cursor)
                if len(seen) == 2:
                    break
        assert seen == ["c1", "c2"]
        asked = [(request.url.params["after"], request.url.params["wait"]) for request in script.requests]
        assert asked == [("now", "20.0"), ("c0", "20.0"), ("c1", "20.0"), ("c1", "20.0")]


async def test_failed_embeddings_are_tried_again(connect):
    script = Script(ok({"retried": 3}), ok({"retried": 1}))
    client = connect(script)
    assert await client.retry_embeddings("handbook") == 3
    assert (script.asked, script.body) == (["POST /v1/libraries/handbook/embeddings/retry"], {})
    assert await client.retry_embeddings("handbook", filter={"year": 1}) == 1
    assert script.body == {"filter": {"year": 1}}


async def test_chunks_keep_what_they_include_on_every_page(connect):
    pages = [{"items": [{**CHUNK, "embedding": [0.5, 1]}], "next": "1"}, {"items": [], "next": None}]
    script = Script(*map(ok, pages))
    (chunk,) = await connect(script).chunks("handbook", "vacuum", include=["embedding"])
    assert chunk.embedding == [0.5, 1.0]
    assert [dict(request.url.params) for request in script.requests] == [
        {"include": "embedding"},
        {"include": "embedding", "after": "1"},
    ]


@pytest.mark.parametrize(
    ("name", "segment"),
    [
        ("a/b", "a%2Fb"),
        ("100 % sure?", "100%20%25%20sure%3F"),
        ("a#b&c=d+e", "a%23b%26c%3Dd%2Be"),
        ("Größe\n", "Gr%C3%B6%C3%9Fe%0A"),
        ("a%2Fb", "a%252Fb"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("../x", "..%2Fx"),
        ("v1.2", "v1.2"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
async def test_names_and_keys_stay_one_segment_of_the_path(connect, name, segment):
    script = Script(ok(DOCUMENT))
    await connect(script).get_document(name, name)
    assert script.asked == [f"GET /v1/libraries/{segment}/documents/{segment}"]


async def test_an_empty_key_is_refused_before_it_names_the_whole_list(connect):
    script = Script(ok())
    with pytest.raises(ValueError, match="must not be empty"):
        await connect(script).delete_document("handbook", "")
    assert script.requests == []


@pytest.mark.parametrize(
    ("base_url", "options", "library", "health"),
    [
        ("http://h:1", {}, "http://h:1/v1/libraries/x", "http://h:1/health"),
        ("http://h:1/", {}, "http://h:1/v1/libraries/x", "http://h:1/health"),
        ("http://h:1/v1", {}, "http://h:1/v1/libraries/x", "http://h:1/health"),
        ("http://h:1/v1/", {}, "http://h:1/v1/libraries/x", "http://h:1/health"),
        ("http://h:1", {"api_prefix": ""}, "http://h:1/libraries/x", "http://h:1/health"),
        ("http://h:1/", {"api_prefix": "/"}, "http://h:1/libraries/x", "http://h:1/health"),
        ("https://h/db/", {"api_prefix": "api/v1/"}, "https://h/db/api/v1/libraries/x", "https://h/db/health"),
        ("https://h/a%20b/v1", {}, "https://h/a%20b/v1/libraries/x", "https://h/a%20b/health"),
        ("http://v1", {}, "http://v1/v1/libraries/x", "http://v1/health"),
        ("http://[::1]:8432", {}, "http://[::1]:8432/v1/libraries/x", "http://[::1]:8432/health"),
    ],
)
async def test_the_prefix_goes_before_everything_but_probes(connect, base_url, options, library, health):
    script = Script(ok(LIBRARY), ok({"status": "ok"}))
    client = connect(script, base_url=base_url, **options)
    await client.get_library("x")
    await client.health()
    assert [str(request.url) for request in script.requests] == [library, health]


@pytest.mark.parametrize(
    "base_url", ["", "localhost:8432", "ftp://h", "http://", "http://h?x=1", "http://h/#x", "http://h:x"]
)
async def test_an_address_that_cannot_work_is_refused_at_once(connect, base_url):
    with pytest.raises(ValueError, match="base_url"):
        connect(Script(ok()), base_url=base_url)


async def test_the_default_address_is_that_of_serve(connect):
    script = Script(ok({"status": "ok", "version": "0.1.0"}))
    await connect(script).health()
    assert str(script.requests[0].url) == "http://127.0.0.1:8432/health"


async def test_the_key_goes_along_only_when_there_is_one(connect):
    script = Script(ok(LIBRARY))
    await connect(script, api_key="secret").get_library("x")
    await connect(script).get_library("x")
    assert [request.headers.get("authorization") for request in script.requests] == ["Bearer secret", None]
    assert {request.headers["user-agent"] for request in script.requests} == {
        f"pgshelf-client/{pgshelf_client.__version__}"
    }


async def test_answers_are_typed(connect):
    library = await connect(Script(ok(LIBRARY))).get_library("handbook")
    assert library.embedder.provider == "local"
    assert library.chunking.overlap == 100
    assert library.created_at == datetime(2025, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    result = await connect(Script(ok(FOUND))).search("handbook", "rows")
    assert result.hits[0].document.title == "Vacuum"
    assert result.hits[0].embedding == [0.5, 1.0]
    with pytest.raises(AttributeError):
        result.hits[0].score = 1.0


async def test_several_documents_have_a_result_each(connect):
    error = {"status": 422, "code": "wrong_dimension", "detail": "It has 3.", "errors": [{"path": "p", "message": "m"}]}
    answer = {"results": [{"status": 201, "id": str(uuid.UUID(int=1)), "key": "a"}, {"status": 422, "error": error}]}
    script = Script(ok(answer))
    given = [{"key": "a", "text": "t"}, {"chunks": [{"text": "x", "embedding": [1, 0.5]}]}]
    good, bad = await connect(script).add_documents("handbook", given, wait=False)
    assert (good.status, good.id, good.key, good.error) == (201, str(uuid.UUID(int=1)), "a", None)
    assert (bad.id, bad.error.code, bad.error.errors[0].path) == (None, "wrong_dimension", "p")
    assert script.asked == ["POST /v1/libraries/handbook/documents/batch?wait=false"]
    assert script.body == {"documents": [given[0], {"chunks": [{"text": "x", "embedding": "AACAPwAAAD8="}]}]}


async def test_a_hit_without_what_was_not_included_says_none(connect):
    bare = {name: HIT[name] for name in ("chunk_id", "document_id", "key", "ordinal", "score", "distance")}
    result = await connect(Script(ok({"hits": [bare], "took_ms": 1}))).search("handbook", "rows", include=[])
    (hit,) = result.hits
    assert (hit.text, hit.metadata, hit.document, hit.embedding) == (None, None, None, None)


async def test_waiting_for_an_index_asks_until_it_is_not_building(connect, waits):
    pages = [{**INDEX, "state": "building"}] * 3 + [{**INDEX, "state": "failed", "error": "No space left."}]
    script = Script(*map(ok, pages))
    index = await connect(script).wait_for_index("handbook")
    assert (index.state, index.error, index.estimate.seconds) == ("failed", "No space left.", 6.2)
    assert script.asked == ["GET /v1/libraries/handbook/index"] * 4
    assert waits == sorted(waits) and 0 < waits[0] < waits[2] <= 2


async def test_waiting_for_an_embedder_asks_until_it_has_changed_or_failed(connect, waits):
    pages = [{**EMBEDDER, "state": state, "error": error} for state, error in
             [("embedding", None), ("switching", None), ("failed", "No key.")]]  # fmt: skip
    script = Script(*map(ok, pages))
    found = await connect(script).wait_for_embedder("handbook")
    assert (found.state, found.error, found.wanted.dimension, found.embedded) == ("failed", "No key.", 64, 45)
    assert script.asked == ["GET /v1/libraries/handbook/embedder"] * 3
    late = Script(ok(pages[0]))
    with pytest.raises(WaitedTooLong, match=r"the embedder of handbook is still being changed after 0 seconds"):
        await connect(late).wait_for_embedder("handbook", timeout=0)


async def test_waiting_for_an_index_ends_at_its_timeout(connect, waits):
    script = Script(ok({**INDEX, "state": "building"}))
    with pytest.raises(WaitedTooLong, match=r"the index of handbook is still being built after 0 seconds"):
        await connect(script).wait_for_index("handbook", timeout=0)
    assert (len(script.requests), waits) == (1, [])


async def test_fields_of_a_newer_server_are_ignored(connect):
    newer = {**DOCUMENT, "colour": "red", "chunks": {"total": 1, "warm": True}, "status": "archived"}
    document = await connect(Script(ok(newer))).get_document("handbook", "vacuum")
    assert (document.status, document.chunks.total, document.chunks.pending) == ("archived", 1, 0)


@pytest.mark.parametrize("body", [b"<html>It works!</html>", b"", b"\xff", b"[]", b'{"id": 7}'])
async def test_success_from_something_else_is_an_unexpected_answer(connect, body):
    script = Script(httpx2.Response(200, content=body))
    with pytest.raises(UnexpectedAnswer, match=r"GET http://127.0.0.1:8432/v1/libraries/x answered 200, but"):
        await connect(script).get_library("x")


async def test_clients_close_what_they_opened():
    with Client() as entered:
        pass
    async with AsyncClient() as awaited:
        pass
    closed, aclosed = Client(), AsyncClient()
    closed.close()
    await aclosed.aclose()
    for waiting in (entered, closed):
        with pytest.raises(RuntimeError, match="closed"):
            waiting.health()
    for client in (awaited, aclosed):
        with pytest.raises(RuntimeError, match="closed"):
            await client.health()


async def test_backups_are_a_list(connect):
    script = Script(ok({"items": [BACKUP], "next": None}))
    [backup] = await connect(script).backups()
    assert script.asked == ["GET /v1/replication/backups"]
    assert (backup.id, backup.state, backup.bytes) == (BACKUP["id"], "running", None)
    assert backup.started_at == datetime(2026, 1, 5, 9, 1, tzinfo=UTC)


def test_both_clients_have_the_same_methods_with_the_same_parameters():
    def signatures(client: type) -> dict[str, list[tuple[str, object, object]]]:
        methods = inspect.getmembers(client, inspect.isfunction)
        return {
            {"aclose": "close"}.get(name, name): [
                (parameter.name, parameter.kind, parameter.default)
                for parameter in inspect.signature(method).parameters.values()
            ]
            for name, method in methods
            if not name.startswith("_")
        }

    assert signatures(Client) == signatures(AsyncClient)
    assert {
        "close",
        *(name for name, *_ in CALLS),
        *(name for name, *_ in DELETIONS),
        *(name for name, *_ in LISTS),
        *("changes", "backups"),
        *("query_documents", "count_documents", "update_documents", "delete_documents"),
        *("add_documents", "import_documents", "export_documents", "export_lines", "retry_embeddings"),
    } == {*signatures(Client)}


def test_every_public_name_is_there_and_documented():
    for name in pgshelf_client.__all__:
        assert hasattr(pgshelf_client, name)
    for client in (Client, AsyncClient):
        for name, method in inspect.getmembers(client, inspect.isfunction):
            assert name.startswith("_") or method.__doc__, name


def test_unset_is_not_none():
    assert UNSET is not None
    assert pgshelf_client._base.changed(a=None, b=UNSET) == {"a": None}
