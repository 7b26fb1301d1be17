"""What the query cache saves and what it costs: the same searches over HTTP, with and without it, in turn.

Two services of one process each share a database with a library of 100,000 chunks, an hnsw index and the local
embedder; one keeps no answers. Each question is asked of that one, then of the other: for the first time, again (three
times, all of which count), and once more after something was changed. Medians in milliseconds, from the question's
first byte sent to the answer's last byte read, over connections that stay open, by geventhttpclient: a client that
takes longer than the answer (httpx 1.4 ms) would measure itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import psycopg
from geventhttpclient import HTTPClient
from psycopg.types.json import Jsonb

from benchmarks import _corpus, _library
from benchmarks._serving import serving
from pgshelf.embedders import described
from pgshelf.embedders.local import LocalEmbedder

GOAL = 10.0
AGAIN = 3  # times that an answer is asked for again
PORT = 18532
LIBRARY = "bench"
COLUMNS = ("without", "first time", "again", "after a change")


def main() -> None:
    """Fill a library, serve it twice, ask both."""
    parser = _corpus.options(__doc__)
    options = parser.parse_args()
    corpus = _corpus.chosen(options)
    with _library.database() as connection:
        _library.load(connection, corpus, LIBRARY)
        embedder = Jsonb(described(LocalEmbedder()))
        connection.execute("update pgshelf.libraries set embedder = %s", [embedder])
        seconds = _library.index(connection, LIBRARY, {"type": "hnsw"})
        print(f"{corpus.name}: {len(corpus.texts)} chunks, index built in {seconds:.0f} s", flush=True)
        url = connection.info.dsn
        with serving(url, PORT, CACHE_BYTES="0") as without, serving(url, PORT + 1) as kept:
            measure(connection, without, kept, corpus, options)


def questions(corpus: _corpus.Corpus, count: int) -> dict[str, list[dict[str, Any]]]:
    """Bodies of searches by their kind: a few words that lie beside each other in some chunk, or a vector."""
    random = np.random.default_rng(7)
    words = []
    for number in random.choice(len(corpus.texts), count, replace=False):
        said = corpus.texts[number].split()
        begin = int(random.integers(max(1, len(said) - 6)))
        words.append(" ".join(said[begin : begin + 6]).replace('"', " ").replace("-", " "))
    vectors = [corpus.queries[number % len(corpus.queries)] + random.normal(0, 1e-3) for number in range(count)]
    return {
        "hybrid": [{"query": text} for text in words],
        "words": [{"query": text, "mode": "text"} for text in words],
        "vector": [{"vector": vector.tolist()} for vector in vectors],
        "vector, filtered": [{"vector": vector.tolist(), "filter": {"year": {"$gte": 2010}}} for vector in vectors],
    }


def measure(
    connection: psycopg.Connection[Any],
    without: str,
    kept: str,
    corpus: _corpus.Corpus,
    options: argparse.Namespace,
) -> None:
    """Print a row for each kind of search."""
    missed = False
    print(f"| {'search':16} | {' | '.join(f'{each:>14}' for each in COLUMNS)} | saves | a miss costs |")
    with Client(without) as first, Client(kept) as second:
        for kind, bodies in questions(corpus, options.queries + 10).items():
            times: dict[str, list[float]] = {column: [] for column in COLUMNS}
            stages: list[dict[str, float]] = []
            for number, body in enumerate(bodies):
                steps = [(first, COLUMNS[0], False), (second, COLUMNS[1], False)]
                again = [(second, COLUMNS[2], True)] * AGAIN
                steps = [*(steps if number % 2 else steps[::-1]), *again, (second, COLUMNS[3], False)]
                for client, column, cached in steps:
                    if column == COLUMNS[3]:
                        connection.execute("select pgshelf.forget_answers(%s)", [LIBRARY])
                    spent, answer, timing = client.search(body)
                    if answer["cached"] is not cached:
                        raise SystemExit(f"{column}: cached should be {cached}")
                    if number >= 10:
                        times[column].append(spent)
                        if cached:
                            stages.append(timed(timing))
            medians = {column: statistics.median(spent) for column, spent in times.items()}
            ratio = medians["without"] / medians["again"]
            cost = medians["first time"] - medians["without"]
            shown = " | ".join(f"{medians[column]:14.2f}" for column in COLUMNS)
            print(f"| {kind:16} | {shown} | {ratio:4.1f}x | {cost:+9.2f} ms |", flush=True)
            if kind == "hybrid":
                parts = {name: statistics.median(each.get(name, 0.0) for each in stages) for name in stages[0]}
                print("  a hit: " + ", ".join(f"{name} {ms:.2f}" for name, ms in parts.items()) + " ms in the server")
                missed = ratio < GOAL
    if missed:
        print(f"the goal of {GOAL:g}x for a hybrid search is missed")
        if options.strict:
            raise SystemExit(1)


class Client:
    """A connection to a service."""

    def __init__(self, address: str) -> None:
        self._http = HTTPClient.from_url(address, concurrency=1, network_timeout=60)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def search(self, body: dict[str, Any]) -> tuple[float, Any, str]:
        """How many milliseconds the answer took, the answer, and where the server's time went."""
        sent, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        started = time.perf_counter()
        response = self._http.post(f"/v1/libraries/{LIBRARY}/search", sent, headers)
        read = response.read()
        spent = (time.perf_counter() - started) * 1000
        said = json.loads(read)
        if response.status_code != 200:
            raise SystemExit(said)
        return spent, said, str(response["server-timing"])


def timed(header: str) -> dict[str, float]:
    """The stages of an answer, in milliseconds."""
    return {name: float(ms) for name, ms in (part.split(";dur=") for part in header.split(", "))}


if __name__ == "__main__":
    main()
