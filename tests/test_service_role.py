"""A service that is neither the owner nor above it, and a worker that may become the owner."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import psycopg
import pytest
from psycopg import sql

from pgshelf import sessions, shelves
from tests.conftest import MakeClient
from tests.rest import asking
from tests.rest.asking import at, ok
from tests.roles import Login, ask, logins


@pytest.fixture
def login(database_url: str, vector_schema: str) -> Iterator[Login]:
    with logins(database_url, vector_schema) as made:
        yield made


async def test_a_service_needs_no_more_than_its_role(
    login: Login, database_url: str, settings: Any, make_client: MakeClient, vector_schema: str
) -> None:
    """The whole of the REST API, as a member of pgshelf_service; shelves and indexes as a worker."""
    service = login("pgshelf_service")
    with psycopg.connect(database_url, autocommit=True) as admin:
        owner = f"{admin.execute('select current_database()').fetchone()[0]}_owner"[:60]  # type: ignore[index]  # one row
        hand_over(admin, owner, vector_schema)
    worker = login("pgshelf_worker")
    try:
        ask(database_url, f"grant {owner} to pgshelf_worker with inherit false, set true")
        served = msgspec.structs.replace(settings, database_url=service, worker_enabled=True, worker_interval=0.05)
        client = await make_client(served, headers=asking.bearer(asking.key(database_url, "root", "admin")))
        await write_and_read(client)
        await change_libraries(client, msgspec.structs.replace(settings, database_url=worker))
        await manage_keys(client)
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/ready")).json()["status"] == "ready"
        assert "grant pg_monitor to" in ok(await client.get("/v1/replication"))["hidden"]
    finally:
        with psycopg.connect(database_url, autocommit=True) as admin:
            admin.execute(f"reassign owned by {owner} to current_user")
            admin.execute(f"drop owned by {owner}")
            admin.execute(f"drop role {owner}")


def hand_over(admin: psycopg.Connection[Any], owner: str, vector_schema: str) -> None:
    """Make the schema the property of a role that is no superuser, as if that had migrated."""
    admin.execute(f"create role {owner} nologin")
    admin.execute(
        sql.SQL("grant usage on schema {} to {}").format(sql.Identifier(vector_schema), sql.Identifier(owner))
    )
    admin.execute(
        f"""do $$
        declare v_name text;
        begin
          alter schema pgshelf owner to {owner};
          for v_name in select format('%s %s', k.kind, c.oid::regclass) from pg_class c
            join (values ('r', 'table'), ('p', 'table'), ('v', 'view'), ('S', 'sequence')) k(relkind, kind)
              on k.relkind = c.relkind::text
            where c.relnamespace = 'pgshelf'::regnamespace and (c.relkind <> 'S'
              or not exists (select from pg_depend d where d.objid = c.oid and d.deptype in ('a', 'i'))) loop
            execute format('alter %s owner to {owner}', v_name);
          end loop;
          for v_name in select p.oid::regprocedure from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace loop
            execute format('alter function %s owner to {owner}', v_name);
          end loop;
        end $$""".encode()
    )


async def write_and_read(client: httpx2.AsyncClient) -> None:
    await asking.local(client, attributes={"year": "number"}, metadata={"team": "docs"})
    path = at("libraries", "shelf")
    first = await asking.document(client, "a", text="Vacuum removes dead rows.", metadata={"year": 2025})
    await asking.document(client, "b", text="Locks are waited for.", metadata={"year": 2026})
    ok(await client.post(f"{path}/documents?wait=false", json={"key": "c", "text": "Embedded later."}), 202)
    batch = {"documents": [{"key": f"n{n}", "text": f"note number {n}", "metadata": {"year": n}} for n in range(5)]}
    again = {"Idempotency-Key": "once"}
    assert ok(await client.post(f"{path}/documents/batch", json=batch, headers=again)) == ok(
        await client.post(f"{path}/documents/batch", json=batch, headers=again)
    )
    lines = b"".join(b'{"key": "i%d", "text": "imported %d"}\n' % (n, n) for n in range(30))
    imported = await client.post(f"{path}/import", content=lines, headers={"Content-Type": "application/x-ndjson"})
    assert msgspec.json.decode(imported.text.splitlines()[-1])["created"] == 30, imported.text
    ok(await client.post(f"{path}/events", json={"id": "e1", "text": "something happened"}), 202)

    async def embedded() -> bool:
        return bool(ok(await client.get(f"{path}/stats"))["pending"] == 0)

    await asking.until(embedded)
    for mode in ("vector", "text", "hybrid"):
        body = {"query": "dead rows", "mode": mode, "k": 3, "filter": {"year": {"$gte": 2020}}, "total": True}
        hits = ok(await client.post(f"{path}/search", json={**body, "facets": ["year"], "explain": True}))["hits"]
        assert hits[0]["key"] == "a"
    like = {"like": {"document": "a"}, "group_by": "document", "k": 2}
    assert len(ok(await client.post(f"{path}/search", json=like))["hits"]) == 2
    ok(await client.post("/v1/search", json={"libraries": ["shelf"], "query": "rows"}))
    ok(await client.post(f"{path}/facets", json={"attributes": ["year"]}))
    ok(
        await client.patch(
            f"{path}/documents/a", json={"title": "Vacuum"}, headers={"If-Match": f'"{first["version"]}"'}
        )
    )
    chunk = (await asking.chunks(client, "a"))[0]
    ok(await client.patch(at("libraries", "shelf", "chunks", chunk["id"]), json={"text": "Vacuum frees space."}))
    ok(await client.get(at("libraries", "shelf", "chunks", chunk["id"])))
    found = {"filter": {"year": {"$lt": 10}}, "sort": [{"field": "year"}], "total": True}
    assert ok(await client.post(f"{path}/documents/query", json=found))["total"] == 5
    ok(await client.post(f"{path}/documents/update", json={"filter": {"year": 1}, "patch": {"seen": True}}))
    assert ok(await client.post(f"{path}/documents/delete", json={"filter": {"year": 2}})) == {"affected": 1}
    ok(await client.delete(f"{path}/documents/b"), 204)
    assert len(await asking.pages(client, f"{path}/documents", 10)) == 37
    exported = await client.get(f"{path}/export?embeddings=true")
    assert len(exported.text.splitlines()) == 37, exported.text[-500:]
    assert len(ok(await client.get(f"{path}/changes?since=beginning&limit=500"))["items"]) > 30


async def change_libraries(client: httpx2.AsyncClient, worker: Any) -> None:
    path = at("libraries", "shelf")
    ok(await client.put(f"{path}/index", json={"type": "hnsw"}), 202)
    ok(await client.patch(path, json={"description": "moves", "attributes": {"year": "number", "lang": "text"}}))
    await shelves.reconcile_all_async(worker, sessions.Pace(grace=0, sweep=0, retry=0))
    state = ok(await client.get(f"{path}/index"))
    assert (state["actual"]["type"], state["state"]) == ("hnsw", "ready") and state["shelf"] > 0, state
    assert ok(await client.post(f"{path}/search", json={"query": "space"}))["hits"][0]["key"] == "a"
    await asking.document(client, "d", text="Written to a shelf of its own.")
    ok(await client.put(f"{path}/embedder", json={"provider": "local", "dimension": 64}), 202)
    ok(await client.delete(f"{path}/embedder"))
    assert [each["name"] for each in ok(await client.get("/v1/libraries"))["items"]] == ["shelf"]
    await asking.local(client, "gone")
    ok(await client.delete(at("libraries", "gone")), 204)


async def manage_keys(client: httpx2.AsyncClient) -> None:
    made = ok(await client.post("/v1/keys", json={"name": "crawler", "role": "reader", "libraries": ["shelf"]}), 201)
    rotated = ok(await client.post("/v1/keys/crawler/rotate", json={}))
    as_crawler = asking.bearer(rotated["secret"])
    token = ok(await client.post("/v1/token", json={}, headers=as_crawler), 201)
    seen = ok(await client.get("/v1/libraries", headers=asking.bearer(token["token"])))["items"]
    assert [each["name"] for each in seen] == ["shelf"]
    assert {each["name"] for each in ok(await client.get("/v1/keys"))["items"]} == {"root", "crawler"}
    ok(await client.delete(f"/v1/keys/{made['id']}"), 204)
    assert (await client.get("/v1/libraries", headers=as_crawler)).status_code == 401


def test_all_that_the_service_calls_is_granted_to_it(database_url: str) -> None:
    """A function that is new in service/ fails here until sql/90_grants.sql names it."""
    folder = Path(shelves.__file__).parent
    # what builds is the worker's, who becomes the owner
    owners = {
        "shelves.py",
        "moves.py",
        "index_builds.py",
        "reembedding.py",
        "migrate.py",
        "tables.py",
        "benchmarks.py",
    }
    called = {
        name
        for file in folder.glob("*.py")
        if file.name not in owners
        for name in re.findall(r"(?<!\.)pgshelf\.(\w+)\(|func\.pgshelf\.(\w+)", file.read_text())
    }
    names = {one or other for one, other in called} - {"grant_library", "revoke_library"}
    granted = {
        name
        for (name,) in ask(
            database_url,
            "select p.proname from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace"
            " and has_function_privilege('pgshelf_service', p.oid, 'execute')",
        )
    }
    assert len(names) > 60
    assert names <= granted
