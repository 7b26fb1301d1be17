"""A service that was there before its schema, or whose schema was made anew under it, goes on by itself."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import psycopg
import pytest

from pgshelf import database, migrate, pools

DOCUMENT = {"chunks": [{"text": "one", "embedding": [1.0, 0.0]}]}
LIBRARY = {"name": "a", "dimension": 2, "embedder": {"provider": "none"}}


async def check_all_works(client: Any) -> None:
    assert (await client.get("/ready")).status_code == 200
    assert (await client.post("/v1/libraries", json=LIBRARY)).status_code == 201
    for _ in range(12):  # more often than the pool has connections
        assert (await client.put("/v1/libraries/a/documents/k", json=DOCUMENT)).status_code in (200, 201)
        hits = await client.post("/v1/libraries/a/search", json={"vector": [1.0, 0.0]})
        assert len(hits.json()["hits"]) == 1


async def test_a_service_that_began_before_the_first_migration(
    empty_database_url: str, make_settings: Any, make_client: Any, vector_schema: str
) -> None:
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("drop extension vector")
    client = await make_client(make_settings(empty_database_url))
    answer = await client.post("/v1/libraries", json=LIBRARY)
    assert (answer.status_code, answer.json()["code"]) == (503, "not_migrated")
    migrate.upgrade(empty_database_url, vector_schema=vector_schema)
    await check_all_works(client)


async def test_a_schema_and_an_extension_that_are_made_anew_under_a_service(
    empty_database_url: str, make_settings: Any, make_client: Any, vector_schema: str
) -> None:
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        connection.execute("drop extension vector")
    migrate.upgrade(empty_database_url, vector_schema=vector_schema)
    client = await make_client(make_settings(empty_database_url))
    await check_all_works(client)
    migrate.downgrade(empty_database_url, vector_schema=vector_schema)
    migrate.upgrade(empty_database_url, vector_schema=vector_schema)
    await check_all_works(client)


async def test_a_language_is_one_of_postgresqls_own(client: Any, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("create text search configuration public.house (copy = pg_catalog.english)")
    answer = await client.post("/v1/libraries", json={"name": "a", "language": "house"})
    assert answer.status_code == 400
    assert "english" in answer.json()["detail"] and "house," not in answer.json()["detail"]


async def test_if_match_any_wants_a_document_and_a_post_honours_it(client: Any) -> None:
    assert (await client.post("/v1/libraries", json=LIBRARY)).status_code == 201
    path, any_version = "/v1/libraries/a/documents", {"If-Match": "*"}
    assert (await client.put(f"{path}/k", json=DOCUMENT, headers=any_version)).status_code == 409
    assert (await client.put(f"{path}/k", json=DOCUMENT)).status_code == 201
    assert (await client.put(f"{path}/k", json=DOCUMENT, headers=any_version)).status_code == 200
    stale = await client.post(path, json={**DOCUMENT, "key": "k"}, headers={"If-Match": '"1"'})
    assert (stale.status_code, stale.json()["code"]) == (409, "version_mismatch")
    current = await client.post(path, json={**DOCUMENT, "key": "k"}, headers={"If-Match": '"2"'})
    assert current.status_code == 200


async def test_what_is_cancelled_gives_its_connection_back(
    database_url: str, make_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is at that time, also where psycopg gives way to others because the loop is busy."""
    monkeypatch.setattr("psycopg.waiting.MAX_BUSY_TIME", -1.0)
    engine = pools.make_engine(make_settings(database_url, pool_size=1), database_url)
    try:
        await database.run(engine, "select 1")
        for steps in range(12):
            asking = asyncio.create_task(database.run(engine, "select 1"))
            for _ in range(steps):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            gc.collect()  # a connection that was lost would be complained about here
            assert await asyncio.wait_for(database.run(engine, "select 1"), 5) == [(1,)]
    finally:
        await pools.close(engine)
