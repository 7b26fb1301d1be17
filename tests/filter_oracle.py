"""What a filter means, said a second time, in plain Python; and filters and documents to try it on."""

from __future__ import annotations

import copy
import random
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

Json = Any
Filter = dict[str, Any]
MISSING = object()
START = datetime(2020, 1, 1, tzinfo=UTC)
ATTRIBUTES = {
    "year": "number",
    "lang": "text",
    "published": "datetime",
    "nested.a": "number",
    "nested.when": "datetime",
}

# Every moment that the tests know, and what is none; a datetime attribute compares moments, not their spelling.
MOMENTS: dict[str, datetime] = {
    "2020-01-01": START,
    "2020-01-01T00:00Z": START,
    "2020-01-01 00:00:00": START,
    "2020-01-01T01:00:00+01:00": START,
    "2019-12-31T23:30:00-00:30": START,
    "2020-01-01T00:00:00.000001Z": START + timedelta(microseconds=1),
    "2020-01-01T00:00:01Z": START + timedelta(seconds=1),
    "2020-01-02T00:00:00Z": START + timedelta(days=1),
    "1999-12-31T23:59:59.999999Z": datetime(1999, 12, 31, 23, 59, 59, 999999, UTC),
    "2024-02-29T12:00:00+14": datetime(2024, 2, 28, 22, 0, tzinfo=UTC),
}
NO_MOMENTS = ["2023-02-29", "2020-13-01T00:00:00Z", "20200101", "now", "infinity", "2020", "", "2020-1-1", "epoch"]

STRINGS = [
    "",
    " ",
    "a",
    "A",
    "ab",
    "b",
    "z",
    "Z",
    "é",
    "e\u0301",
    "ß",
    "\u017f",
    "\uffff",
    "\U0001f600",
    "\ud7ff",
    "1",
    "true",
]
STRINGS += ["null", "a%b", "a_b", "a\\b", "'", '"', "$2", "%s", "{}", "x" * 256, "x" * 256 + "a", "x" * 300, "x" * 257]
NUMBERS: list[Json] = [0, 1, 1.0, -1, -0.0, 0.1, 0.5, 1.5, 2, 2020, 2021, 2**53, 2**53 + 1, -(2**53), 10**30, 1e300]
NUMBERS += [10**30 + 1, 10**400, 10**400 + 1, -(10**400), 5e-324, 1e-310, -1e-310, 1e308, 2147483648]
SCALARS: list[Json] = [None, True, False, *NUMBERS, *STRINGS, *MOMENTS, *NO_MOMENTS]
COMPOSITES: list[Json] = [[], {}, [[]], [{}], {"a": {}}, ["a"], ["a", "b"], ["b", "a"], ["a", "a"], [1], [1.0, "1"]]
COMPOSITES += [
    [None],
    [True, 1],
    {"a": 1},
    {"a": 1.0, "b": 2},
    {"a": "1"},
    [{"a": 1}],
    [{"a": 1, "b": 2}, "a"],
    [["a"]],
]
COMPOSITES += [[["a"], "b"], {"a": {"b": None}}, {"a": [1, 2]}, ["é", "\U0001f600"], [2020, "en"], {"x": []}, [[], "a"]]
NAMES = ["year", "lang", "published", "nested.a", "nested.when", "nested.b.c", "nested", "tags", "a", "o'x", "Größe"]
NAMES += [
    "\U0001f600.$x",
    '"',
    "a b",
    "",
    "0",
    "tags.0",
    "back\\slash",
    "{x,y}",
    "title",
    "chunk",
    "chunk.a.b",
    "nested.",
]
TEXT_COLUMNS = ["$title", "$source", "$key", "chunk.$text"]
TITLES = [text for text in STRINGS if text.strip()]  # what a chunk's text may be, too
ORDERED = ("$gt", "$gte", "$lt", "$lte")
TYPED = (*ORDERED, "$between", "$eq", "$ne", "$in", "$nin")  # what a declared datetime compares as moments


@dataclass(frozen=True)
class Chunk:
    """A chunk, as filters see it."""

    id: uuid.UUID
    ordinal: int
    text: str
    metadata: dict[str, Json]


