"""Making the vectors of a library's texts, at once or from what is pending: shared by handlers and the worker."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec
from pgvector import Vector
from sqlalchemy.ext.asyncio import AsyncEngine

from pgshelf import database
from pgshelf.embedders import Embedder, EmbedderError, EmbedderUnavailable, Kind, TextRefused, embedder_for
from pgshelf.errors import Problem
from pgshelf.timing import stage


class LibraryConfig(msgspec.Struct, frozen=True):
    """What writing and searching need to know of a library."""

    id: UUID
    embedder: dict[str, Any]
    chunking: dict[str, int]


async def library_config(engine: AsyncEngine, library: str) -> LibraryConfig:
    """Look up a library by name or id; PS001 when there is none."""
    rows = await database.run(engine, "select l.id, l.embedder, l.chunking from pgshelf.library_named(%s) l", library)
    return LibraryConfig(*rows[0])


def embedder_of(choice: dict[str, Any]) -> Embedder:
    """The embedder that a library names; a problem when this server cannot provide it."""
    if choice["provider"] == "none":
        detail = "The library has no embedder (provider none): send vectors with the chunks and with the searches."
        raise Problem("no_embedder", detail)
    try:
        return embedder_for(choice["provider"], choice.get("model"), choice["dimension"])
    except ValueError as error:
        raise Problem("embedder_not_configured", str(error)) from None


async def embed(choice: dict[str, Any], texts: Sequence[str], kind: Kind, paths: Sequence[str]) -> list[Vector]:
    """Embed texts for a client; `paths` name each text in the request, for the problem that one may be."""
    try:
        with stage("embed"):
            return [Vector(row) for row in await embedder_of(choice).embed(texts, kind)]
    except TextRefused as error:
        path = paths[error.index]
        raise Problem(
            "text_not_embeddable", f"{path}: {error}", errors=[{"path": path, "message": str(error)}]
        ) from error
    except EmbedderUnavailable as error:
        raise Problem("embedder_unavailable", str(error), retry_after=error.retry_after) from error
    except EmbedderError as error:
        raise Problem("embedder_failed", str(error)) from error


def text_hash(text: str) -> str:
    """What `md5(text)` is in SQL: tells whether a chunk still holds the text that was embedded."""
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


async def store(engine: AsyncEngine, library: UUID, chunks: Sequence[UUID], texts: Sequence[str], vectors: Any) -> int:
    """Give pending chunks their vectors; chunks that changed meanwhile are left out. Returns how many were stored."""
    rows = await database.run(
        engine,
        "select pgshelf.store_embeddings(%s, %s, %s, %b)",
        library,
        list(chunks),
        [text_hash(text) for text in texts],
        [vector if isinstance(vector, Vector) else Vector(vector) for vector in vectors],
    )
    return int(rows[0][0])
