"""Seeded kills -9 of a client, of the service, of a reconciler and of PostgreSQL while documents are embedded by a
provider that fails now and then, and what must be true afterwards.

Every document that was acknowledged is there, whole and embedded; none is there twice or in part; nothing waits, and no
lease holds anything back. A text is answered by the provider once, unless a kill met it between answer and storing.
Used by tests/test_ingestion_kills.py (a few kills) and `make soak` (a hundred). Started as a program it is the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import httpx2
import numpy as np
import psycopg

from pgshelf_client import AsyncClient, PgshelfError
from tests.cohere_server import CohereServer, Fault, cut_off, numbers_of, raw, reset, status
from tests.soak.crash import RECOVERY_SECONDS, Service, service

KINDS = ("client", "worker", "reconciler", "postmaster")
LIBRARY, DIMENSION = "ingestion", 256
WRITERS = 2  # of single documents, beside one that imports
IMPORTED = 30  # documents of one import
LEASE = 4  # seconds; what was claimed by who is killed waits this long
TIMEOUT = 4.0  # seconds until the provider is taken to hang
LATE = 1.0  # seconds; an answer that took longer may have come when nobody waited for it any more
FAULTY = 0.12  # the share of requests that fail
PERSISTED = 2.0  # seconds from an answer to its storing, on a machine that is busy
ON_THE_WAY = 1.0  # seconds in which answers come whose askers have been killed
SAMPLE = 20
STATE = """select d.key, array_agg(c.text order by c.ordinal), array_agg(c.embedding::text order by c.ordinal)
from pgshelf.documents d left join pgshelf.chunks c on c.document_id = d.id group by d.id"""


def texts_of(key: str) -> list[str]:
    """The chunks of a document, which its key determines; no text occurs twice."""
    return [f"part {part} of the document {key}" for part in range(random.Random(key).randint(1, 5))]


class Answered(list[tuple[str, str]]):
    """What the provider answered well and in time, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[float] = []
        self.late = 0
        self.request = threading.local()  # of the thread that answers: when it began

    def __iadd__(self, more: Iterable[tuple[str, str]]) -> Answered:  # type: ignore[override,misc]
        added, now = list(more), time.monotonic()
        if now - self.request.begun > LATE:
            self.late += len(added)
        else:
            self.extend(added)
            self.moments += [now] * len(added)
        return self

    def __setitem__(self, place: SupportsIndex | slice, value: Any) -> None:
        raise AssertionError("it only grows")


class FaultyCohere(CohereServer):
    """Cohere's API with a delay and faults of all kinds, by a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.texts = self.answered = Answered()
        self._rng = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self._kinds: dict[str, Fault] = {
            "429": status(429, retry_after="1"),
            "500": status(500),
            "503": status(503),
            "reset": reset,
            "cut off": cut_off,
            "garbage": raw(b"<html>"),
            "hang": lambda handler, _: time.sleep(TIMEOUT + 1),
        }

    def fault(self) -> Fault | None:
        self.answered.request.begun = time.monotonic()
        time.sleep(self._rng.uniform(0.01, 0.15))
        if self._rng.random() > FAULTY:
            return None
        kind = self._rng.choice(list(self._kinds))
        self.faults[kind] += 1
        return self._kinds[kind]


class Process:
    """A process of ours that is started again when it was killed."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self._command, self._environment, self._log = command, environment, log
        self.process: subprocess.Popen[bytes] | None = None

    def keep_up(self, *more: str) -> None:
        if self.process is None or self.process.poll() is not None:
            with self._log.open("ab") as stream:
                self.process = subprocess.Popen(
                    [*self._command, *more], env=self._environment, cwd=Path(__file__).parents[2],
                    stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                )  # fmt: skip

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)


