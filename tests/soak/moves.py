"""Searches and writes of a library that moves between shelves and changes its index, with and without kills -9.

Eight clients search and two write, in SQL and over REST, while the library is promoted, given one index after the
other, and moved back. Every vector is made from its chunk's text, so every hit can be checked by itself; a part of the
library is never written, so what an exact search must find at least is known at any moment. Used by tests/test_moves.py
(some seconds, two kills) and `make soak` (twenty kills).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import quote
from zlib import crc32

import httpx2
import numpy as np
import psycopg
from numpy.typing import NDArray

from pgshelf import shelves
from pgshelf.settings import Settings
from tests.shelving import PACE, check_tidy, literal
from tests.soak.crash import Service, ended, service

LIBRARY = "moves"
ADDRESS = f"/v1/libraries/{LIBRARY}"
DIMENSION = 24
K = 10
SEARCHERS, WRITERS = 8, 2
KEYS = 12  # that a writer has in use
ROOM = 120  # chunks that the writers may have at most
PAGES = 20
PART, BATCH = 20, 10  # chunks of a document of ballast, documents of it in one transaction
ARRIVAL_SECONDS = 60.0  # within which a library is right, kills or not
TIDY_SECONDS = 120.0  # a shelf that was left is dropped a minute later
RECALL = 0.9  # of what an index finds; the figure that counts is benchmarks/filtered.py's
KINDS = ("service", "postmaster", "mover")
AWAY = ("57P01", "57P02", "57P03")  # PostgreSQL ends, has crashed, starts
State = tuple[int, tuple[str, ...]] | None  # a number in the metadata, the texts of the chunks; None: no document


@dataclass(frozen=True)
class Size:
    """How large the library is: chunks that stay, and ballast without which it is small enough for shelf 0."""

    static: int
    ballast: int

    @property
    def promote_at(self) -> int:
        return 4 * (self.static + ROOM)


SMALL = Size(400, 1700)
LARGE = Size(1000, 3600)


@dataclass(frozen=True)
class Step:
    """What is asked of the library, and the index that it has then."""

    name: str
    goal: dict[str, Any]
    index: dict[str, Any] | None = None
    ballast: bool | None = None


STEPS = (
    Step("promotion", {"type": "hnsw", "storage": "halfvec", "m": 16}, ballast=True),
    Step("ivfflat", {"type": "ivfflat"}, {"type": "ivfflat"}),
    Step("lsh", {"type": "lsh", "bits": 128}, {"type": "lsh", "bits": 128}),
    Step("bit", {"type": "hnsw", "storage": "bit"}, {"type": "hnsw", "storage": "bit"}),
    Step("vector", {"type": "hnsw", "storage": "vector", "m": 8}, {"type": "hnsw", "storage": "vector", "m": 8}),
    Step("flat", {"type": "flat"}, {"type": "flat"}),
    Step("auto", {"type": "hnsw", "storage": "halfvec", "m": 16}, {"type": "auto"}),
    Step("demotion", {"type": "flat"}, ballast=False),
)


@functools.cache
def vector_of(text: str) -> NDArray[np.float32]:
    """The vector of a text, whoever asks."""
    return np.random.default_rng(crc32(text.encode())).normal(size=DIMENSION).astype(np.float32)


def distances(vector: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine distances to rows."""
    wide, many = vector.astype(np.float64), others.astype(np.float64)
    return 1 - many @ wide / (np.linalg.norm(many, axis=1) * np.linalg.norm(wide))


class Hit(NamedTuple):
    chunk: str
    key: str
    ordinal: int
    text: str
    distance: float | None


