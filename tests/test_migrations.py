"""Migrations: every way gives the same database, beside an application, and back to nothing.

Roles belong to a whole cluster, so these tests have a server of their own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.script import ScriptDirectory
from click.testing import CliRunner
from psycopg import conninfo, sql

from pgshelf import embedded, migrate, schema
from pgshelf.cli import main
from pgshelf.tables import metadata
from tests.postgres import Choice, Databases, Server, on_database, start_server

ROLES = ("pgshelf_reader", "pgshelf_writer", "pgshelf_monitor", "pgshelf_service", "pgshelf_worker")
CLONE = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
Connect = Callable[[str], psycopg.Connection[Any]]
HEAD = schema.head()
REVISIONS = [script.revision for script in ScriptDirectory(str(schema.resource("migrations"))).walk_revisions()][::-1]
VERSION = "select version_num from pgshelf.alembic_version"


class Cluster:
    """A server whose databases and roles a test may treat as it likes; everything goes when the test ends."""

    def __init__(self, server: Server) -> None:
        self.admin = psycopg.connect(server.admin_url, autocommit=True)
        self.server = server
        self._made: list[tuple[Databases, str]] = []
        self._roles: list[str] = [*ROLES]

    def database(self, vector: str | None = "public", owner: str | None = None) -> str:
        """Make a database with pgvector in a schema, or without it."""
        databases = Databases(self.server, vector or "public")
        url = databases.empty()
        self._made.append((databases, url))
        if vector is None:
            execute(url, "drop extension vector")
        if owner:
            name = sql.Identifier(name_of(url))
            self.admin.execute(sql.SQL("alter database {} owner to {}").format(name, sql.Identifier(owner)))
        return url

    def role(self, name: str, options: str = "") -> None:
        self.admin.execute(f"create role {name} login password 'secret' {options}")
        self._roles.append(name)

    def roles(self) -> set[str]:
        return {name for (name,) in self.admin.execute("select rolname from pg_roles where rolname !~ '^pg_'")}

    def clean(self) -> None:
        for databases, url in self._made:
            databases.drop(url)
            databases.close()
        for role in self._roles:
            self.admin.execute(f"drop role if exists {role}")
        self.admin.close()


@pytest.fixture(scope="module")
def own_server(postgres: Server, postgres_version: int) -> Iterator[Server]:
    kind = postgres.choice.kind
    version = postgres_version if kind == "containers" or postgres_version != 17 else 18
    server = start_server(Choice("embedded" if kind == "dsn" else kind, version))
    yield server
    server.close()


@pytest.fixture
def cluster(own_server: Server) -> Iterator[Cluster]:
    made = Cluster(own_server)
    yield made
    made.clean()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `pgshelf` or `alembic` in the clone, against a database."""

    def run(url: str | None, *words: str, vector: str | None = None) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("PGSHELF_DATABASE_URL", url or "")
        monkeypatch.setenv("PGSHELF_VECTOR_SCHEMA", vector or "")
        program = [str(PROGRAMS / words[0]), *words[1:]]
        return subprocess.run(program, capture_output=True, text=True, cwd=CLONE, timeout=120)

    return run


def name_of(url: str) -> str:
    return str(conninfo.conninfo_to_dict(url)["dbname"])


def as_role(url: str, role: str) -> str:
    return conninfo.make_conninfo(url, user=role, password="secret")


def execute(url: str, *statements: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)


