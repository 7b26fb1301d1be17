"""Facets and counts: the same numbers from an index, from the documents, and from plain Python."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import httpx2
import psycopg
import pytest
from hypothesis import given, settings
from psycopg.types.json import Jsonb

from tests.filter_oracle import ATTRIBUTES, Document, Filter, filters, make_documents, matches
from tests.rest.asking import at, document, library, ok, problem
from tests.test_filters import DOCUMENTS, LIBRARY, STATES, Connection, nodes, store
from tests.test_sql_surface import logins

pytestmark = pytest.mark.unwatched

FACETS = ["year", "lang", "published", "nested.a", "tags", "a", "nested", "o'x", "tags.0", "$title", "$key", "$source"]


@pytest.fixture(scope="module")
def connection(shared_database_url: str) -> Iterator[Connection]:
    with psycopg.connect(shared_database_url, autocommit=True) as opened:
        opened.execute(
            "insert into pgshelf.libraries (id, name, dimension, embedder, chunking, attributes) values"
            " (%s, 'facets', 2, '{\"provider\": \"none\", \"dimension\": 2}', '{}', %s)",
            [LIBRARY, Jsonb(ATTRIBUTES)],
        )
        yield opened


def canonical(value: Any) -> str:
    """A JSON value as text that is equal where the values are: 1 and 1.0 are one value."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(item) for item in value) + "]"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(Fraction(repr(value)))
    return json.dumps(value)


def walked(found: Document, name: str) -> list[Any]:
    """The values of a field, each once; none where it is missing."""
    columns = {"$title": found.title, "$key": found.key, "$source": found.source}
    if name in columns:
        return [] if columns[name] is None else [columns[name]]
    value: Any = found.metadata
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return []
        value = value[key]
    return value if isinstance(value, list) else [value]


def counted(documents: list[Document], name: str) -> Counter[str]:
    return Counter(value for found in documents for value in {canonical(item) for item in walked(found, name)})


@pytest.mark.parametrize("state", STATES)
def test_facets_are_what_the_documents_hold(connection: Connection, state: str) -> None:
    attributes, ready = STATES[state]

    @settings(max_examples=25, deadline=None)
    @given(filters(attributes, DOCUMENTS))
    def check(condition: Filter) -> None:
        documents = make_documents(random.Random(json.dumps(condition)), DOCUMENTS)
        found = [d for d in documents if any(matches(condition, d, c, attributes) for c in d.chunks)]
        with connection.transaction(force_rollback=True):
            store(connection, documents)
            connection.execute(
                "update pgshelf.libraries set attributes = %s, attributes_ready = %s", [Jsonb(attributes), Jsonb(ready)]
            )
            for asked, expected in ((condition, found), ({}, documents), (None, documents)):
                parameter = None if asked is None else Jsonb(asked)
                got: dict[str, dict[str, int]] = {name: {} for name in FACETS}
                last: dict[str, int] = {}
                for name, value, count in connection.execute(
                    "select * from pgshelf.facets('facets', %s, %s, 1000)", [FACETS, parameter]
                ):
                    assert count <= last.get(name, count), "not the most frequent first"
                    last[name] = count
                    assert canonical(value) not in got[name]
                    got[name][canonical(value)] = count
                assert got == {name: dict(counted(expected, name)) for name in FACETS}
                row = connection.execute(
                    "select pgshelf.count_documents('facets', %s), pgshelf.total_hits('facets', %s)",
                    [parameter, parameter],
                ).fetchone()
                chunks = [c for d in documents for c in d.chunks if asked is None or matches(asked, d, c, attributes)]
                assert row == (len(expected), len(chunks))

    check()


@pytest.fixture(scope="module")
def many(connection: Connection) -> Connection:
    """A library of 3,000 documents whose attributes are ready."""
    connection.execute(
        "insert into pgshelf.libraries (name, dimension, embedder, chunking, attributes, attributes_ready) values"
        " ('many', 2, '{\"provider\": \"none\", \"dimension\": 2}', '{}', %s, %s)",
        [Jsonb(ATTRIBUTES), Jsonb(ATTRIBUTES)],
    )
    connection.execute(
        """insert into pgshelf.documents (place, library_id, key, metadata)
        select 0, l.id, 'k' || i, jsonb_build_object('year', 1990 + i % 30, 'lang', 'l' || i % 3)
        from pgshelf.libraries l, generate_series(1, 3000) i where l.name = 'many'"""
    )
    connection.execute("vacuum analyze pgshelf.documents, pgshelf.attribute_values")
    return connection


