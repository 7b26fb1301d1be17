"""How searches run, read from EXPLAIN: which index, and which way is not even planned or never executed; for every kind
of index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from pgshelf import shelves
from pgshelf.settings import Settings

pytestmark = pytest.mark.unwatched  # it asks PostgreSQL, and the service hardly

Connection = psycopg.Connection[Any]
Plan = dict[str, Any]
ROWS, DOCUMENTS, DIMENSION = 6_000, 2_000, 4
INDEXES: dict[str, dict[str, Any]] = {
    "halfvec": {"type": "hnsw"},
    "vector": {"type": "hnsw", "storage": "vector"},
    "bit": {"type": "hnsw", "storage": "bit"},
    "ivfflat": {"type": "ivfflat"},
    "lsh": {"type": "lsh", "bits": 64},
    "kdtree": {"type": "kdtree"},
    "flat": {"type": "flat"},
}
MANY = {"most": True}  # two thirds of the documents
FEW = {"number": {"$between": [100, 139]}}  # a declared attribute, forty documents
RARE = {"rare": "yes"}  # no attribute: ten documents, found by the GIN index
NONE = {"rare": "no such value"}
TYPES = "vector, jsonb, int, text, float8, float8, text[], int, int, int, float8[], int, float8"


@pytest.fixture(scope="module")
def connection(shared_database_url: str, vector_schema: str) -> Iterator[Connection]:
    """Libraries of every kind, on a database where three are alone first, and a thousand later."""
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        connection.execute(f'set search_path = pg_catalog, "{vector_schema}"'.encode())
        connection.execute("set plan_cache_mode = force_custom_plan")
        for name, index in INDEXES.items():
            fill(connection, name, ROWS, DOCUMENTS, index, "l2" if name == "kdtree" else "cosine")
        fill(connection, "shared", 900, 300, {"type": "auto"})
        connection.execute("analyze")
        shelves.reconcile_all(shared_database_url, Settings(promote_at=1_000_000))
        connection.execute("analyze")
        yield connection


def fill(
    connection: Connection, name: str, rows: int, documents: int, index: dict[str, Any], metric: str = "cosine"
) -> None:
    """A library with clustered vectors, its metadata and a declared attribute."""
    connection.execute(
        """insert into pgshelf.libraries (name, dimension, metric, embedder, chunking, index, index_state, attributes,
          attributes_ready)
        values (%s, %s, %s, %s, '{}', %s, 'building', '{"number": "number"}', '{"number": "number"}')""",
        [name, DIMENSION, metric, Jsonb({"provider": "none", "dimension": DIMENSION}), Jsonb(index)],
    )
    connection.execute(
        """insert into pgshelf.documents (place, library_id, key, metadata)
        select 1, l.id, n::text, jsonb_build_object('number', n, 'most', n %% 3 <> 0)
          || case when n %% %s = 7 then '{"rare": "yes"}'::jsonb else '{}' end
        from pgshelf.libraries l, generate_series(1, %s) n where l.name = %s""",
        [documents // 10, documents, name],
    )
    connection.execute(
        """insert into pgshelf.chunks_s0 (shelf, place, library_id, document_id, ordinal, text, metadata, embedding,
          language)
        select 0, 1, d.library_id, d.id, n, 'word' || n || ' of ' || d.key,
          jsonb_build_object('page', n), v::vector, 'english'
        from pgshelf.libraries l join pgshelf.documents d on d.library_id = l.id, generate_series(1, %s) n,
          lateral (select array[random() - 0.5, random() - 0.5, random() - 0.5,
            random() - 0.5 + 0 * (n + length(d.key))]::real[] as v offset 0) x
        where l.name = %s""",
        [rows // documents, name],
    )


def plan(
    connection: Connection, library: str, condition: dict[str, Any] | None = None, mode: str = "vector", k: int = 10
) -> Plan:
    """The plan of a search as it ran: the statement of pgshelf.search_statement, prepared, with its parameters."""
    row = connection.execute(
        "select pgshelf.search_statement(l, %s, %s) from pgshelf.libraries l where l.name = %s",
        [mode, None if condition is None else Jsonb(condition), library],
    ).fetchone()
    assert row is not None
    connection.execute("deallocate all")
    connection.execute(f"prepare searching ({TYPES}) as {row[0]}".encode())
    values = "null" if condition is None else f"'{json.dumps(condition)}'"
    reach = 200 if mode == "hybrid" else k
    rest = f"'word2', null, null, '{{}}', {k}, 0, 60, '{{1,1}}', 1, 0"
    call = f"execute searching ('[0.1,0.2,-0.3,0.4]', {values}, {reach}, {rest})"
    with connection.transaction(force_rollback=True):  # settings of the scan last as long as the transaction
        found = connection.execute(f"explain (analyze, format json, verbose) {call}".encode()).fetchone()
    assert found is not None
    result: Plan = found[0][0]["Plan"]
    return result


def nodes(root: Plan, **wanted: Any) -> list[Plan]:
    """The nodes of a plan below `root` that have these values."""
    below = [node for child in root.get("Plans", []) for node in nodes(child)]
    return [node for node in [root, *below] if all(node.get(key.replace("_", " ")) == wanted[key] for key in wanted)]


def branch(root: Plan, name: str) -> Plan:
    """The CTE of a name."""
    (found,) = [node for node in nodes(root) if node.get("Subplan Name") == f"CTE {name}"]
    return found


def ran(root: Plan, relation: str) -> list[Plan]:
    """The scans of a table below a node that were executed."""
    return [
        node
        for node in nodes(root)
        if str(node.get("Relation Name", "")).startswith(relation) and node["Actual Loops"] > 0
    ] + [
        node for node in nodes(root, Node_Type="Bitmap Index Scan") if node["Actual Loops"] > 0 and relation == "bitmap"
    ]


def vector_index(connection: Connection, library: str) -> str:
    row = connection.execute(
        "select format('chunks_s%%s_v%%s', shelf, index_actual ->> 'serial') from pgshelf.libraries where name = %s",
        [library],
    ).fetchone()
    assert row is not None
    return str(row[0])


INDEXED = [name for name in INDEXES if name != "flat"]


@pytest.mark.parametrize("library", INDEXED)
def test_without_a_filter_the_index_answers_alone(connection: Connection, library: str) -> None:
    found = plan(connection, library)
    scans = ran(branch(found, "nearest"), "chunks_s")
    assert scans and {node.get("Index Name") for node in scans} == {vector_index(connection, library)}
    assert ran(branch(found, "exact"), "chunks_s") == []


@pytest.mark.parametrize("library", INDEXED)
def test_where_most_match_the_index_answers_alone(connection: Connection, library: str) -> None:
    found = plan(connection, library, MANY)
    scans = ran(branch(found, "nearest"), "chunks_s")
    assert {node.get("Index Name") for node in scans} == {vector_index(connection, library)}
    assert ran(branch(found, "exact"), "chunks_s") == []
    looked = ran(branch(found, "nearest"), "documents")
    assert {node["Index Name"] for node in looked} == {"documents_pkey"}


def test_what_the_choice_costs_is_bounded(connection: Connection) -> None:
    """The way is chosen from a few documents, read in the order of an index, however many match."""
    row = connection.execute(
        """select pgshelf.documents_sampled(l.id, (pgshelf.compile_filter(l, %s)).documents)
        from pgshelf.libraries l where l.name = 'halfvec'""",
        [Jsonb(MANY)],
    ).fetchone()
    assert row is not None
    connection.execute(f"prepare sampling (int, jsonb, int) as {row[0]}".encode())
    call = f"execute sampling (null, '{json.dumps(MANY)}', 200)"
    found = connection.execute(f"explain (analyze, format json) {call}".encode()).fetchone()
    share = connection.execute(call.encode()).fetchone()
    assert found is not None and share is not None
    (sampled,) = ran(found[0][0]["Plan"], "documents")
    assert (sampled["Index Name"], sampled["Actual Rows"]) == ("documents_sample_idx", 200)
    assert 0.5 < share[0][0] < 0.85


@pytest.mark.parametrize("library", INDEXED)
@pytest.mark.parametrize(
    ("condition", "index"),
    [(FEW, "attribute_values_num_idx"), (RARE, "documents_metadata_idx"), (NONE, "documents_metadata_idx")],
)
def test_where_few_match_all_are_looked_at(
    connection: Connection, library: str, condition: dict[str, Any], index: str
) -> None:
    found = plan(connection, library, condition)
    shelf = vector_index(connection, library).split("_v")[0]
    assert vector_index(connection, library) not in {node.get("Index Name") for node in nodes(found)}
    exact = branch(found, "near")
    assert index in {node.get("Index Name") for node in nodes(exact) if node["Actual Loops"] > 0}
    assert [node["Index Name"] for node in ran(exact, "chunks_s")] == [f"{shelf}_pkey"]
    assert exact["Actual Rows"] == (0 if condition is NONE else 10)


@pytest.mark.parametrize(
    ("condition", "share"),
    [
        (MANY, 2 / 3),
        ({"chunk.page": 1}, 1 / 3),
        (MANY | {"chunk.page": {"$gte": 2}}, 4 / 9),
        ({"$or": [{"most": True}, {"chunk.page": 1}]}, 7 / 9),  # of documents and chunks at once
        (NONE | {"chunk.page": 1}, 0),
        ({"most": True, "number": {"$gte": 1}}, 2 / 3),  # known from the choice between two indexes
    ],
    ids=str,
)
def test_the_share_that_matches_is_estimated(connection: Connection, condition: dict[str, Any], share: float) -> None:
    row = connection.execute(
        """select (pgshelf.share_found(l, pgshelf.compile_filter(l, %(filter)s), %(filter)s, 0.01)).share
        from pgshelf.libraries l where l.name = 'halfvec'""",
        {"filter": Jsonb(condition)},
    ).fetchone()
    assert row is not None
    # the choice between two indexes looks at fifty documents only where half of all match or more
    assert row[0] == pytest.approx(share, abs=0.3 if "number" in condition else 0.15)


def test_the_fewer_codes_there_are_the_fewer_are_ranked_again(connection: Connection) -> None:
    reach = """pgshelf.index_reach('{"type": "lsh"}', null, %s)"""
    wanted = []
    for chunks in (1, 1_000, 10_000, 100_000, 10_000_000):  # 1: never analyzed
        row = connection.execute(f"select replace({reach}, '$3', '10')", [chunks]).fetchone()
        assert row is not None
        found = connection.execute(f"select {row[0]}".encode()).fetchone()
        assert found is not None
        wanted.append(found[0])
    assert wanted == [200, 64, 113, 200, 200]


BOTH_FEW = {"$and": [{"most": True}, {"number": {"$lt": 40}}]}
BOTH_RARE = {"rare": "yes", "number": {"$gte": 10}}


@pytest.mark.parametrize(
    ("condition", "index"), [(BOTH_FEW, "attribute_values_num_idx"), (BOTH_RARE, "documents_metadata_idx")]
)
def test_of_two_indexes_the_cheaper_finds_the_documents(
    connection: Connection, condition: dict[str, Any], index: str
) -> None:
    found = plan(connection, "halfvec", condition)
    used = {node.get("Index Name") for node in nodes(branch(found, "near")) if node["Actual Loops"] > 0}
    assert used & {"attribute_values_num_idx", "documents_metadata_idx"} == {index}


@pytest.mark.parametrize(
    ("condition", "attribute"), [({"most": True, "number": {"$gte": 1}}, False), (BOTH_FEW, True), (BOTH_RARE, False)]
)
def test_attributes_are_counted_where_few_match(
    connection: Connection, condition: dict[str, Any], attribute: bool
) -> None:
    """Where many do, the containment leads without a count: both ways lead to most of the library."""
    row = connection.execute(
        "select (pgshelf.compile_filter(l, %s)).indexed from pgshelf.libraries l where l.name = 'halfvec'",
        [Jsonb(condition)],
    ).fetchone()
    assert row is not None
    assert ("attribute_values" in row[0], "@>" in row[0]) == (attribute, not attribute)


def test_a_sample_grows_until_it_tells(connection: Connection) -> None:
    """Of a population whose first 50 have none, 1 in 20, or most: 50 rows tell the first and the last."""
    sample = """select array[count(*) filter (where n %% %s = 0)::float8 / count(*), count(*)]
        from generate_series(1, 1000) n where n <= $3"""
    for every, few, rows in ((2000, 0.1, 50), (20, 0.1, 200), (20, 0.5, 50), (1, 0.1, 50), (20, 0.004, 1000)):
        found = connection.execute(
            "select number from pgshelf.sampled(%s, null, %s)", [sample.replace("%% %s", f"% {every}"), few]
        ).fetchone()
        assert found == (rows,), (every, few)


def test_a_session_counts_once_a_minute(connection: Connection) -> None:
    """What a session has counted for a filter it takes for granted, for a minute; then it counts anew."""
    count = "select pgshelf.counted('select array[count(*)] from counted_rows where n <= $3', %s, 1000)"

    def counted(condition: dict[str, Any]) -> Any:
        return connection.execute(count, [Jsonb(condition)]).fetchone()

    connection.execute("create temp table counted_rows as select 1 as n")
    assert counted({}) == ([1],)
    connection.execute("insert into counted_rows values (2)")
    assert (counted({}), counted({"other": 1}), counted({})) == (([1],), ([2],), ([1],))
    aged = connection.execute(
        """select set_config(s.name, concat_ws(' ', s.part[1], s.part[2]::float8 - 61, s.part[3]), false)
        from (select n.name, string_to_array(current_setting(n.name, true), ' ') as part
          from (select 'pgshelf.counted_' || generate_series(0, 255) as name) n) s where s.part[3] = '{1}'"""
    ).fetchall()
    assert len(aged) == 1
    assert counted({}) == ([2],)


def test_whatever_stands_in_the_settings_a_search_finds_the_same(connection: Connection) -> None:
    found = []
    for value in ("", "x", "x y z", "{} 1 {2}"):
        for place in range(256):
            connection.execute("select set_config(%s, %s, false)", [f"pgshelf.counted_{place}", value])
        rows = connection.execute(
            "select chunk_id from pgshelf.search('halfvec', '[0.1,0.2,-0.3,0.4]', filter => %s)", [Jsonb(FEW)]
        ).fetchall()
        found.append(rows)
    assert len(found[0]) == 10
    assert found.count(found[0]) == len(found)


def test_a_statement_for_few_finds_what_other_values_match(connection: Connection) -> None:
    """A statement may be kept; the way that it goes is slower for other values, its rows are the same."""
    for made_for, asked in ((NONE, {"rare": "yes"}), ({"most": True}, {"most": False}), ({"most": True}, {"most": 5})):
        row = connection.execute(
            "select pgshelf.search_statement(l, 'vector', %s) from pgshelf.libraries l where l.name = 'halfvec'",
            [Jsonb(made_for)],
        ).fetchone()
        assert row is not None
        connection.execute("deallocate all")
        connection.execute(f"prepare kept ({TYPES}) as {row[0]}".encode())
        values = f"'[0.1,0.2,-0.3,0.4]', '{json.dumps(asked)}', 10, null, null, null, '{{}}', 10, 0, 60, null, 1, null"
        kept = connection.execute(f"execute kept ({values})".encode()).fetchall()
        true = connection.execute(
            """select s.chunk_id from pgshelf.search('halfvec', '[0.1,0.2,-0.3,0.4]', filter => %s, exact => true) s""",
            [Jsonb(asked)],
        ).fetchall()
        assert len(kept) == len(true)
        assert len({row[0] for row in kept} & {row[0] for row in true}) >= 0.9 * len(true)


def kept_plans(connection: Connection, library: str, part: str, text: str) -> list[Plan]:
    """How the kept statements of a library that hold `part` run, for `text` as their $4."""
    shelf = vector_index(connection, library).split("_v")[0].removeprefix("chunks_")
    own = connection.execute("select id from pgshelf.libraries where name = %s", [library]).fetchone()
    assert own is not None
    bodies = connection.execute(
        """select substring(p.prosrc from 'return query (.*); end'), p.proconfig from pg_proc p
        where starts_with(p.proname, %s) and strpos(p.prosrc, %s) > 0""",
        [f"kept_{shelf}_", part],
    ).fetchall()
    plans = []
    for statement, settings in bodies:
        with connection.transaction():
            for setting in [*settings, "plan_cache_mode=force_generic_plan"]:
                name, _, value = setting.partition("=")
                connection.execute(f"set local {name} = {value}".encode())
            connection.execute(f"prepare of_function ({TYPES}, uuid) as {statement}".encode())
            given = f"'[0.1,0.2,-0.3,0.4]', null, 10, {text}, null, null, '{{text}}', 10, 0, 60, '{{1,1}}', 1, null"
            given += f", '{own[0]}'"
            row = connection.execute(
                f"explain (analyze, format json) execute of_function ({given})".encode()
            ).fetchone()
            connection.execute("deallocate of_function")
        assert row is not None
        plans.append(row[0][0]["Plan"])
    return plans


@pytest.mark.parametrize("library", INDEXED)
def test_plans_that_are_kept_go_by_the_index(connection: Connection, library: str) -> None:
    """They are made without knowing k or the vector; by axes none is kept, for there they depend on it."""
    plans = kept_plans(connection, library, "nearest", "'word1'")
    assert len(plans) == (0 if library == "kdtree" else 2)  # by vector, and both
    for found in plans:
        assert {node.get("Index Name") for node in ran(branch(found, "nearest"), "chunks_s")} == {
            vector_index(connection, library)
        }
        assert ran(branch(found, "exact"), "chunks_s") == []


@pytest.mark.parametrize("library", INDEXED)
def test_few_documents_lead_to_their_chunks_in_a_plan_that_is_kept(connection: Connection, library: str) -> None:
    few = f"""select d.id from pgshelf.documents d
      where d.library_id = (select l.id from pgshelf.libraries l where l.name = '{library}') limit 7"""
    [found] = kept_plans(connection, library, "documents_found", f"$${few}$$")
    shelf = vector_index(connection, library).split("_v")[0]
    looked = ran(branch(found, "near"), "chunks_s")
    assert [node.get("Index Name") for node in looked] == [f"{shelf}_pkey"], looked
    assert all("document_id" in node["Index Cond"] for node in looked)


@pytest.mark.parametrize("about", [{}, {"chunk.page": {"$gte": 1}}], ids=["documents", "chunks"])
def test_where_attributes_decide_no_document_is_read(connection: Connection, about: dict[str, Any]) -> None:
    """Those of the hits are, by their keys; the library's others are found in the index of attributes alone."""
    connection.execute("vacuum analyze pgshelf.attribute_values")
    for condition, read in ((FEW, []), (FEW | RARE, ["documents"])):
        found = connection.execute(
            "select pgshelf.explain_search('halfvec', '[0.1,0.2,-0.3,0.4]', filter => %s) -> 'plan' -> 'Plan'",
            [Jsonb(condition | about)],
        ).fetchone()
        assert found is not None
        near = branch(found[0], "near")
        assert [node["Relation Name"] for node in ran(near, "documents")] == read, condition
        looked = nodes(near, Index_Name="attribute_values_num_idx")
        assert {node["Node Type"] for node in looked} == {"Index Only Scan"}


