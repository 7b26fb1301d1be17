"""Indexes: which a library may have, which it gets, and how one becomes another while everything goes on."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import psycopg
import pytest
from psycopg.types.json import Jsonb

from pgshelf import sessions
from pgshelf.settings import Settings
from tests.shelving import (
    PROMOTE_AT,
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

BUILD = ["prepared", "built", "used", "index dropped"]
HNSW = {"type": "hnsw", "m": 4, "ef_construction": 16}
LSH = {"type": "lsh", "bits": 64}


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
    return make_settings(database_url, promote_at=PROMOTE_AT)


# -- what may be asked for


@pytest.mark.parametrize(
    ("dimension", "metric", "index", "says"),
    [
        (2001, "l2", {"type": "hnsw"}, "storage halfvec"),
        (2001, "l2", {"type": "ivfflat"}, "at most 2000 dimensions"),
        (2001, "cosine", {"type": "hnsw", "storage": "vector"}, '"storage": "halfvec"'),
        (4001, "cosine", {"type": "hnsw", "storage": "halfvec"}, '"storage": "bit"'),
        (4001, "l1", {"type": "hnsw"}, "Only flat"),
        (4001, "inner_product", {"type": "hnsw", "storage": "halfvec"}, "Only flat"),
        (8, "l1", {"type": "ivfflat"}, "no ivfflat index for the metric l1"),
        (8, "l2", {"type": "hnsw", "storage": "bit"}, "nothing about the metric l2"),
        (8, "inner_product", {"type": "ivfflat", "storage": "bit"}, "nothing about the metric inner_product"),
        (8, "l2", {"type": "lsh"}, "metric cosine only"),
        (3, "cosine", {"type": "kdtree"}, "metric l2 only"),
        (5, "l2", {"type": "kdtree"}, "up to 4 dimensions"),
    ],
    ids=str,
)
def test_what_is_impossible_is_refused_with_what_would_work(
    shared_db: Connection, dimension: int, metric: str, index: dict[str, Any], says: str
) -> None:
    with pytest.raises(psycopg.DatabaseError) as refused:
        shared_db.execute("select pgshelf.check_index(%s, %s, %s)", [Jsonb(index), dimension, metric])
    assert refused.value.sqlstate == "PS014"
    hint = refused.value.diag.message_hint or ""
    assert hint.startswith(("Possible here: ", "Only flat is possible here"))
    assert says in f"{refused.value.diag.message_primary} {hint}"


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ({}, "an index has a type"),
        ({"type": "btree"}, "an index has a type"),
        ({"type": "auto", "m": 8}, "an index of the type auto has no m"),
        ({"type": "flat", "storage": "vector"}, "has no storage"),
        ({"type": "hnsw", "lists": 8}, "It has storage, m, ef_construction"),
        ({"type": "kdtree", "bits": 64}, "has no bits"),
        ({"type": "hnsw", "storage": "float"}, "storage is halfvec, vector or bit"),
        ({"type": "hnsw", "m": 1}, "m is a whole number from 2 to 100"),
        ({"type": "hnsw", "m": "16"}, "m is a whole number"),
        ({"type": "hnsw", "m": 16.5}, "m is a whole number"),
        ({"type": "hnsw", "m": 40}, "Send ef_construction 80 or more"),
        ({"type": "lsh", "bits": 8193}, "bits is a whole number from 32 to 8192"),
        ({"type": "lsh", "seed": -1}, "seed is a whole number"),
        ({"type": "ivfflat", "lists": 0}, "lists is a whole number from 1 to 32768"),
    ],
    ids=str,
)
def test_what_is_no_index_is_refused(shared_db: Connection, index: dict[str, Any], says: str) -> None:
    with pytest.raises(psycopg.DatabaseError) as refused:
        shared_db.execute("select pgshelf.check_index(%s, 8, 'cosine')", [Jsonb(index)])
    assert refused.value.sqlstate == "PS030"
    assert says in f"{refused.value.diag.message_primary} {refused.value.diag.message_hint}"


@pytest.mark.parametrize(
    ("dimension", "metric", "fits"),
    [
        (384, "cosine", "halfvec"), (4000, "cosine", "halfvec"), (4001, "cosine", "bit"), (16000, "cosine", "bit"),
        (384, "l2", "vector"), (2000, "inner_product", "vector"), (2001, "l1", None),
    ],
)  # fmt: skip
def test_auto_takes_the_storage_that_fits(shared_db: Connection, dimension: int, metric: str, fits: str | None) -> None:
    row = shared_db.execute("select pgshelf.index_that_fits(%s, %s)", [dimension, metric]).fetchone()
    whole = {"type": "hnsw", "storage": fits, "m": 16, "ef_construction": 64}
    assert row == (whole if fits else {"type": "flat"},)
    shared_db.execute("select pgshelf.check_index(%s, %s, %s)", [Jsonb(whole if fits else row[0]), dimension, metric])


METRICS = {
    "cosine": ["hnsw", "hnsw vector", "hnsw bit", "ivfflat", "ivfflat vector", "ivfflat bit", "lsh"],
    "l2": ["hnsw", "hnsw halfvec", "ivfflat", "ivfflat halfvec", "kdtree"],
    "inner_product": ["hnsw", "hnsw halfvec", "ivfflat", "ivfflat halfvec"],
    "l1": ["hnsw", "hnsw halfvec"],
}


@pytest.mark.parametrize(
    ("metric", "name"), [(metric, name) for metric, names in METRICS.items() for name in names], ids=str
)
async def test_every_index_is_built_and_found_by_searches(
    shared_db: Connection, shared_database_url: str, make_settings: Any, metric: str, name: str
) -> None:
    db, (type_, *storage) = shared_db, name.split()
    index: dict[str, Any] = {"type": type_} | ({"storage": storage[0]} if storage else {})
    dimension = 4 if type_ == "kdtree" else 8
    library = make_library(db, f"{metric} {name}", dimension, metric, index)
    given = vectors(1000 if type_ == "ivfflat" else 50, dimension)
    fill(db, library, given, per_document=100)
    await reconcile(make_settings(shared_database_url))
    row = state(db, library)
    assert (row["index_state"], row["index_error"], row["index_actual"]["type"]) == ("ready", None, type_)
    assert row["index_actual"]["rows"] == len(given)
    default = "halfvec" if metric == "cosine" else "vector"
    if type_ in ("hnsw", "ivfflat"):
        assert row["index_actual"]["storage"] == (storage[0] if storage else default)
    explain = "select pgshelf.explain_search(%s, %s) ->> 'strategy'"
    found = db.execute(explain.encode(), [str(library), literal(given[7])]).fetchone()
    assert found in [("index",), ("index then exact",)]  # codes ask for more candidates than there are
    best = "text 7" if metric != "inner_product" else search(db, library, given[7], k=1, exact=True)[0]
    assert search(db, library, given[7], k=3)[0] == best
    check_tidy(db)


async def test_numbers_beyond_half_precision_go_into_a_vector_index(db: Connection, small: Settings) -> None:
    library = make_library(db, metric="l2", index={"type": "hnsw"})
    fill(db, library, vectors(20) * 1e6)
    await reconcile(small)
    assert (state(db, library)["index_state"], state(db, library)["index_actual"]["storage"]) == ("ready", "vector")
    under_cosine = make_library(db, "cosine", index={"type": "hnsw"})
    fill(db, under_cosine, vectors(20) * 1e6)
    await reconcile(small)
    put(db, under_cosine, "tiny", ["tiny"], vectors(21)[-1:] * 1e-9)
    assert state(db, under_cosine)["index_actual"]["storage"] == "halfvec"
    assert search(db, under_cosine, vectors(21)[-1], k=1) == ["tiny"]


# -- ivfflat waits for data


async def test_an_ivfflat_waits_for_a_thousand_vectors_and_is_built_anew_when_grown_fourfold(
    db: Connection, small: Settings
) -> None:
    library = make_library(db, index={"type": "ivfflat"})
    fill(db, library, vectors(999), per_document=999)
    await reconcile(small)
    waiting = state(db, library)
    assert (waiting["index_state"], waiting["index_actual"]) == ("waiting", {"type": "flat"})
    assert search(db, library, vectors(999)[500], k=1) == ["text 500"]

    put(db, library, "one more", ["one more"], vectors(1, seed=2))
    await reconcile(small)
    built = state(db, library)
    assert (built["index_state"], built["index_actual"]["rows"], built["index_actual"]["lists"]) == ("ready", 1000, 95)

    db.execute("delete from pgshelf.documents where key = 'one more'")
    await reconcile(small)
    assert state(db, library)["index_actual"] == built["index_actual"], "what is built stays"

    fill(db, library, vectors(3000, seed=3), per_document=1000, first=10_000)
    db.execute("select pg_stat_force_next_flush()")  # what is counted after the vacuum would count twice
    db.execute(f"vacuum analyze pgshelf.chunks_s{built['shelf']}")
    assert "built" not in await reconcile(small)
    fill(db, library, vectors(2, seed=4), per_document=1000, first=20_000)
    db.execute("select pg_stat_force_next_flush()")  # what is counted after the vacuum would count twice
    db.execute(f"vacuum analyze pgshelf.chunks_s{built['shelf']}")
    assert "built" in await reconcile(small)
    again = state(db, library)["index_actual"]
    assert again["serial"] > built["index_actual"]["serial"] and (again["rows"], again["lists"]) == (4001, 190)
    check_tidy(db)


async def test_an_ivfflat_is_not_built_anew_for_chunks_without_a_vector(db: Connection, small: Settings) -> None:
    library = make_library(db, index={"type": "ivfflat", "lists": 10})
    fill(db, library, vectors(1000), per_document=1000)
    await reconcile(small)
    built = state(db, library)
    db.execute(
        "update pgshelf.libraries set embedder = jsonb_build_object('provider', 'local', 'dimension', dimension)"
    )
    for number in range(4):
        texts = [f"pending {number} {n}" for n in range(1000)]
        db.execute("select pgshelf.put_document('notes', %s, texts => %s)", [f"pending {number}", texts])
    db.execute("select pg_stat_force_next_flush()")
    db.execute(f"vacuum analyze pgshelf.chunks_s{built['shelf']}")
    assert db.execute("select pgshelf.shelf_rows(%s)", [built["shelf"]]).fetchone() == (5000,)
    assert "built" not in await reconcile(small)
    assert state(db, library)["index_actual"] == built["index_actual"]


def test_lists_fit_into_the_memory_of_a_build(shared_db: Connection) -> None:
    wanted = "jsonb_build_object('type', 'ivfflat', 'storage', 'halfvec', 'lists', l.lists)"
    for rows, memory in ((10**8, 2**30), (10**6, 2**24), (10**4, 2**30)):
        lists, needed = shared_db.execute(
            f"""select l.lists, e.memory_bytes from (select pgshelf.index_lists(%s, 776, %s) as lists) l,
            pgshelf.index_estimate({wanted}, %s, 384, 0) e""".encode(),
            [rows, memory, rows],
        ).fetchone()  # type: ignore[misc]  # one row
        assert needed < memory
        assert 100 <= lists <= max(rows / 1000, 3 * math.sqrt(rows))


# -- from one index to another


async def test_searches_use_the_old_index_until_the_new_one_is_there(db: Connection, small: Settings) -> None:
    library = make_library(db, index=HNSW)
    fill(db, library, vectors(30))
    await reconcile(small)
    old = state(db, library)
    seen: dict[str, Any] = {}

    async def look(step: str) -> None:
        row = state(db, library)
        seen[step] = (row["index_actual"]["serial"], row["index_state"], row["shelf"])
        assert search(db, library, vectors(30)[3], k=1) == ["text 3"]
        put(db, library, step, [step], vectors(1, seed=9))

    want(db, library, {**HNSW, "storage": "vector"})
    assert await reconcile(small, step=look) == BUILD
    serial, shelf = old["index_actual"]["serial"], old["shelf"]
    assert seen["prepared"] == seen["built"] == (serial, "building", shelf)
    assert seen["used"] == (serial + 1, "ready", shelf)
    row = state(db, library)
    assert row["index_actual"] == {**HNSW, "storage": "vector", "serial": serial + 1, "rows": 30}
    vector_indexes = [name for name in shelf_indexes(db, shelf) if "_v" in name]
    assert vector_indexes == [f"chunks_s{shelf}_v{serial + 1}"]
    assert texts(db, library) == sorted([*expected(30), *BUILD])
    check_tidy(db)


async def test_a_wish_that_is_fulfilled_builds_nothing(db: Connection, small: Settings) -> None:
    library = make_library(db, index={"type": "hnsw"})
    await reconcile(small)
    assert want(db, library, {"type": "hnsw"}) is False
    assert want(db, library, {"type": "hnsw", "m": 16, "storage": "halfvec"}) is False
    assert (state(db, library)["index_state"], await reconcile(small)) == ("ready", [])
    assert want(db, library, {"type": "hnsw", "m": 17}) is True
    assert state(db, library)["index_state"] == "building"


async def test_a_wish_that_changes_meanwhile_is_fulfilled_in_the_end(db: Connection, small: Settings) -> None:
    library = make_library(db, index=HNSW)
    fill(db, library, vectors(30))

    wishes: list[tuple[str, dict[str, Any]]] = [
        ("attached", {"type": "flat"}),
        ("prepared", LSH),
        ("doubled", HNSW),
        ("built", LSH),
    ]

    async def reconsider(step: str) -> None:
        if wishes and step == wishes[0][0]:
            want(db, library, wishes.pop(0)[1])

    await reconcile(small, step=reconsider)
    assert wishes == []
    assert (state(db, library)["index_state"], state(db, library)["index_actual"]["type"]) == ("ready", "lsh")
    check_tidy(db)


@pytest.mark.parametrize("how", ["closed", "terminated"])
@pytest.mark.parametrize(
    ("to", "step"),
    [(to, step) for to in ("hnsw", "kdtree", "flat") for step in BUILD if (to, step) != ("flat", "built")],
)
async def test_a_build_that_dies_at_a_step_is_made_good(
    shared_db: Connection, shared_database_url: str, make_settings: Any, to: str, step: str, how: str
) -> None:
    db, settings = shared_db, make_settings(shared_database_url)
    library = make_library(db, f"{to}-{step}-{how}", 4, "l2", {"type": "hnsw"})
    given = vectors(30, 4)
    fill(db, library, given)
    await reconcile(settings)
    want(db, library, {"type": to} | ({"m": 4} if to == "hnsw" else {}))

    with suppress(Died, psycopg.Error):
        await reconcile(settings, step=dying_at(step) if how == "closed" else killed_at(db, step))
        pytest.fail(f"the step {step} was not taken")
    terminate(db)
    put(db, library, "after", ["text 30"], vectors(1, 4, seed=5))
    assert search(db, library, given[7], k=1) == ["text 7"]

    await reconcile(settings)
    row = state(db, library)
    assert (row["index_state"], row["index_error"], row["index_actual"]["type"]) == ("ready", None, to)
    assert texts(db, library) == expected(31)
    assert search(db, library, given[7], k=1) == ["text 7"]
    check_tidy(db)


async def test_a_build_killed_in_the_middle_leaves_no_invalid_index(db: Connection, small: Settings) -> None:
    library = make_library(db, index={"type": "flat"})
    fill(db, library, vectors(30))
    await reconcile(small)
    shelf = state(db, library)["shelf"]
    want(db, library, HNSW)
    invalid = (
        "select count(*) from pg_index i where not i.indisvalid and i.indrelid = to_regclass('pgshelf.chunks_s' || %s)"
    )
    with psycopg.connect(small.database_url or "") as reader:
        reader.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        reader.execute("select count(*) from pgshelf.chunks_view")  # the build waits for its snapshot
        task = asyncio.create_task(reconcile(small))
        async with asyncio.timeout(20):
            while db.execute(invalid.encode(), [shelf]).fetchone() != (1,):  # noqa: ASYNC110 - another session's doing
                await asyncio.sleep(0.01)
        status = db.execute("select state, progress, phase, moving from pgshelf.index_status").fetchone()
        assert status is not None and status[0] == "building" and 0 < status[1] < 1 and status[2] and not status[3]
        terminate(db)
        with pytest.raises(psycopg.Error):
            await task
        assert search(db, library, vectors(30)[3], k=1) == ["text 3"]
    assert db.execute(invalid.encode(), [shelf]).fetchone() == (1,)
    await reconcile(small)
    assert state(db, library)["index_state"] == "ready"
    assert state(db, library)["index_actual"]["type"] == "hnsw"
    check_tidy(db)


async def test_a_build_that_fails_says_why_waits_and_is_tried_again(db: Connection, small: Settings) -> None:
    library = make_library(db, metric="l2", index={"type": "flat"})
    fill(db, library, vectors(30))
    put(db, library, "large", ["text 30"], [[1e6] * 8])
    await reconcile(small)
    want(db, library, {"type": "hnsw", "storage": "halfvec"})
    waits = []
    for attempt in range(1, 4):
        db.execute("update pgshelf.libraries set index_after = now()")
        await reconcile(small, sessions.Pace(grace=0, sweep=0, retry=100))
        row = state(db, library)
        assert (row["index_state"], row["index_attempts"]) == ("failed", attempt)
        assert "out of range for type halfvec" in row["index_error"]
        assert row["index_actual"] == {"type": "flat"}
        [(wait,)] = db.execute("select extract(epoch from index_after - now())::int from pgshelf.libraries").fetchall()
        waits.append(wait)
        assert [name for name in shelf_indexes(db, row["shelf"]) if "_v" in name] == []
    assert waits[0] in range(95, 101) and waits[1] in range(195, 201) and waits[2] in range(295, 301)
    status = db.execute("select state, progress, phase, error from pgshelf.index_status").fetchone()
    assert status == ("failed", 0, "waiting to try again", row["index_error"])
    assert search(db, library, vectors(30)[3], k=1) == ["text 3"]

    db.execute("delete from pgshelf.documents where key = 'large'")
    assert await reconcile(small) == [], "it is not its turn yet"
    assert want(db, library, {"type": "hnsw", "storage": "halfvec"}) is True  # tries at once
    await reconcile(small)
    row = state(db, library)
    assert (row["index_state"], row["index_error"], row["index_attempts"]) == ("ready", None, 0)
    check_tidy(db)


async def test_a_promotion_that_fails_leaves_the_library_where_it_was(db: Connection, small: Settings) -> None:
    library = make_library(db, metric="l2")
    fill(db, library, vectors(30))
    put(db, library, "large", ["text 30"], [[1e6] * 8])
    want(db, library, {"type": "hnsw", "storage": "halfvec"})
    await reconcile(small, sessions.Pace(grace=0, sweep=0, retry=100))
    row = state(db, library)
    assert (row["shelf"], row["moving"], row["index_state"]) == (0, 0, "failed")
    assert texts(db, library) == expected(31)
    check_tidy(db)


async def test_one_index_is_built_at_a_time_and_nothing_else_waits_for_it(
    db: Connection, small: Settings, database_url: str
) -> None:
    promoted = make_library(db, "to build", index=HNSW)
    plain = make_library(db, "plain", index={"type": "flat"})
    with psycopg.connect(database_url) as builder:
        builder.execute("select pg_advisory_lock(%s, %s)", [sessions.SHELVES, sessions.BUILD])
        await reconcile(small)
        assert (state(db, promoted)["shelf"], state(db, promoted)["index_state"]) == (0, "building")
        assert state(db, plain)["shelf"] > 0
        status = db.execute("select progress, phase from pgshelf.index_status where library = 'to build'").fetchone()
        assert status == (0, "queued")
    await reconcile(small)
    assert state(db, promoted)["index_state"] == "ready"


async def test_an_index_that_somebody_dropped_is_built_again(db: Connection, small: Settings) -> None:
    library = make_library(db, index=HNSW)
    fill(db, library, vectors(30))
    await reconcile(small)
    row = state(db, library)
    db.execute(f"drop index pgshelf.chunks_s{row['shelf']}_v{row['index_actual']['serial']}")
    assert "built" in await reconcile(small)
    assert state(db, library)["index_state"] == "ready"
    check_tidy(db)


async def test_what_a_killed_reindex_leaves_is_dropped(db: Connection, small: Settings) -> None:
    library = make_library(db, index=HNSW)
    fill(db, library, vectors(30))
    await reconcile(small)
    row = state(db, library)
    name = f"chunks_s{row['shelf']}_v{row['index_actual']['serial']}"
    for left in (f"{name}_ccnew", f"{name}_ccold1"):
        db.execute(f"create index {left} on pgshelf.chunks_s{row['shelf']} (ordinal)")
        db.execute("update pg_index set indisvalid = false where indexrelid = %s::regclass", [f"pgshelf.{left}"])
    assert await reconcile(small) == ["index dropped"] * 2
    assert state(db, library) == row
    check_tidy(db)


async def test_what_another_role_builds_is_left_to_it(db: Connection, small: Settings) -> None:
    """Whoever is no member of a role does not see what it does, but what it locks."""
    library = make_library(db, index=HNSW)
    fill(db, library, vectors(30))
    await reconcile(small)
    row = state(db, library)
    left = f"chunks_s{row['shelf']}_v{row['index_actual']['serial']}_ccnew"
    db.execute(f"create index {left} on pgshelf.chunks_s{row['shelf']} (ordinal)")
    db.execute("update pg_index set indisvalid = false where indexrelid = %s::regclass", [f"pgshelf.{left}"])
    with psycopg.connect(db.info.dsn) as other:
        other.execute(f"lock table pgshelf.chunks_s{row['shelf']} in share update exclusive mode")
        assert await reconcile(small) == []
    assert await reconcile(small) == ["index dropped"]


async def test_a_new_shelf_knows_its_rows(db: Connection, small: Settings) -> None:
    """What a move has inserted is not added to what it counted."""
    library = make_library(db, index=HNSW)
    fill(db, library, vectors(45))
    await reconcile(small)
    db.execute("select pg_stat_force_next_flush()")
    assert db.execute("select pgshelf.shelf_rows(%s)", [state(db, library)["shelf"]]).fetchone() == (45,)


async def test_a_build_without_shared_memory_goes_on_alone(
    db: Connection, small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(db, index=HNSW)
    fill(db, library, vectors(30))
    plain, seen = sessions.Session.run, []

    async def run(self: sessions.Session, statement: str, *parameters: Any) -> None:
        if "hnsw" in statement:
            seen.append((await self.rows("select current_setting('max_parallel_maintenance_workers')::int"))[0][0])
            if len(seen) == 1:
                raise psycopg.errors.DiskFull("could not resize shared memory segment")
        await plain(self, statement, *parameters)

    monkeypatch.setattr(sessions.Session, "run", run)
    await reconcile(small)
    assert len(seen) == 2 and seen[0] > 0 and seen[1] == 0
    assert state(db, library)["index_state"] == "ready"


async def test_a_build_gets_the_memory_it_is_estimated_to_need(
    db: Connection, small: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(db, index=HNSW)
    fill(db, library, vectors(30))
    plain, seen = sessions.Session.run, []

    async def run(self: sessions.Session, statement: str, *parameters: Any) -> None:
        if "hnsw" in statement:
            seen.append((await self.rows("select pg_size_bytes(current_setting('maintenance_work_mem'))"))[0][0])
        await plain(self, statement, *parameters)

    monkeypatch.setattr(sessions.Session, "run", run)
    for limit in (2**30, 2**22):
        want(db, library, {**HNSW, "m": 5 if limit == 2**30 else 6})
        await reconcile(msgspec.structs.replace(small, index_memory_bytes=limit))
    assert seen == [64 * 2**20, 2**22]


@pytest.mark.parametrize("name", ["hnsw", "hnsw vector", "hnsw bit", "ivfflat", "lsh", "kdtree"])
async def test_sizes_are_estimated(
    shared_db: Connection, shared_database_url: str, make_settings: Any, name: str
) -> None:
    db, (type_, *storage) = shared_db, name.split()
    index: dict[str, Any] = {"type": type_} | ({"storage": storage[0]} if storage else {})
    dimension, metric = (4, "l2") if type_ == "kdtree" else (96, "cosine")
    library = make_library(db, f"size of {name}", dimension, metric, index)
    fill(db, library, vectors(2000, dimension), per_document=1000)
    await reconcile(make_settings(shared_database_url))
    estimated, actual = db.execute(
        """select (pgshelf.index_estimate(i.actual, 2000, %s, 1073741824)).bytes, i.bytes
        from pgshelf.library_index(%s) i""",
        [dimension, library],
    ).fetchone()  # type: ignore[misc]  # one row
    assert 0.6 < estimated / actual < 1.4


# -- what indexes are computed from


def planes(db: Connection, serial: int, dimension: int, bits: int = 512, seed: int = 0) -> None:
    db.execute("select pgshelf.make_planes(%s, %s, %s, %s)", [serial, bits, seed, dimension])


def codes(db: Connection, serial: int, given: Any) -> Any:
    rows = [
        db.execute("select pgshelf.lsh_code(%s, %s)::text", [literal(vector), serial]).fetchone() for vector in given
    ]
    return np.array([[bit == "1" for bit in row[0]] for row in rows if row])


def test_bits_are_balanced_and_distances_proportional_to_the_angle(shared_db: Connection) -> None:
    bits, dimension = 512, 16
    planes(shared_db, 9001, dimension, bits)
    given = vectors(400, dimension, seed=3)
    found = codes(shared_db, 9001, given)
    # each plane halves isotropic vectors; 400 fair coins stay within 4.5 standard deviations 512 times over
    assert abs(found.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / math.sqrt(400)
    assert abs(found.mean() - 0.5) < 0.01
    # planes do not repeat each other: two of them, at a random angle in 16 dimensions, are as alike as chance has it
    signs = found.astype(float) * 2 - 1
    alike = (signs.T @ signs / 400)[np.triu_indices(bits, 1)]
    assert abs(alike.mean()) < 0.01 and 0.1 < abs(alike).mean() < 0.18

    base, other = given[0] / np.linalg.norm(given[0]), given[1]
    other = other - (other @ base) * base
    other /= np.linalg.norm(other)
    degrees = [0, 10, 30, 60, 90, 120, 180]
    turned = codes(shared_db, 9001, [math.cos(a) * base + math.sin(a) * other for a in np.radians(degrees)])
    shares = (turned != turned[0]).mean(axis=1)
    for angle, share in zip(degrees, shares, strict=True):
        exact = angle / 180
        assert abs(share - exact) <= 4 * math.sqrt(exact * (1 - exact) / bits), angle
    assert all(one < two for one, two in pairwise(shares))


def test_codes_do_not_depend_on_length(shared_db: Connection) -> None:
    planes(shared_db, 9002, 8, 64)
    [vector] = vectors(1)
    assert (codes(shared_db, 9002, [vector, vector * 1e-9, vector * 1e9]).std(axis=0) == 0).all()


def test_equal_seeds_give_equal_planes(shared_db: Connection) -> None:
    for serial, seed in ((9011, 7), (9012, 7), (9013, 8)):
        planes(shared_db, serial, 8, 64, seed)
        shared_db.execute("select random()")
    made = (
        "select serial, array_agg(plane::text order by number) from pgshelf.planes where serial > 9010 group by serial"
    )
    found = dict(shared_db.execute(made.encode()).fetchall())
    assert found[9011] == found[9012] != found[9013]


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
async def test_a_kdtree_finds_exactly_what_exact_search_finds(
    shared_db: Connection, shared_database_url: str, make_settings: Any, dimension: int
) -> None:
    db = shared_db
    library = make_library(db, f"kd {dimension}", dimension, "l2", {"type": "kdtree"})
    # far from the origin, close together, one direction much longer than the others, and copies
    spread = np.array([1.0, 20.0, 0.1, 5.0][:dimension])
    given = (vectors(600, dimension) * spread + 10_000).astype(np.float32)
    given = np.concatenate([given, given[:20]])
    fill(db, library, given, per_document=310)
    await reconcile(make_settings(shared_database_url))
    axes = np.array(state(db, library)["index_actual"]["axes"])
    assert axes.shape == (2, dimension)
    gram = axes @ axes.T
    assert np.allclose(gram, np.diag([1, 1 if dimension > 1 else 0]), atol=1e-5)
    if dimension > 1:
        assert abs(axes[0][1]) > 0.99, "the first axis is that of the largest variance"
    points = given.astype(float) @ axes.T
    exact = np.linalg.norm(given[:, None].astype(float) - given[None, :50].astype(float), axis=2)
    assert (np.linalg.norm(points[:, None] - points[None, :50], axis=2) <= exact).all(), "no lower bound"
    for query in [*given[:10], *(given[10:20] + 0.05)]:
        assert search(db, library, query, k=10) == search(db, library, query, k=10, exact=True)


# -- status and recall


async def test_the_status_is_for_analysts(db: Connection, small: Settings, database_url: str) -> None:
    library = make_library(db, "indexed", index=HNSW)
    make_library(db, "shared")
    fill(db, library, vectors(30))
    await reconcile(small)
    db.execute(f"analyze pgshelf.chunks_s{state(db, library)['shelf']}")
    with psycopg.connect(database_url, autocommit=True) as analyst:
        analyst.execute("select pgshelf.grant_library('pgshelf_reader', '*')")
        analyst.execute("set role pgshelf_reader")
        rows = analyst.execute(
            "select library, wanted, actual ->> 'type', state, progress, phase, bytes > 0, rows, valid, error"
            " from pgshelf.index_status order by library"
        ).fetchall()
        recall = analyst.execute("select * from pgshelf.index_recall('indexed', samples => 5, k => 3)").fetchone()
    assert rows == [
        ("indexed", HNSW, "hnsw", "ready", 1, None, True, 30, True, None),
        ("shared", {"type": "auto"}, "flat", "ready", 1, None, False, None, None, None),
    ]
    assert recall == (1, 1, 5)


async def test_recall_falls_where_the_index_does_not_find(db: Connection, small: Settings) -> None:
    library = make_library(db, index={"type": "lsh", "bits": 32, "m": 2, "ef_construction": 4})
    fill(db, library, vectors(1500), per_document=500)
    await reconcile(small)
    db.execute(  # a search that asks for no more candidates than it returns
        "create or replace function pgshelf.index_reach(p_index jsonb) returns text immutable language sql"
        " as $$ select '$3' $$"
    )
    recall, _, sampled = db.execute("select * from pgshelf.index_recall('notes', 20)").fetchone()  # type: ignore[misc]  # one row
    assert sampled == 20
    assert 0 < recall < 0.95
    assert db.execute("select * from pgshelf.index_recall('notes', 1000)").fetchone()[2] == 1000  # type: ignore[index]  # one row
    with pytest.raises(psycopg.DatabaseError, match="samples must be"):
        db.execute("select * from pgshelf.index_recall('notes', 0)")


def test_recall_of_an_empty_library_is_null(db: Connection) -> None:
    make_library(db)
    assert db.execute("select * from pgshelf.index_recall('notes')").fetchone() == (None, None, 0)


def test_two_wishes_at_once_leave_one(db: Connection, database_url: str) -> None:
    library = make_library(db)
    with psycopg.connect(database_url) as first:
        want(first, library, {"type": "flat"})
        with psycopg.connect(database_url) as second:
            second.execute("set lock_timeout = '50ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                want(second, library, HNSW)
    assert state(db, library)["index"] == {"type": "flat"}
