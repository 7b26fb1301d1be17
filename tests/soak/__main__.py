"""`make soak`: kills -9 of all kinds, failovers, outages of a provider, a change feed and a query cache under writers,
repeated requests, probes, slow clients, hostile texts.

All with seeds. A part of it: `make soak ARGS="--only provider probes --provider 20"`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import psutil

from pgshelf import embedded, migrate
from pgshelf.app import create_app
from pgshelf.settings import Settings
from tests.conftest import _lifespan
from tests.rest.asking import bearer, key, ok
from tests.soak import ingestion, injection, outage, replicas, slow_clients
from tests.soak.borders import crossed
from tests.soak.cached import PROCESSES, consistency
from tests.soak.crash import KINDS, Ingestion, service
from tests.soak.embedders import DIMENSIONS, changing
from tests.soak.feed import follow
from tests.soak.moves import KINDS as MOVE_KINDS
from tests.soak.moves import LARGE, moving
from tests.soak.repeats import repeat


async def ingest(kills: int, seed: int, version: int, minutes: float) -> None:
    print(f"seed {seed}: {kills} kills -9 during ingestion, PostgreSQL {version} with fsync on", flush=True)
    rng, done, started = random.Random(seed), Counter[str](), time.monotonic()
    with service(version) as target:
        ingestion = Ingestion(target, seed)
        await ingestion.start()
        for number in range(1, kills + 1):
            if time.monotonic() - started > minutes * 60:
                raise SystemExit(f"seed {seed}: only {number - 1} of {kills} kills within {minutes:g} minutes")
            kind = rng.choice(KINDS)
            begun = time.monotonic()
            await ingestion.cycle(kind)
            done[kind] += 1
            print(f"{number:3} {kind:<10} {time.monotonic() - begun:5.1f} s", flush=True)
        print(f"seed {seed}: nothing lost and nothing in part after {done.total()} kills -9: {dict(done)}")
        print(f"{ingestion.figures()}\n{(time.monotonic() - started) / 60:.1f} minutes")


def move(kills: int, seed: int, version: int, minutes: float) -> None:
    print(f"seed {seed}: a library that moves, first undisturbed, then with {kills} kills -9", flush=True)
    rng, started = random.Random(seed), time.monotonic()
    with moving(version, seed, LARGE) as moves:
        moves.walk()
        for number in range(kills):
            if time.monotonic() - started > minutes * 60:
                raise SystemExit(f"seed {seed}: only {number} of {kills} kills within {minutes:g} minutes")
            moves.kill_once(rng.choice(MOVE_KINDS))
        moves.finish(patient=True)
        print(f"seed {seed}: the library is right and nothing is left over\n{moves.figures()}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


def change(kills: int, seed: int, version: int, minutes: float) -> None:
    print(f"seed {seed}: embedders that change to and fro, first undisturbed, then with {kills} kills -9", flush=True)
    rng, started = random.Random(seed), time.monotonic()
    with changing(version, seed) as changes:
        changes.change(DIMENSIONS[1])
        for number in range(kills):
            if time.monotonic() - started > minutes * 60:
                raise SystemExit(f"seed {seed}: only {number} of {kills} kills within {minutes:g} minutes")
            changes.change(DIMENSIONS[number % 2], rng.choice(KINDS))
        print(f"seed {seed}: nothing lost, nothing mixed\n{changes.figures()}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


def feed(seconds: float, seed: int, version: int) -> None:
    print(f"seed {seed}: a change feed under sixteen writers for {seconds:g} seconds", flush=True)
    with service(version) as target:
        asyncio.run(target.ready())
        print(follow(target.database.url(), target.url, seed, seconds))


def answers(requests: int, seed: int, version: int) -> None:
    print(f"seed {seed}: {requests} writes through a proxy that drops answers", flush=True)
    with service(version) as target:
        asyncio.run(target.ready())
        print(asyncio.run(repeat(target.url, seed, requests)))


def cached(reads: int, seed: int, version: int, minutes: float, broken: bool) -> None:
    print(f"seed {seed}: {reads} reads of the query cache under eight writers", flush=True)
    with service(version, workers=str(PROCESSES), embedder="none") as target:
        asyncio.run(target.ready())
        given = (target.database.url(), target.url, seed, reads)
        figures, stale = consistency(*given, minutes=minutes, broken=broken)
    print(figures, flush=True)
    if stale:
        raise SystemExit(f"seed {seed}: stale answers, such as {stale[:3]}")


def embed(kills: int, seed: int, version: int, minutes: float) -> None:
    print(f"seed {seed}: {kills} kills -9 while a faulty provider embeds", flush=True)
    rng, started = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ingestion.kills(version, seed, Path(folder)) as target:
        for number in range(1, kills + 1):
            if time.monotonic() - started > minutes * 60:
                raise SystemExit(f"seed {seed}: only {number - 1} of {kills} kills within {minutes:g} minutes")
            kind, begun = rng.choice(ingestion.KINDS), time.monotonic()
            target.run(kind, seconds=1.0)
            print(f"{number:3} {kind:<10} {time.monotonic() - begun:5.1f} s", flush=True)
        print(f"seed {seed}: what was acknowledged is there once, whole and embedded\n{target.figures()}")
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


def cross(count: int, seed: int, version: int) -> None:
    print(f"seed {seed}: {count} probes of what a key and a role may not know", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        print(asyncio.run(crossed(Path(folder), count, seed, version)), flush=True)


async def away(kind: str, minutes: float, version: int) -> None:
    provider = outage.Provider()
    options = {"cohere_api_key": provider.key, "cohere_base_url": provider.url, "cohere_timeout": "2"}
    try:
        with service(version, **options) as target:
            await target.ready()
            async with httpx2.AsyncClient(base_url=target.url, timeout=30) as client:
                seen = outage.Outage(client, provider, kind)
                await seen.run(minutes * 60)
    finally:
        provider.close()
    print(
        f"{kind} for {minutes:g} minutes: {dict(seen.answers)}, {len(seen.written)} documents written meanwhile, ",
        end="",
    )
    print(f"all as before after {seen.healed:.1f} s", flush=True)


async def crowded(clients: int, version: int) -> None:
    print(f"{clients} clients one after another, slow ones and many at once, two processes", flush=True)
    patience = 5.0
    timeouts = {"header_timeout": str(patience), "body_timeout": str(patience), "embedder": "none"}
    size = {"documents": 2000, "each": max(1, clients // 100), "half_open": clients // 10, "in_turn": clients}
    size |= {"at_once": 200, "readers": 20, "reading": 15}
    with service(version, **timeouts) as target:
        await target.ready()
        before = held(target.workers())
        told = await slow_clients.all_of_it(target.url, target.database.url(), patience, size)
        await asyncio.sleep(patience)
        for name, figure in told.items():
            print(f"  {name}: {figure}")
        after = held(target.workers())
        print(f"  files and MiB of the processes, before and after: {before}, {after}", flush=True)
        assert told["longest"] < 5.0, "others had to wait"
        assert all(files < 100 for files, _ in after), "connections are left over"


def held(processes: list[psutil.Process]) -> list[tuple[int, int]]:
    return [(each.num_fds(), each.memory_info().rss // 2**20) for each in processes]


async def inject(share: float, seed: int, version: int) -> None:
    print(f"seed {seed}: {share:.0%} of all hostile texts through every place that takes one", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        with embedded.start(Path(folder), version, settings={"fsync": "off"}) as server:
            migrate.upgrade(server.url(), warn=False)
            secret, begun = key(server.url(), "root", "admin"), time.monotonic()
            app = create_app(Settings(database_url=server.url(), auth="on", worker_enabled=False))
            async with _lifespan(app):
                transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
                options: dict[str, Any] = {"base_url": "http://localhost", "headers": bearer(secret), "timeout": 60}
                async with httpx2.AsyncClient(transport=transport, **options) as client:
                    corpus = injection.Corpus(client, server.url(), ok(await client.get("/schema")))
                    corpus.prepare()
                    await corpus.run(random.Random(seed), share)
    print(f"nothing happened\n{corpus.figures()}\n{(time.monotonic() - begun) / 60:.1f} minutes", flush=True)


def read_back(pairs: int, seed: int, version: int) -> None:
    print(f"seed {seed}: {pairs} writes and reads on standbys that are late", flush=True)
    print(asyncio.run(replicas.read_your_writes(pairs, seed, version)), flush=True)


def fail_over(times: int, seed: int, version: int) -> None:
    for synchronous, share in ((True, times - times // 2), (False, times // 2)):
        if share:
            print(f"seed {seed}: {share} failovers, synchronous: {synchronous}", flush=True)
            print(asyncio.run(replicas.failovers(share, seed, version, synchronous)), flush=True)


def churn(searches: int, seed: int, version: int) -> None:
    print(f"seed {seed}: {searches} searches of standbys under churn", flush=True)
    print(asyncio.run(replicas.churn(searches, seed, version)), flush=True)


def away_each_way(minutes: float, version: int) -> None:
    for kind in outage.KINDS:
        asyncio.run(away(kind, minutes, version))


class Part(NamedTuple):
    """Something to try for a while: how much of it there is, 0 for none of it."""

    amount: float
    help: str
    run: Callable[[Any, argparse.Namespace], Any]


PARTS = {
    "kills": Part(50, "during ingestion", lambda n, o: asyncio.run(ingest(n, o.seed, o.version, o.minutes))),
    "moves": Part(
        20,
        "kills while a library moves and its index is built",
        lambda n, o: move(n, o.seed, o.version, o.minutes),
    ),
    "changes": Part(
        20, "kills while embedders of libraries change", lambda n, o: change(n, o.seed, o.version, o.minutes)
    ),
    "feed": Part(60, "seconds that the change feed is written and followed", lambda n, o: feed(n, o.seed, o.version)),
    "repeats": Part(1000, "writes whose answers are dropped", lambda n, o: answers(n, o.seed, o.version)),
    "cache": Part(
        50_000,
        "reads of the query cache under writers",
        lambda n, o: cached(n, o.seed, o.version, o.minutes, o.broken_cache),
    ),
    "provider": Part(100, "kills while a faulty provider embeds", lambda n, o: embed(n, o.seed, o.version, o.minutes)),
    "probes": Part(10_000, "of libraries that a caller does not see", lambda n, o: cross(n, o.seed, o.version)),
    "outage": Part(3.0, "minutes for which a provider is away, in each way", lambda n, o: away_each_way(n, o.version)),
    "slow-clients": Part(
        10_000, "connections one after another, and slow ones", lambda n, o: asyncio.run(crowded(n, o.version))
    ),
    "injection": Part(
        1.0,
        "share of the hostile texts that each place gets",
        lambda n, o: asyncio.run(inject(n, o.seed, o.version)),
    ),
    "read-your-writes": Part(20_000, "pairs on standbys that are late", lambda n, o: read_back(n, o.seed, o.version)),
    "failovers": Part(
        20, "kills of the primary, half of them synchronous", lambda n, o: fail_over(n, o.seed, o.version)
    ),
    "standby-churn": Part(500_000, "searches of standbys under vacuum", lambda n, o: churn(n, o.seed, o.version)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    for name, part in PARTS.items():
        parser.add_argument(f"--{name}", type=type(part.amount), default=part.amount, help=part.help)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS], help="these parts and no other")
    parser.add_argument("--broken-cache", action="store_true", help="as if no state ever changed: must fail")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--version", type=int, choices=(16, 18), default=18, help="of the bundled PostgreSQL")
    parser.add_argument("--minutes", type=float, default=15, help="fail when either takes longer")
    options = parser.parse_args()
    for name in options.only:
        if amount := getattr(options, name.replace("-", "_")):
            PARTS[name].run(amount, options)


if __name__ == "__main__":
    main()
