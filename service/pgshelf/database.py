"""Transactions: statements in them, how they are retried, and what is said where nobody knows how one ended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import psycopg
import sqlalchemy
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgshelf.connections import Connection, is_lost, is_stale
from pgshelf.consistency import Position, committed
from pgshelf.errors import Problem
from pgshelf.pools import renew
from pgshelf.timing import stage

RETRIES = 3
T = TypeVar("T")
RETRIED = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
# How far the WAL is that a commit has just flushed. What others have written and not flushed does not count: no standby
# gets it before it is, up to wal_writer_delay later. A commit that flushes nothing has no better end.
POSITION = b"""select pg_catalog.pg_walfile_name(s.t), (s.t - '0/0')::bigint
from (select case pg_catalog.current_setting('synchronous_commit') when 'off'
  then pg_catalog.pg_current_wal_insert_lsn() else pg_catalog.pg_current_wal_flush_lsn() end as t) s"""
UNKNOWN = (
    "The connection was lost, or a standby did not confirm in time, while the write was committed: it may be there or "
    "not. Send it again with the same Idempotency-Key, which carries it out once."
)
UNCONFIRMED = (
    "The write is committed on the primary and no standby has confirmed it: it is lost if the primary fails now. "
    "Send it again with the same Idempotency-Key to hear when it is confirmed."
)


class Reads(Protocol):
    """Where a request reads, if there are replicas: on one of them or on the primary; `retried` decides."""

    primary: AsyncEngine

    async def retried(self, work: Callable[[AsyncConnection], Awaitable[T]], *, single: bool = False) -> T:
        """Do `work`, which changes nothing, on a server that is fresh enough; on another one where that fails."""


Source = AsyncEngine | Reads


def primary(source: Source) -> AsyncEngine:
    """Where one writes who reads there."""
    return source if isinstance(source, AsyncEngine) else source.primary


@asynccontextmanager
async def transaction(
    engine: AsyncEngine, *, single: bool = False, written: bool = False
) -> AsyncIterator[AsyncConnection]:
    """A transaction; what the driver raises comes out as it is, without SQLAlchemy's wrapping.

    A `single` statement is a transaction by itself and is spared the round trips of BEGIN and COMMIT. What is
    `written` for a client is answered truthfully: where nobody knows whether it was committed, that is what is said.
    """
    try:
        with stage("sql"):
            async with _of_single_statements(engine).connect() if single else engine.begin() as connection:
                if written:
                    async with _settled(connection, single=single):
                        yield connection
                else:
                    yield connection
    except PoolTimeout:
        detail = f"No connection became free in time ({engine.pool.status()}). Try again, or raise PGSHELF_POOL_SIZE."
        raise Problem("pool_exhausted", detail) from None
    except (DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if not isinstance(cause, psycopg.Error):
            raise
        if is_stale(cause):
            renew(engine)
        if message := cause.diag.message_primary:
            cause.args = (message,)  # whoever logs it shall not log the DETAIL, which may hold a whole row
        raise cause from None


@asynccontextmanager
async def _settled(connection: AsyncConnection, *, single: bool) -> AsyncIterator[None]:
    """Commit what the block writes, or say that nobody knows, and note where it was committed."""
    driver = await driver_of(connection)
    driver.unconfirmed = False
    noting = driver.system is not None and committed.get() is not None
    committing = single
    try:
        if single:
            # the statement has a limit in the server; its wait for standbys has none there
            async with asyncio.timeout(driver.patience + 2):
                yield
            if noting:
                await _note(driver, POSITION)
        else:
            yield
            committing = True
            async with asyncio.timeout(driver.patience):
                # both in one round trip
                await (_note(driver, b"commit; " + POSITION) if noting else driver.commit())
    except (TimeoutError, DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if committing and (isinstance(cause, TimeoutError) or is_lost(cause)):
            await connection.invalidate()  # to roll back on it would fail, and hide this
            raise Problem("write_outcome_unknown", UNCONFIRMED if driver.unconfirmed else UNKNOWN) from None
        raise
    if driver.unconfirmed:
        raise Problem("write_outcome_unknown", UNCONFIRMED)


async def _note(driver: Connection, statement: bytes) -> None:
    """Run what ends in POSITION, and remember the answer for the client."""
    cursor = await driver.execute(statement, prepare=False)
    while cursor.nextset():
        pass
    row, positions = await cursor.fetchone(), committed.get()
    if row is not None and positions is not None and driver.system is not None:
        positions[:] = [max([*positions, Position(driver.system % 2**64, int(row[0][:8], 16), row[1])])]


async def note_position(engine: AsyncEngine) -> None:
    """Note a position behind everything that is committed by now, for an answer that tells of an earlier write."""
    async with transaction(engine, single=True, written=True):
        pass


async def driver_of(connection: AsyncConnection) -> Connection:
    """The driver's own connection."""
    driver = (await connection.get_raw_connection()).driver_connection
    assert isinstance(driver, Connection)  # noqa: S101 - narrows the type: make_engine opens them
    return driver


_single: WeakKeyDictionary[AsyncEngine, AsyncEngine] = WeakKeyDictionary()


def _of_single_statements(engine: AsyncEngine) -> AsyncEngine:
    if engine not in _single:
        _single[engine] = engine.execution_options(isolation_level="AUTOCOMMIT")
    return _single[engine]


async def rows(connection: AsyncConnection, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement with %s placeholders on the driver's own connection, within the transaction."""
    driver = await driver_of(connection)
    async with driver.cursor(binary=True) as cursor:
        await cursor.execute(statement.encode(), parameters)
        # not `description`, which makes an object of each column
        return await cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else []


async def retried(
    source: Source, work: Callable[[AsyncConnection], Awaitable[T]], *, single: bool = False, written: bool = False
) -> T:
    """Do `work` in a transaction; after a deadlock, a serialization failure or a stale connection in another one."""
    if not isinstance(source, AsyncEngine):
        return await source.retried(work, single=single)
    for attempt in range(RETRIES):
        try:
            async with transaction(source, single=single, written=written) as connection:
                return await work(connection)
        except psycopg.Error as error:
            # a session that an administrator ended, as a server does that stops, has done nothing of this
            ended = isinstance(error, psycopg.errors.AdminShutdown)
            again = isinstance(error, RETRIED) or (attempt == 0 and (ended or is_stale(error)))
            if not again or attempt == RETRIES - 1:
                raise
            await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311 - jitter, not a secret
    raise AssertionError("unreachable")


async def run(source: Source, statement: str, *parameters: Any, written: bool = False) -> list[tuple[Any, ...]]:
    """Run one statement of ours as a transaction of its own."""
    return await retried(
        source, lambda connection: rows(connection, statement, *parameters), single=True, written=written
    )


def now() -> sqlalchemy.ColumnElement[Any]:
    """The transaction's time, by the database's clock."""
    return sqlalchemy.func.now()


def merge_patch(target: sqlalchemy.ColumnElement[Any], patch: Any) -> sqlalchemy.ColumnElement[Any]:
    """RFC 7396, by the function in sql/."""
    return sqlalchemy.func.pgshelf.merge_patch(target, sqlalchemy.cast(patch, JSONB))
