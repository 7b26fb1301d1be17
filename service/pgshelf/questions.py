"""Short questions that each request asks before anything else, on one connection beside the pool for all of a process.

Those that come while others are answered go to the server together, in libpq's pipeline mode: one round trip and one
transaction. psycopg's cursors would take as long as a question itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Sequence
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
MOST_TOGETHER = 100
Rows = list[tuple[Any, ...]]
Answer = asyncio.Future[Rows]
Key = tuple[str, tuple[int, ...]]  # a statement, and the types of its parameters


class Question:
    """A statement with its parameters, and who waits for its rows."""

    def __init__(self, key: Key, values: Sequence[Any], formats: Sequence[Format] | None, answer: Answer) -> None:
        self.key, self.values, self.formats, self.answer = key, values, formats, answer
        self.results: list[PGresult] = []
        self.commands = 0  # how many are still to be answered: to prepare it, and to carry it out
        self.prepares = False
        self.patience: asyncio.TimerHandle | None = None  # until it is sent

    def has(self, status: ExecStatus) -> PGresult | None:
        """A result of this kind."""
        return next((result for result in self.results if result.status == status), None)


class Line:
    """A connection in pipeline mode, which carries out a question at once, or behind those that are there already.

    `silence`: seconds without an answer after which the server is given up; `patience`: how long a question waits until
    it is sent; `most`: how many are sent together, in one transaction. Once the line has ended, all that were not
    answered have its error.
    """

    def __init__(self, connection: Connection, silence: float, patience: float, most: int) -> None:
        self.ended = False
        self._connection, self._pgconn = connection, connection.pgconn
        self._silence, self._patience, self._most = silence, patience, most
        self._loop = asyncio.get_running_loop()
        self._transformer = Transformer(connection)
        self._prepared: dict[Key, bytes] = {}
        self._numbers = itertools.count()
        self._asked: list[Question] = []  # with the server
        self._turn, self._began = 0, False  # whose results come, and whether some of its command have
        self._alone: deque[Question] = deque()  # sent with one that failed
        self._waiting: deque[Question] = deque()
        self._silent: asyncio.TimerHandle | None = None
        self._writing = False
        self._socket = self._pgconn.socket
        self._pgconn.nonblocking = 1
        self._pgconn.enter_pipeline_mode()
        self._loop.add_reader(self._socket, self._heard)

    async def ask(self, statement: str, parameters: tuple[Any, ...]) -> Rows:
        """The rows of a statement with $1 and so on."""
        if self.ended:
            raise psycopg.OperationalError("the connection was lost")
        values = self._transformer.dump_sequence(parameters, [PyFormat.AUTO] * len(parameters))
        key = statement, self._transformer.types or ()
        question = Question(key, values, self._transformer.formats, self._loop.create_future())
        if self._asked:
            question.patience = self._loop.call_later(self._patience, _give_up, question)
            self._waiting.append(question)
        else:
            self._send([question])
        try:
            return await question.answer
        except asyncio.CancelledError:
            if self._asked == [question]:  # the others shall not wait until it is done
                self.end(psycopg.OperationalError("a question was given up"))
            raise

    def _send(self, questions: list[Question]) -> None:
        self._asked, self._turn, self._began = questions, 0, False
        self._silent = self._loop.call_later(self._silence, self._connection.cut)
        try:
            for question in questions:
                if question.patience is not None:
                    question.patience.cancel()
                self._put(question)
            self._pgconn.pipeline_sync()
            self._flush()
        except psycopg.OperationalError as error:
            self.end(error)

    def _put(self, question: Question) -> None:
        question.results, question.commands = [], 1
        name = self._prepared.get(question.key)
        question.prepares = name is None
        if name is None:
            statement, types = question.key
            question.commands = 2
            name = self._prepared[question.key] = b"question_%d" % next(self._numbers)
            self._pgconn.send_prepare(name, statement.encode(), types)
        self._pgconn.send_query_prepared(name, question.values, question.formats, Format.BINARY)

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
            if result is None:  # behind the results of each command, and again where there is no more to read
                nothing += 1
                if self._began:
                    self._began = False
                    self._asked[self._turn].commands -= 1
                    self._turn += not self._asked[self._turn].commands
                continue
            nothing = 0
            if result.status == ExecStatus.PIPELINE_SYNC:
                self._answered()
            else:
                # what a server says that ends belongs to the last one, if all were carried out
                question = self._asked[min(self._turn, len(self._asked) - 1)]
                question.results.append(result)
                self._began = self._turn < len(self._asked)

    def _answered(self) -> None:
        """Tell the answers to all that were sent together, and send the next."""
        if self._silent is not None:
            self._silent.cancel()
        answered, self._asked = self._asked, []
        for question in answered:
            self._answer(question)
        self._waiting = deque(question for question in self._waiting if not question.answer.done())
        if self._alone:
            self._send([self._alone.popleft()])
        elif self._waiting:
            self._send([self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))])

    def _answer(self, question: Question) -> None:
        fault = self._fault(question)
        aborted = question.has(ExecStatus.PIPELINE_ABORTED) is not None
        if question.prepares and (fault is not None or aborted):
            self._prepared.pop(question.key, None)
        if question.answer.done():
            return
        if fault is not None:
            question.answer.set_exception(fault)
        elif aborted:  # another one is to blame
            self._alone.append(question)
        else:
            result = question.results[-1]
            try:
                self._transformer.set_pgresult(result)
                question.answer.set_result(self._transformer.load_rows(0, result.ntuples, tuple))
            except psycopg.Error as error:  # a value that the driver cannot read
                question.answer.set_exception(error)

    def _fault(self, question: Question) -> psycopg.Error | None:
        """What the server says against a question."""
        fault = question.has(ExecStatus.FATAL_ERROR)
        return None if fault is None else error_from_result(fault, self._transformer.encoding)

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
        for question in [*self._asked, *self._alone, *self._waiting]:
            if question.patience is not None:
                question.patience.cancel()
            if not question.answer.done():
                question.answer.set_exception(self._fault(question) or error)
        self._asked = []
        self._alone.clear()
        self._waiting.clear()


def _give_up(question: Question) -> None:
    if not question.answer.done():
        question.answer.set_exception(Problem("pool_exhausted", SLOW))


class Beside:
    """Answers questions, opens the connection for them, and asks again where it was lost.

    A question is one statement that may be carried out twice. Its plans are generic: they never touch the shelves.
    Questions that lock rows do not go together (`together=False`): two processes could then wait for each other.
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
        self._target = connections.serving_dsn(
            settings,
            url,
            f"pgshelf {name}",
            options=f"-c statement_timeout={int(settings.statement_timeout * 1000)} -c jit=off"
            " -c plan_cache_mode=force_generic_plan",
        )
        self._patience = settings.pool_timeout
        self._most = MOST_TOGETHER if together else 1
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
            self._line = Line(connection, self._silence, self._patience, self._most)
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
