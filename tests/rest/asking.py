"""What the tests of the REST API say again and again: make a library, write a document, expect a problem."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any
from urllib.parse import quote

import httpx2
import numpy as np
import psycopg

from pgshelf import credentials
from pgshelf.errors import CODES

# What an answer must never hold, whatever went wrong.
INSIDES = ("Traceback", 'File "', "psycopg", "sqlalchemy", "asyncpg", "pgshelf.chunks_s", "select ", "insert into")


def at(*parts: str) -> str:
    """A path below /v1 whose parts are percent-encoded, `/` included."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


def problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """Expect a problem of this status and code, in every respect that clients may rely on, and return its body."""
    assert (response.status_code, code_of(response)) == (status, code), response.text
    assert response.headers["content-type"].split(";")[0] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["type"] == f"/errors#{code}"
    assert (body["status"], body["title"]) == CODES[code]
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["instance"].startswith("/")
    assert len(body["detail"]) > 10 and body["detail"][-1:] not in ":,", body["detail"]
    assert not [inside for inside in INSIDES if inside in body["detail"]], body["detail"]
    for item in body.get("errors") or []:
        assert set(item) == {"path", "message"} and item["path"] and item["message"], item
    assert ("retry-after" in response.headers) == (status in (429, 503, 504)), response.headers
    return body


def code_of(response: httpx2.Response) -> Any:
    """The code of a problem, or what came instead."""
    try:
        return response.json().get("code")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return response.content[:200]


def ok(response: httpx2.Response, status: int = 200) -> Any:
    """Expect a success and return its body."""
    assert response.status_code == status, response.text
    return response.json() if response.content else None


def key(
    url: str,
    name: str,
    role: str = "reader",
    *libraries: str,
    expires_at: datetime | None = None,
    revoked: bool = False,
) -> str:
    """A key, made in the database; its secret. Without libraries it sees all."""
    made = credentials.mint()
    given = [name, role, list(libraries) or None, expires_at, made.hash, made.hint]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("select pgshelf.create_key(%s, %s, %s, %s, %s, %s)", given)
        if revoked:
            connection.execute("select pgshelf.revoke_key(%s)", [name])
    return made.secret


def bearer(secret: str) -> dict[str, str]:
    """The header that proves who calls."""
    return {"Authorization": f"Bearer {secret}"}


async def library(client: httpx2.AsyncClient, name: str = "shelf", dimension: int = 3, **fields: Any) -> dict[str, Any]:
    """A library whose vectors the client brings, unless `embedder` says otherwise."""
    given = {"name": name, "embedder": {"provider": "none"}, "dimension": dimension, **fields}
    if fields.get("embedder", {}) is None or fields.get("embedder", {}).get("provider") == "local":
        given = {name: value for name, value in given.items() if name != "dimension" and value is not None}
    made: dict[str, Any] = ok(await client.post("/v1/libraries", json=given), 201)
    return made


async def local(client: httpx2.AsyncClient, name: str = "shelf", **fields: Any) -> dict[str, Any]:
    """A library with the local embedder."""
    return await library(client, name, embedder={"provider": "local"}, **fields)


async def document(
    client: httpx2.AsyncClient, key: str | None = None, *vectors: list[float], into: str = "shelf", **fields: Any
) -> dict[str, Any]:
    """A document with one chunk for each vector, or with what `fields` say."""
    body: dict[str, Any] = {"key": key, **fields}
    if "text" not in body and "chunks" not in body:
        given = vectors or ([1.0, 0.0, 0.0],)
        body["chunks"] = [{"text": f"chunk {index}", "embedding": list(item)} for index, item in enumerate(given)]
    response = await client.post(at("libraries", into, "documents"), json=body)
    assert response.status_code in (200, 201, 202), response.text
    made: dict[str, Any] = response.json()
    return made


async def chunks(client: httpx2.AsyncClient, document: str, *, embedding: bool = False) -> list[dict[str, Any]]:
    """All chunks of a document in the library `shelf`."""
    query = {"include": "embedding"} if embedding else {}
    found = ok(await client.get(at("libraries", "shelf", "documents", document, "chunks"), params=query))
    items: list[dict[str, Any]] = found["items"]
    return items


async def pages(client: httpx2.AsyncClient, path: str, limit: int) -> list[dict[str, Any]]:
    """Everything of a list, page by page."""
    found: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = ok(await client.get(path, params={"limit": limit, **after}))
        assert len(page["items"]) <= limit
        found += page["items"]
        if page["next"] is None:
            return found
        after = {"after": page["next"]}


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    """Wait for something that the worker does."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110 - the condition is another process's
            await asyncio.sleep(0.05)


def raw(*numbers: float) -> bytes:
    """A vector as it travels in MessagePack: little-endian float32."""
    return np.asarray(numbers, dtype="<f4").tobytes()