@pytest.mark.parametrize(
    ("attribute", "index"), [("year", "attribute_values_num_idx"), ("lang", "attribute_values_txt_idx")]
)
def test_a_ready_attribute_is_counted_in_its_index(many: Connection, attribute: str, index: str) -> None:
    row = many.execute(
        "select pgshelf.facet_statement(l, %s, null) from pgshelf.libraries l where name = 'many'", [attribute]
    ).fetchone()
    assert row is not None
    explained = psycopg.RawCursor(many).execute(f"explain (format json) {row[0]}".encode(), [None, Jsonb({}), 10])
    plan = list(nodes(explained.fetchall()[0][0][0]["Plan"]))
    assert ("Index Only Scan", index) in {(node["Node Type"], node.get("Index Name")) for node in plan}
    assert not [node for node in plan if node["Node Type"] == "Seq Scan"]


@pytest.mark.parametrize(
    ("attributes", "limit", "message"),
    [
        (["chunk.page"], 10, "facets count documents"),
        (["chunk.$text"], 10, "facets count documents"),
        (["$nothing"], 10, "there is no operator or column"),
        ([], 10, "1 to 32 attributes"),
        ([None], 10, "1 to 32 attributes"),
        (["a"] * 33, 10, "1 to 32 attributes"),
        (["a"], 0, "limit must be"),
        (["a"], 1001, "limit must be"),
        (["a"], None, "limit must be"),
    ],
    ids=str,
)
def test_what_cannot_be_counted_is_refused(connection: Connection, attributes: Any, limit: Any, message: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        connection.execute("select * from pgshelf.facets('facets', %s::text[], null, %s)", [attributes, limit])
    assert caught.value.sqlstate == "PS030" and message in str(caught.value.diag.message_primary)


def test_readers_count_and_only_writers_change(
    connection: Connection, shared_database_url: str, vector_schema: str
) -> None:
    counting = "select pgshelf.count_documents('facets'), (select count(*) from pgshelf.facets('facets', '{year}'))"
    changing = [
        "select pgshelf.update_documents('facets', '{\"year\": -1}', '{\"a\": 1}')",
        "select pgshelf.delete_documents('facets', '{\"year\": -1}')",
    ]
    with logins(shared_database_url, vector_schema) as login:
        reader, writer = login("pgshelf_reader"), login("pgshelf_writer")
        for role in (reader, writer):
            assert role.execute(counting).fetchone() == (0, 0)
        for statement in changing:
            assert writer.execute(statement.encode()).fetchone() == (0,)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                reader.execute(statement.encode())


async def test_facets_over_rest(client: httpx2.AsyncClient) -> None:
    await library(client, attributes={"year": "number"})
    for number in range(6):
        await document(
            client, f"k{number}", title="T", metadata={"year": 2020 + number % 2, "tags": ["a", f"t{number % 3}"]}
        )
    path = at("libraries", "shelf", "facets")
    answer = ok(await client.post(path, json={"attributes": ["year", "tags", "missing"]}))
    assert answer["documents"] == 6
    assert answer["facets"]["year"] == [{"value": 2020, "documents": 3}, {"value": 2021, "documents": 3}]
    assert answer["facets"]["tags"][0] == {"value": "a", "documents": 6} and len(answer["facets"]["tags"]) == 4
    assert answer["facets"]["missing"] == []
    answer = ok(
        await client.post(
            path, json={"attributes": ["year", "$title"], "filter": {"tags": {"$contains": "t0"}}, "limit": 1}
        )
    )
    assert answer == {
        "facets": {"year": [{"value": 2020, "documents": 1}], "$title": [{"value": "T", "documents": 2}]},
        "documents": 2,
    }


BAD = [
    {},
    {"attributes": []},
    {"attributes": ["a"] * 33},
    {"attributes": ["chunk.page"]},
    {"attributes": ["a"], "limit": 0},
    {"attributes": ["a"], "limit": 1001},
    {"attributes": ["a"], "filter": {"$xor": 1}},
    {"attributes": ["a"], "filter": []},
    {"attributes": ["a"], "more": 1},
]


async def test_bad_requests_for_facets(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    await library(client)
    for body in BAD:
        with subtests.test(body=body):
            problem(await client.post(at("libraries", "shelf", "facets"), json=body), 400, "validation_failed")


async def test_facets_of_no_library(client: httpx2.AsyncClient) -> None:
    answer = await client.post(at("libraries", "none", "facets"), json={"attributes": ["a"]})
    problem(answer, 404, "library_not_found")
