"""Documents by filter: listed in any order page by page, changed and deleted, all or nothing."""

from __future__ import annotations

import asyncio
import random
from functools import cmp_to_key
from typing import Any

import httpx2
import psycopg
import pytest

from tests.rest.asking import at, chunks, document, library, ok, problem, until

QUERY = at("libraries", "shelf", "documents", "query")
UPDATE = at("libraries", "shelf", "documents", "update")
DELETE = at("libraries", "shelf", "documents", "delete")
ATTRIBUTES = {"year": "number", "lang": "text", "at": "datetime"}
EVERYTHING = {"$id": {"$exists": True}}


async def filled(client: httpx2.AsyncClient, count: int = 12, **fields: Any) -> list[dict[str, Any]]:
    """Documents of which some lack what others have."""
    await library(client, **fields)
    rng = random.Random(7)
    made = []
    for number in range(count):
        metadata: dict[str, Any] = {"n": number, "even": number % 2 == 0}
        fields_of: dict[str, list[Any]] = {
            "year": [2020, 2021, 2020.5, "old"],
            "lang": ["b", "a", "B", "é"],
            "at": ["2020-01-02", "2020-01-01T12:00Z", "then"],
        }
        for name, values in fields_of.items():
            if rng.random() < 0.7:
                metadata[name] = rng.choice(values)
        title = rng.choice([None, "T", "t"])
        made.append(await document(client, f"k{number}", title=title, metadata=metadata))
    return made


async def listed(client: httpx2.AsyncClient, limit: int, **body: Any) -> list[dict[str, Any]]:
    """All pages of a query."""
    found: list[dict[str, Any]] = []
    after = None
    while True:
        page = ok(await client.post(QUERY, json={**body, "limit": limit, "after": after}))
        assert len(page["items"]) <= limit
        found += page["items"]
        if page["next"] is None:
            return found
        assert len(page["items"]) == limit
        after = page["next"]


def key_of(found: dict[str, Any], field: str) -> Any:
    """What a document is ordered by; None where it is missing or of another type."""
    if field.startswith("$"):
        return found[field[1:]]
    value = found["metadata"].get(field)
    moments = {"2020-01-02": "2020-01-02T00:00", "2020-01-01T12:00Z": "2020-01-01T12:00"}
    if field == "at":
        return moments.get(value)
    return value if isinstance(value, str) == (field == "lang") else None


def in_order(documents: list[dict[str, Any]], sort: list[dict[str, str]]) -> list[str]:
    def compare(one: dict[str, Any], two: dict[str, Any]) -> int:
        for part in sort:
            left, right = key_of(one, part["field"]), key_of(two, part["field"])
            if left == right:
                continue
            if left is None or right is None:
                return 1 if left is None else -1
            return (1 if left > right else -1) * (-1 if part.get("order") == "desc" else 1)
        return 1 if one["id"] > two["id"] else -1

    return [found["id"] for found in sorted(documents, key=cmp_to_key(compare))]


SORTS: list[list[dict[str, str]]] = [
    [{"field": "year"}],
    [{"field": "year", "order": "desc"}],
    [{"field": "lang", "order": "asc"}],
    [{"field": "at", "order": "desc"}],
    [{"field": "$title"}],
    [{"field": "$title", "order": "desc"}, {"field": "year"}],
    [{"field": "lang", "order": "desc"}, {"field": "at"}, {"field": "$key", "order": "desc"}],
    [{"field": "$created_at", "order": "desc"}],
    [{"field": "$id", "order": "desc"}],
]


@pytest.mark.parametrize("state", ["ready", "declared"])
async def test_every_order_page_by_page(database_url: str, make_settings: Any, make_client: Any, state: str) -> None:
    client = await make_client(make_settings(database_url, worker_enabled=False))
    made = await filled(client, attributes=ATTRIBUTES if state == "ready" else {})
    if state == "declared":
        changed = ok(await client.patch(at("libraries", "shelf"), json={"attributes": ATTRIBUTES}))
        assert changed["attributes_ready"] == {}
    for sort in SORTS:
        for limit in (1, 5, 12, 100):
            found = await listed(client, limit, sort=sort)
            assert [item["id"] for item in found] == in_order(made, sort), (sort, limit)
        some = [item for item in made if item["metadata"]["even"]]
        found = await listed(client, 4, sort=sort, filter={"even": True})
        assert [item["id"] for item in found] == in_order(some, sort), sort


