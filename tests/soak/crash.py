"""Seeded kills -9 of the service and of its bundled PostgreSQL during ingestion, and what must be true afterwards.

What was answered with 2xx is there whole; what was not is there whole or not at all. A kill does not prove fsync: the
operating system lives on. Used by tests/test_crash.py (a few kills) and `make soak` (fifty).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString

import httpx2
import numpy as np
import psutil
import psycopg

from pgshelf import embedded
from pgshelf.embedders.local import LocalEmbedder

KINDS = ("worker", "parent", "backend", "postmaster", "everything")
WRITERS = 6
RECOVERY_SECONDS = 45.0
LEASE = 2  # seconds; what a killed worker had claimed waits this long
LIBRARY = "soak"
SAMPLE = 20  # vectors that are made again and compared, after each kill
State = tuple[str, ...] | None  # the texts of a document's chunks; None: there is no document
STATE = """
select d.key, array_agg(c.text order by c.ordinal), array_agg(c.ordinal order by c.ordinal)
from pgshelf.documents d left join pgshelf.chunks c on c.document_id = d.id group by d.key
"""

SESSIONS: LiteralString = """
select pid, application_name, state, wait_event_type, wait_event, pg_blocking_pids(pid),
  now() - xact_start, now() - query_start, left(query, 200)