def rows(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(statement).fetchall()


def one(url: str, statement: str) -> Any:
    return rows(url, statement)[0][0]


def psql(url: str, script: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(embedded.bin_dir() / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", url, "-f", "-"]
    return subprocess.run(arguments, input=script, capture_output=True, text=True, timeout=120)


def dump(url: str, *options: str) -> str:
    done = subprocess.run(
        [str(embedded.bin_dir() / "pg_dump"), *options, "-d", url], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # a key that is different in every dump
    return re.sub(r"^\\(un)?restrict .*$", "", done.stdout, flags=re.MULTILINE)


def everything(url: str) -> tuple[str, list[tuple[Any, ...]]]:
    """All that a database holds, data included, and the settings that belong to it and to roles."""
    return dump(url), rows(url, "select setrole::regrole::text, setconfig from pg_db_role_setting order by 1, 2")


def outside(url: str) -> list[Any]:
    """Everything in a database but the schema pgshelf, byte for byte, and what the cluster knows of it."""
    return [
        dump(url, "--exclude-schema=pgshelf"),
        rows(url, "select setdatabase, setrole::regrole::text, setconfig from pg_db_role_setting order by 1, 2, 3"),
        rows(url, "select * from pg_roles where rolname !~ '^pg' order by rolname"),
        rows(url, "select roleid::regrole::text, member::regrole::text from pg_auth_members order by 1, 2"),
        rows(
            url,
            "select oid, defaclrole, defaclnamespace, defaclobjtype, defaclacl::text from pg_default_acl order by 1",
        ),
        rows(url, "select datname, datdba, datacl::text from pg_database order by 1"),
        rows(url, "select oid, nspname, nspowner, nspacl::text from pg_namespace where nspname !~ '^pg' order by 1"),
        rows(
            url,
            "select oid, xmin, relname, relacl::text from pg_class where relnamespace = 'app'::regnamespace order by 1",
        ),
        rows(url, "select oid, xmin, extname, extnamespace, extversion from pg_extension order by 1"),
    ]


def library(url: str, name: str = "lib", dimension: int = 2, provider: str = "none") -> Any:
    return one(
        url,
        f"""insert into pgshelf.libraries (name, dimension, embedder, chunking) values ('{name}', {dimension},
        jsonb_build_object('provider', '{provider}', 'dimension', {dimension}), '{{"size": 500, "overlap": 0}}')
        returning id""",
    )


def put(url: str, key: str, vector_schema: str = "public") -> Any:
    vector = sql.Identifier(vector_schema).as_string()
    return one(
        url,
        f"select pgshelf.put_document('lib', '{key}', 'T', '{{one}}', embeddings => array['[1,0]'::{vector}.vector])",
    )


def waiting(connection: psycopg.Connection[Any], database: str, seconds: float = 20) -> int:
    """Wait until a migration of a database waits for a lock; the process id of its backend."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = connection.execute(
            "select pid from pg_stat_activity where datname = %s and application_name = 'pgshelf migrate'"
            " and wait_event_type = 'Lock'",
            [database],
        ).fetchone()
        if found:
            return int(found[0])
        time.sleep(0.02)
    pytest.fail("the migration never waited for a lock")


def gone(connection: psycopg.Connection[Any], pid: int, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while connection.execute("select 1 from pg_stat_activity where pid = %s", [pid]).fetchone():
        assert time.monotonic() < deadline, "the backend lives on"
        time.sleep(0.02)


# -- the ways to migrate


def test_every_way_gives_the_same_database(cluster: Cluster, command: Callable[..., Any]) -> None:
    by_cli, by_alembic, by_dba, by_alembic_sql = (cluster.database() for _ in range(4))
    done = command(by_cli, "pgshelf", "migrate")
    assert (done.returncode, done.stdout) == (0, f"the schema pgshelf is at revision {HEAD}\n"), done.stderr
    done = command(by_alembic, "alembic", "upgrade", "head")
    assert done.returncode == 0, done.stderr
    for url, words in (
        (by_dba, ("pgshelf", "migrate", "--sql")),
        (by_alembic_sql, ("alembic", "upgrade", "head", "--sql")),
    ):
        script = command(None, *words)
        assert script.returncode == 0, script.stderr
        done = psql(url, script.stdout)
        assert done.returncode == 0, done.stderr
    expected = dump(by_cli, "--schema-only")
    assert "CREATE FUNCTION pgshelf.search(" in expected
    for url in (by_alembic, by_dba, by_alembic_sql):
        assert dump(url, "--schema-only") == expected
        assert one(url, VERSION) == HEAD
        assert one(url, "select sql_hash from pgshelf.installation") == schema.sql_hash()


def test_offline_statements_leave_no_setting_or_lock_behind(cluster: Cluster) -> None:
    url = cluster.database()
    script = migrate.offline_sql() + "\nshow search_path; show lock_timeout;"
    done = psql(url, script + "select count(*) as locks from pg_locks where locktype = 'advisory';")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"search_path\s+-+\s+(.*)", done.stdout) == ['"$user", public']
    assert re.findall(r"lock_timeout\s+-+\s+(.*)", done.stdout) == ["0"]
    assert re.findall(r"locks\s+-+\s+(.*)", done.stdout) == ["0"]


def test_offline_downgrade_leaves_nothing(cluster: Cluster, command: Callable[..., Any]) -> None:
    url = cluster.database()
    before, roles = everything(url), cluster.roles()
    migrate.upgrade(url)
    script = command(None, "alembic", "downgrade", f"{HEAD}:base", "--sql")
    assert script.returncode == 0, script.stderr
    done = psql(url, script.stdout)
    assert done.returncode == 0, done.stderr
    assert (everything(url), cluster.roles()) == (before, roles)


def test_offline_statements_for_another_vector_schema_refuse(cluster: Cluster, command: Callable[..., Any]) -> None:
    url = cluster.database()
    before = everything(url)
    script = command(None, "pgshelf", "migrate", "--sql", vector="extensions")
    done = psql(url, script.stdout)
    assert done.returncode != 0
    assert "pgvector is installed in schema public, but these statements were made for schema extensions" in done.stderr
    assert "PGSHELF_VECTOR_SCHEMA=public" in done.stderr
    assert everything(url) == before


@pytest.mark.parametrize("vector", ["public", "My Ext"])
def test_alembic_check_is_empty_and_silent(cluster: Cluster, command: Callable[..., Any], vector: str) -> None:
    url = cluster.database(vector)
    execute(url, f'alter database "{name_of(url)}" set search_path = pgshelf, public')
    migrate.upgrade(url)
    done = command(url, "alembic", "check")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "No new upgrade operations detected.\n"
    for statement, named in (
        ("alter table pgshelf.libraries add column unknown int", "unknown"),
        ("alter table pgshelf.waiting alter column xid type text", "xid"),
        ("drop index pgshelf.documents_sample_idx", "documents_sample_idx"),
        ("alter index pgshelf.documents_metadata_idx rename to other_idx", "documents_metadata_idx"),
        ("comment on column pgshelf.waiting.due is 'something else'", "something else"),
    ):
        execute(url, statement)
        assert named in command(url, "alembic", "check").stdout


def test_the_declared_sequences_are_there(cluster: Cluster) -> None:
    url = cluster.database()
    migrate.upgrade(url)
    # alembic check does not compare them
    found = rows(
        url,
        """select sequencename, data_type::text from pg_sequences s where schemaname = 'pgshelf'
        and not exists (select from pg_depend d where d.deptype = 'i'
          and d.objid = format('%I.%I', s.schemaname, s.sequencename)::regclass)""",  # an identity's is its column's
    )
    declared = [each for each in metadata._sequences.values() if each.schema == "pgshelf"]
    assert sorted(found) == sorted((each.name, str(each.data_type).lower()) for each in declared)


def test_looking_changes_nothing(cluster: Cluster, command: Callable[..., Any]) -> None:
    url = cluster.database()
    before = everything(url)
    for words in (("current",), ("check",)):
        command(url, "alembic", *words)
    assert everything(url) == before


# -- again and again


OBJECTS = """
select 'class', oid from pg_class where relnamespace = 'pgshelf'::regnamespace
union all select 'function', oid from pg_proc where pronamespace = 'pgshelf'::regnamespace order by 1, 2
"""


def test_upgrading_twice_changes_nothing(cluster: Cluster) -> None:
    url = cluster.database()
    migrate.upgrade(url)
    library(url)
    put(url, "a")
    before, objects = everything(url), rows(url, OBJECTS)
    migrate.upgrade(url)
    assert (everything(url), rows(url, OBJECTS)) == (before, objects)


def test_sql_is_applied_again_when_only_it_differs(cluster: Cluster) -> None:
    url = cluster.database()
    migrate.upgrade(url)
    before = everything(url)
    execute(
        url,
        "drop view pgshelf.documents_view",
        "drop function pgshelf.delete_document",
        "create or replace function pgshelf.merge_patch(p_target jsonb, p_patch jsonb) returns jsonb language sql"
        " as 'select p_target'",
        "grant execute on function pgshelf.lock_library to public",
        "update pgshelf.installation set sql_hash = 'of an older version'",
    )
    assert everything(url) != before
    migrate.upgrade(url)
    assert everything(url) == before


def test_functions_of_an_older_version_go(cluster: Cluster) -> None:
    """Beside the new ones they would be called by mistake; what depends on them from outside is told."""
    url = cluster.database()
    migrate.upgrade(url)
    before = everything(url)
    execute(
        url,
        "create function pgshelf.few(float8) returns float8 language sql as 'select 1.0::float8'",
        "create view public.theirs as select pgshelf.few(5)",
        "update pgshelf.installation set sql_hash = 'of an older version'",
    )
    with pytest.raises(migrate.MigrationError, match=r"nothing was changed: .*pgshelf\.few[\s\S]*theirs depends on"):
        migrate.upgrade(url)
    execute(url, "drop view public.theirs")
    migrate.upgrade(url)
    assert everything(url) == before


def test_up_down_and_up_again(cluster: Cluster) -> None:
    url = cluster.database(vector=None)
    empty, roles = everything(url), cluster.roles()
    assert not set(ROLES) & roles
    migrate.upgrade(url)
    full = everything(url)
    assert set(ROLES) <= cluster.roles()
    migrate.downgrade(url)
    assert (everything(url), cluster.roles()) == (empty, roles)
    migrate.upgrade(url)
    assert everything(url) == full
    library(url)
    put(url, "a")
    migrate.downgrade(url)
    assert (everything(url), cluster.roles()) == (empty, roles)
    migrate.downgrade(url)
    assert (everything(url), cluster.roles()) == (empty, roles)


def test_an_extension_that_was_there_stays(cluster: Cluster) -> None:
    url = cluster.database()
    migrate.upgrade(url)
    migrate.downgrade(url)
    assert one(url, "select count(*) from pg_extension where extname = 'vector'") == 1


def test_an_extension_that_somebody_has_come_to_use_stays(cluster: Cluster) -> None:
    url = cluster.database(vector=None)
    migrate.upgrade(url)
    execute(url, "create table public.faces (face public.vector(3))", "insert into public.faces values ('[1,2,3]')")
    migrate.downgrade(url)
    assert rows(url, "select face::text from public.faces") == [("[1,2,3]",)]
    assert one(url, "select count(*) from pg_namespace where nspname = 'pgshelf'") == 0


def test_roles_that_another_database_uses_stay(cluster: Cluster) -> None:
    first, second = cluster.database(), cluster.database()
    migrate.upgrade(first)
    migrate.upgrade(second)
    migrate.downgrade(first)
    assert set(ROLES) <= cluster.roles()
    assert one(second, "select has_table_privilege('pgshelf_reader', 'pgshelf.documents_view', 'select')")


def test_roles_with_members_stay(cluster: Cluster) -> None:
    url = cluster.database()
    migrate.upgrade(url)
    cluster.role("ann", "in role pgshelf_reader")
    migrate.downgrade(url)
    assert set(ROLES) & cluster.roles() == {"pgshelf_reader"}


# -- beside an application

APPLICATION = """
create role app_owner;
create role app_reader;
grant app_reader to app_owner;
create schema app authorization app_owner;
create table public.alembic_version (version_num varchar(32) primary key);
insert into public.alembic_version values ('9d1f00');
create table app.customers (id int primary key, name text not null, shelf int default 3);
insert into app.customers values (1, 'Ann'), (2, 'Bob');
create table public.chunks (id int);
create table public.libraries (id int);
create function app.search(q text) returns setof app.customers language sql
  as 'select * from app.customers where name = q';
create view app.names as select name from app.customers;
create index on app.customers (name);
comment on table app.customers is 'who pays';
alter default privileges grant select on tables to app_reader;
alter default privileges for role app_owner grant execute on functions to app_reader;
alter default privileges revoke execute on functions from public;
alter role app_owner set search_path = app, public;
grant select on app.customers to app_reader;
grant execute on function app.search to public;
"""


@pytest.fixture
def application(cluster: Cluster) -> str:
    """A database where an application lives."""
    url = cluster.database()
    cluster._roles += ["app_owner", "app_reader"]
    execute(url, APPLICATION, f'alter database "{name_of(url)}" set search_path = app, pgshelf, public')
    return url


def test_an_application_is_left_alone(application: str, cluster: Cluster, command: Callable[..., Any]) -> None:
    before = outside(application)
    assert "9d1f00" in before[0] and "DEFAULT PRIVILEGES" in before[0] and len(before[1]) == 2
    command(application, "alembic", "upgrade", "head")
    namespaces = rows(application, "select nspname from pg_namespace where nspname !~ '^pg_' order by 1")
    assert namespaces == [("app",), ("information_schema",), ("pgshelf",), ("public",)]
    upgraded = outside(application)
    # the schema itself stands in the list of schemas; all that is compared lies outside it
    upgraded[6] = [row for row in upgraded[6] if row[1] != "pgshelf"]
    assert upgraded == before
    library(application)
    put(application, "a")
    migrate.downgrade(application)
    assert outside(application) == before
    migrate.upgrade(application)
    assert one(application, "select version_num from public.alembic_version") == "9d1f00"
    assert one(application, VERSION) == HEAD
    migrate.downgrade(application)
    assert outside(application) == before


def test_an_application_references_documents_and_joins_hits(application: str) -> None:
    migrate.upgrade(application)
    library(application)
    first = put(application, "a")
    execute(
        application,
        "create table app.notes (document uuid references pgshelf.documents (id), note text)",
        f"insert into app.notes values ('{first}', 'read this')",
        "create view app.titles as select id, title from pgshelf.documents_view",
    )
    found = rows(
        application,
        "select h.key, t.title, n.note from pgshelf.search('lib', '[1,0]') h"
        " join app.notes n on n.document = h.document_id join app.titles t on t.id = h.document_id",
    )
    assert found == [("a", "T", "read this")]
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        execute(application, "select pgshelf.delete_document('lib', 'a')")
    assert one(application, "select count(*) from pgshelf.chunks_view") == 1
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        execute(application, "insert into app.notes values (gen_random_uuid(), 'of nothing')")


NOTES = "create table app.notes (document uuid references pgshelf.documents (id))"
THEIRS = "create table pgshelf.theirs (id int)"
USES = [
    ("create view app.titles as select id, title from pgshelf.documents_view", "view app.titles"),
    ("create view app.hits as select * from pgshelf.search('lib', '[1,0]')", "view app.hits"),
    ("create view app.years as select pgshelf.moment('2024')", "view app.years"),
    ("create table app.queue (like pgshelf.waiting, of pgshelf.waiting)", "app.queue"),
    ("create view app.shelves as select shelf from pgshelf.retired_shelves", "view app.shelves"),
    ("create function app.tell(library pgshelf.planes) returns int language sql as 'select 1'", "app.tell"),
]


@pytest.mark.parametrize(
    ("revision", "statement", "named"),
    [
        *[(revision, *use) for revision in ["base", "0001"] for use in USES],
        *[("0002", *use) for use in USES[:2]],
        ("base", NOTES, "notes_document_fkey"),
        ("base", THEIRS, "table pgshelf.theirs"),
        ("base", "create table app.copies (of pgshelf.libraries)", "app.copies"),
    ],
)
def test_downgrade_refuses_what_would_break_others(application: str, revision: str, statement: str, named: str) -> None:
    migrate.upgrade(application)
    library(application)
    put(application, "a")
    execute(application, statement)
    before = everything(application)
    with pytest.raises(migrate.MigrationError, match=rf"nothing was changed[\s\S]*{re.escape(named)}"):
        migrate.downgrade(application, revision)
    # not even the steps before the one that refuses
    assert everything(application) == before
    assert one(application, VERSION) == HEAD
    assert rows(application, "select key from pgshelf.search('lib', '[1,0]')") == [("a",)]


def test_the_command_line_refuses_in_words(application: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSHELF_DATABASE_URL", application)
    assert CliRunner().invoke(main, ["migrate"]).exit_code == 0
    execute(application, "create view app.titles as select id, title from pgshelf.documents_view")
    refused = CliRunner().invoke(main, ["migrate", "--down-to", "base"])
    assert refused.exit_code == 1
    assert "view app.titles depends on view pgshelf.documents_view" in refused.output
    execute(application, "drop view app.titles")
    done = CliRunner().invoke(main, ["migrate", "--down-to", "base"])
    assert (done.exit_code, "back at base" in done.output) == (0, True)


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_what_no_step_breaks_is_no_reason_to_refuse(application: str, revision: str) -> None:
    migrate.upgrade(application)
    library(application)
    document = put(application, "a")
    execute(application, NOTES, f"insert into app.notes values ('{document}')", THEIRS)
    migrate.downgrade(application, revision)
    assert one(application, VERSION) == revision
    assert rows(application, "select d.key from app.notes n join pgshelf.documents d on d.id = n.document") == [("a",)]
    migrate.upgrade(application)
    assert rows(application, "select key from pgshelf.search('lib', '[1,0]')") == [("a",)]


# -- databases that hold something


def at_first(url: str) -> None:
    """A database as version 0001 left it: the tables and what sql/ was then."""
    migrate.upgrade(url, "0001")
    execute(
        url,
        (CLONE / "tests/sql_at_0001.sql").read_text().replace("@vector@", "public").replace("@vector_ident@", "public"),
    )


CONTENT = """
select (select jsonb_agg(to_jsonb(d) order by d.id) from pgshelf.documents d),
  (select jsonb_agg(jsonb_build_array(c.text, c.id, c.place, c.library_id, c.document_id, c.ordinal, c.metadata,
     c.embedding, c.language, c.tsv, c.embed_attempts, c.embed_after, c.embed_error) order by c.id)
   from pgshelf.chunks c join pgshelf.libraries l on l.id = c.library_id and l.shelf = c.shelf),
  (select jsonb_agg(jsonb_build_array(l.id, l.name, l.index, l.attributes, l.metadata, l.version, l.deleted_at)
   order by l.id) from pgshelf.libraries l)
"""
PENDING = "select pgshelf.put_document('late', '{}', texts => array['{} one', '{} two'])"
GIVEN_UP = "update pgshelf.chunks set embed_after = 'infinity', embed_error = 'no' where text = '{}'"
HITS = "select chunk_id, key, distance from pgshelf.search('lib', '[1,2]', k => 100)"


def fill(url: str) -> None:
    """Libraries with documents, one empty, one deleted; chunks that wait, that were given up, that are ready."""
    library(url)
    for key in "abcde":
        put(url, key)
    library(url, "empty")
    library(url, "late", provider="local")
    library(url, "lost", provider="local")
    library(url, "deleted", provider="local")
    execute(
        url,
        *[f"update pgshelf.documents set metadata = '{{\"year\": {2000 + n}, \"tags\": [{n}]}}' where key = '{key}'"
          for n, key in enumerate("abc")],
        PENDING.format(*"xxx"), PENDING.format(*"yyy"), GIVEN_UP.format("x one"),
        "update pgshelf.chunks set embed_after = now() + '1 hour' where text = 'x two'",
        "select pgshelf.put_document('lost', 'z', texts => array['z'])", GIVEN_UP.format("z"),
        "select pgshelf.put_document('deleted', 'd', texts => array['d'])", "select pgshelf.delete_library('deleted')",
    )  # fmt: skip


def claimed(url: str) -> list[str]:
    return sorted(text for (text,) in rows(url, "select text from pgshelf.claim_pending(100, '0 s')"))


def test_a_filled_database_comes_up_whole(cluster: Cluster, command: Callable[..., Any]) -> None:
    url, fresh = cluster.database(), cluster.database()
    migrate.upgrade(fresh)
    at_first(url)
    fill(url)
    execute(url, "create role ann", "grant execute on function pgshelf.put_document to ann")
    cluster._roles.append("ann")
    before, hits = one_row(url, CONTENT), rows(url, HITS)
    assert len(hits) == 5
    migrate.upgrade(url)
    assert one_row(url, CONTENT) == before
    assert rows(url, HITS) == hits
    # the claim knows of everything that waits, and of nothing else
    assert claimed(url) == ["y one", "y two"]
    execute(url, "update pgshelf.chunks set embed_after = now() where text = 'x two'")
    assert "x two" in claimed(url)
    # indexes hold what was there before them
    found = "select count(*) from pgshelf.documents where pgshelf.scoped(library_id, metadata) @> pgshelf.scoped("
    found += "(select id from pgshelf.libraries where name = 'lib'), '{\"year\": 2001}')"
    with psycopg.connect(url) as connection:
        connection.execute("set enable_seqscan = off")
        assert "documents_metadata_idx" in str(connection.execute("explain " + found).fetchall())
        assert connection.execute(found).fetchone() == (1,)
    # nothing of the older sql/ is left, and what somebody was granted is
    assert one(url, "select has_function_privilege('ann', oid, 'execute') from pg_proc where proname = 'put_document'")
    execute(url, "drop owned by ann")
    assert dump(url, "--schema-only") == dump(fresh, "--schema-only")
    assert command(url, "alembic", "check").returncode == 0


def one_row(url: str, statement: str) -> tuple[Any, ...]:
    return rows(url, statement)[0]


SHELF = """
create table pgshelf.chunks_s{0} (like pgshelf.chunks including defaults including storage including generated
  including constraints including indexes, constraint chunks_s{0}_shelf check (shelf = {0}));
insert into pgshelf.chunks_s{0} (shelf, place, library_id, document_id, ordinal, id, text, metadata, embedding,
    language, embed_attempts, embed_after, embed_error)
  select {0}, place, c.library_id, document_id, ordinal, c.id, text, c.metadata, embedding, c.language, embed_attempts,
    embed_after, embed_error from pgshelf.chunks c
    join pgshelf.libraries l on l.id = c.library_id and l.shelf = c.shelf where l.name = '{1}';
alter table pgshelf.chunks attach partition pgshelf.chunks_s{0} for values in ({0});
"""


PUT_LAST = "select pgshelf.put_document('lib', 'g', texts => array['last'], embeddings => array['[3,4]'::vector])"


def promote(url: str) -> None:
    """Put libraries on shelves of their own, with indexes, left-over rows, and moves that stopped in their middle."""
    execute(
        url,
        SHELF.format(3, "lib"),
        "update pgshelf.libraries set shelf = 3 where name = 'lib'",
        "create index chunks_s3_v1 on pgshelf.chunks_s3 using hnsw ((embedding::public.halfvec(2)) halfvec_cosine_ops)",
        # what the move left on shelf 0 and what has been written since
        "update pgshelf.chunks_s0 set text = 'stale' where embedding is not null",
        "select pgshelf.put_document('lib', 'f', texts => array['new'], embeddings => array['[3,4]'::vector])",
        SHELF.format(4, "late"),
        "update pgshelf.libraries set shelf = 4 where name = 'late'",
        "delete from pgshelf.chunks_s0 c using pgshelf.libraries l where l.id = c.library_id and l.name = 'late'",
        # half way from shelf 4 to shelf 6, and a table that was not attached yet
        SHELF.format(6, "late"),
        "update pgshelf.libraries set moving = 2, moving_to = 6 where name = 'late'",
        "update pgshelf.libraries set moving = 1, moving_to = 7 where name = 'lost'",
        "create table pgshelf.chunks_s7 (like pgshelf.chunks including defaults)",
        "insert into pgshelf.move_log select library_id, id from pgshelf.documents",
        # what the worker keeps beside them
        "insert into pgshelf.planes values (1, 1, '[1,0]')",
        "insert into pgshelf.retired_shelves (shelf) values (2)",
        "insert into pgshelf.terms select id, 'one', 1 from pgshelf.libraries",
        "insert into pgshelf.word_statistics (library_id, chunks, bytes) select id, 1, 1 from pgshelf.libraries",
    )


def test_a_promoted_library_goes_down_whole(cluster: Cluster) -> None:
    url, first = cluster.database(), cluster.database()
    at_first(first)
    migrate.upgrade(url)
    fill(url)
    promote(url)
    assert rows(url, "select shelf, count(*) from pgshelf.chunks group by 1 order by 1") == [
        (0, 7),
        (3, 6),
        (4, 4),
        (6, 4),
    ]
    before, hits = one_row(url, CONTENT), rows(url, HITS)
    assert len(before[1]) == 12 and len(hits) == 6
    migrate.downgrade(url, "0001")
    assert one_row(url, CONTENT) == before
    assert rows(url, "select distinct shelf, moving, moving_to from pgshelf.libraries") == [(0, 0, None)]
    assert rows(url, "select tableoid::regclass::text, count(*) from pgshelf.chunks group by 1") == [
        ("pgshelf.chunks_s0", 12)
    ]
    # the older version takes it from here
    at_first(url)
    assert dump(url, "--schema-only") == dump(first, "--schema-only")
    assert rows(url, HITS) == hits
    assert claimed(url) == ["y one", "y two"]
    migrate.upgrade(url)
    assert rows(url, HITS) == hits


def in_flight(cluster: Cluster, url: str, step: Callable[[], None], *statements: str) -> None:
    """Write in a transaction that a migration has to wait for, and commit when it does."""
    with ThreadPoolExecutor(1) as thread, psycopg.connect(url) as writer:
        for statement in statements:
            writer.execute(statement)
        done = thread.submit(step)
        waiting(cluster.admin, name_of(url))
        writer.commit()
        done.result(60)


def test_what_is_being_written_when_the_claims_change_is_not_forgotten(cluster: Cluster) -> None:
    url = cluster.database()
    at_first(url)
    library(url, "late", provider="local")
    in_flight(cluster, url, lambda: migrate.upgrade(url), PENDING.format(*"xxx"))
    assert claimed(url) == ["x one", "x two"]


def test_what_is_being_written_when_shelves_go_is_not_lost(cluster: Cluster) -> None:
    url = cluster.database()
    migrate.upgrade(url)
    fill(url)
    promote(url)
    before = one_row(url, CONTENT)
    in_flight(cluster, url, lambda: migrate.downgrade(url, "0001"), PUT_LAST)
    chunks = one_row(url, CONTENT)[1]
    assert [chunk for chunk in chunks if chunk[0] != "last"] == before[1]
    assert len(chunks) == len(before[1]) + 1


def test_a_promoted_library_does_not_keep_pgshelf_from_going(cluster: Cluster) -> None:
    url = cluster.database()
    before, roles = everything(url), cluster.roles()
    migrate.upgrade(url)
    fill(url)
    promote(url)
    migrate.downgrade(url)
    assert (everything(url), cluster.roles()) == (before, roles)


@pytest.mark.parametrize("revision", REVISIONS)
def test_down_to_a_revision_is_as_up_to_it(cluster: Cluster, revision: str) -> None:
    up, down = cluster.database(), cluster.database()
    migrate.upgrade(up, revision)
    migrate.upgrade(down)
    migrate.downgrade(down, revision)
    assert one(down, VERSION) == revision
    # grants are of sql/, which is applied at the newest revision only
    assert dump(down, "--schema-only", "--no-privileges") == dump(up, "--schema-only", "--no-privileges")


# -- roles that may not do everything


def test_an_owner_of_the_database_needs_no_superuser(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    cluster.role("app")
    url = as_role(cluster.database(owner="app"), "app")
    before = dump(url)
    migrate.upgrade(url)
    warned = capfd.readouterr().err
    for role in ROLES:
        assert f"role {role} is missing" in warned
        assert f"ask the DBA to run: create role {role} nologin; then run pgshelf migrate again" in warned
    assert one(url, "select sql_hash from pgshelf.installation") == schema.sql_hash()
    library(url)
    put(url, "a")
    assert rows(url, "select key from pgshelf.search('lib', '[1,0]')") == [("a",)]

    for role in ROLES:
        cluster.admin.execute(f"create role {role} nologin")
    migrate.upgrade(url)
    assert "missing" not in capfd.readouterr().err
    for role in ROLES:
        assert one(url, f"select has_schema_privilege('{role}', 'pgshelf', 'usage')")
        reads = role in ("pgshelf_reader", "pgshelf_writer", "pgshelf_service")
        assert one(url, f"select has_table_privilege('{role}', 'pgshelf.documents_view', 'select')") == reads
    migrate.downgrade(url)
    assert dump(url) == before
    assert set(ROLES) <= cluster.roles()  # the DBA's own


def test_a_schema_made_beforehand_is_enough(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    cluster.role("app")
    admin_url = cluster.database()
    execute(admin_url, "create schema pgshelf authorization app")
    url = as_role(admin_url, "app")
    assert not one(url, "select has_database_privilege(current_database(), 'create')")
    before = dump(url)
    migrate.upgrade(url)
    library(url)
    put(url, "a")
    migrate.downgrade(url)
    assert "schema pgshelf was left, empty" in capfd.readouterr().err
    assert dump(url) == before
    migrate.upgrade(url)
    assert one(url, "select count(*) from pgshelf.documents_view") == 0


def test_without_the_extension_and_the_right_to_install_it(cluster: Cluster) -> None:
    cluster.role("app")
    url = as_role(cluster.database(vector=None, owner="app"), "app")
    before = everything(url)
    with pytest.raises(migrate.MigrationError, match=r"not installed.*Ask a superuser.*create extension vector schema"):
        migrate.upgrade(url)
    assert everything(url) == before


def test_without_any_right(cluster: Cluster) -> None:
    cluster.role("app")
    url = as_role(cluster.database(), "app")
    before = everything(url)
    with pytest.raises(migrate.MigrationError, match="permission denied for database"):
        migrate.upgrade(url)
    assert everything(url) == before


# -- where pgvector lives


@pytest.mark.parametrize("schema", ["extensions", "My Ext", "o'clock", 'say "x"', "100%"])
def test_pgvector_in_another_schema(cluster: Cluster, schema: str) -> None:
    url = cluster.database(schema)
    before = everything(url)
    migrate.upgrade(url)
    library(url)
    put(url, "a", schema)
    vector = sql.Identifier(schema).as_string()
    hits = rows(url, f"select key, distance from pgshelf.search('lib', '[0,1]'::{vector}.vector)")
    assert hits == [("a", 1.0)]
    migrate.downgrade(url)
    assert everything(url) == before


def test_pgvector_is_installed_where_it_is_wanted(cluster: Cluster) -> None:
    url = cluster.database(vector=None)
    before = everything(url)
    with pytest.raises(migrate.MigrationError, match='schema "My Ext" does not exist'):
        migrate.upgrade(url, vector_schema="My Ext")
    assert everything(url) == before
    execute(url, 'create schema "My Ext"')
    migrate.upgrade(url, vector_schema="My Ext")
    assert one(url, "select extnamespace::regnamespace::text from pg_extension where extname = 'vector'") == '"My Ext"'


def test_pgvector_inside_our_schema_is_refused(cluster: Cluster) -> None:
    url = cluster.database("pgshelf")
    before = everything(url)
    with pytest.raises(migrate.MigrationError, match="alter extension vector set schema"):
        migrate.upgrade(url)
    assert everything(url) == before


# -- several at once, locks, and sudden ends


def test_two_migrators_at_once_both_succeed(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    url = cluster.database(vector=None)
    monkeypatch.setenv("PGSHELF_DATABASE_URL", url)
    both = [
        subprocess.Popen([str(PROGRAMS / "pgshelf"), "migrate"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    output = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    reference = cluster.database(vector=None)
    migrate.upgrade(reference)
    assert dump(url, "--schema-only") == dump(reference, "--schema-only")


def test_a_migrator_waits_for_another_only_so_long(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    url = cluster.database()
    before = everything(url)
    monkeypatch.setattr(migrate, "LOCK_WAIT", 0.3)
    with psycopg.connect(url) as other:
        other.execute("select pg_advisory_lock(%s, %s)", migrate.LOCK)
        with pytest.raises(migrate.MigrationError, match="another migration of this database has been running"):
            migrate.upgrade(url)
    assert everything(url) == before
    migrate.upgrade(url)


@pytest.mark.parametrize(
    ("held", "step"),
    [
        ("lock table pgshelf.libraries in access exclusive mode", migrate.upgrade),
        ("lock table pgshelf.installation in access exclusive mode", migrate.upgrade),
        ("lock table pgshelf.alembic_version in access exclusive mode", migrate.upgrade),
        ("lock table pgshelf.documents in access share mode", migrate.downgrade),
    ],
)
def test_a_lock_in_the_way_ends_in_bounded_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, held: str, step: Callable[[str], None]
) -> None:
    url = cluster.database()
    migrate.upgrade(url)
    library(url)
    before = everything(url)
    monkeypatch.setattr(migrate, "GUARDS", migrate.GUARDS.replace("10s", "200ms"))
    started = time.monotonic()
    with psycopg.connect(url) as other:
        other.execute(held)
        with pytest.raises(migrate.MigrationError, match=r"lock timeout.*look for long transactions.*run it again"):
            step(url)
    assert time.monotonic() - started < 10
    assert everything(url) == before
    step(url)


DOCUMENT = "insert into pgshelf.documents (place, library_id) values (1, '{}')"
CHUNK = """insert into pgshelf.chunks (shelf, place, library_id, document_id, ordinal, text, language)
  select 0, 1, '{}', d.id, 0, 'x', 'english' from pgshelf.documents d"""
WRITES = {"0001": [], "0002": [DOCUMENT], HEAD: [DOCUMENT, "update pgshelf.documents set title = 'x'"]}


@pytest.mark.parametrize("end", ["kill", "terminate"])
@pytest.mark.parametrize(
    ("blocked", "revision"),
    [
        ("create table pgshelf.move_log (id int)", None),
        ("create table pgshelf.terms (id int)", "0001"),
        ("create view pgshelf.chunks_view as select 1 as x", HEAD),
    ],
)
def test_ended_in_the_middle_it_works_the_next_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, end: str, blocked: str, revision: str | None
) -> None:
    url, reference = cluster.database(), cluster.database()
    migrate.upgrade(reference)
    execute(url, "create schema pgshelf")
    monkeypatch.setenv("PGSHELF_DATABASE_URL", url)
    with psycopg.connect(url) as other:
        other.execute(blocked)  # not committed: the migration waits in its middle to see what becomes of it
        process = subprocess.Popen(
            [str(PROGRAMS / "pgshelf"), "migrate"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        pid = waiting(cluster.admin, name_of(url))
        if end == "kill":
            process.kill()
        else:
            cluster.admin.execute("select pg_terminate_backend(%s)", [pid])
        said = process.communicate(timeout=30)[1]
        other.rollback()
    gone(cluster.admin, pid)
    if end == "terminate":
        assert process.returncode == 1
        assert "terminating connection due to administrator command" in said
    stands = one(url, "select to_regclass('pgshelf.alembic_version')")
    assert (stands and one(url, "select version_num from pgshelf.alembic_version")) == revision
    if revision:  # the tables are there and sql/ is not: nothing gets past a rule that is missing
        identity = library(url)
        execute(url, "begin; set session_replication_role = replica", DOCUMENT.format(identity), "commit")
        for statement in (CHUNK.format(identity), "delete from pgshelf.documents", *WRITES[revision]):
            with pytest.raises(psycopg.Error, match="run pgshelf migrate") as caught:
                execute(url, statement.format(identity))
            assert caught.value.sqlstate == "PS900"
        execute(url, "begin; set session_replication_role = replica", "delete from pgshelf.documents", "commit")
    migrate.upgrade(url)
    kept = "COMMENT ON SCHEMA pgshelf"  # made by the test itself, without the comment
    wanted = re.sub(rf"(--\n-- Name: SCHEMA pgshelf; .*\n--\n\n)?{kept} .*\n+", "", dump(reference, "--schema-only"))
    assert dump(url, "--schema-only") == wanted


# -- what cannot work, in words


def test_errors_are_told_in_words(cluster: Cluster) -> None:
    url = cluster.database()
    before = everything(url)
    with pytest.raises(migrate.MigrationError, match=rf"Can't locate revision.*knows revisions up to {HEAD}"):
        migrate.downgrade(url, "4711")
    assert everything(url) == before
    with pytest.raises(migrate.MigrationError, match='database "missing" does not exist'):
        migrate.upgrade(on_database(url, "missing"))
    with pytest.raises(migrate.MigrationError, match="invalid connection option"):
        migrate.upgrade("nonsense=1")


def test_an_older_version_leaves_a_newer_database_alone(cluster: Cluster) -> None:
    url = cluster.database()
    migrate.upgrade(url)
    execute(url, "update pgshelf.alembic_version set version_num = '9999'", "drop function pgshelf.delete_document")
    before = everything(url)
    with pytest.raises(migrate.MigrationError, match=rf"'9999'.*this version of pgshelf knows revisions up to {HEAD}"):
        migrate.upgrade(url)
    assert everything(url) == before


def test_without_a_database_it_says_which_setting_is_missing(command: Callable[..., Any]) -> None:
    done = command(None, "alembic", "upgrade", "head")
    assert done.returncode != 0
    assert "set PGSHELF_DATABASE_URL" in done.stdout and "Traceback" not in done.stdout + done.stderr