@dataclass(frozen=True)
class Document:
    """A document, as filters see it."""

    id: uuid.UUID
    key: str | None
    title: str | None
    source: str | None
    metadata: dict[str, Json]
    created_at: datetime
    updated_at: datetime
    chunks: tuple[Chunk, ...]


def matches(condition: Filter, document: Document, chunk: Chunk, attributes: Mapping[str, str]) -> bool:
    """Whether a filter matches a chunk together with its document, in a library with declared attributes."""
    return all(_one(name, value, document, chunk, attributes) for name, value in condition.items())


def _one(name: str, value: Json, document: Document, chunk: Chunk, attributes: Mapping[str, str]) -> bool:
    if name == "$and":
        return all(matches(arm, document, chunk, attributes) for arm in value)
    if name == "$or":
        return any(matches(arm, document, chunk, attributes) for arm in value)
    if name == "$not":
        return not matches(value, document, chunk, attributes)
    operators = value if isinstance(value, dict) and any(key.startswith("$") for key in value) else {"$eq": value}
    return all(
        not _one(name, operand, document, chunk, attributes)
        if operator == "$not"
        else _holds(operator, operand, *_field(name, operator, document, chunk, attributes))
        for operator, operand in operators.items()
    )


def _field(
    name: str, operator: str, document: Document, chunk: Chunk, attributes: Mapping[str, str]
) -> tuple[Json, Callable[[Json], Json]]:
    """The value that a name stands for, and how operands of its type are read."""
    columns: dict[str, Json] = {"$title": document.title, "$source": document.source, "$key": document.key}
    columns |= {"chunk.$text": chunk.text, "chunk.$ordinal": chunk.ordinal}
    if name in columns:
        return MISSING if columns[name] is None else columns[name], lambda operand: operand
    if name == "$id":
        return document.id, uuid.UUID
    if name in ("$created_at", "$updated_at"):
        return getattr(document, name[1:]), MOMENTS.__getitem__
    metadata = chunk.metadata if name.startswith("chunk.") else document.metadata
    value = _walk(metadata, name.removeprefix("chunk."))
    if attributes.get(name) == "datetime" and operator in TYPED:
        moment = MOMENTS.get(value) if isinstance(value, str) else None
        return MISSING if moment is None else moment, MOMENTS.__getitem__
    return value, lambda operand: operand


def _walk(value: Json, name: str) -> Json:
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


def _holds(operator: str, operand: Json, value: Json, read: Callable[[Json], Json]) -> bool:
    match operator:
        case "$eq":
            return same(value, read(operand))
        case "$ne":
            return not same(value, read(operand))
        case "$in":
            return any(same(value, read(item)) for item in operand)
        case "$nin":
            return not any(same(value, read(item)) for item in operand)
        case "$exists":
            return (value is not MISSING) is operand
        case "$gt" | "$gte" | "$lt" | "$lte":
            return _ordered(operator, value, read(operand))
        case "$between":
            return _ordered("$gte", value, read(operand[0])) and _ordered("$lte", value, read(operand[1]))
        case "$contains":
            return isinstance(value, list) and any(same(item, operand) for item in value)
        case "$contains_any":
            return isinstance(value, list) and any(same(item, wanted) for item in value for wanted in operand)
        case "$contains_all":
            return isinstance(value, list) and all(any(same(item, wanted) for item in value) for wanted in operand)
    raise AssertionError(operator)


def same(one: Json, two: Json) -> bool:
    """JSON equality: 1 is 1.0, true is not 1, the order of keys is nothing."""
    if _number(one) and _number(two):
        return _decimal(one) == _decimal(two)
    if type(one) is not type(two):
        return False
    if isinstance(one, list):
        return len(one) == len(two) and all(same(*pair) for pair in zip(one, two, strict=True))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return bool(one == two)


def _ordered(operator: str, value: Json, operand: Json) -> bool:
    if _number(value) and _number(operand):
        value, operand = _decimal(value), _decimal(operand)
    elif type(value) is not type(operand) or not isinstance(value, str | datetime):
        return False
    return {"$gt": value > operand, "$gte": value >= operand, "$lt": value < operand, "$lte": value <= operand}[
        operator
    ]


