"""What analysts and application roles meet in SQL: search, writing, views, and everything they may not do."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
import psycopg
import pytest
from psycopg import conninfo, sql
from psycopg.types.json import Jsonb

pytestmark = pytest.mark.unwatched

Connection = psycopg.Connection[Any]
AsRole = Callable[[str], Connection]
ALL_PARTS = ["text", "metadata", "document", "embedding"]


@pytest.fixture
def owner(shared_database_url: str) -> Iterator[Connection]:
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        yield connection


@contextmanager
def logins(url: str, vector_schema: str) -> Iterator[AsRole]:
    """Logs in as new members of roles, with all libraries granted; they are gone afterwards."""
    made: list[tuple[str, Connection]] = []
    with psycopg.connect(url, autocommit=True) as admin:

        def login(role: str) -> Connection:
            name = f"test_{uuid.uuid4().hex[:12]}"
            admin.execute(f"create role {name} login password 'secret' in role {role}".encode())
            grant = sql.SQL("grant usage on schema {} to {}")
            admin.execute(grant.format(sql.Identifier(vector_schema), sql.Identifier(name)))
            admin.execute("select pgshelf.grant_library(%s, '*', 'write')", [name])
            opened = psycopg.connect(conninfo.make_conninfo(url, user=name, password="secret"), autocommit=True)
            made.append((name, opened))
            return opened

        try:
            yield login
        finally:
            for name, opened in made:
                opened.close()
                admin.execute(f"drop owned by {name}".encode())
                admin.execute(f"drop role {name}".encode())


@pytest.fixture
def as_role(shared_database_url: str, vector_schema: str) -> Iterator[AsRole]:
    """Logs in as a new member of a role."""
    with logins(shared_database_url, vector_schema) as login:
        yield login


def vector(numbers: Sequence[float] | np.ndarray) -> str:
    return "[" + ",".join(repr(float(number)) for number in numbers) + "]"


def vectors(many: Sequence[Any]) -> str:
    """An array of vectors as PostgreSQL reads it, null included; its type is left to the function that takes it."""
    return "{" + ",".join("null" if one is None else f'"{vector(one)}"' for one in many) + "}"


def make_library(owner: Connection, dimension: int = 2, metric: str = "cosine", provider: str = "none") -> str:
    name = f"lib {uuid.uuid4().hex[:12]}"
    owner.execute(
        "insert into pgshelf.libraries (name, dimension, metric, embedder, chunking) values (%s, %s, %s, %s, %s)",
        [name, dimension, metric, Jsonb({"provider": provider, "dimension": dimension}), Jsonb({"size": 500})],
    )
    return name


def put(connection: Connection, library: str, key: str | None, texts: Any, **named: Any) -> Any:
    if named.get("embeddings") is not None and not isinstance(named["embeddings"], str):
        named["embeddings"] = vectors(named["embeddings"])
    extra = "".join(f", {name} => %({name})s" for name in named)
    statement = f"select pgshelf.put_document(%(library)s, %(key)s, texts => %(texts)s{extra})"
    row = connection.execute(statement.encode(), {"library": library, "key": key, "texts": texts, **named}).fetchone()
    return row and row[0]


def search(connection: Connection, library: str, what: Any, columns: str = "*", **named: Any) -> list[Any]:
    extra = "".join(f', "{name}" => %({name})s' for name in named)
    statement = f"select {columns} from pgshelf.search(%(library)s, %(vector)s{extra})"
    known = {"library": library, "vector": vector(what), **named}
    return connection.execute(statement.encode(), known).fetchall()


def chunks(connection: Connection, library: str) -> list[Any]:
    return connection.execute(
        "select ordinal, text, id, embedding::text, metadata, status from pgshelf.chunks_view where library = %s"
        " order by document_key, ordinal",
        [library],
    ).fetchall()


# -- one search for everybody


@pytest.mark.parametrize("metric", ["cosine", "l2", "inner_product", "l1"])
async def test_a_reader_finds_what_rest_finds(
    client: httpx2.AsyncClient, database_url: str, vector_schema: str, metric: str
) -> None:
    library = {"name": "same", "embedder": {"provider": "none"}, "dimension": 4, "metric": metric}
    assert (await client.post("/v1/libraries", json=library)).status_code == 201
    numbers = np.random.default_rng(7)
    pool = numbers.normal(size=(6, 4)).astype(np.float32)  # far fewer vectors than chunks: many ties
    for document in range(6):
        body = {
            "title": f"title {document}",
            "metadata": {"n": document},
            "chunks": [
                {"text": f"{document} {n}", "embedding": row.tolist(), "metadata": {"c": n}}
                for n, row in enumerate(pool[numbers.integers(0, 6, size=15)])
            ],
        }
        assert (await client.put(f"/v1/libraries/same/documents/d{document}", json=body)).status_code == 201
    question = numbers.normal(size=4).astype(np.float32).tolist()
    with logins(database_url, vector_schema) as login:
        reader = login("pgshelf_reader")
        middle = search(reader, "same", question, k=90)[45]
        shapes: list[dict[str, Any]] = [
            {"k": 50},
            {"k": 7, "offset": 11},
            {"k": 90, "max_distance": middle[5]},
            {"k": 90, "min_score": middle[4]},
        ]
        for shape in shapes:
            request = {"vector": question, "include": ALL_PARTS, **shape}
            answer = (await client.post("/v1/libraries/same/search", json=request)).json()["hits"]
            found = search(reader, "same", question, include=ALL_PARTS, **shape)
            assert len(answer) > 0
            assert [as_hit(row) for row in found] == answer
            assert [(row[5], row[0]) for row in found] == sorted((row[5], row[0]) for row in found)
        assert len({row[5] for row in search(reader, "same", question, k=90)}) == 6


def as_hit(row: Sequence[Any]) -> dict[str, Any]:
    """A row of pgshelf.search as the REST API writes it."""
    names = ("chunk_id", "document_id", "key", "ordinal", "score", "distance", "text", "metadata")
    numbers = [float(number) for number in row[11].strip("[]").split(",")]
    document = dict(zip(("title", "source", "metadata"), row[8:11], strict=True))
    hit = dict(zip(names, (str(row[0]), str(row[1]), *row[2:8]), strict=True))
    return {**hit, "document": document, "embedding": [float(np.float32(number)) for number in numbers]}


def test_equal_vectors_come_in_the_order_of_their_ids(owner: Connection, as_role: AsRole) -> None:
    library = make_library(owner)
    for n in range(20):
        put(owner, library, f"k{n}", ["a", "b", "c"], embeddings=[[1, 1]] * 3)
    reader = as_role("pgshelf_reader")
    expected = sorted(row[2] for row in chunks(owner, library))
    assert [row[0] for row in search(reader, library, [1, 1], k=100)] == expected
    pages = [row[0] for offset in range(0, 60, 7) for row in search(reader, library, [1, 1], k=7, offset=offset)]
    assert pages == expected


DISTANCES: dict[str, Callable[[Any, Any], Any]] = {
    "cosine": lambda rows, q: 1 - rows @ q / np.linalg.norm(rows, axis=1) / np.linalg.norm(q),
    "l2": lambda rows, q: np.linalg.norm(rows - q, axis=1),
    "inner_product": lambda rows, q: -(rows @ q),
    "l1": lambda rows, q: np.abs(rows - q).sum(axis=1),
}
SCORES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda d: 1 - d,
    "l2": lambda d: 1 / (1 + d),
    "inner_product": lambda d: -d,
    "l1": lambda d: 1 / (1 + d),
}


@pytest.mark.parametrize("metric", sorted(DISTANCES))
def test_every_metric_is_exact(owner: Connection, metric: str) -> None:
    library = make_library(owner, 8, metric)
    stored = np.random.default_rng(1).normal(size=(300, 8)).astype(np.float32)
    for start in range(0, 300, 30):
        put(owner, library, f"d{start}", [str(start + n) for n in range(30)], embeddings=stored[start : start + 30])
    question = np.random.default_rng(2).normal(size=8).astype(np.float32)
    truth = DISTANCES[metric](stored.astype(float), question.astype(float))
    order = np.argsort(truth)
    found = search(owner, library, question, "text, distance, score", k=300)
    assert [int(row[0]) for row in found] == order.tolist()
    assert np.allclose([row[1] for row in found], truth[order], atol=1e-5)
    assert np.allclose([row[2] for row in found], SCORES[metric](truth[order]), atol=1e-5)

    limit = float(found[9][1])
    assert len(search(owner, library, question, k=300, max_distance=limit)) == 10
    assert len(search(owner, library, question, k=300, min_score=float(found[19][2]))) == 20
    assert search(owner, library, question, "text, distance, score", k=5, offset=3, max_distance=limit) == found[3:8]
    assert len(search(owner, library, question, k=5, offset=8, max_distance=limit)) == 2


def test_include_says_what_comes_back(owner: Connection) -> None:
    library = make_library(owner)
    put(owner, library, "k", ["t"], embeddings=[[1, 0]], title="T", source="S", metadata=Jsonb({"a": 1}))
    columns = "text, metadata, title, source, document_metadata, chunk_embedding::text"
    parts = {"text": (0,), "metadata": (1,), "document": (2, 3, 4), "embedding": (5,)}
    full: tuple[Any, ...] = ("t", {}, "T", "S", {"a": 1}, "[1,0]")
    for name, positions in parts.items():
        expected = tuple(value if n in positions else None for n, value in enumerate(full))
        assert search(owner, library, [1, 0], columns, include=[name]) == [expected]
    assert search(owner, library, [1, 0], columns) == [(*full[:5], None)]
    assert search(owner, library, [1, 0], columns, include=[]) == [(None,) * 6]


@pytest.mark.parametrize(
    ("named", "state"),
    [
        ({"k": 0}, "PS030"),
        ({"k": 10001}, "PS030"),
        ({"k": None}, "PS030"),
        ({"offset": -1}, "PS030"),
        ({"offset": 1000001}, "PS030"),
        ({"offset": None}, "PS030"),
    ],
)
def test_k_and_offset_have_bounds(owner: Connection, named: dict[str, Any], state: str) -> None:
    library = make_library(owner)
    with pytest.raises(psycopg.Error) as caught:
        search(owner, library, [1, 0], **named)
    assert caught.value.sqlstate == state
    assert search(owner, library, [1, 0], k=10000, offset=1000000) == []


@pytest.mark.parametrize(
    ("question", "state"),
    [("[1,0,0]", "PS010"), ("[0,0]", "PS011"), ("[1e30,0]", "PS012"), ("[1e-30,0]", "PS012"), (None, "PS030")],
)
def test_a_question_must_be_a_vector_of_the_library(owner: Connection, question: str | None, state: str) -> None:
    library = make_library(owner)
    put(owner, library, "k", ["t"], embeddings=[[1, 0]])
    with pytest.raises(psycopg.Error) as caught:
        owner.execute("select * from pgshelf.search(%s, %s)", [library, question])
    assert caught.value.sqlstate == state


def test_a_library_goes_by_name_and_by_id(owner: Connection) -> None:
    library = make_library(owner)
    put(owner, library, "k", ["t"], embeddings=[[1, 0]])
    identity = owner.execute("select id from pgshelf.libraries where name = %s", [library]).fetchone()
    assert identity
    assert search(owner, str(identity[0]), [1, 0]) == search(owner, library, [1, 0]) != []
    for missing in ("no such library", str(uuid.uuid4())):
        with pytest.raises(psycopg.Error) as caught:
            search(owner, missing, [1, 0])
        assert caught.value.sqlstate == "PS001"


# -- writing


def test_put_document_replaces_what_changed_and_keeps_the_rest(owner: Connection) -> None:
    library = make_library(owner)
    first = put(owner, library, "k", ["a", "b", "c"], embeddings=[[1, 0], [0, 1], [1, 1]], title="one")
    before = {row[1]: row for row in chunks(owner, library)}
    again = put(owner, library, "k", ["c", "x", "b", "a"], embeddings=[None, [2, 2], None, None], title="two")
    assert again == first
    after = {row[1]: row for row in chunks(owner, library)}
    assert [after[text][0] for text in "cxba"] == [0, 1, 2, 3]
    for text in "abc":  # each moved, none was embedded again
        assert after[text][2:4] == before[text][2:4]
    assert after["x"][3] == "[2,2]"
    assert after["x"][2] not in {row[2] for row in before.values()}
    row = owner.execute(
        "select title, version, id from pgshelf.documents_view where library = %s", [library]
    ).fetchall()
    assert row == [("two", 2, first)]

    put(owner, library, "k", ["c"], embeddings=[[3, 3]], chunk_metadata=[Jsonb({"p": 1})])
    assert [row[1:5] for row in chunks(owner, library)] == [("c", after["c"][2], "[3,3]", {"p": 1})]
    put(owner, library, "k", [])
    assert chunks(owner, library) == []


def test_equal_texts_of_a_document_keep_their_own_vectors(owner: Connection) -> None:
    library = make_library(owner)
    put(owner, library, "k", ["same", "same", "other"], embeddings=[[1, 0], [0, 1], [1, 1]])
    before = chunks(owner, library)
    put(owner, library, "k", ["other", "same", "same"])
    after = chunks(owner, library)
    assert [row[3] for row in after] == ["[1,1]", "[0,1]", "[1,0]"]
    assert {row[2] for row in after} == {row[2] for row in before}


def test_documents_without_a_key_are_always_new(owner: Connection) -> None:
    library = make_library(owner)
    assert put(owner, library, None, ["a"], embeddings=[[1, 0]]) != put(
        owner, library, None, ["a"], embeddings=[[1, 0]]
    )
    assert len(chunks(owner, library)) == 2


def test_null_vectors_wait_for_the_worker(owner: Connection) -> None:
    library = make_library(owner, provider="local")
    put(owner, library, "k", ["a", "b"], embeddings=[[1, 0], None])
    put(owner, library, "l", ["c"])
    assert [(row[1], row[5]) for row in chunks(owner, library)] == [("a", "ready"), ("b", "pending"), ("c", "pending")]
    assert [row[6] for row in search(owner, library, [1, 0])] == ["a"]
    waiting = owner.execute(
        "select ordinal, attempts, error, failed from pgshelf.pending_embeddings where library = %s order by ordinal",
        [library],
    ).fetchall()
    assert waiting == [(0, 0, None, False), (1, 0, None, False)]


def test_null_metadata_is_empty_metadata(owner: Connection) -> None:
    library = make_library(owner)
    put(owner, library, "k", ["a", "b"], embeddings=[[1, 0]] * 2, metadata=None, chunk_metadata=[None, Jsonb({"x": 1})])
    assert owner.execute("select metadata from pgshelf.documents_view where library = %s", [library]).fetchall() == [
        ({},)
    ]
    assert [row[4] for row in chunks(owner, library)] == [{}, {"x": 1}]


@pytest.mark.parametrize(
    ("named", "state"),
    [
        ({"texts": ["a"], "embeddings": [[1, 0, 0]]}, "PS010"),
        ({"texts": ["a"], "embeddings": [[0, 0]]}, "PS011"),
        ({"texts": ["a"], "embeddings": [[1e25, 0]]}, "PS012"),
        ({"texts": ["a"], "embeddings": '{"[NaN,0]"}'}, "22000"),
        ({"texts": ["a"], "embeddings": '{"[Infinity,0]"}'}, "22000"),
        ({"texts": ["a"]}, "PS013"),
        ({"texts": ["a", "b"], "embeddings": [[1, 0], None]}, "PS013"),
        ({"texts": ["a", "b"], "embeddings": [[1, 0]]}, "PS030"),
        ({"texts": ["a"], "embeddings": [[1, 0], [0, 1]]}, "PS030"),
        ({"texts": None, "embeddings": [[1, 0]]}, "PS030"),
        ({"texts": ["a"], "embeddings": [[1, 0]], "chunk_metadata": []}, "PS030"),
        ({"texts": [None], "embeddings": [[1, 0]]}, "23502"),
        ({"texts": [" \n"], "embeddings": [[1, 0]]}, "23514"),
        ({"texts": ["a"], "embeddings": [[1, 0]], "metadata": Jsonb([1])}, "23514"),
        ({"texts": ["a"], "embeddings": [[1, 0]], "chunk_metadata": [Jsonb("x")]}, "23514"),
        ({"key": "", "texts": []}, "23514"),
        ({"key": str(uuid.UUID(int=5)), "texts": []}, "23514"),
        ({"library": "nowhere", "texts": []}, "PS001"),
    ],
)
def test_what_cannot_be_stored_leaves_nothing(owner: Connection, named: dict[str, Any], state: str) -> None:
    library = make_library(owner)
    known = {"library": library, "key": "k", **named}
    with pytest.raises(psycopg.Error) as caught:
        put(owner, known.pop("library"), known.pop("key"), known.pop("texts"), **known)
    assert caught.value.sqlstate == state
    row = owner.execute(
        "select documents, chunks from pgshelf.libraries_overview where name = %s", [library]
    ).fetchone()
    assert row == (0, 0)


@pytest.mark.parametrize("metric", ["l2", "inner_product", "l1"])
def test_a_zero_vector_is_fine_where_it_has_distances(owner: Connection, metric: str) -> None:
    library = make_library(owner, metric=metric)
    put(owner, library, "k", ["a"], embeddings=[[0, 0]])
    assert search(owner, library, [0, 0], "distance") == [(0.0,)]


def test_a_writer_writes_in_its_own_transaction(owner: Connection, as_role: AsRole) -> None:
    library = make_library(owner)
    writer = as_role("pgshelf_writer")
    with writer.transaction():
        document = put(writer, library, "k", ["a"], embeddings=[[1, 0]])
        assert [row[1] for row in search(writer, library, [1, 0])] == [document]
        assert search(owner, library, [1, 0]) == []
    assert [row[1] for row in search(owner, library, [1, 0])] == [document]
    with writer.transaction(force_rollback=True):
        put(writer, library, "k", ["b"], embeddings=[[0, 1]])
        writer.execute("select pgshelf.delete_document(%s, 'k')", [library])
        assert search(writer, library, [1, 0]) == []
    assert [row[1] for row in chunks(owner, library)] == ["a"]
    for version, state in ((7, "PS020"), (1, None)):
        try:
            writer.execute("select pgshelf.delete_document(%s, %s, %s)", [library, str(document), version])
            assert state is None
        except psycopg.Error as error:
            assert error.sqlstate == state
    assert chunks(owner, library) == []
    with pytest.raises(psycopg.Error) as caught:
        writer.execute("select pgshelf.delete_document(%s, 'k')", [library])
    assert caught.value.sqlstate == "PS002"


def test_views_tell_what_is_there(owner: Connection, as_role: AsRole) -> None:
    library = make_library(owner, provider="local")
    put(owner, library, "k", ["a", "b"], embeddings=[[1, 0], None], title="T")
    owner.execute("update pgshelf.chunks set embed_after = 'infinity', embed_error = 'no' where embedding is null")
    reader = as_role("pgshelf_reader")
    overview = reader.execute(
        "select documents, chunks, pending, failed, bytes > 0, provider, dimension from pgshelf.libraries_overview"
        " where name = %s",
        [library],
    ).fetchone()
    assert overview == (1, 2, 0, 1, True, "local", 2)
    assert [row[5] for row in chunks(reader, library)] == ["ready", "failed"]
    failed = reader.execute(
        "select error, failed, next_attempt_at from pgshelf.pending_embeddings where library = %s", [library]
    ).fetchall()
    assert failed == [("no", True, None)]
    owner.execute("select pgshelf.delete_library(%s)", [library])
    for view, column in (
        ("libraries_overview", "name"),
        ("documents_view", "library"),
        ("chunks_view", "library"),
        ("pending_embeddings", "library"),
    ):
        found = reader.execute(f"select 1 from pgshelf.{view} where {column} = %s".encode(), [library]).fetchall()
        assert found == []


# -- what is not allowed

INTERNAL = [
    "select pgshelf.lock_library(gen_random_uuid())",
    "select pgshelf.library_named('x')",
    "select pgshelf.write_document(null, null, null, null, null, null, null, null, null, null, null)",
    "select pgshelf.claim_pending(1, '1 s')",
    "select pgshelf.store_embeddings(null, null, null, null)",
    "select pgshelf.lease_again(null, null, null, null)",
    "select pgshelf.next_waiting(null, null, null)",
    "select pgshelf.delete_library('x')",
    "select pgshelf.reap_deleted()",
    "select pgshelf.patch_chunk(null, null, null, null, null)",
    "select pgshelf.delete_chunk(null, null)",
    "select pgshelf.is_id('x')",
    "create table pgshelf.mine (id int)",
    "create or replace view pgshelf.documents_view as select 1",
    "drop view pgshelf.documents_view",
]


@pytest.mark.parametrize("role", ["pgshelf_reader", "pgshelf_writer"])
def test_tables_shelves_and_internals_are_closed(owner: Connection, as_role: AsRole, role: str) -> None:
    member = as_role(role)
    tables = owner.execute(
        "select oid::regclass::text from pg_class"
        " where relnamespace = 'pgshelf'::regnamespace and relkind in ('r', 'p')"
    ).fetchall()
    assert {"pgshelf.chunks_s0", "pgshelf.chunks", "pgshelf.libraries", "pgshelf.documents"} <= {
        name for (name,) in tables
    }
    actions = ["select * from {}", "delete from {}", "truncate {}", "insert into {} default values", "lock table {}"]
    statements = INTERNAL + [action.format(name) for (name,) in tables for action in actions]
    if role == "pgshelf_reader":
        statements += ["select pgshelf.put_document('x', 'k')", "select pgshelf.delete_document('x', 'k')"]
    for statement in statements:
        with pytest.raises(psycopg.errors.InsufficientPrivilege), member.transaction():
            member.execute(statement.encode())


def test_who_is_no_member_sees_nothing(owner: Connection, as_role: AsRole) -> None:
    owner.execute(f"create role {(nobody := f'test_{uuid.uuid4().hex[:8]}')}")
    stranger = as_role(nobody)
    for statement in ("select * from pgshelf.documents_view", "select * from pgshelf.search('x', null)"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            stranger.execute(statement.encode())
    stranger.close()
    owner.execute(f"drop role {nobody}")


def test_public_may_execute_nothing_and_definers_fix_their_path(owner: Connection) -> None:
    found = owner.execute(
        """select p.oid::regprocedure::text, p.prosecdef, p.proconfig,
        exists (select 1 from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where a.grantee = 0)
        from pg_proc p where p.pronamespace = 'pgshelf'::regnamespace"""
    ).fetchall()
    assert [name for name, _, _, public in found if public] == []
    definers = {name.partition("(")[0]: config for name, definer, config, _ in found if definer}
    granted = owner.execute(
        """select distinct p.oid::regprocedure::text from pg_proc p, pg_roles r
        where p.pronamespace = 'pgshelf'::regnamespace and r.rolname in ('pgshelf_reader', 'pgshelf_writer')
        and has_function_privilege(r.oid, p.oid, 'execute')"""
    ).fetchall()
    callers = {
        "pgshelf.replication"
    }  # PostgreSQL shows replicas to roles with pg_monitor, and to no others by way of us
    usable = {name.partition("(")[0] for (name,) in granted}
    assert set(definers) | callers >= usable >= {"pgshelf.search", *callers}
    assert [name for name, config in definers.items() if "search_path=pg_catalog, pg_temp" not in (config or [])] == []


def test_whatever_a_role_may_use_says_what_it_is(owner: Connection) -> None:
    usable = owner.execute(
        """select p.oid::regprocedure::text, obj_description(p.oid, 'pg_proc') from pg_proc p, pg_roles r
        where p.pronamespace = 'pgshelf'::regnamespace and r.rolname in ('pgshelf_reader', 'pgshelf_writer')
        and has_function_privilege(r.oid, p.oid, 'execute')
        union select c.oid::regclass::text, obj_description(c.oid, 'pg_class') from pg_class c, pg_roles r
        where c.relnamespace = 'pgshelf'::regnamespace and r.rolname in ('pgshelf_reader', 'pgshelf_writer')
        and c.relkind in ('r', 'v', 'p') and (has_table_privilege(r.oid, c.oid, 'select, insert, update, delete')
          or has_any_column_privilege(r.oid, c.oid, 'references'))
        union select 'schema', obj_description('pgshelf'::regnamespace, 'pg_namespace')"""
    ).fetchall()
    assert len(usable) > 8
    assert [name for name, comment in usable if not comment] == []


def test_objects_of_the_caller_change_nothing(owner: Connection, as_role: AsRole, vector_schema: str) -> None:
    library = make_library(owner)
    put(owner, library, "k", ["near", "far"], embeddings=[[1, 0], [0, 1]])
    writer = as_role("pgshelf_writer")
    expected = search(writer, library, [1, 0])
    owner.execute(f"create schema evil authorization {writer.info.user}")
    kind = sql.Identifier(vector_schema).as_string() + ".vector"
    trap = "language plpgsql as $$ begin raise 'trapped'; end $$"
    for statement in (
        f"create function evil.distance(a {kind}, b {kind}) returns float8 {trap}",
        f"create operator evil.<=> (leftarg = {kind}, rightarg = {kind}, function = evil.distance)",
        f"create function evil.vector_dims(a {kind}) returns int {trap}",
        f"create function evil.vector_norm(a {kind}) returns float8 {trap}",
        f"create function evil.same(a text, b text) returns boolean {trap}",
        "create operator evil.= (leftarg = text, rightarg = text, function = evil.same)",
        f"create function evil.format(a text, variadic b text[]) returns text {trap}",
        f"create function evil.md5(a text) returns text {trap}",
        f"create function evil.now() returns timestamptz {trap}",
        f"create function evil.gen_random_uuid() returns uuid {trap}",
        "create table evil.documents (id uuid)",
        "create temp table libraries (id uuid, name text)",
        "create temp table documents (id uuid, key text)",
        "create temp table chunks_s0 (id uuid)",
        "set search_path = evil, pg_temp, pgshelf, pg_catalog",
    ):
        writer.execute(statement.encode())
    # names are written out here: what the test itself calls must not fall into the traps either
    named = "pgshelf.search(%s::pg_catalog.text, %s)"
    assert writer.execute(f"select * from {named}".encode(), [library, "[1,0]"]).fetchall() == expected
    writer.execute("select pgshelf.put_document(%s, 'k2', texts => '{new}', embeddings => '{\"[1,1]\"}')", [library])
    assert len(search(owner, library, [1, 0])) == 3
    writer.execute("select pgshelf.delete_document(%s, 'k2')", [library])
    assert search(owner, library, [1, 0]) == expected
    owner.execute("drop schema evil cascade")


# -- plans


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from _nodes(child)


TYPES = "({vector}, jsonb, int, text, float8, float8, text[], int, int, int, float8[], int, float8)"
VALUES = ["'[1,1,1,1,1,1,1,1]'", "null", "10", "null", "null", "null", "'{text}'", "10", "0", "60", "null", "1", "null"]
STATEMENT = "select pgshelf.search_statement(pgshelf.library_named(%s), 'vector')"


def plans(connection: Connection, library: str, vector_schema: str) -> Iterator[list[dict[str, Any]]]:
    """The nodes of the search's plan: bound values, custom plan, generic plan."""
    row = connection.execute(STATEMENT, [library]).fetchone()
    assert row
    kind = sql.Identifier(vector_schema).as_string() + ".vector"
    types = TYPES.format(vector=kind).strip("()").split(", ")
    values = [f"{value}::{name}" for value, name in zip(VALUES, types, strict=True)]
    bound = re.sub(r"\$(\d+)", lambda found: values[int(found[1]) - 1], row[0])
    statements = [("auto", bound)]
    connection.execute(f"prepare searching {TYPES.format(vector=kind)} as {row[0]}".encode())
    call = f"execute searching ({', '.join(VALUES)})"
    statements += [("force_custom_plan", call), ("force_generic_plan", call)]
    try:
        for mode, statement in statements:
            connection.execute(f"set plan_cache_mode = {mode}".encode())
            plan = connection.execute(f"explain (format json) {statement}".encode()).fetchone()
            assert plan
            yield list(_nodes(plan[0][0]["Plan"]))
    finally:
        connection.execute("deallocate searching")
        connection.execute("reset plan_cache_mode")


