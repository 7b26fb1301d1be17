"""Builds of vector indexes, each with the memory that it is estimated to need; and the end of those nobody uses."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any
from uuid import UUID

import psycopg
from prometheus_client import Histogram
from psycopg.types.json import Jsonb

from pgshelf.sessions import BUILD, SHELVES, Gone, Session

log = logging.getLogger("pgshelf.index_builds")
Index = dict[str, Any]  # as `libraries.index` and `index_actual` hold it

MEBIBYTE = 1024 * 1024
BUILDS = Histogram(
    "pgshelf_index_build_seconds",
    "Builds of vector indexes.",
    ["type", "outcome"],
    buckets=(0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0),
)


class IndexBuilds:
    """The builds of one session, which holds the lock of builds, and that of the library, while one goes on."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def rebuild(self, library: UUID, shelf: int, target: Index, wish: Index) -> None:
        """Build another index beside the one in use, then use it; the old one is swept away."""
        index = await self.build(library, shelf, target)
        await self._session.run(f"analyze pgshelf.chunks_s{shelf}")
        use = "select pgshelf.use_index(%s, %s, %s, %s)"
        [(used,)] = await self._session.rows(use, library, shelf, Jsonb(index), Jsonb(wish))
        if not used:
            raise Gone
        await self._session.step("used")
        log.info("library %s uses the index %s", library, index)
        # ours already, but for flat
        async with self._session.lock("pg_try_advisory_lock(%s, %s)", SHELVES, BUILD) as idle:
            if idle:
                await self.sweep()

    async def new_index(self, target: Index, shelf: int, dimension: int) -> Index:
        """Put down an index that is to be built on a shelf, and what belongs to it; with it come its serial and `rows`.

        `dimension`: numbers per vector.
        """
        index: Index
        new = "select pgshelf.new_index(%s, %s, %s, %s)"
        [(index,)] = await self._session.rows(
            new, Jsonb(target), shelf, dimension, self._session.settings.index_memory_bytes
        )
        await self._session.step("prepared")
        return index

    async def build(
        self, library: UUID, shelf: int, target: Index, begun: Index | None = None, *, concurrently: bool = True
    ) -> Index:
        """Build an index on a shelf, or go on with one that was `begun` by `new_index`; none for `flat`.

        Raises Gone, and psycopg.Error where PostgreSQL does not build it.
        """
        dimension = await self.dimension(library, shelf)
        if begun is None:
            index = await self.new_index(target, shelf, dimension)
        else:
            [(rows,)] = await self._session.rows("select pgshelf.shelf_vectors(%s)", shelf)
            index = {**begun, "rows": rows}
        if index["type"] == "flat":
            return index
        build = "select pgshelf.build_statements(%s, %s, %s, %s)"
        statements = await self._session.rows(build, library, shelf, Jsonb(index), concurrently)
        await self._give_memory(index, dimension)
        started, outcome = time.monotonic(), "failed"
        try:
            for (statement,) in statements:
                await self._run_parallel(statement, f"pgshelf.chunks_s{shelf}_v{index['serial']}")
            outcome = "built"
        finally:
            BUILDS.labels(index["type"], outcome).observe(time.monotonic() - started)
            if not self._session.connection.closed:
                await self._session.run("reset maintenance_work_mem")
        await self._session.step("built")
        return index

    async def _run_parallel(self, statement: str, name: str) -> None:
        """Run the statement that makes an index, by one process alone where there is no shared memory for several."""
        try:
            await self._session.run(statement)
        except psycopg.errors.DiskFull:  # mostly /dev/shm, which is small in containers
            log.warning("building %s again without parallel workers", name)
            await self._session.run(f"drop index concurrently if exists {name}")
            await self._session.run("set max_parallel_maintenance_workers = 0")
            try:
                await self._session.run(statement)
            finally:
                if not self._session.connection.closed:
                    await self._session.run("reset max_parallel_maintenance_workers")

    async def _give_memory(self, index: Index, dimension: int) -> None:
        """Give a build the memory it is estimated to need, up to PGSHELF_INDEX_MEMORY_BYTES."""
        estimate = "select memory_bytes from pgshelf.index_estimate(%s, %s, %s, %s)"
        limit = self._session.settings.index_memory_bytes
        [(needed,)] = await self._session.rows(estimate, Jsonb(index), index["rows"], dimension, limit)
        given = min(limit, max(64 * MEBIBYTE, int(needed * 1.1)))
        await self._session.run(f"set maintenance_work_mem = '{given // 1024}kB'")

    async def dimension(self, library: UUID, shelf: int) -> int:
        """Numbers per vector of a library on a shelf; raises Gone where it is not wanted there."""
        dimension = "select pgshelf.shelf_dimension(l, %s) from pgshelf.libraries l where l.id = %s"
        found = await self._session.rows(dimension, shelf, library)
        if not found or found[0][0] is None:
            raise Gone
        return int(found[0][0])

    async def sweep(self) -> bool:
        """Drop vector indexes that nobody uses, and what belongs to them; the caller holds the lock of builds."""
        lost = await self._session.rows("select pgshelf.lost_indexes()")
        for (name,) in lost:
            with contextlib.suppress(psycopg.errors.LockNotAvailable):  # it waits for the next time
                await self._session.waiting(f"drop index concurrently if exists pgshelf.{name}", "5s")
            await self._session.step("index dropped")
        await self._session.run("select pgshelf.forget_lost()")
        missing = (await self._session.rows("select pgshelf.miss_indexes()"))[0][0]
        return bool(lost or missing)
