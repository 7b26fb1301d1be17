"""What authorisation costs: searches over HTTP with keys and without, in SQL by the owner and by who was granted the
library, writes with the audit log and without. One after the other in turn; medians, and their ratio.

Two services of one process each share a database; one asks for a key, the other does not. On a busy machine the last
column says more: the stages that the second service timed itself, `auth` against all others.
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
import psycopg
from psycopg.types.json import Jsonb

from benchmarks._serving import serving
from pgshelf import credentials, embedded, migrate

LIMIT = 1.10
DIMENSION = 256
PORT = 18432
SEARCHED = {"CACHE_BYTES": "0"}  # an answer that is kept is no search


def main() -> None:
    """Fill a library, serve it twice, ask both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder), 18)
        try:
            url = server.url()
            migrate.upgrade(url, warn=False)
            keys = fill(url, options.chunks)
            with (
                serving(url, PORT, **SEARCHED, AUTH="off") as without,
                serving(url, PORT + 1, **SEARCHED, AUTH="on") as asked,
            ):
                measure(without, asked, keys, options.rounds)
            in_sql(url, options.rounds)
            with serving(url, PORT, AUTH="off", AUDIT="false") as plain, serving(url, PORT + 1, AUTH="off") as audited:
                writes(plain, audited, options.rounds)
        finally:
            server.stop()


