"""New vectors for chunks that are there: changed in place, and their documents written anew, side by side.

A PATCH of a chunk's embedding is one UPDATE, which is to be at least 2 times faster than taking its document away and
writing it anew. In a library with an hnsw index, documents of ten chunks, one of which gets a new vector; through the
functions that the service calls, each call a transaction. Starts a PostgreSQL of its own; about a minute.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import Vector
from pgvector.psycopg import register_vector
from psycopg.types.json import Jsonb

from pgshelf import embedded, migrate, shelves
from pgshelf.settings import Settings

GOAL = 2.0
DIMENSION = 384
PER_DOCUMENT = 10


def main() -> None:
    """Fill a library, then give all chunks of some documents new vectors, in turns both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1000, help="of ten chunks each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--changed", type=int, default=30, help="documents of a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder), 18)
        try:
            url = server.url()
            migrate.upgrade(url, warn=False)
            with psycopg.connect(url, autocommit=True) as connection:
                register_vector(connection)
                draw = np.random.default_rng(3)
                fill(connection, draw, options.documents)
                shelves.reconcile_all(url, Settings(promote_at=1_000_000))
                connection.execute("vacuum analyze")
                measure(connection, draw, options)
        finally:
            server.stop()


def vectors(draw: np.random.Generator) -> list[Vector]:
    """New ones for a document."""
    made: NDArray[np.float32] = draw.standard_normal((PER_DOCUMENT, DIMENSION), dtype=np.float32)
    return [Vector(row) for row in made]


def put(connection: psycopg.Connection[Any], key: str, given: list[Vector]) -> None:
    """Write a document, as the service does."""
    texts = [f"passage {number} of document {key}" for number in range(PER_DOCUMENT)]
    connection.execute("select pgshelf.put_document('l', %s, texts => %s, embeddings => %b)", [key, texts, given])


def fill(connection: psycopg.Connection[Any], draw: np.random.Generator, documents: int) -> None:
    """A library that wants an hnsw index."""
    connection.execute(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking, index, index_state)
        values ('l', %s, %s, '{}', '{"type": "hnsw"}', 'building')""",
        [DIMENSION, Jsonb({"provider": "none", "dimension": DIMENSION})],
    )
    with connection.transaction():
        for number in range(documents):
            put(connection, f"d{number}", vectors(draw))


def measure(connection: psycopg.Connection[Any], draw: np.random.Generator, options: argparse.Namespace) -> None:
    """Print the milliseconds of both ways, and their ratio."""
    patch = "select pgshelf.patch_chunk(%s, %s, null, %b, null)"
    spent: dict[str, list[float]] = {"in place": [], "anew": []}
    keys = iter(range(options.documents))
    for _ in range(options.rounds):
        for way, seconds in spent.items():
            chosen = [f"d{next(keys)}" for _ in range(options.changed)]
            found = connection.execute(
                """select c.library_id, c.id from pgshelf.chunks c join pgshelf.documents d on d.id = c.document_id
                where d.key = any (%s) and c.ordinal = 3 order by d.key""",
                [chosen],
            ).fetchall()
            given = [vectors(draw) for _ in chosen]
            started = time.perf_counter()
            if way == "in place":
                for (library, chunk), new in zip(found, given, strict=True):
                    connection.execute(patch, [library, chunk, new[3]])
            else:
                for key, new in zip(chosen, given, strict=True):
                    connection.execute("select pgshelf.delete_document('l', %s)", [key])
                    put(connection, key, new)
            seconds.append((time.perf_counter() - started) / options.changed * 1000)
    place, anew = (statistics.median(spent[way]) for way in spent)
    kept = "kept" if anew >= GOAL * place else "MISSED"
    print(f"in place {place:.2f} ms a chunk, its document anew {anew:.2f} ms: {anew / place:.2f} ({kept})")


if __name__ == "__main__":
    main()
