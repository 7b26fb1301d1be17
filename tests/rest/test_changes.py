"""The change feed over REST: pages, cursors, waiting, event streams."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import httpx2
import msgspec
import psycopg
import pytest

from pgshelf import changes, database, pools
from tests.conftest import LiveServer
from tests.rest.asking import at, chunks, document, library, local, ok, problem

CHANGES = at("libraries", "shelf", "changes")
DOCUMENTS = at("libraries", "shelf", "documents")


async def feed(client: httpx2.AsyncClient, **query: Any) -> dict[str, Any]:
    page: dict[str, Any] = ok(await client.get(CHANGES, params=query))
    return page


async def told(client: httpx2.AsyncClient, after: str) -> list[tuple[Any, ...]]:
    """What the changes behind a cursor say, in short."""
    items = (await feed(client, after=after))["items"]
    return [(item["kind"], item.get("key"), item["version"], item.get("created")) for item in items]


@pytest.fixture
async def quiet(settings: Any, make_client: Any) -> httpx2.AsyncClient:
    """A client whose worker does not run."""
    fields = {name: getattr(settings, name) for name in settings.__struct_fields__}
    client: httpx2.AsyncClient = await make_client(type(settings)(**fields | {"worker_enabled": False}))
    await library(client)
    return client


async def test_what_changes_documents_is_told_once_and_in_order(quiet: httpx2.AsyncClient) -> None:
    cursor = (await feed(quiet, after="now"))["next"]
    made = await document(quiet, "k")
    chunk = (await chunks(quiet, "k"))[0]["id"]
    await document(quiet, "k")
    ok(await quiet.patch(f"{DOCUMENTS}/k", json={"title": "new"}))
    ok(await quiet.patch(at("libraries", "shelf", "chunks", chunk), json={"embedding": [0, 1, 0]}))
    body = {"filter": {"$key": "k"}, "patch": {"n": 1}}
    ok(await quiet.post(f"{DOCUMENTS}/update", json=body))
    ok(await quiet.delete(at("libraries", "shelf", "chunks", chunk)), 204)
    ok(await quiet.delete(f"{DOCUMENTS}/k"), 204)
    await document(quiet, None)
    page = await feed(quiet, after=cursor)
    assert {item["document_id"] for item in page["items"][:-1]} == {made["id"]}
    assert await told(quiet, cursor) == [
        ("put", "k", 1, True),
        *[("put", "k", version, False) for version in range(2, 7)],
        ("delete", "k", 6, None),
        ("put", None, 1, True),
    ]
    assert await told(quiet, page["items"][-2]["cursor"]) == [("put", None, 1, True)]
    assert await feed(quiet, after=page["next"]) == {"items": [], "next": page["next"]}
    assert page["next"] == page["items"][-1]["cursor"]


async def test_nothing_is_told_of_what_did_not_happen(quiet: httpx2.AsyncClient, database_url: str) -> None:
    await document(quiet, "k")
    cursor = (await feed(quiet, after="now"))["next"]
    problem(
        await quiet.patch(f"{DOCUMENTS}/k", json={"title": "x"}, headers={"If-Match": '"9"'}), 409, "version_mismatch"
    )
    body = {"filter": {"$key": "k"}, "dry_run": True}
    ok(await quiet.post(f"{DOCUMENTS}/delete", json=body))
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("update pgshelf.documents set updated_at = updated_at")  # as a library that moves does
    assert await told(quiet, cursor) == []


async def test_embedded_by_the_worker_is_a_change(client: httpx2.AsyncClient) -> None:
    await local(client)
    cursor = (await feed(client, after="now"))["next"]
    made = ok(await client.post(f"{DOCUMENTS}?wait=false", json={"key": "k", "text": "Rows."}), 202)
    page = await feed(client, after=cursor)
    if len(page["items"]) == 1:
        page["items"] += (await feed(client, after=page["next"], wait=20))["items"]
    assert [(item["kind"], item["document_id"]) for item in page["items"]] == [
        ("put", made["id"]),
        ("embedded", made["id"]),
    ]


async def test_a_change_of_the_library_itself_is_told(quiet: httpx2.AsyncClient, database_url: str) -> None:
    cursor = (await feed(quiet, after="now"))["next"]
    ok(await quiet.patch(at("libraries", "shelf"), json={"description": "d"}))
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("""update pgshelf.libraries set index_actual = '{"type": "hnsw"}'""")
        await connection.execute("update pgshelf.libraries set index_attempts = 3")  # changes no answer
    found = (await feed(quiet, after=cursor))["items"]
    assert [set(item) for item in found] == [{"cursor", "kind", "version", "at"}] * 2
    assert [(item["kind"], item["version"]) for item in found] == [("library", 2), ("library", 2)]


async def test_pages_go_on_from_the_oldest(quiet: httpx2.AsyncClient) -> None:
    for n in range(7):
        await document(quiet, f"k{n}")
    page, seen = await feed(quiet, limit=3), []
    while page["items"]:
        seen += [item["key"] for item in page["items"]]
        page = await feed(quiet, limit=3, after=page["next"])
    assert seen == [f"k{n}" for n in range(7)]


async def test_libraries_have_feeds_of_their_own(quiet: httpx2.AsyncClient) -> None:
    await library(quiet, "other")
    await document(quiet, "k", into="other")
    assert (await feed(quiet))["items"] == []
    foreign = ok(await quiet.get(at("libraries", "other", "changes")))
    assert [item["key"] for item in foreign["items"]] == ["k"]
    response = await quiet.get(CHANGES, params={"after": foreign["next"]})
    assert "another library" in problem(response, 400, "validation_failed")["detail"]


def forged(position: Any, owner: bytes) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((position, owner))).decode()


@pytest.mark.parametrize("cursor", ["x", "ü", "AAAA", forged("1", b""), forged(-1, bytes(16)), "x" * 101])
async def test_what_is_no_cursor_is_refused(quiet: httpx2.AsyncClient, cursor: str) -> None:
    problem(await quiet.get(CHANGES, params={"after": cursor}), 400, "validation_failed")


async def test_a_cursor_that_is_too_old_or_from_a_lost_future_is_gone(
    quiet: httpx2.AsyncClient, database_url: str
) -> None:
    start = (await feed(quiet, after="now"))["next"]
    for n in range(4):
        await document(quiet, f"k{n}")
    cursors = [item["cursor"] for item in (await feed(quiet))["items"]]
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        old = "update pgshelf.change_log set stamped_at = now() - interval '8 days' where position <= %s"
        prune = "select pgshelf.prune_changes(%s, 100)"
        await connection.execute(old, [2])
        assert await (await connection.execute(prune, [timedelta(days=7)])).fetchone() == (2,)
        for cursor in (start, cursors[0]):
            assert (
                "Take a new"
                in problem(await quiet.get(CHANGES, params={"after": cursor}), 410, "changes_expired")["detail"]
            )
        assert len(await told(quiet, cursors[1])) == 2
        assert [item["key"] for item in (await feed(quiet))["items"]] == ["k2", "k3"]
        await connection.execute(old, [9])
        assert await (await connection.execute(prune, [timedelta(days=7)])).fetchone() == (1,)
        assert await (await connection.execute(prune, [timedelta(days=7)])).fetchone() == (0,)
        assert [item["key"] for item in (await feed(quiet))["items"]] == ["k3"]  # from the last one they are counted
        await document(quiet, "k4")
        assert [item["key"] for item in (await feed(quiet, after=cursors[-1]))["items"]] == ["k4"]
        await connection.execute("delete from pgshelf.change_log")  # as after a restore
    problem(await quiet.get(CHANGES, params={"after": cursors[-1]}), 410, "changes_expired")


async def test_a_deleted_library_has_no_feed_and_leaves_none(quiet: httpx2.AsyncClient, settings: Any) -> None:
    await document(quiet, "k")
    cursor = (await feed(quiet))["next"]
    ok(await quiet.delete(at("libraries", "shelf")), 204)
    problem(await quiet.get(CHANGES, params={"after": cursor}), 404, "library_not_found")
    engine = pools.make_engine(settings, settings.database_url)
    while (await database.run(engine, "select pgshelf.reap_deleted(1)"))[0][0]:
        pass
    assert await database.run(engine, "select count(*) from pgshelf.change_log") == [(0,)]
    assert await database.run(engine, "select count(*) from pgshelf.libraries") == [(0,)]
    await pools.close(engine)


async def test_waiting_ends_with_the_change(quiet: httpx2.AsyncClient) -> None:
    cursor = (await feed(quiet, after="now"))["next"]
    waiting = [asyncio.create_task(feed(quiet, after=cursor, wait=20)) for _ in range(20)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in waiting)
    started = time.monotonic()
    await document(quiet, "k")
    pages = await asyncio.gather(*waiting)
    assert time.monotonic() - started < 5
    assert [[item["key"] for item in page["items"]] for page in pages] == [["k"]] * 20


async def test_waiting_has_an_end(quiet: httpx2.AsyncClient, settings: Any, make_client: Any) -> None:
    started = time.monotonic()
    page = await feed(quiet, wait=0.5)
    assert page["items"] == [] and 0.4 < time.monotonic() - started < 5
    fields = {name: getattr(settings, name) for name in settings.__struct_fields__}
    client = await make_client(type(settings)(**fields | {"changes_max_wait": 0.2}))
    started = time.monotonic()
    assert await feed(client, wait=50) == page
    assert time.monotonic() - started < 5


async def test_readers_that_wait_hold_no_connection(settings: Any, make_client: Any) -> None:
    fields = {name: getattr(settings, name) for name in settings.__struct_fields__}
    few = {"pool_size": 1, "pool_timeout": 1.0, "worker_enabled": False, "changes_readers": 5}
    client = await make_client(type(settings)(**fields | few))
    await library(client)
    cursor = (await feed(client, after="now"))["next"]
    waiting = [asyncio.create_task(feed(client, after=cursor, wait=20)) for _ in range(5)]
    await asyncio.sleep(0.3)
    problem(await client.get(CHANGES, params={"wait": 1, "after": cursor}), 503, "too_many_readers")
    problem(await client.get(CHANGES, headers={"Accept": "text/event-stream"}), 503, "too_many_readers")
    assert (await feed(client))["items"] == []  # who does not wait is served
    await document(client, "k")
    assert {len(page["items"]) for page in await asyncio.gather(*waiting)} == {1}
    assert len((await feed(client, wait=1))["items"]) == 1


async def test_waiting_ends_when_the_library_goes(quiet: httpx2.AsyncClient) -> None:
    waiting = asyncio.create_task(quiet.get(CHANGES, params={"wait": 20}))
    await asyncio.sleep(0.3)
    ok(await quiet.delete(at("libraries", "shelf")), 204)
    problem(await asyncio.wait_for(waiting, 10), 404, "library_not_found")


# Event streams need a server: the transport in the process gives an answer only when it is whole.

Event = tuple[str | None, str, dict[str, Any]]


@asynccontextmanager
async def stream(url: str, headers: dict[str, str] | None = None, **query: Any) -> AsyncIterator[AsyncIterator[Event]]:
    """The events of a stream; comments come as events of the name `:`."""

    async def events(response: httpx2.Response) -> AsyncIterator[Event]:
        identity, name = None, ""
        async for line in response.aiter_lines():
            field, _, value = line.partition(": ")
            if line.startswith(":"):
                yield None, ":", {}
            elif field == "id":
                identity = value
            elif field == "event":
                name = value
            elif field == "data":
                yield identity, name, json.loads(value)
                identity = None

    sent = {"Accept": "text/event-stream", **(headers or {})}
    async with (
        httpx2.AsyncClient(base_url=url, timeout=20) as client,
        client.stream("GET", CHANGES, headers=sent, params=query) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield events(response)


async def following(events: AsyncIterator[Event]) -> Event:
    """The next event that is no comment."""
    async for event in events:
        if event[1] != ":":
            return event
    raise AssertionError("the stream ended")


async def test_a_stream_goes_on_and_goes_on_again(database_url: str, make_live_server: Any) -> None:
    server: LiveServer = make_live_server(database_url)
    async with httpx2.AsyncClient(base_url=server.url) as client:
        await library(client)
        await document(client, "k1")
        async with stream(server.url) as events:
            first = await following(events)
            assert (first[1], first[2]["key"], first[0]) == ("put", "k1", first[2]["cursor"])
            await document(client, "k2")
            second = await following(events)
            assert second[2]["key"] == "k2"
        await document(client, "k3")
        async with stream(server.url, {"Last-Event-ID": second[0] or ""}, after="now") as events:
            assert (await following(events))[2]["key"] == "k3"
        wrong = {"Accept": "text/event-stream", "Last-Event-ID": "x"}
        problem(await client.get(CHANGES, headers=wrong), 400, "validation_failed")
        missing = at("libraries", "none", "changes")
        problem(await client.get(missing, headers={"Accept": "text/event-stream"}), 404, "library_not_found")
        async with stream(server.url, after="now") as events:
            asking = asyncio.create_task(following(events))
            ok(await client.delete(at("libraries", "shelf")), 204)
            assert (await asking)[1:2] == ("error",)
            assert [event async for event in events if event[1] != ":"] == []


@pytest.mark.watched
async def test_a_server_that_is_told_to_stop_ends_its_streams(database_url: str, make_live_server: Any) -> None:
    server: LiveServer = make_live_server(database_url)
    async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
        await library(client)
        waiting = asyncio.create_task(client.get(CHANGES, params={"wait": 60}))
        async with stream(server.url) as events:
            assert (await anext(events))[1] == ":"
            await asyncio.sleep(0.3)
            started = time.monotonic()
            stopping = asyncio.create_task(asyncio.to_thread(server.stop))
            assert [event async for event in events if event[1] != ":"] == []
            assert ok(await waiting)["items"] == []
            assert await stopping == 0
            # a kill would come after 30 seconds; granian may speak of one where a process has just ended
            assert time.monotonic() - started < 10


async def test_a_quiet_stream_says_that_it_lives(
    quiet: httpx2.AsyncClient, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "HEARTBEAT", 0.05)
    engine = pools.make_engine(settings, settings.database_url)
    readers = changes.Readers(engine, settings)
    [(library_id,)] = await database.run(engine, "select id from pgshelf.libraries")

    async def again(_: str) -> None:
        pass

    events = changes._events(readers, again, library_id, [], 0, 100)
    async with changes.waking(readers):
        assert [await anext(events) for _ in range(3)] == [b": from here\n\n"] + [b": nothing yet\n\n"] * 2
        assert readers.count == 1
        readers.end()
        await readers.wait(library_id, 0, 20)  # nobody waits any more
        assert [event async for event in events] in ([], [b": nothing yet\n\n"])
    assert readers.count == 0
    await pools.close(engine)
