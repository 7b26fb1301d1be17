"""Writes that are sent twice under one Idempotency-Key: done once, answered twice."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from typing import Any

import httpx2
import msgspec
import psycopg
import pytest

from pgshelf import ingest
from tests.rest.asking import at, chunks, document, library, local, ok, problem

REPLAYED = "idempotent-replayed"
SHELF = at("libraries", "shelf")
DOCUMENTS = f"{SHELF}/documents"
CHUNKS: dict[str, Any] = {"chunks": [{"text": "one", "embedding": [1, 0, 0]}]}

# method, path (with the id of a chunk), body, headers: each write there is
WRITES: list[tuple[str, str, dict[str, Any] | None, dict[str, str]]] = [
    ("POST", "/v1/libraries", {"name": "other", "embedder": {"provider": "none"}, "dimension": 3}, {}),
    ("PATCH", SHELF, {"name": "shelf", "description": "new"}, {}),
    ("PUT", f"{SHELF}/index", {"type": "hnsw"}, {}),
    ("POST", DOCUMENTS, CHUNKS, {}),
    ("POST", f"{DOCUMENTS}/batch", {"documents": [CHUNKS, {"text": " "}, CHUNKS | {"key": "k"}]}, {}),
    ("PUT", f"{DOCUMENTS}/k", CHUNKS, {"If-Match": '"1"'}),
    ("PATCH", f"{DOCUMENTS}/k", {"metadata": {"n": 1}}, {"If-Match": '"1"'}),
    ("POST", f"{DOCUMENTS}/update", {"filter": {"$key": "k"}, "patch": {"m": 1}, "max_affected": 1}, {}),
    ("PATCH", f"{SHELF}/chunks/CHUNK", {"text": "two", "embedding": [0, 1, 0]}, {}),
    ("DELETE", f"{SHELF}/chunks/CHUNK", None, {}),
    ("DELETE", f"{DOCUMENTS}/k", None, {"If-Match": '"1"'}),
    ("POST", f"{DOCUMENTS}/delete", {"filter": {"$key": "k"}, "max_affected": 1}, {}),
    ("DELETE", SHELF, None, {}),
]


def key(name: str | None = None) -> dict[str, str]:
    return {"Idempotency-Key": name or uuid.uuid4().hex}


async def stored(url: str) -> int:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        row = await (await connection.execute("select count(*) from pgshelf.idempotency_keys")).fetchone()
    return int(row[0]) if row else 0


async def state(url: str) -> Any:
    """Everything that a write could change, with versions and times."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        found = await connection.execute(
            """select (select jsonb_agg(l order by l.id) from pgshelf.libraries l),
            (select jsonb_agg(d order by d.id) from pgshelf.documents d),
            (select jsonb_agg(to_jsonb(c) - 'tsv' order by c.id) from pgshelf.chunks c)"""
        )
        return await found.fetchone()