def _number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _decimal(value: float) -> Decimal:
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)


def make_documents(rng: random.Random, count: int, most_chunks: int = 3) -> list[Document]:
    """Documents whose values meet those of the filters often enough."""
    return [_document(rng, number, most_chunks) for number in range(count)]


def _document(rng: random.Random, number: int, most_chunks: int) -> Document:
    moments = list(MOMENTS.values())
    chunks = tuple(
        Chunk(uuid.UUID(int=rng.getrandbits(128), version=4), ordinal, rng.choice(TITLES), _metadata(rng))
        for ordinal in range(rng.randint(1, most_chunks))
    )
    return Document(
        document_id(number),
        rng.choice([None, f"{rng.choice(TITLES)}{number}", f"k{number}"]),
        rng.choice([None, *STRINGS]),
        rng.choice([None, *STRINGS]),
        _metadata(rng),
        rng.choice(moments),
        rng.choice(moments),
        chunks,
    )


def document_id(number: int) -> uuid.UUID:
    """The id of a document by its number, so that filters can name it."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"urn:pgshelf:filters:{number}")


def _metadata(rng: random.Random) -> dict[str, Json]:
    made: dict[str, Json] = {}
    for name in rng.sample(NAMES, rng.randint(0, len(NAMES) // 2)):
        keys = name.split(".")
        inner = made
        for key in keys[:-1]:
            deeper = inner.setdefault(key, {})
            if not isinstance(deeper, dict):
                break
            inner = deeper
        else:
            values = _usual(name) if rng.random() < 0.7 else [*SCALARS, *COMPOSITES]
            inner[keys[-1]] = copy.deepcopy(rng.choice(values))  # the next name may lead into it
    return made


def _usual(name: str) -> list[Json]:
    """What a field of this name mostly holds, and is mostly compared with."""
    if name in ("year", "nested.a"):
        # neighbours that float8 cannot tell from each other, as the index stores numbers
        return [2020, 2020.0, 1.5, 10**400, 10**400 + 1, 2**53, 2**53 + 1, "2020", None]
    if name in ("published", "nested.when"):
        return [*MOMENTS, *NO_MOMENTS[:2]]
    if name == "lang":
        return ["en", "x" * 256, "x" * 256 + "a", "x" * 257, "x" * 300, "\U0001f600", "\uffff", 1]
    if name == "tags":
        return [item for item in COMPOSITES if isinstance(item, list)]
    return [0, 1, "a", "b", True, None]


@st.composite
def conditions(draw: st.DrawFn, attributes: Mapping[str, str], documents: int, *, chunks: bool = True) -> Filter:
    """One field with one or more operators, or a bare value."""
    kind = draw(
        st.sampled_from(["metadata"] * 6 + ["chunk"] * 2 * chunks + ["text", "$id", "time"] + ["$ordinal"] * chunks)
    )
    match kind:
        case "text":
            names = TEXT_COLUMNS if chunks else TEXT_COLUMNS[:3]
            return {draw(st.sampled_from(names)): draw(_operators([*STRINGS, "k1", "k2"], (*TYPED, "$exists")))}
        case "$id":
            ids = [str(document_id(number)) for number in range(documents)] + [str(uuid.NAMESPACE_DNS)]
            return {"$id": draw(_operators(ids, ("$eq", "$ne", "$in", "$nin", "$exists")))}
        case "time":
            name = draw(st.sampled_from(["$created_at", "$updated_at"]))
            return {name: draw(_operators(list(MOMENTS), (*TYPED, "$exists")))}
        case "$ordinal":
            return {"chunk.$ordinal": draw(_operators([0, 1, 2, 1.0, 0.5, -1, 10**30], (*TYPED, "$exists")))}
    name = draw(st.sampled_from([*NAMES, *(list(ATTRIBUTES) * 4)]))
    if kind == "metadata" and name.startswith("chunk."):
        name = "chunk"
    if kind == "metadata" and attributes.get(name) == "datetime" and draw(st.booleans()):
        return {name: draw(_operators(list(MOMENTS), TYPED))}
    if kind == "metadata" and attributes.get(name) == "datetime":
        return {name: draw(_operators(COMPOSITES, ("$exists", "$contains", "$contains_any", "$contains_all")))}
    name = f"chunk.{name}" if kind == "chunk" else name
    values = _usual(name.removeprefix("chunk.")) if draw(st.integers(0, 2)) else [*SCALARS, *COMPOSITES]
    operators = (*TYPED, "$exists", "$contains", "$contains_any", "$contains_all")
    return {name: draw(_operators(values, operators, elements=name.endswith("tags") or None))}


def _operators(values: list[Json], names: tuple[str, ...], *, elements: bool | None = None) -> st.SearchStrategy[Json]:
    """Operators with operands that they can take; bare values among them."""
    value = st.sampled_from(values)
    ordered = [item for item in values if _number(item) or isinstance(item, str)]
    kinds = [
        group for group in ([i for i in ordered if isinstance(i, str)], [i for i in ordered if _number(i)]) if group
    ]
    pairs = st.one_of([st.lists(st.sampled_from(group), min_size=2, max_size=2) for group in kinds]) if kinds else None
    parts = [part for item in values if isinstance(item, list) for part in item] or [*values]
    element = st.sampled_from(parts if elements else [*parts, *values])
    by_name: dict[str, st.SearchStrategy[Json] | None] = {
        **dict.fromkeys(("$eq", "$ne"), value),
        **dict.fromkeys(ORDERED, st.sampled_from(ordered) if ordered else None),
        **dict.fromkeys(("$in", "$nin"), st.lists(value, max_size=12)),
        "$between": pairs,
        "$exists": st.booleans(),
        "$contains": element,
        **dict.fromkeys(("$contains_any", "$contains_all"), st.lists(element, max_size=3)),
    }
    usable = {name: strategy for name in names if (strategy := by_name[name]) is not None}
    some = st.sets(st.sampled_from(sorted(usable)), min_size=1, max_size=2).flatmap(
        lambda chosen: st.fixed_dictionaries({name: usable[name] for name in sorted(chosen)})
    )
    nested = st.one_of(some, some, some, some.map(lambda inner: {"$not": inner}))
    # an object with a $ in it would be read as operators, so no bare value has one
    return st.one_of(nested, nested, nested, value) if "$eq" in names else nested


def filters(attributes: Mapping[str, str], documents: int, *, chunks: bool = True) -> st.SearchStrategy[Filter]:
    """Trees of conditions, at most four deep."""
    leaf = conditions(attributes, documents, chunks=chunks)
    tree = _conjunction(leaf)
    for _ in range(3):
        tree = st.one_of(tree, _conjunction(st.one_of(leaf, _combined(tree))))
    return tree


def of_attributes(attributes: Mapping[str, str]) -> st.SearchStrategy[Filter]:
    """Conjunctions of conditions that the index of a declared attribute can answer, mostly."""
    values: dict[str, list[Json]] = {
        "number": [2020, 2020.0, 1.5, 0, -1, 0.1, 2**53, 2**53 + 1],
        "text": ["en", "", "a", "x" * 256, "x" * 257, "\U0001f600", "\uffff"],
        "datetime": list(MOMENTS),
    }
    operators = ("$eq", "$in", "$between", *ORDERED)
    return _conjunction(
        st.sampled_from(sorted(attributes)).flatmap(
            lambda name: st.fixed_dictionaries({name: _operators(values[attributes[name]], operators)})
        )
    )


def _conjunction(part: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    def joined(parts: list[Filter]) -> Filter:
        together: Filter = {}
        for item in parts:
            together |= item
        return together

    return st.lists(part, min_size=1, max_size=3).map(joined)


def _combined(tree: st.SearchStrategy[Filter]) -> st.SearchStrategy[Filter]:
    arms = st.lists(tree, min_size=1, max_size=3)
    return st.one_of(
        arms.map(lambda given: {"$and": given}),
        arms.map(lambda given: {"$or": given}),
        tree.map(lambda one: {"$not": one}),
    )
