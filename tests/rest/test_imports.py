"""Imports, exports and batches over REST: what is written, what is refused, what is told."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import numpy as np
import psycopg
import pytest

from pgshelf import imports
from tests.cohere_server import status
from tests.conftest import LiveServer, MakeClient, MakeSettings
from tests.openai_server import OpenAIServer
from tests.rest.asking import at, chunks, document, library, local, ok, pages, problem, until

IMPORT = at("libraries", "shelf", "import")
EXPORT = at("libraries", "shelf", "export")
BATCH = at("libraries", "shelf", "documents", "batch")
NDJSON = {"Content-Type": "application/x-ndjson"}


def entry(key: str | None = None, *vectors: list[float], **fields: Any) -> dict[str, Any]:
    given = [{"text": f"chunk {index}", "embedding": vector} for index, vector in enumerate(vectors or ([1, 0, 0],))]
    return {**({"key": key} if key else {}), "chunks": given, **fields}


def lines(*documents: Any) -> bytes:
    return b"".join((item if isinstance(item, bytes) else json.dumps(item).encode()) + b"\n" for item in documents)


async def send(client: httpx2.AsyncClient, body: Any, path: str = IMPORT, **headers: str) -> list[dict[str, Any]]:
    response = await client.post(path, content=body, headers={**NDJSON, **headers})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def done(**counts: int) -> dict[str, Any]:
    return {"done": True, "lines": 0, "skipped": 0, "created": 0, "replaced": 0, "pending": 0, "failed": 0, **counts}


def shown(found: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """What the batches say: their first and last lines."""
    return [tuple(item["lines"]) for item in found if "failed" in item and "done" not in item]


async def test_documents_are_created_and_replaced(client: httpx2.AsyncClient) -> None:
    await library(client)
    found = await send(client, lines(entry("a", title="A", source="s", metadata={"n": 1}), entry(), {"chunks": []}))
    assert found == [
        {"lines": [1, 3], "created": 3, "replaced": 0, "pending": 0, "failed": []},
        done(lines=3, created=3),
    ]
    kept = (await chunks(client, "a"))[0]["id"]
    found = await send(client, lines(entry("a", [1, 0, 0], [0, 1, 0]), entry("b")))
    assert found[-1] == done(lines=2, created=1, replaced=1)
    stored = ok(await client.get(at("libraries", "shelf", "documents", "a")))
    assert (stored["version"], stored["title"], stored["chunks"]["total"]) == (2, None, 2)
    assert (await chunks(client, "a"))[0]["id"] == kept


async def test_bad_lines_are_listed_and_spoil_no_other(client: httpx2.AsyncClient) -> None:
    await library(client)
    bad = [
        b"{broken",
        {"key": "x", "surprise": 1, "chunks": []},
        {"key": "no-text"},
        entry("nul", title="a\0b"),
        entry("wrong", [1, 0]),
        entry("zero", [0, 0, 0]),
        {"key": "none", "chunks": [{"text": "has no vector"}]},
        {"key": "metadata", "metadata": {"a": "\0"}, "chunks": []},
        b'"\xff"',
        entry("lone", title="\ud800"),
    ]
    good = [entry(f"good {n}") for n in range(len(bad) + 1)]
    mixed = [good[0]] + [item for pair in zip(bad, good[1:], strict=True) for item in pair]
    *batches, last = await send(client, lines(*mixed))
    failed = [item for batch in batches for item in batch["failed"]]
    assert [item["line"] for item in failed] == list(range(2, 2 * len(bad) + 1, 2))
    codes = [item["error"]["code"] for item in failed]
    assert codes[:3] == ["invalid_json", "validation_failed", "validation_failed"]
    assert codes[3:7] == ["invalid_text", "wrong_dimension", "zero_vector", "embedding_required"]
    assert set(codes[7:]) <= {"invalid_text", "invalid_json", "validation_failed"}
    assert failed[1]["error"]["errors"][0]["path"] and failed[4]["key"] == "wrong"
    assert (last["created"], last["failed"]) == (len(good), len(bad))
    stored = await pages(client, at("libraries", "shelf", "documents"), 100)
    assert [item["key"] for item in stored] == [item["key"] for item in good]


async def test_a_file_for_another_library_is_refused_at_once(client: httpx2.AsyncClient, statements: list[str]) -> None:
    """Not document by document: two statements tell of all of them."""
    await library(client)
    found = await send(client, lines(*[entry(f"k{n}", [1.0]) for n in range(200)]))
    assert found[-1]["failed"] == 200
    assert sum("write_documents" in statement or "refused" in statement for statement in statements) == 2


async def test_of_two_documents_with_one_key_the_later_is_the_last(client: httpx2.AsyncClient) -> None:
    await library(client)
    found = await send(client, lines(entry("a", title="1"), entry("b"), entry("a", title="2"), entry("a", title="3")))
    assert found[-1] == done(lines=4, created=2, replaced=2)
    stored = ok(await client.get(at("libraries", "shelf", "documents", "a")))
    assert (stored["title"], stored["version"]) == ("3", 3)


async def test_lines_are_counted_also_empty_ones_and_the_last_without_an_end(client: httpx2.AsyncClient) -> None:
    await library(client)
    body = b"\n" + lines(entry("a")) + b"  \r\n" + lines(b"{") + lines(entry("b")).rstrip()
    found = await send(client, body)
    assert [item["line"] for item in found[0]["failed"]] == [4]
    assert found[-1] == done(lines=5, created=2, failed=1)
    assert await send(client, b"") == [done()]


async def test_the_stream_has_no_limit_but_a_line_has(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_url, max_body_bytes=2000, import_batch=4))
    await library(client)
    long = lines(entry("long", title="x" * 3000))

    async def body() -> AsyncIterator[bytes]:
        for number in range(40):
            yield lines(entry(f"k{number}", title="x" * 100))
            if number == 9:
                for at_byte in range(0, len(long), 7):
                    yield long[at_byte : at_byte + 7]

    found = await send(client, body())
    assert found[-1] == done(lines=41, created=40, failed=1)
    assert len(found) > 10 and shown(found)[0] == (1, 4)
    [failure] = [failure for batch in found[:-1] for failure in batch["failed"]]
    assert (failure["line"], failure["error"]["code"]) == (11, "body_too_large")


async def test_gzip(client: httpx2.AsyncClient) -> None:
    await library(client)
    packed = gzip.compress(lines(entry("a"))) + gzip.compress(lines(entry("b")) * 3)
    found = await send(client, packed, **{"Content-Encoding": "gzip"})
    assert found[-1] == done(lines=4, created=2, replaced=2)
    for wrong in (packed[:-9], b"no gzip"):
        found = await send(client, wrong, **{"Content-Encoding": "gzip"})
        assert found[-1]["error"]["code"] == "validation_failed" and "committed_lines" in found[-1]
    response = await client.post(IMPORT, content=b"", headers={**NDJSON, "Content-Encoding": "br"})
    problem(response, 415, "unsupported_media_type")


async def test_only_lines_are_taken_and_only_here(client: httpx2.AsyncClient) -> None:
    await library(client)
    problem(await client.post(IMPORT, json=entry()), 415, "unsupported_media_type")
    path = at("libraries", "shelf", "documents")
    problem(await client.post(path, content=lines(entry()), headers=NDJSON), 415, "unsupported_media_type")
    missing = await client.post(at("libraries", "nope", "import"), content=lines(entry()), headers=NDJSON)
    problem(missing, 404, "library_not_found")
    problem(await client.get(at("libraries", "nope", "export")), 404, "library_not_found")


async def test_the_local_embedder_embeds_at_once_unless_told(client: httpx2.AsyncClient) -> None:
    await local(client)
    body = lines({"key": "a", "text": "one two three"}, {"key": "b", "text": "\u200b"}, {"key": "c", "text": "four"})
    found = await send(client, body)
    assert found[-1]["pending"] == 0
    later = await send(client, lines({"key": "d", "text": "five six"}), IMPORT + "?wait=false")
    assert later[-1]["pending"] == 1
    # what is there already needs no embedding
    ids = [item["id"] for item in await chunks(client, "a")]
    await send(client, body)
    assert [item["id"] for item in await chunks(client, "a")] == ids


async def test_a_named_import_goes_on_where_it_ended(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_url, import_batch=2))
    await library(client)
    body = lines(*[entry() for _ in range(5)])
    name = {"Idempotency-Key": "night"}
    found = await send(client, body[: body.index(b"\n", len(body) // 2)], **name)
    came = found[-1]["lines"]
    assert found[-1]["created"] == came == 3
    found = await send(client, body, **name)
    assert found[-1] == done(lines=5, skipped=3, created=2) and shown(found) == [(4, 5)]
    assert (await send(client, body, **name))[-1] == done(lines=5, skipped=5)
    assert len(await pages(client, at("libraries", "shelf", "documents"), 100)) == 5
    for other in (lines(entry("other")) * 9, lines(entry())):
        found = await send(client, other, **name)
        assert found[-1]["error"]["code"] == "import_differs" and found[-1]["committed_lines"] == 5
    assert (await send(client, body, **{"Idempotency-Key": "day"}))[-1]["created"] == 5


async def test_one_runner_at_a_time_and_none_that_was_replaced(
    client: httpx2.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await library(client)
    name = {**NDJSON, "Idempotency-Key": "n"}
    go_on = asyncio.Event()
    monkeypatch.setattr(imports, "PAUSE", 0.05)
    monkeypatch.setattr(imports, "BEAT", 0.05)

    async def body() -> AsyncIterator[bytes]:
        yield lines(entry("a"))
        await go_on.wait()
        yield lines(entry("b"))

    first = asyncio.create_task(client.post(IMPORT, content=body(), headers=name))

    async def committed() -> bool:
        return len(await pages(client, at("libraries", "shelf", "documents"), 10)) == 1

    await until(committed)
    refused = problem(await client.post(IMPORT, content=lines(entry("a")), headers=name), 409, "import_running")
    assert "'n'" in refused["detail"]
    with psycopg.connect(database_url, autocommit=True) as db:
        db.execute("update pgshelf.imports set runner = gen_random_uuid()")
    go_on.set()
    last = json.loads((await first).text.splitlines()[-1])
    assert last["error"]["code"] == "import_running" and last["committed_lines"] == 1
    assert len(await pages(client, at("libraries", "shelf", "documents"), 10)) == 1


async def test_what_breaks_off_tells_how_far_it_came(
    client: httpx2.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await library(client)
    monkeypatch.setattr(imports, "PAUSE", 0.05)

    async def body() -> AsyncIterator[bytes]:
        yield lines(entry("a"), entry("b"))
        await asyncio.sleep(0.5)
        ok(await client.delete(at("libraries", "shelf")), 204)
        yield lines(entry("c"))

    found = await send(client, body())
    assert shown(found) == [(1, 2)]
    assert found[-1]["error"]["code"] == "library_not_found" and found[-1]["committed_lines"] == 2


async def test_results_come_while_the_body_is_still_sent(live_server: LiveServer, database_url: str) -> None:
    """Over a socket, by a client that speaks and listens at once; and by one that reads only at the end."""
    async with httpx2.AsyncClient(base_url=live_server.url, timeout=30) as client:
        await library(client)
        body = lines(*[entry(f"k{n}", title="x" * 50) for n in range(3000)])

        async def slow() -> AsyncIterator[bytes]:
            for at_byte in range(0, len(body), 5000):
                yield body[at_byte : at_byte + 5000]

        found = await send(client, slow())
        assert found[-1] == done(lines=3000, created=3000) and len(found) > 5
        reader, writer = await asyncio.open_connection("127.0.0.1", live_server.port)
        head = f"POST {IMPORT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-ndjson\r\n"
        head += "Transfer-Encoding: chunked\r\n\r\n"
        first = lines(entry("first"))
        writer.write(head.encode() + b"%x\r\n%s\r\n" % (len(first), first))
        await writer.drain()
        async with asyncio.timeout(20):  # the body has not ended, and yet its first batch is answered
            while b'"created":1' not in await reader.readline():
                pass
        writer.close()
        await writer.wait_closed()

        async def left() -> bool:
            with psycopg.connect(database_url) as db:
                row = db.execute("select count(*) from pgshelf.imports where lease_until > now()").fetchone()
            return row == (0,)

        await until(left)


async def test_a_client_that_does_not_read_gets_counts_instead_of_lists(
    client: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await library(client)
    monkeypatch.setattr(imports, "BACKLOG", -1)
    found = await send(client, lines(b"{", entry("a")))
    assert found[0] == {"lines": [1, 2], "created": 1, "replaced": 0, "pending": 0, "failed": [], "unlisted": 1}
    assert found[-1]["failed"] == 1


async def test_imports_are_forgotten(client: httpx2.AsyncClient, settings: Any, database_url: str) -> None:
    await library(client)
    await send(client, lines(entry()), **{"Idempotency-Key": "n"})
    await send(client, lines(entry()))
    forget = "select pgshelf.forget_imports('1 hour')"
    with psycopg.connect(database_url, autocommit=True) as db:
        assert db.execute(forget).fetchone() == (0,)
        db.execute("update pgshelf.imports set lease_until = now() - interval '2 minutes'")
        assert db.execute(forget).fetchone() == (1,)
        db.execute("update pgshelf.imports set lease_until = now() - interval '2 hours'")
        assert db.execute(forget).fetchone() == (1,)


async def test_a_library_that_is_being_filled_is_not_moved(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    client = await make_client(make_settings(database_url, promote_at=10, worker_enabled=False))
    await library(client)
    task = """select (pgshelf.index_task(l, 100, 10)).task from pgshelf.libraries l"""
    with psycopg.connect(database_url, autocommit=True) as db:
        assert db.execute(task).fetchone() == ("promote",)
        await send(client, lines(*[entry() for _ in range(20)]))
        assert db.execute(task).fetchone() == (None,)
        db.execute("update pgshelf.imports set written_at = now() - interval '3 seconds'")
        assert db.execute(task).fetchone() == ("promote",)
        lease = "update pgshelf.imports set lease_until = now() + interval '1 minute', started_at = %s::timestamptz"
        db.execute(lease, ["now"])
        assert db.execute(task).fetchone() == (None,)
        db.execute(lease, ["yesterday"])
        assert db.execute(task).fetchone() == ("promote",)
        db.execute("update pgshelf.imports set started_at = now(), written_at = now() - interval '11 seconds'")
        assert db.execute(task).fetchone() == ("promote",)


async def test_export_import_export(client: httpx2.AsyncClient) -> None:
    draw = np.random.default_rng(5)
    await library(client)
    await library(client, "copy")
    for number in range(25):
        key = f"k{number}" if number % 3 else None
        vectors = (draw.normal(size=(number % 4, 3)) * 10.0 ** draw.integers(-6, 6)).astype(np.float32).tolist()
        given = [
            {"text": f'text "{n}"\n\\ é \u2028', "embedding": v, "metadata": {"p": n} if n % 2 else {}}
            for n, v in enumerate(vectors)
        ]
        about: dict[str, Any] = {
            "title": "ti\tle",
            "source": "s",
            "metadata": {"x": [1, 2.5, None, {"y": "z"}], "b": number},
        }
        await document(client, key, chunks=given, **(about if number % 2 else {}))
    first = (await client.get(EXPORT)).content
    assert len(first.splitlines()) == 25 and all(json.loads(line) for line in first.splitlines())
    found = await send(client, first, at("libraries", "copy", "import"))
    assert found[-1]["created"] == 25
    second = await client.get(at("libraries", "copy", "export"))
    assert second.content == first and second.headers["content-type"].startswith("application/x-ndjson")
    part = (await client.get(EXPORT, params={"embeddings": False, "filter": '{"b": 3}'})).content
    assert [item["metadata"]["b"] for item in map(json.loads, part.splitlines())] == [3]
    assert b'"text"' in part and b"embedding" not in part


async def test_what_export_refuses(client: httpx2.AsyncClient) -> None:
    await library(client)
    assert (await client.get(EXPORT)).content == b""
    for wrong in ("[]", "{", '{"a": {"$nope": 1}}'):
        problem(await client.get(EXPORT, params={"filter": wrong}), 400, "validation_failed")


async def test_pending_chunks_are_exported_without_vectors(client: httpx2.AsyncClient) -> None:
    await local(client, name="shelf")
    await client.post(at("libraries", "shelf", "documents") + "?wait=false", json={"key": "a", "text": "words"})
    found = json.loads((await client.get(EXPORT)).text)
    assert found["chunks"][0].keys() >= {"text"}


async def test_batch(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "old")
    given = [entry("new"), entry("old"), entry("bad", [1]), 7, entry("new", title="2"), entry(metadata={"a": 1})]
    results = ok(await client.post(BATCH, json={"documents": given}))["results"]
    assert [item["status"] for item in results] == [201, 200, 422, 400, 200, 201]
    assert results[0]["id"] == results[4]["id"] and "error" not in results[0]
    assert results[2]["key"] == "bad" and results[2]["error"]["code"] == "wrong_dimension"
    assert results[3]["error"]["errors"] and "key" not in results[5]
    stored = ok(await client.get(at("libraries", "shelf", "documents", "new")))
    assert (stored["title"], stored["version"]) == ("2", 2)
    problem(await client.post(BATCH, json={"documents": [entry()] * 101}), 400, "validation_failed")
    problem(await client.post(BATCH, json={"documents": []}), 400, "validation_failed")
    missing = await client.post(at("libraries", "nope", "documents", "batch"), json={"documents": [entry()]})
    problem(missing, 404, "library_not_found")


async def test_a_batch_waits_for_embeddings_or_does_not(client: httpx2.AsyncClient) -> None:
    await local(client)
    given = {"documents": [{"key": "a", "text": "one"}, {"key": "b", "text": "two"}]}
    results = ok(await client.post(BATCH + "?wait=false", json=given))["results"]
    assert [item["status"] for item in results] == [202, 202]
    results = ok(await client.post(BATCH, json={"documents": [{"key": "c", "text": "three"}]}))["results"]
    assert [item["status"] for item in results] == [201]
    packed = base64.b64encode(np.ones(256, dtype="<f4").tobytes()).decode()
    results = ok(await client.post(BATCH, json={"documents": [{"chunks": [{"text": "x", "embedding": packed}]}]}))[
        "results"
    ]
    assert [item["status"] for item in results] == [201]


async def test_deadlocks_of_two_imports_of_the_same_keys_are_none(client: httpx2.AsyncClient) -> None:
    await library(client)
    forwards = [entry(f"k{n}") for n in range(300)]
    both = await asyncio.gather(
        send(client, lines(*forwards)), send(client, lines(*reversed(forwards))), send(client, lines(*forwards))
    )
    counts = [found[-1] for found in both]
    assert sum(count["created"] for count in counts) == 300
    assert sum(count["replaced"] for count in counts) == 600
    assert len(await pages(client, at("libraries", "shelf", "documents"), 1000)) == 300


async def test_an_import_whose_client_falls_silent_ends(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    """What came is committed, and it goes on when the same lines are sent again."""
    client = await make_client(make_settings(database_url, body_timeout=1.5))
    await library(client)
    name, forever = {**NDJSON, "Idempotency-Key": "n"}, asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield lines(entry("a"), entry("b"))
        await forever.wait()

    answer = await client.post(IMPORT, content=body(), headers=name)
    *_, last = [json.loads(line) for line in answer.text.splitlines()]
    assert (last["error"]["code"], last["committed_lines"]) == ("request_timeout", 2)
    found = await send(client, lines(entry("a"), entry("b"), entry("c")), **{"Idempotency-Key": "n"})
    assert found[-1] == done(lines=3, skipped=2, created=1)


@pytest.mark.parametrize("there", [True, False])
async def test_batches_that_repeat_keys_do_not_deadlock(
    make_client: MakeClient, make_settings: MakeSettings, database_url: str, there: bool
) -> None:
    """A deadlock would last until the lock timeout, and be told as such."""
    patient = psycopg.conninfo.make_conninfo(database_url, options="-c deadlock_timeout=1min")
    client = await make_client(make_settings(patient, worker_enabled=False, lock_timeout=5))
    await library(client)
    keys = [f"k{n}" for n in range(20)]
    if there:
        ok(await client.post(BATCH, json={"documents": [entry(key) for key in keys]}))

    async def write(order: list[str]) -> list[int]:
        given = [entry(key, title=str(n)) for key in order for n in range(2)]
        told = []
        for _ in range(10):
            results = ok(await client.post(BATCH, json={"documents": given}))["results"]
            told += [item["status"] for item in results]
        return told

    both = await asyncio.gather(write(keys), write(keys[::-1]))
    assert set(both[0] + both[1]) <= {200, 201}
    assert (both[0] + both[1]).count(201) == (0 if there else 20)
    stored = await pages(client, at("libraries", "shelf", "documents"), 100)
    assert {(item["title"], item["version"]) for item in stored} == {("1", 41 if there else 40)}


async def test_batches_and_imports_with_bad_documents_do_not_deadlock(
    make_client: MakeClient, make_settings: MakeSettings, database_url: str
) -> None:
    patient = psycopg.conninfo.make_conninfo(database_url, options="-c deadlock_timeout=1min")
    client = await make_client(make_settings(patient, worker_enabled=False, lock_timeout=5))
    await library(client)
    rng = random.Random(4711)

    def some(count: int) -> list[dict[str, Any]]:
        faults: list[dict[str, Any]] = [
            {"title": "\0"},
            {"metadata": {"a": "\\\0"}},
            {"chunks": [{"text": "no vector"}]},
        ]
        return [
            entry(f"k{n}", **(rng.choice(faults) if rng.random() < 0.1 else {})) for n in rng.sample(range(40), count)
        ]

    async def write() -> None:
        for _ in range(8):
            results = ok(await client.post(BATCH, json={"documents": some(12)}))["results"]
            assert {item["status"] for item in results} <= {200, 201, 400, 422}

    async def fill() -> None:
        for _ in range(4):
            found = await send(client, lines(*some(30), *some(30)))
            assert found[-1]["lines"] == 60

    await asyncio.gather(*[write() for _ in range(4)], *[fill() for _ in range(2)])


async def test_documents_that_cannot_be_stored_cost_no_statement(
    client: httpx2.AsyncClient, statements: list[str]
) -> None:
    await library(client)
    bad = [entry("a", title="\0"), entry("b", source="\0"), entry("c\0"), entry("d", metadata={"a": ["\\\\\0"]})]
    given = [*bad, {"text": "\0"}, {"chunks": [{"text": "a\0"}]}, entry("good", metadata={"a": "\\u0000"})]
    results = ok(await client.post(BATCH, json={"documents": given}))["results"]
    assert [item["status"] for item in results] == [400] * 6 + [201]
    assert {item["error"]["code"] for item in results[:6]} == {"invalid_text"}
    assert results[0]["error"]["detail"].startswith("title: ")
    assert sum("write_documents" in statement for statement in statements) == 1
    stored = ok(await client.get(at("libraries", "shelf", "documents", "good")))
    assert stored["metadata"] == {"a": "\\u0000"}


async def test_texts_that_come_more_often_than_they_are_known_are_embedded_at_once(client: httpx2.AsyncClient) -> None:
    await local(client)
    one = at("libraries", "shelf", "documents", "k")
    ok(await client.put(one, json={"text": "T text"}), 201)
    given = [{"key": "k", "text": "X text"}, {"key": "k", "text": "T text"}]
    results = ok(await client.post(BATCH, json={"documents": given}))["results"]
    assert [item["status"] for item in results] == [200, 200]
    twice = {"chunks": [{"text": "new in front"}, {"text": "T text"}, {"text": "T text"}]}
    results = ok(await client.post(BATCH, json={"documents": [{"key": "k", **twice}]}))["results"]
    assert [item["status"] for item in results] == [200]
    ok(await client.put(one, json={"text": "T text"}))
    for _ in range(2):
        answer = await client.put(one, json=twice, headers={"Idempotency-Key": "twice"})
        assert ok(answer)["status"] == "ready"


async def test_a_batch_of_which_a_failing_provider_let_nothing_through_may_be_sent_again(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient, openai_server: OpenAIServer
) -> None:
    known = {"openai_api_key": openai_server.key, "openai_base_url": openai_server.base_url}
    client = await make_client(make_settings(database_url, **known, circuit_failures=100, worker_enabled=False))
    await library(client, dimension=16, embedder={"provider": "openai", "model": "bge-of-tests"})
    given = {"documents": [{"key": "a", "text": "one"}, {"key": "b", "text": " "}]}
    some = {"documents": [*given["documents"], {"key": "c", "chunks": []}]}

    async def send_batch(body: dict[str, Any], name: str) -> tuple[list[int], bool]:
        answer = await client.post(BATCH, json=body, headers={"Idempotency-Key": name})
        statuses = [item["status"] for item in ok(answer)["results"]]
        return statuses, "idempotent-replayed" in answer.headers

    openai_server.outage = status(401)
    for _ in range(2):
        assert await send_batch(given, "nothing") == ([502, 400], False)
    assert await send_batch(some, "some") == ([502, 400, 201], False)
    openai_server.outage = None
    assert await send_batch(given, "nothing") == ([201, 400], False)
    assert await send_batch(given, "nothing") == ([201, 400], True)
    assert await send_batch(some, "some") == ([502, 400, 201], True)
