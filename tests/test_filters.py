"""Filters: what they match, whatever the way, against a predicate in Python; what is refused; which index finds it."""

from __future__ import annotations

import json
import math
import random
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx2
import psycopg
import pytest
from hypothesis import HealthCheck, given, note, seed, settings
from hypothesis import strategies as st
from psycopg.types.json import Jsonb

from tests.filter_oracle import (
    ATTRIBUTES,
    MOMENTS,
    NO_MOMENTS,
    START,
    Chunk,
    Document,
    Filter,
    document_id,
    filters,
    make_documents,
    matches,
    of_attributes,
)
from tests.postgres import Databases
from tests.rest.asking import library, ok, until

pytestmark = pytest.mark.unwatched  # it asks PostgreSQL, and the service hardly

LIBRARY = uuid.UUID(int=1)
Connection = psycopg.Connection[Any]
DOCUMENTS = 40
BATCH = 20  # filters for one set of documents
# how far declared attributes have come: a filter means the same before and after they are ready
STATES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "no attributes": ({}, {}),
    "declared": (ATTRIBUTES, {}),
    "ready": (ATTRIBUTES, ATTRIBUTES),
    "exact": (ATTRIBUTES, ATTRIBUTES),  # what attributes keep is the value itself, in all documents
}


@pytest.fixture(scope="module")
def generated(pytestconfig: pytest.Config) -> Callable[[Any], Any]:
    """Decorates a check of twenty filters: as many examples as --filters asks for, by a seed that is printed."""
    chosen = pytestconfig.getoption("--filters-seed")
    chosen = random.randrange(10**9) if chosen is None else chosen
    count = int(pytestconfig.getoption("--filters"))
    print(f"{count} filters for each way, --filters-seed {chosen}")
    bounds = settings(max_examples=max(1, count // BATCH), deadline=None, suppress_health_check=list(HealthCheck))
    return lambda check: seed(chosen)(bounds(check))


@pytest.fixture(scope="module")
def connection(shared_database_url: str) -> Iterator[Connection]:
    """An owner's connection; chunk metadata has the index that a shelf of its own has."""
    with psycopg.connect(shared_database_url, autocommit=True) as opened:
        opened.execute(
            "insert into pgshelf.libraries (id, name, dimension, embedder, chunking, attributes) values"
            " (%s, 'filters', 2, '{\"provider\": \"none\", \"dimension\": 2}', '{}', %s)",
            [LIBRARY, Jsonb(ATTRIBUTES)],
        )
        opened.execute("create index on pgshelf.chunks_s0 using gin (metadata jsonb_path_ops)")
        opened.execute("set search_path = pg_catalog, pg_temp")
        opened.execute("set enable_seqscan = off")
        yield opened


def store(
    connection: Connection,
    documents: list[Document],
    library: uuid.UUID = LIBRARY,
    vector: Callable[[Chunk], list[float]] = lambda _: [1, 0],
) -> None:
    """Put documents and their chunks into a library on shelf 0."""
    with connection.cursor() as cursor:
        cursor.executemany(
            "insert into pgshelf.documents (place, library_id, id, key, title, source, metadata, created_at,"
            " updated_at) values (pgshelf.place_of(%s, null, 1), %s, %s, %s, %s, %s, %s, %s, %s)",
            [
                (library, library, d.id, d.key, d.title, d.source, Jsonb(d.metadata), d.created_at, d.updated_at)
                for d in documents
            ],
        )
        cursor.executemany(
            "insert into pgshelf.chunks_s0 (shelf, place, library_id, document_id, ordinal, id, text, metadata,"
            " embedding, language) values (0, pgshelf.place_of(%s, null, 1), %s, %s, %s, %s, %s, %s, %s, 'english')",
            [
                (library, library, d.id, c.ordinal, c.id, c.text, Jsonb(c.metadata), str(vector(c)))
                for d in documents
                for c in d.chunks
            ],
        )


def compiled(
    connection: Connection, condition: Filter | None, library: uuid.UUID = LIBRARY
) -> tuple[str, str, str, str]:
    row = connection.execute(
        "select f.documents, f.chunks, f.indexed, f.chunks_indexed from pgshelf.libraries l,"
        " pgshelf.compile_filter(l, %s) f where l.id = %s",
        [None if condition is None else Jsonb(condition), library],
    ).fetchone()
    assert row is not None
    return row


def selected(connection: Connection, condition: Filter, *parts: str) -> list[uuid.UUID]:
    """The chunks that fulfil some conditions over d and c."""
    statement = (
        "select c.id from pgshelf.documents d"
        " join pgshelf.chunks_s0 c on c.library_id = d.library_id and c.document_id = d.id"
        f" where d.library_id = '{LIBRARY}' and $1::int is null and {' and '.join(parts)} order by c.id"
    )
    rows = psycopg.RawCursor(connection).execute(statement.encode(), [None, Jsonb(condition)]).fetchall()
    return [row[0] for row in rows]


def decided(connection: Connection, condition: Filter) -> set[uuid.UUID] | None:
    """The documents that ready attributes find alone; None where they do not know it all."""
    text = one_value(
        connection,
        f"select (pgshelf.compile_filter(l, %s)).decided from pgshelf.libraries l where l.id = '{LIBRARY}'",
        condition,
    )
    if text is None:
        return None
    statement = f"select * from ({text}) x where $1::int is null"
    rows = psycopg.RawCursor(connection).execute(statement.encode(), [None, Jsonb(condition)]).fetchall()
    assert len(set(rows)) == len(rows)
    return {row[0] for row in rows}


def fulfilling(connection: Connection, condition: Filter, whole: str) -> set[uuid.UUID]:
    """The documents that fulfil what a filter says of documents alone."""
    statement = f"select d.id from pgshelf.documents d where d.library_id = '{LIBRARY}' and $1::int is null and {whole}"
    rows = psycopg.RawCursor(connection).execute(statement.encode(), [None, Jsonb(condition)]).fetchall()
    return {row[0] for row in rows}


def expected(condition: Filter, documents: list[Document], attributes: dict[str, str]) -> list[uuid.UUID]:
    return sorted(c.id for d in documents for c in d.chunks if matches(condition, d, c, attributes))


@pytest.mark.parametrize("state", STATES)
def test_generated_filters_match_what_the_predicate_matches(
    connection: Connection, state: str, generated: Callable[[Any], Any]
) -> None:
    attributes, ready = STATES[state]
    seen: list[int] = []
    known: list[int] = []

    drawing = filters(attributes, DOCUMENTS)
    drawing = st.one_of(drawing, *[of_attributes(attributes)] * 3) if state == "exact" else drawing

    @generated
    @given(st.integers(0, 2**32), st.lists(drawing, min_size=BATCH, max_size=BATCH))
    def check(number: int, conditions: list[Filter]) -> None:
        documents = make_documents(random.Random(number), DOCUMENTS * (3 if state == "exact" else 1))
        with connection.transaction(force_rollback=True):
            store(connection, documents)
            connection.execute(
                "update pgshelf.libraries set attributes = %s, attributes_ready = %s where id = %s",
                [Jsonb(attributes), Jsonb(ready), LIBRARY],
            )
            if state == "exact":
                documents = exact(connection, documents)
            for condition in conditions:
                note(json.dumps(condition))
                want = expected(condition, documents, attributes)
                whole, chunks, indexed, chunks_indexed = compiled(connection, condition)
                assert selected(connection, condition, whole, chunks) == want
                assert selected(connection, condition, whole, chunks, indexed, chunks_indexed) == want
                assert not selected(connection, condition, f"(({whole}) is null or ({chunks}) is null)")
                seen.append(len(want))
                alone = decided(connection, condition)
                if alone is not None:
                    assert alone == fulfilling(connection, condition, whole)
                    known.append(len(alone))

    check()
    # the first example of hypothesis is the smallest, whose filters find nothing
    assert sum(count > 0 for count in seen) > (len(seen) - BATCH) / 5, "the filters match nothing"
    if state == "exact":
        assert len(known) > len(seen) / 20 and any(known), "attributes never decided"
    elif state != "ready":
        assert known == []


def exact(connection: Connection, documents: list[Document]) -> list[Document]:
    """Deletes the documents of which an attribute keeps a value that is not exact; gives those that are left."""
    deleted = connection.execute(
        """delete from pgshelf.documents where id in (select v.document_id from pgshelf.attribute_values v
        where not v.exact and v.ts is null) returning id"""
    ).fetchall()
    gone = {row[0] for row in deleted}
    assert 0 < len(gone) < len(documents)
    return [document for document in documents if document.id not in gone]


def drawn(generated: Callable[[Any], Any]) -> list[Filter]:
    """As many generated filters as --filters asks for."""
    found: list[Filter] = []

    @generated
    @given(st.lists(filters(ATTRIBUTES, DOCUMENTS), min_size=BATCH, max_size=BATCH))
    def draw(conditions: list[Filter]) -> None:
        found.extend(conditions)

    draw()
    return found


class Ways:
    """Every way to search a library with a filter."""

    def __init__(self, connection: Connection, client: httpx2.AsyncClient, rng: random.Random) -> None:
        self.connection, self.client, self.rng = connection, client, rng
        self.documents = make_documents(rng, DOCUMENTS)
        self.vectors = {c.id: [rng.gauss(0, 1) for _ in range(3)] for d in self.documents for c in d.chunks}

    async def check(self, condition: Filter) -> None:
        """All of them give the nearest of the chunks that the predicate finds, in order, whatever k is."""
        asked = [self.rng.gauss(0, 1) for _ in range(3)]
        matching = expected(condition, self.documents, ATTRIBUTES)
        nearest = sorted(matching, key=lambda chunk: -cosine(asked, self.vectors[chunk]))
        k = self.rng.choice([1, 4, 200])
        for exact in (True, False):
            rows = self.connection.execute(
                f"select chunk_id from pgshelf.search('ways', '{asked}', k => %s, filter => %s, exact => %s)".encode(),
                [k, Jsonb(condition), exact],
            )
            assert [row[0] for row in rows] == nearest[:k], ("exact" if exact else "index", k, json.dumps(condition))
        body = {"vector": asked, "k": k, "filter": condition, "include": [], "total": True}
        answer = ok(await self.client.post("/v1/libraries/ways/search", json=body))
        assert [hit["chunk_id"] for hit in answer["hits"]] == [str(chunk) for chunk in nearest[:k]], json.dumps(
            condition
        )
        assert answer["total"] == len(matching), json.dumps(condition)


def cosine(one: list[float], two: list[float]) -> float:
    dot, lengths = sum(a * b for a, b in zip(one, two, strict=True)), math.hypot(*one) * math.hypot(*two)
    return dot / lengths


async def test_every_way_to_search_gives_the_same_rows(
    database_url: str, make_settings: Any, make_client: Any, generated: Callable[[Any], Any]
) -> None:
    """Exactly and by an index, in SQL and over REST, on the shared shelf and on one of its own."""
    client = await make_client(make_settings(database_url))
    conditions = drawn(generated)
    made = await library(client, "ways", 3, attributes=ATTRIBUTES)
    with psycopg.connect(database_url, autocommit=True) as connection:
        ways = Ways(connection, client, random.Random(len(conditions)))
        store(connection, ways.documents, uuid.UUID(made["id"]), lambda chunk: ways.vectors[chunk.id])
        for condition in conditions[::3]:
            await ways.check(condition)
        ok(await client.put("/v1/libraries/ways/index", json={"type": "hnsw"}), 202)

        async def built() -> bool:
            return bool(ok(await client.get("/v1/libraries/ways/index"))["state"] == "ready")

        await until(built, 60)
        # as many chunks as make the index worth while for whatever some chunks match, and nobody counts them again
        shelf = connection.execute("select 'pgshelf.chunks_s' || shelf from pgshelf.libraries").fetchone()
        assert shelf is not None
        connection.execute(f"alter table {shelf[0]} set (autovacuum_enabled = off)".encode())
        connection.execute(
            "update pg_class c set reltuples = 1e6 from pgshelf.libraries l where c.relname = 'chunks_s' || l.shelf"
        )
        for condition in conditions:
            await ways.check(condition)
        # the conditions drawn may all be narrow ones: what everything matches is known to be worth the index
        everything: Filter = {"never": {"$exists": False}}
        await ways.check(everything)
        explained = "select pgshelf.explain_search('ways', '[1,0,0]', k => 4, filter => %s)"
        assert one_value(connection, explained, everything)["strategy"] == "index", "the index was not used"


def one_value(connection: Connection, statement: str, condition: Filter) -> Any:
    row = connection.execute(statement.encode(), [Jsonb(condition)]).fetchone()
    assert row is not None
    return row[0]


def one(metadata: dict[str, Any], number: int = 0, **fields: Any) -> Document:
    """A document with one chunk."""
    given = {"key": None, "title": None, "source": None, "text": "text", "chunk": {}, **fields}
    chunk = Chunk(document_id(number), 0, given["text"], given["chunk"])
    moment = START + timedelta(days=number)
    return Document(
        document_id(number), given["key"], given["title"], given["source"], metadata, moment, moment, (chunk,)
    )


@pytest.fixture
def shelved(connection: Connection) -> Iterator[Callable[[list[Document]], None]]:
    """Stores documents for one test."""
    with connection.transaction(force_rollback=True):
        yield lambda documents: store(connection, documents)


def found(connection: Connection, condition: Filter) -> list[int]:
    """The numbers of the documents that match, by the conditions alone and by the index as well."""
    whole, chunks, indexed, chunks_indexed = compiled(connection, condition)
    hits = selected(connection, condition, whole, chunks)
    assert hits == selected(connection, condition, whole, chunks, indexed, chunks_indexed)
    assert decided(connection, condition) in (None, fulfilling(connection, condition, whole))
    numbers = {document_id(number): number for number in range(100)}
    return sorted(numbers[hit] for hit in hits)


PATTERNS: list[tuple[Filter, list[int]]] = [
    ({"name": {"$like": "Kn%"}}, [0]),
    ({"name": {"$like": "K_uth"}}, [0]),
    ({"name": {"$ilike": "kn%"}}, [0, 1]),
    ({"name": {"$ilike": "%"}}, [0, 1, 2, 3, 4]),
    ({"name": {"$like": "50\\%"}}, [2]),
    ({"name": {"$like": "a\\\\b"}}, [3]),
    ({"name": {"$not": {"$ilike": "kn%"}}}, [2, 3, 4, 5, 6, 7]),
    ({"name": {"$regex": "^K.*h$"}}, [0]),
    ({"name": {"$regex": "(?i)^k.*h$"}}, [0, 1]),
    ({"name": {"$regex": "^$"}}, [4]),
    ({"name": {"$regex": "5"}}, [2]),
    ({"name": {"$regex": "[[:digit:]]{2}%"}}, [2]),
    ({"$not": {"name": {"$regex": "."}}}, [4, 5, 6, 7]),
    ({"$title": {"$ilike": "%TITLE%"}}, [0]),
    ({"$title": {"$regex": "^A "}}, [0]),
    ({"$title": {"$not": {"$like": "%"}}}, [1, 2, 3, 4, 5, 6, 7]),
    ({"chunk.$text": {"$ilike": "%passage%"}}, [1]),
    ({"chunk.$text": {"$regex": "PASSAGE"}}, [1]),
    ({"chunk.page": {"$like": "i%"}}, [2]),
]


@pytest.mark.parametrize(("condition", "numbers"), PATTERNS, ids=lambda value: json.dumps(value))
def test_patterns(connection: Connection, shelved: Any, condition: Filter, numbers: list[int]) -> None:
    names: list[Any] = ["Knuth", "knuth", "50%", "a\\b", "", 5, None, ["Knuth"]]
    documents = [one({"name": name}, number) for number, name in enumerate(names)]
    documents[0] = one({"name": "Knuth"}, 0, title="A title")
    documents[1] = one({"name": "knuth"}, 1, text="A PASSAGE")
    documents[2] = one({"name": "50%"}, 2, chunk={"page": "ii"})
    shelved(documents)
    assert found(connection, condition) == numbers


def test_a_datetime_attribute_compares_moments_and_is_a_string_elsewhere(connection: Connection, shelved: Any) -> None:
    values = ["2020-01-01T01:00:00+01:00", "2020-01-01", "tomorrow", 2020, None]
    shelved([one({"published": value}, number) for number, value in enumerate(values)])
    assert found(connection, {"published": "2020-01-01T00:00Z"}) == [0, 1]
    assert found(connection, {"published": {"$ne": "2020-01-01T00:00Z"}}) == [2, 3, 4]
    assert found(connection, {"published": {"$lt": "2030-01-01"}}) == [0, 1]
    assert found(connection, {"published": {"$exists": True}}) == [0, 1, 2, 3, 4]
    assert found(connection, {"published": {"$like": "%T%"}}) == [0]


NEIGHBOURS: dict[str, list[Any]] = {
    "year": [2**53, 2**53 + 1, -(2**53), -(2**53) - 1, 10**400, 10**400 + 1, 0, 1e-310, -1e-310, 0.1, "0", None, [0]],
    "lang": ["", "x" * 255, "x" * 256, "x" * 256 + "a", "x" * 256 + "b", "x" * 257, "\uffff", "\U0001f600", 1, None],
    "published": [*MOMENTS, *NO_MOMENTS, 5, None],
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_ready_attribute_loses_nothing_that_its_index_rounds(connection: Connection, shelved: Any, name: str) -> None:
    """Every operator with every value, where neighbours are one value in the index, or are of no type that it holds."""
    documents = [one({name: value}, number) for number, value in enumerate(NEIGHBOURS[name])]
    shelved(documents)
    connection.execute("update pgshelf.libraries set attributes_ready = attributes")
    for value in NEIGHBOURS[name]:
        typed = value in MOMENTS if name == "published" else isinstance(value, int | float | str)
        operands: Filter = {"$gt": value, "$gte": value, "$lt": value, "$lte": value, "$between": [value, value]}
        operands = operands if typed else {}
        if typed or name != "published":
            operands |= {"$eq": value, "$ne": value, "$in": [value], "$nin": [value]}
        for operator, operand in operands.items():
            condition = {name: {operator: operand}}
            want = [number for number, d in enumerate(documents) if matches(condition, d, d.chunks[0], ATTRIBUTES)]
            assert found(connection, condition) == want, condition


EXACT: dict[str, list[Any]] = {
    "year": [2**53, -(2**53), 0, 0.1, 0.2, 1e300],
    "lang": ["", "a", "x" * 255, "x" * 256, "\uffff", "\U0001f600"],
    "published": [*MOMENTS, *NO_MOMENTS, 5],
}
BLURRED: dict[str, Any] = {"year": 2**53 + 1, "lang": "x" * 257}


@pytest.mark.parametrize("name", EXACT)
def test_attributes_decide_alone_while_all_values_are_exact(connection: Connection, shelved: Any, name: str) -> None:
    """Datetimes always, for they are moments; a number or a text that is not kept as it is ends it for all."""
    shelved([one({name: value}, number) for number, value in enumerate(EXACT[name])])
    connection.execute("update pgshelf.libraries set attributes_ready = attributes")
    operands = [value for value in EXACT[name] if name != "published" or value in MOMENTS]
    for value in operands:
        for operator in ("$eq", "$gt", "$gte", "$lt", "$lte", "$in", "$between"):
            many = {"$in": [value, operands[0]], "$between": [operands[0], value]}
            condition: Filter = {name: {operator: many.get(operator, value)}, "$and": [{name: {"$gte": operands[1]}}]}
            assert decided(connection, condition) is not None, condition
            found(connection, condition)
    others: list[Filter] = [{name: {"$ne": operands[0]}}, {name: {"$exists": True}}, {"$not": {name: operands[0]}}]
    for condition in others:
        assert decided(connection, condition) is None
    assert decided(connection, {name: operands[0], "other": 1}) is None
    assert decided(connection, {name: operands[0], "chunk.page": 1}) is not None
    if name == "published":
        return
    blurred = BLURRED[name]
    assert decided(connection, {name: blurred}) is None
    assert decided(connection, {name: {"$in": [operands[0], blurred]}}) is None
    store(connection, [one({name: blurred}, 90)])
    assert decided(connection, {name: operands[0]}) is None
    connection.execute("delete from pgshelf.documents where id = %s", [document_id(90)])
    assert decided(connection, {name: operands[0]}) == {document_id(0)}
    store(connection, [one({name: [operands[0]]}, 91)])  # another type
    assert decided(connection, {name: operands[0]}) is None


def test_what_several_attributes_share_is_found(connection: Connection, shelved: Any) -> None:
    shelved(
        [one({"year": number % 5, "lang": "ab"[number % 2], "published": "2020-01-01"}, number) for number in range(20)]
    )
    connection.execute("update pgshelf.libraries set attributes_ready = attributes")
    shared = {"lang": "a", "year": {"$gt": 1, "$lt": 4}, "published": {"$gte": "2019-01-01"}}
    assert decided(connection, shared) == {document_id(number) for number in (2, 8, 12, 18)}
    assert found(connection, shared) == [2, 8, 12, 18]
    assert found(connection, shared | {"chunk.$ordinal": 0}) == [2, 8, 12, 18]
    assert found(connection, shared | {"published": "2020-01-02"}) == []


def test_dots_walk_into_objects_and_not_into_arrays(connection: Connection, shelved: Any) -> None:
    shelved([one({"a": {"0": 5}}, 0), one({"a": [5]}, 1), one({"a.0": 5}, 2), one({"a": [{"0": 5}]}, 3)])
    assert found(connection, {"a.0": 5}) == [0]
    assert found(connection, {"a.0": {"$exists": False}}) == [1, 2, 3]


REFUSED: list[tuple[Any, str]] = [
    ([], "needs an object of conditions"),
    ("a", "needs an object of conditions"),
    (None, "needs an object of conditions"),
    ({"$xor": []}, "there is no operator or column '$xor'"),
    ({"$id2": 1}, "there is no operator or column '$id2'"),
    ({"chunk.$id": 1}, "there is no operator or column 'chunk.$id'"),
    ({"a": {"$gt": 1, "b": 2}}, "the field does not have this operator"),
    ({"a": {"$near": 1}}, "the field does not have this operator"),
    ({"a": {"$gt": True}}, "needs a number or a string, not true"),
    ({"a": {"$gt": None}}, "needs a number or a string, not null"),
    ({"a": {"$lte": [1]}}, "needs a number or a string, not"),
    ({"a": {"$in": 1}}, "needs a list, not 1"),
    ({"a": {"$in": list(range(1001))}}, "the list has more than 1000 values"),
    ({"a": {"$contains_any": "x"}}, "needs a list"),
    ({"a": {"$contains_all": {"a": 1}}}, "needs a list"),
    ({"a": {"$between": [1]}}, "needs a list of two values"),
    ({"a": {"$between": [1, 2, 3]}}, "needs a list of two values"),
    ({"a": {"$between": [1, "2"]}}, "needs two values of the same type"),
    ({"a": {"$between": [None, None]}}, "needs a number or a string"),
    ({"a": {"$exists": 1}}, "needs true or false, not 1"),
    ({"a": {"$like": 1}}, "needs a pattern, not 1"),
    ({"a": {"$like": "a\\"}}, "ends with its escape character"),
    ({"a": {"$ilike": "\\\\\\"}}, "ends with its escape character"),
    ({"a": {"$regex": "("}}, "parentheses () not balanced"),
    ({"a": {"$regex": "a{2,1}"}}, "invalid regular expression"),
    ({"a": {"$not": 5}}, "needs an object of operators"),
    ({"a": {"$not": {"b": 5}}}, "needs an object of operators"),
    ({"$and": []}, "needs a list of filters"),
    ({"$or": {}}, "needs a list of filters"),
    ({"$or": [1]}, "needs an object of conditions"),
    ({"$not": []}, "needs an object of conditions"),
    ({"$title": {"$contains": "x"}}, "the field does not have this operator"),
    ({"$title": 5}, "needs a string, not 5"),
    ({"$key": {"$in": ["a", None]}}, "needs a string"),
    ({"$id": "x"}, "needs an id (UUID)"),
    ({"$id": {"$gt": str(LIBRARY)}}, "the field does not have this operator"),
    ({"$created_at": "yesterday"}, "needs a date or time"),
    ({"$created_at": {"$like": "2%"}}, "the field does not have this operator"),
    ({"published": "yesterday"}, "needs a date or time"),
    ({"published": {"$in": ["2020-01-01", None]}}, "needs a date or time"),
    ({"chunk.$ordinal": "1"}, "needs a number"),
    ({"chunk.$ordinal": {"$regex": "1"}}, "the field does not have this operator"),
    ({"$and": [{"a": {"$in": list(range(5))}}] * 201}, "it has more than 200 conditions"),
    ({"$or": [{}] * 201}, "it has more than 200 conditions"),
    ({".".join("a" * 33): 1}, "more than 32 parts"),
]


@pytest.mark.parametrize(("condition", "message"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_what_is_no_filter_is_refused(connection: Connection, condition: Any, message: str) -> None:
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(
            "select pgshelf.compile_filter(l, %s) from pgshelf.libraries l where l.id = %s", [Jsonb(condition), LIBRARY]
        )
    assert caught.value.sqlstate == "PS030"
    assert message in str(caught.value.diag.message_primary)
    assert caught.value.diag.message_hint


def nested_in(condition: Filter, levels: int) -> Filter:
    for level in range(levels):
        condition = {"$not": condition} if level % 4 < 2 else {["$and", "$or"][level % 2]: [condition]}
    return condition


def test_eight_levels_and_200_conditions_are_allowed(connection: Connection, shelved: Any) -> None:
    shelved([one({"a": 1}, 0)])
    assert found(connection, nested_in({"a": 1}, 8)) == [0]
    for deeper in (nested_in({"a": 1}, 9), nested_in({"a": {"$not": {"$eq": 1}}}, 8)):
        with pytest.raises(psycopg.Error, match="nested more than 8 deep"), connection.transaction():
            found(connection, deeper)
    assert found(connection, {"$or": [{"b": number} for number in range(199)] + [{"a": 1}]}) == [0]
    assert found(connection, {f"f{number}": {"$ne": 1} for number in range(200)}) == [0]
    assert found(connection, {"a": {"$in": list(range(1000))}}) == [0]


def test_no_filter_is_true_and_the_values_are_not_in_the_text(connection: Connection) -> None:
    nothings: list[Filter | None] = [None, {}]
    for nothing in nothings:
        assert compiled(connection, nothing) == ("true", "true", "true", "true")
    one_text = compiled(connection, {"a": {"$gt": 1}, "lang": "en", "chunk.tags": {"$contains_any": ["x"]}})
    assert (
        compiled(connection, {"a": {"$gt": 2}, "lang": "'; --", "chunk.tags": {"$contains_any": ["y", "z"]}})
        == one_text
    )
    assert not any(value in text for value in ("en'", '"x"') for text in one_text)


def test_names_are_quoted(connection: Connection, shelved: Any) -> None:
    evil = "a' or true) or ('x' = 'x"
    shelved([one({evil: 1}, 0), one({}, 1)])
    assert found(connection, {evil: 1}) == [0]
    assert found(connection, {f"chunk.{evil}": 1}) == []
    assert found(connection, {evil: {"$in": [1]}}) == [0]
    assert found(connection, {evil: {"$not": {"$gte": 2}}}) == [0, 1]


def test_what_concerns_documents_is_kept_apart_from_what_concerns_chunks(connection: Connection) -> None:
    whole, chunks, indexed, chunks_indexed = compiled(connection, {"$and": [{"a": 1, "chunk.b": 2}], "$title": "x"})
    assert "c." not in whole and "d." not in chunks and "d.title" in whole
    assert "d.metadata" in indexed and "c.metadata" in chunks_indexed
    whole, chunks, indexed, chunks_indexed = compiled(connection, {"$or": [{"a": 1}, {"chunk.b": 2}]})
    assert (whole, indexed, chunks_indexed) == ("true", "true", "true") and "c." in chunks and "d." in chunks


INDEXES: list[tuple[Filter, str]] = [
    ({"color": "c7"}, "documents_metadata_idx"),
    ({"nested.color": "c7", "tags": {"$contains": "t3"}}, "documents_metadata_idx"),
    ({"tags": {"$contains_all": ["t3", "u7"]}}, "documents_metadata_idx"),
    ({"tags": {"$contains_any": ["u7", "u8"]}}, "documents_metadata_idx"),
    ({"color": {"$in": ["c7", "c8"]}}, "documents_metadata_idx"),
    ({"$or": [{"color": "c7"}, {"$and": [{"nested.color": {"$in": ["c8"]}}]}]}, "documents_metadata_idx"),
    ({"nested": {"color": "c7", "more": []}}, "documents_metadata_idx"),
    ({"year": {"$gte": 3000, "$lt": 3010}}, "attribute_values_num_idx"),
    ({"year": 3000}, "attribute_values_num_idx"),
    ({"year": {"$in": [3000, 3001]}}, "attribute_values_num_idx"),
    ({"lang": {"$between": ["l10", "l11"]}}, "attribute_values_txt_idx"),
    ({"lang": "l10"}, "attribute_values_txt_idx"),
    ({"published": {"$lte": "2000-01-10"}}, "attribute_values_ts_idx"),
    ({"$or": [{"year": {"$lt": 1010}}, {"color": "c7"}]}, "attribute_values_num_idx"),
    ({"$key": "k7"}, "documents_key_key"),
    ({"$key": {"$in": ["k7", "k8"]}}, "documents_key_key"),
    ({"$created_at": {"$gt": "2040-01-01"}}, "documents_order_idx"),
]


@pytest.fixture(scope="module")
def many(databases: Databases) -> Iterator[Connection]:
    """A library of 3,000 documents and another one beside it, all attributes ready."""
    url = databases.migrated()
    with psycopg.connect(url, autocommit=True) as opened:
        for number in (1, 2):
            opened.execute(
                "insert into pgshelf.libraries (id, name, dimension, embedder, chunking, attributes, attributes_ready)"
                ' values (%s, %s, 2, \'{"provider": "none", "dimension": 2}\', \'{}\', %s, %s)',
                [uuid.UUID(int=number), f"plans {number}", Jsonb(ATTRIBUTES), Jsonb(ATTRIBUTES)],
            )
            opened.execute(
                """insert into pgshelf.documents (place, library_id, key, metadata)
                select 0, %s, 'k' || i, jsonb_build_object('color', 'c' || i,
                  'nested', jsonb_build_object('color', 'c' || i, 'more', '[]'::jsonb),
                  'tags', jsonb_build_array('t' || i %% 5, 'u' || i), 'year', 1000 + i, 'lang', 'l' || i,
                  'published', (date '2000-01-01' + i)::text) from generate_series(1, 3000) i""",
                [uuid.UUID(int=number)],
            )
        opened.execute("vacuum analyze pgshelf.documents, pgshelf.attribute_values")
        opened.execute("set search_path = pg_catalog, pg_temp")
        yield opened
    databases.drop(url)


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from nodes(inner)


@pytest.mark.parametrize(("condition", "index"), INDEXES, ids=lambda value: json.dumps(value)[:60])
def test_an_index_finds_what_few_documents_match(many: Connection, condition: Filter, index: str) -> None:
    whole, _, indexed, _ = compiled(many, condition)
    rows = psycopg.RawCursor(many).execute(
        f"explain (format json) select d.id from pgshelf.documents d where d.library_id = '{LIBRARY}'"
        f" and $1::int is null and {whole} and {indexed}".encode(),
        [None, Jsonb(condition)],
    )
    plan = list(nodes(rows.fetchall()[0][0][0]["Plan"]))
    assert index in {node.get("Index Name") for node in plan}
    assert not [node for node in plan if node["Node Type"] == "Seq Scan"]


def test_a_filter_that_no_index_knows_has_none(many: Connection) -> None:
    unknown: list[Filter] = [
        {"color": {"$gt": "c7"}},
        {"color": {"$ne": "c7"}},
        {"$not": {"color": "c7"}},
        {"$or": [{"color": "c7"}, {"color": {"$like": "c%"}}]},
        {"nested.more": []},  # leaves nothing in the index, which would be read whole
        {"color": {"$in": ["c7", {}]}},
    ]
    assert {compiled(many, condition)[2] for condition in unknown} == {"true"}
