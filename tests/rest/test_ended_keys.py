"""Keys that end while a request is open: from then on it is told nothing, and writes nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from litestar.exceptions import LitestarException

from pgshelf import database, exports, guard, imports
from tests.conftest import LiveServer, MakeClient, MakeLiveServer, MakeSettings
from tests.issuer import Issuer
from tests.rest.asking import at, bearer, document, key, library, ok, pages, problem, until
from tests.rest.test_changes import CHANGES, Event, following, stream
from tests.rest.test_imports import EXPORT, IMPORT, NDJSON, entry, lines, shown

DOCUMENTS = at("libraries", "shelf", "documents")
Run = Callable[[str], Awaitable[None]]


@pytest.fixture
def run(database_url: str) -> Run:
    """Runs a statement on the database of the test."""

    async def execute(statement: str) -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
            await connection.execute(statement)

    return execute


@pytest.fixture
async def closed(database_url: str, make_settings: MakeSettings, make_client: MakeClient) -> httpx2.AsyncClient:
    """An admin's client for a service that asks for keys, with a library."""
    client = await make_client(make_settings(database_url, auth="on", worker_enabled=False, embedder="none"))
    client.headers.update(bearer(key(database_url, "root", "admin")))
    await library(client)
    return client


# How a key may end, by statements; and what it is answered then.
ENDS = {
    "revoked": ("select pgshelf.revoke_key('k')", 401, "key_revoked"),
    "expired": ("update pgshelf.keys set expires_at = now() where name = 'k'", 401, "key_expired"),
    "rotated": ("select pgshelf.rotate_key('k', 'hash', 'pgs_hint', '0', null, false)", 401, "key_expired"),
    "less": ("update pgshelf.keys set role = 'reader' where name = 'k'", 403, "forbidden"),
    "elsewhere": ("update pgshelf.libraries set name = 'renamed'", 404, "library_not_found"),
}


