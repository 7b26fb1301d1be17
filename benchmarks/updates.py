"""New vectors for chunks that are there: changed in place, and their documents written anew, side by side.

A PATCH of a chunk's embedding is one UPDATE, which is to be at least 2 times faster than taking its document away and
writing it anew. With an hnsw index and without, documents of one chunk and of ten, one of which gets a new vector;
through the functions that the service calls, each call a transaction. Starts a PostgreSQL of its own; some minutes.
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
INDEXES = ("hnsw", "flat")
SIZES = (1, 10)  # chunks of a document


def main() -> None:
    """Fill the libraries, then give one chunk of some documents a new vector, in turns both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1000, help="of each library")
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
                cases = [(index, size) for index in INDEXES for size in SIZES]
                for index, size in cases:
                    fill(connection, draw, index, size, options.documents)
                shelves.reconcile_all(url, Settings(promote_at=1_000_000))
                connection.execute("vacuum analyze")
                for index, size in cases:
                    measure(connection, draw, index, size, options)
        finally:
            server.stop()


def vectors(draw: np.random.Generator, number: int) -> list[Vector]:
    """New ones for a document."""
    made: NDArray[np.float32] = draw.standard_normal((number, DIMENSION), dtype=np.float32)
    return [Vector(row) for row in made]


def put(connection: psycopg.Connection[Any], library: str, key: str, given: list[Vector]) -> None:
    """Write a document, as the service does."""
    texts = [f"passage {number} of document {key}" for number in range(len(given))]
    connection.execute(
        "select pgshelf.put_document(%s, %s, texts => %s, embeddings => %b)", [library, key, texts, given]
    )


def fill(connection: psycopg.Connection[Any], draw: np.random.Generator, index: str, size: int, documents: int) -> None:
    """A library that wants this index."""
    connection.execute(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking, index, index_state)
        values (%s, %s, %s, '{}', %s, 'building')""",
        [f"{index}-{size}", DIMENSION, Jsonb({"provider": "none", "dimension": DIMENSION}), Jsonb({"type": index})],
    )
    with connection.transaction():
        for number in range(documents):
            put(connection, f"{index}-{size}", f"d{number}", vectors(draw, size))


def measure(
    connection: psycopg.Connection[Any], draw: np.random.Generator, index: str, size: int, options: argparse.Namespace
) -> None:
    """Print the milliseconds of both ways, and their ratio."""
    library, changed = f"{index}-{size}", size // 2
    patch = "select pgshelf.patch_chunk(%s, %s, null, %b, null)"
    spent: dict[str, list[float]] = {"in place": [], "anew": []}
    keys = iter(range(options.documents))
    for _ in range(options.rounds):
        for way, seconds in spent.items():
            chosen = [f"d{next(keys)}" for _ in range(options.changed)]
            found = connection.execute(
                """select c.library_id, c.id from pgshelf.libraries l join pgshelf.documents d on d.library_id = l.id
                join pgshelf.chunks c on c.document_id = d.id and c.library_id = l.id and c.shelf = l.shelf
                where l.name = %s and d.key = any (%s) and c.ordinal = %s order by d.key""",
                [library, chosen, changed],
            ).fetchall()
            given = [vectors(draw, size) for _ in chosen]
            started = time.perf_counter()
            if way == "in place":
                for (library_id, chunk), new in zip(found, given, strict=True):
                    connection.execute(patch, [library_id, chunk, new[changed]])
            else:
                for key, new in zip(chosen, given, strict=True):
                    connection.execute("select pgshelf.delete_document(%s, %s)", [library, key])
                    put(connection, library, key, new)
            seconds.append((time.perf_counter() - started) / options.changed * 1000)
    place, anew = (statistics.median(spent[way]) for way in spent)
    kept = "kept" if anew >= GOAL * place else "MISSED"
    print(
        f"{index}, documents of {size}: one chunk in place {place:.2f} ms,"
        f" its document anew {anew:.2f} ms: {anew / place:.2f} ({kept})",
        flush=True,
    )


if __name__ == "__main__":
    main()
