"""The common searches of a library are functions whose plans PostgreSQL keeps: which, when they are used, and that a
search finds the same without them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, LiteralString
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb

from pgshelf import migrate
from pgshelf.settings import Settings
from tests.shelving import PROMOTE_AT, Connection, fill, literal, make_library, reconcile, state, vectors, want

pytestmark = pytest.mark.unwatched  # it asks PostgreSQL, and the service hardly

HNSW = {"type": "hnsw", "m": 4, "ef_construction": 16}
VECTOR = literal(vectors(1, seed=7)[0])
NAMES = (
    "select proname from pg_proc where pronamespace = 'pgshelf'::regnamespace and proname ~ '^kept_s[0-9]+_' order by 1"
)
FOUND = "s.chunk_id, s.key, s.ordinal, s.score, s.distance, s.text, s.metadata, s.title, s.document_metadata"
COMMON: dict[str, LiteralString] = {
    "vector": "pgshelf.search('notes', %(vector)s::text::{vector})",
    "more": "pgshelf.search('notes', %(vector)s::text::{vector}, k => 30, \"offset\" => 5, max_distance => 1.2)",
    "words": "pgshelf.search_text('notes', 'text 7 8 11 13 21 34')",
    "many words": "pgshelf.search_text('notes', 'text 7 8 11 13 21 34 40 41 42 43 44 te* -9')",
    "few documents": 'pgshelf.search(\'notes\', %(vector)s::text::{vector}, filter => \'{{"$key": {{"$ne": "d0"}}}}\')',
    "few chunks": "pgshelf.search('notes', %(vector)s::text::{vector}, filter => '{{\"chunk.$ordinal\": 1}}')",
    "both": "pgshelf.search_hybrid('notes', 'text 7 8', %(vector)s::text::{vector}, min_score => 0.01)",
}
SPECIAL: dict[str, LiteralString] = {
    "exact": "pgshelf.search('notes', %(vector)s::text::{vector}, exact => true)",
    "ef": "pgshelf.search('notes', %(vector)s::text::{vector}, ef_search => 90)",
    "grouped": "pgshelf.search('notes', %(vector)s::text::{vector}, group_by => 'document')",
    "mmr": "pgshelf.search_hybrid('notes', 'text 7 8', %(vector)s::text::{vector}, mmr_lambda => 0.4)",
    "weighted": "pgshelf.search_hybrid('notes', 'text 7 8', %(vector)s::text::{vector}, fusion => 'weighted')",
}


@pytest.fixture
def db(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def library(db: Connection, database_url: str) -> UUID:
    """On a shelf of its own, with a graph."""
    made = make_library(db, index=HNSW)
    fill(db, made, vectors(120))
    reconciled(database_url)
    return made


def reconciled(url: str) -> None:
    asyncio.run(reconcile(Settings(database_url=url, promote_at=PROMOTE_AT)))


def kept(db: Connection) -> list[str]:
    return [name for (name,) in db.execute(NAMES).fetchall()]


def calls(url: str, vector_schema: str, search: LiteralString) -> tuple[list[tuple[Any, ...]], int]:
    """What a search finds in a session of its own, asked twice, and how often a kept statement ran for it."""
    with psycopg.connect(url, autocommit=True) as session:
        session.execute("set track_functions = 'pl'")
        statement = f"select {FOUND} from {search.format(vector=vector_schema + '.vector')} s".encode()
        found = session.execute(statement, {"vector": VECTOR}).fetchall()
        assert session.execute(statement, {"vector": VECTOR}).fetchall() == found
        session.execute("select pg_stat_force_next_flush()")
        row = session.execute(
            "select coalesce(sum(calls), 0) from pg_stat_user_functions where funcname ~ '^kept_s[0-9]+_'"
        ).fetchone()
        assert row
        session.execute("select pg_stat_reset()")
        return found, int(row[0])


@pytest.mark.parametrize("search", COMMON, ids=str)
def test_common_searches_keep_their_plans_and_find_the_same(
    db: Connection, database_url: str, library: UUID, vector_schema: str, search: str
) -> None:
    assert len(kept(db)) == 5
    found, times = calls(database_url, vector_schema, COMMON[search])
    assert (len(found) >= 8, times) == (True, 2)
    for name in kept(db):
        db.execute(f"drop function pgshelf.{name}".encode())
    assert calls(database_url, vector_schema, COMMON[search]) == (found, 0)


@pytest.mark.parametrize("search", SPECIAL, ids=str)
def test_special_wishes_are_planned_as_they_come(
    database_url: str, library: UUID, vector_schema: str, search: str
) -> None:
    found, times = calls(database_url, vector_schema, SPECIAL[search])
    assert (len(found) >= 8, times) == (True, 0)


def test_another_index_has_other_statements(
    db: Connection, database_url: str, library: UUID, vector_schema: str
) -> None:
    before = kept(db)
    want(db, library, HNSW | {"storage": "vector"})
    reconciled(database_url)
    after = kept(db)
    assert len(after) == 5
    assert len(set(after) & set(before)) == 3  # that by words, and those among few documents and few chunks
    assert calls(database_url, vector_schema, COMMON["vector"])[1] == 2
    want(db, library, {"type": "flat"})
    reconciled(database_url)
    assert len(kept(db)) == 3
    assert calls(database_url, vector_schema, COMMON["vector"])[1] == 0
    assert calls(database_url, vector_schema, COMMON["few documents"])[1] == 2
    assert calls(database_url, vector_schema, COMMON["few chunks"])[1] == 2
    assert calls(database_url, vector_schema, COMMON["words"])[1] == 2


STATED = """select k.kind, pgshelf.kept_name(x, k.kind), pgshelf.kept_statement(x, k.kind)
  from pgshelf.libraries l cross join jsonb_populate_record(l, %s) x
  cross join unnest(array['vector', 'text', 'hybrid', 'documents', 'chunks']) k(kind)"""
OTHERS: dict[str, Any] = {
    "text": "other", "integer": 7, "bigint": 7, "double precision": 7, "boolean": True, "regconfig": "german",
    "uuid": "123e4567-e89b-12d3-a456-426614174000", "timestamp with time zone": "2020-01-01", "jsonb": {"a": "text"},
}  # fmt: skip
INDEXES: list[dict[str, Any]] = [
    {"type": "hnsw", "storage": "vector", "serial": 1},
    {"type": "hnsw", "storage": "bit", "serial": 1},
    {"type": "hnsw", "storage": "halfvec", "serial": 9},
    {"type": "ivfflat", "storage": "halfvec", "lists": 9, "serial": 1},
    {"type": "ivfflat", "storage": "halfvec", "lists": 16, "serial": 1},
    {"type": "lsh", "bits": 64, "serial": 1},
    {"type": "lsh", "bits": 64, "serial": 2},
    {"type": "flat"},
]


def test_a_name_stands_for_one_statement(db: Connection, library: UUID) -> None:
    """Whatever is changed of a library, one column after the other: what keeps its name says the same."""

    def stated(change: dict[str, Any]) -> dict[str, tuple[str, str]]:
        return {kind: (name, said) for kind, name, said in db.execute(STATED, [Jsonb(change)]).fetchall()}

    columns = db.execute(
        """select a.attname, format_type(a.atttypid, null) from pg_attribute a
        where a.attrelid = 'pgshelf.libraries'::regclass and a.attnum > 0 and not a.attisdropped"""
    ).fetchall()
    changes = [{name: OTHERS[kind]} for name, kind in columns if name not in ("index_actual", "metric")]
    changes += [{"index_actual": index} for index in INDEXES]
    changes += [{"metric": metric} for metric in ("l2", "inner_product", "l1")]
    before, differ = stated({}), set()
    for change in changes:
        for kind, (name, said) in stated(change).items():
            assert (name != before[kind][0]) or (said == before[kind][1]), (change, kind)
            differ |= {(*change, kind)} if said != before[kind][1] else set()
    assert len(differ) >= 15, differ


def test_a_library_that_has_grown_ranks_more_codes_again(
    db: Connection, database_url: str, library: UUID, vector_schema: str
) -> None:
    """By a statement of another name, once the worker has come by."""
    want(db, library, {"type": "lsh", "bits": 64})
    reconciled(database_url)
    assert calls(database_url, vector_schema, COMMON["vector"])[1] == 2
    shelf = state(db, library)["shelf"]
    db.execute("update pg_class set reltuples = 90000 where oid = to_regclass('pgshelf.chunks_s' || %s)", [shelf])
    assert calls(database_url, vector_schema, COMMON["vector"])[1] == 0
    db.execute("select pgshelf.keep_statements(%s)", [library])
    assert calls(database_url, vector_schema, COMMON["vector"])[1] == 2


def test_an_index_that_changed_a_moment_ago_is_searched_by_its_own_statement(
    db: Connection, database_url: str, library: UUID, vector_schema: str
) -> None:
    db.execute('update pgshelf.libraries set index_actual = index_actual || \'{"type": "flat"}\'')
    found, times = calls(database_url, vector_schema, COMMON["vector"])
    assert times == 0
    assert found == calls(database_url, vector_schema, SPECIAL["exact"])[0]


def test_what_is_dropped_in_between_does_no_harm(
    db: Connection, database_url: str, library: UUID, vector_schema: str
) -> None:
    """Between looking for the function and calling it, it may be gone; here it says so when it is called."""
    search = COMMON["both"]
    found, _ = calls(database_url, vector_schema, search)
    for name in kept(db):
        db.execute(
            f"""do $$ begin execute (select replace(pg_get_functiondef(p.oid), p.prosrc,
              'begin perform pgshelf.gone(); end') from pg_proc p where p.proname = '{name}'); end $$""".encode()
        )
    with pytest.raises(psycopg.errors.UndefinedFunction):
        db.execute(f"select pgshelf.{kept(db)[0]}({', '.join(['null'] * 14)})".encode())
    assert calls(database_url, vector_schema, search)[0] == found


def test_a_session_keeps_no_more_than_it_should(
    db: Connection, database_url: str, library: UUID, vector_schema: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as session:
        session.execute("set track_functions = 'pl'")
        search = COMMON["vector"].format(vector=vector_schema + ".vector")
        session.execute("select set_config('pgshelf.kept', repeat('x', 4000), false)")
        assert len(session.execute(f"select * from {search}".encode(), {"vector": VECTOR}).fetchall()) == 10
        session.execute("select pg_stat_force_next_flush()")
        assert session.execute("select from pg_stat_user_functions where funcname ~ '^kept_s[0-9]'").fetchall() == []


def test_a_shelf_that_goes_takes_its_statements_along(db: Connection, database_url: str, library: UUID) -> None:
    shelf = state(db, library)["shelf"]
    db.execute("select pgshelf.delete_library(%s)", [str(library)])
    reconciled(database_url)
    assert db.execute("select to_regclass('pgshelf.chunks_s' || %s)", [shelf]).fetchone() == (None,)
    assert kept(db) == []


def test_a_migration_drops_them_and_the_next_round_makes_them(
    db: Connection, database_url: str, library: UUID, vector_schema: str
) -> None:
    names = kept(db)
    migrate.upgrade(database_url, vector_schema=vector_schema)
    assert kept(db) == []
    assert calls(database_url, vector_schema, COMMON["words"])[1] == 0
    reconciled(database_url)
    assert kept(db) == names


async def test_a_migration_waits_for_statements_that_are_being_made(
    db: Connection, database_url: str, library: UUID, vector_schema: str
) -> None:
    """Else what the older version writes would be found by the newer one, under the same name."""
    db.execute("update pgshelf.libraries set language = 'german'")
    with psycopg.connect(database_url) as worker:
        worker.execute("select pgshelf.keep_statements(%s)", [library])
        upgrade = asyncio.create_task(asyncio.to_thread(migrate.upgrade, database_url, vector_schema=vector_schema))
        waiting = "select from pg_locks where locktype = 'advisory' and not granted and classid = x'6b657074'::int"
        async with asyncio.timeout(20):
            while db.execute(waiting).fetchone() is None:
                assert not upgrade.done()
                await asyncio.sleep(0.01)
        worker.commit()
        await upgrade
    assert kept(db) == []


def test_none_are_made_while_a_migration_comes(db: Connection, database_url: str, library: UUID) -> None:
    db.execute("update pgshelf.libraries set language = 'german'")
    before = kept(db)
    with psycopg.connect(database_url) as migration:
        migration.execute("select pg_advisory_xact_lock(x'6b657074'::int, 0)")
        db.execute("select pgshelf.keep_statements(%s)", [library])
        assert kept(db) == before
    db.execute("select pgshelf.keep_statements(%s)", [library])
    assert set(kept(db)).isdisjoint(before)


def test_nobody_else_may_call_them(db: Connection, library: UUID) -> None:
    public = db.execute(
        """select from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
        where p.proname ~ '^kept_s[0-9]' and a.grantee <> p.proowner"""
    ).fetchall()
    assert public == []


def test_they_do_not_tell_the_id_of_their_library(db: Connection, library: UUID) -> None:
    """Everybody may read pg_proc."""
    bodies = db.execute("select prosrc from pg_proc where proname ~ '^kept_s[0-9]'").fetchall()
    assert len(bodies) == 5
    assert [body for (body,) in bodies if str(library) in body] == []


def test_small_libraries_have_none(db: Connection, database_url: str) -> None:
    made = make_library(db)
    fill(db, made, vectors(10))
    reconciled(database_url)
    assert kept(db) == []
    assert db.execute("select pgshelf.keep_statements(%s)", [made]).fetchone() == ("",)
    assert kept(db) == []
