"""The reconciler of shelves and indexes: moves libraries to shelves of their own and back, and builds what they want.

Nothing here is a job. `libraries.index` says what is wanted, `index_actual` and `shelf` what is there;
`sql/65_shelves.sql` holds the steps from one to the other, each a transaction. A session may die at any of them: its
advisory locks die with it, and the next round, in whatever process, clears away what was begun and starts over.

Locks of the session: one for each library that is moved or whose index is built, one for building (one build at a time
in a database: each takes the memory it was given), one for sweeping. So the connection must be a session of its own:
no transaction pooler in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import UUID

import msgspec
import psycopg
from prometheus_client import Histogram
from psycopg.types.json import Jsonb

from pgshelf import connections, pools, rounds
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.shelves")
Index = dict[str, Any]

MOVER = 0x6D6F76  # "mov", with the hash of a library
SHELVES = 0x73686C  # "shl", with one of these two
BUILD, SWEEP = 1, 2

COPIED_ROWS = 5000  # by one statement of a copy, so that none holds back vacuum for long
DRAINED_DOCUMENTS = 20
TOLERATED = 100  # chunks that may wait for their vector when an embedder changes, should it never come up with all
REAPED_ROWS = 2000
SIZED_ROWS = 20_000  # that one round counts to see who has grown: some milliseconds
FENCE_ATTEMPTS = 600
LONG_BUILD = 10.0  # estimated seconds from which on the indexes of a new shelf are built concurrently
DETACH_WAIT = "5s"  # for searches that are on; a longer one is left alone until the next sweep
MEBIBYTE = 1024 * 1024
NO_LOCK = contextlib.nullcontext(True)

FIND = """
select l.index, l.index_state, l.moving, l.index_attempts, l.shelf,
  case when l.deleted_at is null then t.task end, t.target,
  (select c.serial from pgshelf.embedder_changes c where c.library_id = l.id and c.phase = 'switching')