class Statics:
    """The documents that nobody writes: four chunks each, and what filters say of them."""

    def __init__(self, count: int) -> None:
        numbers = np.arange(count)
        document = numbers // 4
        self.texts = [f"static{number} page{number % PAGES} of a book" for number in range(count)]
        self.vectors = np.array([vector_of(text) for text in self.texts])
        self.values = {
            "kind": np.zeros(count, int),
            "tenth": document % 10,
            "slice": document % (count // 16),  # 16 chunks each
            "year": 1900 + document % 100,
            "chunk.page": numbers % PAGES,
        }

    def document(self, number: int) -> tuple[str, list[str], dict[str, int], list[dict[str, int]]]:
        """Key, texts, metadata and metadata of the chunks of the document that begins with a chunk."""
        metadata = {name: int(self.values[name][number]) for name in ("kind", "tenth", "slice", "year")}
        pages = [{"page": int(page)} for page in self.values["chunk.page"][number : number + 4]]
        return f"static-{number // 4}", self.texts[number : number + 4], metadata, pages


class Question:
    """A search for a static chunk with its own vector, and what is wrong with an answer."""

    def __init__(self, statics: Statics, rng: random.Random) -> None:
        self.statics = statics
        self.number = rng.randrange(len(statics.texts))
        self.text = statics.texts[self.number]
        self.vector = vector_of(self.text)
        self.mode = rng.choices(("vector", "hybrid", "text"), (8, 1, 1))[0]
        self.exact = rng.random() < 0.4
        self.filter, self.matching = self._filter(None if self.mode == "text" else rng.choice([None, *statics.values]))
        self.query = self.text.split()[0 if self.mode == "hybrid" else 1]

    def _filter(self, name: str | None) -> tuple[dict[str, Any] | None, NDArray[np.bool_]]:
        if name is None:
            return None, np.ones(len(self.statics.texts), bool)
        values, mine = self.statics.values[name], int(self.statics.values[name][self.number])
        if name == "year":  # a range over an attribute: half of the years, or nearly
            mine, step = mine // 50 * 50, 49
            return {name: {"$gte": mine, "$lte": mine + step}}, (values >= mine) & (values <= mine + step)
        return {name: mine}, values == mine

    def fault(self, hits: list[Hit]) -> str | None:
        """What is lost, doubled or wrong."""
        if len(hits) != K:
            return f"{len(hits)} hits"
        if len({hit.chunk for hit in hits}) < K or len({(hit.key, hit.ordinal) for hit in hits}) < K:
            return "a chunk came twice"
        if len({hit.key for hit in hits}) < len({(hit.key, _version(hit)) for hit in hits}):
            return "two versions of one document"
        if self.mode == "text":
            return None if all(self.query in hit.text.split() for hit in hits) else "a hit without the word"
        if hits[0].text != self.text or (hits[0].distance or 0) > 1e-6:
            return "it did not find itself first"
        true = distances(self.vector, np.array([vector_of(hit.text) for hit in hits]))
        given = np.array([hit.distance for hit in hits], float)
        if not np.allclose(true[~np.isnan(given)], given[~np.isnan(given)], atol=1e-5):
            return "a distance that is not its vector's"
        if self.mode == "vector" and (np.diff(given) < 0).any():
            return "not in the order of their distances"
        lost = self.nearer(hits) - {hit.text for hit in hits} if self.mode == "vector" and self.exact else None
        return f"lost {lost}" if lost else None

    def nearer(self, hits: list[Hit]) -> set[str]:
        """The static chunks that must be among them, were the search exact."""
        away = distances(self.vector, self.statics.vectors)
        bound = (hits[-1].distance or 0) - 1e-5
        return {self.statics.texts[place] for place in np.flatnonzero(self.matching & (away < bound))}

    def __str__(self) -> str:
        exactly = "exact " if self.exact else ""
        return f"{exactly}{self.mode} search for {self.text!r}, filter {self.filter}"


def _version(hit: Hit) -> str:
    """The writing of its document that a written chunk is from."""
    return hit.text.split()[1] if hit.key.startswith("written") else ""


class Refused(Exception):
    """An answer other than 2xx."""

    def __init__(self, answer: httpx2.Response) -> None:
        super().__init__(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}")
        self.status = answer.status_code
        with contextlib.suppress(ValueError):
            self.code = answer.json().get("code")


Failure = psycopg.Error | httpx2.TransportError | Refused
FAILURES = (psycopg.Error, httpx2.TransportError, Refused)


class Session:
    """One client, in SQL and over REST; a connection that was lost is opened again."""

    def __init__(self, service: Service) -> None:
        self.url = service.database.url()
        self.rest = httpx2.Client(base_url=service.url, timeout=90)
        self.db: psycopg.Connection[Any] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest.close()
        if self.db:
            self.db.close()

    def connection(self) -> psycopg.Connection[Any]:
        if self.db is None or self.db.closed:
            self.db = psycopg.connect(self.url, autocommit=True, connect_timeout=10)
        return self.db

    def sql(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        cursor = self.connection().execute(statement.encode(), parameters)
        return cursor.fetchall() if cursor.description else []

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.rest.request(method, path, json=body)
        if not answer.is_success:
            raise Refused(answer)
        return answer.json() if answer.content else None

    def search(self, question: Question, over_rest: bool) -> list[Hit]:
        find = self._rest_search if over_rest else self._sql_search
        return find(question)

    def _rest_search(self, question: Question) -> list[Hit]:
        body: dict[str, Any] = {"mode": question.mode, "k": K, "exact": question.exact, "filter": question.filter}
        if question.mode != "text":
            body["vector"] = question.vector.tolist()
        if question.mode != "vector":
            body["query"] = question.query
        hits = self.ask("POST", f"{ADDRESS}/search", body)["hits"]
        return [Hit(hit["chunk_id"], hit["key"], hit["ordinal"], hit["text"], hit["distance"]) for hit in hits]

    def _sql_search(self, question: Question) -> list[Hit]:
        vector, condition = literal(question.vector), json.dumps(question.filter) if question.filter else None
        call, parameters = {
            "vector": ("search(%s, %s, filter => %s, exact => %s)", [vector, condition, question.exact]),
            "hybrid": (
                "search_hybrid(%s, %s, %s, filter => %s, exact => %s)",
                [question.query, vector, condition, question.exact],
            ),
            "text": ("search_text(%s, %s)", [question.query]),
        }[question.mode]
        rows = self.sql(
            f"select chunk_id::text, key, ordinal, text, distance from pgshelf.{call}", LIBRARY, *parameters
        )
        return [Hit(*row) for row in rows]

    def put(self, key: str, texts: Sequence[str], metadata: dict[str, int], pages: Any = None) -> None:
        self.sql(
            "select pgshelf.put_document(%s, %s, texts => %s, embeddings => %s::text[]::vector[], metadata => %s,"
            " chunk_metadata => %s::jsonb[])",
            LIBRARY,
            key,
            list(texts),
            [literal(vector_of(text)) for text in texts],
            json.dumps(metadata),
            None if pages is None else [json.dumps(page) for page in pages],
        )


@dataclass
class History:
    """What was tried with one document, in order; `certain` is the place of the last attempt that was answered."""

    attempts: list[State] = field(default_factory=lambda: [None])
    certain: int = 0

    @property
    def state(self) -> State:
        return self.attempts[self.certain]

    @property
    def possible(self) -> list[State]:
        return self.attempts[self.certain :]

    def settle(self, state: State) -> None:
        self.attempts, self.certain = [state], 0


@dataclass
class Outage:
    """From a kill to the moment when everything answers again."""

    database: bool  # was it killed, too
    begun: float
    ended: float = float("inf")


class Crowd:
    """The clients, each in a thread, what they were told, and what was wrong with it."""

    def __init__(self, service: Service, seed: int, size: Size) -> None:
        self.service, self.seed, self.size = service, seed, size
        self.statics = Statics(size.static)
        self.histories: dict[str, History] = {}
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.recalls: list[float] = []
        self.outages: list[Outage] = []
        self._stopped = threading.Event()
        self._turns = [threading.Lock() for _ in range(WRITERS)]
        work = [functools.partial(self._searcher, number) for number in range(SEARCHERS)]
        work += [functools.partial(self._writer, number) for number in range(WRITERS)]
        self._threads = [threading.Thread(target=self._guard, args=(each,)) for each in work]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def excuses(self, error: Failure, begun: float) -> bool:
        """Whether a kill explains it: a connection that broke, or a database that is away."""
        if isinstance(error, psycopg.Error):
            lost = isinstance(error, psycopg.OperationalError) and error.sqlstate in (None, *AWAY)
        elif isinstance(error, Refused):
            lost = error.status == 503 and error.code == "database_unavailable"
        else:
            lost = True
        of_database = not isinstance(error, httpx2.TransportError)
        return lost and any(each.ended > begun and (each.database or not of_database) for each in self.outages)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """No writer writes while the block runs."""
        with ExitStack() as stack:
            for turn in self._turns:
                stack.enter_context(turn)
            yield

    def check(self) -> None:
        """Raise what a client found wrong."""
        assert not self.faults, f"seed {self.seed}: {self.faults[:5]}"

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.faults.append(f"{traceback.format_exc()} {error!r}")

    def _failed(self, doing: str, error: Failure, begun: float) -> None:
        if not self.excuses(error, begun):
            self.faults.append(f"{doing}: {type(error).__name__} {error}")
        self.counts["excused"] += 1
        time.sleep(0.05)

    # -- searching

    def _searcher(self, number: int) -> None:
        rng = random.Random(f"{self.seed} searcher {number}")
        with Session(self.service) as session:
            while not self._stopped.wait(rng.uniform(0, 0.02)):
                self._search(session, Question(self.statics, rng), over_rest=number % 2 == 1)

    def _search(self, session: Session, question: Question, over_rest: bool) -> None:
        begun = time.monotonic()
        try:
            hits = session.search(question, over_rest)
        except FAILURES as error:
            self._failed(str(question), error, begun)
            return
        if fault := question.fault(hits):
            self.faults.append(f"{question}: {fault}: {[(hit.text, hit.distance) for hit in hits]}")
        elif question.mode == "vector" and not question.exact and (nearer := question.nearer(hits)):
            self.recalls.append(len(nearer & {hit.text for hit in hits}) / len(nearer))
        self.counts["searches"] += 1

    # -- writing

    def _writer(self, number: int) -> None:
        rng, names = (
            random.Random(f"{self.seed} writer {number}"),
            map(f"written{number}-{{}}".format, itertools.count()),
        )
        with Session(self.service) as session:
            while not self._stopped.wait(rng.uniform(0, 0.02)):
                with self._turns[number]:
                    self._write(session, self._key(number, names, rng), rng)

    def _key(self, number: int, names: Iterator[str], rng: random.Random) -> str:
        """A document of this writer's. What was not answered is left alone until it was looked at."""
        mine = [key for key in list(self.histories) if key.startswith(f"written{number}-")]
        certain = [key for key in mine if len(self.histories[key].possible) == 1]
        if len(certain) >= KEYS:
            return rng.choice(certain)
        key = next(names)
        self.histories[key] = History()
        return key

    def _write(self, session: Session, key: str, rng: random.Random) -> None:
        history, begun = self.histories[key], time.monotonic()
        self.counts["turns"] += 1
        state, act = self._change(session, key, history.state, f"v{self.counts['turns']}", rng)
        history.attempts.append(state)
        try:
            act()
        except FAILURES as error:
            self._failed(f"write {key}: {state}", error, begun)
            return
        history.settle(state)
        self.counts["writes"] += 1
        self._look(session, key, state, rng)

    def _change(
        self, session: Session, key: str, old: State, turn: str, rng: random.Random
    ) -> tuple[State, Callable[[], Any]]:
        """A change of a document: its state afterwards, and what brings it about."""
        number, path = rng.randrange(1000), f"{ADDRESS}/documents/{quote(key)}"
        kind = rng.choices(("put", "patch", "chunk", "unchunk", "delete", "rollback"), (5, 2, 2, 1, 2, 1))[0]
        over_rest = rng.random() < 0.5
        if old is None or kind == "put" or (not old[1] and kind in ("chunk", "unchunk")):
            state = number, tuple(f"{key} {turn} c{place}" for place in range(rng.randint(1, 4)))
            if over_rest:
                return state, lambda: session.ask("PUT", path, _document(state))
            return state, lambda: session.put(key, state[1], {"n": number})
        if kind == "rollback":
            return old, lambda: _give_up(session, key, turn)
        if kind == "delete":
            if over_rest:
                return None, lambda: session.ask("DELETE", path)
            return None, lambda: session.sql("select pgshelf.delete_document(%s, %s)", LIBRARY, key)
        if kind == "patch":
            return (number, old[1]), lambda: session.ask("PATCH", path, {"metadata": {"n": number}})
        place = rng.randrange(len(old[1]))
        before, behind = old[1][:place], old[1][place + 1 :]
        if kind == "unchunk":
            return (old[0], before + behind), lambda: _of_chunk(session, path, place, "DELETE")
        text = f"{key} {old[1][place].split()[1]} changed in {turn}"
        body = {"text": text, "embedding": vector_of(text).tolist()}
        return (old[0], (*before, text, *behind)), lambda: _of_chunk(session, path, place, "PATCH", body)

    def _look(self, session: Session, key: str, state: State, rng: random.Random) -> None:
        """Who was told that it is written finds it, and nothing else under its key."""
        texts = state[1] if state else ()
        target, begun = vector_of(texts[-1] if texts else key), time.monotonic()
        exact = rng.random() < 0.5
        find = "select s.text from pgshelf.search(%s, %s, filter => %s, exact => %s) s"
        try:
            mine = session.sql(find, LIBRARY, literal(target), json.dumps({"$key": key}), exact)
            first = session.sql(find, LIBRARY, literal(target), None, exact)[:1]
        except FAILURES as error:
            self._failed(f"look for {key}", error, begun)
            return
        if sorted(text for (text,) in mine) != sorted(texts) or (texts and first != [(texts[-1],)]):
            self.faults.append(f"{key} is {texts}, but {'exactly ' * exact}found: {mine}, of all first {first}")


def _document(state: tuple[int, tuple[str, ...]]) -> dict[str, Any]:
    chunks = [{"text": text, "embedding": vector_of(text).tolist()} for text in state[1]]
    return {"metadata": {"n": state[0]}, "chunks": chunks}


def _give_up(session: Session, key: str, turn: str) -> None:
    with session.connection().transaction():
        session.put(key, [f"{key} {turn} given up"], {})
        raise psycopg.Rollback


def _of_chunk(session: Session, path: str, place: int, method: str, body: Any = None) -> None:
    chunk = session.ask("GET", f"{path}/chunks")["items"][place]["id"]
    session.ask(method, f"{ADDRESS}/chunks/{chunk}", body)


FOUND = """
select d.key, (d.metadata ->> 'n')::int, coalesce(c.texts, '{}'), c.count, c.ids from pgshelf.documents_view d
cross join lateral (select array_agg(c.text order by c.ordinal) as texts, count(*), count(distinct c.id) as ids
  from pgshelf.chunks_view c where c.document_id = d.id) c
where d.library = %s
"""
# What a dead mover, or a build that died, leaves; a shelf that was left in good order may stay for a while.
LEFT = """
select (select array_agg(s.shelf) from pgshelf.lost_shelves('1 hour') s),
  (select array_agg(i) from pgshelf.lost_indexes() i),
  (select count(*) from pgshelf.chunks_s0 c join pgshelf.libraries l on l.id = c.library_id where l.shelf <> 0),
  (select count(*) from pgshelf.move_log),
  (select array_agg(c.relname) from pg_index i join pg_class c on c.oid = i.indexrelid, pgshelf.libraries l
    where i.indrelid = to_regclass('pgshelf.chunks_s' || l.shelf) and not i.indisvalid)
"""
STATUS = """
select shelf, moving, index_state, index_actual, index_error, index_attempts from pgshelf.libraries where name = %s
"""


class Moves:
    """The library that moves, and whoever moves and kills."""

    def __init__(self, service: Service, session: Session, seed: int, size: Size) -> None:
        self.service, self.session, self.size, self.seed = service, session, size, seed
        self.rng = random.Random(seed)
        self.crowd = Crowd(service, seed, size)
        self._steps = itertools.cycle(STEPS)
        self.took: dict[str, float] = {}  # seconds of each step
        self.kills: Counter[str] = Counter()
        self.recoveries: list[float] = []  # seconds from a kill to a library that is right
        self.ballast = False

    def start(self) -> None:
        """Make the library, and fill in what stays."""
        self._recover()
        self.session.ask("POST", "/v1/libraries", {
            "name": LIBRARY, "dimension": DIMENSION, "embedder": {"provider": "none"}, "attributes": {"year": "number"},
        })  # fmt: skip
        with self.session.connection().transaction():
            for number in range(0, self.size.static, 4):
                self.session.put(*self.crowd.statics.document(number))

    def walk(self) -> None:
        """Take every step without a kill."""
        for step in STEPS:
            self.take(step)
            print(f"  {step.name:<10} {self.took[step.name]:5.1f} s", flush=True)

    def take(self, step: Step) -> None:
        """Ask for a step, wait until it is done and nothing of the way there is left, and check everything."""
        begun = time.monotonic()
        if step.ballast is not None:
            (self._load if step.ballast else self._unload)()
        if step.index is not None:
            self._insist(lambda: self.session.ask("PUT", f"{ADDRESS}/index", step.index))
        self._until(lambda: self._arrived(step), ARRIVAL_SECONDS)
        self.took[step.name] = time.monotonic() - begun
        self._until(self._clean, ARRIVAL_SECONDS)
        self.check()

    def kill_once(self, kind: str) -> None:
        """Go on taking steps until one was cut off by a kill of this kind."""
        while True:
            step = next(self._steps)
            begun = time.monotonic()
            if doing := self.take_killing(step, kind):
                print(
                    f"{self.kills.total():3} {kind:<10} {step.name:<10} {doing}: {time.monotonic() - begun:.1f} s",
                    flush=True,
                )
                return

    def take_killing(self, step: Step, kind: str) -> str | None:
        """Take a step with a kill at a random moment of it; tells what was under way, None if nothing was."""
        seen: list[str] = []
        killer = threading.Thread(target=self._killer, args=(step, kind, self.rng.random(), seen))
        usual = self.took[step.name]
        killer.start()
        try:
            self.take(step)
        finally:
            killer.join()
        self.took[step.name] = usual
        if not seen:
            return None
        self.kills[kind] += 1
        self.recoveries.append(time.monotonic() - self.crowd.outages[-1].begun)
        return seen[0]

    def check(self) -> None:
        """What was answered is there once, in the tables and in searches."""
        with self.crowd.quiet():
            self._until(self._unanswered_is_over, ARRIVAL_SECONDS)
            truth = self._stored()
            self._searched(truth)
        self.crowd.check()

    def finish(self, *, patient: bool) -> None:
        """Nothing is left over in the end: by itself after a minute (patient), or because the grace is taken away."""
        settings = Settings(database_url=self.service.database.url(), promote_at=self.size.promote_at)
        deadline = time.monotonic() + TIDY_SECONDS
        while True:
            if not patient:
                asyncio.run(shelves.reconcile_all_async(settings, PACE))
            try:
                return check_tidy(self.session.connection())
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def figures(self) -> str:
        counts, recalls = self.crowd.counts, self.crowd.recalls
        lines = [
            f"{counts['searches']} searches and {counts['writes']} writes, none wrong; mean recall of what the indexes "
            f"found {np.mean(recalls):.4f}; {counts['excused']} requests were cut off by a kill"
        ]
        if self.recoveries:
            usual, slowest = float(np.median(self.recoveries)), max(self.recoveries)
            lines.append(
                f"right again after {usual:.1f} s (median), {slowest:.1f} s at most; kills: {dict(self.kills)}"
            )
        return "\n".join(lines)

    # -- what is asked for

    def _load(self) -> None:
        for first in range(0, self.size.ballast, PART * BATCH):
            self._insist(functools.partial(self._load_part, first))
        self.ballast = True

    def _load_part(self, first: int) -> None:
        with self.session.connection().transaction():
            for number in range(first, min(first + PART * BATCH, self.size.ballast), PART):
                self.session.put(f"ballast-{number}", _ballast(number), {"kind": 1})

    def _unload(self) -> None:
        self._insist(lambda: self.session.ask("POST", f"{ADDRESS}/documents/delete", {"filter": {"kind": 1}}))
        self.ballast = False

    def _insist(self, act: Callable[[], Any]) -> None:
        """Do what may be done twice, again where a kill kept it from being answered."""
        while True:
            begun = time.monotonic()
            try:
                return act()
            except FAILURES as error:
                if not self.crowd.excuses(error, begun):
                    raise
            time.sleep(0.1)

    # -- what becomes of it

    def _until(self, reached: Callable[[], str | None], seconds: float) -> None:
        """Wait until there is nothing to complain of; a database that was killed is no complaint."""
        deadline, complaint = time.monotonic() + seconds, "nothing was seen"
        while True:
            begun = time.monotonic()
            try:
                found = reached()
                if found is None:
                    return
                complaint = found
            except FAILURES as error:
                if not self.crowd.excuses(error, begun):
                    raise
            self.crowd.check()
            assert time.monotonic() < deadline, f"seed {self.seed}: {complaint}\n{self.service.output[-3000:]}"
            time.sleep(0.03)

    def _arrived(self, step: Step) -> str | None:
        [(shelf, moving, state, actual, *rest)] = self.session.sql(STATUS, LIBRARY)
        there = (shelf == 0) == (step.ballast is False) and moving == 0 and state == "ready"
        if there and actual.items() >= step.goal.items():
            return None
        return f"{step.name}: on shelf {shelf}, moving {moving}, {state}, {actual}, {rest}"

    def _clean(self) -> str | None:
        [left] = self.session.sql(LEFT)
        return f"left over: {left}" if any(left) else None

    def _unanswered_is_over(self) -> str | None:
        """What a killed service had begun may go on in the database, but not for ever."""
        if not self.crowd.outages:
            return None
        since = self.crowd.outages[-1].begun - time.monotonic() + time.time()
        going = self.session.sql(
            "select query from pg_stat_activity where application_name = 'pgshelf serve' and state = 'active'"
            " and query_start < %s",
            datetime.fromtimestamp(since, UTC),
        )
        return f"still under way: {going}" if going else None

    def _stored(self) -> list[str]:
        """Every document is in the state that was answered; tells the texts of all chunks."""
        found = {
            key: (number, tuple(texts), count, ids) for key, number, texts, count, ids in self._rows(FOUND, LIBRARY)
        }
        expected: dict[str, list[State]] = {key: each.possible for key, each in self.crowd.histories.items()}
        for number in range(0, self.size.static, 4):
            key, texts, *_ = self.crowd.statics.document(number)
            expected[key] = [(-1, tuple(texts))]
        for number in range(0, self.size.ballast if self.ballast else 0, PART):
            expected[f"ballast-{number}"] = [(-1, tuple(_ballast(number)))]
        assert found.keys() <= expected.keys(), sorted(found.keys() - expected.keys())
        for key, possible in expected.items():
            row = found.get(key)
            state = (-1 if row[0] is None else row[0], row[1]) if row else None
            assert state in possible, f"seed {self.seed}: {key} is {state}, it may be one of {possible}"
            assert row is None or row[2] == row[3] == len(row[1]), f"{key} has {row}"
            if key in self.crowd.histories:
                self.crowd.histories[key].settle(state)
        texts = [text for row in found.values() for text in row[1]]
        [counts] = self._rows(
            "select documents, chunks, pending from pgshelf.libraries_overview where name = %s", LIBRARY
        )
        assert counts == (len(found), len(texts), 0), f"{counts} are counted, {len(found)}, {len(texts)} are there"
        self._forget_gone()
        return texts

    def _forget_gone(self) -> None:
        for key in [key for key, each in self.crowd.histories.items() if each.state is None]:
            del self.crowd.histories[key]

    def _searched(self, texts: list[str]) -> None:
        """An exact search finds what is nearest of all that is there, an index nearly always."""
        every, recalls = np.array([vector_of(text) for text in texts]), list[float]()
        for text in self.rng.sample(texts, 20):
            away = distances(vector_of(text), every)
            nearest = np.sort(away)[:K]
            for exact in (True, False):
                find = "select text, distance from pgshelf.search(%s, %s, exact => %s)"
                found = self._rows(find, LIBRARY, literal(vector_of(text)), exact)
                assert len({hit[0] for hit in found}) == K and found[0][0] == text, f"{text}: {found}"
                given = np.array([hit[1] for hit in found])
                if exact:
                    np.testing.assert_allclose(given, nearest, atol=1e-5)
                else:
                    recalls.append(float(np.mean(given <= nearest[-1] + 1e-5)))
        assert np.mean(recalls) >= RECALL or print(recalls) or True, f"seed {self.seed}: recalls {recalls}"

    def _rows(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return self.session.sql(statement, *parameters)

    # -- kills

    def _killer(self, step: Step, kind: str, moment: float, seen: list[str]) -> None:
        """Kill when a share of the usual time of the step is over, unless it is done; wait until all serves again."""
        deadline = time.monotonic() + ARRIVAL_SECONDS
        with Session(self.service) as session:
            while not _under_way(session):
                if self._arrived_for(session, step) or time.monotonic() > deadline:
                    return
                time.sleep(0.005)
            time.sleep(moment * self.took[step.name])
            if doing := _under_way(session):
                seen.append(doing)
                self._kill(kind, session)
                self._recover()
                self.crowd.outages[-1].ended = time.monotonic()

    def _arrived_for(self, session: Session, step: Step) -> bool:
        [(_, _, state, actual, *_)] = session.sql(STATUS, LIBRARY)
        return state == "ready" and actual.items() >= step.goal.items()

    def _kill(self, kind: str, session: Session) -> None:
        movers = session.sql(
            "select pid from pg_stat_activity where application_name = 'pgshelf shelves' order by state"
        )
        self.crowd.outages.append(Outage(kind != "service", time.monotonic()))
        if kind == "service":
            workers = self.service.workers()
            os.killpg(self.service.process.pid, signal.SIGKILL)
            assert ended(workers, 2), f"workers outlive their group: {workers}"
        elif kind == "postmaster":
            assert self.service.database.pid
            os.kill(self.service.database.pid, signal.SIGKILL)
        else:  # a session of PostgreSQL that moves or builds; PostgreSQL then throws out all others
            os.kill(movers[0][0], signal.SIGKILL)

    def _recover(self) -> None:
        """Wait until it serves again; that takes no help but a start of what has ended."""
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while True:
            self.service.keep_up()
            with contextlib.suppress(httpx2.TransportError):
                if self.session_ready():
                    return
            assert time.monotonic() < deadline, self.service.output[-5000:]
            time.sleep(0.05)

    def session_ready(self) -> bool:
        with httpx2.Client(base_url=self.service.url, timeout=10) as client:
            return client.get("/ready").status_code == 200


@contextlib.contextmanager
def moving(version: int, seed: int, size: Size) -> Iterator[Moves]:
    """A service, the library and its clients; in the end all that they said is true."""
    settings = {"promote_at": str(size.promote_at), "worker_interval": "0.1", "worker_lease": "60"}
    with service(version, **settings) as target, Session(target) as session:
        moves = Moves(target, session, seed, size)
        moves.start()
        with moves.crowd:
            yield moves
        moves.crowd.check()


def _ballast(number: int) -> list[str]:
    return [f"ballast {number + place}" for place in range(PART)]


def _under_way(session: Session) -> str | None:
    """What is being done for the library, None at rest."""
    [(moving, state, progress, phase)] = session.sql(
        "select l.moving, l.index_state, i.progress, i.phase from pgshelf.libraries l, pgshelf.library_index(l.id) i"
        " where l.name = %s",
        LIBRARY,
    )
    return f"moving {moving}, {progress:.2f} {phase}" if moving or state != "ready" else None
