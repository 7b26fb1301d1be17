"""The connection beside the pool: questions that wait go together, and none is answered for another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest

from pgshelf.errors import Problem
from pgshelf.questions import Beside
from pgshelf.settings import Settings

Make = Callable[..., Beside]
SLOW = "select pg_sleep(0.3), 0"
NUMBER = "select $1::int"
TRANSACTION = "select pg_current_xact_id()::text"


@pytest.fixture
async def make(database_url: str) -> AsyncIterator[Make]:
    made: list[Beside] = []

    def beside(together: bool = True, **settings: Any) -> Beside:
        made.append(Beside(Settings(**settings), database_url, "test", together=together))
        return made[-1]

    yield beside
    for each in made:
        await each.close()


async def behind(beside: Beside, *questions: tuple[Any, ...]) -> list[Any]:
    """What questions are answered that come while a slow one is; an exception where there is no answer."""
    first = asyncio.create_task(beside.ask(SLOW))
    await asyncio.sleep(0.1)
    answers = await asyncio.gather(*(beside.ask(*question) for question in questions), return_exceptions=True)
    await first
    return answers


async def test_each_gets_its_own_answer_and_its_own_error(make: Make) -> None:
    questions: list[tuple[Any, ...]] = [(NUMBER, n) for n in range(250)]
    questions[7:7] = [("select 1 / 0",), ("select 'x'::int",)]
    answers = await behind(make(), *questions)
    assert isinstance(answers.pop(7), psycopg.errors.DivisionByZero)
    assert isinstance(answers.pop(7), psycopg.errors.InvalidTextRepresentation)
    assert answers == [[(n,)] for n in range(250)]


async def test_a_statement_that_fails_leaves_its_name_to_no_other(make: Make) -> None:
    beside = make()
    assert await beside.ask("select 1") == [(1,)]
    line = beside._line
    for n in range(2, 5):
        with pytest.raises(psycopg.errors.DivisionByZero):
            await beside.ask("select 1 / ($1 - $1::int)", 0)
        with pytest.raises(psycopg.errors.SyntaxError):
            await beside.ask("selec 1")
        assert await beside.ask(f"select {n}") == [(n,)]
    assert beside._line is line  # nothing was wrong with the connection


async def test_they_go_together_unless_they_lock_rows(make: Make) -> None:
    for together, transactions in ((True, 1), (False, 5)):
        answers = await behind(make(together), *[(TRANSACTION,)] * 5)
        assert len({answer[0][0] for answer in answers}) == transactions


async def test_questions_may_be_larger_than_the_socket_takes(make: Make) -> None:
    beside, length = make(), "select length($1::text), $1::text"
    texts = [chr(97 + n) * 3_000_000 for n in range(5)]
    answers = await asyncio.gather(*(beside.ask(length, text) for text in texts))
    assert answers == [[(3_000_000, text)] for text in texts]


async def test_what_is_wrong_is_told_and_asked_again_when_it_is_not(make: Make, database_url: str) -> None:
    beside = make()
    with pytest.raises(psycopg.errors.UndefinedTable):
        await beside.ask("select n from public.questions")
    for asked in ((NUMBER, "a\0b"), ("select 'infinity'::date",)):  # what the driver cannot send, or read
        with pytest.raises(psycopg.DataError):
            await beside.ask(*asked)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("create table public.questions as select 7 as n")
        assert await beside.ask("select n from public.questions") == [(7,)]
        # what a plan was made for is another table now
        connection.execute("alter table public.questions alter n type text")
        assert await beside.ask("select n from public.questions") == [("7",)]


async def test_what_was_committed_before_is_seen(make: Make, database_url: str) -> None:
    """Also by one that waits: its snapshot is taken when it is carried out."""
    beside = make()
    names = "select count(*) from pgshelf.libraries"
    waiting = asyncio.create_task(behind(beside, (names,), (names,)))
    await asyncio.sleep(0.15)
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "insert into pgshelf.libraries (name, dimension, embedder, chunking)"
            """ values ('a', 2, '{"provider": "none", "dimension": 2}', '{"size": 500, "overlap": 0}')"""
        )
    late = await beside.ask(names)
    assert await waiting == [late, late] == [[(1,)], [(1,)]]


async def test_who_gives_up_leaves_the_others_their_answers(make: Make) -> None:
    beside = make()
    slow = asyncio.create_task(beside.ask(SLOW))
    await asyncio.sleep(0.1)
    asked = [asyncio.create_task(beside.ask(NUMBER, n)) for n in range(3)]
    await asyncio.sleep(0)
    slow.cancel()
    asked[1].cancel()
    answers = await asyncio.gather(slow, *asked, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError) and isinstance(answers[2], asyncio.CancelledError)
    assert (answers[1], answers[3]) == ([(0,)], [(2,)])


async def test_a_lost_connection_is_replaced_and_all_are_answered(make: Make, database_url: str) -> None:
    beside = make()
    assert await beside.ask(NUMBER, 1) == [(1,)]
    asked = asyncio.create_task(behind(beside, *[(NUMBER, n) for n in range(20)]))
    await asyncio.sleep(0.2)
    with psycopg.connect(database_url, autocommit=True) as connection:
        ended = """select pg_terminate_backend(pid) from pg_stat_activity
          where application_name = 'pgshelf test' and datname = current_database()"""
        assert connection.execute(ended).fetchall() == [(True,)]
    assert await asked == [[(n,)] for n in range(20)]


async def test_nobody_waits_for_ever(make: Make, database_url: str) -> None:
    [answer] = await behind(make(pool_timeout=0.1), (NUMBER, 1))
    assert isinstance(answer, Problem) and answer.code == "pool_exhausted"

    @contextlib.asynccontextmanager
    async def slowly() -> AsyncIterator[None]:
        await asyncio.sleep(0.3)
        yield

    beside = Beside(Settings(pool_timeout=0.1), database_url, "test", slowly)
    opener = asyncio.create_task(beside.ask(NUMBER, 1))
    await asyncio.sleep(0)
    with pytest.raises(Problem, match="slow to say"):
        await beside.ask(NUMBER, 2)
    assert await opener == [(1,)]
    await beside.close()


async def test_a_server_that_says_nothing_is_given_up(make: Make, database_url: str) -> None:
    beside = make(statement_timeout=600)
    assert await beside.ask(NUMBER, 1) == [(1,)]
    assert beside._line is not None
    beside._line._silence = 0.1
    with pytest.raises(psycopg.OperationalError):
        # asked again on a new connection, whose patience is the same
        beside._silence = 0.1
        await beside.ask("select pg_sleep(20)")
    assert await beside.ask(NUMBER, 2) == [(2,)]


async def test_what_is_asked_while_the_connection_is_given_back_is_asked_again(make: Make) -> None:
    beside = make()
    assert await beside.ask(NUMBER, 1) == [(1,)]
    slow = asyncio.create_task(beside.ask(SLOW))
    await asyncio.sleep(0.1)
    await beside.close()
    assert (await slow)[0][1] == 0
