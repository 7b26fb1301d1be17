"""The one engine and its pool: vector types, transactions, and unwrapping of driver errors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psycopg
import psycopg.conninfo
import sqlalchemy
from pgvector.psycopg.vector import register_vector_info
from psycopg.types import TypeInfo
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, Pool

from pgshelf.errors import Problem
from pgshelf.settings import Settings
from pgshelf.timing import stage

DIALECT = "postgresql+psycopg://"
RETRIES = 3
T = TypeVar("T")
RETRIED = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
# What a connection answers whose server was migrated or demoted, or is another one, since it was opened.
STALE_STATES = {"25006", "26000", "3F000", "42704", "42883", "42P01", "42P05"}
STALE_MESSAGES = ("cache lookup failed", "cached plan must not change")
# The type is found by its extension: search_path says nothing about where pgvector lives.
VECTOR_TYPE = """
select n.nspname || '.' || t.typname, t.oid, t.typarray from pg_catalog.pg_type t
join pg_catalog.pg_namespace n on n.oid = t.typnamespace
join pg_catalog.pg_extension e on e.extname = 'vector' and e.extnamespace = t.typnamespace
where t.typname = 'vector'
"""
# Whoever may be the owner of the tables becomes it, for what is made must belong to the same role as all the rest.
# Tells who the owner is and whether the session is; nothing before the first migration.
BECOME_OWNER = """
select r.rolname, case when r.rolname = current_user then true when pg_has_role(session_user, r.oid, 'set')
  then set_config('role', r.rolname, false) is not null else false end
from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace and n.nspname = 'pgshelf'
join pg_catalog.pg_roles r on r.oid = c.relowner where c.relname = 'chunks'
"""


def dsn(url: str, **parameters: str | int) -> str:
    """A libpq connection string from any form of one; SQLAlchemy's `postgresql+psycopg://` is understood too."""
    return psycopg.conninfo.make_conninfo(url.replace("postgresql+psycopg://", "postgresql://", 1), **parameters)


def migration_engine(url: str) -> sqlalchemy.Engine:
    """One connection at a time, made for Alembic."""
    target = dsn(url, application_name="pgshelf migrate")
    return sqlalchemy.create_engine(DIALECT, creator=lambda: psycopg.connect(target), poolclass=NullPool)


def connect(url: str, name: str) -> psycopg.Connection[Any]:
    """A plain connection for commands that ask the server something; autocommit."""
    # the encoding is named lest a database that has none hand out bytes
    target = dsn(url, application_name=f"pgshelf {name}", connect_timeout=5, client_encoding="UTF8")
    return psycopg.connect(target, autocommit=True)


def make_engine(settings: Settings, url: str, *, owner: bool = False) -> AsyncEngine:
    """The pool of a serving process. Custom plans always: a generic one would lock every shelf.

    With `owner`, its sessions become the owner of the tables if they may.
    """
    options = (
        f"-c statement_timeout={int(settings.statement_timeout * 1000)}"
        f" -c lock_timeout={int(settings.lock_timeout * 1000)}"
        " -c plan_cache_mode=force_custom_plan -c jit=off -c idle_in_transaction_session_timeout=60000"
    )
    existing = psycopg.conninfo.conninfo_to_dict(dsn(url)).get("options")
    target = dsn(
        url,
        application_name="pgshelf serve",
        connect_timeout=settings.connect_timeout,
        options=f"{options} {existing}" if existing else options,
    )

    async def open_connection() -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(target)
        try:
            row = await (await connection.execute(VECTOR_TYPE)).fetchone()
            await connection.rollback()
            if owner:
                await connection.execute(BECOME_OWNER)
                await connection.commit()
        except BaseException:  # cancelled, too: nobody else knows this connection yet
            await connection.close()
            raise
        if row:  # absent before the first migration
            register_vector_info(connection, TypeInfo(*row))
        return connection

    engine = create_async_engine(
        DIALECT,
        async_creator=open_connection,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
        pool_pre_ping=True,
        pool_recycle=1800,
        hide_parameters=True,
    )
    _renew_when_stale(engine.pool)
    return engine


# How often the connections of a pool were found stale; one that is older than the last time is replaced when taken.
_renewals: WeakKeyDictionary[Pool, int] = WeakKeyDictionary()


def _renew_when_stale(pool: Pool) -> None:
    _renewals[pool] = 0

    def opened(_: Any, record: Any) -> None:
        record.info["renewal"] = _renewals[pool]

    def taken(_: Any, record: Any, __: Any) -> None:
        if record.info["renewal"] != _renewals[pool]:
            raise DisconnectionError("opened before the server changed")

    event.listen(pool, "connect", opened)
    event.listen(pool, "checkout", taken)


