"""Kills -9 of the primary while clients write and read; what was answered must be true on the server that takes over.

Every write is sent once and has a document of its own, so there are three outcomes: acknowledged, refused (nothing was
written), unknown. What is refused must not be there. What is acknowledged must be there if a standby confirmed it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx2
import psycopg

from tests.replication.cluster import Cluster, Node
from tests.replication.pairs import TOKEN, VECTOR
from tests.rest.asking import at, code_of

# what a client may be told while there is no primary
EXPECTED = {"database_unavailable", "write_outcome_unknown", "read_only", "pool_exhausted", "lock_timeout", "timeout"}
RESUME_SECONDS = 10.0


@dataclass
class Failovers:
    """Load on a service over a cluster, and failovers under it."""

    client: httpx2.AsyncClient
    cluster: Cluster
    library: str
    seed: int
    acknowledged: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    answers: Counter[str] = field(default_factory=Counter)
    stale: list[str] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    lost: Counter[int] = field(default_factory=Counter)  # by failover
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _last: float = 0.0  # when a write that was begun then was acknowledged

    async def run(self, times: int, writers: int = 4, readers: int = 2) -> None:
        """So many failovers under load, each checked."""
        rng = random.Random(self.seed)
        for number in range(times):
            tasks = [asyncio.create_task(self._write()) for _ in range(writers)]
            tasks += [asyncio.create_task(self._read()) for _ in range(readers)]
            await asyncio.sleep(rng.uniform(0.5, 1.5))
            old = self.cluster.primary
            killed = await self._fail_over()
            await self._await_writes(killed)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(self.cluster.rewind, old)
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
            await asyncio.to_thread(self.cluster.caught_up, 60)
            self._check(number)

    async def _fail_over(self) -> float:
        await asyncio.to_thread(self.cluster.primary.kill)
        killed = time.monotonic()
        await asyncio.to_thread(lambda: self.cluster.promote(self._furthest()))
        return killed

    def _furthest(self) -> Node:
        """The standby that has received most, as an operator or Patroni chooses."""
        return max(
            self.cluster.standbys,
            key=lambda node: node.ask("select (pg_last_wal_receive_lsn() - '0/0')::bigint"),
        )

    async def _await_writes(self, killed: float) -> None:
        while self._last < killed:
            assert time.monotonic() - killed < RESUME_SECONDS, f"no write for {RESUME_SECONDS} s: {self.answers}"
            await asyncio.sleep(0.01)
        self.resumed.append(time.monotonic() - killed)

    async def _write(self) -> None:
        while True:
            key, begun = f"w-{next(self._numbers)}", time.monotonic()
            self.unknown.add(key)
            path = at("libraries", self.library, "documents", key)
            body = {"chunks": [{"text": key, "embedding": VECTOR}]}
            written = await self.client.put(path, json=body, headers={"Idempotency-Key": f"{self.seed}-{key}"})
            code = "201" if written.status_code == 201 else str(code_of(written))
            self.answers[code] += 1
            if written.status_code == 201:
                self.acknowledged.add(key)
                self._last = max(self._last, begun)
                await self._read_back(path, written.headers[TOKEN])
            else:
                assert code in EXPECTED, written.text
                if code != "write_outcome_unknown":
                    self.refused.add(key)
                await asyncio.sleep(0.02)
            if code != "write_outcome_unknown":
                self.unknown.discard(key)

    async def _read_back(self, path: str, token: str) -> None:
        read = await self.client.get(path, headers={TOKEN: token})
        if read.status_code == 404:
            self.stale.append(path.rsplit("/", 1)[1])
        else:
            assert read.status_code == 200 or code_of(read) in EXPECTED, read.text

    async def _read(self) -> None:
        while True:
            asked = {"vector": VECTOR, "k": 3}
            read = await self.client.post(at("libraries", self.library, "search"), json=asked)
            self.answers["read" if read.status_code == 200 else f"read {code_of(read)}"] += 1
            assert read.status_code == 200 or code_of(read) in EXPECTED, read.text

    def _check(self, number: int) -> None:
        with psycopg.connect(self.cluster.primary.url) as connection:
            there = {key for (key,) in connection.execute("select key from pgshelf.documents where key like 'w-%'")}
        assert not self.refused & there, "refused, and yet written"
        gone = self.acknowledged - there
        self.lost[number] = len(gone)
        # what a failover has lost stays lost, and reads may have met it in between
        assert set(self.stale) <= gone, "a read with a token did not show its write"
        self.acknowledged -= gone
        self.stale.clear()

    def figures(self) -> str:
        """What happened, for people."""
        lost = sum(self.lost.values())
        resumed = sorted(round(each, 2) for each in self.resumed)
        return (
            f"{len(resumed)} failovers, writes resumed after {resumed[-1]} s at most ({resumed}); "
            f"{len(self.acknowledged) + lost} writes acknowledged, "
            f"{lost} of them lost, {len(self.refused)} refused and not there, {len(self.unknown)} unknown; "
            f"{dict(self.answers)}"
        )