async def test_a_page_says_all_about_its_documents(client: httpx2.AsyncClient) -> None:
    made = await filled(client, 3)
    answer = ok(await client.post(QUERY, json={"total": True, "limit": 2}))
    assert answer["items"] == made[:2] and answer["total"] == 3 and answer["next"]
    answer = ok(await client.post(QUERY, json={"filter": {"n": {"$gt": 5}}, "total": True}))
    assert answer == {"items": [], "next": None, "total": 0}
    assert "total" not in ok(await client.post(QUERY, json={}))


async def test_a_condition_on_chunks_means_that_the_document_has_one(client: httpx2.AsyncClient) -> None:
    await library(client)
    for key, pages in (("a", [1, 2]), ("b", [2, 3]), ("c", [])):
        parts = [{"text": f"p{page}", "embedding": [1, 0, 0], "metadata": {"page": page}} for page in pages]
        await document(client, key, chunks=parts)

    async def keys(condition: dict[str, Any]) -> list[str]:
        return [item["key"] for item in await listed(client, 10, filter=condition)]

    assert await keys({"chunk.page": 2}) == ["a", "b"]
    assert await keys({"chunk.page": {"$ne": 2}}) == ["a", "b"]
    assert await keys({"chunk.page": 3, "$key": {"$ne": "a"}}) == ["b"]
    assert await keys({"chunk.$ordinal": {"$gte": 0}}) == ["a", "b"]
    answer = ok(await client.post(UPDATE, json={"filter": {"chunk.page": 1}, "patch": {"seen": True}}))
    assert answer == {"affected": 1} and await keys({"seen": True}) == ["a"]
    assert ok(await client.post(DELETE, json={"filter": {"chunk.page": 3}})) == {"affected": 1}
    assert await keys({}) == ["a", "c"]


async def test_updating_patches_metadata_and_leaves_the_chunks(client: httpx2.AsyncClient) -> None:
    made = await filled(client, 6)
    before = await chunks(client, "k2", embedding=True)
    body = {"filter": {"n": {"$gte": 2}}, "patch": {"n": None, "more": {"deep": [1]}}}
    assert ok(await client.post(UPDATE, json=body | {"dry_run": True})) == {"affected": 4}
    assert await listed(client, 100) == made
    assert ok(await client.post(UPDATE, json=body)) == {"affected": 4}
    changed = await listed(client, 100)
    assert changed[:2] == made[:2]
    for now, then in zip(changed[2:], made[2:], strict=True):
        expected = {name: value for name, value in then["metadata"].items() if name != "n"} | {"more": {"deep": [1]}}
        assert now["metadata"] == expected and now["version"] == then["version"] + 1
        assert now["updated_at"] > then["updated_at"]
    assert await chunks(client, "k2", embedding=True) == before


async def test_no_update_makes_metadata_too_large(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, max_metadata_bytes=200))
    await library(client)
    # of 200 bytes at most, but more with the spaces that PostgreSQL writes
    full = {str(number): 1 for number in range(20)}
    for key in (*"ab", None):
        await document(client, key, metadata=full if key == "a" else {"x": "y"})
    for number in range(140):
        await document(client, f"full{number}", metadata=full)
    assert ok(await client.post(UPDATE, json={"filter": EVERYTHING, "patch": {"one": 1}})) == {"affected": 143}
    assert ok(await client.post(UPDATE, json={"filter": {"x": "y"}, "patch": {"s": "s" * 150}})) == {"affected": 2}
    before = await listed(client, 1000)
    for filter, named in (({"$key": "b"}, "'b'"), (EVERYTHING, "the document "), ({"x": "y"}, "the document ")):
        body = {"filter": filter, "patch": {"t": "t" * 150}}
        refused = problem(await client.post(UPDATE, json=body), 400, "validation_failed")
        assert named in refused["detail"] and "at most 200 are allowed" in refused["detail"]
        assert refused["errors"][0]["path"] == "patch"
        assert ok(await client.post(UPDATE, json=body | {"dry_run": True}))["affected"] > 0
        problem(
            await client.post(UPDATE, json=body, headers={"Idempotency-Key": str(filter)[:9]}), 400, "validation_failed"
        )
    assert await listed(client, 1000) == before
    swap = {"filter": {"x": "y"}, "patch": {"s": None, "t": "t" * 150}}
    assert ok(await client.post(UPDATE, json=swap)) == {"affected": 2}