@asynccontextmanager
async def transaction(engine: AsyncEngine, *, single: bool = False) -> AsyncIterator[AsyncConnection]:
    """A transaction; what the driver raises comes out as it is, without SQLAlchemy's wrapping.

    A `single` statement is a transaction by itself and is spared the round trips of BEGIN and COMMIT.
    """
    single_engine = engine.execution_options(isolation_level="AUTOCOMMIT") if single else None
    try:
        with stage("sql"):
            async with single_engine.connect() if single_engine else engine.begin() as connection:
                yield connection
    except PoolTimeout:
        detail = f"No connection became free in time ({engine.pool.status()}). Try again, or raise PGSHELF_POOL_SIZE."
        raise Problem("pool_exhausted", detail) from None
    except (DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        if not isinstance(cause, psycopg.Error):
            raise
        if _is_stale(cause):
            _renewals[engine.pool] += 1
        raise cause from None


async def rows(connection: AsyncConnection, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement with %s placeholders on the driver's own connection, within the transaction."""
    driver = (await connection.get_raw_connection()).driver_connection
    assert isinstance(driver, psycopg.AsyncConnection)  # noqa: S101 - narrows the type: the engine is made for psycopg
    async with driver.cursor(binary=True) as cursor:
        await cursor.execute(statement.encode(), parameters)
        return await cursor.fetchall() if cursor.description else []


async def retried(engine: AsyncEngine, work: Callable[[AsyncConnection], Awaitable[T]], *, single: bool = False) -> T:
    """Do `work` in a transaction; after a deadlock, a serialization failure or a stale connection in another one."""
    for attempt in range(RETRIES):
        try:
            async with transaction(engine, single=single) as connection:
                return await work(connection)
        except psycopg.Error as error:
            again = isinstance(error, RETRIED) or (attempt == 0 and _is_stale(error))
            if not again or attempt == RETRIES - 1:
                raise
            await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311 - jitter, not a secret
    raise AssertionError("unreachable")


def _is_stale(error: psycopg.Error) -> bool:
    if error.sqlstate is None:  # the driver learned no vector type, when there was none yet
        return isinstance(error, psycopg.ProgrammingError)
    return error.sqlstate in STALE_STATES or str(error).startswith(STALE_MESSAGES)


async def run(engine: AsyncEngine, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run one statement of ours as a transaction of its own."""
    return await retried(engine, lambda connection: rows(connection, statement, *parameters), single=True)


class Beside:
    """One connection beside the pool, for a short question that each request asks before anything else.

    A question is one statement that may be carried out twice, so it is asked again where the connection was lost. Its
    plans are generic: they never touch the shelves.
    """

    def __init__(self, settings: Settings, url: str, name: str = "auth") -> None:
        self._target = dsn(
            url,
            application_name=f"pgshelf {name}",
            connect_timeout=settings.connect_timeout,
            options=f"-c statement_timeout={int(settings.statement_timeout * 1000)} -c jit=off"
            " -c plan_cache_mode=force_generic_plan",
        )
        self._patience = settings.pool_timeout
        self._turn = asyncio.Lock()
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def ask(self, question: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Run a statement by itself, in turn."""
        try:
            async with asyncio.timeout(self._patience):
                await self._turn.acquire()
        except TimeoutError:
            raise Problem("pool_exhausted", "The database is slow to say who may come in. Try again.") from None
        try:
            fresh = self._connection is None
            try:
                return await self._ask(question, parameters)
            except psycopg.Error as error:
                await self.close()
                if fresh or not (isinstance(error, psycopg.OperationalError) or _is_stale(error)):
                    raise
                return await self._ask(question, parameters)
        except BaseException:  # cancelled, too: what the connection is in the middle of, nobody knows
            await self.close()
            raise
        finally:
            self._turn.release()

    async def _ask(self, question: str, parameters: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
        if self._connection is None:
            self._connection = await psycopg.AsyncConnection.connect(self._target, autocommit=True)
        async with self._connection.cursor(binary=True) as cursor:
            await cursor.execute(question.encode(), parameters, prepare=True)
            return await cursor.fetchall()

    async def close(self) -> None:
        """Give the connection back; the next question opens another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def now() -> sqlalchemy.ColumnElement[Any]:
    """The transaction's time, by the database's clock."""
    return sqlalchemy.func.now()


def merge_patch(target: sqlalchemy.ColumnElement[Any], patch: Any) -> sqlalchemy.ColumnElement[Any]:
    """RFC 7396, by the function in sql/."""
    return sqlalchemy.func.pgshelf.merge_patch(target, sqlalchemy.cast(patch, JSONB))
