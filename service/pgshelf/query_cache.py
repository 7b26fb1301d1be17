"""The query cache: answers of searches, in this process, each as good as the state of the libraries it was found in.

A search tells in its own statement, hence in its own snapshot, which state its libraries are in (pgshelf.search_state).
Its answer is kept under that state, and given again only while PostgreSQL says that the libraries are in it still.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import msgspec
import psycopg
from prometheus_client import Counter, Gauge
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool

from pgshelf import connections, database
from pgshelf.errors import Problem
from pgshelf.settings import Settings
from pgshelf.timing import stage

LOOKUPS = Counter("pgshelf_query_cache_lookups", "Searches that the query cache was asked for.", ["outcome"])
EVICTIONS = Counter("pgshelf_query_cache_evictions", "Answers that left the query cache.", ["reason"])
ENTRIES = Gauge("pgshelf_query_cache_entries", "Answers in the query cache.", multiprocess_mode="livesum")
BYTES = Gauge("pgshelf_query_cache_bytes", "Size of the query cache.", multiprocess_mode="livesum")

OVERHEAD = 512  # bytes of an entry beside its answer
LARGEST = 8  # an answer of more than this part of the cache is not kept: it would drive out too many
JOIN_EVERY = 5.0  # seconds
States = list[int | None]
_joined: WeakKeyDictionary[Pool, float] = WeakKeyDictionary()


class Answer(Protocol):
    """What a search answers."""

    cached: bool


T = TypeVar("T", bound=Answer)


class Entry(NamedTuple):
    """An answer as JSON, the libraries as the request named them, and their states."""

    libraries: tuple[str, ...]
    states: States
    until: float
    body: bytes


class QueryCache:
    """The answers that this process keeps: least recently used go first, none stays longer than PGSHELF_CACHE_TTL."""

    def __init__(self, settings: Settings, url: str, opening: connections.Opening = contextlib.nullcontext) -> None:
        self.limit, self.ttl = settings.cache_bytes, settings.cache_ttl
        self.bytes = 0
        self._beside = connections.Beside(settings, url, "cache", opening)
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

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
                found = await self._find(key, kind)
            LOOKUPS.labels("miss" if found is None else "hit").inc()
            if found is not None:
                return found
        answer, states = await find()
        if key is not None and states is not None and None not in states:
            self._keep(key, Entry(tuple(libraries), states, time.monotonic() + self.ttl, msgspec.json.encode(answer)))
        return answer

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

    async def _find(self, key: bytes, kind: type[T]) -> T | None:
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
        answer = msgspec.json.decode(entry.body, type=kind)
        answer.cached = True
        return answer

    async def _states(self, libraries: Sequence[str]) -> States | None:
        """The states that libraries are in now; None where one is gone, or the database does not say."""
        named = {f"library{place}": library for place, library in enumerate(libraries)}
        asked = ", ".join(f"pgshelf.search_state(%({name})s)" for name in named)
        try:
            return list((await self._beside.ask(f"select {asked}", named))[0])
        except (psycopg.Error, Problem):  # the search itself will tell
            return None

    def _keep(self, key: bytes, entry: Entry) -> None:
        if len(entry.body) > self.limit // LARGEST:
            return
        if key in self._entries:
            self._drop(key, "replaced")
        self._entries[key] = entry
        self._count(entry, 1)
        while self.bytes > self.limit:
            self._drop(next(iter(self._entries)), "size")

    def _drop(self, key: bytes, reason: str) -> None:
        self._count(self._entries.pop(key), -1)
        EVICTIONS.labels(reason).inc()

    def _count(self, entry: Entry, sign: int) -> None:
        size = sign * (len(entry.body) + OVERHEAD)
        self.bytes += size
        BYTES.inc(size)
        ENTRIES.inc(sign)

    def clear(self, library: str | None = None) -> None:
        """Give back the memory of what is kept of a library, as requests named it, or of all."""
        for key in [key for key, entry in self._entries.items() if library is None or library in entry.libraries]:
            self._drop(key, "cleared")


async def join_marks(engine: AsyncEngine, _: Settings) -> bool:
    """A step of the worker: keep it cheap to tell the state of a library that is written often."""
    now = time.monotonic()
    if now >= _joined.get(engine.pool, 0.0):
        await database.run(engine, "select pgshelf.join_marks()")
        _joined[engine.pool] = now + JOIN_EVERY
    return False
