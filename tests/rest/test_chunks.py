"""Chunks over REST: list, read, change in place, delete."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import psycopg
import pytest

from tests.rest.asking import at, chunks, document, library, local, ok, pages, problem, raw, until


def path(chunk: dict[str, Any]) -> str:
    return at("libraries", "shelf", "chunks", chunk["id"])


async def test_chunks_are_listed_in_order_and_in_pages(client: httpx2.AsyncClient) -> None:
    await library(client)
    made = await document(client, "k", *([float(n), 1.0, 0.0] for n in range(25)))
    await document(client, "other")
    for limit in (1, 7, 25, 1000):
        found = await pages(client, at("libraries", "shelf", "documents", "k", "chunks"), limit)
        assert [(item["ordinal"], item["text"]) for item in found] == [(n, f"chunk {n}") for n in range(25)]
    assert {item["document_id"] for item in found} == {made["id"]}
    assert set(found[0]) == {"id", "document_id", "ordinal", "text", "metadata", "status", "error"}
    assert (found[0]["status"], found[0]["error"], found[0]["metadata"]) == ("ready", None, {})


async def test_embeddings_come_when_asked_for(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "k", [0.1, -2.5, 3e-7])
    (plain,), (full,) = await chunks(client, "k"), await chunks(client, "k", embedding=True)
    assert "embedding" not in plain
    assert raw(*full["embedding"]) == raw(0.1, -2.5, 3e-7)
    assert "embedding" not in ok(await client.get(path(plain)))
    assert ok(await client.get(path(plain), params={"include": "embedding"})) == full


async def test_a_chunk_is_changed_in_place(client: httpx2.AsyncClient) -> None:
    await local(client)
    await document(client, "k", chunks=[{"text": "tables"}, {"text": "views", "metadata": {"a": 1}}])
    first, second = await chunks(client, "k", embedding=True)
    changed = ok(await client.patch(path(second), json={"text": "indexes"}))
    assert changed == {**{name: second[name] for name in second if name != "embedding"}, "text": "indexes"}
    embedding = ok(await client.get(path(second) + "?include=embedding"))["embedding"]
    assert embedding != second["embedding"]
    await document(client, "same", chunks=[{"text": "indexes"}])
    assert (await chunks(client, "same", embedding=True))[0]["embedding"] == embedding
    assert ok(await client.patch(path(second), json={"metadata": {"a": None, "b": 2}}))["metadata"] == {"b": 2}
    given = [1.0] + [0.0] * 255
    ok(await client.patch(path(second), json={"text": "own", "embedding": given}))
    assert (await chunks(client, "k", embedding=True)) == [
        first,
        second | {"text": "own", "metadata": {"b": 2}, "embedding": given},
    ]
    assert ok(await client.get(at("libraries", "shelf", "documents", "k")))["version"] == 4


async def test_a_changed_chunk_is_found_by_its_new_text(client: httpx2.AsyncClient) -> None:
    await local(client)
    await document(client, "k", chunks=[{"text": "bananas and apples"}, {"text": "cats"}])
    (_, cats) = await chunks(client, "k")
    ok(await client.patch(path(cats), json={"text": "locks and transactions"}))
    hits = ok(await client.post(at("libraries", "shelf", "search"), json={"query": "transactions"}))["hits"]
    assert hits[0]["chunk_id"] == cats["id"] and hits[0]["text"] == "locks and transactions"


async def test_a_patch_that_does_not_wait_leaves_the_chunk_to_the_worker(client: httpx2.AsyncClient) -> None:
    await local(client)
    await document(client, "k", chunks=[{"text": "tables"}])
    (before,) = await chunks(client, "k", embedding=True)
    changed = ok(await client.patch(path(before), params={"wait": "false"}, json={"text": "views"}), 202)
    assert changed["status"] == "pending"

    async def ready() -> bool:
        return bool(ok(await client.get(path(before)))["status"] == "ready")

    await until(ready)
    assert (await chunks(client, "k", embedding=True))[0]["embedding"] != before["embedding"]
    ok(await client.patch(path(before), params={"wait": "false"}, json={"metadata": {"a": 1}}), 200)
    ok(await client.patch(path(before), params={"wait": "false"}, json={"text": "views"}), 200)


async def test_where_the_client_brings_the_vectors_a_new_text_needs_one(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "k")
    (chunk,) = await chunks(client, "k", embedding=True)
    problem(await client.patch(path(chunk), json={"text": "other"}), 422, "embedding_required")
    assert await chunks(client, "k", embedding=True) == [chunk]
    assert ok(await client.patch(path(chunk), json={"text": chunk["text"]}))["status"] == "ready"
    assert ok(await client.patch(path(chunk), json={"text": "other", "embedding": [0, 1, 0]}))["text"] == "other"
    ok(await client.patch(path(chunk), json={"embedding": [0, 0, 1]}))
    assert (await chunks(client, "k", embedding=True))[0]["embedding"] == [0, 0, 1]


async def test_deleting_a_chunk_leaves_the_places_of_the_others(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "k", [1, 0, 0], [0, 1, 0], [0, 0, 1])
    _, middle, _ = await chunks(client, "k")
    assert (await client.delete(path(middle))).status_code == 204
    assert [item["ordinal"] for item in await chunks(client, "k")] == [0, 2]
    left = ok(await client.get(at("libraries", "shelf", "documents", "k")))
    assert (left["chunks"]["total"], left["version"]) == (2, 2)
    for method in (client.get, client.delete):
        problem(await method(path(middle)), 404, "chunk_not_found")
    problem(await client.patch(path(middle), json={"text": "x"}), 404, "chunk_not_found")


async def test_if_match_names_the_version_of_the_document(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "k", [1, 0, 0], [0, 1, 0])
    whole = at("libraries", "shelf", "documents", "k")
    before = ok(await client.get(whole))
    first, second = await chunks(client, "k")
    for tag in ('"2"', '"0"', '"77"', 'W/"999999999999999999"'):
        stale = {"If-Match": tag}
        for method, address, body in (
            ("PATCH", path(first), {"metadata": {"a": 1}}),
            ("DELETE", path(first), None),
            ("DELETE", whole, None),
        ):
            told = problem(await client.request(method, address, json=body, headers=stale), 409, "version_mismatch")
            wanted = tag.removeprefix("W/").strip('"')
            assert told["sqlstate"] == "PS020"
            assert told["detail"] == (
                f"The document is at version 1, not {wanted}."
                " Read the document again and repeat the change on what it is now."
            )
    for method in ("PATCH", "DELETE"):
        wrong = {"If-Match": "one"}
        problem(await client.request(method, path(first), json={}, headers=wrong), 400, "validation_failed")
    assert (ok(await client.get(whole)), await chunks(client, "k")) == (before, [first, second])
    etag = (await client.get(whole)).headers["etag"]
    ok(await client.patch(path(first), json={"metadata": {"a": 1}}, headers={"If-Match": etag}))
    ok(await client.patch(path(first), json={"metadata": {"b": 1}}, headers={"If-Match": "*"}))
    problem(await client.delete(path(second), headers={"If-Match": etag}), 409, "version_mismatch")
    again = {"If-Match": '"3"', "Idempotency-Key": "once"}
    for _ in range(2):
        ok(await client.delete(path(second), headers=again), 204)
    ok(await client.delete(path(first), headers={"If-Match": "*"}), 204)
    for tag in ('"5"', "*"):
        problem(await client.delete(path(first), headers={"If-Match": tag}), 404, "chunk_not_found")
    assert ok(await client.get(whole))["version"] == 5


async def test_of_many_changes_of_one_version_one_is_done(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "k", [1, 0, 0], [0, 1, 0], [0, 0, 1])
    version = {"If-Match": '"1"'}
    first, second, third = await chunks(client, "k")
    writes = [client.patch(path(first), json={"metadata": {str(n): n}}, headers=version) for n in range(4)]
    writes += [client.delete(path(chunk), headers=version) for chunk in (second, third)]
    writes += [client.patch(at("libraries", "shelf", "documents", "k"), json={"title": "t"}, headers=version)]
    answers = sorted(answer.status_code for answer in await asyncio.gather(*writes))
    assert answers[0] in (200, 204) and answers[1:] == [409] * 6
    assert ok(await client.get(at("libraries", "shelf", "documents", "k")))["version"] == 2


async def test_a_chunk_belongs_to_one_library(client: httpx2.AsyncClient) -> None:
    await library(client)
    await library(client, "other")
    await document(client, "k")
    (chunk,) = await chunks(client, "k")
    wrong = at("libraries", "other", "chunks", chunk["id"])
    for method in (client.get, client.delete):
        problem(await method(wrong), 404, "chunk_not_found")
    problem(await client.patch(wrong, json={"metadata": {}}), 404, "chunk_not_found")
    problem(await client.get(at("libraries", "none", "chunks", chunk["id"])), 404, "library_not_found")
    assert await chunks(client, "k") == [chunk]


@pytest.mark.parametrize("name", ["1", "chunk", "zz", "\U0001f4da", "a/b", "00000000-0000-4000-8000-00000000000g"])
async def test_ids_that_are_no_ids_name_nothing(client: httpx2.AsyncClient, name: str) -> None:
    await library(client)
    wrong = at("libraries", "shelf", "chunks", name)
    problem(await client.get(wrong), 404, "chunk_not_found")
    problem(await client.delete(wrong), 404, "chunk_not_found")
    problem(await client.patch(wrong, json={"text": "x"}), 404, "chunk_not_found")


async def test_a_chunk_that_was_given_up_says_why(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    await document(client, "k")
    with psycopg.connect(database_url) as connection:
        connection.execute("update pgshelf.chunks set embedding = null, embed_after = 'infinity', embed_error = 'why'")
    (chunk,) = await chunks(client, "k", embedding=True)
    assert (chunk["status"], chunk["error"]) == ("failed", "why")
    assert "embedding" not in chunk
    made = ok(await client.get(at("libraries", "shelf", "documents", "k")))
    assert (made["status"], made["chunks"]) == ("failed", {"total": 1, "pending": 0, "failed": 1})
    repaired = ok(await client.patch(path(chunk), json={"embedding": [1, 0, 0]}))
    assert (repaired["status"], repaired["error"]) == ("ready", None)
