"""What routing costs a read: the same searches of one standby, by a service that knows no other server and by one that
chooses it, without a token and with one. One after the other in turn; medians, and their ratio.

Both services have one process. The standby is one, so both ask the same server with the same caches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks._serving import serving
from pgshelf import migrate
from tests.replication.cluster import Cluster

LIMIT = 1.05
DIMENSION = 256
PORT = 18442
PLAIN = {"AUTH": "off", "EMBEDDER": "none", "CACHE_BYTES": "0"}
TOKEN = "Pgshelf-Consistency-Token"  # noqa: S105 - a header


def main() -> None:
    """Fill a library, serve it three times, search it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), 18, standbys=1)
        try:
            migrate.upgrade(cluster.primary.url, warn=False)
            standby = cluster.standbys[0].url
            with (
                serving(standby, PORT, **PLAIN) as direct,
                serving(cluster.primary.url, PORT + 1, **PLAIN, REPLICA_URL=standby) as routed,
            ):
                token = fill(routed, options.chunks)
                cluster.caught_up()
                measure(direct, routed, token, options.rounds)
        finally:
            cluster.close()


def fill(address: str, chunks: int) -> str:
    """A library; the token of its last write."""
    vectors = np.random.default_rng(7).normal(size=(chunks, DIMENSION)).round(4)
    with httpx2.Client(base_url=f"{address}/v1", timeout=60) as client:
        made = {"name": "bench", "dimension": DIMENSION, "embedder": {"provider": "none"}}
        client.post("/libraries", json=made).raise_for_status()
        for start in range(0, chunks, 100):
            parts = [{"text": f"t{n}", "embedding": vectors[n].tolist()} for n in range(start, start + 100)]
            written = client.put(f"/libraries/bench/documents/d{start}", json={"chunks": parts})
            written.raise_for_status()
    return str(written.headers[TOKEN])


def measure(direct: str, routed: str, token: str, rounds: int) -> None:
    """Print the medians of each kind of read, and whether they keep the limit."""
    random = np.random.default_rng(8)
    ways: list[tuple[str, str, dict[str, str]]] = [
        ("direct", direct, {}),
        ("routed", routed, {}),
        ("with a token", routed, {TOKEN: token}),
    ]

    def request(kind: str) -> tuple[str, str, Any]:
        if kind == "search":
            return "POST", "/search", {"vector": random.normal(size=DIMENSION).round(4).tolist()}
        return "GET", "/documents/d0", None

    print(f"| read     | way          | median ms | ratio | under {LIMIT} |")
    for kind in ("search", "document"):
        times: dict[str, list[float]] = {name: [] for name, *_ in ways}
        with httpx2.Client(timeout=30) as client:
            for number in range(rounds + 50):
                method, path, body = request(kind)
                for step in range(len(ways)):
                    name, address, headers = ways[(number + step) % len(ways)]
                    started = time.perf_counter()
                    url = f"{address}/v1/libraries/bench{path}"
                    answer = client.request(method, url, json=body, headers=headers)
                    spent = (time.perf_counter() - started) * 1000
                    if answer.status_code != 200:
                        raise SystemExit(f"{answer.status_code}: {answer.text}")
                    if number >= 50:
                        times[name].append(spent)
        base = statistics.median(times["direct"])
        for name, spent_each in times.items():
            found = statistics.median(spent_each)
            kept = "" if name == "direct" else "yes" if found / base <= LIMIT else "NO"
            print(f"| {kind:8} | {name:12} | {found:9.3f} | {found / base:5.3f} | {kept:>10} |", flush=True)


if __name__ == "__main__":
    main()