@pytest.mark.parametrize(("method", "path", "body", "headers"), WRITES, ids=[f"{m} {p}" for m, p, _, _ in WRITES])
async def test_every_write_is_done_once(
    database_url: str, make_settings: Any, make_client: Any, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    client = await make_client(make_settings(database_url, worker_enabled=False))
    await library(client)
    await document(client, "k")
    path = path.replace("CHUNK", (await chunks(client, "k"))[0]["id"])
    sent = key() | headers
    first = await client.request(method, path, json=body, headers=sent)
    assert first.is_success and REPLAYED not in first.headers, first.text
    after = await state(database_url)
    again = await client.request(method, path, json=body, headers=sent)
    assert again.headers[REPLAYED] == "true"
    assert (again.status_code, again.content) == (first.status_code, first.content)
    for name in ("etag", "location", "content-type"):
        assert again.headers.get(name) == first.headers.get(name)
    assert await state(database_url) == after
    other = await client.request(method, path + "?wait=false", json=body, headers=sent)
    problem(other, 409, "idempotency_key_reused")


@pytest.mark.parametrize("change", ["body", "path", "method", "if-match"])
async def test_a_key_names_one_request(client: httpx2.AsyncClient, change: str) -> None:
    await library(client)
    await document(client, "k")
    await document(client, "l")
    sent = key("a-key")
    ok(await client.patch(f"{DOCUMENTS}/k", json={"title": "a"}, headers=sent | {"If-Match": '"1"'}))
    method = "PUT" if change == "method" else "PATCH"
    path = f"{DOCUMENTS}/l" if change == "path" else f"{DOCUMENTS}/k"
    body: dict[str, Any] = {"title": "b" if change == "body" else "a"}
    tag = '"2"' if change == "if-match" else '"1"'
    body |= CHUNKS if method == "PUT" else {}
    problem(
        await client.request(method, path, json=body, headers=sent | {"If-Match": tag}), 409, "idempotency_key_reused"
    )
    assert ok(await client.get(f"{DOCUMENTS}/k"))["title"] == "a"


async def test_what_failed_may_be_tried_again(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    sent = key()
    problem(await client.patch(f"{DOCUMENTS}/k", json={"title": "a"}, headers=sent), 404, "document_not_found")
    assert await stored(database_url) == 0
    await document(client, "k")
    ok(await client.patch(f"{DOCUMENTS}/k", json={"title": "a"}, headers=sent))
    assert await stored(database_url) == 1


async def test_a_stale_version_and_too_many_are_not_stored(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    await document(client, "k")
    await document(client, "l")
    stale = key() | {"If-Match": '"7"'}
    for _ in range(2):
        problem(await client.delete(f"{DOCUMENTS}/k", headers=stale), 409, "version_mismatch")
    body = {"filter": {"$key": {"$in": ["k", "l"]}}, "max_affected": 1}
    for _ in range(2):
        problem(await client.post(f"{DOCUMENTS}/delete", json=body, headers=key("many")), 409, "too_many_affected")
    assert await stored(database_url) == 0
    dry = {"filter": {"$key": "k"}, "dry_run": True}
    assert ok(await client.post(f"{DOCUMENTS}/delete", json=dry, headers=key("dry"))) == {"affected": 1}
    assert ok(await client.get(f"{DOCUMENTS}/k"))["version"] == 1


async def test_without_a_key_nothing_is_stored(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    first = await document(client, None)
    assert (await document(client, None))["id"] != first["id"]
    assert await stored(database_url) == 0


@pytest.mark.parametrize("wrong", ["", "x" * 256, "two words", "ü"])
async def test_what_is_no_key_is_refused(client: httpx2.AsyncClient, wrong: str) -> None:
    response = await client.post("/v1/libraries", json={"name": "x"}, headers=[(b"Idempotency-Key", wrong.encode())])
    assert "idempotency_key" in problem(response, 400, "validation_failed")["detail"]


async def test_a_replay_embeds_nothing(client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    await local(client)
    sent = key()
    body = {"text": "Vacuum reclaims dead rows."}
    first = await client.post(DOCUMENTS, json=body, headers=sent)
    assert ok(first, 201)["status"] == "ready"

    async def embed(*_: Any) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr(ingest, "embed", embed)
    again = await client.post(DOCUMENTS, json=body, headers=sent)
    assert (again.status_code, again.content, again.headers[REPLAYED]) == (201, first.content, "true")


async def test_a_replay_in_another_format_says_the_same(client: httpx2.AsyncClient) -> None:
    await library(client)
    sent = key()
    first = ok(await client.post(DOCUMENTS, json=CHUNKS, headers=sent), 201)
    again = await client.post(DOCUMENTS, json=CHUNKS, headers=sent | {"Accept": "application/msgpack"})
    assert again.headers["content-type"] == "application/msgpack"
    assert msgspec.msgpack.decode(again.content) == first


async def test_at_the_same_time_the_second_waits_for_the_first(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    sent = key()
    body = {"chunks": [{"text": f"chunk {n}", "embedding": [1, n, 0]} for n in range(50)]}
    answers = await asyncio.gather(*[client.post(DOCUMENTS, json=body, headers=sent) for _ in range(8)])
    assert {(answer.status_code, answer.content) for answer in answers} == {(201, answers[0].content)}
    assert sum(REPLAYED in answer.headers for answer in answers) == 7
    assert len(ok(await client.get(DOCUMENTS))["items"]) == 1


async def test_waiting_for_the_first_has_an_end(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, lock_timeout=0.2, worker_enabled=False))
    await library(client)
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await connection.execute("insert into pgshelf.idempotency_keys (key, request) values ('k', '')")
        problem(await client.post(DOCUMENTS, json=CHUNKS, headers=key("k")), 409, "idempotency_key_in_use")
        await connection.rollback()
    ok(await client.post(DOCUMENTS, json=CHUNKS, headers=key("k")), 201)


async def test_old_answers_are_forgotten(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    ok(await client.post(DOCUMENTS, json=CHUNKS, headers=key("old")), 201)
    ok(await client.post(DOCUMENTS, json=CHUNKS, headers=key("new")), 201)
    prune = "select pgshelf.prune_idempotency_keys(%s)"
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute(
            "update pgshelf.idempotency_keys set created_at = now() - interval '25 hours' where key = 'old'"
        )
        assert await (await connection.execute(prune, [timedelta(hours=24)])).fetchone() == (1,)
        assert await (await connection.execute(prune, [timedelta(hours=24)])).fetchone() == (0,)
    assert REPLAYED in (await client.post(DOCUMENTS, json=CHUNKS, headers=key("new"))).headers
    assert REPLAYED not in (await client.post(DOCUMENTS, json=CHUNKS, headers=key("old"))).headers
