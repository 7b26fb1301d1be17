"""Sixteen writers that commit and roll back, and readers of the change feed that miss and repeat nothing.

Used by tests/test_changes.py (seconds) and `make soak` (a minute).
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psycopg

from pgshelf_client import Client, Conflict, NotFound

LIBRARY = "feed"
SQL_WRITERS, REST_WRITERS = 12, 4
KEYS = 60  # all writers share them
END = "the end"
SQL_PUT = """select pgshelf.put_document(%s, key => %s, texts => array['text'], metadata => %s,
  embeddings => array[cast('[1,0,0]' as vector)])"""
ONE = "select d.id::text, d.version from pgshelf.documents_view d where d.library = %s and d.key = %s"


class Told(NamedTuple):
    """A change; there is one of each kind, document and version."""

    kind: str
    document: str
    version: int


@dataclass
class Truth:
    """What was committed, and when the writer knew."""

    changes: Counter[Told] = field(default_factory=Counter)
    known_at: dict[Told, float] = field(default_factory=dict)
    rolled_back: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, told: list[Told]) -> None:
        with self.lock:
            self.changes.update(told)
            self.known_at |= dict.fromkeys(told, time.monotonic())


class Worker(threading.Thread):
    """A thread whose error is raised when it is joined."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.stopping = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error = error

    def work(self) -> None:
        raise NotImplementedError

    def done(self, seconds: float = 60) -> None:
        self.stopping.set()
        self.join(seconds)
        if self.error:
            raise self.error
        assert not self.is_alive(), f"{self.name} does not end"


class SqlWriter(Worker):
    """A few changes to a transaction; every fourth is rolled back, and some savepoints are."""

    def __init__(self, number: int, seed: int, database_url: str, truth: Truth) -> None:
        super().__init__(f"SQL writer {number}")
        self.rng, self.database_url, self.truth = random.Random(f"{seed} sql {number}"), database_url, truth

    def work(self) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            connection.execute("set deadlock_timeout = '20ms'")
            while not self.stopping.is_set():
                told: list[Told] = []
                commit = self.rng.random() > 0.25
                try:
                    with connection.transaction():
                        for _ in range(self.rng.randint(1, 4)):
                            told += self.change(connection)
                            time.sleep(self.rng.choice([0, 0.01, 0.02, 0.05]))
                        if not commit:
                            raise psycopg.Rollback
                except psycopg.errors.DeadlockDetected:
                    commit = False
                if commit:
                    self.truth.add(told)
                else:
                    self.truth.rolled_back += 1

    def change(self, connection: psycopg.Connection[Any]) -> list[Told]:
        with connection.transaction():
            told = self.one(
                connection, f"k{self.rng.randrange(KEYS)}", self.rng.choice(["put", "put", "patch", "delete"])
            )
            if self.rng.random() < 0.1:
                told = []
                raise psycopg.Rollback
        return told

    def one(self, connection: psycopg.Connection[Any], key: str, kind: str) -> list[Told]:
        if kind == "delete":
            lock = "select d.id::text, d.version from pgshelf.documents d where d.key = %s for update"
            row = connection.execute(lock, [key]).fetchone()
            if row:
                connection.execute("select pgshelf.delete_document(%s, %s)", [LIBRARY, row[0]])
            return [Told("delete", *row)] if row else []
        about = json.dumps({"n": self.rng.random()})
        if kind == "put":
            connection.execute(SQL_PUT, [LIBRARY, key, about])
            changed = True
        else:
            update = "select pgshelf.update_documents(%s, %s, %s)"
            changed = connection.execute(update, [LIBRARY, json.dumps({"$key": key}), about]).fetchone() == (1,)
        row = connection.execute(ONE, [LIBRARY, key]).fetchone()
        return [Told("put", *row)] if row and changed else []


class RestWriter(Worker):
    """One change to a request."""

    def __init__(self, number: int, seed: int, url: str, truth: Truth) -> None:
        super().__init__(f"REST writer {number}")
        self.rng, self.url, self.truth = random.Random(f"{seed} rest {number}"), url, truth

    def work(self) -> None:
        with Client(self.url) as client:
            while not self.stopping.is_set():
                key, kind = f"k{self.rng.randrange(KEYS)}", self.rng.choice(["put", "put", "patch", "delete"])
                try:
                    if kind == "put":
                        found = client.put_document(LIBRARY, key, chunks=[{"text": "t", "embedding": [0, 1, 0]}])
                    elif kind == "patch":
                        found = client.update_document(LIBRARY, key, metadata={"n": self.rng.random()})
                    else:
                        found = client.get_document(LIBRARY, key)
                        client.delete_document(LIBRARY, found.id, if_match=found.version)
                except (NotFound, Conflict):
                    continue
                self.truth.add([Told("delete" if kind == "delete" else "put", found.id, found.version)])


