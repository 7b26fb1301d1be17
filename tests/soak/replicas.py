"""A service over a primary and two standbys for as long as it takes: reads that see their writes, failovers, and churn.

Short forms are in tests/replication; the servers are the bundled ones, with fsync on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psycopg

from pgshelf import migrate
from tests.conftest import _live_servers
from tests.replication.cluster import Cluster
from tests.replication.failovers import Failovers
from tests.replication.pairs import Pairs
from tests.rest.asking import at, code_of, library, ok, until

SYNCHRONOUS = "ANY 1 (n0, n1, n2)"
DIMENSION = 32
ROWS = 4000
CLIENTS = 8


@contextlib.contextmanager
def served(version: int, names: str = "", **settings: str) -> Iterator[tuple[Cluster, str]]:
    """A cluster and the address of a service with two processes over it."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgshelf-s-", ignore_cleanup_errors=True)))
        cluster = Cluster(folder, version)
        stack.callback(cluster.close)
        migrate.upgrade(cluster.primary.url)
        cluster.caught_up()
        for node in cluster.nodes:
            node.settings["synchronous_standby_names"] = names
        if names:
            cluster.primary.set(synchronous_standby_names=names)
        known = {"REPLICA_URL": cluster.replica_url, "EMBEDDER": "none", "WORKERS": "2", "CACHE_BYTES": "0", **settings}
        make = stack.enter_context(_live_servers(folder))
        yield cluster, make(cluster.url, **{f"PGSHELF_{name}": value for name, value in known.items()}).url


async def counters(client: httpx2.AsyncClient) -> dict[str, float]:
    """What the service counted of replicas."""
    text = (await client.get("/metrics")).text
    found = re.findall(r'^pgshelf_replica_(reads|retries)_total\{\w+="([^"]+)"\} (\S+)', text, re.MULTILINE)
    return {f"{kind} {Path(name).parent.name or name}": float(value) for kind, name, value in found}


