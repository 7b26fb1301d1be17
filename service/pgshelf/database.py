"""Transactions: statements in them, how they are retried, and what is said where nobody knows how one ended."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import psycopg
import sqlalchemy
from psycopg.pq import TransactionStatus
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.dialects.postgresql.psycopg import dialect as psycopg_dialect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util.concurrency import greenlet_spawn

from pgshelf.connections import Connection, is_lost, is_stale
from pgshelf.consistency import Position, committed
from pgshelf.errors import Problem
from pgshelf.pools import renew
from pgshelf.timing import stage

RETRIES = 3
CORE = psycopg_dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy gives its constructor no types
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

    primary: sqlalchemy.Engine

    async def retried(self, work: Callable[[Connection], Awaitable[T]], *, single: bool = False) -> T:
        """Do `work`, which changes nothing, on a server that is fresh enough; on another one where that fails."""


Source = sqlalchemy.Engine | Reads


def primary(source: Source) -> sqlalchemy.Engine:
    """Where one writes who reads there."""
    return source if isinstance(source, sqlalchemy.Engine) else source.primary


@asynccontextmanager
async def transaction(
    engine: sqlalchemy.Engine, *, single: bool = False, written: bool = False, snapshot: bool = False
) -> AsyncIterator[Connection]:
    """A transaction on a connection of the pool; what the driver raises comes out as it is.

    A `single` statement is a transaction by itself and is spared the round trips of BEGIN and COMMIT. What is
    `written` for a client is answered truthfully: where nobody knows whether it was committed, that is what is said.
    All statements of a `snapshot` see the same.
    """
    try:
        with stage("sql"):
            async with _lent(engine, single=single, snapshot=snapshot) as connection:
                if written:
                    async with _settled(connection, single=single):
                        yield connection
                else:
                    yield connection
                    if not single:
                        await connection.commit()
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
async def _lent(engine: sqlalchemy.Engine, *, single: bool, snapshot: bool) -> AsyncIterator[Connection]:
    """A connection of the pool, as the driver has it: SQLAlchemy's own takes as long as a short statement."""
    place = await greenlet_spawn(engine.pool.connect)
    connection = place.driver_connection
    assert isinstance(connection, Connection)  # noqa: S101 - narrows the type: make_engine opens them
    try:
        if single:
            await connection.set_autocommit(True)
        elif snapshot:
            await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        yield connection
    finally:
        if connection.pgconn.transaction_status == TransactionStatus.IDLE:
            await _give_back(place, connection)
        else:  # it failed or was cancelled, and may be again
            await asyncio.shield(asyncio.create_task(_give_back(place, connection)))


async def _give_back(place: PoolProxiedConnection, connection: Connection) -> None:
    """As it was: without a transaction, and with the settings of the pool; what cannot be so is replaced."""
    try:
        if connection.pgconn.transaction_status != TransactionStatus.IDLE:
            await connection.rollback()
        if connection.autocommit:
            await connection.set_autocommit(False)
        if connection.isolation_level is not None:
            await connection.set_isolation_level(None)
    except psycopg.Error as error:
        await greenlet_spawn(place.invalidate, error)
    else:
        place.close()


@asynccontextmanager
async def _settled(connection: Connection, *, single: bool) -> AsyncIterator[None]:
    """Commit what the block writes, or say that nobody knows, and note where it was committed."""
    connection.unconfirmed = False
    noting = connection.system is not None and committed.get() is not None
    committing = single
    try:
        if single:
            # the statement has a limit in the server; its wait for standbys has none there
            async with asyncio.timeout(connection.patience + 2):
                yield
            if noting:
                await _note(connection, POSITION)
        else:
            yield
            committing = True
            async with asyncio.timeout(connection.patience):
                # both in one round trip
                await (_note(connection, b"commit; " + POSITION) if noting else connection.commit())
    except (TimeoutError, psycopg.Error) as error:
        if committing and (isinstance(error, TimeoutError) or is_lost(error)):
            await connection.close()  # to roll back on it would wait
            raise Problem("write_outcome_unknown", UNCONFIRMED if connection.unconfirmed else UNKNOWN) from None
        raise
    if connection.unconfirmed:
        raise Problem("write_outcome_unknown", UNCONFIRMED)


async def _note(connection: Connection, statement: bytes) -> None:
    """Run what ends in POSITION, and remember the answer for the client."""
    cursor = await connection.execute(statement, prepare=False)
    while cursor.nextset():
        pass
    row, positions = await cursor.fetchone(), committed.get()
    if row is not None and positions is not None and connection.system is not None:
        positions[:] = [max([*positions, Position(connection.system % 2**64, int(row[0][:8], 16), row[1])])]


async def note_position(engine: sqlalchemy.Engine) -> None:
    """Note a position behind everything that is committed by now, for an answer that tells of an earlier write."""
    async with transaction(engine, single=True, written=True):
        pass


@asynccontextmanager
async def savepoint(connection: Connection) -> AsyncIterator[None]:
    """Of what fails inside nothing stays, and the transaction goes on."""
    await connection.execute("savepoint inside")
    try:
        yield
    except Exception:
        if not connection.closed:
            await connection.execute("rollback to savepoint inside")
        raise
    await connection.execute("release savepoint inside")


async def rows(connection: Connection, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement with %s placeholders within the transaction."""
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(statement.encode(), parameters)
        # not `description`, which makes an object of each column
        return await cursor.fetchall() if cursor.pgresult is not None and cursor.pgresult.nfields else []


async def execute(connection: Connection, statement: sqlalchemy.Executable) -> list[dict[str, Any]]:
    """Run a statement of SQLAlchemy's that gives rows within the transaction; a row has its values by their columns."""
    compiled = statement.compile(dialect=CORE)  # type: ignore[attr-defined]  # whatever is executable compiles
    given = {
        name: Jsonb(value) if isinstance(compiled.binds[name].type, JSONB) else value
        for name, value in compiled.params.items()
    }
    async with connection.cursor(binary=True, row_factory=dict_row) as cursor:
        return await (await cursor.execute(str(compiled).encode(), given)).fetchall()


async def retried(
    source: Source,
    work: Callable[[Connection], Awaitable[T]],
    *,
    single: bool = False,
    written: bool = False,
    attempts: int = RETRIES,
) -> T:
    """Do `work` in a transaction; after a deadlock, a serialization failure or a stale connection in another one."""
    if not isinstance(source, sqlalchemy.Engine):
        return await source.retried(work, single=single)
    for attempt in range(attempts):
        try:
            async with transaction(source, single=single, written=written) as connection:
                return await work(connection)
        except psycopg.Error as error:
            # a session that an administrator ended, as a server does that stops, has done nothing of this
            ended = isinstance(error, psycopg.errors.AdminShutdown)
            again = isinstance(error, RETRIED) or (attempt == 0 and (ended or is_stale(error)))
            if not again or attempt == attempts - 1:
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