async def test_deleting_takes_the_chunks_along(client: httpx2.AsyncClient) -> None:
    await filled(client, 6)
    body: dict[str, Any] = {"filter": {"even": True}}
    assert ok(await client.post(DELETE, json=body | {"dry_run": True})) == {"affected": 3}
    assert ok(await client.post(DELETE, json=body)) == {"affected": 3}
    stats = ok(await client.get(at("libraries", "shelf", "stats")))
    assert (stats["documents"], stats["chunks"]) == (3, 3)
    assert ok(await client.post(DELETE, json=body)) == {"affected": 0}
    assert ok(await client.post(DELETE, json={"filter": EVERYTHING, "max_affected": 3})) == {"affected": 3}


@pytest.mark.parametrize("path", [UPDATE, DELETE])
async def test_more_than_may_be_affected_changes_nothing(client: httpx2.AsyncClient, path: str) -> None:
    made = await filled(client, 6)
    patch = {"patch": {"x": 1}} if path == UPDATE else {}
    for dry_run in (False, True):
        body = {"filter": {"even": True}, "max_affected": 2, "dry_run": dry_run, **patch}
        problem(await client.post(path, json=body), 409, "too_many_affected")
    assert await listed(client, 100) == made
    assert ok(await client.post(path, json={"filter": {"n": -1}, "max_affected": 0, **patch})) == {"affected": 0}


BAD = [
    (UPDATE, {"patch": {}}),
    (UPDATE, {"filter": {}, "patch": {"a": 1}}),
    (UPDATE, {"filter": None, "patch": {"a": 1}}),
    (UPDATE, {"filter": {"a": 1}}),
    (UPDATE, {"filter": {"a": 1}, "patch": []}),
    (UPDATE, {"filter": {"a": 1}, "patch": {"a": 1}, "max_affected": -1}),
    (UPDATE, {"filter": {"a": {"$gt": []}}, "patch": {"a": 1}}),
    (DELETE, {}),
    (DELETE, {"filter": {}}),
    (DELETE, {"filter": None}),
    (DELETE, {"filter": {"$and": []}}),
    (DELETE, {"filter": EVERYTHING, "more": 1}),
    (QUERY, {"sort": [{"field": "undeclared"}]}),
    (QUERY, {"sort": [{"field": "$text"}]}),
    (QUERY, {"sort": [{"field": "chunk.page"}]}),
    (QUERY, {"sort": [{"field": "year", "order": "up"}]}),
    (QUERY, {"sort": [{"field": "$id"}] * 5}),
    (QUERY, {"limit": 0}),
    (QUERY, {"limit": 1001}),
    (QUERY, {"after": "x"}),
    (QUERY, {"after": "kqNhYmOjYWJj"}),  # two keys that are no moment and no id
    (QUERY, {"after": "kA"}),
    (QUERY, {"filter": {"$or": 1}}),
]


