"""A database that holds a corpus as a library, and how searches in it are judged and timed; run by none."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psycopg
from pgvector.psycopg import register_vector
from psycopg.types.json import Jsonb

from benchmarks._corpus import DECLARED, Corpus
from pgshelf import embedded, migrate, shelves

if TYPE_CHECKING:
    from numpy.typing import NDArray


@contextlib.contextmanager
def database(version: int = 18) -> Iterator[psycopg.Connection[Any]]:
    """A migrated PostgreSQL of its own in the temporary directory, and a connection as the service has them."""
    with tempfile.TemporaryDirectory(prefix="pgshelf-bench-") as folder:
        with embedded.start(Path(folder) / "data", version) as server:
            migrate.upgrade(server.url(), warn=False)
            with psycopg.connect(server.url(), autocommit=True, prepare_threshold=0) as connection:
                register_vector(connection)
                connection.execute("set plan_cache_mode = force_custom_plan")
                connection.execute("set jit = off")
                yield connection


def load(
    connection: psycopg.Connection[Any], corpus: Corpus, name: str, declared: dict[str, str] = DECLARED
) -> uuid.UUID:
    """A library of the corpus on shelf 0, its numbers declared as attributes, or others; returns its id."""
    library = uuid.uuid5(uuid.NAMESPACE_OID, name)
    connection.execute(
        """insert into pgshelf.libraries
          (id, name, dimension, metric, embedder, chunking, attributes, attributes_ready)
        values (%(id)s, %(name)s, %(dimension)s, %(metric)s,
          jsonb_build_object('provider', 'none', 'dimension', %(dimension)s::int), '{"size": 1200, "overlap": 0}',
          %(declared)s, %(declared)s)""",
        {
            "id": library, "name": name, "dimension": corpus.dimension, "metric": corpus.metric,
            "declared": json.dumps(declared),
        },
    )  # fmt: skip
    ids = [uuid.uuid5(library, each["key"]) for each in corpus.documents]
    question = "select d, pgshelf.place_of(%s, d, 1) from unnest(%s::uuid[]) d"
    place = dict(connection.execute(question, [library, ids]).fetchall())
    with connection.transaction(), connection.cursor() as cursor:
        columns = "place, library_id, id, key, title, source, metadata"
        with cursor.copy(f"copy pgshelf.documents ({columns}) from stdin") as copy:
            for key, each in zip(ids, corpus.documents, strict=True):
                metadata = json.dumps(each["metadata"])
                copy.write_row((place[key], library, key, each["key"], each["title"], each["source"], metadata))
        columns = "shelf, place, library_id, document_id, ordinal, id, text, metadata, embedding, language"
        with cursor.copy(f"copy pgshelf.chunks ({columns}) from stdin with (format binary)") as copy:
            copy.set_types("int4 int4 uuid uuid int4 uuid text jsonb vector text".split())
            for row in chunk_rows(corpus, library, ids, place):
                copy.write_row(row)
    connection.execute("vacuum analyze pgshelf.documents, pgshelf.chunks_s0, pgshelf.attribute_values")
    return library


def chunk_rows(
    corpus: Corpus, library: uuid.UUID, ids: list[uuid.UUID], place: dict[uuid.UUID, int]
) -> Iterator[tuple[Any, ...]]:
    """The rows of the table chunks, in order."""
    starts = np.searchsorted(corpus.document, np.arange(len(ids)))
    for i, owner in enumerate(corpus.document):
        document, ordinal = ids[owner], i - int(starts[owner])
        metadata = Jsonb({"grade": float(corpus.grades[i]), "part": ordinal % 7})
        yield (
            0, place[document], library, document, ordinal, chunk_id(library, i), corpus.texts[i], metadata,
            corpus.vectors[i], "english",
        )  # fmt: skip


def chunk_id(library: uuid.UUID, number: int) -> uuid.UUID:
    """The id of a chunk by its place in the corpus."""
    return uuid.uuid5(library, f"chunk {number}")


def index(connection: psycopg.Connection[Any], name: str, wanted: dict[str, Any]) -> float:
    """Have the reconciler give a library an index, on a shelf of its own; returns the seconds it took."""
    started = time.perf_counter()
    connection.execute("select pgshelf.want_index(%s, %s, 1)", [name, Jsonb(wanted)])
    shelves.reconcile_all(connection.info.dsn)
    connection.execute("vacuum analyze pgshelf.documents, pgshelf.attribute_values, pgshelf.chunks_s0")
    row = connection.execute(
        "select index_actual, index_error from pgshelf.libraries where name = %s", [name]
    ).fetchone()
    if row is None or row[1] or row[0]["type"] != wanted["type"]:
        raise SystemExit(f"the library should have an index {wanted}, but has {row}")
    return time.perf_counter() - started


# -- measuring


class Truth:
    """Exact distances of the queries to all chunks, by numpy in double precision."""

    def __init__(self, corpus: Corpus, library: uuid.UUID) -> None:
        self.numbers = {chunk_id(library, i): i for i in range(len(corpus.texts))}
        queries, vectors = corpus.queries.astype(np.float64), corpus.vectors.astype(np.float64)
        if corpus.metric == "cosine":
            queries /= np.linalg.norm(queries, axis=1, keepdims=True)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            self.distances = 1 - queries @ vectors.T
        else:
            squares = (queries**2).sum(axis=1)[:, None] + (vectors**2).sum(axis=1) - 2 * queries @ vectors.T
            self.distances = np.sqrt(np.maximum(squares, 0))

    def recall(self, query: int, found: Iterable[uuid.UUID], k: int, among: NDArray[np.bool_] | None = None) -> float:
        """The share of the k nearest that was found; whatever is as near as the k-th counts as one of them."""
        distances = self.distances[query]
        candidates = distances if among is None else distances[among]
        k = min(k, len(candidates))
        if not k:
            return 1.0
        numbers = {self.numbers[each] for each in found}
        reach = np.partition(candidates, k - 1)[k - 1] * (1 + 1e-5) + 1e-7  # what single precision cannot tell apart
        good = sum(distances[i] <= reach and (among is None or among[i]) for i in numbers)
        return min(float(good) / k, 1.0)


def clock(connection: psycopg.Connection[Any], cpu: bool) -> Callable[[], int]:
    """Nanoseconds now: of this process's clock, or with `cpu` those that the server's process has spent computing.

    The latter (Linux only) is for machines that others use too; waiting, sending and receiving are not in it.
    """
    if not cpu:
        return time.perf_counter_ns
    accounts = Path(f"/proc/{connection.info.backend_pid}/schedstat")

    def spent() -> int:
        time.sleep(0.0005)  # until the server's process waits again, and its time is booked
        return int(accounts.read_text().split()[0])

    return spent


class Stopwatch:
    """Milliseconds of a statement, by such a clock."""

    def __init__(self, connection: psycopg.Connection[Any], cpu: bool) -> None:
        self.connection = connection
        self._now = clock(connection, cpu)

    def run(self, statement: str, parameters: Any) -> tuple[float, list[tuple[Any, ...]]]:
        """Execute a prepared statement: its milliseconds and its rows."""
        before = self._now()
        rows = self.connection.execute(statement, parameters, binary=True, prepare=True).fetchall()
        return (self._now() - before) / 1e6, rows
