"""What rate limits cost a search, and how exactly they are kept: the same searches over HTTP, with limits and without.

Two services of one process each share a database; one counts the requests of its callers, the other does not. Both are
asked in turn, by one caller and by callers that come once each, for whom PostgreSQL is asked every time. Then two
services with a low limit are asked as fast as they answer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import httpx2
import numpy as np
import psycopg

from benchmarks._serving import serving
from pgshelf import embedded, migrate
from pgshelf.rates import quotas
from pgshelf.settings import Settings

DIMENSION = 256
PORT = 18442
OPEN = {
    "AUTH": "off",
    "EMBEDDER": "none",
    "CACHE_BYTES": "0",
    "TRUSTED_PROXIES": "127.0.0.1",
}  # answers that are kept cost nothing
SEARCH = "/v1/libraries/docs/search"
FILL = """
with l as (insert into pgshelf.libraries (name, dimension, embedder, chunking)
  values ('docs', %(d)s, jsonb_build_object('provider', 'none', 'dimension', %(d)s), '{"size": 1200, "overlap": 0}')
  returning *),
d as (insert into pgshelf.documents (place, library_id, key)
  select 1, l.id, 'd' || n from l, generate_series(1, %(n)s) n returning *)
select d.library_id, d.id from d
"""
CHUNKS = """
insert into pgshelf.chunks_s0 (shelf, place, library_id, document_id, ordinal, text, embedding, language)
select 0, 1, d.library_id, d.id, 0, 'text',
  (select array_agg(random() - 0.5 + 0 * (length(d.key) + i)) from generate_series(1, %s) i)::vector, 'english'
from pgshelf.documents d
"""


def main() -> None:
    """Fill a library, serve it, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5, help="that the limit is tried for")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder), 18)
        try:
            url = server.url()
            migrate.upgrade(url, warn=False)
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(FILL, {"d": DIMENSION, "n": options.chunks})
                connection.execute(CHUNKS, [DIMENSION])
                connection.execute("vacuum analyze")
            with (
                serving(url, PORT, **OPEN) as without,
                serving(url, PORT + 1, **OPEN, RATE_LIMIT_SEARCH="100000/s") as limited,
            ):
                cost(without, limited, options.rounds)
            for preset in ("team", "public"):
                with (
                    serving(url, PORT, **OPEN, RATE_LIMITS=preset) as one,
                    serving(url, PORT + 1, **OPEN, RATE_LIMITS=preset) as two,
                ):
                    kept([one, two], url, preset, options.seconds)
        finally:
            server.stop()


def cost(without: str, limited: str, rounds: int) -> None:
    """Print the medians without and with limits, and what share of the searches asked PostgreSQL."""
    random = np.random.default_rng(7)
    print(f"| {'callers':14} | without ms | with ms | ratio | its own ratio | asks | an ask, ms |")
    for callers in ("one", "a new one each"):
        times: dict[str, list[float]] = {without: [], limited: []}
        asks, ratios = [], []
        with httpx2.Client(timeout=30) as client:
            for number in range(rounds + 50):
                body = {"vector": random.normal(size=DIMENSION).round(4).tolist()}
                caller = "1.1.1.1" if callers == "one" else f"1.{number // 65536}.{number // 256 % 256}.{number % 256}"
                for address in (without, limited) if number % 2 else (limited, without):
                    begun = time.perf_counter()
                    answer = client.post(f"{address}{SEARCH}", json=body, headers={"X-Forwarded-For": caller})
                    spent = (time.perf_counter() - begun) * 1000
                    if answer.status_code != 200:
                        raise SystemExit(f"{answer.status_code}: {answer.text}")
                    if number < 50:
                        continue
                    times[address].append(spent)
                    if address == limited:
                        stages = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
                        total, asked = float(stages["total"]), float(stages.get("rates", 0))
                        asks.append(asked)
                        ratios.append(total / (total - asked))
        before, after = statistics.median(times[without]), statistics.median(times[limited])
        really = [each for each in asks if each]
        share, each = len(really) / len(asks), statistics.median(really) if really else 0.0
        found = f"{before:10.2f} | {after:7.2f} | {after / before:5.2f} | {statistics.median(ratios):13.2f}"
        print(f"| {callers:14} | {found} | {share:4.0%} | {each:10.2f} |")


def kept(addresses: list[str], url: str, preset: Literal["team", "public"], seconds: float) -> None:
    """Print how many searches one caller got of two services that it asked as fast as it could."""
    limit = quotas(Settings(rate_limits=preset))["search"]
    answers: list[Counter[int]] = []
    body = {"vector": [0.5] * DIMENSION}
    end = time.monotonic() + seconds

    def ask(address: str) -> None:
        counts = Counter[int]()
        with httpx2.Client(timeout=30) as client:
            while time.monotonic() < end:
                counts[client.post(f"{address}{SEARCH}", json=body).status_code] += 1
        answers.append(counts)

    threads = [threading.Thread(target=ask, args=(address,)) for address in addresses * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = sum(answers, Counter[int]())
    fair = limit.requests * (1 + seconds / limit.window)
    most = fair + 2 * (limit.most - 1)
    with psycopg.connect(url) as connection:
        row = connection.execute("select n_tup_upd from pg_stat_user_tables where relname = 'rate_shares'").fetchone()
    print(
        f"{preset}: {limit.requests} in {limit.window} s, two services, {seconds:g} s: {total[200]} searches of"
        f" {total.total()} let in, {fair:.0f} are due, {most:.0f} at most; {row[0] if row else 0} updates until now"
    )
    if not set(total) <= {200, 429} or total[200] > most:
        raise SystemExit(f"the limit was not kept: {dict(total)}")


if __name__ == "__main__":
    main()
