"""Documents over REST: write whole, find by key or id, change, delete; versions guard lost updates."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import psycopg
import pytest

from tests.rest.asking import at, chunks, document, library, local, ok, pages, problem, until

DOCUMENTS = at("libraries", "shelf", "documents")
KEYS = [
    "guide/vacuum", "/", "//", "a/../b", "...", "100%", "%2F", "%", "a b", " edge ", "ключ", "文書", "\U0001f4da", "é",
    "a?b=c&d#e", "a+b", "x" * 512, "\U0001f4da" * 512, "a\tb\nc", "'; --", "chunks", "null", "0",
    "batch", "delete", "query", "update", "deleted",
]  # fmt: skip


async def test_a_text_is_split_and_embedded_at_once(client: httpx2.AsyncClient) -> None:
    await local(client, chunking={"size": 100})
    text = "# Vacuum\n\n" + "VACUUM reclaims storage occupied by dead tuples. " * 10
    body = {"key": "vacuum", "title": "Vacuum", "source": "https://e.org/v", "text": text, "metadata": {"a": [1, None]}}
    response = await client.post(DOCUMENTS, json=body)
    made = ok(response, 201)
    assert response.headers["location"] == f"{DOCUMENTS}/{made['id']}"
    assert response.headers["etag"] == '"1"'
    total = made["chunks"]["total"]
    assert total > 4 and made["chunks"] == {"total": total, "pending": 0, "failed": 0}
    known = {name: made[name] for name in ("key", "title", "source", "metadata", "version", "status")}
    expected = {name: body[name] for name in ("key", "title", "source", "metadata")}
    assert known == expected | {"version": 1, "status": "ready"}
    found = await chunks(client, "vacuum", embedding=True)
    assert [item["ordinal"] for item in found] == list(range(total))
    assert all(len(item["text"]) <= 100 and len(item["embedding"]) == 256 for item in found)
    assert "".join("".join(item["text"].split()) for item in found) == "".join(text.split())


async def test_a_document_is_found_by_key_and_by_id(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    await library(client)
    for key in KEYS:
        with subtests.test(key=key):
            made = await document(client, key)
            assert made["key"] == key
            for name in (key, made["id"], made["id"].upper()):
                response = await client.get(at("libraries", "shelf", "documents", name))
                assert (ok(response), response.headers["etag"]) == (made, '"1"')
                assert len(await chunks(client, name)) == 1
            ok(await client.patch(at("libraries", "shelf", "documents", key), json={"title": "t"}))
            body = {"chunks": [{"text": "new", "embedding": [0, 1, 0]}]}
            put = ok(await client.put(at("libraries", "shelf", "documents", key), json=body))
            assert (put["id"], put["version"], put["key"]) == (made["id"], 3, key)
            assert (await client.delete(at("libraries", "shelf", "documents", key))).status_code == 204
            problem(await client.get(at("libraries", "shelf", "documents", key)), 404, "document_not_found")


async def test_a_write_is_one_statement(
    database_url: str, make_settings: Any, make_client: Any, statements: list[str]
) -> None:
    """With its row of the audit log, behind one that reads what there is; a batch reads twice."""
    client = await make_client(make_settings(database_url, worker_enabled=False))
    await local(client)
    for text, status in (("One.", 201), ("Two.", 200)):
        statements.clear()
        ok(await client.post(DOCUMENTS, json={"key": "a", "text": text}), status)
        read, written = statements
        assert "library_config" in read and "write_document" in written and "audit" in written
    statements.clear()
    several = [{"key": key, "text": key} for key in "abc"]
    ok(await client.post(f"{DOCUMENTS}/batch", json={"documents": several}))
    assert ["write_documents" in statement and "audit" in statement for statement in statements] == [False, False, True]
    with psycopg.connect(database_url) as connection:
        logged = connection.execute(
            "select document, count, library from pgshelf.audit_log where action = 'document.write' order by at"
        ).fetchall()
    assert logged == [("a", 1, "shelf"), ("a", 1, "shelf"), (None, 3, "shelf")]


async def test_documents_without_a_key_are_new_each_time(client: httpx2.AsyncClient) -> None:
    await library(client)
    first, second = await document(client), await document(client)
    assert first["key"] is None and first["id"] != second["id"]


async def test_the_same_key_replaces_and_keeps_the_id(client: httpx2.AsyncClient) -> None:
    await library(client)
    made = ok(await client.post(DOCUMENTS, json={"key": "k", "title": "T", "metadata": {"a": 1}, "chunks": []}), 201)
    again = await client.post(DOCUMENTS, json={"key": "k", "chunks": [{"text": "x", "embedding": [1, 2, 3]}]})
    replaced = ok(again, 200)
    assert again.headers["etag"] == '"2"' and again.headers["location"] == f"{DOCUMENTS}/{made['id']}"
    assert (replaced["id"], replaced["title"], replaced["metadata"]) == (made["id"], None, {})
    assert replaced["created_at"] == made["created_at"] and replaced["updated_at"] > made["updated_at"]
    assert replaced["chunks"]["total"] == 1


async def test_the_same_key_in_two_libraries_is_two_documents(client: httpx2.AsyncClient) -> None:
    await library(client, "shelf")
    await library(client, "other")
    first, second = await document(client, "k"), await document(client, "k", into="other")
    problem(await client.get(at("libraries", "other", "documents", first["id"])), 404, "document_not_found")
    problem(await client.delete(at("libraries", "shelf", "documents", second["id"])), 404, "document_not_found")
    body = {"chunks": [{"text": "x", "embedding": [1, 0, 0]}]}
    problem(await client.put(at("libraries", "other", "documents", first["id"]), json=body), 404, "document_not_found")


async def test_unchanged_chunks_keep_their_ids_and_embeddings(client: httpx2.AsyncClient, database_url: str) -> None:
    await local(client)
    texts = ["tables", "indexes", "views", "views"]
    await document(client, "k", chunks=[{"text": text} for text in texts])
    with psycopg.connect(database_url) as connection:  # vectors no embedder would make: kept ones are recognised
        connection.execute(
            f"update pgshelf.chunks set embedding = (array_fill(ordinal + 1, array[256]))::{await vector(connection)}"
        )
    before = {item["ordinal"]: item for item in await chunks(client, "k", embedding=True)}
    moved = [{"text": "views"}, {"text": "tables", "metadata": {"n": 1}}, {"text": "triggers"}, {"text": "views"}]
    written = await document(client, "k", chunks=moved)
    assert written["status"] == "ready"
    after = await chunks(client, "k", embedding=True)
    kept = {item["id"]: item["embedding"] for item in before.values()}
    assert [after[i]["id"] for i in (0, 1, 3)] == [before[2]["id"], before[0]["id"], before[3]["id"]]
    assert [after[i]["embedding"] for i in (0, 1, 3)] == [kept[after[i]["id"]] for i in (0, 1, 3)]
    assert after[1]["metadata"] == {"n": 1}
    assert after[2]["id"] not in kept and after[2]["embedding"] not in kept.values()


async def vector(connection: psycopg.Connection[Any]) -> str:
    row = connection.execute(
        "select extnamespace::regnamespace || '.vector' from pg_extension where extname = 'vector'"
    ).fetchone()
    assert row
    return str(row[0])


async def test_put_by_key_creates_and_replaces(client: httpx2.AsyncClient) -> None:
    await library(client)
    path, body = f"{DOCUMENTS}/a%2Fb", {"chunks": [{"text": "x", "embedding": [1, 0, 0]}]}
    response = await client.put(path, json=body)
    made = ok(response, 201)
    assert made["key"] == "a/b" and response.headers["location"] == f"{DOCUMENTS}/{made['id']}"
    assert ok(await client.put(path, json=body | {"key": "a/b"}))["id"] == made["id"]
    problem(await client.put(path, json=body | {"key": "b"}), 400, "validation_failed")


async def test_put_by_id_replaces_what_exists(client: httpx2.AsyncClient) -> None:
    await library(client)
    made = await document(client, "k", title="old")
    body = {"title": "new", "chunks": [{"text": "x", "embedding": [1, 0, 0]}]}
    replaced = ok(await client.put(f"{DOCUMENTS}/{made['id']}", json=body))
    assert (replaced["key"], replaced["title"], replaced["version"]) == ("k", "new", 2)
    problem(await client.put(f"{DOCUMENTS}/{made['id']}", json=body | {"key": "k"}), 400, "validation_failed")
    unknown = "00000000-0000-4000-8000-000000000000"
    missing = problem(await client.put(f"{DOCUMENTS}/{unknown}", json=body), 404, "document_not_found")
    assert "key" in missing["detail"]


async def test_if_match_guards_lost_updates(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "k")
    path, body = f"{DOCUMENTS}/k", {"chunks": [{"text": "x", "embedding": [1, 0, 0]}]}
    for tag in ('"2"', '"0"', '"999999999999999999"'):
        stale = {"If-Match": tag}
        for response in (
            await client.put(path, json=body, headers=stale),
            await client.patch(path, json={"title": "x"}, headers=stale),
            await client.delete(path, headers=stale),
        ):
            assert "version 1" in problem(response, 409, "version_mismatch")["detail"]
    changed = await client.patch(path, json={"title": "x"}, headers={"If-Match": '"1"'})
    assert changed.headers["etag"] == '"2"'
    put = await client.put(path, json=body, headers={"If-Match": changed.headers["etag"]})
    assert put.headers["etag"] == '"3"'
    ok(await client.patch(path, json={}, headers={"If-Match": "*"}))
    ok(await client.delete(path, headers={"If-Match": 'W/"4"'}), 204)
    problem(await client.put(path, json=body, headers={"If-Match": '"4"'}), 409, "version_mismatch")
    problem(await client.get(path), 404, "document_not_found")


async def test_of_many_writers_with_one_version_one_wins(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "k")
    writes = [
        client.patch(f"{DOCUMENTS}/k", json={"metadata": {str(n): n}}, headers={"If-Match": '"1"'}) for n in range(8)
    ]
    assert sorted(answer.status_code for answer in await asyncio.gather(*writes)) == [200] + [409] * 7
    assert len(ok(await client.get(f"{DOCUMENTS}/k"))["metadata"]) == 1


async def test_many_writers_of_a_new_key_make_one_document(client: httpx2.AsyncClient) -> None:
    await library(client)
    body = {"key": "k", "chunks": [{"text": "x", "embedding": [1, 0, 0]}]}
    answers = await asyncio.gather(*[client.post(DOCUMENTS, json=body) for _ in range(8)])
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert ok(await client.get(f"{DOCUMENTS}/k"))["version"] == 8
    assert len(await chunks(client, "k")) == 1


async def test_a_patch_changes_the_document_and_leaves_its_chunks(client: httpx2.AsyncClient) -> None:
    await library(client)
    made = await document(client, "k", title="T", source="S", metadata={"a": 1})
    before = await chunks(client, "k", embedding=True)
    response = await client.patch(f"{DOCUMENTS}/k", json={"title": None, "metadata": {"b": {"c": 2}}})
    changed = ok(response)
    assert changed == made | {
        "title": None,
        "metadata": {"a": 1, "b": {"c": 2}},
        "version": 2,
        "updated_at": changed["updated_at"],
    }
    assert response.headers["etag"] == '"2"'
    assert ok(await client.patch(f"{DOCUMENTS}/{made['id']}", json={"source": "s2"}))["source"] == "s2"
    assert await chunks(client, "k", embedding=True) == before


async def test_lists_are_in_the_order_of_creation_and_stable(client: httpx2.AsyncClient) -> None:
    await library(client)
    keys = [f"{number:02}" for number in range(12)]
    for key in keys:
        await document(client, key)
    assert [item["key"] for item in await pages(client, DOCUMENTS, 5)] == keys
    first = ok(await client.get(DOCUMENTS, params={"limit": 4}))
    ok(await client.delete(f"{DOCUMENTS}/03"), 204)  # where the page ended
    ok(await client.delete(f"{DOCUMENTS}/05"), 204)
    await document(client, "06", title="replaced: it stays where it was")
    await document(client, "new")
    rest = ok(await client.get(DOCUMENTS, params={"limit": 50, "after": first["next"]}))
    assert [item["key"] for item in rest["items"]] == ["04", *keys[6:], "new"]
    assert rest["next"] is None


async def test_paging_while_others_write_misses_and_repeats_nothing(client: httpx2.AsyncClient) -> None:
    await library(client)
    there = [f"old {number}" for number in range(30)]
    for key in there:
        await document(client, key)

    async def write() -> None:
        for number in range(20):
            await document(client, f"new {number}")
            await document(client, f"old {number}", title="again")

    (found, _) = await asyncio.gather(pages(client, DOCUMENTS, 4), write())
    keys = [item["key"] for item in found]
    assert len(set(keys)) == len(keys)
    assert [key for key in keys if key.startswith("old")] == there


async def test_without_waiting_the_worker_makes_it_ready(client: httpx2.AsyncClient) -> None:
    await local(client)
    body = {"key": "k", "text": "VACUUM reclaims storage."}
    for method, path in (("POST", DOCUMENTS), ("PUT", f"{DOCUMENTS}/k%2F2")):
        response = await client.request(
            method, path, params={"wait": "false"}, json=body if method == "POST" else {"text": "x"}
        )
        made = ok(response, 202)
        assert made["status"] == "pending" and made["chunks"] == {"total": 1, "pending": 1, "failed": 0}
        assert response.headers["etag"] == f'"{made["version"]}-1-0"'
        path = response.headers["location"]

        async def ready(path: str = path) -> bool:
            return bool(ok(await client.get(path))["status"] == "ready")

        await until(ready)
    hits = ok(await client.post(at("libraries", "shelf", "search"), json={"query": "VACUUM reclaims storage."}))["hits"]
    assert hits[0]["key"] == "k"


async def test_without_waiting_complete_documents_are_ready(client: httpx2.AsyncClient) -> None:
    await local(client)
    complete = {"key": "k", "chunks": [{"text": "x", "embedding": [1.0] + [0.0] * 255}]}
    ok(await client.post(f"{DOCUMENTS}?wait=false", json=complete), 201)
    ok(await client.post(f"{DOCUMENTS}?wait=false", json=complete), 200)
    same = {"key": "k", "chunks": [{"text": "x"}]}  # its embedding is known
    ok(await client.post(f"{DOCUMENTS}?wait=false", json=same), 200)


async def test_deleting_takes_the_chunks_along(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    made = await document(client, "k", [1, 0, 0], [0, 1, 0])
    chunk = (await chunks(client, "k"))[0]["id"]
    await document(client, "other")
    assert (await client.delete(f"{DOCUMENTS}/{made['id']}")).status_code == 204
    for name in ("k", made["id"]):
        for method in (client.get, client.delete):
            problem(await method(f"{DOCUMENTS}/{name}"), 404, "document_not_found")
        problem(await client.get(f"{DOCUMENTS}/{name}/chunks"), 404, "document_not_found")
    problem(await client.get(at("libraries", "shelf", "chunks", chunk)), 404, "chunk_not_found")
    with psycopg.connect(database_url) as connection:
        assert connection.execute("select count(*) from pgshelf.chunks").fetchone() == (1,)
    assert (await document(client, "k"))["id"] != made["id"]


async def test_a_referenced_document_stays(client: httpx2.AsyncClient, database_url: str) -> None:
    await library(client)
    made = await document(client, "k")
    with psycopg.connect(database_url) as connection:
        connection.execute("create table orders (manual uuid references pgshelf.documents (id))")
        connection.execute("insert into orders values (%s)", [made["id"]])
    problem(await client.delete(f"{DOCUMENTS}/k"), 409, "referenced")
    assert ok(await client.get(f"{DOCUMENTS}/k")) == made and len(await chunks(client, "k")) == 1
    replaced = await document(client, "k", [0, 1, 0])  # replacing keeps the id, so references may stay
    assert replaced["id"] == made["id"]


async def test_an_empty_document_is_ready(client: httpx2.AsyncClient) -> None:
    await local(client)
    made = await document(client, "k", chunks=[])
    assert made["status"] == "ready" and made["chunks"]["total"] == 0
    assert await chunks(client, "k") == []


async def test_a_long_text_makes_many_chunks_up_to_the_limit(
    database_url: str, make_settings: Any, make_client: Any
) -> None:
    client = await make_client(make_settings(database_url, max_chunks=5))
    await local(client, chunking={"size": 50})
    word = "storage " * 6 + "\n\n"
    assert (await document(client, "k", text=word * 5))["chunks"]["total"] == 5
    body = problem(await client.post(DOCUMENTS, json={"key": "l", "text": word * 6}), 400, "validation_failed")
    assert "at most 5" in body["detail"] and "PGSHELF_" not in body["detail"]
    problem(await client.get(f"{DOCUMENTS}/l"), 404, "document_not_found")


async def test_a_write_of_a_document_answers_itself_with_its_own_state(client: httpx2.AsyncClient) -> None:
    await library(client)
    for path in (DOCUMENTS, at("libraries", ok(await client.get(at("libraries", "shelf")))["id"], "documents")):
        response = await client.post(path, json={"key": "k", "chunks": [{"text": "x", "embedding": [1, 0, 0]}]})
        assert response.json() == ok(await client.get(response.headers["location"]))


async def test_metadata_has_a_size_however_many_patches_it_comes_in(
    database_url: str, make_settings: Any, make_client: Any
) -> None:
    client = await make_client(make_settings(database_url, max_metadata_bytes=200))
    await library(client)
    await document(client, "k")
    (chunk,) = await chunks(client, "k")
    for parts in ((), ("documents", "k"), ("chunks", chunk["id"])):
        path = at("libraries", "shelf", *parts)
        for number in range(3):
            ok(await client.patch(path, json={"metadata": {str(number): "x" * 50}}))
        before = ok(await client.get(path))
        body = problem(await client.patch(path, json={"metadata": {"3": "x" * 50}}), 400, "validation_failed")
        assert "at most 200" in body["detail"]
        assert ok(await client.get(path)) == before
        ok(await client.patch(path, json={"metadata": {"0": None, "3": "x" * 50}}))


async def test_metadata_that_is_not_asked_about_may_have_any_size(
    database_url: str, make_settings: Any, make_client: Any
) -> None:
    client = await make_client(make_settings(database_url, max_metadata_bytes=200))
    await library(client)
    await document(client, "k")
    (chunk,) = await chunks(client, "k")
    with psycopg.connect(database_url) as connection:  # there SQL sets no limit
        for table in ("libraries", "documents", "chunks"):
            connection.execute(f"update pgshelf.{table} set metadata = jsonb_build_object('a', repeat('x', 300))")
    changed = ok(await client.patch(f"{DOCUMENTS}/k", json={"title": "t", "source": "s"}))
    assert (changed["title"], changed["source"], len(changed["metadata"]["a"])) == ("t", "s", 300)
    path = at("libraries", "shelf", "chunks", chunk["id"])
    assert ok(await client.patch(path, json={"embedding": [0, 1, 0]}))["metadata"] == changed["metadata"]
    assert ok(await client.patch(at("libraries", "shelf"), json={"description": "d"}))["description"] == "d"
    for address in (f"{DOCUMENTS}/k", path, at("libraries", "shelf")):
        problem(await client.patch(address, json={"metadata": {"b": 1}}), 400, "validation_failed")
        assert ok(await client.patch(address, json={"metadata": {"a": None}}))["metadata"] == {}


async def test_a_long_text_keeps_nobody_else_waiting(client: httpx2.AsyncClient) -> None:
    await local(client, chunking={"size": 20_000})
    text = "Storage is reclaimed by vacuum, word after word. " * 30_000
    writing = asyncio.create_task(client.post(DOCUMENTS, json={"key": "k", "text": text}, timeout=60))
    longest = 0.0
    while not writing.done():
        started = asyncio.get_running_loop().time()
        ok(await client.get("/health"))
        await asyncio.sleep(0.01)
        longest = max(longest, asyncio.get_running_loop().time() - started)
    assert ok(writing.result(), 201)["chunks"]["total"] > 50
    assert longest < 1


async def test_whoever_has_a_document_as_it_is_does_not_get_it_again(client: httpx2.AsyncClient) -> None:
    await library(client)
    body = {"key": "k", "chunks": [{"text": "x", "embedding": [1, 0, 0]}]}
    tag = (await client.post(DOCUMENTS, json=body)).headers["etag"]
    path = f"{DOCUMENTS}/k"
    for known in (tag, f"W/{tag}", f'"0", W/{tag} ,"9"', "*", f'"a,b",{tag}'):
        response = await client.get(path, headers={"If-None-Match": known})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", tag), known
        assert "content-type" not in response.headers
    for other in ('"0"', 'W/"0"', tag.strip('"'), "", "nonsense", '"1'):
        assert ok(await client.get(path, headers={"If-None-Match": other}))["key"] == "k", other
    ok(await client.patch(path, json={"title": "T"}))
    assert ok(await client.get(path, headers={"If-None-Match": tag}))["title"] == "T"
    problem(await client.get(f"{path}2", headers={"If-None-Match": "*"}), 404, "document_not_found")


async def test_a_document_that_has_got_its_vectors_is_another_one(client: httpx2.AsyncClient) -> None:
    await local(client)
    made = await client.post(f"{DOCUMENTS}?wait=false", json={"key": "k", "text": "VACUUM reclaims storage."})
    path, tag = f"{DOCUMENTS}/k", made.headers["etag"]
    assert (ok(made, 202)["status"], tag) == ("pending", '"1-1-0"')

    async def embedded() -> bool:
        response = await client.get(path, headers={"If-None-Match": tag})
        return response.status_code == 200 and bool(ok(response)["status"] == "ready")

    await until(embedded)
    assert (await client.get(path)).headers["etag"] == '"1"'
    changed = ok(await client.patch(path, json={"title": "T"}, headers={"If-Match": tag}))
    assert changed["version"] == 2, "nobody else has changed it"
    problem(await client.patch(path, json={"title": "U"}, headers={"If-Match": tag}), 409, "version_mismatch")