def fill(url: str, chunks: int) -> dict[str, str]:
    """A library, and keys: one for all libraries, one for some by a pattern, a token of the latter."""
    made = {name: credentials.mint() for name in ("key for all", "key for team-*")}
    token = credentials.mint("token")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            """insert into pgshelf.libraries (name, dimension, embedder, chunking)
            values ('team-docs', %s, %s, '{"size": 1200, "overlap": 0}')""",
            [DIMENSION, Jsonb({"provider": "local", "dimension": DIMENSION})],
        )
        connection.execute(
            """insert into pgshelf.documents (place, library_id, key, metadata)
            select 1, l.id, 'd' || n, jsonb_build_object('year', 2000 + n %% 20)
            from pgshelf.libraries l, generate_series(1, %s) n""",
            [chunks // 10],
        )
        connection.execute(
            """insert into pgshelf.chunks_s0 (shelf, place, library_id, document_id, ordinal, text, embedding, language)
            select 0, 1, d.library_id, d.id, n, 'text about word' || (random() * 100)::int,
              (select array_agg(random() - 0.5 + 0 * (n + length(d.key) + i)) from generate_series(1, %s) i)::vector,
              'english'
            from pgshelf.documents d, generate_series(1, 10) n""",
            [DIMENSION],
        )
        for name, scope in (("key for all", None), ("key for team-*", ["team-*"])):
            given = [name, "reader", scope, None, made[name].hash, made[name].hint]
            connection.execute("select pgshelf.create_key(%s, %s, %s, %s, %s, %s)", given)
        given = [made["key for team-*"].hash, token.hash, token.hint, "reader", ["team-docs"], "1 hour"]
        connection.execute("select pgshelf.issue_token(%s, %s, %s, %s, %s, %s::interval)", given)
        connection.execute("vacuum analyze")
    return {name: each.secret for name, each in made.items()} | {"token": token.secret}


def measure(without: str, asked: str, keys: dict[str, str], rounds: int) -> None:
    """Print the medians of each kind of search, and whether they keep the limit."""
    random = np.random.default_rng(7)

    def bodies(kind: str) -> dict[str, Any]:
        vector = random.normal(size=DIMENSION).round(4).tolist()
        filtered: dict[str, Any] = {"filter": {"year": {"$gte": 2010}}}
        return {
            "by vector": {"vector": vector},
            "by vector, filtered": {"vector": vector, **filtered},
            "by query (hybrid)": {"query": f"text about word{random.integers(100)}"},
            "by query, filtered": {"query": f"text about word{random.integers(100)}", **filtered},
        }[kind]

    titles = f"{'without ms':>10} | {'with ms':>8} | {'ratio':>5} | under {LIMIT} | {'auth ms':>7} | its ratio"
    print(f"| {'search':20} | {'credentials':14} | {titles} |")
    for kind in ("by vector", "by vector, filtered", "by query (hybrid)", "by query, filtered"):
        for name, secret in keys.items():
            times: dict[str, list[float]] = {without: [], asked: []}
            stages: list[tuple[float, float]] = []
            headers = {"Authorization": f"Bearer {secret}"}
            with httpx2.Client(headers=headers, timeout=30) as client:
                for number in range(rounds + 20):
                    body = bodies(kind)
                    for address in (without, asked) if number % 2 else (asked, without):
                        started = time.perf_counter()
                        answer = client.post(f"{address}/v1/libraries/team-docs/search", json=body)
                        spent = (time.perf_counter() - started) * 1000
                        if answer.status_code != 200:
                            raise SystemExit(f"{answer.status_code}: {answer.text}")
                        if number >= 20:
                            times[address].append(spent)
                            if address == asked:
                                stages.append(timed(answer.headers["server-timing"]))
            before, after = statistics.median(times[without]), statistics.median(times[asked])
            kept = "yes" if after / before <= LIMIT else "NO"
            auth, total = (statistics.median(column) for column in zip(*stages, strict=True))
            found = f"{before:10.2f} | {after:8.2f} | {after / before:5.2f} | {kept:>9} | {auth:7.2f}"
            print(f"| {kind:20} | {name:14} | {found} | {total / (total - auth):9.2f} |")


def in_sql(url: str, rounds: int) -> None:
    """Print what a grant costs a search in SQL: one to the role itself, one to its team; a hundred others have one."""
    random = np.random.default_rng(8)
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("create role analyst login in role pgshelf_reader")
        owner.execute("create role team nologin")
        owner.execute("create role member login in role pgshelf_reader, team")
        for statement in ("analyst', 'team-docs", "team', 'team-*"):
            owner.execute(f"select pgshelf.grant_library('{statement}')".encode())
        for n in range(100):
            owner.execute(f"create role other_{n} nologin".encode())
            owner.execute("select pgshelf.grant_library(%s, 'team-docs')", [f"other_{n}"])
        with (
            psycopg.connect(url, user="analyst", autocommit=True) as analyst,
            psycopg.connect(url, user="member", autocommit=True) as member,
        ):
            callers = {"the owner": owner, "its own grant": analyst, "its team's grant": member}
            print(f"\n| {'search in SQL':20} | {'caller':16} | {'ms':>6} | ratio | under {LIMIT} |")
            for kind, call in SEARCHES.items():
                times: dict[str, list[float]] = {name: [] for name in callers}
                for number in range(rounds + 20):
                    vector = str(random.normal(size=DIMENSION).round(4).tolist())
                    for name in sorted(callers, key=lambda _: random.random()):
                        started = time.perf_counter()
                        callers[name].execute(call, {"vector": vector}).fetchall()
                        if number >= 20:
                            times[name].append((time.perf_counter() - started) * 1000)
                first = statistics.median(times["the owner"])
                for name, spent in times.items():
                    ratio = statistics.median(spent) / first
                    kept = "yes" if ratio <= LIMIT else "NO"
                    print(f"| {kind:20} | {name:16} | {statistics.median(spent):6.2f} | {ratio:5.2f} | {kept:>10} |")


SEARCHES: dict[str, Any] = {
    "by vector": "select * from pgshelf.search('team-docs', %(vector)s)",
    "by vector, filtered": "select * from pgshelf.search('team-docs', %(vector)s,"
    """ filter => '{"year": {"$gte": 2010}}')""",
    "by words": "select * from pgshelf.search_text('team-docs', 'word7')",
    "by both": "select * from pgshelf.search_hybrid('team-docs', 'word7', %(vector)s)",
}


def writes(plain: str, audited: str, rounds: int) -> None:
    """Print what the audit log costs a write."""
    print(f"\n| {'write':28} | {'without ms':>10} | {'audited ms':>10} | ratio |")
    chunk = {"text": "x", "embedding": [1.0] * DIMENSION}
    one = {"text": "one"}

    def put(client: httpx2.Client, address: str, number: int) -> httpx2.Response:
        return client.put(f"{address}/v1/libraries/team-docs/documents/w", json={"chunks": [chunk | one]})

    def patch(client: httpx2.Client, address: str, number: int) -> httpx2.Response:
        return client.patch(f"{address}/v1/libraries/team-docs/documents/w", json={"metadata": {"n": number}})

    def batch(client: httpx2.Client, address: str, number: int) -> httpx2.Response:
        documents = [{"key": f"b{n}", "chunks": [chunk]} for n in range(100)]
        return client.post(f"{address}/v1/libraries/team-docs/documents/batch", json={"documents": documents})

    def update(client: httpx2.Client, address: str, number: int) -> httpx2.Response:
        body = {"filter": {"$key": "w"}, "patch": {"n": number}}
        return client.post(f"{address}/v1/libraries/team-docs/documents/update", json=body)

    for name, work, count in (
        ("put a document", put, rounds),
        ("patch its metadata", patch, rounds),
        ("a batch of 100", batch, rounds // 20),
        ("change one by a filter", update, rounds),
    ):
        times: dict[str, list[float]] = {plain: [], audited: []}
        with httpx2.Client(timeout=60) as client:
            for number in range(count + 5):
                for address in (plain, audited) if number % 2 else (audited, plain):
                    started = time.perf_counter()
                    answer = work(client, address, number)
                    if number >= 5:
                        times[address].append((time.perf_counter() - started) * 1000)
                    if answer.status_code >= 400:
                        raise SystemExit(f"{answer.status_code}: {answer.text}")
        before, after = statistics.median(times[plain]), statistics.median(times[audited])
        print(f"| {name:28} | {before:10.2f} | {after:10.2f} | {after / before:5.2f} |")


def timed(header: str) -> tuple[float, float]:
    """The stage `auth` and the total of an answer, in milliseconds."""
    stages = dict(part.split(";dur=") for part in header.split(", "))
    return float(stages["auth"]), float(stages["total"])


if __name__ == "__main__":
    main()
