"""Exact search over 10,000 chunks: over HTTP, through pgshelf.search, and by plain pgvector, side by side in one run.

Also prints how long a restart over the same data takes to be ready. Vectors are random, 256 dimensions, cosine: an
exact scan costs the same whatever they hold. Starts a PostgreSQL and a service of its own; about half a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import numpy as np
import psycopg
from pgvector.psycopg import register_vector

from pgshelf import embedded
from pgshelf_client import Client, NewChunk, Unavailable

DIMENSION = 256
PER_DOCUMENT = 100
FUNCTION = "select * from pgshelf.search('bench', %s)"
PLAIN = """select c.id, c.text, c.embedding <=> %s as distance from pgshelf.chunks_s0 c
  where c.library_id = %s order by distance limit 10"""


@contextlib.contextmanager
def service(data_dir: Path, workers: int) -> Iterator[tuple[str, float]]:
    """A running `pgshelf serve`: its address, and the seconds until it was ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pgshelf.cli", "serve", "--port", str(port), "--workers", str(workers)]
    environment = {**os.environ, "PGSHELF_DATA_DIR": str(data_dir), "PGSHELF_LOG_LEVEL": "warning"}
    environment.pop("PGSHELF_DATABASE_URL", None)
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{url}/ready", timeout=5).status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit("the service did not start")
            time.sleep(0.02)
        yield url, time.perf_counter() - started
    finally:
        process.terminate()
        process.wait(60)


def fill(client: Client, chunks: int, rng: np.random.Generator) -> None:
    """A library of random vectors, a hundred chunks a document."""
    client.create_library("bench", embedder={"provider": "none"}, dimension=DIMENSION)
    for number in range(chunks // PER_DOCUMENT):
        vectors = rng.normal(size=(PER_DOCUMENT, DIMENSION)).astype(np.float32)
        passages: list[NewChunk] = [
            {"text": f"passage {number} {i}", "embedding": v.tolist()} for i, v in enumerate(vectors)
        ]
        client.add_document("bench", key=f"document {number}", chunks=passages)


def median(call: Callable[[np.ndarray], object], queries: np.ndarray) -> tuple[float, float]:
    """Median and 95th percentile of the milliseconds of a call, one at a time."""
    spent = []
    for query in queries:
        started = time.perf_counter()
        call(query)
        spent.append((time.perf_counter() - started) * 1000)
    return statistics.median(spent), sorted(spent)[int(len(spent) * 0.95)]


def main() -> None:
    """Fill, measure, restart, print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--chunks", type=int, default=10_000)
    options.add_argument("--queries", type=int, default=200)
    options.add_argument("--seed", type=int, default=1)
    chosen = options.parse_args()
    rng = np.random.default_rng(chosen.seed)
    with tempfile.TemporaryDirectory(prefix="pgshelf-bench-") as folder:
        data_dir = Path(folder) / "data"
        with service(data_dir, 2) as (url, first), Client(url) as client:
            started = time.perf_counter()
            fill(client, chosen.chunks, rng)
            filled = time.perf_counter() - started
            queries = rng.normal(size=(chosen.queries, DIMENSION)).astype(np.float32)
            with embedded.start(data_dir) as server, psycopg.connect(server.url(), autocommit=True) as connection:
                register_vector(connection)
                connection.execute("vacuum analyze pgshelf.chunks_s0")
                row = connection.execute("select id from pgshelf.libraries").fetchone()
                library = row[0] if row else None
                figures = {
                    "REST, over HTTP": median(lambda q: client.search("bench", vector=q), queries),
                    "pgshelf.search, SQL": median(
                        lambda q: connection.execute("select * from pgshelf.search('bench', %s)", [q]).fetchall(),
                        queries,
                    ),
                    "plain pgvector, SQL": median(
                        lambda q: connection.execute(PLAIN, [q, library]).fetchall(), queries
                    ),
                }
        with service(data_dir, 2) as (url, again), Client(url) as client:
            with contextlib.suppress(Unavailable):
                client.search("bench", vector=queries[0])
    print(f"{chosen.chunks} chunks of {DIMENSION} dimensions, k = 10, {chosen.queries} queries, seed {chosen.seed}")
    print(f"{'exact search':<22}{'median':>10}{'p95':>10}{'ratio':>8}")
    least = figures["plain pgvector, SQL"][0]
    for name, (middle, late) in figures.items():
        print(f"{name:<22}{middle:>7.2f} ms{late:>7.2f} ms{middle / least:>8.2f}")
    print(f"filled in {filled:.1f} s; ready in {first:.1f} s from nothing, in {again:.1f} s over this data")


if __name__ == "__main__":
    main()
