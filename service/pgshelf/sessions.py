"""A session of the reconciler at PostgreSQL: what it runs there, its locks, and what it waits for.

Locks of the session: one for each library that is moved or whose index is built, one for building (one build at a time
in a database: each takes the memory it was given), one for sweeping. They die with it, so the connection must be a
session of its own: no transaction pooler in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import psycopg

from pgshelf import connections, pools
from pgshelf.settings import Settings

MOVER = 0x6D6F76  # "mov", with the hash of a library
SHELVES = 0x73686C  # "shl", with one of these two
BUILD, SWEEP = 1, 2

FENCE_ATTEMPTS = 600


class Pace(msgspec.Struct, frozen=True):
    """How long the reconciler waits, in seconds; tests shorten it."""

    grace: float = 60.0  # a search that was prepared for a shelf has begun by then
    sweep: float = 5.0
    retry: float = 2.0  # after the first failure, doubled with each, five minutes at most
    patience: float = 10.0  # for the last vectors of another embedder, before a few may wait for theirs
    despair: float = 600.0  # before a move to the vectors of another embedder is given up, to be tried again


UNHURRIED = Pace()


class Gone(Exception):
    """The library was deleted, or is wanted elsewhere by now: what was begun is given up without a word."""


Step = Callable[[str], Awaitable[None]]


async def no_step(_: str) -> None: ...


class Session:
    """One session. `step` is told the name of each step of the work when it is done: tests die there."""

    def __init__(
        self,
        connection: psycopg.AsyncConnection[Any],
        settings: Settings,
        pace: Pace = UNHURRIED,
        step: Step = no_step,
    ) -> None:
        self.connection, self.settings, self.pace, self.step = connection, settings, pace, step

    async def rows(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement with %s placeholders, and fetch what it answers."""
        cursor = await self.connection.execute(statement.encode(), parameters or None)
        return await cursor.fetchall()

    async def run(self, statement: str, *parameters: Any) -> None:
        """Run a statement with %s placeholders."""
        await self.connection.execute(statement.encode(), parameters or None)

    async def fenced(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run one of the fences, again and again while writers hold it off, ever more rarely."""
        for attempt in range(FENCE_ATTEMPTS):
            with contextlib.suppress(psycopg.errors.LockNotAvailable):
                return await self.rows(statement, *parameters)
            await asyncio.sleep(random.uniform(0.5, 1) * min(1.0, 0.02 * 1.3**attempt))  # noqa: S311 - jitter
        return await self.rows(statement, *parameters)

    async def patient(self, statement: str, wait: str) -> None:
        """Run DDL that others may hold off, without making those queue for long that come behind it."""
        for attempt in range(FENCE_ATTEMPTS):
            with contextlib.suppress(psycopg.errors.LockNotAvailable):
                return await self.waiting(statement, wait)
            await asyncio.sleep(random.uniform(0.5, 1) * min(2.0, 0.1 * 1.3**attempt))  # noqa: S311 - jitter
        await self.waiting(statement, wait)

    async def waiting(self, statement: str, wait: str) -> None:
        """Run DDL that waits for locks no longer than `wait`, such as "5s"; else LockNotAvailable."""
        await self.run(f"set lock_timeout = '{wait}'")
        try:
            await self.run(statement)
        finally:
            if not self.connection.closed:
                await self.run("reset lock_timeout")

    @contextlib.asynccontextmanager
    async def beside(self) -> AsyncIterator[Session]:
        """Another session, for work that two processors shall share; it holds none of the locks."""
        async with await connect(self.settings) as connection:
            yield Session(connection, self.settings, self.pace, self.step)

    @contextlib.asynccontextmanager
    async def lock(self, call: str, *key: Any) -> AsyncIterator[bool]:
        """Try a lock of the session; what the block gets says whether it is ours."""
        [(mine,)] = await self.rows(f"select {call}", *key)
        try:
            yield mine
        finally:
            if mine and not self.connection.closed:
                await self.run(f"select {call.replace('pg_try_advisory_lock', 'pg_advisory_unlock')}", *key)


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
