"""What happens between two steps of one request."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import psycopg
import pytest

FENCE = "select pg_advisory_xact_lock(x'6c6962'::int, hashtext(id::text)) from pgshelf.libraries"


@pytest.fixture
def fence(database_url: str) -> Any:
    """A session that keeps all writers of the library out until it is rolled back."""
    with psycopg.connect(database_url) as connection:
        yield connection


async def put_behind(fence: Any, client: httpx2.AsyncClient, database_url: str, *, then: str) -> httpx2.Response:
    """PUT a document again whose vectors are known; change the database when it has been decided to keep them."""
    document = "/v1/libraries/notes/documents/a"
    await client.post("/v1/libraries", json={"name": "notes"})
    assert (await client.put(document, json={"text": "the same words"})).status_code == 201
    fence.execute(FENCE)
    request = asyncio.create_task(client.put(document, json={"text": "the same words"}))
    with psycopg.connect(database_url, autocommit=True) as other:
        waiting = "select 1 from pg_locks where locktype = 'advisory' and not granted"
        while not other.execute(waiting).fetchone():  # noqa: ASYNC110 - the event is in PostgreSQL
            await asyncio.sleep(0.01)
        other.execute(then.encode())
    fence.rollback()
    return await request


async def test_vectors_that_vanish_before_the_write_are_made_behind_it(
    fence: Any, client: httpx2.AsyncClient, database_url: str
) -> None:
    answer = await put_behind(fence, client, database_url, then="update pgshelf.chunks set embedding = null")
    assert answer.status_code == 200
    assert answer.json()["status"] == "ready"
    hits = (await client.post("/v1/libraries/notes/search", json={"query": "words"})).json()["hits"]
    assert [hit["text"] for hit in hits] == ["the same words"]


async def test_a_write_is_not_denied_for_vectors_that_cannot_be_made_behind_it(
    fence: Any, make_client: Any, make_settings: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pgshelf import documents
    from pgshelf.errors import Problem

    async def broken(*_: Any) -> None:
        raise Problem("embedder_failed", "broken")

    monkeypatch.setattr(documents, "embed_pending", broken)
    client = await make_client(make_settings(database_url, worker_enabled=False))
    answer = await put_behind(fence, client, database_url, then="update pgshelf.chunks set embedding = null")
    assert answer.status_code == 202
    assert answer.json()["status"] == "pending"
