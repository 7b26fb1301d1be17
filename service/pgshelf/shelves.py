"""The reconciler of shelves and indexes: moves libraries to shelves of their own and back, and builds what they want.

Nothing here is a job. `libraries.index` says what is wanted, `index_actual` and `shelf` what is there;
`sql/65_shelves.sql` holds the steps from one to the other, each a transaction. A session may die at any of them: its
advisory locks die with it, and the next round, in whatever process, clears away what was begun and starts over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable
from uuid import UUID

import msgspec
import psycopg
from psycopg.types.json import Jsonb

from pgshelf import rounds
from pgshelf.index_builds import Index, IndexBuilds
from pgshelf.moves import Behind, Moves
from pgshelf.sessions import BUILD, MOVER, SHELVES, SWEEP, UNHURRIED, Gone, Pace, Session, Step, connect, no_step
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.shelves")

SIZED_ROWS = 20_000  # that one round counts to see who has grown: some milliseconds
NO_LOCK = contextlib.nullcontext(True)

FIND = """
select l.index, l.index_state, l.moving, l.index_attempts, l.shelf,
  case when l.deleted_at is null then t.task end, t.target,
  (select c.serial from pgshelf.embedder_changes c where c.library_id = l.id and c.phase = 'switching')
from (select %s::int as promote_at) s, pgshelf.libraries l
cross join lateral pgshelf.index_task(l, pgshelf.rows_that_matter(l, s.promote_at), s.promote_at) t
where l.id = %s
"""
# Libraries on shelves of their own for which no statement is kept (sql/64_kept_statements.sql).
KEEPING_DUE = """
select l.id from pgshelf.libraries l where l.shelf <> 0 and l.deleted_at is null and l.shelf not in (
  select substring(p.proname from '^kept_s(\\d+)_')::int from pg_catalog.pg_proc p
  where p.pronamespace = 'pgshelf'::regnamespace and p.proname ~ '^kept_s\\d+_')
