"""A library whose embedder changes to and fro while it is searched and written, with kills -9 or without.

Searches must see vectors of one embedder, all of them, and true distances; what was answered is there. Whatever is
killed meanwhile, the change goes on by itself. Used by tests/test_reembedding_kills.py (one kill) and `make soak`
(twenty).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

from pgshelf.embedders.local import LocalEmbedder
from tests.soak.crash import KINDS, Service, service

DIMENSIONS = (256, 64)
LIBRARIES = {"small": 100, "large": 600}  # chunks that stay; the small one is on shelf 0, the large one has an index
PART = 50  # chunks of a document
ARRIVAL_SECONDS = 90.0
PATIENCE = 45.0  # seconds for an answer: behind the server's own limits, so that it says itself what took too long
SLOW = 10.0  # seconds after which it is written down what the database is doing
FOUND = """
select c.text, c.embedding::text from pgshelf.chunks_view c where c.library = %s
"""
LEFT = """
select (select count(*) from pgshelf.embedder_changes) + (select count(*) from pgshelf.next_embeddings)
  + (select count(*) from pgshelf.libraries where moving <> 0 or index_state <> 'ready')
  + (select count(*) from pgshelf.waiting)
"""
Vectors = NDArray[np.float32]


class Changes:
    """The libraries, their clients, and whoever asks for another embedder and kills."""

    def __init__(self, target: Service, seed: int) -> None:
        self.service, self.seed, self.rng = target, seed, random.Random(seed)
        self.client = httpx2.Client(base_url=target.url, timeout=30)
        self.embedders = {dimension: LocalEmbedder(None, dimension) for dimension in DIMENSIONS}
        self.written = {name: [f"{name} {number}" for number in range(size)] for name, size in LIBRARIES.items()}
        self.counts: Counter[str] = Counter()
        self.took = 3.0  # seconds of a change
        self._killed, self._recovered, self._ended = -1.0, 0.0, False
        self._wrong: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Make and fill the libraries, then let the clients come."""
        self._recover()
        for name, size in LIBRARIES.items():
            index = {"type": "auto" if name == "small" else "hnsw"}
            self._done("POST", "/v1/libraries", {"name": name, "embedder": {"provider": "local"}, "index": index})
            for first in range(0, size, PART):
                chunks = [{"text": text} for text in self.written[name][first : first + PART]]
                self._done("PUT", f"/v1/libraries/{name}/documents/part-{first}", {"chunks": chunks})
            acts = (self._read, self._write)
            self._threads += [threading.Thread(target=self._go_on, args=(act, name)) for act in acts]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The clients go home."""
        self._ended = True
        for thread in self._threads:
            thread.join()
        self.client.close()

    def change(self, dimension: int, kind: str | None = None) -> None:
        """Ask for another embedder, kill something of this kind meanwhile, wait until all is right."""
        begun = time.monotonic()
        for name in LIBRARIES:
            self._done("PUT", f"/v1/libraries/{name}/embedder", {"provider": "local", "dimension": dimension})
        if kind:
            time.sleep(self.rng.random() * self.took)
            self._killed = time.monotonic()
            self.service.kill(kind, self.rng)
            self._recover()
            self._recovered = time.monotonic()
            self.counts[kind] += 1
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while complaint := self._complaint(dimension):
            if self._wrong:
                raise self._wrong[0]
            assert time.monotonic() < deadline, f"seed {self.seed}: {complaint}\n{self.service.output[-3000:]}"
            time.sleep(0.05)
        if not kind:
            self.took = time.monotonic() - begun
        print(f"  {dimension:3} {kind or 'no kill':<10} {time.monotonic() - begun:5.1f} s", flush=True)
        self._check(dimension)

    def figures(self) -> str:
        counts = self.counts
        kills = {kind: counts[kind] for kind in KINDS if counts[kind]}
        return (
            f"{counts['searches']} searches and {counts['writes']} writes, none wrong, {counts['excused']} cut off by "
            f"a kill; kills: {kills}; a change takes {self.took:.1f} s"
        )

    # -- what becomes of it

    def _complaint(self, dimension: int) -> str | None:
        with contextlib.suppress(httpx2.TransportError):
            for name in LIBRARIES:
                found = self.client.get(f"/v1/libraries/{name}/embedder").json()
                if found.get("state") != "ready" or found["embedder"]["dimension"] != dimension:
                    return f"{name}: {found}"
            return None
        return "nobody answers"

    def _check(self, dimension: int) -> None:
        """Every chunk has the vector that its text shall have, and in a while nothing is left of the way there."""
        import psycopg

        if self._wrong:
            raise self._wrong[0]
        with psycopg.connect(self.service.database.url(), autocommit=True) as db:
            for name in LIBRARIES:
                there = list(self.written[name])
                rows = {text: vector for text, vector in db.execute(FOUND.encode(), [name]).fetchall()}
                assert set(there) <= rows.keys(), f"seed {self.seed}: missing {set(there) - rows.keys()}"
                pending = [text for text, vector in rows.items() if vector is None]
                assert not set(pending) & set(there), f"seed {self.seed}: {pending} wait"
                given = {text: vector for text, vector in rows.items() if vector is not None}
                made = self._vectors(dimension, list(given))
                for (text, numbers), right in zip(given.items(), made, strict=True):
                    vector = np.fromstring(numbers[1:-1], np.float32, sep=",")
                    assert len(vector) == dimension and np.allclose(vector, right, atol=1e-5), f"{name}: {text}"
            deadline = time.monotonic() + ARRIVAL_SECONDS
            while db.execute(LEFT.encode()).fetchone() != (0,):
                assert time.monotonic() < deadline, f"seed {self.seed}: {db.execute(LEFT.encode()).fetchone()} are left"
                time.sleep(0.1)

    def _vectors(self, dimension: int, texts: list[str]) -> Vectors:
        return asyncio.run(self.embedders[dimension].embed(texts, "document"))

    # -- the clients

    def _go_on(self, act: Callable[[random.Random, str], None], name: str) -> None:
        rng = random.Random(f"{self.seed} {name} {act.__name__}")
        while not self._ended and not self._wrong:
            try:
                act(rng, name)
            except BaseException as error:
                self._wrong.append(error)
            time.sleep(0.02)

    def _read(self, rng: random.Random, name: str) -> None:
        text = rng.choice(self.written[name])
        body = {"query": text, "mode": "vector", "k": 20, "include": ["text", "embedding"]}
        found = self._asked("POST", f"/v1/libraries/{name}/search", body)
        if found is None:
            return
        hits = found["hits"]
        assert len(hits) == 20 and len({hit["chunk_id"] for hit in hits}) == 20, f"{text}: {len(hits)} hits"
        dimensions = {len(hit["embedding"]) for hit in hits}
        assert len(dimensions) == 1, f"vectors of {dimensions}"
        [query, *made] = self._vectors(dimensions.pop(), [text, *(hit["text"] for hit in hits)])
        np.testing.assert_allclose([hit["embedding"] for hit in hits], made, atol=1e-5)
        np.testing.assert_allclose([hit["distance"] for hit in hits], 1 - np.array(made) @ query, atol=1e-5)
        assert hits[0]["distance"] < 1e-5, f"{text} is not found"
        self.counts["searches"] += 1

    def _write(self, rng: random.Random, name: str) -> None:
        texts = [f"{name} {rng.randrange(10**9)} of a writer" for _ in range(rng.randint(1, 3))]
        body = {"chunks": [{"text": text} for text in texts]}
        if self._asked("PUT", f"/v1/libraries/{name}/documents/{texts[0]}", body) is not None:
            self.written[name] += texts
            self.counts["writes"] += 1

    def _asked(self, method: str, address: str, body: Any) -> Any:
        """The answer; None where a kill kept it away."""
        begun = time.monotonic()
        sessions: list[str] = []
        slow = threading.Timer(SLOW, lambda: sessions.append(self.service.sessions()))
        slow.start()
        try:
            answer = httpx2.request(method, f"{self.service.url}{address}", json=body, timeout=PATIENCE)
            if answer.is_success and answer.status_code != 202:
                return answer.json()
            trouble = f"{answer.status_code} {answer.text}"
        except httpx2.TransportError as error:
            trouble = repr(error)
        finally:
            slow.cancel()
        took = f"seed {self.seed}: {trouble} after {time.monotonic() - begun:.1f} s"
        told = [took, *sessions, self.service.output[-3000:]]
        # a connection of the pool may be met dead for a moment after all serves again
        assert (begun < self._recovered + 5 and self._killed > 0) or self._killed > self._recovered, "\n".join(told)
        self.counts["excused"] += 1
        return None

    def _done(self, method: str, address: str, body: Any) -> None:
        answer = self.client.request(method, address, json=body)
        assert answer.is_success, answer.text

    def _recover(self) -> None:
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while True:
            self.service.keep_up()
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.service.url}/ready", timeout=10).status_code == 200:
                    return
            assert time.monotonic() < deadline, self.service.output[-3000:]
            time.sleep(0.05)


@contextlib.contextmanager
def changing(version: int, seed: int) -> Iterator[Changes]:
    """A service, two libraries and their clients; in the end all that they were told is true."""
    with service(version, worker_interval="0.1") as target:
        changes = Changes(target, seed)
        try:
            changes.start()
            yield changes
        finally:
            changes.stop()
        if changes._wrong:
            raise changes._wrong[0]