async def read_your_writes(pairs: int, seed: int, version: int) -> str:
    """Pairs of a write and a read on standbys that are late: none is stale with tokens, and some are without."""
    with served(version, REPLICA_WAIT="5") as (cluster, url):
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            await library(client, "pairs", 3)
            for node in cluster.standbys:
                node.set(recovery_min_apply_delay="50ms")
            started = time.monotonic()
            sure = Pairs(client, "pairs", tokens=True, seed=seed)
            await sure.run(pairs, at_once=16)
            assert (sure.done, sure.stale) == (pairs, []), f"stale: {sure.stale}"
            took = time.monotonic() - started
            for node in cluster.standbys:  # nobody waits for them now
                node.set(recovery_min_apply_delay="1s")
            unsure = Pairs(client, "pairs", tokens=False, seed=seed + 1)
            await unsure.run(max(200, pairs // 20), at_once=16)
            assert unsure.stale, "without tokens nothing was stale: the test cannot fail"
            counted = await counters(client)
    told = f"{sure.done} pairs with tokens, 0 stale, {took:.0f} s; {unsure.done} without, {len(unsure.stale)} stale"
    return f"{told}\n{counted}"


async def failovers(times: int, seed: int, version: int, synchronous: bool) -> str:
    """Kills -9 of the primary under load."""
    with served(version, SYNCHRONOUS if synchronous else "") as (cluster, url):
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            await library(client, "failovers", 3)
            cluster.caught_up()
            seen = Failovers(client, cluster, "failovers", seed)
            await seen.run(times)
            if synchronous:
                assert not sum(seen.lost.values()), seen.figures()
    return f"{'synchronous' if synchronous else 'asynchronous'}: {seen.figures()}"


class Churn:
    """Searches of a library with a vector index, while its rows are changed, deleted and vacuumed."""

    def __init__(self, client: httpx2.AsyncClient, cluster: Cluster, seed: int) -> None:
        self.client, self.cluster, self.seed = client, cluster, seed
        self.answers: Counter[str] = Counter()
        self.changed = Counter[str]()
        self._vectors = np.random.default_rng(seed).standard_normal((ROWS, DIMENSION)).astype(np.float32)

    async def fill(self) -> None:
        await library(self.client, "churn", DIMENSION)
        for start in range(0, ROWS, 500):
            lines = [self._line(number) for number in range(start, start + 500)]
            await self._import(lines)
        ok(await self.client.put(at("libraries", "churn", "index"), json={"type": "hnsw"}), 202)

        async def built() -> bool:
            return bool(ok(await self.client.get(at("libraries", "churn", "index")))["state"] == "ready")

        await until(built, 120)
        await asyncio.to_thread(self.cluster.caught_up, 60)

    async def _import(self, lines: Iterable[str]) -> None:
        headers = {"Content-Type": "application/x-ndjson"}
        path = at("libraries", "churn", "import")
        answer = await self.client.post(path, content="\n".join(lines), headers=headers)
        assert '"done":true' in answer.text and '"failed":0' in answer.text.splitlines()[-1], answer.text

    def _line(self, number: int) -> str:
        vector = ", ".join(f"{value:.4f}" for value in self._vectors[number])
        return f'{{"key": "k{number}", "chunks": [{{"text": "t{number}", "embedding": [{vector}]}}]}}'

    async def run(self, searches: int) -> None:
        left = iter(range(searches))
        churning = [asyncio.create_task(self._change(lane)) for lane in range(2)]
        churning.append(asyncio.create_task(self._vacuum()))
        try:
            await asyncio.gather(*(self._search(lane, left) for lane in range(CLIENTS)))
        finally:
            for task in churning:
                task.cancel()
            ended = await asyncio.gather(*churning, return_exceptions=True)
        for each in ended:
            if isinstance(each, Exception):
                raise each

    async def _search(self, lane: int, left: Any) -> None:
        rng = random.Random(f"{self.seed} {lane}")
        for _ in left:
            asked = {"vector": self._vectors[rng.randrange(ROWS)].tolist(), "k": 10}
            answer = await self.client.post(at("libraries", "churn", "search"), json=asked)
            self.answers["ok" if answer.status_code == 200 else f"{answer.status_code} {code_of(answer)}"] += 1

    async def _change(self, lane: int) -> None:
        rng = random.Random(f"{self.seed} churn {lane}")
        while True:
            numbers = rng.sample(range(lane, ROWS, 2), 50)
            names = [f"k{number}" for number in numbers]
            if rng.random() < 0.5:
                path, chosen = at("libraries", "churn", "documents", "delete"), {"$key": {"$in": names}}
                ok(await self.client.post(path, json={"filter": chosen}))
                self.changed["deleted"] += 50
            await self._import(map(self._line, numbers))
            self.changed["written"] += 50

    async def _vacuum(self) -> None:
        async with await psycopg.AsyncConnection.connect(self.cluster.primary.url, autocommit=True) as connection:
            cursor = await connection.execute(
                "select 'pgshelf.chunks_s' || l.shelf from pgshelf.libraries l where l.name = 'churn'"
            )
            row = await cursor.fetchone()
            assert row is not None
            while True:
                await connection.execute(f"vacuum {row[0]}")
                self.changed["vacuums"] += 1
                await asyncio.sleep(0.2)


async def churn(searches: int, seed: int, version: int) -> str:
    """Searches on the standbys while vacuum changes the index under them: no client sees any of it."""
    with served(version) as (cluster, url):
        for node in cluster.standbys:
            node.set(max_standby_streaming_delay="100ms")
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            storm = Churn(client, cluster, seed)
            await storm.fill()
            started = time.monotonic()
            await storm.run(searches)
            took = time.monotonic() - started
            counted = await counters(client)
    assert set(storm.answers) == {"ok"}, storm.answers
    retried = sum(value for name, value in counted.items() if name.startswith("retries"))
    return f"{searches} searches in {took:.0f} s, 0 errors, {retried:.0f} asked again; {dict(storm.changed)}\n{counted}"