order by l.id limit %s
"""


class Shelves:
    """The shelves and indexes of a database, looked after in one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._builds = IndexBuilds(session)
        self._moves = Moves(session, self._builds)
        self.failed: set[UUID] = set()  # libraries that an attempt of this session failed for
        self._seen: UUID | None = None  # the library that was looked at last
        self._swept = 0.0

    async def round(self) -> bool:
        """Do what is due, look at the sizes of some libraries, sweep now and then. Was there something to do?"""
        busy = False
        for library in await self.due():
            busy = await self.settle(library) or busy
        busy = await self.look() or busy
        if asyncio.get_running_loop().time() >= self._swept + self._session.pace.sweep:
            busy = await self.sweep() or busy
            self._swept = asyncio.get_running_loop().time()
        return busy

    async def due(self) -> list[UUID]:
        """The libraries that something is to be done for now, as far as their rows say so."""
        return [library for (library,) in await self._session.rows("select library from pgshelf.index_due()")]

    async def look(self, budget: int | None = SIZED_ROWS) -> bool:
        """See whether the size of some libraries asks for something, going on where the last call ended."""
        promote_at = self._session.settings.promote_at
        [(found, self._seen)] = await self._session.rows(
            "select * from pgshelf.index_sized(%s, %s::int, %s)", self._seen, budget, promote_at
        )
        return any([await self.settle(library) for library in found])

    async def settle(self, library: UUID) -> bool:
        """Bring one library to its wanted state, unless another session does. Was there something to do?"""
        async with self._session.lock("pg_try_advisory_lock(%s, hashtext(%s))", MOVER, str(library)) as mine:
            return mine and await self._settle(library)

    async def _settle(self, library: UUID) -> bool:
        found = await self._session.rows(FIND, self._session.settings.promote_at, library)
        if not found:
            return False
        wish, state, moving, attempts, shelf, task, target, change = found[0]
        if moving:  # its mover is dead, for we hold its lock
            await self._session.fenced("select pgshelf.move_abort(%s)", library)
            await self._session.step("aborted")
        if task is None:
            if state in ("building", "failed"):
                await self._session.run("select pgshelf.index_settled(%s, %s)", library, Jsonb(wish))
            return bool(moving)
        builds = target is not None and target["type"] != "flat"
        async with self._session.lock("pg_try_advisory_lock(%s, %s)", SHELVES, BUILD) if builds else NO_LOCK as mine:
            if not mine:
                return bool(moving)
            wait = min(300.0, self._session.pace.retry * 2.0 ** min(attempts, 10))
            await self._session.run("select pgshelf.index_attempt(%s, make_interval(secs => %s))", library, wait)
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
            if self._session.connection.closed:
                raise  # of no fault of the library's; the next session clears away
            reason = (isinstance(error, psycopg.Error) and error.diag.message_primary) or str(error)
            log.warning("%s of library %s failed: %s", task, library, reason)
            await self._session.run(
                "select pgshelf.index_failed(%s, %s, make_interval(secs => %s))", library, reason, wait
            )
        else:
            return True
        self.failed.add(library)
        await self._session.fenced("select pgshelf.move_abort(%s)", library)
        return False

    async def _move(self, library: UUID, target: Index | None, wish: Index, change: int | None) -> None:
        await self._moves.move(library, target, wish, change)
        await self._words(library)

    async def _rebuild(self, library: UUID, shelf: int, target: Index, wish: Index) -> None:
        await self._builds.rebuild(library, shelf, target, wish)
        await self._prepare(library, "keep_statements")

    async def _words(self, library: UUID) -> None:
        """Count the words of a library anew, and look whether its statements are those that are kept."""
        await self._prepare(library, "refresh_words")
        await self._prepare(library, "keep_statements")
        await self._session.step("counted")

    async def _prepare(self, library: UUID, function: str) -> None:
        """Call a function of sql/ that makes searches faster; they do without when it fails, or is not there yet."""
        if not (await self._session.rows("select to_regproc(%s) is not null", f"pgshelf.{function}"))[0][0]:
            return
        try:
            await self._session.run(f"select pgshelf.{function}(%s)", library)
        except psycopg.Error as error:
            if self._session.connection.closed:
                raise
            log.warning("%s of library %s failed: %s", function, library, error)

    async def sweep(self) -> bool:
        """Clear away what dead sessions and deleted libraries left, one session at a time. Was there something?"""
        async with self._session.lock("pg_try_advisory_lock(%s, %s)", SHELVES, SWEEP) as mine:
            if not mine:
                return False
            found = await self._moves.sweep()
            for (library,) in await self._session.rows("select pgshelf.left_over()"):
                async with self._session.lock("pg_try_advisory_lock(%s, hashtext(%s))", MOVER, str(library)) as idle:
                    found = (idle and await self._moves.reap(library)) or found
            async with self._session.lock("pg_try_advisory_lock(%s, %s)", SHELVES, BUILD) as idle:
                if idle:
                    found = await self._builds.sweep() or found
            for (library,) in await self._session.rows("select pgshelf.words_due(%s)", 3):
                await self._words(library)
            for (library,) in await self._session.rows(KEEPING_DUE, 100):
                await self._prepare(library, "keep_statements")
            return found


async def forever(settings: Settings, pace: Pace = UNHURRIED) -> None:
    """Reconcile until cancelled, with a session that is opened again when it was lost."""
    pause = settings.worker_interval
    while True:
        try:
            async with await connect(settings) as connection:
                shelves = Shelves(Session(connection, settings, pace))
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
            log.warning("looking after shelves failed, trying again: %s", rounds.reason(error), exc_info=not expected)
            pause = min(pause * 2, 10.0)
            await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - jitter


async def reconcile_all_async(settings: Settings, pace: Pace = UNHURRIED, step: Step = no_step) -> None:
    """Bring every library to its wanted state, and sweep; what fails is left as failed."""
    async with await connect(settings) as connection:
        shelves = Shelves(Session(connection, settings, pace, step))
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
