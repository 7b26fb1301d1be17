"""The clients of a library: eight that search, two that write, in SQL and over REST, and what would be wrong.

Every vector is made from its chunk's text, so every hit can be checked by itself. A part of the library is never
written, so what an exact search must find at least is known at any moment; of the rest, whoever wrote it knows what it
is. Used by moves.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote
from zlib import crc32

import httpx2
import numpy as np
import psycopg
from numpy.typing import NDArray

from tests.shelving import literal
from tests.soak.crash import Service

LIBRARY = "moves"
ADDRESS = f"/v1/libraries/{LIBRARY}"
DIMENSION = 24
K = 10
SEARCHERS, WRITERS = 8, 2
KEYS = 12  # that a writer has in use
PAGES = 20
AWAY = ("57P01", "57P02", "57P03")  # PostgreSQL ends, has crashed, starts
State = tuple[int, tuple[str, ...]] | None  # a number in the metadata, the texts of the chunks; None: no document


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
        self.status, self.code = answer.status_code, None
        with contextlib.suppress(ValueError):
            self.code = answer.json().get("code")


Failure = psycopg.Error | httpx2.TransportError | Refused
FAILURES = (psycopg.Error, httpx2.TransportError, Refused)


SEARCHES = {
    mode: f"select chunk_id::text, key, ordinal, text, distance from pgshelf.{call}"
    for mode, call in {
        "vector": "search(%s, %s, filter => %s, exact => %s)",
        "hybrid": "search_hybrid(%s, %s, %s, filter => %s, exact => %s)",
        "text": "search_text(%s, %s)",
    }.items()
}


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
        given = dict[str, list[Any]](
            vector=[vector, condition, question.exact],
            hybrid=[question.query, vector, condition, question.exact],
            text=[question.query],
        )
        rows = self.sql(SEARCHES[question.mode], LIBRARY, *given[question.mode])
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

    of_service: bool  # or else of PostgreSQL
    begun: float
    ended: float = float("inf")


class Crowd:
    """The clients, each in a thread, what they were told, and what was wrong with it."""

    def __init__(self, service: Service, seed: int, statics: Statics) -> None:
        self.service, self.seed, self.statics = service, seed, statics
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
        lost = of_service = isinstance(error, httpx2.TransportError)
        if isinstance(error, psycopg.OperationalError):
            lost = error.sqlstate in (None, *AWAY)
        elif isinstance(error, Refused):
            lost = error.status == 503 and error.code in ("database_unavailable", "write_outcome_unknown")
        return lost and any(each.ended > begun and each.of_service == of_service for each in self.outages)

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
        if self.excuses(error, begun):
            self.counts["excused"] += 1
        else:
            self.faults.append(f"{doing}: {type(error).__name__} {error}")
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
    # where the connection is lost there is nothing to roll back, and psycopg lets the wish to do so through
    with contextlib.suppress(psycopg.Rollback), session.connection().transaction():
        session.put(key, [f"{key} {turn} given up"], {})
        raise psycopg.Rollback


def _of_chunk(session: Session, path: str, place: int, method: str, body: Any = None) -> None:
    chunk = session.ask("GET", f"{path}/chunks")["items"][place]["id"]
    session.ask(method, f"{ADDRESS}/chunks/{chunk}", body)
