"""Load as of many clients: 20,000 chunks, locust, a service with 1 and with 2 processes, everything on this machine.

Four runs for each number of processes: `open`, 100 requests a second whatever happens; `users`, 100 people who wait 1
to 3 s between two requests; `saturated`, searches by vector as fast as they are answered, each of them carried out; and
`cached`, the same where the query cache may answer (500 different ones while nothing is written: it answers all). The
first two send the mix of locustfile.py and are held to its goals; the clients of the others are those of _clients.py.
/health is asked ten times a second all the while, memory is looked at, and the CPU seconds of service, PostgreSQL and
clients say who was busy: clients take their share of the same cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import psycopg
from psycopg.types.json import Jsonb

from benchmarks import _corpus, _library
from benchmarks._serving import serving
from pgshelf import credentials
from pgshelf.embedders import described
from pgshelf.embedders.local import LocalEmbedder

PORT = 18532
CORES = psutil.cpu_count() or 1
MIXES = {"open": "Open", "users": "Users"}
GOALS = {"open": {95: 100}, "users": {50: 45, 95: 120, 99: 250}}  # milliseconds by percentile
MEGABYTE = 1024 * 1024


def main() -> None:
    """Fill a library, serve it, and let locust loose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    for name, seconds in (("open", 60), ("users", 60), ("saturated", 30), ("cached", 15)):
        parser.add_argument(f"--{name}", type=int, default=seconds, help=f"seconds, 0 for none; {seconds} if absent")
    parser.add_argument("--rate", type=int, default=100, help="requests a second of the open run")
    parser.add_argument("--searchers", type=int, default=16, help="clients of the saturated and the cached run")
    parser.add_argument("--keep", type=Path, help="write what the clients send to this file, and keep it")
    options = parser.parse_args()
    corpus = _corpus.python_sources(options.chunks)
    with _library.database() as connection, tempfile.TemporaryDirectory() as folder:
        data = options.keep or Path(folder) / "data.json"
        data.write_text(json.dumps({**sent(corpus), "key": fill(connection, corpus)}))
        for workers in options.workers:
            settings = {"AUTH": "on", "WORKERS": str(workers), "WORKER_ENABLED": "true"}
            with serving(connection.info.dsn, PORT, **settings) as address:
                postmaster = psutil.Process(connection.info.backend_pid).parent()
                run = Run(address, data, workers, postmaster or psutil.Process(connection.info.backend_pid))
                run.clients("saturated", options.searchers, 5)  # warms up
                for kind, users, seconds in (
                    ("open", options.rate * 5, options.open),
                    ("users", 100, options.users),
                    ("saturated", options.searchers, options.saturated),
                    ("cached", options.searchers, options.cached),
                ):
                    if seconds:
                        run.measure(kind, users, seconds, options.rate)


def sent(corpus: _corpus.Corpus) -> dict[str, Any]:
    """What the clients send: vectors and words that are of no chunk, and texts to write."""
    texts = corpus.texts[:3000]
    queries = [" ".join(text.split()[:5]) for text in corpus.texts[-500:]]
    return {"vectors": corpus.queries.round(5).tolist(), "queries": queries, "texts": texts}


def fill(connection: psycopg.Connection[Any], corpus: _corpus.Corpus) -> str:
    """The library `load` with the local embedder and an HNSW index; returns an admin's key."""
    _library.load(connection, corpus, "load")
    embedder = Jsonb(described(LocalEmbedder()))
    connection.execute("update pgshelf.libraries set embedder = %s where name = 'load'", [embedder])
    _library.index(connection, "load", {"type": "hnsw"})
    made = credentials.mint()
    given = ["load", "admin", None, None, made.hash, made.hint]
    connection.execute("select pgshelf.create_key(%s, %s, %s, %s, %s, %s)", given)
    print(f"{len(corpus.texts)} chunks of {corpus.name}, dimension {corpus.dimension}, hnsw")
    return made.secret


@dataclass
class Watch:
    """What is seen of a service beside the load: its health, memory, and who uses the processors."""

    address: str
    stopped: threading.Event = field(default_factory=threading.Event)
    health: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Until it is stopped, ask /health ten times a second and weigh the processes once a second."""
        with httpx2.Client(base_url=self.address, timeout=30) as client:
            while not self.stopped.wait(0.1):
                started = time.perf_counter()
                client.get("/health").raise_for_status()
                self.health.append((time.perf_counter() - started) * 1000)
                if len(self.health) % 10 == 1:
                    self.memory.append(sum(each.memory_info().rss for each in serving_processes()))


def serving_processes() -> list[psutil.Process]:
    """The processes of the service, below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "pgshelf.cli" in " ".join(process.cmdline()):
                found.append(process)
    return found