def relations(nodes: list[dict[str, Any]]) -> set[str]:
    return {node["Relation Name"] for node in nodes if "Relation Name" in node}


def fill(owner: Connection, libraries: int, each: int) -> str:
    """Libraries on shelf 0 with chunks of eight dimensions; the name of one in the middle."""
    names = [make_library(owner, 8) for _ in range(libraries)]
    texts, rows = [f"t{n}" for n in range(each)], np.random.default_rng(3).normal(size=(each, 8))
    with owner.transaction():
        for name in names:
            put(owner, name, "d", texts, embeddings=rows)
    owner.execute("analyze pgshelf.chunks_s0, pgshelf.documents, pgshelf.libraries")
    return names[libraries // 2]


@pytest.fixture
def own(database_url: str) -> Iterator[Connection]:
    """The owner of a database that no other test uses: plans depend on all that is in it."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def test_a_single_library_is_read_from_its_shelf_alone(own: Connection, vector_schema: str) -> None:
    library = fill(own, 1, 50)
    for nodes in plans(own, library, vector_schema):
        assert relations(nodes) == {"chunks_s0", "documents"}


def test_among_many_libraries_the_primary_key_finds_the_chunks(own: Connection, vector_schema: str) -> None:
    library = fill(own, 300, 20)
    identity = own.execute("select id from pgshelf.libraries where name = %s", [library]).fetchone()
    assert identity
    add_shelf(own, 1)
    for nodes in plans(own, library, vector_schema):
        assert relations(nodes) == {"chunks_s0", "documents"}
        scans = [node for node in nodes if node.get("Index Name") == "chunks_s0_pkey"]
        assert len(scans) == 2  # all for their distances, and the hits for their texts
        assert all("library_id" in scan["Index Cond"] and str(identity[0]) in scan["Index Cond"] for scan in scans)
        assert not any(node["Node Type"] == "Seq Scan" and node["Relation Name"] == "chunks_s0" for node in nodes)


def test_a_statement_made_before_a_move_asks_to_be_made_again(own: Connection, vector_schema: str) -> None:
    library = make_library(own, 8)
    put(own, library, "d", ["t"], embeddings=[range(1, 9)])
    row = own.execute(STATEMENT, [library]).fetchone()
    assert row
    kind = sql.Identifier(vector_schema).as_string() + ".vector"
    own.execute(f"prepare searching {TYPES.format(vector=kind)} as {row[0]}".encode())
    call = f"execute searching ({', '.join(VALUES)})".encode()
    assert len(own.execute(call).fetchall()) == 1
    add_shelf(own, 1)
    own.execute("update pgshelf.libraries set shelf = 1 where name = %s", [library])
    for reaped in (False, True):  # with rows that do not count any more, and without
        if reaped:
            own.execute("delete from pgshelf.chunks_s0")
        with pytest.raises(psycopg.Error) as caught:
            own.execute(call)
        assert caught.value.sqlstate == "PS040"
    assert search(own, library, range(1, 9)) == []


def add_shelf(connection: Connection, shelf: int) -> None:
    """Make a shelf as a promotion does: detached, with its check, then attached."""
    connection.execute(
        f"""create table pgshelf.chunks_s{shelf} (like pgshelf.chunks including defaults including storage
        including generated including constraints, constraint chunks_s{shelf}_shelf check (shelf = {shelf}));
        alter table pgshelf.chunks_s{shelf} add constraint chunks_s{shelf}_pkey
          primary key (library_id, document_id, ordinal, place, shelf);
        alter table pgshelf.chunks attach partition pgshelf.chunks_s{shelf} for values in ({shelf})""".encode()
    )


def test_the_content_hash_tells_whether_the_texts_are_the_same(owner: Connection) -> None:
    name = make_library(owner)

    def content_hash() -> Any:
        found = owner.execute(
            "select d.content_hash from pgshelf.documents d join pgshelf.libraries l on l.id = d.library_id"
            " where d.key = 'h' and l.name = %s",
            [name],
        ).fetchone()
        return found[0] if found else None

    put(owner, name, "h", ["a", "b"], embeddings=[[1, 0], [0, 1]])
    first = content_hash()
    put(owner, name, "h", ["a", "c"], embeddings=[[1, 0], [0, 1]])
    assert content_hash() != first
    put(owner, name, "h", ["a", "b"], embeddings=[[1, 0], [0, 1]], title="T")
    assert content_hash() == first
    owner.execute(
        "select pgshelf.patch_chunk(c.library_id, c.id, null, null, '{\"x\": 1}') from pgshelf.chunks_view c"
        " where c.library = %s and c.ordinal = 0",
        [name],
    )
    assert content_hash() is None
