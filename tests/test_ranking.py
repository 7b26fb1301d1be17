"""From candidates to hits: what words require of both sides, pages, groups, diversity, bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray

from pgshelf.settings import Settings
from tests.shelving import Connection, fill, literal, make_library, put, reconcile, vector_type, vectors

pytestmark = pytest.mark.unwatched  # it asks PostgreSQL, and the service hardly

HNSW = {"type": "hnsw", "m": 8, "ef_construction": 64}
FLAT = {"type": "flat"}
Found = list[tuple[Any, ...]]


@pytest.fixture
def db(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def reconciled(url: str) -> None:
    asyncio.run(reconcile(Settings(database_url=url, promote_at=100_000)))


def ask(db: Connection, call: str, **given: Any) -> Found:
    """Key, ordinal, score and distance of the hits of pgshelf.<call>, in which :v is the vector `v`."""
    given = {name: literal(value) if isinstance(value, np.ndarray | list) else value for name, value in given.items()}
    call = call.replace(":v", f"%(v)s::text::{vector_type(db)}")
    order = f"select key, ordinal, score, distance from pgshelf.{call}"
    return db.execute(order.encode(), given).fetchall()


def embedded_later(db: Connection, texts: str) -> None:
    """A document whose chunks have no vector yet."""
    db.execute(
        "update pgshelf.libraries set embedder = jsonb_build_object('provider', 'local', 'dimension', dimension)"
    )
    db.execute("select pgshelf.put_document('notes', 'pending', texts => %s)", [texts])


def keys(found: Found) -> list[str]:
    return [row[0] for row in found]


def angles(*degrees: float) -> NDArray[np.float64]:
    turned = np.radians(degrees)
    return np.stack([np.cos(turned), np.sin(turned)], axis=1)


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_a_chunk_without_a_vector_is_no_hit_of_one(db: Connection, database_url: str, metric: str) -> None:
    library = make_library(db, metric=metric, index={**HNSW, "storage": "vector"})
    fill(db, library, vectors(12), per_document=1)
    reconciled(database_url)
    with db.transaction(force_rollback=True):  # before anybody embeds it
        embedded_later(db, "{later, again, and again}")
        for call in (
            "search('notes', :v, k => 15)",
            "search('notes', :v, k => 15, ef_search => 50)",
            "search('notes', :v, k => 4, mmr_lambda => 0.5, mmr_candidates => 15)",
            'search(\'notes\', :v, k => 15, filter => \'{"$key": {"$ne": "d0"}}\')',
            "search('notes', :v, k => 15, group_by => 'document')",
        ):
            found = ask(db, call, v=vectors(1)[0])
            assert len(found) in (4, 11, 12), call
            assert all(score is not None and distance is not None for *_, score, distance in found), call


@pytest.mark.parametrize("index", [None, FLAT, HNSW], ids=["shared", "flat", "hnsw"])
def test_phrases_and_exclusions_hold_for_both_sides(
    db: Connection, database_url: str, index: dict[str, Any] | None
) -> None:
    library = make_library(db, dimension=2, index=index)
    texts = [
        "dead rows are removed",
        "rows that are dead",
        "dead rows and autovacuum",
        "nothing of it",
        "dead rows again",
    ]
    for number, (text, vector) in enumerate(zip(texts * 20, angles(*range(100)), strict=True)):
        put(db, library, f"{number % 5} {number}", [text], [vector])
    if index:
        reconciled(database_url)
    with_phrase = {number for number in range(100) if number % 5 in (0, 4)}
    for call in (
        "search_hybrid('notes', '\"dead rows\" -autovacuum', :v, k => 50)",
        "search_hybrid('notes', '\"dead rows\" -autovacuum', :v, k => 50, fusion => 'weighted')",
        "search_hybrid('notes', '\"dead rows\" -autovacuum', :v, k => 50, exact => true)",
    ):
        found = {int(key.split()[1]) for key in keys(ask(db, call, v=[1.0, 0.0]))}
        assert found == with_phrase, call
    alone = ask(db, "search_hybrid('notes', '-dead', :v, k => 50)", v=[1.0, 0.0])
    assert {key[0] for key in keys(alone)} == {"3"} and len(alone) == 20
    grouped = ask(db, "search_hybrid('notes', '\"dead rows\"', :v, k => 10, group_by => 'document')", v=[1.0, 0.0])
    assert len(grouped) == 10 and {key[0] for key in keys(grouped)} <= {"0", "2", "4"}


def test_a_statement_that_is_kept_heeds_what_other_words_require(db: Connection) -> None:
    library = make_library(db, dimension=2)
    for number, vector in enumerate(angles(*range(10))):
        put(db, library, f"d{number}", ["red fox" if number % 2 else "red hen"], [vector])
    statement = db.execute(
        "select pgshelf.search_statement(pgshelf.library_named('notes'), 'hybrid', p_query => 'red')"
    )
    [text] = statement.fetchone() or [""]
    kind = vector_type(db)
    types = f"{kind}, jsonb, int, text, float8, float8, text[], int, int, int, float8[], int, float8"
    db.execute(f"prepare asked ({types}) as {text}".encode())
    for words, number in (("red", 10), ("red -fox", 5), ('"red fox"', 5)):
        call = f"execute asked ('[1,0]', null, 50, '{words}', null, null, '{{}}', 10, 0, 60, '{{1,1}}', 1, null)"
        assert len(db.execute(call.encode()).fetchall()) == number, words


def test_too_far_is_left_out_whatever_its_words(db: Connection) -> None:
    library = make_library(db, dimension=2)
    for number, vector in enumerate(angles(0, 30, 60, 80)):
        put(db, library, f"d{number}", [f"rows {number}"], [vector])
    embedded_later(db, "{rows without a vector}")
    near = ask(db, "search_hybrid('notes', 'rows', :v, max_distance => 0.2)", v=[1.0, 0.0])
    assert set(keys(near)) == {"d0", "d1", "pending"}


def test_pages_of_a_hybrid_search_are_one_list(db: Connection) -> None:
    library = make_library(db)
    given = vectors(150, seed=5)
    for number in range(150):
        put(
            db,
            library,
            f"d{number}",
            [" ".join(["dead"] * (number % 7) + ["vacuum", "pad"] * (number % 5 + 1))],
            given[number : number + 1],
        )
    for extra in ("", ", fusion => 'weighted'", ", mmr_lambda => 0.3"):
        call = f"search_hybrid('notes', 'dead vacuum', :v, k => %(k)s, \"offset\" => %(offset)s{extra})"
        whole = ask(db, call, v=given[0], k=50, offset=0)
        paged = [row for offset in range(0, 50, 10) for row in ask(db, call, v=given[0], k=10, offset=offset)]
        if "mmr" not in extra:
            assert paged == whole, extra
        assert len(set(keys(ask(db, call, v=given[0], k=5, offset=0) + ask(db, call, v=given[0], k=5, offset=5)))) == 10


def test_pages_behind_ef_search_are_one_list(db: Connection, database_url: str) -> None:
    library = make_library(db, dimension=16, index={**HNSW, "storage": "vector"})
    fill(db, library, vectors(1500, 16))
    reconciled(database_url)
    asked = vectors(1, 16, 9)[0]
    for first, last in ((0, 100), (100, 200), (200, 400)):
        found = []
        for offset in range(first, last, 10):
            found += ask(db, "search('notes', :v, k => 10, \"offset\" => %(offset)s)", v=asked, offset=offset)
        assert len({row[:2] for row in found}) == last - first


@pytest.mark.parametrize("index", [None, HNSW], ids=["shared", "hnsw"])
def test_a_document_has_its_best_few_whatever_others_have(
    db: Connection, database_url: str, index: dict[str, Any] | None
) -> None:
    library = make_library(db, dimension=2, index=index)
    put(db, library, "far", ["f0", "f1", "f2", "f3"], angles(1, 70, 80, 60))
    for number in range(6):
        put(
            db, library, f"near {number}", [f"n{n}" for n in range(4)], angles(*(2 + number + n / 10 for n in range(4)))
        )
    if index:
        reconciled(database_url)
    call = "search('notes', :v, k => %(k)s, group_by => 'document', group_size => 3{})"
    for k in (1, 3, 7):
        found = ask(db, call.format(""), v=[1.0, 0.0], k=k)
        assert [row[:2] for row in found[:3]] == [("far", 0), ("far", 3), ("far", 1)]
        assert [row[:2] for row in found[3:]] == [(f"near {n}", m) for n in range(k - 1) for m in range(3)]
    odd = ask(db, call.format(', filter => \'{"chunk.$ordinal": {"$in": [1, 3]}}\''), v=[1.0, 0.0], k=7)
    assert [row[:2] for row in odd if row[0] == "far"] == [("far", 3), ("far", 1)]
    near = ask(db, call.format(", max_distance => 0.4"), v=[1.0, 0.0], k=7)
    assert [row[:2] for row in near if row[0] == "far"] == [("far", 0)]
    second = ask(db, call.format(', "offset" => 1'), v=[1.0, 0.0], k=1)
    assert [row[:2] for row in second] == [("near 0", 0), ("near 0", 1), ("near 0", 2)]


def test_a_document_has_its_best_few_by_words(db: Connection) -> None:
    library = make_library(db, dimension=2)
    put(
        db,
        library,
        "much",
        ["rare rare rare", "rare pad pad pad pad pad pad pad pad pad pad pad pad pad pad"],
        angles(0, 1),
    )
    for number in range(30):
        put(db, library, f"d{number}", [f"rare pad {number} {n}" for n in range(4)], angles(0, 1, 2, 3))
    found = ask(db, "search_text('notes', 'rare', k => 1, group_by => 'document', group_size => 2)")
    assert [row[:2] for row in found] == [("much", 0), ("much", 1)]


def test_diverse_hits_are_chosen_from_the_best(db: Connection) -> None:
    library = make_library(db)
    given = vectors(60, seed=3)
    for number in range(60):
        put(db, library, f"d{number}", [f"dead rows {number}" if number % 3 else "nothing"], given[number : number + 1])
    call = "search_hybrid('notes', 'dead rows', :v, k => %(k)s{})"
    plain = ask(db, call.format(""), v=given[1], k=20)
    assert ask(db, call.format(", mmr_lambda => 1"), v=given[1], k=20) == plain
    for candidates in (3, 5):
        spread = ask(db, call.format(f", mmr_lambda => 0, mmr_candidates => {candidates}"), v=given[1], k=3)
        assert set(spread) <= set(plain[:candidates])


def test_what_is_not_good_enough_is_not_chosen_first(db: Connection) -> None:
    library = make_library(db, dimension=2)
    for degrees in (1, 2, 3, -79, 80):
        put(db, library, f"{degrees}", [f"text {degrees}"], angles(degrees))
    call = "search('notes', :v, k => 3, mmr_lambda => 0.3, mmr_candidates => 5, {})"
    by_score = ask(db, call.format("min_score => 0.5"), v=[1.0, 0.0])
    assert by_score == ask(db, call.format("max_distance => 0.5"), v=[1.0, 0.0])
    assert sorted(keys(by_score)) == ["1", "2", "3"]


def test_words_of_a_library_that_has_grown_are_counted_again(db: Connection, database_url: str) -> None:
    libraries: list[UUID] = [make_library(db, "own", 2, index=FLAT), make_library(db, "shared", 2)]
    put(db, libraries[0], "first", ["alpha"], angles(0))
    reconciled(database_url)
    db.execute("select pgshelf.refresh_words(%s)", [libraries[0]])
    put(db, libraries[1], "first", ["alpha"], angles(0))
    rest = ["alpha xx pad pad", "beta gamma pad pad"]
    for word, number in (("alpha", 19), ("beta", 39), ("gamma", 40)):
        rest += [word + " pad" * 5] * number
    for library in libraries:
        put(db, library, "rest", rest, angles(*range(len(rest))))
    call = "search_text('{}', 'alpha beta gamma', k => 5)"
    first, second = (ask(db, call.format(name)) for name in ("own", "shared"))
    assert first[0][:2] == second[0][:2] == ("first", 0)
    assert [row[2] for row in first] == pytest.approx([row[2] for row in second])
    db.execute("update pgshelf.word_statistics set made_at = now() - interval '2 minutes'")
    db.execute("select pg_stat_force_next_flush()")
    assert db.execute("select pgshelf.words_due(10)").fetchall() == [(libraries[0],)]
    state = "select pgshelf.search_state('own')"
    seen = [db.execute(state).fetchone()]
    for _ in range(2):  # what is counted again and is the same is no other state
        db.execute("select pgshelf.refresh_words(%s)", [libraries[0]])
        seen.append(db.execute(state).fetchone())
    assert seen[0] != seen[1] == seen[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            "search_hybrid('notes', 'a', :v, candidates => -3, mmr_lambda => 0.5, mmr_candidates => 5)",
            "candidates must",
        ),
        ("search_hybrid('notes', 'a', :v, candidates => 2000000000)", "candidates must"),
        ("search('notes', :v, include => '{bogus}')", "include may hold"),
        ("search_text('notes', 'a', include => '{text,bogus}')", "include may hold"),
        ("search_hybrid('notes', 'a', :v, include => '{bogus}')", "include may hold"),
    ],
)
def test_what_is_out_of_bounds_is_said(db: Connection, call: str, message: str) -> None:
    make_library(db, dimension=2)
    with pytest.raises(psycopg.Error, match=message) as refused:
        ask(db, call, v=[1.0, 0.0])
    assert refused.value.sqlstate == "PS030"


@pytest.mark.parametrize("index", [{**HNSW, "storage": "bit"}, {"type": "lsh", "bits": 64}], ids=["bit", "lsh"])
def test_the_last_page_there_can_be_is_empty(db: Connection, database_url: str, index: dict[str, Any]) -> None:
    library = make_library(db, index=index)
    fill(db, library, vectors(12))
    reconciled(database_url)
    for grouped in ("", ", group_by => 'document', group_size => 100"):
        assert ask(db, f"search('notes', :v, k => 10000, \"offset\" => 1000000{grouped})", v=vectors(1)[0]) == []
