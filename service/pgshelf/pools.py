"""The one engine and its pool: what each session is set to, and when a connection is asked or replaced."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import time
from typing import Any, cast
from weakref import WeakKeyDictionary

import msgspec
import psycopg
import psycopg.conninfo
import sqlalchemy
from pgvector.psycopg.vector import register_vector_info
from psycopg.types import TypeInfo
from psycopg.types.json import set_json_loads
from sqlalchemy import event
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import NullPool, Pool, QueuePool
from sqlalchemy.util.concurrency import greenlet_spawn

from pgshelf.connections import Opening, dsn, opened, serving_dsn
from pgshelf.doubles import double, integer
from pgshelf.settings import Settings

DIALECT = "postgresql+psycopg://"
ASYNC_DIALECT = "postgresql+psycopg_async://"
RETURNS = 5.0  # seconds for connections to come back when a pool is closed
IDLE = 30.0  # seconds after which a connection is asked whether it still works
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


def migration_engine(url: str) -> sqlalchemy.Engine:
    """One connection at a time, made for Alembic."""
    target = dsn(url, application_name="pgshelf migrate")
    return sqlalchemy.create_engine(DIALECT, creator=lambda: psycopg.connect(target), poolclass=NullPool)


def make_engine(
    settings: Settings,
    url: str,
    opening: Opening = contextlib.nullcontext,
    *,
    owner: bool = False,
    cursor: type[psycopg.AsyncCursor[Any]] = psycopg.AsyncCursor,
) -> sqlalchemy.Engine:
    """The pool of a serving process. Custom plans always: a generic one would lock every shelf.

    With `owner`, its sessions become the owner of the tables if they may.
    """
    target = serving_dsn(settings, url, "pgshelf serve", options=_options(settings, url))

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

    def connect() -> Any:
        return cast(Any, engine.dialect.dbapi).connect(async_creator_fn=open_connection)

    # what SQLAlchemy's asyncio package would make, without that package, which imports the whole ORM
    engine: sqlalchemy.Engine = sqlalchemy.create_engine(
        ASYNC_DIALECT,
        creator=connect,
        pool_size=settings.pool_size,
        max_overflow=0,
        pool_timeout=settings.pool_timeout,
        pool_pre_ping=True,
        pool_recycle=1800,
        hide_parameters=True,
        pool_use_lifo=True,  # a session that has just worked is warm
        pool_reset_on_return=None,  # database.py gives back none with a transaction
    )
    _renew_when_stale(engine.pool)
    _ping_when_in_doubt(engine)
    return engine


def _options(settings: Settings, url: str) -> str:
    """What each session is set to; what the address says of its own comes behind, and wins."""
    options = (
        f"-c statement_timeout={int(settings.statement_timeout * 1000)}"
        f" -c lock_timeout={int(settings.lock_timeout * 1000)}"
        " -c plan_cache_mode=force_custom_plan -c jit=off -c idle_in_transaction_session_timeout=60000"
        " -c standard_conforming_strings=on"
    )
    existing = psycopg.conninfo.conninfo_to_dict(dsn(url)).get("options")
    return f"{options} {existing}" if existing else options


def _decoded(text: str | bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:  # jsonb holds numbers of any length
        return json.loads(text, parse_int=integer, parse_float=double)


def _ping_when_in_doubt(engine: sqlalchemy.Engine) -> None:
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


async def close(engine: sqlalchemy.Engine) -> None:
    """Close a pool. What was cancelled a moment ago gives its connection back first, or nobody would close that."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RETURNS):
            while cast(QueuePool, engine.pool).checkedout():  # noqa: ASYNC110 - a pool has no event for it
                await asyncio.sleep(0.01)
    await greenlet_spawn(engine.dispose)


def renew(engine: sqlalchemy.Engine) -> None:
    """Replace all connections of a pool, each when it is next taken."""
    _renewals[engine.pool] += 1
