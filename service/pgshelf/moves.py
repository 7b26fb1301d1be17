"""Moves of libraries: to a shelf of their own, with an index, and back to the shared one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from pgshelf.index_builds import Index, IndexBuilds
from pgshelf.sessions import Gone, Session

log = logging.getLogger("pgshelf.moves")

MIDDLE = UUID(int=2**127)  # as many documents have a greater id as a smaller one, for ids are random
COPIED_ROWS = 5000  # by one statement of a copy, so that none holds back vacuum for long
DRAINED_DOCUMENTS = 20
TOLERATED = 100  # chunks that may wait for their vector when an embedder changes, should it never come up with all
REAPED_ROWS = 2000
DETACH_WAIT = "5s"  # for searches that are on; a longer one is left alone until the next sweep


class Behind(Exception):
    """The vectors of another embedder do not come as fast as what they are of is written."""


class Moves:
    """The moves of one session, which holds the lock of the library while one goes on."""

    def __init__(self, session: Session, builds: IndexBuilds) -> None:
        self._session, self._builds = session, builds

    async def move(self, library: UUID, target: Index | None, wish: Index, change: int | None) -> None:
        """Move a library to a shelf of its own with an index, or to shelf 0 where `target` is None.

        With a `change` of its embedder, the rows on the new shelf have the vectors of the new one. Raises Gone, Behind,
        and psycopg.Error; `pgshelf.move_abort` takes back what was begun.
        """
        await self.reap(library)  # what an earlier move left on shelf 0
        begin = "select pgshelf.move_begin(%s, %s, %s)"
        [(to,)] = await self._session.fenced(begin, library, target is not None, change)
        if to is None:
            raise Gone
        await self._session.step("claimed")
        index = await self._fill(library, to, target)
        if not (await self._session.fenced("select pgshelf.move_double(%s, %s)", library, to))[0][0]:
            raise Gone
        await self._session.step("doubled")
        await self._drain(library, to)
        await self._session.step("drained")
        if change is None:
            end = "select pgshelf.move_end(%s, %s, %s, %s)"
            if not (await self._session.fenced(end, library, to, Jsonb(index), Jsonb(wish)))[0][0]:
                raise Gone
        else:
            await self._complete(library, to, index, wish)
        await self._session.step("switched")
        log.info("library %s lives on shelf %s, index %s", library, to, index["type"])
        await self.reap(library)
        await self._session.step("reaped")

    async def _fill(self, library: UUID, to: int, target: Index | None) -> Index:
        """Make the new shelf, up to its index, and attach it; shelf 0 is there already."""
        if target is None:
            await self._copy(self._session, library, to)
            await self._session.step("copied")
            return {"type": "flat"}
        dimension = await self._builds.dimension(library, to)
        await self._session.run("select pgshelf.make_shelf(%s, %s)", to, dimension)
        await self._session.step("made")
        index = None
        if target["type"] == "lsh":  # the rows hold codes from the first on
            index = await self._builds.new_index(target, to, dimension)
            await self._session.run("select pgshelf.keep_codes(%s, %s)", to, index["serial"])
        await self._copy_halves(library, to)
        await self._session.step("copied")
        for (statement,) in await self._session.rows("select pgshelf.shelf_keys(%s)", to):
            await self._session.run(statement)
        await self._session.step("keyed")
        index = await self._builds.build(library, to, target, index, concurrently=False)
        await self._session.run(f"analyze pgshelf.chunks_s{to}")
        await self._session.step("analyzed")
        await self._session.patient(
            f"alter table pgshelf.chunks attach partition pgshelf.chunks_s{to} for values in ({to})", "1s"
        )
        await self._session.step("attached")
        return index

    async def _copy_halves(self, library: UUID, to: int) -> None:
        """Copy to a new shelf, which is nobody else's, in two sessions: most of the time goes into finding words."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                other = await stack.enter_async_context(self._session.beside())
            except psycopg.OperationalError as error:
                log.info("library %s is copied in one session: %s", library, error)
                await self._copy(self._session, library, to)
                return
            half = asyncio.create_task(self._copy(other, library, to, after=MIDDLE))
            try:
                await self._copy(self._session, library, to, until=MIDDLE)
                await half
            finally:
                half.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):  # told above, unless another one was
                    await half

    async def _copy(
        self, session: Session, library: UUID, to: int, *, after: UUID | None = None, until: UUID | None = None
    ) -> None:
        last = after
        while True:
            copy = "select pgshelf.copy_chunks(%s, %s, %s, %s, %s)"
            [(last,)] = await session.rows(copy, library, to, last, until, COPIED_ROWS)
            await session.step("copying")
            if last is None:
                # what this session has inserted would be added to what ANALYZE finds
                await session.run("select pg_stat_force_next_flush()")
                return

    async def _drain(self, library: UUID, to: int) -> None:
        while True:
            statement = "select pgshelf.move_drain(%s, %s, %s)"
            [(left,)] = await self._session.rows(statement, library, to, DRAINED_DOCUMENTS)
            if left == 0:
                return
            await self._session.step("draining")
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
            while (await self._session.rows(fill, library, to, DRAINED_DOCUMENTS))[0][0]:
                await self._session.step("filling")
            waited = (looked := clock.time()) - started
            tolerated = TOLERATED if waited > self._session.pace.patience else 0
            [(missing,)] = await self._session.rows("select pgshelf.change_missing(%s, %s)", library, to)
            if missing <= tolerated:  # writers are not fenced out for nothing
                given = (library, to, Jsonb(index), Jsonb(wish), tolerated)
                [(missing,)] = await self._session.fenced(end, *given)
                if missing is None:
                    raise Gone
                if missing <= tolerated:
                    return
            await self._builds.dimension(library, to)  # is it still wanted?
            if waited > self._session.pace.despair:
                raise Behind(f"{missing} chunks have no vector of the new embedder yet")
            await asyncio.sleep(max(0.02, 5 * (clock.time() - looked)))  # many that are missing take long to count

    async def reap(self, library: UUID) -> bool:
        """Delete rows on shelf 0 that a library left there. Was there any?"""
        found = False
        while (await self._session.rows("select pgshelf.reap_left_over(%s, %s)", library, REAPED_ROWS))[0][0]:
            found = True
            await self._session.step("reaping")
        return found

    async def sweep(self) -> bool:
        """Drop shelves that no library lives on, but for those that searches still use. Was there any?"""
        lost = await self._session.rows(
            "select * from pgshelf.lost_shelves(make_interval(secs => %s))", self._session.pace.grace
        )
        dropped = False
        for shelf, attached, pending in lost:
            table = f"pgshelf.chunks_s{shelf}"
            how = "finalize" if pending else "concurrently"
            try:
                if attached:  # a plain detach or drop would stop every search; this one waits for those that are on
                    await self._session.waiting(
                        f"alter table pgshelf.chunks detach partition {table} {how}", DETACH_WAIT
                    )
                await self._session.waiting(f"drop table {table}", "1s")
            except psycopg.errors.LockNotAvailable:
                log.info("shelf %s is still in use, dropping it later", shelf)
                continue
            dropped = True
            await self._session.step("dropped")
        return dropped
