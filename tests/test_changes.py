"""The change feed under writers that commit and roll back, in SQL: what REST says of it is in rest/test_changes.py."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from pgshelf import pools, worker
from tests.conftest import LiveServer, MakeLiveServer
from tests.soak.feed import follow

Connection = psycopg.Connection[Any]
STAMP = "select pgshelf.stamp_changes((select id from pgshelf.libraries), %s)"
PUT = """select pgshelf.put_document('notes', key => %s, texts => array['text'],
  embeddings => array[cast('[1,0]' as vector)])"""
READ = "select position, key from pgshelf.changes('notes')"


@pytest.mark.unwatched
def test_sixteen_writers_and_a_reader_that_misses_and_repeats_nothing(
    database_url: str, make_live_server: MakeLiveServer
) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    server: LiveServer = make_live_server(database_url)
    print(follow(database_url, server.url, seed, 5))


@pytest.fixture
def sessions(database_url: str) -> Iterator[list[Connection]]:
    """Three sessions on a database with one library."""
    made = [psycopg.connect(database_url, autocommit=True) for _ in range(3)]
    made[0].execute(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking, index)
        values ('notes', 2, '{"provider": "none"}', '{}', '{"type": "auto"}')"""
    )
    yield made
    for each in made:
        each.close()


def test_what_is_not_committed_has_no_position_and_holds_back_nobody(sessions: list[Connection]) -> None:
    slow, fast, reader = sessions
    slow.execute("begin")
    slow.execute(PUT, ["slow"])
    fast.execute(PUT, ["fast"])
    assert reader.execute(READ).fetchall() == []  # nobody has given positions yet
    assert reader.execute(STAMP, [False]).fetchone() == (1,)
    assert reader.execute(READ).fetchall() == [(1, "fast")]
    slow.execute("commit")
    assert reader.execute(STAMP, [False]).fetchone() == (1,)
    assert reader.execute(READ).fetchall() == [(1, "fast"), (2, "slow")]
    assert reader.execute(STAMP, [False]).fetchone() == (0,)


def test_one_gives_positions_at_a_time(sessions: list[Connection]) -> None:
    holder, other, writer = sessions
    writer.execute(PUT, ["a"])
    holder.execute("begin")
    assert holder.execute(STAMP, [False]).fetchone() == (1,)
    writer.execute(PUT, ["b"])
    assert other.execute(STAMP, [False]).fetchone() == (0,)
    assert other.execute("show lock_timeout").fetchone() == ("0",)
    assert other.execute(STAMP, [True]).fetchone() == (0,)  # it waits for a moment only
    assert other.execute("show lock_timeout").fetchone() == ("0",)
    holder.execute("commit")
    assert other.execute(STAMP, [True]).fetchone() == (1,)
    assert other.execute(READ).fetchall() == [(1, "a"), (2, "b")]


@pytest.mark.parametrize("mode", ["isolation level repeatable read", "isolation level serializable", "read only"])
def test_an_older_snapshot_gives_no_positions(sessions: list[Connection], mode: str) -> None:
    session, _, writer = sessions
    writer.execute(PUT, ["a"])
    session.execute(f"begin {mode}".encode())
    assert session.execute(STAMP, [False]).fetchone() == (0,)
    session.execute("commit")
    assert session.execute(STAMP, [False]).fetchone() == (1,)


def test_positions_outlive_a_crash_whatever_the_session_says(sessions: list[Connection]) -> None:
    session, _, writer = sessions
    writer.execute(PUT, ["a"])
    session.execute("set synchronous_commit = off")
    session.execute("begin")
    session.execute(STAMP, [False])
    assert session.execute("show synchronous_commit").fetchone() == ("on",)
    session.execute("commit")
    assert session.execute("show synchronous_commit").fetchone() == ("off",)


def test_savepoints_that_are_rolled_back_leave_nothing(sessions: list[Connection]) -> None:
    writer, reader, _ = sessions
    writer.execute("begin")
    writer.execute(PUT, ["kept"])
    writer.execute("savepoint here")
    writer.execute(PUT, ["undone"])
    writer.execute("rollback to savepoint here")
    writer.execute("commit")
    reader.execute("select pgshelf.stamp_all_changes()")
    assert reader.execute(READ).fetchall() == [(1, "kept")]


def test_a_batch_has_a_bound_and_the_next_goes_on(sessions: list[Connection]) -> None:
    writer, reader, _ = sessions
    with writer.transaction():
        for n in range(5):
            writer.execute(PUT, [str(n)])
    stamp_all = "select pgshelf.stamp_all_changes(2)"
    assert [reader.execute(stamp_all).fetchone() for _ in range(4)] == [(2,), (2,), (1,), (0,)]
    assert reader.execute(READ).fetchall() == [(n + 1, str(n)) for n in range(5)]
    assert reader.execute("select key from pgshelf.changes('notes', after => 3, max_rows => 1)").fetchall() == [("3",)]


async def until(true: Callable[[], bool]) -> None:
    """Wait, twenty seconds at most, until something is true."""
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to be")


async def test_the_worker_gives_positions_and_forgets_what_is_old(
    sessions: list[Connection], database_url: str, make_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader, _ = sessions
    for key in ("a", "b"):
        writer.execute(PUT, [key])
    writer.execute("select pgshelf.stamp_all_changes()")
    writer.execute("update pgshelf.change_log set stamped_at = now() - interval '8 days'")
    writer.execute(
        "insert into pgshelf.idempotency_keys (key, request, created_at) values ('k', '', now() - interval '2 days')"
    )
    writer.execute(PUT, ["c"])
    monkeypatch.setattr(worker, "TIDY", 0.0)
    settings = make_settings(database_url, worker_interval=0.02)
    engine = pools.make_engine(settings, database_url)
    house = asyncio.create_task(worker._keep_house(engine, settings))
    asked = "select (select count(*) from pgshelf.idempotency_keys)"
    await until(lambda: reader.execute(READ).fetchall() == [(3, "c")] and reader.execute(asked).fetchone() == (0,))
    # what fails is tried again
    writer.execute("alter function pgshelf.stamp_all_changes(int) rename to away")
    await asyncio.sleep(0.2)
    writer.execute(PUT, ["d"])
    writer.execute("alter function pgshelf.away(int) rename to stamp_all_changes")
    await until(lambda: reader.execute(READ).fetchall()[-1] == (4, "d"))
    assert not house.done()
    house.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await house
    await pools.close(engine)


def test_the_feed_is_for_readers(sessions: list[Connection]) -> None:
    session, writer, _ = sessions
    writer.execute(PUT, ["a"])
    writer.execute("select pgshelf.stamp_all_changes()")
    session.execute("select pgshelf.grant_library('pgshelf_reader', 'notes')")
    session.execute("set role pgshelf_reader")
    assert session.execute(READ).fetchall() == [(1, "a")]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute("select * from pgshelf.change_log")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute("select pgshelf.stamp_all_changes()")
    with pytest.raises(psycopg.Error) as refused:
        session.execute("select * from pgshelf.changes('notes', after => 7)")
    assert refused.value.sqlstate == "PS024"