class Kills:
    """The processes, what was acknowledged, when something was killed, and what is true after each kill."""

    def __init__(self, target: Service, cohere: FaultyCohere, directory: Path, seed: int) -> None:
        self.target, self.cohere, self.rng = target, cohere, random.Random(seed)
        self.acknowledged = directory / "acknowledged"
        self.acknowledged.touch()
        program, environment = Path(sys.executable).with_name("pgshelf"), _environment(cohere)
        database = {"PGSHELF_DATABASE_URL": target.database.url()}
        self.reconciler = Process([str(program), "worker"], environment | database, directory / "worker.log")
        client = [sys.executable, "-m", "tests.soak.ingestion", target.url, str(self.acknowledged)]
        self.client = Process(client, environment, directory / "client.log")
        self.outages: list[tuple[float, float]] = []  # when an answer may have met a kill
        self.kills: Counter[str] = Counter()
        self.documents = self.chunks = self.doubled = 0

    def start(self) -> None:
        self._recover()
        self._keep_up()
        embedder = {"provider": "cohere", "model": "embed-v4.0", "dimension": DIMENSION}
        made = httpx2.post(f"{self.target.url}/v1/libraries", json={"name": LIBRARY, "embedder": embedder}, timeout=30)
        assert made.status_code == 201, made.text

    def run(self, kind: str, seconds: float, check: bool = True) -> None:
        """Write, kill, go on writing; then stop, and check everything that was ever written."""
        self._keep_up(client=True)
        self._until_it_writes()
        time.sleep(self.rng.uniform(0, 1) * seconds)
        killed = time.monotonic()
        self._kill(kind)
        self.kills[kind] += 1
        self._recover()
        self._keep_up(client=True)
        if kind != "client":  # which asks nobody itself
            ended = time.monotonic() if kind == "postmaster" else killed
            self.outages.append((killed - PERSISTED, ended + ON_THE_WAY))
        self._until_it_writes()
        if check:
            self.client.kill()  # what it was about to do may happen or not
            self.check()

    def _until_it_writes(self) -> None:
        before, deadline = self.acknowledged.stat().st_size, time.monotonic() + RECOVERY_SECONDS
        while self.acknowledged.stat().st_size == before:
            assert time.monotonic() < deadline, "nothing is acknowledged"
            time.sleep(0.02)

    def stop(self) -> None:
        self.client.kill()
        self.reconciler.kill(signal.SIGTERM)

    def _kill(self, kind: str) -> None:
        if kind in ("client", "reconciler"):
            (self.client if kind == "client" else self.reconciler).kill()
        else:
            self.target.kill(kind, self.rng)

    def _keep_up(self, client: bool = False) -> None:
        self.target.keep_up()
        self.reconciler.keep_up()
        if client:
            self.client.keep_up(f"{self.rng.randrange(10**9)}")

    def _recover(self) -> None:
        asyncio.run(self.target.ready())

    # -- what must be true

    def check(self) -> None:
        with psycopg.connect(self.target.database.url(), autocommit=True) as connection:
            self._drain(connection)
            rows = connection.execute(STATE).fetchall()
        found = {key: (texts, vectors) for key, texts, vectors in rows}
        assert len(found) == len(rows), "a document is there twice"
        for key, (texts, vectors) in found.items():
            assert texts == texts_of(key), f"{key} is there in part: {texts}"
            assert None not in vectors, f"{key} lacks a vector"
        acknowledged = set(self.acknowledged.read_text().split("\n")[:-1])
        assert not acknowledged - found.keys(), f"lost: {sorted(acknowledged - found.keys())[:5]}"
        self._vectors([pair for texts, vectors in found.values() for pair in zip(texts, vectors, strict=True)])
        self._once()
        self.documents, self.chunks = len(found), sum(len(texts) for texts, _ in found.values())

    def _drain(self, connection: psycopg.Connection[Any]) -> None:
        """Nothing waits any more, and nothing is noted that would be waited for."""
        deadline = time.monotonic() + RECOVERY_SECONDS
        statement = """select count(*), (select count(*) from pgshelf.waiting), count(*) filter (where failed),
            max(error) from pgshelf.pending_embeddings"""
        while True:
            pending, noted, failed, error = connection.execute(statement.encode()).fetchone() or (0, 0, 0, None)
            assert not failed, f"{failed} chunks were given up: {error}"
            if not pending and not noted:
                return
            assert time.monotonic() < deadline, f"{pending} wait, {noted} notes, {error}"
            self._keep_up()
            time.sleep(0.05)

    def _vectors(self, stored: list[tuple[str, str]]) -> None:
        for text, vector in self.rng.sample(stored, min(SAMPLE, len(stored))):
            expected = np.array(numbers_of("search_document", text, DIMENSION))
            np.testing.assert_allclose(
                np.fromstring(vector.strip("[]"), sep=","), expected / np.linalg.norm(expected), atol=1e-6
            )

    def _once(self) -> None:
        """Answered once; more often only where a kill came before the answer was stored."""
        moments: dict[str, list[float]] = {}
        for (kind, text), moment in zip(list(self.cohere.answered), self.cohere.answered.moments, strict=False):
            if kind == "search_document":
                moments.setdefault(text, []).append(moment)
        self.doubled = 0
        for text, when in moments.items():
            for moment in when[:-1]:
                excused = any(begun <= moment <= ended for begun, ended in self.outages)
                assert excused, f"{text!r} was embedded {len(when)} times, and no kill explains it"
                self.doubled += 1

    def figures(self) -> str:
        kills = ", ".join(f"{kind} x {count}" for kind, count in self.kills.most_common())
        faults = ", ".join(f"{kind} x {count}" for kind, count in self.cohere.faults.most_common())
        acknowledged = self.acknowledged.read_text().count("\n")
        answered = self.cohere.answered
        return (
            f"kills: {kills}\n{self.documents} documents, {self.chunks} chunks, {acknowledged} acknowledged; "
            f"{len(answered)} texts answered, {answered.late} too late, {self.doubled} again after a kill\n"
            f"{len(self.cohere.asked)} requests to the provider, faults: {faults}"
        )