from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
"""


@dataclass
class History:
    """What was tried with one key, in order; `certain` is the place of the last attempt that was answered with 2xx."""

    attempts: list[State] = field(default_factory=lambda: [None])
    certain: int = 0

    @property
    def possible(self) -> list[State]:
        return self.attempts[self.certain :]


class Service:
    """`pgshelf serve` on a bundled PostgreSQL of its own, with fsync on; started again as an init system would."""

    def __init__(self, directory: Path, version: int = 18, **settings: str) -> None:
        self.data_dir, self.version, self._log = directory / "data", version, directory / "serve.log"
        self._settings = {f"PGSHELF_{name.upper()}": value for name, value in settings.items()}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = embedded.EmbeddedServer(self.data_dir, version, {}, 60)
        self.process = self._start()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def _start(self) -> subprocess.Popen[bytes]:
        known = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
        known |= {"PGSHELF_DATA_DIR": str(self.data_dir), "PGSHELF_WORKERS": "2", "PGSHELF_WORKER_LEASE": str(LEASE)}
        known |= {"PGSHELF_POSTGRES_VERSION": str(self.version), **self._settings}
        command = [str(Path(sys.executable).with_name("pgshelf")), "serve", "--port", str(self.port)]
        with self._log.open("ab") as stream:
            return subprocess.Popen(
                command, env=known, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )

    def sessions(self) -> str:
        """What the database is doing and who waits for whom, or why it does not say."""
        try:
            with psycopg.connect(self.database.url(), autocommit=True, connect_timeout=5) as db:
                return "\n".join(map(str, db.execute(SESSIONS).fetchall()))
        except psycopg.Error as error:
            return repr(error)

    def workers(self) -> list[psutil.Process]:
        return workers_of(self.process.pid)

    def backends(self) -> list[psutil.Process]:
        pid = self.database.pid
        if pid is None:
            return []
        return [each for each in psutil.Process(pid).children() if f"{embedded.DATABASE} [local]" in _title(each)]

    def kill(self, kind: str, rng: random.Random) -> None:
        """Kill -9 one of ours, whichever the kind means."""
        if kind in ("worker", "backend"):
            victims = self.workers() if kind == "worker" else self.backends()
            if victims:
                _kill(rng.choice(sorted(victims, key=lambda each: int(each.pid))).pid)
        if kind in ("postmaster", "everything"):
            _kill(self.database.pid)
        if kind in ("parent", "everything"):
            workers = self.workers()
            _kill(self.process.pid)
            if kind == "everything":
                for each in workers:
                    _kill(each.pid)
            assert ended(workers, 2), f"workers outlive their parent: {workers}"

    def keep_up(self) -> None:
        """Start it again if it has ended; granian gives up when a worker dies twice within seconds."""
        if self.process.poll() is not None:
            self.process = self._start()

    async def ready(self) -> float:
        """Wait until it is ready, and tell for how long; that takes no help but a start of what has ended."""
        started = time.monotonic()
        while True:
            self.keep_up()
            with contextlib.suppress(httpx2.TransportError):
                async with httpx2.AsyncClient(base_url=self.url, timeout=10) as client:
                    if (await client.get("/ready")).status_code == 200:
                        return time.monotonic() - started
            assert time.monotonic() - started < RECOVERY_SECONDS, self.output[-5000:]
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes that serve for a `pgshelf serve`."""
    with contextlib.suppress(psutil.Error):
        return [each for each in psutil.Process(pid).children() if "pgshelf" in _title(each)]
    return []


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def ended(processes: list[psutil.Process], seconds: float) -> bool:
    """Wait until all have ended; in a container there may be nobody to collect what is left of them."""
    deadline = time.monotonic() + seconds
    while any(each.is_running() and _title(each) for each in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _kill(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def service(version: int = 18, **settings: str) -> Iterator[Service]:
    """A service in a directory of its own; nothing of it is left afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="pgshelf-soak-"))
    made = Service(directory, version, **settings)
    try:
        yield made
    finally:
        made.stop()
        with embedded.start(made.data_dir, version):
            pass  # a killed service leaves PostgreSQL running; the last user stops it
        shutil.rmtree(directory)


class Ingestion:
    """Clients that write, each with keys of its own, and remember what they were told."""

    def __init__(self, service: Service, seed: int) -> None:
        self.service = service
        self.rng = random.Random(seed)
        self.histories: dict[str, History] = {}
        self.answers: Counter[int | str] = Counter()
        self.recoveries: list[float] = []
        self.unanswered_there = self.unanswered_absent = 0
        self._writing = False
        self._count = 0

    async def cycle(self, kind: str) -> None:
        """Write, kill, recover while writing goes on, and check everything that was ever written."""
        self._writing = True
        seeds = [self.rng.random() for _ in range(WRITERS)]
        writers = [asyncio.create_task(self._write(number, seed)) for number, seed in enumerate(seeds)]
        try:
            await asyncio.sleep(self.rng.uniform(0.3, 1.2))
            self.service.kill(kind, self.rng)
            self.recoveries.append(await self._recover())
            await asyncio.sleep(self.rng.uniform(0.2, 0.6))
        finally:
            self._writing = False
            await asyncio.gather(*writers)
        await self._recover()
        await self.check()

    async def start(self) -> None:
        await self._recover()
        async with httpx2.AsyncClient(base_url=self.service.url) as client:
            (await client.post("/v1/libraries", json={"name": LIBRARY})).raise_for_status()

    async def _recover(self) -> float:
        return await self.service.ready()

    async def _write(self, number: int, seed: float) -> None:
        rng = random.Random(seed)
        # no time limit: an attempt that the client gives up could be carried out after the next one
        async with httpx2.AsyncClient(base_url=self.service.url, timeout=None) as client:
            while self._writing:
                mine = [key for key in self.histories if key.startswith(f"{number}/")]
                if mine and rng.random() < 0.6:
                    key = rng.choice(mine[-12:])
                else:
                    key = f"{number}/{len(mine)}"
                await self._attempt(client, key, rng)

    async def _attempt(self, client: httpx2.AsyncClient, key: str, rng: random.Random) -> None:
        history = self.histories.setdefault(key, History())
        address = f"/v1/libraries/{LIBRARY}/documents"
        named = f"{address}/{key.replace('/', '%2F')}"
        state: State = None
        if len(history.attempts) > 1 and rng.random() < 0.15:
            request = client.build_request("DELETE", named)
        else:
            state = self._texts(key, len(history.attempts), rng)
            body: dict[str, Any] = {"title": key, "chunks": [{"text": text} for text in state]}
            wait = {"wait": rng.choice(["true", "false"])}
            if rng.random() < 0.5:
                request = client.build_request("PUT", named, json=body, params=wait)
            else:
                request = client.build_request("POST", address, json={"key": key, **body}, params=wait)
        history.attempts.append(state)
        place = len(history.attempts) - 1
        try:
            answer = await client.send(request)
        except httpx2.TransportError as error:
            self.answers[type(error).__name__] += 1
            await asyncio.sleep(0.05)
            return
        self.answers[answer.status_code] += 1
        gone = state is None and answer.status_code == 404
        if answer.is_success or gone:
            history.certain = place
        elif answer.status_code == 503:
            await asyncio.sleep(0.05)
        else:
            raise AssertionError(f"{request.method} {request.url}: {answer.status_code} {answer.text}")

    def _texts(self, key: str, attempt: int, rng: random.Random) -> tuple[str, ...]:
        """Chunks of which some stay from version to version, some move, and at least one tells the version."""
        self._count += 1
        fixed = [f"{key} says the same about subject {n} every time" for n in rng.sample(range(6), rng.randrange(4))]
        fresh = [f"{key} in attempt {attempt}, remark {n}: {rng.random()}" for n in range(rng.randint(1, 5))]
        texts = fixed + fresh
        rng.shuffle(texts)
        return tuple(texts)

    # -- what must be true

    async def check(self) -> None:
        """Everything answered is whole, nothing is there in part, and whatever was pending becomes embedded."""
        with psycopg.connect(self.service.database.url(), autocommit=True) as connection:
            await self._embedded(connection)
            found: dict[str, State] = {}
            for key, texts, ordinals in connection.execute(STATE).fetchall():
                assert ordinals == list(range(len(texts))), f"{key} has the chunks {ordinals}"
                found[key] = tuple(texts)
            assert not found.keys() - self.histories.keys()
            for key, history in self.histories.items():
                state = found.get(key)
                assert state in history.possible, f"{key} is {state}, it may be one of {history.possible}"
                self._settle(history, state)
            assert _one(connection, "select count(*), count(distinct id) from pgshelf.chunks") == (
                (total := sum(len(state or ()) for state in found.values())), total,
            ), "orphans or duplicates"  # fmt: skip
            await self._vectors(connection)

    def _settle(self, history: History, state: State) -> None:
        """What is there now is what counts from here on; nothing of the past is still under way."""
        for attempt in history.attempts[history.certain + 1 :]:
            self.unanswered_there += attempt == state
            self.unanswered_absent += attempt != state
        history.attempts.append(state)
        history.certain = len(history.attempts) - 1

    async def _embedded(self, connection: psycopg.Connection[Any]) -> None:
        deadline = time.monotonic() + RECOVERY_SECONDS
        while (waiting := _one(connection, "select count(*), max(error) from pgshelf.pending_embeddings"))[0]:
            assert time.monotonic() < deadline, f"{waiting} still wait for their vectors"
            await asyncio.sleep(0.05)

    async def _vectors(self, connection: psycopg.Connection[Any]) -> None:
        rows = connection.execute("select text, embedding::text from pgshelf.chunks").fetchall()
        sample = self.rng.sample(rows, min(SAMPLE, len(rows)))
        expected = await LocalEmbedder().embed([text for text, _ in sample], "document")
        stored = [np.fromstring(vector.strip("[]"), sep=",") for _, vector in sample]
        np.testing.assert_allclose(np.array(stored), expected, atol=1e-6)

    def figures(self) -> str:
        """What was done and seen, in a few lines."""
        slowest, usual = max(self.recoveries), sorted(self.recoveries)[len(self.recoveries) // 2]
        answers = ", ".join(f"{name} x {count}" for name, count in self.answers.most_common())
        chunks = sum(len(history.attempts[-1] or ()) for history in self.histories.values())
        return (
            f"{self._count} writes to {len(self.histories)} keys; answers: {answers}\n"
            f"at the end {chunks} chunks; of the unanswered attempts {self.unanswered_there} are there whole and "
            f"{self.unanswered_absent} left nothing\nready again after {usual:.1f} s (median), {slowest:.1f} s at most"
        )


def _one(connection: psycopg.Connection[Any], statement: str) -> tuple[Any, ...]:
    row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return row
