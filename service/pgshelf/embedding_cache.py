"""The embedding cache: vectors that a provider made, in PostgreSQL, for every process and both kinds of text.

It only ever spares a call: where it cannot be read or written, the provider is asked as if it was not there.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import psycopg
import sqlalchemy
from pgvector import Vector
from prometheus_client import Counter
from sqlalchemy.pool import Pool

from pgshelf import database
from pgshelf.embedders import Embedder, Kind, described
from pgshelf.errors import Problem
from pgshelf.settings import Settings
from pgshelf.timing import stage

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("pgshelf.embedding")
LOOKUPS = Counter("pgshelf_embedding_cache_lookups", "Texts looked up in the cache.", ["provider", "outcome"])
EVICT_EVERY = 60.0  # seconds: counting the rows is not free
EVICT_AT_ONCE = 5000
_evicted: WeakKeyDictionary[Pool, float] = WeakKeyDictionary()


def keys_of(embedder: Embedder, texts: Sequence[str], kind: Kind) -> list[bytes]:
    """SHA-256 of everything that decides a vector, one for each text."""
    start = hashlib.sha256(msgspec.json.encode([described(embedder), kind], order="sorted") + b"\0")
    keys = []
    for text in texts:
        digest = start.copy()
        digest.update(text.encode())
        keys.append(digest.digest())
    return keys


def used(settings: Settings, embedder: Embedder) -> bool:
    """Whether vectors of this embedder are remembered at all."""
    return embedder.cached and settings.embedding_cache_rows > 0


async def look_up(
    engine: sqlalchemy.Engine, embedder: Embedder, texts: Sequence[str], kind: Kind
) -> dict[str, NDArray[np.float32]]:
    """The vectors of those texts that are remembered."""
    texts_of = dict(zip(keys_of(embedder, texts, kind), texts, strict=True))
    try:
        with stage("cache"):
            rows = await database.run(engine, "select * from pgshelf.cached_embeddings(%s)", list(texts_of))
    except (psycopg.Error, Problem) as error:
        log.warning("the embedding cache cannot be read: %s", error)
        rows = []
    found = {texts_of[bytes(key)]: np.asarray(vector.to_numpy(), dtype=np.float32) for key, vector in rows}
    LOOKUPS.labels(embedder.provider, "hit").inc(len(found))
    LOOKUPS.labels(embedder.provider, "miss").inc(len(texts) - len(found))
    return found


async def remember(
    engine: sqlalchemy.Engine, embedder: Embedder, made: Mapping[str, NDArray[np.float32]], kind: Kind
) -> None:
    """Keep vectors for whoever asks for the same texts again."""
    keys, vectors = keys_of(embedder, list(made), kind), [Vector(row) for row in made.values()]
    try:
        with stage("cache"):
            statement = "select pgshelf.cache_embeddings(%b, %b, %s, %s)"
            await database.run(engine, statement, keys, vectors, embedder.provider, embedder.model)
    except (psycopg.Error, Problem) as error:
        log.warning("the embedding cache cannot be written: %s", error)


async def evict(engine: sqlalchemy.Engine, settings: Settings) -> bool:
    """A step of the worker: forget the least recently used beyond PGSHELF_EMBEDDING_CACHE_ROWS. Is there more to do?"""
    now = time.monotonic()
    if now < _evicted.get(engine.pool, 0.0):
        return False
    statement = "select pgshelf.evict_embeddings(%s, %s)"
    gone = (await database.run(engine, statement, settings.embedding_cache_rows, EVICT_AT_ONCE))[0][0]
    if gone == EVICT_AT_ONCE:
        return True
    _evicted[engine.pool] = now + EVICT_EVERY
    return False
