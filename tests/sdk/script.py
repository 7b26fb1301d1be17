"""A server that answers by script, and one manner of calling for both clients."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2

from pgshelf_client import AsyncClient, Client

Answer = httpx2.Response | Exception


class Script:
    """Gives its answers in order, the last one for ever, and keeps the requests; an exception is raised."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        # A copy: a client of one kind leaves a response in a state that the other cannot read.
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def asked(self) -> list[str]:
        """The method and the path as it goes over the wire, of every request."""
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)


class Caller:
    """A client of either kind, every method awaited and every iterator collected."""

    def __init__(self, client: Client | AsyncClient) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.client, name)

        async def call(*args: Any, **options: Any) -> Any:
            result = method(*args, **options)
            if isinstance(result, Iterator):
                return list(result)
            if isinstance(result, AsyncIterator):
                return [item async for item in result]
            return await result if isinstance(self.client, AsyncClient) else result

        return call


def ok(body: Any = None, status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, json=body)


def problem(status: int, code: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
    body = {"type": f"/errors#{code}", "title": "A title", "status": status, "code": code, **fields}
    content = json.dumps(body).encode()
    return httpx2.Response(
        status, content=content, headers={"Content-Type": "application/problem+json", **(headers or {})}
    )


LIBRARY: dict[str, Any] = {
    "id": "0198c0de-0000-7000-8000-000000000001",
    "name": "handbook",
    "description": None,
    "dimension": 256,
    "metric": "cosine",
    "embedder": {
        "provider": "local", "model": "wordllama", "dimension": 256, "embedding_type": "float", "truncate": "end",
        "query_prefix": "query: ", "document_prefix": "passage: ",
    },
    "chunking": {"size": 1000, "overlap": 100},
    "language": "english",
    "attributes": {"year": "number", "lang": "text"},
    "attributes_ready": {"year": "number"},
    "metadata": {"team": "docs"},
    "version": 1,
    "created_at": "2025-01-02T03:04:05.678901Z",
    "updated_at": "2025-01-02T03:04:05.678901+00:00",
}  # fmt: skip
INDEX: dict[str, Any] = {
    "wanted": {"type": "hnsw"},
    "actual": {"type": "flat"},
    "state": "ready",
    "progress": 0.45,
    "phase": "building index: loading tuples",
    "error": None,
    "shelf": 0,
    "moving": True,
    "estimate": {"rows": 20000, "bytes": 17300000, "memory_bytes": 25300000, "seconds": 6.2},
}
EMBEDDER: dict[str, Any] = {
    "embedder": LIBRARY["embedder"],
    "wanted": {"provider": "local", "model": "wordllama", "dimension": 64},
    "state": "ready",
    "progress": 0.45,
    "embedded": 45,
    "total": 90,
    "error": None,
}
DOCUMENT: dict[str, Any] = {
    "id": "0198c0de-0000-7000-8000-000000000002",
    "key": "vacuum",
    "title": "Vacuum",
    "source": None,
    "metadata": {},
    "version": 3,
    "status": "ready",
    "chunks": {"total": 2, "pending": 0, "failed": 0},
    "created_at": "2025-01-02T03:04:05Z",
    "updated_at": "2025-01-02T03:04:05Z",
}
CHUNK: dict[str, Any] = {
    "id": "0198c0de-0000-7000-8000-000000000003",
    "document_id": DOCUMENT["id"],
    "ordinal": 0,
    "text": "Vacuum reclaims dead rows.",
    "metadata": {},
    "status": "ready",
    "error": None,
}
HIT: dict[str, Any] = {
    "chunk_id": CHUNK["id"],
    "document_id": DOCUMENT["id"],
    "key": "vacuum",
    "ordinal": 0,
    "score": 0.75,
    "distance": 0.25,
    "text": CHUNK["text"],
    "metadata": {},
    "document": {"title": "Vacuum", "source": None, "metadata": {}},
    "highlight": "<mark>Vacuum</mark> reclaims dead rows.",
    "library": None,
}
KEY: dict[str, Any] = {
    "id": "0198c0de-0000-7000-8000-000000000004",
    "name": "crawler",
    "role": "writer",
    "libraries": ["team-*"],
    "created_at": "2025-01-02T03:04:05Z",
    "expires_at": None,
    "revoked_at": None,
    "last_used_at": "2025-01-02T03:04:05Z",
    "secrets": [{"hint": "pgs_4fQz", "created_at": "2025-01-02T03:04:05Z", "expires_at": None}],
}
