"""The query cache: answers of searches, in this process, each as good as the state of the libraries it was found in.

A search tells in its own statement, hence in its own snapshot, which state its libraries are in (pgshelf.search_state).
Its answer is kept under that state, and given again only while PostgreSQL says that the libraries are in it still.
A request that says byte for byte what another has said gets that one's answer as it was sent, without being read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import msgspec
import psycopg
import sqlalchemy
from litestar.enums import ScopeType
from prometheus_client import Counter, Gauge
from sqlalchemy.pool import Pool

from pgshelf import access, connections, consistency, database, questions
from pgshelf.errors import Problem
from pgshelf.settings import Settings
from pgshelf.timing import note, stage

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Receive, Send

LOOKUPS = Counter("pgshelf_query_cache_lookups", "Searches that the query cache was asked for.", ["outcome"])
EVICTIONS = Counter("pgshelf_query_cache_evictions", "Answers that left the query cache.", ["reason"])
ENTRIES = Gauge("pgshelf_query_cache_entries", "Answers in the query cache.", multiprocess_mode="livesum")
BYTES = Gauge("pgshelf_query_cache_bytes", "Size of the query cache.", multiprocess_mode="livesum")

OVERHEAD = 512  # bytes of an entry beside its answer
NAMED = 160  # bytes that a library takes in an entry
LARGEST = 8  # an answer of more than this part of the cache is not kept: it would drive out too many
SHORT = 65_536  # bytes of a request that is known again as it stands
SEARCHES = {"search", "searchLibraries"}  # operations that are answered with one search
# What decides an answer beside path and body. `no-cache`, and answers in MessagePack, are left to the handlers.
DECIDING = (b"content-type", b"accept", consistency.LEVEL.lower().encode(), consistency.TOKEN.lower().encode())
JOIN_EVERY = 5.0  # seconds
States = list[int | None]
# The request that is being answered, as it stands: a digest; None where it will not be known again.
_said: ContextVar[bytes | None] = ContextVar("said", default=None)
_joined: WeakKeyDictionary[Pool, float] = WeakKeyDictionary()


class Answer(Protocol):
    """What a search answers: `hits` and `took_ms` are the first two of its fields."""

    hits: list[Any]
    took_ms: float
    cached: bool


T = TypeVar("T", bound=Answer)


class Entry(NamedTuple):
    """An answer as JSON, split where its took_ms belongs, the libraries as the request named them, and their states."""

    libraries: tuple[str, ...]
    states: States
    until: float
    head: bytes
    tail: bytes
    said: bytes | None  # the request as it stood

    @property
    def size(self) -> int:
        """Bytes, with about those of the names and states of its libraries."""
        return len(self.head) + len(self.tail) + NAMED * len(self.libraries)


class QueryCache:
    """The answers that this process keeps: least recently used go first, none stays longer than PGSHELF_CACHE_TTL."""

    def __init__(self, settings: Settings, url: str, opening: connections.Opening = contextlib.nullcontext) -> None:
        self.limit, self.ttl = settings.cache_bytes, settings.cache_ttl
        self.bytes = 0
        self._beside = questions.Beside(settings, url, "cache", opening)
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._keys: dict[bytes, bytes] = {}  # of entries, by the requests as they stood

    async def close(self) -> None:
        """Give back what it holds."""
        await self._beside.close()

    async def answer(
        self,
        libraries: Sequence[str],
        request: msgspec.Struct,
        control: str | None,
        find: Callable[[], Awaitable[tuple[T, States | None]]],
        kind: type[T],
    ) -> T:
        """The answer to a request: a kept one, or what `find` finds, together with the states that it found it in.

        `control` is the Cache-Control of the request: `no-cache` asks for a new answer, `no-store` keeps none either.
        """
        wishes = {wish.strip().lower() for wish in (control or "").split(",")}
        key = None if "no-store" in wishes else self.key(libraries, request)
        if key is not None and "no-cache" not in wishes:
            with stage("cache"):
                entry = await self._current(key)
            LOOKUPS.labels("miss" if entry is None else "hit").inc()
            if entry is not None:
                note(strategy="cached")
                return msgspec.json.decode(b"%s0%s" % (entry.head, entry.tail), type=kind)
        answer, states = await find()
        if key is not None and states is not None and None not in states:
            entry = Entry(tuple(libraries), states, time.monotonic() + self.ttl, *_split(answer), _said.get())
            self._keep(key, entry)
        return answer

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Behind the guard: answers a search again that comes as it came before."""

        async def known(scope: Any, receive: Receive, send: Send) -> None:
            started = time.perf_counter()
            searches = scope["type"] == ScopeType.HTTP and scope["route_handler"].operation_id in SEARCHES
            if not searches or not self.limit:
                await app(scope, receive, send)
                return
            first: Any = await receive()
            said = _as_it_stands(scope, first)
            if said is not None and (key := self._keys.get(said)) is not None:
                with stage("cache"):
                    entry = await self._current(key)
                if entry is not None:  # else the handler will come upon it
                    LOOKUPS.labels("hit").inc()
                    note(strategy="cached")
                    took = round((time.perf_counter() - started) * 1000, 3)
                    await _send(send, b"%s%r%s" % (entry.head, took, entry.tail))
                    return

            async def again() -> Any:
                nonlocal first
                if first is None:
                    return await receive()
                message, first = first, None
                return message

            token = _said.set(said)
            try:
                await app(scope, again, send)
            finally:
                _said.reset(token)

        return known

    def key(self, libraries: Sequence[str], request: msgspec.Struct) -> bytes | None:
        """A digest of all that a caller says of a search; None where nothing is kept. Who calls decides nothing:
        whether he may see the libraries was judged before, and in them everybody finds the same."""
        if not self.limit:
            return None
        try:
            # MessagePack, for it tells NaN from null
            said = msgspec.msgpack.encode((type(request).__name__, libraries, request))
        except OverflowError:  # a filter with an integer of more than 64 bits
            return None
        return hashlib.blake2b(said, digest_size=32).digest()

    async def _current(self, key: bytes) -> Entry | None:
        """What is kept under a key, if it is good still."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.until < time.monotonic():
            self._drop(key, "expired")
            return None
        states = await self._states(entry.libraries)
        if states != entry.states:
            # while this one asked, another may have found a new answer
            if states is not None and self._entries.get(key) is entry:
                self._drop(key, "changed")
            return None
        if key in self._entries:
            self._entries.move_to_end(key)
        return entry

    async def _states(self, libraries: Sequence[str]) -> States | None:
        """The states that libraries are in now; None where one is gone, or the database does not say."""
        asked = ", ".join(f"pgshelf.search_state(${place})" for place in range(1, len(libraries) + 1))
        try:
            return list((await self._beside.ask(f"select {asked}", *libraries))[0])
        except (psycopg.Error, Problem):  # the search itself will tell
            return None

    def _keep(self, key: bytes, entry: Entry) -> None:
        if entry.size > self.limit // LARGEST:
            return
        if key in self._entries:
            self._drop(key, "replaced")
        self._entries[key] = entry
        if entry.said is not None:
            self._keys[entry.said] = key
        self._count(entry, 1)
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)), "size")

    def _drop(self, key: bytes, reason: str) -> None:
        entry = self._entries.pop(key)
        if entry.said is not None:
            self._keys.pop(entry.said, None)
        self._count(entry, -1)
        EVICTIONS.labels(reason).inc()

    def _count(self, entry: Entry, sign: int) -> None:
        size = sign * (entry.size + OVERHEAD)
        self.bytes += size
        BYTES.inc(size)
        ENTRIES.inc(sign)

    def clear(self, library: str | None = None) -> None:
        """Give back the memory of what is kept of a library, as requests named it, or of all."""
        for key in [key for key, entry in self._entries.items() if library is None or library in entry.libraries]:
            self._drop(key, "cleared")


def _split(answer: Any) -> tuple[bytes, bytes]:
    """An answer that was kept, as JSON, before and behind its took_ms."""
    rest = msgspec.json.encode(msgspec.structs.replace(answer, hits=[], took_ms=0, cached=True))
    begin, end = b'{"hits":', b',"took_ms":'
    return begin + msgspec.json.encode(answer.hits) + end, rest.removeprefix(begin + b"[]" + end + b"0")


def _as_it_stands(scope: Any, message: Any) -> bytes | None:
    """A digest of all of a request that decides its answer; None where more of it is to come, or to be read."""
    body = message.get("body", b"")
    if message["type"] != "http.request" or message.get("more_body") or not 0 < len(body) <= SHORT:
        return None
    headers = dict(scope["headers"])
    if b"cache-control" in headers or b"msgpack" in headers.get(b"accept", b""):
        return None
    told = [scope["route_handler"].operation_id, scope["query_string"]]
    told += [scope["path_params"].get("library"), access.judged(scope)]
    told += [headers.get(name) for name in DECIDING]
    return hashlib.blake2b(msgspec.msgpack.encode([*told, body]), digest_size=32).digest()


async def _send(send: Send, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def join_marks(engine: sqlalchemy.Engine, _: Settings) -> bool:
    """A step of the worker: keep it cheap to tell the state of a library that is written often."""
    now = time.monotonic()
    if now >= _joined.get(engine.pool, 0.0):
        await database.run(engine, "select pgshelf.join_marks()")
        _joined[engine.pool] = now + JOIN_EVERY
    return False