def _environment(cohere: CohereServer) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
    return known | {f"PGSHELF_{name.upper()}": value for name, value in _settings(cohere).items()}


def _settings(cohere: CohereServer) -> dict[str, str]:
    return {
        "cohere_api_key": cohere.key,
        "cohere_base_url": cohere.url,
        "cohere_timeout": str(TIMEOUT),
        "circuit_wait": "1",
        "worker_lease": str(LEASE),
        "worker_interval": "0.1",
        "worker_attempts": "20",
    }


@contextlib.contextmanager
def kills(version: int, seed: int, directory: Path) -> Iterator[Kills]:
    """Everything that is killed, on a bundled PostgreSQL of its own."""
    cohere = FaultyCohere(seed)
    with cohere, service(version, **_settings(cohere)) as target:
        made = Kills(target, cohere, directory, seed)
        try:
            made.start()
            yield made
        finally:
            made.stop()


# -- the client


async def write(url: str, acknowledged: int, name: str) -> None:
    """Write documents until it is killed, and note each that was acknowledged."""

    async def one(number: int) -> None:
        rng = random.Random(f"{name} {number}")
        async with httpx2.AsyncClient(base_url=url, timeout=30) as client:
            for count in range(10**6):
                key = f"{name}-{number}-{count}"
                body = {"key": key, "chunks": [{"text": text} for text in texts_of(key)]}
                wait = {"wait": rng.choice(["true", "false", "false"])}
                while not await _answered(client, body, wait):  # noqa: ASYNC110 - nobody tells when it is back
                    await asyncio.sleep(rng.uniform(0.05, 0.15))
                os.write(acknowledged, f"{key}\n".encode())
                await asyncio.sleep(rng.uniform(0, 0.03))

    async def several() -> None:
        async with AsyncClient(url) as client:
            for count in range(10**6):
                keys = [f"{name}-import-{count}-{line}" for line in range(IMPORTED)]
                documents = [{"key": key, "chunks": [{"text": text} for text in texts_of(key)]} for key in keys]
                done = False
                while not done:
                    with contextlib.suppress(PgshelfError):  # the same name goes on where the import broke off
                        result = await client.import_documents(
                            LIBRARY, documents, batch_size=10, parallel=1, name=f"{name}-{count}"
                        )
                        assert not result.failed, result.failed
                        done = True
                    await asyncio.sleep(0.1)
                os.write(acknowledged, "".join(f"{key}\n" for key in keys).encode())

    await asyncio.gather(several(), *[one(number) for number in range(WRITERS)])


async def _answered(client: httpx2.AsyncClient, body: dict[str, Any], wait: dict[str, str]) -> bool:
    try:
        answer = await client.post(f"/v1/libraries/{LIBRARY}/documents", json=body, params=wait)
    except httpx2.TransportError:
        return False
    if not answer.is_success and answer.status_code not in (502, 503, 504):
        raise AssertionError(f"{answer.status_code} {answer.text}")
    return answer.is_success


if __name__ == "__main__":
    address, path, name = sys.argv[1:]
    asyncio.run(write(address, os.open(path, os.O_WRONLY | os.O_APPEND), name))