def test_a_statement_that_is_kept_does_not_trust_what_it_was_made_for(connection: Connection) -> None:
    """What attributes decide is true for some values in one snapshot: it stays out of statements that live longer."""
    found = plan(connection, "halfvec", FEW)
    assert ran(branch(found, "near"), "documents")


def test_a_flat_library_has_one_branch(connection: Connection) -> None:
    for library in ("flat", "shared"):
        for condition in (None, MANY, FEW):
            found = plan(connection, library, condition)
            assert not [node for node in nodes(found) if node.get("Subplan Name") in ("CTE nearest", "CTE exact")]
            assert branch(found, "near")["Actual Rows"] == 10


def test_shelf_0_is_searched_alone(connection: Connection) -> None:
    for condition in (None, FEW, RARE):
        found = plan(connection, "shared", condition)
        assert {node["Relation Name"] for node in ran(found, "chunks_s")} == {"chunks_s0"}


def test_words_are_found_by_their_index(connection: Connection) -> None:
    found = plan(connection, "halfvec", mode="text")
    shelf = vector_index(connection, "halfvec").split("_v")[0]
    used = {node.get("Index Name") for node in nodes(found) if node["Actual Loops"] > 0}
    assert f"{shelf}_tsv_idx" in used
    assert [node for node in ran(found, shelf) if node["Node Type"] == "Seq Scan"] == []