@pytest.mark.parametrize("way", ENDS)
async def test_an_import_ends_with_its_key(
    closed: httpx2.AsyncClient, database_url: str, run: Run, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """What was committed before stays, and its name goes on where it ended."""
    monkeypatch.setattr(imports, "PAUSE", 0.05)
    secret = key(database_url, "k", "writer", "shelf")
    made = ok(await closed.get(at("libraries", "shelf")))["id"]
    path, name = at("libraries", made, "documents"), {**NDJSON, "Idempotency-Key": "n"}
    statement, status, code = ENDS[way]

    async def body() -> AsyncIterator[bytes]:
        yield lines(entry("a"), entry("b"))

        async def committed() -> bool:
            return len(await pages(closed, path, 10)) == 2

        await until(committed)
        await run(statement)
        yield lines(entry("c"))
        await asyncio.sleep(0.3)
        yield lines(entry("d"))

    root = dict(closed.headers)
    answer = await closed.post(IMPORT, content=body(), headers={**name, **bearer(secret)})
    found = [json.loads(line) for line in answer.text.splitlines()]
    assert shown(found) == [(1, 2)]
    assert (found[-1]["error"]["status"], found[-1]["error"]["code"]) == (status, code)
    assert found[-1]["committed_lines"] == 2
    assert [item["key"] for item in await pages(closed, path, 10)] == ["a", "b"]
    again = lines(*map(entry, "abc"))
    answer = await closed.post(at("libraries", made, "import"), content=again, headers={**root, **name})
    last = json.loads(answer.text.splitlines()[-1])
    assert (last["skipped"], last["created"]) == (2, 1)


async def test_a_stream_that_was_ended_is_in_the_audit_log(
    closed: httpx2.AsyncClient, database_url: str, run: Run
) -> None:
    async def body() -> AsyncIterator[bytes]:
        await run(ENDS["revoked"][0])
        yield lines(entry("a"))

    async def noted() -> bool:
        items = ok(await closed.get("/v1/audit", params={"outcome": "refused"}))["items"]
        said = [(item["action"], item["principal"], item["detail"], item["count"]) for item in items]
        assert said in ([], [("document.import", "k", "importDocuments: key_revoked", 1)])
        return bool(said)

    headers = {**NDJSON, **bearer(key(database_url, "k", "writer", "shelf"))}
    assert '"key_revoked"' in (await closed.post(IMPORT, content=body(), headers=headers)).text
    await until(noted)


async def test_an_import_into_an_open_service_goes_on_unless_it_is_closed(
    client: httpx2.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await library(client)
    monkeypatch.setattr(imports, "PAUSE", 0.05)

    async def body(*, closing: bool) -> AsyncIterator[bytes]:
        yield lines(entry("a"))
        await asyncio.sleep(0.5)
        yield lines(entry("b"))
        await asyncio.sleep(1.1)
        if closing:
            key(database_url, "first", "admin")
            await asyncio.sleep(1.1)
        yield lines(entry("c"))

    for closing, code in ((False, None), (True, "unauthorized")):
        answer = await client.post(IMPORT, content=body(closing=closing), headers=NDJSON)
        last = json.loads(answer.text.splitlines()[-1])
        assert last.get("error", {}).get("code") == code, last
        assert last.get("lines", last.get("committed_lines")) == (2 if closing else 3)


async def test_who_waits_for_a_change_is_not_told_of_it_when_its_key_has_ended(
    closed: httpx2.AsyncClient, database_url: str, run: Run
) -> None:
    secret = key(database_url, "k", "reader", "shelf")
    waiting = asyncio.create_task(closed.get(CHANGES, params={"wait": 20}, headers=bearer(secret)))
    await asyncio.sleep(0.5)
    await run(ENDS["revoked"][0])
    await document(closed, "secret")
    problem(await waiting, 401, "key_revoked")


async def test_a_body_that_takes_long_is_not_written_when_its_key_has_ended(
    closed: httpx2.AsyncClient, database_url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LATE", 0.2)
    headers = {"Content-Type": "application/json", **bearer(key(database_url, "k", "admin", "shelf"))}

    async def body(content: dict[str, Any], *, ends: bool) -> AsyncIterator[bytes]:
        sent = json.dumps(content).encode()
        yield sent[:5]
        await asyncio.sleep(0.3)
        if ends:
            await run(ENDS["revoked"][0])
        yield sent[5:]

    rename = {"name": "shelf", "description": "new"}
    ok(await closed.put(f"{DOCUMENTS}/a", content=body(entry(), ends=False), headers=headers), 201)
    ok(await closed.patch(at("libraries", "shelf"), content=body(rename, ends=False), headers=headers))
    answer = await closed.put(f"{DOCUMENTS}/b", content=body(entry(), ends=True), headers=headers)
    problem(answer, 401, "key_revoked")
    assert [item["key"] for item in await pages(closed, DOCUMENTS, 10)] == ["a"]


async def test_an_export_breaks_off_with_its_key(
    closed: httpx2.AsyncClient, database_url: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of its lines: who reads it knows by that, as of any other export that breaks off."""
    monkeypatch.setattr(exports, "AGAIN", 0.0)
    headers = bearer(key(database_url, "k", "reader", "shelf"))
    answer = await closed.post(IMPORT, content=lines(*map(entry, "abcdefg")), headers=NDJSON)
    assert '"created":7' in answer.text.splitlines()[-1]
    monkeypatch.setattr(exports, "FETCH", "fetch 2 from export")
    assert len((await closed.get(EXPORT, headers=headers)).text.splitlines()) == 7
    rows, fetched = database.rows, 0

    async def noted(connection: Any, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        nonlocal fetched
        if statement == exports.FETCH:
            fetched += 1
            if fetched == 3:
                await run(ENDS["revoked"][0])
        return await rows(connection, statement, *parameters)

    monkeypatch.setattr(database, "rows", noted)
    with pytest.raises(LitestarException, match="after response started"):  # a server ends the connection then
        await closed.get(EXPORT, headers=headers)
    assert fetched == 3


async def ended(events: AsyncIterator[Event]) -> tuple[int, str]:
    """What the last event says, behind which nothing comes."""
    _, name, said = await following(events)
    assert name == "error" and len(said["detail"]) > 10, (name, said)
    assert [event async for event in events if event[1] != ":"] == []
    return said["status"], said["code"]


async def test_a_stream_of_changes_ends_with_its_key(
    database_url: str, make_live_server: MakeLiveServer, run: Run, tmp_path: Path
) -> None:
    issuer = Issuer()
    trusting = {f"PGSHELF_{name.upper()}": str(value) for name, value in issuer.settings(tmp_path).items()}
    server: LiveServer = make_live_server(database_url, PGSHELF_AUTH="on", PGSHELF_EMBEDDER="none", **trusting)
    root = bearer(key(database_url, "root", "admin"))
    async with httpx2.AsyncClient(base_url=server.url, timeout=30, headers=root) as client:
        shelf = (await library(client))["id"]

        async def end_of(headers: dict[str, str], end: Callable[[], Awaitable[None]]) -> tuple[int, str]:
            async with stream(server.url, headers, after="now") as events:
                assert (await anext(events))[1] == ":"
                await document(client, "k", into=shelf)
                assert (await following(events))[1] == "put"
                await end()
                await document(client, "k", into=shelf)
                return await ended(events)

        async def expiry() -> None:
            await asyncio.sleep(max(0.0, expires + 31 - time.time()))

        async with stream(server.url, root, after="now") as others:
            for kind in ("key", "token"):
                for way in sorted(ENDS.keys() - {"less"}):  # whoever may read
                    statement, *expected = ENDS[way]
                    headers = bearer(key(database_url, "k", "reader", "shelf"))
                    if kind == "token":
                        headers = bearer(ok(await client.post("/v1/token", json={}, headers=headers), 201)["token"])
                    assert await end_of(headers, partial(run, statement)) == (*expected,), (kind, way)
                    await run("delete from pgshelf.keys where name = 'k'")
                    await run("update pgshelf.libraries set name = 'shelf'")
            expires = time.time() - 22  # clocks may differ by 30 seconds
            assert await end_of(bearer(issuer.token(exp=expires)), expiry) == (401, "invalid_token")
            written = [await following(others) for _ in range(2 * 9)]
            assert {name for _, name, _ in written} == {"put"}


async def test_a_stream_of_an_open_service_ends_when_it_is_closed(
    database_url: str, make_live_server: MakeLiveServer
) -> None:
    server: LiveServer = make_live_server(database_url, PGSHELF_EMBEDDER="none")
    async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
        await library(client)
        async with stream(server.url, after="now") as events:
            await document(client, "a")
            assert (await following(events))[1] == "put"
            client.headers.update(bearer(key(database_url, "first", "admin")))
            await asyncio.sleep(1.1)  # in which a service that is open notices
            await document(client, "b")
            assert await ended(events) == (401, "unauthorized")
