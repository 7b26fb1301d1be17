"""The state of a library, under which answers are kept: another one after each commit that matters, and only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from pgshelf import pools, query_cache, shelves
from pgshelf.settings import Settings

Connection = psycopg.Connection[Any]
PUT = """select pgshelf.put_document('notes', %s, texts => array(select 'text ' || n from generate_series(1, 20) n),
  embeddings => array(select cast(format('[1,%%s]', n) as vector) from generate_series(1, 20) n))"""
MARKS = "select count(*) from pgshelf.library_marks"


@pytest.fixture
def db(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        make(connection, "notes")
        yield connection


@pytest.fixture
def other(database_url: str) -> Iterator[Connection]:
    """A second session, which waits for no lock."""
    with psycopg.connect(database_url, autocommit=True, options="-c lock_timeout=200") as connection:
        yield connection


def make(connection: Connection, name: str) -> None:
    connection.execute(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking)
        values (%s, 2, '{"provider": "none", "dimension": 2}', '{"size": 1200, "overlap": 0}')""",
        [name],
    )


def state(connection: Connection, name: str = "notes") -> int:
    return one(connection, "select pgshelf.search_state(%s)", name)


def one(connection: Connection, statement: str, *parameters: Any) -> int:
    row = connection.execute(statement, parameters).fetchone()
    assert row
    return int(row[0])


def test_a_commit_is_another_state_and_a_rollback_none(db: Connection, other: Connection) -> None:
    seen = [state(other)]
    for number in range(5):
        with db.transaction():
            db.execute(PUT, [f"d{number}"])
            assert state(other) == seen[-1]
        seen.append(state(other))
        with db.transaction(force_rollback=True):
            db.execute(PUT, ["never"])
        assert state(other) == seen[-1]
        with db.transaction(), db.transaction(force_rollback=True):
            db.execute(PUT, ["nor this"])
        assert state(other) == seen[-1]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_writers_do_not_meet(db: Connection, other: Connection, isolation: str) -> None:
    db.execute(PUT, ["one"])
    db.execute(PUT, ["two"])
    for connection in (db, other):
        connection.execute(f"set default_transaction_isolation = '{isolation}'")
    before = state(db)
    patch = "update pgshelf.documents set title = 'x' where key = %s"
    with db.transaction():
        db.execute(patch, ["one"])
        with other.transaction():
            other.execute(patch, ["two"])
        between = state(other)
    assert len({before, between, state(db)}) == 3


def test_an_older_transaction_that_commits_late_is_seen(db: Connection, other: Connection) -> None:
    """What a greatest number would miss: the earlier writer commits after the later one."""
    with db.transaction():
        db.execute(PUT, ["early"])
        other.execute(PUT, ["late"])
        between = state(other)
    assert state(other) != between


def test_joining_marks_changes_no_state(db: Connection, other: Connection) -> None:
    make(db, "others")
    for number in range(30):
        db.execute("update pgshelf.libraries set description = %s", [str(number)])
    before = [state(db), state(db, "others")]
    with db.transaction():
        db.execute(PUT, ["open"])
        assert one(other, "select pgshelf.join_marks(8)") == 2
        assert [state(other), state(other, "others")] == before
        assert one(other, MARKS) == 2
        with other.transaction():
            assert one(other, "select pgshelf.join_marks(1)") == 2
            assert [state(other), state(other, "others")] == before
    after = [state(db), state(db, "others")]
    assert after[0] != before[0] and after[1] == before[1]
    assert one(other, "select pgshelf.join_marks(2, 1)") == 1  # a part of them
    assert [state(db), state(db, "others")] == after


def test_two_that_join_at_once_do_not_meet(db: Connection, other: Connection) -> None:
    for number in range(20):
        db.execute("update pgshelf.libraries set description = %s", [str(number)])
    before = state(db)
    with db.transaction():
        assert one(db, "select pgshelf.join_marks(8)") == 1
        assert one(other, "select pgshelf.join_marks(8)") == 1  # found them taken
        assert state(db) == state(other) == before
    assert state(other) == before
    assert one(db, MARKS) == 1


def test_a_transaction_leaves_few_marks(db: Connection) -> None:
    db.execute(PUT, ["d"])
    db.execute(PUT, ["d"])
    db.execute("select pgshelf.delete_document('notes', 'd')")
    assert one(db, MARKS) <= 4
    db.execute(PUT, ["e"])
    before = one(db, MARKS)
    db.execute("update pgshelf.chunks set metadata = '{\"a\": 1}'")
    db.execute("update pgshelf.chunks set embedding = '[1,1]'")
    assert one(db, MARKS) == before + 2  # one for each, not for each chunk


def test_a_mark_that_was_rolled_back_is_left_again(db: Connection) -> None:
    make(db, "others")
    for name in ("notes", "others"):
        db.execute(PUT.replace("'notes'", f"'{name}'"), ["d"])
    before = [state(db), state(db, "others")]
    patch = """update pgshelf.chunks c set text = 'new' from pgshelf.libraries l
      where l.id = c.library_id and l.name = %s and c.ordinal = %s"""
    with db.transaction():
        with db.transaction(force_rollback=True):
            db.execute(patch, ["notes", 0])
        db.execute(patch, ["notes", 1])
        with db.transaction(force_rollback=True):
            db.execute(patch, ["others", 0])
        db.execute(patch, ["others", 1])
        db.execute(patch, ["notes", 2])
    assert all(now != then for now, then in zip([state(db), state(db, "others")], before, strict=True))


def test_what_moves_and_what_is_left_over_is_no_change(
    db: Connection, database_url: str, make_settings: Callable[..., Settings]
) -> None:
    db.execute(PUT, ["d"])
    db.execute("select pgshelf.want_index('notes', '{\"type\": \"flat\"}', 10000)")
    before = one(db, MARKS)
    shelves.reconcile_all(database_url, make_settings(database_url))
    assert one(db, "select shelf from pgshelf.libraries") > 0
    assert one(db, MARKS) - before <= 8  # steps of the library, none for its 20 chunks
    known = state(db)
    assert one(db, "select count(*) from pgshelf.chunks_s0") == 0
    db.execute("update pgshelf.chunks set text = 'x' where ordinal = 0")
    assert state(db) != known


def test_states_of_libraries_differ_and_come_with_the_functions(db: Connection) -> None:
    make(db, "others")
    assert state(db) != state(db, "others")
    before = state(db)
    db.execute("update pgshelf.installation set sql_hash = 'another version'")
    assert state(db) != before
    with pytest.raises(psycopg.Error) as caught:
        state(db, "nowhere")
    assert caught.value.sqlstate == "PS001"


def test_a_deleted_library_leaves_no_marks(db: Connection) -> None:
    db.execute(PUT, ["d"])
    db.execute("select pgshelf.delete_library('notes')")
    while one(db, "select pgshelf.reap_deleted()"):
        pass
    assert one(db, MARKS) == 0


async def test_the_worker_joins_marks_now_and_then(
    db: Connection, database_url: str, make_settings: Callable[..., Settings]
) -> None:
    settings = make_settings(database_url)
    engine = pools.make_engine(settings, database_url)
    try:
        for expected in (1, 21):
            for number in range(20):
                db.execute("update pgshelf.libraries set description = %s", [str(number)])
            assert await query_cache.join_marks(engine, settings) is False
            assert one(db, MARKS) == expected  # the second time it is not due yet
    finally:
        await pools.close(engine)
