"""What a chunk takes on disk and its index in memory, by dimension, beside the formulas of docs/operations.md.

Random vectors, texts of 600 characters that PostgreSQL cannot compress much, ten chunks a document, index hnsw over
halfvec. Starts a PostgreSQL of its own; a minute or two.
"""

from __future__ import annotations

import argparse
import random
import string
from typing import Any

import numpy as np
import psycopg
from pgvector import Vector
from psycopg.types.json import Jsonb

from benchmarks import _library

PER_DOCUMENT = 10
CHARACTERS = 600
PAGE = 8160  # bytes of a page of 8192 that rows, or elements of an index, may fill: each lies on one page
ROW = 200  # bytes of a row beside its vector; text and words lie in the TOAST table
TEXT = 3.5  # bytes there for each character: the text, and where each word stands in it
ELEMENT = 300  # bytes of an element of the graph beside its vector, m = 16


def main() -> None:
    """Fill a library for each dimension, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=5000)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[256, 384, 768, 1024, 1536])
    options = parser.parse_args()
    print("bytes a chunk; in brackets what the formula says")
    print("| dimension | rows | keys and words' index | vector index | build memory (estimate) |")
    with _library.database() as connection:
        for dimension in options.dimensions:
            fill(connection, f"d{dimension}", dimension, options.chunks)
            _library.index(connection, f"d{dimension}", {"type": "hnsw"})
            show(connection, f"d{dimension}", dimension, options.chunks)


def fill(connection: psycopg.Connection[Any], name: str, dimension: int, chunks: int) -> None:
    """A library of random chunks."""
    lot, vectors = random.Random(dimension), np.random.default_rng(dimension)
    words = ["".join(lot.choices(string.ascii_lowercase, k=lot.randint(3, 9))) for _ in range(20_000)]
    connection.execute(
        "insert into pgshelf.libraries (name, dimension, embedder, chunking) values (%s, %s, %s, %s)",
        [name, dimension, Jsonb({"provider": "none", "dimension": dimension}), Jsonb({"size": 1200, "overlap": 0})],
    )
    for number in range(chunks // PER_DOCUMENT):
        texts = [" ".join(lot.choices(words, k=CHARACTERS // 7))[:CHARACTERS] for _ in range(PER_DOCUMENT)]
        made = [Vector(row) for row in vectors.normal(size=(PER_DOCUMENT, dimension)).astype("f4")]
        given = [name, f"d{number}", texts, made]
        connection.execute("select pgshelf.put_document(%s, key => %s, texts => %s, embeddings => %s)", given)


def show(connection: psycopg.Connection[Any], name: str, dimension: int, chunks: int) -> None:
    """One line of the table."""
    found = connection.execute(
        """select pg_table_size(c.oid), pg_indexes_size(c.oid) - pg_relation_size(v.oid), pg_relation_size(v.oid),
            e.memory_bytes
          from pgshelf.libraries l join pg_class c on c.oid = to_regclass('pgshelf.chunks_s' || l.shelf)
          join pg_class v on v.oid
            = to_regclass(format('pgshelf.chunks_s%%s_v%%s', l.shelf, l.index_actual ->> 'serial'))
          cross join lateral pgshelf.index_estimate(l.index_actual, %s::bigint, l.dimension, 1024 * 1024 * 1024) e
          where l.name = %s""",
        [chunks, name],
    ).fetchone()
    assert found is not None  # noqa: S101 - narrows the type: it was just made
    rows, keys, index, memory = (float(size) / chunks for size in found)
    told = f"{rows:6.0f} ({paged(4 * dimension + ROW) + TEXT * CHARACTERS:6.0f}) | {keys:21.0f}"
    told += f" | {index:6.0f} ({paged(2 * dimension + ELEMENT):6.0f}) | {memory:23.0f}"
    print(f"| {dimension:9} | {told} |", flush=True)


def paged(size: int) -> float:
    """The bytes that something takes of pages on which only whole ones lie."""
    return 8192 / (PAGE // size)


if __name__ == "__main__":
    main()