@dataclass
class Run:
    """A service under load."""

    address: str
    data: Path
    workers: int
    postmaster: psutil.Process  # it ran before this one and is no child of it

    def locust(self, kind: str, users: int, seconds: int, rate: int = 100) -> list[dict[str, Any]]:
        """Let users of a kind loose; returns locust's statistics."""
        file = str(Path(__file__).with_name("locustfile.py"))
        command = [sys.executable, "-m", "locust", "-f", file, "--headless", "--json", "--loglevel", "ERROR"]
        command += ["--host", self.address, "-u", str(users), "-r", str(users), "-t", f"{seconds}s", kind]
        environment = {**os.environ, "LOAD_DATA": str(self.data), "LOAD_RATE": str(rate)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):  # 1: there were failures, which the statistics have
            raise SystemExit(done.stderr)
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def clients(self, kind: str, number: int, seconds: int) -> list[dict[str, Any]]:
        """Search without a pause; returns the same."""
        command = [sys.executable, "-m", "benchmarks._clients", self.address, str(self.data), str(number), str(seconds)]
        command += ["--cached"] if kind == "cached" else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found: list[dict[str, Any]] = json.loads(done.stdout)
        return found

    def measure(self, kind: str, users: int, seconds: int, rate: int) -> None:
        """Print what a run gave, and whether it keeps the goals."""
        watch = Watch(self.address)
        thread = threading.Thread(target=watch.look)
        before = self.cpu()
        thread.start()
        started = time.perf_counter()
        mix = MIXES.get(kind)
        entries = self.clients(kind, users, seconds) if mix is None else self.locust(mix, users, seconds, rate)
        took = time.perf_counter() - started
        spent = self.cpu()
        watch.stopped.set()
        thread.join()
        print(f"\n{kind}, {self.workers} processes, {users} clients, {seconds} s on {CORES} cores")
        every: Counter[float] = Counter()
        failures = 0
        for entry in entries:
            times = Counter({float(ms): count for ms, count in entry["response_times"].items()})
            every += times
            failures += entry["num_failures"]
            print(f"  {entry['name']:12} {line(times, entry['num_failures'])}")
        print(f"  {'all':12} {line(every, failures)}")
        health = Counter(watch.health)
        told = ", ".join(f"p{of} {percentile(health, of):.0f} ms" for of in (50, 99, 100))
        print(f"  {sum(every.values()) / seconds:.0f} requests/s; /health {told}")
        first, last = (watch.memory[at] / MEGABYTE for at in (len(watch.memory) // 4, -1))
        print(f"  memory of the service {first:.0f} MB after a quarter, {last:.0f} MB at the end")
        shares = ", ".join(f"{whose} {(spent[whose] - before.get(whose, 0.0)) / took:.2f}" for whose in spent)
        print(f"  cores busy: {shares}")
        if kind in GOALS:
            kept = all(percentile(every, of) < goal for of, goal in GOALS[kind].items())
            kept = kept and not failures and max(watch.health) < 100
            goals = ", ".join(f"p{of} under {goal} ms" for of, goal in GOALS[kind].items())
            print(f"  {goals}, no failure, /health under 100 ms: {'yes' if kept else 'NO'}")

    def cpu(self) -> dict[str, float]:
        """The CPU seconds that the parts have used so far; those of the clients are of children that ended."""
        database = [self.postmaster, *self.postmaster.children(recursive=True)]
        found = {"service": seconds(serving_processes()), "PostgreSQL": seconds(database)}
        ended = psutil.Process().cpu_times()
        return {**found, "clients": ended.children_user + ended.children_system}


def seconds(processes: list[psutil.Process]) -> float:
    """The CPU seconds of processes, and of their children that ended."""
    found = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found += times.user + times.system + times.children_user + times.children_system
    return found


def line(times: Counter[float], failures: int) -> str:
    """Percentiles in milliseconds."""
    told = " | ".join(f"p{of} {percentile(times, of):5.0f}" for of in (50, 95, 99, 100))
    return f"{sum(times.values()):6} requests | {told} ms | {failures} failed"


def percentile(times: Counter[float], of: float) -> float:
    """The time that so many of a hundred do not exceed."""
    wanted, seen = sum(times.values()) * of / 100, 0
    for milliseconds, count in sorted(times.items()):
        seen += count
        if seen >= wanted:
            return milliseconds
    return float("nan")


if __name__ == "__main__":
    main()