def test_a_scan_that_comes_up_short_is_followed_by_all(connection: Connection) -> None:
    """An index that does not come up with enough costs time, never a row."""
    found = plan(connection, "halfvec", k=ROWS + 1000)
    assert ran(branch(found, "nearest"), "chunks_s") and ran(branch(found, "exact"), "chunks_s")
    assert found["Actual Rows"] == ROWS


HOW = ("Node Type", "Relation Name", "Index Name", "Subplan Name", "Filter", "Index Cond", "Recheck Cond", "Order By")


def shape(root: Plan) -> list[dict[str, Any]]:
    """A plan as far as it says how, without what it took."""
    return [{name: node[name] for name in HOW if name in node} for node in nodes(root)]


@pytest.mark.parametrize("library", ["halfvec", "lsh", "flat", "shared"])
def test_the_plans_of_who_was_granted_a_library_are_those_of_its_owner(connection: Connection, library: str) -> None:
    """Row security takes no index away, and no policy is asked: the statement runs with the owner's rights."""
    ask = "select pgshelf.explain_search(%s, %s::vector, %s, filter => %s) -> 'plan' -> 'Plan'"
    vector, text = "[0.1, 0.2, -0.3, 0.1]", "word1"
    questions: list[tuple[str | None, str | None, Any]] = [
        (vector, None, None),
        (vector, None, FEW),
        (vector, None, RARE),
        (vector, None, MANY),
    ]
    questions += [(None, text, None), (None, text, RARE), (vector, text, MANY)]

    def plans() -> list[Plan]:
        asked = [[library, first, words, Jsonb(found) if found else None] for first, words, found in questions]
        return [connection.execute(ask, each).fetchone()[0] for each in asked]  # type: ignore[index]  # one row each

    owners = plans()
    connection.execute("select pgshelf.grant_library('pgshelf_reader', %s)", [library])
    connection.execute("set role pgshelf_reader")
    try:
        members = plans()
    finally:
        connection.execute("reset role")
        connection.execute("select pgshelf.revoke_library('pgshelf_reader', '*')")
    assert [shape(plan) for plan in members] == [shape(plan) for plan in owners]
    assert "granted" not in json.dumps(members)


