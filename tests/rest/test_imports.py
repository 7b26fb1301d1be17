"""Imports, exports and batches over REST: what is written, what is refused, what is told."""

from __future__ import annotations

import json
from typing import Any

import httpx2

from tests.rest.asking import at, library

IMPORT = at("libraries", "shelf", "import")
EXPORT = at("libraries", "shelf", "export")
NDJSON = {"Content-Type": "application/x-ndjson"}


def lines(*documents: Any) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in documents)


def told(response: httpx2.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


async def test_import(client: httpx2.AsyncClient) -> None:
    await library(client)
    body = lines({"key": "a", "chunks": [{"text": "one", "embedding": [1, 0, 0]}]}, {"chunks": []})
    found = told(await client.post(IMPORT, content=body, headers=NDJSON))
    assert found == [
        {"lines": [1, 2], "created": 2, "replaced": 0, "pending": 0, "failed": []},
        {"done": True, "lines": 2, "skipped": 0, "created": 2, "replaced": 0, "pending": 0, "failed": 0},
    ]
    print((await client.get(EXPORT)).text)
    print(
        (
            await client.post(
                at("libraries", "shelf", "documents", "batch"),
                json={"documents": [{"key": "a", "chunks": [{"text": "one", "embedding": [1, 0, 0]}]}, 1]},
            )
        ).text
    )
    assert 0
