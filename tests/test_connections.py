"""The connection beside the pool: questions that wait go together, and none is answered for another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest

from pgshelf.connections import Beside
from pgshelf.errors import Problem
from pgshelf.settings import Settings

Make = Callable[..., Beside]
SLOW = "select pg_sleep(0.3), 0"
NUMBER = "select %(n)s::int"
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


async def behind(beside: Beside, *questions: tuple[str, dict[str, Any] | None]) -> list[Any]:
    """What questions are answered that come while a slow one is; an exception where there is no answer."""
    first = asyncio.create_task(beside.ask(SLOW))
    await asyncio.sleep(0.1)
    answers = await asyncio.gather(*(beside.ask(*question) for question in questions), return_exceptions=True)
    await first
    return answers


async def test_each_gets_its_own_answer_and_its_own_error(make: Make) -> None:
    questions: list[tuple[str, dict[str, Any] | None]] = [(NUMBER, {"n": n}) for n in range(250)]
    questions[7:7] = [("select 1 / 0", None), ("select 'x'::int", None)]
    answers = await behind(make(), *questions)
    assert isinstance(answers.pop(7), psycopg.errors.DivisionByZero)
    assert isinstance(answers.pop(7), psycopg.errors.InvalidTextRepresentation)
    assert answers == [[(n,)] for n in range(250)]


async def test_they_go_together_unless_they_lock_rows(make: Make) -> None:
    for together, transactions in ((True, 1), (False, 5)):
        answers = await behind(make(together), *[(TRANSACTION, None)] * 5)
        assert len({answer[0][0] for answer in answers}) == transactions


async def test_what_was_committed_before_is_seen(make: Make, database_url: str) -> None:
    """Also by one that waits: its snapshot is taken when it is carried out."""
    beside = make()
    names = "select count(*) from pgshelf.libraries"
    waiting = asyncio.create_task(behind(beside, (names, None), (names, None)))
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
    asked = [asyncio.create_task(beside.ask(NUMBER, {"n": n})) for n in range(3)]
    await asyncio.sleep(0)
    slow.cancel()
    asked[1].cancel()
    answers = await asyncio.gather(slow, *asked, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError) and isinstance(answers[2], asyncio.CancelledError)
    assert (answers[1], answers[3]) == ([(0,)], [(2,)])


async def test_a_lost_connection_is_replaced_and_all_are_answered(make: Make, database_url: str) -> None:
    beside = make()
    assert await beside.ask(NUMBER, {"n": 1}) == [(1,)]
    asked = asyncio.create_task(behind(beside, *[(NUMBER, {"n": n}) for n in range(20)]))
    await asyncio.sleep(0.2)
    with psycopg.connect(database_url, autocommit=True) as connection:
        ended = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'pgshelf test'"
        assert connection.execute(ended).fetchall() == [(True,)]
    assert await asked == [[(n,)] for n in range(20)]


async def test_nobody_waits_for_ever(make: Make) -> None:
    [answer] = await behind(make(pool_timeout=0.1), (NUMBER, {"n": 1}))
    assert isinstance(answer, Problem) and answer.code == "pool_exhausted"