class LongTransaction(Worker):
    """Holds a change back for a while, and nobody else's."""

    def __init__(self, database_url: str, seconds: float, truth: Truth) -> None:
        super().__init__("long transaction")
        self.database_url, self.seconds, self.truth = database_url, seconds, truth
        self.began = self.ended = 0.0

    def work(self) -> None:
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            with connection.transaction():
                connection.execute(SQL_PUT, [LIBRARY, "long", "{}"])
                row = connection.execute(ONE, [LIBRARY, "long"]).fetchone()
                self.began = time.monotonic()
                time.sleep(self.seconds)
                self.ended = time.monotonic()
            assert row
            self.truth.add([Told("put", *row)])


class Follower(Worker):
    """Reads over REST, forgets everything but its cursor now and then, and keeps a mirror."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__("follower")
        self.url, self.rng = url, random.Random(f"{seed} follower")
        self.seen: list[Told] = []
        self.seen_at: list[float] = []
        self.mirror: dict[str, tuple[str | None, int]] = {}
        self.restarts = 0

    def work(self) -> None:
        cursor, over = None, False
        while not over:
            with Client(self.url) as client:
                for change in client.changes(LIBRARY, after=cursor, follow=True, page_size=self.rng.choice([20, 100])):
                    assert change.document_id
                    cursor = change.cursor
                    self.seen.append(Told(change.kind, change.document_id, change.version))
                    self.seen_at.append(time.monotonic())
                    if change.kind == "delete":
                        del self.mirror[change.document_id]
                    else:
                        assert change.created is (change.document_id not in self.mirror)
                        self.mirror[change.document_id] = (change.key, change.version)
                    over = change.key == END
                    if over or self.rng.random() < 0.01:
                        break
            self.restarts += 1


class SqlFollower(Worker):
    """Reads by positions."""

    def __init__(self, database_url: str) -> None:
        super().__init__("SQL follower")
        self.database_url = database_url
        self.seen: list[Told] = []

    def work(self) -> None:
        position, over = None, False
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            while not over:
                read = "select position, kind, document_id::text, version, key from pgshelf.changes(%s, %s, 50)"
                for found, kind, document, version, key in connection.execute(read, [LIBRARY, position]):
                    assert found == (position or 0) + 1
                    position, over = found, key == END
                    self.seen.append(Told(kind, document, version))
                time.sleep(0.01)


def check_order(seen: list[Told]) -> None:
    """Each document's changes came in the order of their commits."""
    last: dict[str, Told] = {}
    for told in seen:
        before = last.get(told.document)
        if before is None:
            assert told.kind == "put" and told.version == 1, told
        elif told.kind == "delete":
            assert before == Told("put", told.document, told.version), (before, told)
        else:
            assert before.kind == "put" and told.version == before.version + 1, (before, told)
        last[told.document] = told


def follow(database_url: str, url: str, seed: int, seconds: float) -> str:
    """Write for some seconds, then compare what readers saw with what was committed; tells figures."""
    truth = Truth()
    with Client(url) as client:
        client.create_library(LIBRARY, embedder={"provider": "none"}, dimension=3)
        writers: list[Worker] = [SqlWriter(n, seed, database_url, truth) for n in range(SQL_WRITERS)]
        writers += [RestWriter(n, seed, url, truth) for n in range(REST_WRITERS)]
        follower, reader = Follower(url, seed), SqlFollower(database_url)
        long = LongTransaction(database_url, seconds / 2, truth)
        for each in (follower, reader, *writers, long):
            each.start()
        time.sleep(seconds)
        for each in (*writers, long):
            each.done()
        last = client.put_document(LIBRARY, END, chunks=[{"text": "t", "embedding": [0, 0, 1]}])
        truth.add([Told("put", last.id, last.version)])
        follower.done()
        reader.done()
        again = [Told(c.kind, c.document_id or "", c.version) for c in client.changes(LIBRARY, page_size=7)]
    seen = Counter(follower.seen)
    assert not truth.changes - seen, f"missed {truth.changes - seen}"
    assert not seen - truth.changes, f"repeated, or never committed {seen - truth.changes}"
    assert follower.seen == reader.seen == again, "something appeared behind a cursor that had passed"
    check_order(follower.seen)
    with psycopg.connect(database_url) as connection:
        rows = connection.execute("select d.id::text, d.key, d.version from pgshelf.documents d").fetchall()
    assert follower.mirror == {document: (key, version) for document, key, version in rows}
    arrived = list(zip(follower.seen_at, (truth.known_at[told] for told in follower.seen), strict=True))
    beside = [at - known for at, known in arrived if long.began < known and at < long.ended]
    assert len(beside) > 10, "a long transaction held up the others"
    lags = sorted(max(0.0, at - known) for at, known in arrived)
    by_kind: dict[str, int] = defaultdict(int)
    for told in follower.seen:
        by_kind[told.kind] += 1
    return (
        f"{len(follower.seen)} changes {dict(by_kind)} of {SQL_WRITERS + REST_WRITERS} writers, {truth.rolled_back} "
        f"transactions rolled back, {follower.restarts} restarts of the reader; lag in ms: median "
        f"{lags[len(lags) // 2] * 1000:.0f}, longest {lags[-1] * 1000:.0f}; "
        f"{len(beside)} seen while a transaction of {long.seconds:.1f} s was open"
    )
