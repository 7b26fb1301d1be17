"""The one engine and its pool: vector types, transactions, and unwrapping of driver errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import select
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

import msgspec
import psycopg
import psycopg.conninfo
import sqlalchemy
from pgvector.psycopg.vector import register_vector_info
from psycopg.types import TypeInfo
from psycopg.types.json import set_json_loads
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, DisconnectionError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, Pool, QueuePool

from pgshelf.consistency import Position, committed
from pgshelf.errors import Problem
from pgshelf.settings import Settings
from pgshelf.timing import stage

DIALECT = "postgresql+psycopg://"
RETRIES = 3
RETURNS = 5.0  # seconds for connections to come back when a pool is closed
IDLE = 30.0  # seconds after which a connection is asked whether it still works
T = TypeVar("T")
RETRIED = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
# What a connection answers whose server was migrated or demoted, or is another one, since it was opened.
STALE_STATES = {"25006", "26000", "3F000", "42704", "42883", "42P01", "42P05"}
STALE_MESSAGES = ("cache lookup failed", "cached plan must not change")
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
SYSTEM = "select system_identifier from pg_catalog.pg_control_system()"
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


class Connection(psycopg.AsyncConnection[Any]):
    """A connection of a pool, and what is known of its server."""

    system: int | None = None  # the cluster, where clients are told how far their writes are
    seen: Position | None = None  # of a standby: how far it had replayed when it was last asked
    unconfirmed = False  # a commit that no standby confirmed has gone through
    patience = 30.0  # seconds that a commit may wait for standbys

    def heed(self, notice: psycopg.errors.Diagnostic) -> None:
        """Remember that the wait for a standby was cut short: what was committed may be lost with this server."""
        # the function's name, for the message is in the server's language
        self.unconfirmed |= notice.source_function == "SyncRepWaitForLSN"

    # SQLAlchemy sets these of a connection that it takes out of its pool, and loses it where that is cancelled
    async def set_autocommit(self, value: bool) -> None:
        """Without giving way to others, as psycopg does on a busy loop: it asks the server nothing."""
        _at_once(super().set_autocommit(value))

    async def set_isolation_level(self, value: psycopg.IsolationLevel | None) -> None:
        """Likewise."""
        _at_once(super().set_isolation_level(value))

    def cut(self) -> None:
        """End it at once, from outside: whoever waits for its answer learns that it is lost."""
        with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.fileno())) as beside:
            beside.shutdown(socket.SHUT_RDWR)


def _at_once(work: Coroutine[Any, Any, None]) -> None:
    try:
        while work.send(None) is None:
            pass
    except StopIteration:
        return
    finally:
        work.close()
    raise RuntimeError("somebody else uses the connection")


def migration_engine(url: str) -> sqlalchemy.Engine:
    """One connection at a time, made for Alembic."""
    target = dsn(url, application_name="pgshelf migrate")
    return sqlalchemy.create_engine(DIALECT, creator=lambda: psycopg.connect(target), poolclass=NullPool)


def connect(url: str, name: str) -> psycopg.Connection[Any]:
    """A plain connection for commands that ask the server something; autocommit."""
    # the encoding is named lest a database that has none hand out bytes
    target = dsn(url, application_name=f"pgshelf {name}", connect_timeout=5, client_encoding="UTF8")
    return psycopg.connect(target, autocommit=True)


def serving_dsn(settings: Settings, url: str, name: str, **parameters: str | int) -> str:
    """The connection string of a serving process; of several hosts the one that takes writes is wanted.

    A server that has vanished without a word is noticed within seconds.
    """
    known = psycopg.conninfo.conninfo_to_dict(dsn(url))
    lively: dict[str, str | int] = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
    lively["tcp_user_timeout"] = 15_000
    if "," in str(known.get("host") or known.get("hostaddr") or ""):
        lively["target_session_attrs"] = "read-write"
    given = {key: value for key, value in lively.items() if key not in known}
    return dsn(url, application_name=name, connect_timeout=settings.connect_timeout, **given, **parameters)


Opening = Callable[[], AbstractAsyncContextManager[Any]]  # around the making of a connection; may refuse or end it


async def opened(target: str, opening: Opening = contextlib.nullcontext, *, autocommit: bool = False) -> Connection:
    """A new connection, unless `opening` has something against it."""
    connection: Connection | None = None
    try:
        async with opening():
            connection = await Connection.connect(target, autocommit=autocommit)
    except BaseException:
        if connection is not None:  # made a moment before it was given up
            connection.pgconn.finish()
        raise
    return connection


def make_engine(
    settings: Settings,
    url: str,
    opening: Opening = contextlib.nullcontext,
    *,
    owner: bool = False,
    cursor: type[psycopg.AsyncCursor[Any]] = psycopg.AsyncCursor,
) -> AsyncEngine:
    """The pool of a serving process. Custom plans always: a generic one would lock every shelf.

    With `owner`, its sessions become the owner of the tables if they may.
    """
    options = (
        f"-c statement_timeout={int(settings.statement_timeout * 1000)}"
        f" -c lock_timeout={int(settings.lock_timeout * 1000)}"
        " -c plan_cache_mode=force_custom_plan -c jit=off -c idle_in_transaction_session_timeout=60000"
    )
    existing = psycopg.conninfo.conninfo_to_dict(dsn(url)).get("options")
    target = serving_dsn(settings, url, "pgshelf serve", options=f"{options} {existing}" if existing else options)

    async def open_connection() -> psycopg.AsyncConnection[Any]:
        connection = await opened(target, opening)
        connection.patience = settings.statement_timeout
        connection.add_notice_handler(connection.heed)
        try:
            if settings.tokens:
                [connection.system] = await (await connection.execute(SYSTEM)).fetchone() or [None]
            row = await (await connection.execute(VECTOR_TYPE)).fetchone()
            await connection.rollback()
            if owner:
                await connection.execute(BECOME_OWNER)
                await connection.commit()
        except BaseException:  # cancelled, too: nobody else knows this connection yet
            await connection.close()
            raise
        connection.cursor_factory = cursor
        set_json_loads(_decoded, connection)
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
    _ping_when_in_doubt(engine)
    return engine


def _decoded(text: str | bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # jsonb holds numbers that are no double
        return json.loads(text)


def _ping_when_in_doubt(engine: AsyncEngine) -> None:
    """Ask a connection whether it works only where that is in doubt: it was idle, or the server has said something.

    Who ends a session says so, and the kernel closes its socket: a look at that takes a microsecond, a round trip is a
    tenth of a short search. pgx and Go's driver for MySQL do the same.
    """
    used = WeakKeyDictionary[Any, float]()
    ping = engine.dialect.do_ping

    def returned(adapted: Any, _: Any) -> None:
        if adapted is not None:  # it was not invalidated
            used[adapted.driver_connection] = time.monotonic()

    def do_ping(adapted: Any) -> bool:
        driver = adapted.driver_connection
        fresh = time.monotonic() - used.get(driver, -IDLE) < IDLE
        return (fresh and not driver.closed and not _has_news(driver.fileno())) or bool(ping(adapted))

    event.listen(engine.pool, "checkin", returned)
    engine.dialect.do_ping = do_ping  # type: ignore[assignment, method-assign]  # of this engine's own dialect


def _has_news(socket: int) -> bool:
    poll = select.poll()
    poll.register(socket, select.POLLIN)
    return bool(poll.poll(0))


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
        if _is_stale(cause):
            renew(engine)
        if message := cause.diag.message_primary:
            cause.args = (message,)  # whoever logs it shall not log the DETAIL, which may hold a whole row
        raise cause from None


async def close(engine: AsyncEngine) -> None:
    """Close a pool. What was cancelled a moment ago gives its connection back first, or nobody would close that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RETURNS):
            while cast(QueuePool, engine.pool).checkedout():  # noqa: ASYNC110 - a pool has no event for it
                await asyncio.sleep(0.01)
    await engine.dispose()


