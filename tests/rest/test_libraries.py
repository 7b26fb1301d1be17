"""Libraries over REST: create, list, read, change, delete, numbers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import httpx2
import psycopg
import pytest

from tests.rest.asking import at, document, library, local, ok, pages, problem, until


async def test_a_name_is_enough(client: httpx2.AsyncClient) -> None:
    response = await client.post("/v1/libraries", json={"name": "handbook"})
    made = ok(response, 201)
    assert response.headers["location"] == f"/v1/libraries/{made['id']}"
    assert datetime.fromisoformat(made["created_at"]).tzinfo and made["created_at"] == made["updated_at"]
    assert {name: made[name] for name in made if name not in ("id", "created_at", "updated_at")} == {
        "name": "handbook",
        "description": None,
        "dimension": 256,
        "metric": "cosine",
        "embedder": {"provider": "local", "model": "wordllama-l2-supercat", "dimension": 256},
        "chunking": {"size": 1200, "overlap": 0},
        "language": "english",
        "metadata": {},
        "attributes": {},
        "attributes_ready": {},
        "version": 1,
    }
    assert ok(await client.get(response.headers["location"])) == made


async def test_everything_that_is_given_is_kept(client: httpx2.AsyncClient) -> None:
    given = {
        "name": "papers",
        "description": "Things to read",
        "embedder": {"provider": "none", "model": "my-model", "dimension": 4},
        "metric": "l2",
        "language": "german",
        "chunking": {"size": 500, "overlap": 50},
        "metadata": {"owner": {"team": "search"}, "tags": ["a", "ü", "\U0001f4da"], "n": 1.5, "none": None},
        "attributes": {"year": "number", "author.name": "text", "published": "datetime"},
    }
    made = ok(await client.post("/v1/libraries", json=given), 201)
    assert given.items() <= made.items()
    assert made["dimension"] == 4


@pytest.mark.parametrize("dimension", [64, 128, 256])
async def test_the_local_embedder_comes_in_three_dimensions(client: httpx2.AsyncClient, dimension: int) -> None:
    made = ok(await client.post("/v1/libraries", json={"name": "small", "dimension": dimension}), 201)
    assert made["embedder"]["dimension"] == made["dimension"] == dimension


async def test_the_default_embedder_is_a_setting(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, embedder="none", chunk_size=333, chunk_overlap=33))
    problem(await client.post("/v1/libraries", json={"name": "a"}), 400, "validation_failed")
    made = ok(await client.post("/v1/libraries", json={"name": "a", "dimension": 7}), 201)
    assert made["embedder"] == {"provider": "none", "dimension": 7, "model": None}
    assert made["chunking"] == {"size": 333, "overlap": 33}


NAMES = [
    "a/b",
    "50%",
    "%2F",
    "with space",
    "Größe",
    "图书馆",
    "\U0001f4da",
    "a?b#c",
    "...",
    "a+b&c=d",
    "'; drop table--",
    "x" * 128,
]


async def test_a_library_is_found_by_name_and_by_id(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    for name in NAMES:
        with subtests.test(name=name):
            made = await library(client, name)
            address = made["id"]
            for wanted in (name, address, address.upper(), address.replace("-", ""), "{" + address + "}"):
                assert ok(await client.get(at("libraries", wanted))) == made
                assert ok(await client.get(at("libraries", wanted, "stats")))["documents"] == 0


async def test_a_name_exists_once(client: httpx2.AsyncClient) -> None:
    await library(client, "one")
    body = problem(await client.post("/v1/libraries", json={"name": "one", "dimension": 64}), 409, "library_exists")
    assert body["sqlstate"] == "23505" and "another name" in body["detail"]
    await library(client, "One")  # names keep their case


async def test_lists_are_oldest_first_and_come_in_pages(client: httpx2.AsyncClient) -> None:
    names = [f"library {number}" for number in range(7)]
    for name in names:
        await library(client, name)
    assert [item["name"] for item in ok(await client.get("/v1/libraries"))["items"]] == names
    for limit in (1, 3, 7, 1000):
        assert [item["name"] for item in await pages(client, "/v1/libraries", limit)] == names


async def test_an_empty_list_has_no_next(client: httpx2.AsyncClient) -> None:
    assert ok(await client.get("/v1/libraries")) == {"items": [], "next": None}


async def test_pages_stay_stable_while_libraries_come_and_go(client: httpx2.AsyncClient) -> None:
    for number in range(6):
        await library(client, str(number))
    first = ok(await client.get("/v1/libraries", params={"limit": 3}))
    for gone in ("0", "2"):  # 2 is where the page ended
        ok(await client.delete(at("libraries", gone)), 204)
    await library(client, "new")
    rest = ok(await client.get("/v1/libraries", params={"limit": 10, "after": first["next"]}))
    assert [item["name"] for item in rest["items"]] == ["3", "4", "5", "new"]


async def test_a_patch_changes_what_it_names(client: httpx2.AsyncClient) -> None:
    made = await library(client, "shelf", description="old", metadata={"a": 1})
    path = at("libraries", "shelf")
    changed = ok(await client.patch(path, json={"description": "new", "chunking": {"overlap": 10}}))
    assert changed["updated_at"] > made["updated_at"]
    assert changed == made | {
        "description": "new",
        "chunking": {"size": 1200, "overlap": 10},
        "version": 2,
        "updated_at": changed["updated_at"],
    }
    assert ok(await client.patch(path, json={"description": None}))["description"] is None
    assert ok(await client.patch(path, json={}))["metadata"] == {"a": 1}
    assert ok(await client.get(path))["version"] == 4


MERGES = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ({"a": "foo"}, {"a": {"b": 1, "c": None}}, {"a": {"b": 1}}),
]


async def test_metadata_is_merged_as_rfc_7396_says(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    for number, (target, patch, result) in enumerate(MERGES):
        with subtests.test(target=target, patch=patch):
            name = f"shelf {number}"
            await library(client, name, metadata=target)
            chunk = {"text": "x", "embedding": [1, 0, 0], "metadata": target}
            body = {"key": "d", "metadata": target, "chunks": [chunk]}
            ok(await client.post(at("libraries", name, "documents"), json=body), 201)
            found = ok(await client.get(at("libraries", name, "documents", "d", "chunks")))["items"][0]["id"]
            for parts in ((), ("documents", "d"), ("chunks", found)):
                path = at("libraries", name, *parts)
                assert ok(await client.patch(path, json={"metadata": patch}))["metadata"] == result
                assert ok(await client.get(path))["metadata"] == result


async def test_renaming(client: httpx2.AsyncClient) -> None:
    made = await library(client, "before")
    await library(client, "taken")
    await document(client, "k", into="before")
    problem(await client.patch(at("libraries", "before"), json={"name": "taken"}), 409, "library_exists")
    assert ok(await client.patch(at("libraries", "before"), json={"name": "before"}))["name"] == "before"
    assert ok(await client.patch(at("libraries", "before"), json={"name": "after"}))["id"] == made["id"]
    problem(await client.get(at("libraries", "before")), 404, "library_not_found")
    assert ok(await client.get(at("libraries", "after", "documents", "k")))["key"] == "k"
    await library(client, "before")  # the old name is free


async def test_chunking_counts_for_what_is_written_later(client: httpx2.AsyncClient) -> None:
    await local(client)
    text = "PostgreSQL stores rows in pages. " * 20
    assert (await document(client, "k", text=text))["chunks"]["total"] == 1
    ok(await client.patch(at("libraries", "shelf"), json={"chunking": {"size": 100}}))
    assert ok(await client.get(at("libraries", "shelf", "documents", "k")))["chunks"]["total"] == 1
    assert (await document(client, "k", text=text))["chunks"]["total"] >= 6


async def test_a_deleted_library_is_gone_at_once_and_its_name_is_free(
    client: httpx2.AsyncClient, database_url: str
) -> None:
    old = await library(client)
    for key in "abc":
        await document(client, key)
    assert (await client.delete(at("libraries", "shelf"))).status_code == 204
    for parts in ((), ("stats",), ("documents",), ("documents", "a"), ("documents", "a", "chunks")):
        for name in ("shelf", old["id"]):
            problem(await client.get(at("libraries", name, *parts)), 404, "library_not_found")
    problem(await client.delete(at("libraries", "shelf")), 404, "library_not_found")
    assert ok(await client.get("/v1/libraries"))["items"] == []
    new = await library(client)
    assert new["id"] != old["id"]
    assert ok(await client.get(at("libraries", "shelf", "documents")))["items"] == []
    kept = await document(client, "a")

    async def reaped() -> bool:
        async with await psycopg.AsyncConnection.connect(database_url) as connection:
            left = await connection.execute(
                "select (select count(*) from pgshelf.libraries), (select count(*) from pgshelf.documents),"
                " (select count(*) from pgshelf.chunks)"
            )
            return await left.fetchone() == (1, 1, 1)

    await until(reaped)
    assert ok(await client.get(at("libraries", "shelf", "documents", "a"))) == kept


async def test_a_library_whose_document_is_referenced_stays(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    used, other = await document(client, "used"), await document(client, "other")
    await library(client, "free")
    with psycopg.connect(database_url) as connection:
        connection.execute("create table orders (manual uuid references pgshelf.documents (id))")
        connection.execute("insert into orders values (%s)", [used["id"]])
    for path in (at("libraries", "shelf"), at("libraries", "shelf", "documents", "used")):
        assert problem(await client.delete(path), 409, "referenced")["sqlstate"] == "23503"
    assert [item["id"] for item in ok(await client.get(at("libraries", "shelf", "documents")))["items"]] == [
        used["id"],
        other["id"],
    ]
    ok(await client.delete(at("libraries", "free")), 204)
    with psycopg.connect(database_url) as connection:
        connection.execute("delete from orders")
    ok(await client.delete(at("libraries", "shelf")), 204)


async def test_numbers_of_a_library(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, worker_enabled=False))
    await local(client)
    empty = ok(await client.get(at("libraries", "shelf", "stats")))
    assert (empty["documents"], empty["chunks"], empty["bytes"]) == (0, 0, 0)
    await document(client, "ready", text="A page.")
    path = at("libraries", "shelf", "documents")
    late = [{"text": "later"}, {"text": "latest"}]
    ok(await client.post(path, params={"wait": "false"}, json={"key": "late", "chunks": late}), 202)
    full = ok(await client.get(at("libraries", "shelf", "stats")))
    assert full.pop("bytes") > 1000
    index = {"type": "flat", "state": "ready", "progress": 1.0}
    assert full == {"documents": 2, "chunks": 3, "pending": 2, "failed": 0, "shelf": 0, "index": index}
    with psycopg.connect(database_url) as connection:
        connection.execute("update pgshelf.chunks set embed_after = 'infinity' where text = 'latest'")
    counted = ok(await client.get(at("libraries", "shelf", "stats")))
    assert (counted["pending"], counted["failed"]) == (1, 1)
    assert ok(await client.get(at("libraries", "shelf", "documents", "late")))["status"] == "failed"
