"""Write, then read: does the read show the write, with the token that the write answered and without?"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import httpx2

from tests.rest.asking import at

TOKEN = "Pgshelf-Consistency-Token"
VECTOR = [1.0, 0.0, 0.0]


@dataclass
class Pairs:
    """Pairs of a write and a read in one library; `stale` counts the reads that did not show their write."""

    client: httpx2.AsyncClient
    library: str
    tokens: bool
    seed: int
    done: int = 0
    stale: list[str] = field(default_factory=list)

    async def run(self, count: int, at_once: int = 8) -> None:
        """Carry out so many pairs, several at once, each on documents of its own."""
        left = iter(range(count))
        await asyncio.gather(*(self._lane(lane, left) for lane in range(at_once)))

    async def _lane(self, lane: int, left: Any) -> None:
        rng = random.Random(f"{self.seed} {lane}")
        for _ in left:
            await self._pair(f"{lane}-{rng.randrange(20)}", rng)

    async def _pair(self, key: str, rng: random.Random) -> None:
        mark = rng.randrange(2**40)
        path = at("libraries", self.library, "documents", key)
        body = {"chunks": [{"text": "one", "embedding": VECTOR}], "metadata": {"mark": mark}}
        written = await self.client.put(path, json=body)
        assert written.status_code in (200, 201), written.text
        headers = {TOKEN: written.headers[TOKEN]} if self.tokens else {}
        kind = rng.choice(["get", "search", "query"])
        if kind == "get":
            read = await self.client.get(path, headers=headers)
            seen = read.status_code == 200 and read.json()["metadata"]["mark"] == mark
        elif kind == "search":
            asked = {"vector": VECTOR, "k": 1, "filter": {"mark": mark}}
            read = await self.client.post(at("libraries", self.library, "search"), json=asked, headers=headers)
            seen = read.status_code == 200 and len(read.json()["hits"]) == 1
        else:
            asked = {"filter": {"mark": mark}}
            path = at("libraries", self.library, "documents", "query")
            read = await self.client.post(path, json=asked, headers=headers)
            seen = read.status_code == 200 and len(read.json()["items"]) == 1
        assert read.status_code in (200, 404), read.text
        self.done += 1
        if not seen:
            self.stale.append(kind)
