"""Many documents written in a few statements, none of which a bad one spoils: shared by batches and imports."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, TypeVar
from uuid import UUID

import msgspec
import psycopg
import sqlalchemy
from msgspec import Meta
from psycopg.types.json import Jsonb

from pgshelf import database
from pgshelf.connections import Connection
from pgshelf.embedders import TextRefused
from pgshelf.embedding import LibraryConfig, embed_for_writing
from pgshelf.errors import Problem, problem_of, problem_of_state
from pgshelf.ingest import Prepared
from pgshelf.settings import Settings

# arrays go in binary (%b): as text they take many times as long
WRITE = """select n, document_id, created, pending
from pgshelf.write_documents(pgshelf.embedded_with(%s, %s), %b::int[], %b::text[], %b::text[], %b::text[],
%b::jsonb[], %b::int[], %b::int[], %b::text[], %b, %b::jsonb[])"""
REFUSED = "select n, state, message, hint from pgshelf.refused_documents(%s, %b::text[], %b::int[], %b::int[], %b)"
VECTOR_STATES = {"PS010", "PS011", "PS012", "PS013"}
T = TypeVar("T")
OWN_STATUSES = {400, 413, 422}  # problems of a document itself, which leave all others as they are


class FieldProblem(msgspec.Struct):
    """One finding of a validation: where, and what."""

    path: Annotated[str, Meta(description="Where in the document.")]
    message: Annotated[str, Meta(description="What is wrong there.")]


class DocumentProblem(msgspec.Struct, omit_defaults=True):
    """Why one document of many was not written; the others are not affected."""

    status: Annotated[int, Meta(description="The status that it would have had alone.")]
    code: Annotated[str, Meta(description="The stable code of the problem.")]
    detail: Annotated[str, Meta(description="What is wrong, and what to do.")]
    errors: Annotated[list[FieldProblem] | None, Meta(description="The fields that are not valid.")] = None


def told(problem: Problem) -> DocumentProblem:
    """A problem as it stands among the results of many documents."""
    errors = [FieldProblem(**item) for item in problem.errors] if problem.errors else None
    return DocumentProblem(problem.status, problem.code, problem.detail, errors)


class Item(msgspec.Struct):
    """One document of many: its place among those that are written together, and what became of it."""

    place: int
    key: str | None = None
    prepared: Prepared | None = None
    problem: Problem | None = None
    id: UUID | None = None
    created: bool = False
    pending: int = 0

    def refuse(self, problem: Problem) -> None:
        self.prepared, self.problem = None, problem


async def embed_new(
    engine: sqlalchemy.Engine, settings: Settings, config: LibraryConfig, items: Sequence[Item]
) -> Problem | None:
    """Embed the texts that neither bring a vector nor have one already; a text that has none refuses its document.

    When the provider fails, nothing is changed and its problem is returned.
    """
    able = [(item, item.prepared) for item in items if item.prepared]
    keys = [item.key for item, _ in able if item.key is not None]
    rows = await database.run(engine, "select * from pgshelf.embedded_texts_of(%s, %b::text[])", config.id, keys)
    known: defaultdict[str | None, Counter[str]] = defaultdict(Counter)
    for key, text in rows:
        known[key][text] += 1
    # taken away with its first document: what the next one of the key finds is what that has written
    missing = [
        (item, document, index) for item, document in able for index in document.missing(known.pop(item.key, Counter()))
    ]
    brought = [
        text
        for _, document in able
        for text, vector in zip(document.texts, document.vectors, strict=True)
        if vector is not None
    ]
    while missing:
        texts = [document.texts[index] for _, document, index in missing]
        paths = [document.paths[index] for _, document, index in missing]
        try:
            made = await embed_for_writing(engine, settings, config, texts, paths, brought)
        except Problem as problem:
            if not isinstance(problem.__cause__, TextRefused):
                return problem
            refused = missing[problem.__cause__.index][0]
            refused.refuse(problem)
            missing = [entry for entry in missing if entry[0] is not refused]
        else:
            for (_, document, index), vector in zip(missing, made, strict=True):
                document.vectors[index] = vector
                document.made.add(index)
            break
    return None


def forget_made(items: Sequence[Item]) -> None:
    """Take away the vectors that an embedder made which the library has no more."""
    for document in [item.prepared for item in items if item.prepared]:
        for index in document.made:
            document.vectors[index] = None
        document.made.clear()


Recording = Callable[[str], tuple[str, list[Any]]]  # a statement to one that writes the audit log, too


async def write_whole(
    connection: Connection, config: LibraryConfig, items: Sequence[Item], recording: Recording
) -> None:
    """Write all documents, whose keys differ, in one statement, or none: raises what the first that is wrong raises."""
    statement, recorded = recording(WRITE)
    parameters = _parameters(config, items)
    _note(items, await database.rows(connection, statement, *parameters, *recorded))


def is_whole(items: Sequence[Item]) -> bool:
    """Whether one statement can write them all: none is refused, and no key comes twice."""
    keys = [item.key for item in items if item.key is not None]
    return len(set(keys)) == len(keys) and all(item.prepared for item in items)


class Refused(Exception):
    """Documents turned out to be refused; they are marked, and the others can be written in another transaction."""


async def without_refused(work: Callable[[], Awaitable[T]]) -> T:
    """Do `work`, a transaction that ends in `write`, until the documents that are left can be written."""
    while True:
        with contextlib.suppress(Refused):
            return await work()


async def write(connection: Connection, config: LibraryConfig, items: Sequence[Item]) -> None:
    """Write the documents that are not refused, within the transaction of `connection`, and note what became of each.

    They are written as if one by one, in order. Raises `Refused` where more of them are, and what is no document's own
    fault, such as PS041 when the library has another embedder than the one of `config` that made vectors.
    """
    # A key that comes again replaces what this write has just made: in the second wave. The first one has all keys and
    # locks them as SQL says; those behind it want nothing that is not theirs. So none can be left out on the way.
    waves: list[list[Item]] = []
    seen: Counter[str] = Counter()
    for item in items:
        if item.prepared is None:
            continue
        wave = 0 if item.key is None else seen[item.key]
        if item.key is not None:
            seen[item.key] += 1
        if wave == len(waves):
            waves.append([])
        waves[wave].append(item)
    for found in waves:
        parameters = _parameters(config, found)
        try:
            async with database.savepoint(connection):
                rows = await database.rows(connection, WRITE, *parameters)
        except (psycopg.Error, UnicodeError) as error:
            await _refuse(connection, config, found, _own(error))
            if all(item.prepared for item in found):
                raise
            raise Refused from None
        _note(found, rows)


def _own(error: Exception) -> Problem:
    problem = problem_of(error)
    if problem.status not in OWN_STATUSES:
        raise error
    return problem


async def _refuse(connection: Connection, config: LibraryConfig, items: Sequence[Item], problem: Problem) -> None:
    """Refuse those at fault of documents that cannot be written together; nothing is written."""
    if len(items) == 1:
        items[0].refuse(problem)
        return
    if problem.sqlstate in VECTOR_STATES:
        _, _, _, keys, _, _, _, of, ordinals, _, vectors, _ = _parameters(config, items)
        refused = await database.rows(connection, REFUSED, config.id, keys, of, ordinals, vectors)
        for n, state, message, hint in refused:
            items[n - 1].refuse(problem_of_state(state, message, hint))
        if refused:
            return
    middle = len(items) // 2
    for half in (items[:middle], items[middle:]):
        if found := await _tried(connection, config, half):
            await _refuse(connection, config, half, found)


async def _tried(connection: Connection, config: LibraryConfig, items: Sequence[Item]) -> Problem | None:
    """What is wrong with documents; those that could be written are not, lest their locks be held."""
    try:
        async with database.savepoint(connection):
            await database.rows(connection, WRITE, *_parameters(config, items))
            raise Refused
    except Refused:
        return None
    except (psycopg.Error, UnicodeError) as error:
        return _own(error)


def _note(items: Sequence[Item], rows: Sequence[tuple[Any, ...]]) -> None:
    for n, document_id, created, pending in rows:
        item = items[n - 1]
        item.id, item.created, item.pending = document_id, created, pending


def _parameters(config: LibraryConfig, items: Sequence[Item]) -> tuple[Any, ...]:
    documents = [item.prepared for item in items if item.prepared]
    vectors = [vector for document in documents for vector in document.vectors]
    return (
        config.id,
        Jsonb(config.embedder) if any(document.made for document in documents) else None,
        [item.place for item in items],
        [document.key for document in documents],
        [document.title for document in documents],
        [document.source for document in documents],
        [document.metadata for document in documents],
        [n for n, document in enumerate(documents, 1) for _ in document.texts],
        [ordinal for document in documents for ordinal in range(len(document.texts))],
        [text for document in documents for text in document.texts],
        vectors if any(vector is not None for vector in vectors) else None,
        [metadata for document in documents for metadata in document.chunk_metadata],
    )
