"""Single connections: how one is addressed, opened and cut, and what its errors say of it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import socket
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import psycopg
import psycopg.conninfo

from pgshelf.consistency import Position
from pgshelf.errors import Problem
from pgshelf.settings import Settings

# What a connection answers whose server was migrated or demoted, or is another one, since it was opened.
STALE_STATES = {"25006", "26000", "3F000", "42704", "42883", "42P01", "42P05"}
STALE_MESSAGES = ("cache lookup failed", "cached plan must not change")
MOST_TOGETHER = 100  # questions in one round trip


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


def is_lost(error: BaseException | None) -> bool:
    """Whether the connection is gone, or there was none."""
    if not isinstance(error, psycopg.OperationalError):
        return False
    state = error.sqlstate
    return state is None or state[:2] == "08" or state in ("53300", "57P01", "57P02", "57P03", "57P05")


def is_stale(error: psycopg.Error) -> bool:
    """Whether the server has changed under the connection, so that a new one may fare better."""
    if error.sqlstate is None:  # the driver learned no vector type, when there was none yet
        return isinstance(error, psycopg.ProgrammingError)
    return error.sqlstate in STALE_STATES or str(error).startswith(STALE_MESSAGES)


Rows = list[tuple[Any, ...]]


@dataclass(eq=False)
class _Question:
    statement: str
    parameters: Mapping[str, Any] | None
    answer: asyncio.Future[Rows]
    limit: asyncio.Timeout  # for it to be sent


class Beside:
    """One connection beside the pool, for a short question that each request asks before anything else.

    Questions that come while others are answered go to the server together, in one round trip, unless they lock rows
    (`together=False`): two processes could then wait for each other. A question is one statement that may be carried
    out twice, so it is asked again where the connection was lost. Its plans are generic: they never touch the shelves.
    """

    def __init__(
        self,
        settings: Settings,
        url: str,
        name: str = "auth",
        opening: Opening = contextlib.nullcontext,
        *,
        together: bool = True,
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
        self._most = MOST_TOGETHER if together else 1
        self._busy = False
        self._waiting: list[_Question] = []
        self._others: asyncio.Task[None] | None = None  # answers those that waited
        self._connection: Connection | None = None

    async def ask(self, question: str, parameters: Mapping[str, Any] | None = None) -> Rows:
        """The rows of a statement, which sees whatever was committed before it was asked."""
        if self._busy:
            return await self._wait(question, parameters)
        self._busy = True
        try:
            [answer] = await self._answers([(question, parameters)])
        finally:
            self._busy = bool(self._waiting)
            if self._busy:  # a task of its own, no part of any request
                self._others = asyncio.create_task(self._answer_others(), context=contextvars.Context())
        if isinstance(answer, psycopg.Error):
            raise answer
        return answer

    async def _wait(self, question: str, parameters: Mapping[str, Any] | None) -> Rows:
        answer: asyncio.Future[Rows] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._patience) as limit:
                self._waiting.append(_Question(question, parameters, answer, limit))
                return await answer
        except TimeoutError:
            if not limit.expired():
                raise
            raise Problem("pool_exhausted", "The database is slow to say who may come in. Try again.") from None

    async def _answer_others(self) -> None:
        asked: list[_Question] = []
        try:
            while self._waiting:
                taken, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                asked = [each for each in taken if not each.answer.done()]
                for each in asked:
                    each.limit.reschedule(None)
                answers = await self._answers([(each.statement, each.parameters) for each in asked])
                for each, answer in zip(asked, answers, strict=True):
                    if each.answer.done():
                        continue
                    if isinstance(answer, psycopg.Error):
                        each.answer.set_exception(answer)
                    else:
                        each.answer.set_result(answer)
        except BaseException as error:
            ended, self._waiting = [*asked, *self._waiting], []
            for each in ended:
                if not each.answer.done():
                    each.answer.set_exception(psycopg.OperationalError(f"not asked: {error!r}"))
            if not isinstance(error, Exception):
                raise
        finally:
            self._busy = False

    async def _answers(self, asked: list[tuple[str, Mapping[str, Any] | None]]) -> list[Rows | psycopg.Error]:
        """What each is answered, or why it is not."""
        if not asked:
            return []
        fresh = self._connection is None
        try:
            return [*await self._send(asked)]
        except psycopg.Error as error:
            await self.close()
            lost = isinstance(error, psycopg.OperationalError) or is_stale(error)
            if lost and not fresh:
                return await self._answers(asked)
            if len(asked) > 1 and not lost:  # one of them is to blame
                return [answer for each in asked for answer in await self._answers([each])]
            return [error] * len(asked)
        except BaseException:  # cancelled, too: what the connection is in the middle of, nobody knows
            await self.close()
            raise

    async def _send(self, asked: list[tuple[str, Mapping[str, Any] | None]]) -> list[Rows]:
        if self._connection is None:
            self._connection = await opened(self._target, self._opening, autocommit=True)
        # who says nothing is not waited for; a question that is cancelled would wait, for the server to say so
        silence = asyncio.get_running_loop().call_later(self._silence, self._connection.cut)
        cursors = [self._connection.cursor(binary=True) for _ in asked]
        try:
            async with self._connection.pipeline() if len(asked) > 1 else contextlib.nullcontext():
                for cursor, (statement, parameters) in zip(cursors, asked, strict=True):
                    await cursor.execute(statement.encode(), parameters, prepare=True)
            return [await cursor.fetchall() for cursor in cursors]
        finally:
            silence.cancel()

    def cut(self) -> None:
        """End questions that the server does not answer."""
        if self._connection is not None:
            self._connection.cut()

    async def close(self) -> None:
        """Give the connection back; the next question opens another one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
