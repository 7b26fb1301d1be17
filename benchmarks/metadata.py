"""Changing the metadata of 10,000 documents: in a library with an hnsw index, and in one without, side by side.

Metadata lives on documents, which no vector index covers, so both are to take the same time (goal: 1.5 times at most).
By one filter, and by one PATCH for each document; the best of some rounds counts. Starts a PostgreSQL of its own;
about a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from benchmarks._library import clock
from pgshelf import embedded, migrate, shelves
from pgshelf.settings import Settings

GOAL = 1.5
DIMENSION = 128
ALL = Jsonb({"$id": {"$exists": True}})


def main() -> None:
    """Fill two libraries, then change them in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="2,000 documents, one round")
    parser.add_argument("--cpu", action="store_true", help="the server's CPU time, not the client's clock (Linux)")
    options = parser.parse_args()
    if options.quick:
        options.documents, options.rounds = 2_000, 1
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder), 18)
        try:
            url = server.url()
            migrate.upgrade(url, warn=False)
            with psycopg.connect(url, autocommit=True) as connection:
                for name in ("flat", "hnsw"):
                    fill(connection, name, options.documents)
                shelves.reconcile_all(url, Settings(promote_at=1_000_000))
                connection.execute("vacuum analyze")
                measure(connection, options)
        finally:
            server.stop()


def fill(connection: psycopg.Connection[Any], index: str, documents: int) -> None:
    """A library of that index, one chunk a document."""
    connection.execute(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking, index, index_state)
        values (%s, %s, %s, '{}', %s, 'building')""",
        [index, DIMENSION, Jsonb({"provider": "none", "dimension": DIMENSION}), Jsonb({"type": index})],
    )
    connection.execute(
        """insert into pgshelf.documents (place, library_id, key, metadata)
        select 1, l.id, n::text, '{"year": 1999}' from pgshelf.libraries l, generate_series(1, %s) n
        where l.name = %s""",
        [documents, index],
    )
    connection.execute(
        """insert into pgshelf.chunks_s0 (shelf, place, library_id, document_id, ordinal, text, embedding, language)
        select 0, 1, d.library_id, d.id, 0, 'text ' || d.key,
          (select array_agg(random() - 0.5 + 0 * (i + length(d.key))) from generate_series(1, %s) i)::vector, 'english'
        from pgshelf.documents d join pgshelf.libraries l on l.id = d.library_id where l.name = %s""",
        [DIMENSION, index],
    )


def measure(connection: psycopg.Connection[Any], options: argparse.Namespace) -> None:
    """Print the seconds of both, and their ratio; the goal holds for each way."""
    spent: dict[tuple[str, str], list[float]] = {}
    now = clock(connection, options.cpu)
    for turn in range(options.rounds):
        for library in ("flat", "hnsw"):
            started = now()
            connection.execute(
                "select pgshelf.update_documents(%s, %s, %s)", [library, ALL, Jsonb({"year": 2000 + turn})]
            )
            spent.setdefault(("by filter", library), []).append((now() - started) / 1e9)
            started = now()
            for key in range(1, options.documents + 1):
                connection.execute(
                    "select pgshelf.patch_document(%s, %s, '{}', %s, null)",
                    [library, str(key), Jsonb({"turn": turn})],
                )
            spent.setdefault(("by PATCH, each", library), []).append((now() - started) / 1e9)
    print(f"seconds by {'the CPU time of the server' if options.cpu else 'the clock of the client'}")
    for way in ("by filter", "by PATCH, each"):
        flat, hnsw = (min(spent[way, library]) for library in ("flat", "hnsw"))
        kept = "kept" if hnsw <= GOAL * flat else "MISSED"
        print(
            f"{options.documents} documents {way:15} flat {flat:6.2f} s, hnsw {hnsw:6.2f} s: {hnsw / flat:.2f} ({kept})"
        )


if __name__ == "__main__":
    main()
