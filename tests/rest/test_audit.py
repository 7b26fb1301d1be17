"""The audit log: every write leaves a row, in its own transaction; who was refused leaves one, too."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from pgshelf import auditing, pools, worker
from pgshelf.access import RULES
from pgshelf.app import create_app
from pgshelf.settings import Settings
from tests.conftest import MakeClient, MakeSettings, _lifespan
from tests.rest.asking import at, bearer, chunks, document, key, library, ok, problem, until
from tests.roles import ask

NDJSON = {"Content-Type": "application/x-ndjson"}
COLUMNS = "action, outcome, principal_kind, principal, library, document, count, detail"
SECURITY = Path(__file__).parents[2] / "docs/security.md"


@pytest.fixture
async def admin(database_url: str, settings: Any, make_client: MakeClient) -> httpx2.AsyncClient:
    return await make_client(settings, headers=bearer(key(database_url, "root", "admin")))


def entries(url: str, columns: str = COLUMNS) -> list[tuple[Any, ...]]:
    return ask(url, f"select {columns} from pgshelf.audit_view order by at, id")


def test_every_operation_that_writes_has_an_action() -> None:
    """A new operation fails here until it has one; what only reads has none."""
    app = create_app(Settings(database_url="postgresql://nowhere.invalid/"))
    methods = {
        handler.operation_id: handler.http_methods
        for route in app.routes
        for handler in getattr(route, "route_handlers", [])
        if handler.operation_id in RULES
    }
    assert set(methods) == set(RULES)
    # a POST that takes no more than the role reader asks a question
    writing = {each for each, rule in RULES.items() if rule.role in ("writer", "admin") and methods[each] != {"GET"}}
    assert writing | {"createToken"} == set(auditing.OPERATIONS)


def test_every_action_is_documented() -> None:
    table = SECURITY.read_text().partition("## The audit log")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([a-z]+(?:\.[a-z]+)?)` \|", table, re.MULTILINE)) == auditing.ACTIONS


# An action, who did it, the library, the document, how many it was, and what else is told.
Row = tuple[str, str, str | None, str | None, int, str | None]


async def change_documents(admin: httpx2.AsyncClient) -> list[Row]:
    """Whatever writes documents and chunks of the library "shelf"; what it leaves in the log."""
    path = at("libraries", "shelf")
    await document(admin, "a")
    ok(await admin.put(f"{path}/documents/b", json={"chunks": [{"text": "b", "embedding": [1, 0, 0]}]}), 201)
    three = [{"key": f"n{n}", "chunks": [{"text": "t", "embedding": [1, 0, n]}]} for n in range(3)] + [{"key": 7}]
    ok(await admin.post(f"{path}/documents/batch", json={"documents": three}))
    lines = b'{"key": "i", "chunks": [{"text": "x", "embedding": [1, 1, 1]}]}\n{"key": "bad", "text": 1}\n'
    assert (await admin.post(f"{path}/import", content=lines, headers=NDJSON)).status_code == 200
    ok(await admin.patch(f"{path}/documents/a", json={"title": "A", "metadata": {"x": 1}}))
    every = {"$id": {"$exists": True}}
    ok(await admin.post(f"{path}/documents/update", json={"filter": every, "patch": {"y": 1}, "dry_run": True}))
    ok(await admin.post(f"{path}/documents/update", json={"filter": every, "patch": {"y": 1}}))
    [chunk] = await chunks(admin, "a")
    ok(await admin.patch(at("libraries", "shelf", "chunks", chunk["id"]), json={"metadata": {"z": 1}}))
    ok(await admin.delete(at("libraries", "shelf", "chunks", chunk["id"])), 204)
    ok(await admin.delete(f"{path}/documents/a"), 204)
    ok(await admin.post(f"{path}/documents/delete", json={"filter": {"$key": "b"}}))
    ok(await admin.post(f"{path}/documents/delete", json={"filter": {"$key": "b"}}))
    return [
        ("document.write", "root", "shelf", "a", 1, None),
        ("document.write", "root", "shelf", "b", 1, None),
        ("document.write", "root", "shelf", None, 3, None),
        ("document.import", "root", "shelf", None, 1, None),
        ("document.update", "root", "shelf", "a", 1, None),
        ("document.update", "root", "shelf", None, 6, None),
        ("chunk.update", "root", "shelf", None, 1, chunk["id"]),
        ("chunk.delete", "root", "shelf", None, 1, chunk["id"]),
        ("document.delete", "root", "shelf", "a", 1, None),
        ("document.delete", "root", "shelf", None, 1, None),
    ]


async def change_library(admin: httpx2.AsyncClient) -> list[Row]:
    """The library "shelf" gets another name and another index."""
    ok(await admin.patch(at("libraries", "shelf"), json={"name": "renamed"}))
    path = at("libraries", "renamed")
    ok(await admin.put(f"{path}/index", json={"type": "hnsw"}), 202)
    ok(await admin.post(f"{path}/embeddings/retry", json={}))
    return [("library.update", "root", "renamed", None, 1, None), ("index.change", "root", "renamed", None, 1, None)]


async def change_embedder(admin: httpx2.AsyncClient, url: str) -> list[Row]:
    """A library whose texts the server embeds: an event sent twice, what failed, another embedder, the cache."""
    path = at("libraries", "local")
    ok(await admin.post("/v1/libraries", json={"name": "local", "embedder": {"provider": "local"}}), 201)
    for _ in range(2):
        ok(await admin.post(f"{path}/events", json={"id": "e", "text": "event"}), 202)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("update pgshelf.chunks set embed_after = 'infinity' where embedding is null")
    ok(await admin.post(f"{path}/embeddings/retry", json={}))
    ok(await admin.put(f"{path}/embedder", json={"provider": "local", "dimension": 64}), 202)
    for _ in range(2):
        ok(await admin.delete(f"{path}/embedder"))
    ok(await admin.put(f"{path}/embedder", json={"provider": "local", "dimension": 256}))
    ok(await admin.delete("/v1/cache", params={"library": "local"}), 204)
    return [
        ("library.create", "root", "local", None, 1, None),
        ("document.write", "root", "local", "e", 1, None),
        ("embedding.retry", "root", "local", None, 1, None),
        ("embedder.change", "root", "local", None, 1, None),
        ("embedder.cancel", "root", "local", None, 1, None),
        ("embedder.change", "root", "local", None, 1, None),
        ("cache.clear", "root", "local", None, 1, None),
    ]


async def change_keys(admin: httpx2.AsyncClient) -> list[Row]:
    """A key is made, used for a token, and revoked."""
    ok(await admin.post("/v1/keys", json={"name": "k", "role": "reader"}), 201)
    rotated = ok(await admin.post("/v1/keys/k/rotate", json={}))
    ok(await admin.post("/v1/token", json={}, headers=bearer(rotated["secret"])), 201)
    ok(await admin.delete("/v1/keys/k"), 204)
    return [
        ("key.create", "root", None, None, 1, "k"),
        ("key.rotate", "root", None, None, 1, "k"),
        ("token.create", "k", None, None, 1, None),
        ("key.revoke", "root", None, None, 1, "k"),
    ]


async def test_every_write_leaves_a_row(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient
) -> None:
    # without a worker, which could embed the event before its embedding is seen to have failed
    quiet = make_settings(database_url, worker_enabled=False)
    admin = await make_client(quiet, headers=bearer(key(database_url, "root", "admin")))
    made = await library(admin)
    rows: list[Row] = [("library.create", "root", "shelf", None, 1, None)]
    rows += await change_documents(admin)
    rows += await change_library(admin)
    rows += await change_embedder(admin, database_url)
    rows += await change_keys(admin)
    ok(await admin.delete(at("libraries", "renamed")), 204)
    rows.append(("library.delete", "root", "renamed", None, 1, None))
    assert entries(database_url) == [(action, "done", "key", *told) for action, *told in rows]
    ids = {str(row[0]) for row in entries(database_url, "library_id") if row[0]}
    assert made["id"] in ids and len(ids) == 2
    # the rows say all that the operations are called; tests/replication starts a backup
    assert {row[0] for row in entries(database_url)} == set(auditing.OPERATIONS.values()) - {"backup.start"}


async def test_what_is_not_done_leaves_none(admin: httpx2.AsyncClient, database_url: str) -> None:
    await library(admin)
    before = entries(database_url)
    path = at("libraries", "shelf", "documents")
    for body in ({"key": "a", "chunks": [{"text": "x", "embedding": [1, 0]}]}, {"key": "a", "text": "no embedder"}):
        assert (await admin.post(path, json=body)).status_code == 422
    problem(await admin.delete(f"{path}/nothing"), 404, "document_not_found")
    problem(
        await admin.post("/v1/libraries", json={"name": "shelf", "embedder": {"provider": "none"}, "dimension": 3}),
        409,
        "library_exists",
    )
    assert entries(database_url) == before
    # sent twice, done once
    body = {"key": "a", "chunks": [{"text": "x", "embedding": [1, 0, 0]}]}
    for _ in range(2):
        assert (await admin.post(path, json=body, headers={"Idempotency-Key": "k"})).status_code == 201
    assert len(entries(database_url)) == len(before) + 1


async def test_refused_attempts_are_counted(
    database_url: str, settings: Any, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditing, "PAUSE", 3600.0)  # what is there is written at the end
    root, reader = key(database_url, "root", "admin"), key(database_url, "reader", "reader")
    revoked = key(database_url, "gone", "writer", revoked=True)
    app = create_app(settings)
    async with _lifespan(app):
        transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for _ in range(3):
                problem(await client.post(at("libraries", "secret", "documents"), json={}), 401, "unauthorized")
            problem(await client.delete(at("libraries", "secret"), headers=bearer(reader)), 403, "forbidden")
            problem(await client.post("/v1/token", json={"role": "admin"}, headers=bearer(reader)), 403, "forbidden")
            for _ in range(2):
                problem(await client.get("/v1/libraries", headers=bearer(revoked)), 401, "key_revoked")
            problem(await client.get("/v1/libraries", headers=bearer("pgs_" + "x" * 43)), 401, "invalid_key")
            problem(await client.get(at("libraries", "nothing"), headers=bearer(reader)), 404, "library_not_found")
            for n in range(2 * auditing.MOST):  # a flood of different ones
                await client.get(at("libraries", f"guess-{n}"))
    rows = entries(database_url)
    address = "127.0.0.1"
    assert rows[:5] == [
        ("document.write", "refused", "anybody", address, "secret", None, 3, "addDocument: unauthorized"),
        ("library.delete", "refused", "key", "reader", "secret", None, 1, "deleteLibrary: forbidden"),
        ("token.create", "refused", "key", "reader", None, None, 1, "createToken: forbidden"),
        ("access", "refused", "key", "gone", None, None, 2, "listLibraries: key_revoked"),
        ("access", "refused", "anybody", address, None, None, 1, "listLibraries: invalid_key"),
    ]
    assert len(rows) == auditing.MOST + 1
    assert rows[-1] == ("access", "refused", "anybody", "", None, None, 5 + auditing.MOST, "others")
    assert all(request for (request,) in entries(database_url, "request_id")[:5])
    client = await make_client(settings, headers=bearer(root))
    found = ok(await client.get("/v1/audit", params={"outcome": "refused", "action": "token.create"}))
    assert [item["principal"] for item in found["items"]] == ["reader"]


async def test_refused_attempts_are_written_soon_and_hold_nobody_up(
    database_url: str, settings: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auditing, "PAUSE", 0.05)
    engine = pools.make_engine(settings, database_url)
    try:
        refusals = auditing.Refusals(engine)
        refusals.note(auditing.Entry("access", "anybody", "10.0.0.1", None, library="x", detail="search: unauthorized"))

        async def written() -> bool:
            return [row[3] for row in entries(database_url)] == ["10.0.0.1"]

        await until(written)
        refusals.note(auditing.Entry("access", "anybody", "10.0.0.2", None))
        monkeypatch.setattr(auditing, "ADD_REFUSED", "select 1 / 0, %s::jsonb")
        await refusals.close()
        assert "1 refused attempts were not recorded: division by zero" in caplog.text
    finally:
        await pools.close(engine)


async def test_the_log_is_read_newest_first_and_by_what_it_tells(admin: httpx2.AsyncClient, database_url: str) -> None:
    for name in ("one", "two"):
        await library(admin, name)
        for n in range(3):
            await document(admin, f"{name}-{n}", into=name)
    read = await admin.get("/v1/audit", params={"limit": 3})
    first = ok(read)
    assert [item["document"] for item in first["items"]] == ["two-2", "two-1", "two-0"]
    sent = await admin.delete(at("libraries", "one"), headers={"X-Request-Id": "my-request"})
    assert sent.status_code == 204
    second = ok(await admin.get("/v1/audit", params={"limit": 100, "after": first["next"]}))
    assert [item["document"] for item in second["items"]] == [None, "one-2", "one-1", "one-0", None]
    assert second["next"] is None

    async def found(**params: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = ok(await admin.get("/v1/audit", params=params))["items"]
        return items

    [gone] = await found(action="library.delete")
    assert (gone["library"], gone["request_id"], gone["principal"], gone["outcome"]) == (
        "one",
        "my-request",
        "root",
        "done",
    )
    assert len(await found(library="one")) == len(await found(library=gone["library_id"])) == 5
    assert len(await found(library="one", action="document.write")) == 3
    assert await found(since=(datetime.now(UTC) + timedelta(minutes=1)).isoformat()) == []
    assert len(await found(since=(datetime.now(UTC) - timedelta(minutes=1)).isoformat())) == 9
    problem(await admin.get("/v1/audit", params={"action": "nothing"}), 400, "validation_failed")
    problem(await admin.get("/v1/audit", params={"since": "2026-01-01T00:00:00"}), 400, "validation_failed")
    problem(await admin.get("/v1/audit", params={"after": "x"}), 400, "validation_failed")
    some = bearer(key(database_url, "some", "admin", "one"))
    problem(await admin.get("/v1/audit", headers=some), 403, "forbidden")


async def test_it_can_be_off(database_url: str, make_settings: Any, make_client: MakeClient) -> None:
    client = await make_client(make_settings(database_url, audit=False))
    await library(client)
    await document(client, "a")
    assert entries(database_url) == []


def test_rows_are_only_added_and_end_by_age(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as owner:
        for n in range(3):
            owner.execute("select pgshelf.audit_role('grant.create', null, %s)", [str(n)])
        for statement in (
            "update pgshelf.audit_log set detail = ''",
            "delete from pgshelf.audit_log",
            "truncate pgshelf.audit_log",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                owner.execute(statement)
        for said in ("1 hour", "0", "-1 day"):  # nor may who takes over the service forget what it did there
            assert owner.execute("select pgshelf.prune_audit(%s)", [said]).fetchone() == (0,)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            owner.execute("delete from pgshelf.audit_log")
        aged(owner, "25 hours")
        assert owner.execute("select pgshelf.prune_audit('26 hours')").fetchone() == (0,)
        assert owner.execute("select pgshelf.prune_audit('0', 2)").fetchone() == (2,)
        assert owner.execute("select detail, principal_kind, principal from pgshelf.audit_view").fetchall() == [
            ("2", "role", owner.info.user)
        ]


def aged(owner: psycopg.Connection[Any], age: str) -> None:
    """Let all rows be older."""
    with owner.transaction():
        owner.execute("alter table pgshelf.audit_log disable trigger audit_kept")
        owner.execute("update pgshelf.audit_log set at = at - %s::interval", [age])
        owner.execute("alter table pgshelf.audit_log enable trigger audit_kept")


async def test_the_worker_forgets_what_is_old(database_url: str, make_settings: Any) -> None:
    settings = make_settings(database_url, audit_retention=1.5)
    engine = pools.make_engine(settings, database_url)
    try:
        with psycopg.connect(database_url, autocommit=True) as owner:
            owner.execute("select pgshelf.audit_role('grant.create', null, 'older')")
            aged(owner, "12 hours")
            owner.execute("select pgshelf.audit_role('grant.create', null, 'old')")
            aged(owner, "30 hours")
            owner.execute("select pgshelf.audit_role('grant.create', null, 'new')")
        assert await worker.tidy(engine, settings) == 1
    finally:
        await pools.close(engine)
    assert entries(database_url, "detail") == [("old",), ("new",)]