from (select %s::int as promote_at) s, pgshelf.libraries l
cross join lateral pgshelf.index_task(l, pgshelf.rows_that_matter(l, s.promote_at), s.promote_at) t
where l.id = %s
"""


class Pace(msgspec.Struct, frozen=True):
    """How long the reconciler waits, in seconds; tests shorten it."""

    grace: float = 60.0  # a search that was prepared for a shelf has begun by then
    sweep: float = 5.0
    retry: float = 2.0  # after the first failure, doubled with each, five minutes at most
    patience: float = 10.0  # for the last vectors of another embedder, before a few may wait for theirs
    despair: float = 600.0  # before a move to the vectors of another embedder is given up, to be tried again


UNHURRIED = Pace()
BUILDS = Histogram(
    "pgshelf_index_build_seconds",
    "Builds of vector indexes.",
    ["type", "outcome"],
    buckets=(0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0),
)


class Gone(Exception):
    """The library was deleted, or is wanted elsewhere by now: what was begun is given up without a word."""


class Behind(Exception):
    """The vectors of another embedder do not come as fast as what they are of is written."""


Step = Callable[[str], Awaitable[None]]


async def no_step(_: str) -> None: ...


class Shelves:
    """One session of the reconciler. `step` is told the name of each step when it is done: tests die there."""

    def __init__(
        self,
        connection: psycopg.AsyncConnection[Any],
        settings: Settings,
        pace: Pace = UNHURRIED,
        step: Step = no_step,
    ) -> None:
        self.connection, self.settings, self.pace, self.step = connection, settings, pace, step
        self.failed: set[UUID] = set()  # libraries that an attempt of this session failed for
        self._seen: UUID | None = None  # the library that was looked at last
        self._swept = 0.0

    async def round(self) -> bool:
        """Do what is due, look at the sizes of some libraries, sweep now and then. Was there something to do?"""
        busy = False
        for library in await self.due():
            busy = await self.settle(library) or busy
        busy = await self.look() or busy
        if asyncio.get_running_loop().time() >= self._swept + self.pace.sweep:
            busy = await self.sweep() or busy
            self._swept = asyncio.get_running_loop().time()
        return busy

    async def due(self) -> list[UUID]:
        """The libraries that something is to be done for now, as far as their rows say so."""
        return [library for (library,) in await self.rows("select library from pgshelf.index_due()")]

    async def look(self, budget: int | None = SIZED_ROWS) -> bool:
        """See whether the size of some libraries asks for something, going on where the last call ended."""
        promote_at = self.settings.promote_at
        [(found, self._seen)] = await self.rows(
            "select * from pgshelf.index_sized(%s, %s::int, %s)", self._seen, budget, promote_at
        )
        return any([await self.settle(library) for library in found])

    async def settle(self, library: UUID) -> bool:
        """Bring one library to its wanted state, unless another session does. Was there something to do?"""
        async with self.lock("pg_try_advisory_lock(%s, hashtext(%s))", MOVER, str(library)) as mine:
            return mine and await self._settle(library)

    async def _settle(self, library: UUID) -> bool:
        found = await self.rows(FIND, self.settings.promote_at, library)
        if not found:
            return False
        wish, state, moving, attempts, shelf, task, target, change = found[0]
        if moving:  # its mover is dead, for we hold its lock
            await self.fenced("select pgshelf.move_abort(%s)", library)
            await self.step("aborted")
        if task is None:
            if state in ("building", "failed"):
                await self._run("select pgshelf.index_settled(%s, %s)", library, Jsonb(wish))
            return bool(moving)
        builds = target is not None and target["type"] != "flat"
        async with self.lock("pg_try_advisory_lock(%s, %s)", SHELVES, BUILD) if builds else NO_LOCK as mine:
            if not mine:
                return bool(moving)
            wait = min(300.0, self.pace.retry * 2.0 ** min(attempts, 10))
            await self._run("select pgshelf.index_attempt(%s, make_interval(secs => %s))", library, wait)
            if task == "build":
                work = self._rebuild(library, shelf, target, wish)
            else:
                work = self._move(library, target, wish, change)
            return await self._attempt(library, task, work, wait)

    async def _attempt(self, library: UUID, task: str, work: Awaitable[None], wait: float) -> bool:
        try:
            await work
        except Gone:
            log.info("library %s is not wanted there any more", library)
        except (psycopg.Error, Behind) as error:
            if self.connection.closed:
                raise  # of no fault of the library's; the next session clears away
            reason = (isinstance(error, psycopg.Error) and error.diag.message_primary) or str(error)
            log.warning("%s of library %s failed: %s", task, library, reason)
            await self._run("select pgshelf.index_failed(%s, %s, make_interval(secs => %s))", library, reason, wait)
        else:
            return True
        self.failed.add(library)
        await self.fenced("select pgshelf.move_abort(%s)", library)
        return False

    async def _move(self, library: UUID, target: Index | None, wish: Index, change: int | None) -> None:
        """Move a library to a shelf of its own with an index, or to shelf 0 where `target` is None.

        With a `change` of its embedder, the rows on the new shelf have the vectors of the new one.
        """
        await self._reap(library)  # what an earlier move left on shelf 0
        begin = "select pgshelf.move_begin(%s, %s, %s)"
        [(to,)] = await self.fenced(begin, library, target is not None, change)
        if to is None:
            raise Gone
        await self.step("claimed")
        index = await self._fill(library, to, target)
        if not (await self.fenced("select pgshelf.move_double(%s, %s)", library, to))[0][0]:
            raise Gone
        await self.step("doubled")
        await self._drain(library, to)
        await self.step("drained")
        if change is None:
            end = "select pgshelf.move_end(%s, %s, %s, %s)"
            if not (await self.fenced(end, library, to, Jsonb(index), Jsonb(wish)))[0][0]:
                raise Gone
        else:
            await self._complete(library, to, index, wish)
        await self.step("switched")
        log.info("library %s lives on shelf %s, index %s", library, to, index["type"])
        await self._reap(library)
        await self.step("reaped")
        await self._words(library)

    async def _fill(self, library: UUID, to: int, target: Index | None) -> Index:
        """Make the new shelf, up to its index, and attach it; shelf 0 is there already."""
        if target is None:
            await self._copy(library, to)
            await self.step("copied")
            return {"type": "flat"}
        dimension = await self._dimension(library, to)
        await self._run("select pgshelf.make_shelf(%s, %s)", to, dimension)
        await self.step("made")
        index = None
        if target["type"] == "lsh":  # the rows hold codes from the first on
            index = await self._new_index(target, to, dimension)
            await self._run("select pgshelf.keep_codes(%s, %s)", to, index["serial"])
        await self._copy(library, to)
        await self.step("copied")
        long = await self._seconds(to, target, dimension) > LONG_BUILD
        for (statement,) in await self.rows("select pgshelf.shelf_keys(%s, %s)", to, long):
            await self._run(statement)
        await self.step("keyed")
        index = await self._build(library, to, target, index, concurrently=long)
        await self._run(f"analyze pgshelf.chunks_s{to}")
        await self.step("analyzed")
        await self._patient(
            f"alter table pgshelf.chunks attach partition pgshelf.chunks_s{to} for values in ({to})", "1s"
        )
        await self.step("attached")
        return index

    async def _copy(self, library: UUID, to: int) -> None:
        last: UUID | None = None
        while True:
            [(last,)] = await self.rows("select pgshelf.copy_chunks(%s, %s, %s, %s)", library, to, last, COPIED_ROWS)
            await self.step("copying")
            if last is None:
                return

    async def _drain(self, library: UUID, to: int) -> None:
        while True:
            statement = "select pgshelf.move_drain(%s, %s, %s)"
            [(left,)] = await self.rows(statement, library, to, DRAINED_DOCUMENTS)
            if left == 0:
                return
            await self.step("draining")
            if left < 0:  # writers hold the rest
                await asyncio.sleep(0.02)

    async def _complete(self, library: UUID, to: int, index: Index, wish: Index) -> None:
        """Give the new shelf the vectors that came late, and switch when none is missing, or few after a while.

        `reembedding.py` makes the vectors, perhaps in another process.
        """
        clock = asyncio.get_running_loop()
        started = clock.time()
        end = "select pgshelf.change_end(%s, %s, %s, %s, %s)"
        while True:
            fill = "select pgshelf.change_fill(%s, %s, %s)"
            while (await self.rows(fill, library, to, DRAINED_DOCUMENTS))[0][0]:
                await self.step("filling")
            waited = (looked := clock.time()) - started
            tolerated = TOLERATED if waited > self.pace.patience else 0
            [(missing,)] = await self.rows("select pgshelf.change_missing(%s, %s)", library, to)
            if missing <= tolerated:  # writers are not fenced out for nothing
                given = (library, to, Jsonb(index), Jsonb(wish), tolerated)
                [(missing,)] = await self.fenced(end, *given)
                if missing is None:
                    raise Gone
                if missing <= tolerated:
                    return
            await self._dimension(library, to)  # is it still wanted?
            if waited > self.pace.despair:
                raise Behind(f"{missing} chunks have no vector of the new embedder yet")
            await asyncio.sleep(max(0.02, 5 * (clock.time() - looked)))  # many that are missing take long to count

    async def _rebuild(self, library: UUID, shelf: int, target: Index, wish: Index) -> None:
        """Build another index beside the one in use, then use it; the old one is swept away."""
        index = await self._build(library, shelf, target)
        await self._run(f"analyze pgshelf.chunks_s{shelf}")
        use = "select pgshelf.use_index(%s, %s, %s, %s)"
        [(used,)] = await self.rows(use, library, shelf, Jsonb(index), Jsonb(wish))
        if not used:
            raise Gone
        await self.step("used")
        log.info("library %s uses the index %s", library, index)
        async with self.lock("pg_try_advisory_lock(%s, %s)", SHELVES, BUILD) as idle:  # ours already, but for flat
            if idle:
                await self._sweep_indexes()

    async def _new_index(self, target: Index, shelf: int, dimension: int) -> Index:
        index: Index
        new = "select pgshelf.new_index(%s, %s, %s, %s)"
        [(index,)] = await self.rows(new, Jsonb(target), shelf, dimension, self.settings.index_memory_bytes)
        await self.step("prepared")
        return index

    async def _seconds(self, shelf: int, target: Index, dimension: int) -> float:
        """About how long the indexes of a shelf that nobody else knows yet will take."""
        estimate = "select e.seconds from pgshelf.index_estimate(%s, pgshelf.shelf_vectors(%s), %s, %s) e"
        memory = self.settings.index_memory_bytes
        [(seconds,)] = await self.rows(estimate, Jsonb(target), shelf, dimension, memory)
        return float(seconds)

    async def _build(
        self, library: UUID, shelf: int, target: Index, begun: Index | None = None, *, concurrently: bool = True
    ) -> Index:
        dimension = await self._dimension(library, shelf)
        if begun is None:
            index = await self._new_index(target, shelf, dimension)
        else:
            [(rows,)] = await self.rows("select pgshelf.shelf_vectors(%s)", shelf)
            index = {**begun, "rows": rows}
        if index["type"] == "flat":
            return index
        build = "select pgshelf.build_statements(%s, %s, %s, %s)"
        statements = await self.rows(build, library, shelf, Jsonb(index), concurrently)
        await self._give_memory(index, dimension)
        started, outcome = time.monotonic(), "failed"
        try:
            for (statement,) in statements:
                await self._run_parallel(statement, f"pgshelf.chunks_s{shelf}_v{index['serial']}")
            outcome = "built"
        finally:
            BUILDS.labels(index["type"], outcome).observe(time.monotonic() - started)
            if not self.connection.closed:
                await self._run("reset maintenance_work_mem")
        await self.step("built")
        return index

    async def _run_parallel(self, statement: str, name: str) -> None:
        """Run the statement that makes an index, by one process alone where there is no shared memory for several."""
        try:
            await self._run(statement)
        except psycopg.errors.DiskFull:  # mostly /dev/shm, which is small in containers
            log.warning("building %s again without parallel workers", name)
            await self._run(f"drop index concurrently if exists {name}")
            await self._run("set max_parallel_maintenance_workers = 0")
            try:
                await self._run(statement)
            finally:
                if not self.connection.closed:
                    await self._run("reset max_parallel_maintenance_workers")

    async def _give_memory(self, index: Index, dimension: int) -> None:
        """Give a build the memory it is estimated to need, up to PGSHELF_INDEX_MEMORY_BYTES."""
        estimate = "select memory_bytes from pgshelf.index_estimate(%s, %s, %s, %s)"
        limit = self.settings.index_memory_bytes
        [(needed,)] = await self.rows(estimate, Jsonb(index), index["rows"], dimension, limit)
        given = min(limit, max(64 * MEBIBYTE, int(needed * 1.1)))
        await self._run(f"set maintenance_work_mem = '{given // 1024}kB'")

    async def _dimension(self, library: UUID, shelf: int) -> int:
        dimension = "select pgshelf.shelf_dimension(l, %s) from pgshelf.libraries l where l.id = %s"
        found = await self.rows(dimension, shelf, library)
        if not found or found[0][0] is None:
            raise Gone
        return int(found[0][0])

    async def _reap(self, library: UUID) -> bool:
        """Delete rows on shelf 0 that a library left there."""
        found = False
        while (await self.rows("select pgshelf.reap_left_over(%s, %s)", library, REAPED_ROWS))[0][0]:
            found = True
            await self.step("reaping")
        return found

    async def _words(self, library: UUID) -> None:
        """Count the words of a library anew; search does without when that fails."""
        [(known,)] = await self.rows("select to_regprocedure('pgshelf.refresh_words(uuid)') is not null")
        if not known:
            return
        try:
            await self._run("select pgshelf.refresh_words(%s)", library)
        except psycopg.Error as error:
            if self.connection.closed:
                raise
            log.warning("counting the words of library %s failed: %s", library, error)
        await self.step("counted")

    async def sweep(self) -> bool:
        """Clear away what dead sessions and deleted libraries left, one session at a time. Was there something?"""
        async with self.lock("pg_try_advisory_lock(%s, %s)", SHELVES, SWEEP) as mine:
            if not mine:
                return False
            found = await self._sweep_shelves()
            for (library,) in await self.rows("select pgshelf.left_over()"):
                async with self.lock("pg_try_advisory_lock(%s, hashtext(%s))", MOVER, str(library)) as idle:
                    found = (idle and await self._reap(library)) or found
            async with self.lock("pg_try_advisory_lock(%s, %s)", SHELVES, BUILD) as idle:
                if idle:
                    found = await self._sweep_indexes() or found
            for (library,) in await self.rows("select pgshelf.words_due(%s)", 3):
                await self._words(library)
            return found

    async def _sweep_shelves(self) -> bool:
        lost = await self.rows("select * from pgshelf.lost_shelves(make_interval(secs => %s))", self.pace.grace)
        dropped = False
        for shelf, attached, pending in lost:
            table = f"pgshelf.chunks_s{shelf}"
            how = "finalize" if pending else "concurrently"
            try:
                if attached:  # a plain detach or drop would stop every search; this one waits for those that are on
                    await self._waiting(f"alter table pgshelf.chunks detach partition {table} {how}", DETACH_WAIT)
                await self._waiting(f"drop table {table}", "1s")
            except psycopg.errors.LockNotAvailable:
                log.info("shelf %s is still in use, dropping it later", shelf)
                continue
            dropped = True
            await self.step("dropped")
        return dropped

    async def _sweep_indexes(self) -> bool:
        """Drop vector indexes that nobody uses, and what belongs to them; the caller holds the lock of builds."""
        lost = await self.rows("select pgshelf.lost_indexes()")
        for (name,) in lost:
            await self._run(f"drop index concurrently if exists pgshelf.{name}")
            await self.step("index dropped")
        await self._run("select pgshelf.forget_lost()")
        missing = (await self.rows("select pgshelf.miss_indexes()"))[0][0]
        return bool(lost or missing)

    async def fenced(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one of the fences, again and again while writers hold it off, ever more rarely."""
        for attempt in range(FENCE_ATTEMPTS):
            with contextlib.suppress(psycopg.errors.LockNotAvailable):
                return await self.rows(statement, *parameters)
            await asyncio.sleep(random.uniform(0.5, 1) * min(1.0, 0.02 * 1.3**attempt))  # noqa: S311 - jitter
        return await self.rows(statement, *parameters)

    async def _patient(self, statement: str, wait: str) -> None:
        """Run DDL that others may hold off, without making those queue for long that come behind it."""
        for attempt in range(FENCE_ATTEMPTS):
            with contextlib.suppress(psycopg.errors.LockNotAvailable):
                return await self._waiting(statement, wait)
            await asyncio.sleep(random.uniform(0.5, 1) * min(2.0, 0.1 * 1.3**attempt))  # noqa: S311 - jitter
        await self._waiting(statement, wait)

    async def _waiting(self, statement: str, wait: str) -> None:
        await self._run(f"set lock_timeout = '{wait}'")
        try:
            await self._run(statement)
        finally:
            if not self.connection.closed:
                await self._run("reset lock_timeout")

    @contextlib.asynccontextmanager
    async def lock(self, call: str, *key: Any) -> AsyncIterator[bool]:
        """Try a lock of the session; what the block gets says whether it is ours."""
        [(mine,)] = await self.rows(f"select {call}", *key)
        try:
            yield mine
        finally:
            if mine and not self.connection.closed:
                await self._run(f"select {call.replace('pg_try_advisory_lock', 'pg_advisory_unlock')}", *key)

    async def rows(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        cursor = await self.connection.execute(statement.encode(), parameters or None)
        return await cursor.fetchall()

    async def _run(self, statement: str, *parameters: Any) -> None:
        await self.connection.execute(statement.encode(), parameters or None)


async def connect(settings: Settings) -> psycopg.AsyncConnection[Any]:
    """A session for the reconciler. A client that vanished is noticed within a minute, even during a build."""
    options = (
        "-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 -c jit=off"
        " -c plan_cache_mode=force_custom_plan -c client_connection_check_interval=10s"
        " -c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3"
    )
    assert settings.database_url  # noqa: S101 - who runs a worker has a database
    existing = psycopg.conninfo.conninfo_to_dict(connections.dsn(settings.database_url)).get("options")
    target = connections.dsn(
        settings.database_url,
        application_name="pgshelf shelves",
        connect_timeout=settings.connect_timeout,
        options=f"{existing} {options}" if existing else options,
    )
    connection = await psycopg.AsyncConnection.connect(target, autocommit=True)
    try:
        await connection.execute(pools.BECOME_OWNER)
    except BaseException:
        await connection.close()
        raise
    return connection


async def forbidden_to(settings: Settings) -> str | None:
    """Who would have to be the owner's, when this role may not build: PostgreSQL lets nobody else attach shelves."""
    async with await connect(settings) as connection:
        found = await (await connection.execute(pools.BECOME_OWNER)).fetchone()
        return None if found is None or found[1] else str(found[0])


async def forever(settings: Settings, pace: Pace = UNHURRIED) -> None:
    """Reconcile until cancelled, with a session that is opened again when it was lost."""
    pause = settings.worker_interval
    while True:
        try:
            async with await connect(settings) as connection:
                shelves = Shelves(connection, settings, pace)
                while True:
                    busy = await shelves.round()
                    rounds.ended("shelves", busy)
                    pause = settings.worker_interval
                    if not busy:
                        await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
        except Exception as error:
            # what is wanted is still written down: the next session meets it again
            expected = isinstance(error, psycopg.Error)
            rounds.ended("shelves", None)
            log.warning("looking after shelves failed, trying again: %s", error, exc_info=not expected)
            pause = min(pause * 2, 10.0)
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - jitter


async def reconcile_all_async(settings: Settings, pace: Pace = UNHURRIED, step: Step = no_step) -> None:
    """Bring every library to its wanted state, and sweep; what fails is left as failed."""
    async with await connect(settings) as connection:
        shelves = Shelves(connection, settings, pace, step)
        busy = True
        while busy:
            busy = False
            for library in await shelves.due():
                busy = (library not in shelves.failed and await shelves.settle(library)) or busy
            busy = await shelves.look(budget=None) or busy
            busy = await shelves.sweep() or busy


def reconcile_all(url: str, settings: Settings | None = None) -> None:
    """Bring every library of a database to its wanted state, now: for benchmarks, tests and the impatient."""
    given = settings or Settings()
    asyncio.run(reconcile_all_async(msgspec.structs.replace(given, database_url=url)))