async def test_bad_requests(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    await library(client, attributes=ATTRIBUTES)
    await document(client, "k", metadata={"a": 1})
    for path, body in BAD:
        with subtests.test(path=path, body=body):
            problem(await client.post(path, json=body), 400, "validation_failed")
            assert len(await listed(client, 10)) == 1


async def test_no_library(client: httpx2.AsyncClient) -> None:
    for path, body in ((QUERY, {}), (UPDATE, {"filter": EVERYTHING, "patch": {}}), (DELETE, {"filter": EVERYTHING})):
        problem(await client.post(path, json=body), 404, "library_not_found")


async def test_a_referenced_document_keeps_all_from_being_deleted(
    client: httpx2.AsyncClient, database_url: str
) -> None:
    made = await filled(client, 3)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("create table public.orders (document uuid references pgshelf.documents (id))")
        connection.execute("insert into public.orders values (%s)", [made[1]["id"]])
    problem(await client.post(DELETE, json={"filter": EVERYTHING}), 409, "referenced")
    assert len(await listed(client, 10)) == 3


async def test_overlapping_changes_do_not_deadlock(client: httpx2.AsyncClient) -> None:
    """Documents are locked in the order of their ids, whatever the filters say."""
    await filled(client, 20, attributes=ATTRIBUTES)
    conditions = [{"n": {"$gte": 0}}, {"even": True}, {"n": {"$lt": 15}}, {"$not": {"n": 3}}]

    async def change(number: int) -> None:
        body = {"filter": conditions[number % 4], "patch": {f"by{number}": number, "year": number}}
        ok(await client.post(UPDATE, json=body))

    await asyncio.gather(*(change(number) for number in range(24)))
    found = await listed(client, 100)
    assert all(f"by{number}" in item["metadata"] for item in found for number in range(0, 24, 4))

    async def ready() -> bool:
        now = ok(await client.get(at("libraries", "shelf")))
        return bool(now["attributes_ready"] == ATTRIBUTES)

    await until(ready)
    years = {item["id"]: item["metadata"]["year"] for item in found}
    for year in set(years.values()):
        items = await listed(client, 100, filter={"year": year})
        assert {item["id"] for item in items} == {key for key, value in years.items() if value == year}


async def test_a_ready_attribute_is_sorted_by_its_index(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client, attributes={"year": "number"})
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(
            "insert into pgshelf.documents (place, library_id, metadata) select 0, l.id, jsonb_build_object('year', i)"
            " from pgshelf.libraries l, generate_series(1, 3000) i"
        )
        connection.execute("vacuum analyze pgshelf.documents, pgshelf.attribute_values")
        row = connection.execute(
            "select pgshelf.stored_order(l, 'year', 'v.num', 'float8', true, pgshelf.document_condition(l, null))"
            " from pgshelf.libraries l"
        ).fetchone()
        assert row is not None
        raw = psycopg.RawCursor(connection)
        plan = str(
            raw.execute(f"explain (analyze, costs off) {row[0]}".encode(), ['["2000", null]', None, 10]).fetchall()
        )
    assert "Backward using attribute_values_num_idx" in plan
    assert "(never executed)" in plan  # nobody looked for documents without a year


@pytest.mark.parametrize("path", [UPDATE, DELETE])
async def test_a_document_whose_chunks_are_replaced_meanwhile_is_left_alone(
    client: httpx2.AsyncClient, database_url: str, path: str
) -> None:
    await library(client, dimension=2)
    chunk = {"text": "first", "embedding": [1, 0], "metadata": {"page": 1}}
    for key in ("replaced", "stays"):
        ok(await client.put(at("libraries", "shelf", "documents", key), json={"chunks": [chunk]}), 201)
    body = {"filter": {"chunk.page": 1}, **({"patch": {"seen": True}} if path == UPDATE else {})}
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    with psycopg.connect(database_url) as writer, psycopg.connect(database_url, autocommit=True) as watcher:
        put = """select pgshelf.put_document('shelf', 'replaced', texts => '{second}', embeddings => '{"[0,1]"}',
          chunk_metadata => array['{"page": 2}'::jsonb])"""
        writer.execute(put)
        answer = asyncio.create_task(client.post(path, json=body))

        async def waits() -> bool:
            return watcher.execute(waiting).fetchone() == (1,)

        await until(waits)
        writer.commit()
    assert ok(await answer) == {"affected": 1}
    left = ok(await client.get(at("libraries", "shelf", "documents", "replaced")))
    assert left["metadata"] == {}