def test_with_a_thousand_libraries_it_is_the_same(connection: Connection) -> None:
    connection.execute(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking)
        select 'other ' || n, 4, '{"provider": "none", "dimension": 4}', '{}' from generate_series(1, 1000) n"""
    )
    connection.execute(
        """insert into pgshelf.documents (place, library_id, key, metadata)
        select 1, l.id, n::text, jsonb_build_object('number', n, 'most', true, 'rare', 'yes')
        from pgshelf.libraries l, generate_series(1, 20) n where l.name like 'other %'"""
    )
    connection.execute(
        """insert into pgshelf.chunks_s0 (shelf, place, library_id, document_id, ordinal, text, embedding, language)
        select 0, 1, d.library_id, d.id, 0, 'other', '[1,2,3,4]', 'english'
        from pgshelf.documents d join pgshelf.libraries l on l.id = d.library_id where l.name like 'other %'"""
    )
    connection.execute("analyze")
    for library in INDEXED:
        test_without_a_filter_the_index_answers_alone(connection, library)
        test_where_most_match_the_index_answers_alone(connection, library)
        test_where_few_match_all_are_looked_at(connection, library, RARE, "documents_metadata_idx")
        test_where_few_match_all_are_looked_at(connection, library, FEW, "attribute_values_num_idx")
    test_shelf_0_is_searched_alone(connection)
    for condition in (None, FEW, RARE):  # one library of many there: its chunks are found by the primary key
        near = branch(plan(connection, "shared", condition), "near")
        assert "chunks_s0_pkey" in {node.get("Index Name") for node in nodes(near)}
        assert [node for node in ran(near, "chunks_s0") if node["Node Type"] == "Seq Scan"] == []


def test_no_generic_plan_is_ever_made(connection: Connection) -> None:
    """Sessions of an application plan as they like: the functions plan anew each time, for the library's own shelf."""
    connection.execute("set plan_cache_mode = force_generic_plan")
    try:
        for _ in range(8):
            with connection.transaction(force_rollback=True):
                connection.execute("select * from pgshelf.search('halfvec', '[1,2,3,4]')").fetchall()
                locked = connection.execute(
                    "select count(distinct relation) from pg_locks where pid = pg_backend_pid()"
                    " and relation::regclass::text ~ 'chunks_s[0-9]+$'"
                ).fetchone()
            assert locked == (1,)
    finally:
        connection.execute("set plan_cache_mode = force_custom_plan")


def test_a_plan_made_while_a_table_was_small_does_not_scan_it_later(database_url: str) -> None:
    """Plans of writes are kept, statistics of a table that an import fills come late: indexes lead from the start."""
    put = "select pgshelf.put_document('small', %s, texts => '{text}')"
    scanned = """select relname, seq_scan from pg_stat_user_tables
        where relname in ('documents', 'libraries', 'chunks_s0') order by 1"""
    with psycopg.connect(database_url, autocommit=True) as owner:

        def scans() -> list[tuple[str, int]]:
            owner.execute("select pg_stat_force_next_flush()")
            return owner.execute(scanned).fetchall()

        owner.execute(
            """insert into pgshelf.libraries (name, dimension, embedder, chunking)
            values ('small', 2, '{"provider": "local", "dimension": 2}', '{}')"""
        )
        for key in ("a", "b", "c"):
            owner.execute(put, [key])
        owner.execute("analyze pgshelf.documents, pgshelf.libraries, pgshelf.chunks_s0")
        before = scans()
        for key in ("a", "d"):
            owner.execute(put, [key])
        owner.execute("select pgshelf.delete_document('small', 'd')")
        assert scans() == before
