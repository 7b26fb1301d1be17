"""Promotion and demotion: online, complete, and right again whatever dies at whatever step."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest

from pgshelf import moves, sessions, shelves
from pgshelf.settings import Settings
from tests.shelving import (
    PACE,
    PROMOTE_AT,
    RECONCILERS,
    Connection,
    Died,
    check_tidy,
    dying_at,
    expected,
    fill,
    killed_at,
    literal,
    make_library,
    put,
    reconcile,
    search,
    shelf_indexes,
    state,
    terminate,
    texts,
    vectors,
    want,
)

PROMOTION = [
    "claimed", "made", "copying", "copied", "keyed", "prepared", "built", "analyzed", "attached", "doubled", "draining",
    "drained", "switched", "reaping", "reaped",
]  # fmt: skip
DEMOTION = ["claimed", "copying", "copied", "doubled", "draining", "drained", "switched", "reaped", "dropped"]


@pytest.fixture
def db(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def shared_db(shared_database_url: str) -> Iterator[Connection]:
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        yield connection
        connection.execute("select pgshelf.delete_library(id::text) from pgshelf.libraries where deleted_at is null")


@pytest.fixture
def small(make_settings: Callable[..., Settings], database_url: str) -> Settings:
    """Settings under which a library of twenty chunks is large."""
    return make_settings(database_url, promote_at=PROMOTE_AT, worker_interval=0.02)


# -- when a library moves, and what it has then


async def test_auto_moves_out_at_the_threshold_and_back_below_a_quarter_of_it(db: Connection, small: Settings) -> None:
    library = make_library(db)
    given = vectors(PROMOTE_AT)
    fill(db, library, given[:-1], per_document=1)
    await reconcile(small)
    assert (state(db, library)["shelf"], state(db, library)["index_state"]) == (0, "ready")

    put(db, library, "last", [f"text {PROMOTE_AT - 1}"], given[-1:])
    await reconcile(small)
    row = state(db, library)
    actual = row["index_actual"]
    assert row["shelf"] > 0 and (row["moving"], row["index_state"]) == (0, "ready")
    assert actual == {
        "type": "hnsw", "storage": "halfvec", "m": 16, "ef_construction": 64, "rows": PROMOTE_AT,
        "serial": actual["serial"],
    }  # fmt: skip
    assert texts(db, library) == expected(PROMOTE_AT)
    assert search(db, library, given[3], k=1) == ["text 3"]
    check_tidy(db)

    for number in range(PROMOTE_AT // 4, PROMOTE_AT - 1):
        db.execute("select pgshelf.delete_document('notes', %s)", [f"d{number}"])
    await reconcile(small)  # a quarter and one: it stays
    assert state(db, library)["shelf"] == row["shelf"]
    for key in ("d0", "last"):
        db.execute("select pgshelf.delete_document('notes', %s)", [key])
    await reconcile(small)
    home = state(db, library)
    assert (home["shelf"], home["index_actual"], home["index_state"]) == (0, {"type": "flat"}, "ready")
    assert texts(db, library) == [f"text {number}" for number in range(1, PROMOTE_AT // 4)]
    check_tidy(db)


@pytest.mark.parametrize(
    "index",
    [
        {"type": "flat"},
        {"type": "hnsw", "m": 8, "ef_construction": 32, "storage": "bit"},
        {"type": "ivfflat"},
        {"type": "lsh", "bits": 64},
    ],
    ids=lambda index: index["type"],
)
async def test_an_explicit_type_has_a_shelf_of_its_own_at_once(
    db: Connection, small: Settings, index: dict[str, Any]
) -> None:
    library = make_library(db, index=index)
    await reconcile(small)
    empty = state(db, library)
    assert empty["shelf"] > 0
    assert empty["index_state"] == ("waiting" if index["type"] == "ivfflat" else "ready")
    fill(db, library, vectors(10))
    assert texts(db, library) == expected(10)
    assert search(db, library, vectors(10)[4], k=1) == ["text 4"]
    want(db, library, {"type": "auto"})
    await reconcile(small)
    # ten is more than a quarter of twenty; rows of an lsh index hold its codes, so those are written anew
    assert (state(db, library)["shelf"] == empty["shelf"]) == (index["type"] != "lsh")
    assert state(db, library)["shelf"] > 0
    assert state(db, library)["index_actual"]["type"] == "hnsw"
    check_tidy(db)


async def test_a_shelf_has_the_keys_of_its_parent_and_attaching_builds_none(db: Connection, small: Settings) -> None:
    library = make_library(db, index={"type": "flat"})
    made: dict[str, list[str]] = {}

    async def look(step: str) -> None:
        if step in ("keyed", "attached"):
            made[step] = shelf_indexes(db, db.execute("select moving_to from pgshelf.libraries").fetchone()[0])  # type: ignore[index]  # one row

    await reconcile(small, step=look)
    assert made["keyed"] == made["attached"]
    parent = db.execute("select relname from pg_class where relname ~ '^chunks_[a-rt-z].*(idx|pkey)$'").fetchall()
    shelf = state(db, library)["shelf"]
    for (name,) in parent:
        assert name.replace("chunks_", f"chunks_s{shelf}_") in made["keyed"]
    assert {f"chunks_s{shelf}_tsv_idx", f"chunks_s{shelf}_metadata_idx"} < set(made["keyed"])


async def test_everything_of_a_chunk_moves_along(db: Connection, small: Settings) -> None:
    library = make_library(db)
    db.execute('update pgshelf.libraries set embedder = embedder || \'{"provider": "local"}\'')
    fill(db, library, vectors(PROMOTE_AT))
    db.execute(
        "select pgshelf.put_document('notes', 'late', texts => '{waits,\"gave up\"}', chunk_metadata => array['{\"page\": 1}', '{}']::jsonb[])"  # noqa: E501 - one call
    )
    db.execute(
        "update pgshelf.chunks set embed_attempts = 8, embed_after = 'infinity', embed_error = 'no'"
        " where text = 'gave up'"
    )
    columns = """select document_id, ordinal, id, place, text, metadata, embedding::text, language, tsv::text,
      embed_attempts, embed_after::text, embed_error from pgshelf.chunks where library_id = %s order by 1, 2"""
    before = db.execute(columns.encode(), [library]).fetchall()
    documents = db.execute("select * from pgshelf.documents order by id").fetchall()
    await reconcile(small)
    assert state(db, library)["shelf"] > 0
    assert db.execute(columns.encode(), [library]).fetchall() == before
    assert db.execute("select * from pgshelf.documents order by id").fetchall() == documents
    claimed = db.execute("select text from pgshelf.claim_pending(10, interval '1 minute')").fetchall()
    assert claimed == [("waits",)], "what waits for its vector is found on the new shelf"


async def test_without_a_second_connection_a_library_moves_all_the_same(
    db: Connection, small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(db)
    fill(db, library, vectors(PROMOTE_AT))
    connect = sessions.connect
    opened: list[object] = []

    async def one_only(settings: Settings) -> psycopg.AsyncConnection[Any]:
        opened.append(settings)
        if opened[1:]:
            raise psycopg.OperationalError("sorry, too many clients already")
        return await connect(settings)

    monkeypatch.setattr(sessions, "connect", one_only)
    monkeypatch.setattr(shelves, "connect", one_only)
    await reconcile(small)
    assert len(opened) == 2
    assert state(db, library)["shelf"] > 0
    assert texts(db, library) == expected(PROMOTE_AT)
    check_tidy(db)


async def test_the_worker_of_a_service_moves_libraries_by_itself(
    db: Connection, small: Settings, make_client: Any
) -> None:
    await make_client(small)
    library = make_library(db)
    fill(db, library, vectors(PROMOTE_AT))
    async with asyncio.timeout(20):
        while state(db, library)["shelf"] == 0 or state(db, library)["moving"]:  # noqa: ASYNC110 - the worker's doing
            await asyncio.sleep(0.02)
    assert texts(db, library) == expected(PROMOTE_AT)


# -- dropping


async def test_a_deleted_library_leaves_with_its_whole_shelf(db: Connection, small: Settings) -> None:
    library = make_library(db)
    fill(db, library, vectors(PROMOTE_AT))
    await reconcile(small)
    shelf = state(db, library)["shelf"]
    db.execute("select pgshelf.delete_library('notes')")
    assert db.execute("select shelf from pgshelf.retired_shelves").fetchall() == [(shelf,)]
    assert db.execute(f"select count(*) from pgshelf.chunks_s{shelf}".encode()).fetchone() == (PROMOTE_AT,)
    while db.execute("select pgshelf.reap_deleted()").fetchone() != (0,):
        pass
    # its documents are gone, its chunks were not deleted row by row
    assert db.execute("select count(*) from pgshelf.documents").fetchone() == (0,)
    assert db.execute(f"select count(*) from pgshelf.chunks_s{shelf}".encode()).fetchone() == (PROMOTE_AT,)
    await reconcile(small, sessions.Pace(grace=60, sweep=0))
    assert shelf_indexes(db, shelf) != [], "a search may still be on its way"
    await reconcile(small)
    assert shelf_indexes(db, shelf) == []
    check_tidy(db)


async def test_a_library_whose_document_is_referenced_keeps_its_shelf(db: Connection, small: Settings) -> None:
    library = make_library(db)
    fill(db, library, vectors(PROMOTE_AT))
    await reconcile(small)
    db.execute("create table orders (manual uuid references pgshelf.documents (id))")
    db.execute("insert into orders select id from pgshelf.documents limit 1")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        db.execute("select pgshelf.delete_library('notes')")
    await reconcile(small)
    assert texts(db, library) == expected(PROMOTE_AT)
    db.execute("drop table orders")


@pytest.mark.parametrize("step", ["claimed", "copied", "attached", "doubled", "drained"])
async def test_a_library_deleted_while_it_moves(db: Connection, small: Settings, step: str) -> None:
    library = make_library(db)
    fill(db, library, vectors(PROMOTE_AT))

    async def delete(name: str) -> None:
        if name == step:
            db.execute("select pgshelf.delete_library('notes')")

    await reconcile(small, step=delete)
    while db.execute("select pgshelf.reap_deleted()").fetchone() != (0,):
        pass
    await reconcile(small)
    assert db.execute("select count(*) from pgshelf.libraries").fetchone() == (0,)
    check_tidy(db)


async def test_a_shelf_in_use_by_an_open_transaction_goes_later(
    db: Connection, small: Settings, monkeypatch: Any
) -> None:
    library = make_library(db)
    fill(db, library, vectors(PROMOTE_AT))
    await reconcile(small)
    shelf = state(db, library)["shelf"]
    monkeypatch.setattr(moves, "DETACH_WAIT", "50ms")
    with psycopg.connect(small.database_url or "") as reader:
        reader.execute("select count(*) from pgshelf.chunks_view")
        db.execute("select pgshelf.delete_library('notes')")
        await reconcile(small)
        assert shelf_indexes(db, shelf) != []
        assert texts(db, library) == []  # others are not held up
        # and neither is the next library that moves
        other = make_library(db, "other", index={"type": "flat"})
        await reconcile(small)
        assert state(db, other)["shelf"] > shelf
    await reconcile(small)
    assert shelf_indexes(db, shelf) == []


# -- while others write


WRITTEN = ["claimed", "copied", "doubled", "drained", "switched"]


@pytest.mark.parametrize(("to", "step"), [(to, step) for to in ("own", "shared") for step in WRITTEN])
async def test_what_is_written_at_a_step_is_not_lost(
    shared_db: Connection, shared_database_url: str, step: str, to: str, make_settings: Any
) -> None:
    db, name = shared_db, f"{to}-{step}"
    settings = make_settings(shared_database_url, promote_at=PROMOTE_AT)
    library = make_library(db, name)
    given = vectors(PROMOTE_AT + 10)
    fill(db, library, given[:PROMOTE_AT], per_document=2)
    if to == "shared":
        await reconcile(settings)
        assert state(db, library)["shelf"] > 0
        want(db, library, {"type": "auto"}, 1000)
        settings = make_settings(shared_database_url, promote_at=1000)

    async def write(taken: str) -> None:
        if taken != step:
            return
        put(db, library, "new", ["text new", "text newer"], given[-2:])
        put(db, library, "d1", ["text replaced"], given[-3:-2])
        db.execute("select pgshelf.delete_document(%s, 'd2')", [name])
        chunk = db.execute(
            "select id from pgshelf.chunks_view where library = %s and text = 'text 6'", [name]
        ).fetchone()
        assert chunk
        db.execute(
            "select pgshelf.patch_chunk(%s, %s, 'text patched', %s, null)", [library, chunk[0], literal(given[-1])]
        )
        chunk = db.execute(
            "select id from pgshelf.chunks_view where library = %s and text = 'text 7'", [name]
        ).fetchone()
        assert chunk
        db.execute("select pgshelf.delete_chunk(%s, %s)", [library, chunk[0]])

    steps = await reconcile(settings, step=write)
    assert step in steps
    assert (state(db, library)["shelf"] > 0) == (to == "own")
    gone = {f"text {number}" for number in (2, 3, 4, 5, 6, 7)}
    kept = sorted((set(expected(PROMOTE_AT)) - gone) | {"text new", "text newer", "text replaced", "text patched"})
    assert texts(db, library) == kept
    assert sorted(search(db, library, given[0], k=100)) == kept
    check_tidy(db)


OLDER = [
    (None, "claimed"), ("claimed", "doubled"), ("claimed", "switched"), ("attached", "doubled"),
    ("drained", "switched"),
]  # fmt: skip


@pytest.mark.parametrize(("seen", "written"), OLDER)
@pytest.mark.parametrize(
    "statement",
    ["select pgshelf.delete_document('notes', 'd0')", "delete from pgshelf.documents where key = 'd0'"],
    ids=["call", "delete"],
)
async def test_a_writer_with_an_older_snapshot_is_refused(
    db: Connection, small: Settings, seen: str | None, written: str, statement: str
) -> None:
    library = make_library(db)
    fill(db, library, vectors(PROMOTE_AT))
    outcome = []
    with psycopg.connect(small.database_url or "") as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ

        async def meddle(step: str | None) -> None:
            if step == seen:
                old.execute("select count(*) from pgshelf.libraries")
            elif step == written:
                try:
                    old.execute(statement.encode())
                    outcome.append("went through")
                except psycopg.errors.SerializationFailure:
                    outcome.append("refused")
                old.rollback()

        await meddle(None)
        await reconcile(small, step=meddle)
    assert outcome == ["refused"]
    assert texts(db, library) == expected(PROMOTE_AT)
    check_tidy(db)


async def test_a_deleter_whose_snapshot_is_older_than_the_catching_up_is_refused(
    db: Connection, small: Settings
) -> None:
    """It would leave behind what was copied after its snapshot."""
    library = make_library(db)
    given = vectors(PROMOTE_AT + 1)
    fill(db, library, given[:PROMOTE_AT])
    with psycopg.connect(small.database_url or "") as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ

        async def meddle(step: str) -> None:
            if step == "copied":
                put(db, library, "logged", ["text logged"], given[-1:])
            elif step == "doubled":
                old.execute("select count(*) from pgshelf.libraries")
            elif step == "drained":
                with pytest.raises(psycopg.errors.SerializationFailure):
                    old.execute("delete from pgshelf.documents where key = 'logged'")
                old.rollback()

        await reconcile(small, step=meddle)
    assert "text logged" in texts(db, library)
    check_tidy(db)


async def test_a_document_that_a_writer_holds_is_waited_for_without_a_deadlock(db: Connection, small: Settings) -> None:
    library = make_library(db)
    given = vectors(PROMOTE_AT + 2)
    fill(db, library, given[:PROMOTE_AT], per_document=1)
    loop = asyncio.get_running_loop()
    with psycopg.connect(small.database_url or "") as holder:

        async def meddle(step: str) -> None:
            if step == "copied":  # logged
                put(db, library, "d0", ["text once"], given[-1:])
            elif step == "doubled":  # held while the log is drained, and written again
                put(holder, library, "d0", ["text twice"], given[-2:-1])
                loop.call_later(0.2, holder.commit)

        steps = await reconcile(small, step=meddle)
    assert "draining" in steps
    assert texts(db, library) == sorted({*expected(PROMOTE_AT), "text twice"} - {"text 0"})
    check_tidy(db)


async def test_a_document_that_is_being_deleted_while_its_library_moves_back(db: Connection, small: Settings) -> None:
    library = make_library(db)
    fill(db, library, vectors(PROMOTE_AT), per_document=1)
    await reconcile(small)
    loop = asyncio.get_running_loop()
    with psycopg.connect(small.database_url or "") as deleter, psycopg.connect(small.database_url or "") as undecided:

        async def meddle(step: str) -> None:
            if step == "claimed":
                deleter.execute("delete from pgshelf.documents where key = 'd0'")
                undecided.execute("delete from pgshelf.documents where key = 'd1'")
            elif step == "copied":
                deleter.commit()
                loop.call_later(0.1, undecided.rollback)

        await reconcile(msgspec.structs.replace(small, promote_at=1000), step=meddle)
    assert state(db, library)["shelf"] == 0
    assert texts(db, library) == sorted(set(expected(PROMOTE_AT)) - {"text 0"})
    check_tidy(db)


async def test_a_fence_waits_for_a_long_transaction_and_lets_others_write(db: Connection, small: Settings) -> None:
    library = make_library(db)
    given = vectors(PROMOTE_AT + 20)
    fill(db, library, given[:PROMOTE_AT])
    with psycopg.connect(small.database_url or "") as long:
        put(long, library, "long", ["text long"], given[-1:])
        task = asyncio.create_task(reconcile(small))
        for number in range(10):
            await asyncio.sleep(0.05)
            put(db, library, f"between {number}", [f"between {number}"], given[number : number + 1])
        assert state(db, library)["moving"] == 0
        long.commit()
    await task
    assert state(db, library)["shelf"] > 0
    between = [f"between {number}" for number in range(10)]
    assert texts(db, library) == sorted([*expected(PROMOTE_AT), "text long", *between])


class Crowd:
    """Searchers and writers of one library, and what the writers were told."""

    def __init__(self, url: str, library: UUID, steady: int) -> None:
        self.url, self.library, self.steady = url, library, steady
        self.given = vectors(steady)
        self.stop = threading.Event()
        self.errors: list[str] = []
        self.bad: list[str] = []
        self.truth: dict[str, list[str]] = {}
        self.searches = self.writes = 0
        self.threads = [threading.Thread(target=self.searcher, args=(n,)) for n in range(2)]
        self.threads += [threading.Thread(target=self.writer, args=(n,)) for n in range(2)]

    def __enter__(self) -> Crowd:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def searcher(self, seed: int) -> None:
        rng = random.Random(seed)
        with psycopg.connect(self.url, autocommit=True) as db:
            while not self.stop.is_set():
                number = rng.randrange(self.steady)
                try:
                    found = search(db, self.library, self.given[number], k=10)
                except psycopg.Error as error:
                    self.errors.append(f"search: {error}")
                    continue
                self.searches += 1
                if found[:1] != [f"text {number}"] or len(set(found)) != 10:
                    self.bad.append(f"{number}: {found}")

    def writer(self, seed: int) -> None:
        rng = random.Random(seed)
        own = vectors(50, seed=100 + seed)
        with psycopg.connect(self.url, autocommit=True) as db:
            turn = 0
            while not self.stop.is_set():
                turn += 1
                key = f"w{seed}-{rng.randrange(15)}"
                written = [f"{key} v{turn} c{n}" for n in range(rng.randrange(1, 4))]
                try:
                    with db.transaction():
                        if rng.random() < 0.2 and self.truth.get(key):
                            db.execute("select pgshelf.delete_document(%s, %s)", [str(self.library), key])
                            written = []
                        else:
                            put(db, self.library, key, written, own[turn % 40 : turn % 40 + len(written)])
                        if rng.random() < 0.1:
                            raise psycopg.Rollback
                except psycopg.Error as error:
                    self.errors.append(f"write: {error}")
                    continue
                if rolled_back(db, key, written, self.library):
                    continue
                self.writes += 1
                self.truth[key] = written


def rolled_back(db: Connection, key: str, written: list[str], library: UUID) -> bool:
    """Nobody else writes this key: what is there now is what the transaction did."""
    rows = db.execute(
        "select text from pgshelf.chunks_view where library_id = %s and document_key = %s order by ordinal",
        [library, key],
    )
    return [text for (text,) in rows.fetchall()] != written


@pytest.mark.xdist_group("crowd")
async def test_searchers_and_writers_notice_nothing(db: Connection, small: Settings) -> None:
    steady = 600
    library = make_library(db)
    fill(db, library, vectors(steady))
    patient = msgspec.structs.replace(small, promote_at=10_000)
    with Crowd(small.database_url or "", library, steady) as crowd:
        for index in ({"type": "hnsw"}, {"type": "lsh", "bits": 128}, {"type": "auto"}):
            want(db, library, index, 10_000)
            await asyncio.to_thread(asyncio.run, reconcile(patient))
            expected_shelf = index["type"] != "auto"
            assert (state(db, library)["shelf"] > 0) == expected_shelf
    assert crowd.errors == []
    assert crowd.bad == []
    assert crowd.searches > 20 and crowd.writes > 20
    kept = [text for written in crowd.truth.values() for text in written]
    assert texts(db, library) == sorted([*expected(steady), *kept])
    check_tidy(db)


# -- what dies


@pytest.mark.parametrize("how", ["closed", "terminated"])
@pytest.mark.parametrize(("to", "step"), [("own", s) for s in PROMOTION] + [("shared", s) for s in DEMOTION])
async def test_a_move_that_dies_at_a_step_is_made_good(
    shared_db: Connection, shared_database_url: str, make_settings: Any, monkeypatch: Any, to: str, step: str, how: str
) -> None:
    db = shared_db
    monkeypatch.setattr(moves, "DRAINED_DOCUMENTS", 1)
    settings = make_settings(shared_database_url, promote_at=PROMOTE_AT)
    library = make_library(db, f"{to}-{step}-{how}")
    given = vectors(PROMOTE_AT + 11)
    fill(db, library, given[:-1])
    if to == "shared":
        await reconcile(settings)
        settings = make_settings(shared_database_url, promote_at=1000)
    end = dying_at(step) if how == "closed" else killed_at(db, step)

    async def die(taken: str) -> None:
        if taken == "copied":  # something for the log
            for key in ("logged", "logged too"):
                put(db, library, key, [f"text {key}"], given[-1:])
        await end(taken)

    with suppress(Died, psycopg.Error):
        await reconcile(settings, step=die)
        pytest.fail(f"the step {step} was not taken")
    terminate(db)  # a session that was closed may still be ending

    put(db, library, "after", ["text after"], given[-1:])
    db.execute("select pgshelf.delete_document(%s, 'd0')", [str(library)])
    logged = {"text logged", "text logged too"} if "text logged" in texts(db, library) else set()
    kept = sorted({*expected(PROMOTE_AT + 10), "text after", *logged} - {f"text {number}" for number in range(5)})
    assert texts(db, library) == kept
    await reconcile(settings)
    row = state(db, library)
    assert (row["shelf"] > 0, row["index_state"], row["index_error"]) == (to == "own", "ready", None)
    assert texts(db, library) == kept
    assert search(db, library, given[7], k=1) == ["text 7"]
    check_tidy(db)


async def test_two_reconcilers_do_not_get_in_each_others_way(db: Connection, small: Settings) -> None:
    made = [make_library(db, f"l{number}", index={"type": "hnsw"}) for number in range(6)]
    for library in made:
        fill(db, library, vectors(10))

    async def insist() -> None:
        while db.execute("select 1 from pgshelf.libraries where index_state <> 'ready'").fetchone():
            await reconcile(small)
            await asyncio.sleep(0.01)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(insist())
    for library in made:
        assert texts(db, library) == expected(10)
        assert state(db, library)["index_attempts"] == 0
    check_tidy(db)


async def test_a_session_that_is_lost_is_opened_again(db: Connection, small: Settings) -> None:
    task = asyncio.create_task(shelves.forever(small, PACE))
    try:
        async with asyncio.timeout(20):
            while not db.execute(f"select 1 {RECONCILERS}".encode()).fetchone():  # noqa: ASYNC110 - another session's doing
                await asyncio.sleep(0.01)
            terminate(db)
            library = make_library(db, index={"type": "flat"})
            while state(db, library)["shelf"] == 0:  # noqa: ASYNC110 - another session's doing
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_sizes_are_looked_at_a_few_libraries_at_a_time(db: Connection, small: Settings) -> None:
    for number in range(5):
        fill(db, make_library(db, f"l{number}"), vectors(PROMOTE_AT))
    async with await sessions.connect(small) as connection:
        session = shelves.Shelves(sessions.Session(connection, small, PACE))
        moved = []
        for _ in range(6):
            await session.look(budget=1)
            moved.append(db.execute("select count(*) from pgshelf.libraries where shelf > 0").fetchone())
    assert moved == [(1,), (2,), (3,), (4,), (5,), (5,)]