def renew(engine: AsyncEngine) -> None:
    """Replace all connections of a pool, each when it is next taken."""
    _renewals[engine.pool] += 1


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


def is_lost(error: BaseException | None) -> bool:
    """Whether the connection is gone, or there was none."""
    if not isinstance(error, psycopg.OperationalError):
        return False
    state = error.sqlstate
    return state is None or state[:2] == "08" or state in ("53300", "57P01", "57P02", "57P03", "57P05")


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
            again = isinstance(error, RETRIED) or (attempt == 0 and (ended or _is_stale(error)))
            if not again or attempt == RETRIES - 1:
                raise
            await asyncio.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311 - jitter, not a secret
    raise AssertionError("unreachable")


def _is_stale(error: psycopg.Error) -> bool:
    if error.sqlstate is None:  # the driver learned no vector type, when there was none yet
        return isinstance(error, psycopg.ProgrammingError)
    return error.sqlstate in STALE_STATES or str(error).startswith(STALE_MESSAGES)


async def run(source: Source, statement: str, *parameters: Any, written: bool = False) -> list[tuple[Any, ...]]:
    """Run one statement of ours as a transaction of its own."""
    return await retried(
        source, lambda connection: rows(connection, statement, *parameters), single=True, written=written
    )


class Beside:
    """One connection beside the pool, for a short question that each request asks before anything else.

    A question is one statement that may be carried out twice, so it is asked again where the connection was lost. Its
    plans are generic: they never touch the shelves.
    """

    def __init__(
        self, settings: Settings, url: str, name: str = "auth", opening: Opening = contextlib.nullcontext
    ) -> None:
        self._opening = opening
        self._silence = settings.replica_timeout if settings.replica_url else settings.statement_timeout + 5
        self._target = serving_dsn(
            settings,
            url,
            f"pgshelf {name}",
            options=f"-c statement_timeout={int(settings.statement_timeout * 1000)} -c jit=off"
            " -c plan_cache_mode=force_generic_plan",
        )
        self._patience = settings.pool_timeout
        self._turn = asyncio.Lock()
        self._connection: Connection | None = None

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
            self._connection = await opened(self._target, self._opening, autocommit=True)
        # who says nothing is not waited for; a question that is cancelled would wait, for the server to say so
        silence = asyncio.get_running_loop().call_later(self._silence, self._connection.cut)
        try:
            async with self._connection.cursor(binary=True) as cursor:
                await cursor.execute(question.encode(), parameters, prepare=True)
                return await cursor.fetchall()
        finally:
            silence.cancel()

    def cut(self) -> None:
        """End a question that the server does not answer."""
        if self._connection is not None:
            self._connection.cut()

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
