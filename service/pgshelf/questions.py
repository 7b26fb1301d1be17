"""Short questions that each request asks before anything else, on one connection beside the pool for all of a process.

They go out as they come, in libpq's pipeline mode, and are answered in that order: none waits for another's round trip.
psycopg's cursors, which take turns, would take as long as a question itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from typing import Any

import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus, Format
from psycopg.pq.abc import PGresult

from pgshelf import connections
from pgshelf.connections import Connection, Opening
from pgshelf.errors import Problem
from pgshelf.settings import Settings

ATTEMPTS = 3
SLOW = "The database is slow to say who may come in. Try again."
Rows = list[tuple[Any, ...]]


class Question:
    """A statement that was sent, and who waits for its rows."""

    def __init__(self, answer: asyncio.Future[Rows]) -> None:
        self.answer = answer
        self.results: list[PGresult] = []
        self.prepares: Any = None  # the key of what it prepares first
        self.patience: asyncio.TimerHandle | None = None  # while it is not its turn


class Line:
    """A connection in pipeline mode: each question is a transaction of its own, carried out in its turn.

    `silence`: seconds without an answer after which the server is given up; `patience`: how long a question waits for
    its turn. Once it has ended, all that were not answered have its error.
    """

    def __init__(self, connection: Connection, silence: float, patience: float) -> None:
        self.ended = False
        self._connection, self._pgconn = connection, connection.pgconn
        self._silence, self._patience = silence, patience
        self._loop = asyncio.get_running_loop()
        self._transformer = Transformer(connection)
        self._prepared: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._numbers = itertools.count()
        self._asked: deque[Question] = deque()
        self._silent: asyncio.TimerHandle | None = None
        self._writing = False
        self._socket = self._pgconn.socket
        self._pgconn.nonblocking = 1
        self._pgconn.enter_pipeline_mode()
        self._loop.add_reader(self._socket, self._heard)

    async def ask(self, statement: str, parameters: tuple[Any, ...]) -> Rows:
        """The rows of a statement with $1 and so on."""
        question = Question(self._loop.create_future())
        try:
            self._send(question, statement, parameters)
        except psycopg.OperationalError as error:
            self.end(error)
            raise
        if self._asked:
            question.patience = self._loop.call_later(self._patience, _give_up, question)
        else:
            self._silent = self._loop.call_later(self._silence, self._connection.cut)
        self._asked.append(question)
        try:
            return await question.answer
        except asyncio.CancelledError:
            if not self.ended and self._asked and self._asked[0] is question:
                # the others shall not wait until it is done
                self.end(psycopg.OperationalError("a question was given up"))
            raise

    def _send(self, question: Question, statement: str, parameters: tuple[Any, ...]) -> None:
        values = self._transformer.dump_sequence(parameters, [PyFormat.AUTO] * len(parameters))
        key = statement, self._transformer.types or ()
        name = self._prepared.get(key)
        if name is None:
            name = self._prepared[key] = b"question_%d" % next(self._numbers)
            question.prepares = key
            self._pgconn.send_prepare(name, statement.encode(), key[1])
        self._pgconn.send_query_prepared(name, values, self._transformer.formats, Format.BINARY)
        self._pgconn.pipeline_sync()
        self._flush()

    def _flush(self) -> None:
        """Send what the socket takes; the rest when it takes more."""
        writing = bool(self._pgconn.flush())
        if writing and not self._writing:
            self._loop.add_writer(self._socket, self._flushed)
        elif self._writing and not writing:
            self._loop.remove_writer(self._socket)
        self._writing = writing

    def _flushed(self) -> None:
        try:
            self._flush()
        except psycopg.OperationalError as error:
            self.end(error)

    def _heard(self) -> None:
        try:
            self._pgconn.consume_input()
            self._read()
        except psycopg.OperationalError as error:
            self.end(error)

    def _read(self) -> None:
        nothing = 0
        while self._asked and nothing < 2 and not self._pgconn.is_busy():
            result = self._pgconn.get_result()
            if result is None:  # behind each result, and again where there is no more to read
                nothing += 1
                continue
            nothing = 0
            if result.status == ExecStatus.PIPELINE_SYNC:
                self._answer(self._asked.popleft())
            else:
                self._asked[0].results.append(result)

    def _answer(self, question: Question) -> None:
        if self._silent is not None:
            self._silent.cancel()
        self._silent = None
        if self._asked:
            self._silent = self._loop.call_later(self._silence, self._connection.cut)
            if (waited := self._asked[0].patience) is not None:
                waited.cancel()
        fault = self._fault(question)
        if fault is not None and question.prepares is not None:
            self._prepared.pop(question.prepares, None)
        if question.answer.done():
            return
        if fault is not None:
            question.answer.set_exception(fault)
            return
        result = question.results[-1]
        try:
            self._transformer.set_pgresult(result)
            question.answer.set_result(self._transformer.load_rows(0, result.ntuples, tuple))
        except psycopg.Error as error:  # a value that the driver cannot read
            question.answer.set_exception(error)

    def _fault(self, question: Question) -> psycopg.Error | None:
        """What the server says against a question."""
        faults = (result for result in question.results if result.status == ExecStatus.FATAL_ERROR)
        return next((error_from_result(result, self._transformer.encoding) for result in faults), None)

    def cut(self) -> None:
        """End it at once, from outside."""
        self._connection.cut()

    def end(self, error: psycopg.Error) -> None:
        """Give the connection up; whoever waits for an answer gets the error, or what the server said last."""
        if self.ended:
            return
        self.ended = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        if self._silent is not None:
            self._silent.cancel()
        self._pgconn.finish()
        for question in self._asked:
            if question.patience is not None:
                question.patience.cancel()
            if not question.answer.done():
                question.answer.set_exception(self._fault(question) or error)
        self._asked.clear()


def _give_up(question: Question) -> None:
    if not question.answer.done():
        question.answer.set_exception(Problem("pool_exhausted", SLOW))


class Beside:
    """Answers questions, opens the connection for them, and asks again where it was lost.

    A question is one statement that may be carried out twice. Its plans are generic: they never touch the shelves.
    """

    def __init__(
        self, settings: Settings, url: str, name: str = "auth", opening: Opening = contextlib.nullcontext
    ) -> None:
        self._opening = opening
        self._silence = settings.replica_timeout if settings.replica_url else settings.statement_timeout + 5
        self._target = connections.serving_dsn(
            settings,
            url,
            f"pgshelf {name}",
            options=f"-c statement_timeout={int(settings.statement_timeout * 1000)} -c jit=off"
            " -c plan_cache_mode=force_generic_plan",
        )
        self._patience = settings.pool_timeout
        self._line: Line | None = None
        self._turn = asyncio.Lock()

    async def ask(self, statement: str, *parameters: Any) -> Rows:
        """The rows of a statement with $1 and so on, which sees whatever was committed before it was asked."""
        for left in reversed(range(ATTEMPTS)):
            line, fresh = self._line, False
            if line is None or line.ended:
                line, fresh = await self._opened()
            try:
                return await line.ask(statement, parameters)
            except psycopg.Error as error:
                if fresh or not left or not (connections.is_lost(error) or connections.is_stale(error)):
                    raise
                line.end(error)  # what the server is by now, another connection tells
        raise AssertionError("unreachable")

    async def _opened(self) -> tuple[Line, bool]:
        """A line, and whether it was opened just now: one of those that want it opens it."""
        try:
            async with asyncio.timeout(self._patience) as limit:
                await self._turn.acquire()
        except TimeoutError:
            if not limit.expired():
                raise
            raise Problem("pool_exhausted", SLOW) from None
        try:
            if self._line is not None and not self._line.ended:
                return self._line, False
            connection = await connections.opened(self._target, self._opening, autocommit=True)
            self._line = Line(connection, self._silence, self._patience)
            return self._line, True
        finally:
            self._turn.release()

    def cut(self) -> None:
        """End questions that the server does not answer."""
        if self._line is not None:
            self._line.cut()

    async def close(self) -> None:
        """Give the connection back; the next question opens another one."""
        line, self._line = self._line, None
        if line is not None:
            line.end(psycopg.OperationalError("the connection was closed"))
