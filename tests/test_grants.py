"""Who sees which library in SQL: grants, the functions and views that heed them, row security behind them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from psycopg import sql

from pgshelf import migrate
from tests.roles import Login, ask, logins
from tests.test_sql_surface import make_library, put

pytestmark = pytest.mark.unwatched  # it asks PostgreSQL, and the service hardly

Connection = psycopg.Connection[Any]
VIEWS = {
    "libraries_overview": "name", "documents_view": "library", "chunks_view": "library",
    "pending_embeddings": "library", "index_status": "library", "embedder_status": "library",
}  # fmt: skip
# what a reader may call about a library, and a writer
READING = [
    "select count(*) from pgshelf.search(%s, '[1,0]')",
    "select count(*) from pgshelf.search_text(%s, 'dead')",
    "select count(*) from pgshelf.search_hybrid(%s, 'dead', '[1,0]')",
    "select pgshelf.explain_search(%s, '[1,0]') is not null",
    "select pgshelf.total_hits(%s)",
    "select count(*) from pgshelf.facets(%s, '{a}')",
    "select pgshelf.count_documents(%s)",
    "select count(*) from pgshelf.changes(%s)",
    "select sampled from pgshelf.index_recall(%s)",
]
WRITING = [
    "select pgshelf.put_document(%s, 'k', texts => '{dead rows}', embeddings => '{\"[1,0]\"}') is not null",
    'select pgshelf.update_documents(%s, \'{"$key": "k"}\', \'{"a": 1}\')',
    "select pgshelf.retry_embeddings(%s)",
    "select pgshelf.delete_document(%s, 'k')",
    'select pgshelf.delete_documents(%s, \'{"$key": "k"}\')',
]
NUMBERS = ["library_stats", "library_index", "library_embedder"]


@pytest.fixture
def owner(shared_database_url: str) -> Iterator[Connection]:
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def login(shared_database_url: str, vector_schema: str) -> Iterator[Login]:
    with logins(shared_database_url, vector_schema) as made:
        yield made


@pytest.fixture
def mine(owner: Connection) -> str:
    return filled(owner)


@pytest.fixture
def other(owner: Connection) -> str:
    return filled(owner)


def filled(owner: Connection) -> str:
    library = make_library(owner)
    put(owner, library, "k", ["dead rows", "other"], embeddings=[[1, 0], [0, 1]])
    return library


def state_of(url: str, statement: str, *parameters: Any) -> str | None:
    """The SQLSTATE that a statement ends in."""
    try:
        ask(url, statement, *parameters)
    except psycopg.Error as error:
        return error.sqlstate
    return None


def named(url: str, view: str) -> set[str]:
    return {name for (name,) in ask(url, f"select distinct {VIEWS[view]} from pgshelf.{view}")}


def message(url: str, statement: str, library: str) -> tuple[str | None, ...]:
    with pytest.raises(psycopg.Error) as caught:
        ask(url, statement, library)
    said = caught.value.diag
    return (
        caught.value.sqlstate,
        (said.message_primary or "").replace(library, "X"),
        said.message_hint,
        said.message_detail,
    )


def test_what_was_not_granted_is_not_there(owner: Connection, login: Login, mine: str, other: str) -> None:
    owner.execute("update pgshelf.chunks set embedding = null where text = 'other'")
    reader = login("pgshelf_reader", libraries={mine: "read"})
    for view in VIEWS:
        assert named(reader, view) == {mine}, view
    for statement in READING:
        ask(reader, statement, mine)
        assert message(reader, statement, other) == message(reader, statement, "nothing") == (
            "PS001", "there is no library 'X'", None, None,
        )  # fmt: skip
    [(library_id, other_id)] = ask(
        owner.info.dsn, "select (pgshelf.library_named(%s)).id, (pgshelf.library_named(%s)).id", mine, other
    )
    for function in NUMBERS:
        statement = f"select count(*) from pgshelf.{function}(%s::text::uuid)"
        assert ask(reader, statement, str(library_id)) == [(1,)]
        assert message(reader, statement, str(other_id)) == message(reader, statement, str(uuid.uuid4()))
    granted = "select pgshelf.granted(%s, 'read'), pgshelf.granted(%s, 'write'), pgshelf.granted(null, 'monitor')"
    assert ask(reader, granted, library_id, library_id) == [(True, False, False)]
    assert ask(reader, granted, other_id, other_id) == [(False, False, False)]
    assert ask(reader, "select pgshelf.granted_libraries('read')") == [([library_id],)]


def test_to_read_is_not_to_write(login: Login, mine: str, other: str) -> None:
    writer = login("pgshelf_writer", libraries={mine: "read"})
    for statement in READING:
        ask(writer, statement, mine)
    for statement in WRITING:
        assert state_of(writer, statement, mine) == "42501"
        assert state_of(writer, statement, other) == state_of(writer, statement, "nothing") == "PS001"
    both = login("pgshelf_writer", libraries={mine: "write"})
    for statement in WRITING:
        assert state_of(both, statement, mine) is None
        assert state_of(both, statement, other) == "PS001"


def test_a_monitor_sees_numbers_and_nothing_else(owner: Connection, login: Login, mine: str, other: str) -> None:
    owner.execute("update pgshelf.chunks set embedding = null where text = 'other'")
    monitor = login("pgshelf_monitor")
    for view in ("libraries_overview", "index_status", "embedder_status", "pending_embeddings"):
        assert named(monitor, view) >= {mine, other}
    assert state_of(monitor, "select 1 from pgshelf.audit_view") is None
    for view in ("documents_view", "chunks_view"):
        assert state_of(monitor, f"select 1 from pgshelf.{view}") == "42501"
    for statement in READING + WRITING:
        assert state_of(monitor, statement, mine) == "42501"
    # a reader of one library with the numbers of another
    some = login("pgshelf_reader", libraries={mine: "read", other: "monitor"})
    assert named(some, "libraries_overview") == {mine, other}
    assert named(some, "documents_view") == {mine}
    assert state_of(some, READING[0], other) == "PS001"
    assert state_of(login("pgshelf_reader"), "select 1 from pgshelf.audit_view") == "42501"


def test_grants_reach_members_and_go_with_set_role(owner: Connection, login: Login, mine: str, other: str) -> None:
    team = f"test_team_{uuid.uuid4().hex[:8]}"
    with ExitStack() as stack:
        owner.execute(f"create role {team} in role pgshelf_reader".encode())
        stack.callback(lambda: owner.execute(f"drop role {team}".encode()))
        stack.callback(lambda: owner.execute("select pgshelf.revoke_library(%s, '*')", [team]))
        owner.execute("select pgshelf.grant_library(%s, %s)", [team, mine])
        member = login(team)
        assert named(member, "documents_view") == {mine}
        lone = login("pgshelf_reader", libraries={other: "read"})
        assert named(lone, "documents_view") == {other}
        name = psycopg.conninfo.conninfo_to_dict(lone)["user"]
        owner.execute(f"grant {team} to {name} with inherit false, set true".encode())
        assert named(lone, "documents_view") == {other}
        with psycopg.connect(lone, autocommit=True) as session:
            session.execute(f"set role {team}".encode())
            assert session.execute("select distinct library from pgshelf.documents_view").fetchall() == [(mine,)]
            assert session.execute(READING[4].encode(), [mine]).fetchone() == (2,)
            with pytest.raises(psycopg.Error) as caught:
                session.execute(READING[4].encode(), [other])
            assert caught.value.sqlstate == "PS001"
            session.execute("reset role")
            assert session.execute(READING[4].encode(), [other]).fetchone() == (2,)
        # who is above row security is above grants
        assert named(login("pgshelf_reader", options="bypassrls"), "documents_view") >= {mine, other}


def test_patterns_become_grants_when_written(owner: Connection, login: Login) -> None:
    prefix = f"p{uuid.uuid4().hex[:8]}-"
    libraries = [f"{prefix}{n}" for n in range(3)]

    def add(name: str) -> None:
        owner.execute("update pgshelf.libraries set name = %s where name = %s", [name, make_library(owner)])

    for name in libraries[:2]:
        add(name)
    reader = login("pgshelf_reader")
    role = psycopg.conninfo.conninfo_to_dict(reader)["user"]
    grant, revoke = "select pgshelf.grant_library(%s, %s, %s)", "select pgshelf.revoke_library(%s, %s)"
    assert owner.execute(grant, [role, f"{prefix}*", "write"]).fetchone() == (2,)
    add(libraries[2])
    assert named(reader, "libraries_overview") == set(libraries[:2])
    owner.execute("update pgshelf.libraries set name = %s where name = %s", [f"{prefix}renamed", libraries[0]])
    assert named(reader, "libraries_overview") == {f"{prefix}renamed", libraries[1]}
    assert owner.execute(revoke, [role, libraries[1]]).fetchone() == (1,)
    assert named(reader, "libraries_overview") == {f"{prefix}renamed"}
    owner.execute("select pgshelf.delete_library(%s)", [f"{prefix}renamed"])
    assert named(reader, "libraries_overview") == set()
    assert owner.execute(grant, [role, "*", "read"]).fetchone() == (1,)
    assert libraries[2] in named(reader, "libraries_overview")
    notices: list[str] = []
    owner.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    assert owner.execute(revoke, [role, libraries[2]]).fetchone() == (0,)
    assert "sees all libraries" in notices[0]
    assert owner.execute(revoke, [role, "*"]).fetchone() == (2,)  # that of the deleted library among them
    assert named(reader, "libraries_overview") == set()
    for given, state in (
        (("nobody", "*", "read"), "42704"), ((role, "nothing", "read"), "PS001"),
        ((role, f"{prefix}x*", "read"), "PS001"),
        ((role, "*", "own"), "PS030"), ((role, "*", None), "PS030"), ((None, "*", "read"), "42704"),
    ):  # fmt: skip
        with pytest.raises(psycopg.Error) as caught:
            owner.execute(grant, given)
        assert caught.value.sqlstate == state, given
    # grants are written to the audit log by themselves
    rows = ask(
        owner.info.dsn,
        "select action, principal_kind, detail from pgshelf.audit_view where detail like %s order by at",
        f"{role}%",
    )
    assert [row[0] for row in rows] == ["grant.create"] * 2 + ["grant.revoke"] + ["grant.create"] + ["grant.revoke"] * 2
    assert {row[1] for row in rows} == {"role"} and rows[0][2] == f"{role} write"


def test_only_the_owner_grants(login: Login, mine: str) -> None:
    for role in ("pgshelf_reader", "pgshelf_writer", "pgshelf_monitor", "pgshelf_service"):
        member = login(role)
        for statement in (
            "select pgshelf.grant_library(session_user, %s, 'write')",
            "select pgshelf.revoke_library(session_user, %s)",
        ):
            assert state_of(member, statement, mine) == "42501"
        assert state_of(member, "insert into pgshelf.grants (role, access) values (session_user, 'write')") == "42501"


def test_row_security_guards_what_was_granted_by_hand(owner: Connection, login: Login, mine: str, other: str) -> None:
    """A DBA grants tables themselves; rows of other libraries stay hidden, and cannot be written."""
    member = login("pgshelf_writer", libraries={mine: "write"})
    role = str(psycopg.conninfo.conninfo_to_dict(member)["user"])
    tables = [
        name
        for (name,) in owner.execute(
            "select c.relname from pg_class c where c.relnamespace = 'pgshelf'::regnamespace and c.relrowsecurity"
        )
    ]
    with_library = {
        name
        for (name,) in owner.execute(
            "select distinct table_name from information_schema.columns c where table_schema = 'pgshelf'"
            " and column_name = 'library_id' and table_name !~ '_view$|_status$|^chunks_s|^audit'"
        )
    }
    assert set(tables) >= with_library | {"libraries", "next_embeddings", "embedding_cache"}
    policies = "select distinct p.tablename from pg_policies p where p.schemaname = 'pgshelf'"
    shown = {name for (name,) in owner.execute(policies)}  # the others are the owner's alone
    assert {"libraries", "documents", "chunks", "attribute_values", "change_log"} <= shown
    [(mine_id, other_id)] = ask(
        owner.info.dsn, "select (pgshelf.library_named(%s)).id, (pgshelf.library_named(%s)).id", mine, other
    )
    for table in tables:
        owner.execute(sql.SQL("grant all on pgshelf.{} to {}").format(sql.Identifier(table), sql.Identifier(role)))
        column = "id" if table == "libraries" else "library_id"
        if table in shown:
            seen = {library for (library,) in ask(member, f"select distinct {column} from pgshelf.{table}")}
            assert seen <= {mine_id}, table
            # each row that it may see, and no other
            assert ask(member, f"select count(*) from pgshelf.{table}") == ask(
                owner.info.dsn, f"select count(*) from pgshelf.{table} where {column} = %s", mine_id
            )
            assert ask(
                member,
                f"with d as (delete from pgshelf.{table} where {column} = %s returning 1) select count(*) from d",
                other_id,
            ) == [(0,)]
        else:
            assert ask(member, f"select count(*) from pgshelf.{table}") == [(0,)], table
    copy = "insert into pgshelf.documents (place, library_id, key) values (1, %s, %s)"
    owner.execute(f"grant execute on all functions in schema pgshelf to {role}".encode())
    assert state_of(member, copy, other_id, "x") == "42501"
    for moved in ("documents", "attribute_values"):
        assert state_of(member, f"update pgshelf.{moved} set library_id = %s", other_id) in (None, "42501")
    assert ask(owner.info.dsn, "select count(*) from pgshelf.documents where library_id = %s", other_id) == [(1,)]
    assert state_of(member, "select 1 from pgshelf.chunks_s0") == "42501"


def test_a_condition_of_the_caller_is_not_shown_what_it_may_not_see(
    owner: Connection, login: Login, mine: str, other: str
) -> None:
    """A function that is cheap and tells what it is given must come after the grant, in every view."""
    reader = login("pgshelf_reader", libraries={mine: "read"})
    owner.execute("grant create on schema public to public")
    try:
        with psycopg.connect(reader, autocommit=True) as session:
            session.execute(
                "create function public.told(text) returns boolean cost 0.0001 language plpgsql"
                " as $$ begin raise notice 'told %', $1; return true; end $$"
            )
            told: list[str] = []
            session.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))
            for view, column in VIEWS.items():
                session.execute(f"select * from pgshelf.{view} v where public.told(v.{column})".encode())
            assert {each.removeprefix("told ") for each in told} == {mine}
            session.execute("drop function public.told")
    finally:
        owner.execute("revoke create on schema public from public")


def test_the_service_may_be_granted_a_part(owner: Connection, login: Login, mine: str, other: str) -> None:
    service = login("pgshelf_service")
    assert ask(service, "select count(*) from pgshelf.libraries where name in (%s, %s)", mine, other) == [(2,)]
    owner.execute("begin")
    try:
        owner.execute(
            "select pgshelf.revoke_library('pgshelf_service', '*'),"
            " pgshelf.grant_library('pgshelf_service', %s, 'read')",
            [mine],
        )
        owner.execute("set local role pgshelf_service")
        assert owner.execute("select name from pgshelf.libraries").fetchall() == [(mine,)]
        assert owner.execute("select count(*) from pgshelf.documents").fetchone() == (1,)
        for statement, library, state in (
            ("select pgshelf.library_named(%s)", other, "PS001"),
            ("select pgshelf.delete_library(%s)", other, "PS001"),
            ("select pgshelf.patch_document(%s, 'k', '{}', '{}', null)", mine, "42501"),
            ('select pgshelf.want_index(%s, \'{"type": "flat"}\', 100)', mine, "42501"),
            ('select pgshelf.want_embedder(%s, \'{"provider": "none", "dimension": 2}\')', mine, "42501"),
            ("select pgshelf.cancel_embedder(%s)", mine, "42501"),
            ("select pgshelf.delete_library(%s)", mine, "42501"),
        ):
            with pytest.raises(psycopg.Error) as caught, owner.transaction():
                owner.execute(statement.encode(), [library])
            assert caught.value.sqlstate == state, statement
    finally:
        owner.execute("rollback")


def test_nobody_is_given_foreign_keys(owner: Connection, login: Login, mine: str, shared_database_url: str) -> None:
    """PostgreSQL checks them as the owner of the table, and runs what their maker wrote: a cast of the value, say."""
    owner.execute("grant references (id) on pgshelf.documents to pgshelf_reader, pgshelf_service")  # as once
    owner.execute("grant insert, update on pgshelf.libraries to pgshelf_service")
    migrate.upgrade(shared_database_url)
    held = owner.execute("select has_table_privilege('pgshelf_service', 'pgshelf.libraries', 'insert, update')")
    assert held.fetchone() == (False,)
    for role in ("reader", "writer", "monitor", "service", "worker"):
        question = "select has_any_column_privilege(%s, 'pgshelf.documents', 'references')"
        assert owner.execute(question, [f"pgshelf_{role}"]).fetchone() == (False,)
    reader = login("pgshelf_reader", libraries={mine: "read"})
    schema = sql.Identifier(f"s{uuid.uuid4().hex}")
    [[name]] = ask(reader, "select current_user")
    owner.execute(sql.SQL("create schema {} authorization {}").format(schema, sql.Identifier(name)))
    with psycopg.connect(reader, autocommit=True) as session, pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute(
            sql.SQL("create table {}.notes (document uuid references pgshelf.documents (id))").format(schema)
        )


INDEXES = [
    '{"type": "kdtree", "axes": [["(select 1 / 0)", 0], [0, 0]]}',
    '{"type": "lsh", "serial": "1), (select 1 / 0)", "bits": 64}',
    '{"type": "lsh", "serial": 1, "bits": "64)), (select 1 / 0"}',
    '{"type": "hnsw", "serial": 1, "storage": "vector", "m": "4), (select 1 / 0"}',
    '{"type": "hnsw", "serial": 1, "storage": "vector", "ef_construction": "4), (select 1 / 0"}',
    '{"type": "ivfflat", "serial": "1 (select 1 / 0)", "storage": "vector", "lists": 4}',
    '{"type": "ivfflat", "serial": 1, "storage": "vector", "lists": "4, (select 1 / 0)"}',
    '{"type": "ivfflat (select 1 / 0)", "serial": 1, "storage": "vector", "lists": 4}',
    '{"type": "hnsw", "serial": 1, "storage": "vector (select 1 / 0)"}',
]


@pytest.mark.parametrize("index", INDEXES)
def test_what_is_said_of_an_index_is_never_run(owner: Connection, login: Login, mine: str, index: str) -> None:
    """Neither the service may write it, nor does any of it but numbers and words of ours come into a statement."""
    service = login("pgshelf_service")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        ask(service, "update pgshelf.libraries set index_actual = %s::jsonb", index)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        ask(service, "update pgshelf.libraries set shelf = 7")
    told = """select pgshelf.index_key(x.i, 'l2', 2, '$1'), pgshelf.index_definition(x.i, 'l2', 2), s
        from (select %s::jsonb as i) x left join pgshelf.libraries l on l.name = %s
        left join pgshelf.build_statements(l.id, 1, x.i, false) s on true"""
    try:
        texts = owner.execute(told, [index, mine]).fetchall()
    except psycopg.errors.InvalidTextRepresentation:
        return
    assert "select" not in str(texts)
