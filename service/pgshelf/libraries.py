"""Libraries: create, read, change, delete, numbers."""

from __future__ import annotations

import unicodedata
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Router, delete, get, patch, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType
from psycopg.types.json import Jsonb
from sqlalchemy import insert, select, tuple_, update

from pgshelf import database, limits
from pgshelf.access import Caller
from pgshelf.connections import Connection
from pgshelf.embedder_choice import Dimension, EmbedderChoice, EmbedderUsed, chosen
from pgshelf.errors import Problem, invalid
from pgshelf.http import (
    After,
    Answer,
    Config,
    Engine,
    LibraryName,
    Limit,
    Page,
    Reader,
    as_id,
    cursor,
    page_size,
    position,
    problems,
)
from pgshelf.idempotency import Write
from pgshelf.index_choice import IndexChoice
from pgshelf.settings import Settings
from pgshelf.tables import libraries

Name = Annotated[
    str, Meta(min_length=1, max_length=128, examples=["handbook"], description="What the library is called; unique.")
]
Description = Annotated[str, Meta(max_length=2000)]
Metric = Literal["cosine", "l2", "inner_product", "l1"]
# the types and names that SQL allows; checked there
Attributes = dict[str, Literal["number", "text", "datetime"]]


class ChunkingChoice(msgspec.Struct, forbid_unknown_fields=True):
    """How `text` shall be split, in characters; what is absent is taken from the library or the settings."""

    size: Annotated[
        Annotated[int, Meta(ge=50, le=20_000)] | None,
        Meta(description="The longest chunk. A new library takes PGSHELF_CHUNK_SIZE (1200) if absent."),
    ] = None
    overlap: Annotated[
        Annotated[int, Meta(ge=0, le=10_000)] | None,
        Meta(
            description="What a chunk repeats of the one before; less than `size`. PGSHELF_CHUNK_OVERLAP (0) if absent."
        ),
    ] = None


class CreateLibrary(msgspec.Struct, forbid_unknown_fields=True):
    """A new library. Only the name is required, and the dimension where the client brings the vectors."""

    name: Name
    description: Annotated[Description | None, Meta(description="A note for people.")] = None
    embedder: Annotated[
        EmbedderChoice | None,
        Meta(
            description="Who makes the vectors; PGSHELF_EMBEDDER if absent, itself `cohere` with a key, else `local`."
        ),
    ] = None
    dimension: Annotated[
        Dimension | None,
        Meta(
            description="Numbers per vector. Required with embedder `none`; equals embedder.dimension if both are sent."
        ),
    ] = None
    metric: Annotated[Metric, Meta(description="How the distance of two vectors is measured.")] = "cosine"
    language: Annotated[
        Annotated[str, Meta(min_length=1, max_length=63)],
        Meta(description="A text search configuration of PostgreSQL, for full text."),
    ] = "english"
    chunking: Annotated[ChunkingChoice | None, Meta(description="How documents sent as `text` are split.")] = None
    metadata: Annotated[dict[str, Any], Meta(description="Anything of yours: a JSON object.")] = {}
    index: Annotated[IndexChoice | None, Meta(description="How it shall be searched; `auto` if absent.")] = None
    attributes: Annotated[
        Attributes,
        Meta(
            description="Fields of the documents' metadata to index for ranges, sorting and facets, at most 32, "
            "with their types; dots lead into objects."
        ),
    ] = {}


class PatchLibrary(msgspec.Struct, forbid_unknown_fields=True):
    """What shall change; what is absent stays."""

    name: Name | UnsetType = UNSET
    description: Annotated[
        Description | UnsetType | None, Meta(description="A note for people; null takes it away.")
    ] = UNSET
    chunking: Annotated[ChunkingChoice | UnsetType, Meta(description="Counts for documents written from now on.")] = (
        UNSET
    )
    metadata: Annotated[
        dict[str, Any] | UnsetType, Meta(description="A merge patch (RFC 7396): null takes a key away.")
    ] = UNSET
    attributes: Annotated[
        Attributes | UnsetType | None,
        Meta(description="All fields to index from now on, in place of those before; null takes all away."),
    ] = UNSET


class Chunking(msgspec.Struct):
    """How `text` is split, in characters."""

    size: Annotated[int, Meta(description="The longest chunk.")]
    overlap: Annotated[int, Meta(description="What a chunk repeats of the one before.")]


class Library(msgspec.Struct):
    """A library: documents that share an embedder, a dimension and a metric."""

    id: Annotated[UUID, Meta(description="Stays when the name changes; addresses take either.")]
    name: Annotated[str, Meta(description="What the library is called; unique.")]
    description: Annotated[str | None, Meta(description="A note for people.")]
    dimension: Annotated[int, Meta(description="Numbers per vector; changes with the embedder only.")]
    metric: Annotated[Metric, Meta(description="How the distance of two vectors is measured; fixed.")]
    embedder: Annotated[EmbedderUsed, Meta(description="Who makes the vectors; `/embedder` changes it.")]
    chunking: Annotated[Chunking, Meta(description="How documents sent as `text` are split.")]
    language: Annotated[str, Meta(description="A text search configuration of PostgreSQL; fixed.")]
    metadata: Annotated[dict[str, Any], Meta(description="Anything of yours.")]
    attributes: Annotated[Attributes, Meta(description="Fields of metadata that shall be indexed.")]
    attributes_ready: Annotated[
        Attributes,
        Meta(description="Those that are; the worker makes the others ready. Filters mean the same meanwhile."),
    ]
    version: Annotated[int, Meta(description="Counts the changes of the library itself, not those of its documents.")]
    created_at: Annotated[datetime, Meta(description="When it was created.")]
    updated_at: Annotated[datetime, Meta(description="When the library itself last changed.")]


class IndexState(msgspec.Struct):
    """The index of a library, in short; `/index` says more."""

    type: Annotated[str, Meta(description="What searches use now: `flat` is none, searched exactly.")]
    state: Annotated[
        str, Meta(description="`ready` when that is what is wanted; else `waiting`, `building`, `failed`.")
    ]
    progress: Annotated[float, Meta(description="How far the wanted one is, from 0 to 1.")]


class Stats(msgspec.Struct):
    """Numbers of a library."""

    documents: Annotated[int, Meta(description="How many documents.")]
    chunks: Annotated[int, Meta(description="How many chunks, pending and failed ones among them.")]
    pending: Annotated[int, Meta(description="Chunks that wait for their vector.")]
    failed: Annotated[int, Meta(description="Chunks whose embedding was given up; each says why in `error`.")]
    bytes: Annotated[int, Meta(description="What its rows take, without indexes.")]
    shelf: Annotated[int, Meta(description="The number of the table that holds its chunks.")]
    index: Annotated[IndexState, Meta(description="The index that searches use.")]


COLUMNS = [libraries.c[name] for name in Library.__struct_fields__]
LIBRARY_PROBLEMS = problems(404)


@post(
    "/libraries",
    responses=problems(409, 413, 415, 422, 502),
    response_description="Created",
    summary="Create a library",
    operation_id="createLibrary",
)
async def create_library(data: JSONBody[CreateLibrary], once: Write, settings: Config) -> Answer[Library]:
    """Create a library; its metric and language are fixed from then on."""
    choice = data.embedder or EmbedderChoice(
        settings.default_embedder, settings.embedder_model, settings.embedder_dimension
    )
    embedder = await chosen(settings, choice, data.dimension)
    dimension = embedder["dimension"]
    size, overlap = _chunking(data.chunking, settings.chunk_size, settings.chunk_overlap)
    values = {
        "name": _name(data.name),
        "description": data.description,
        "dimension": dimension,
        "metric": data.metric,
        "embedder": embedder,
        "chunking": {"size": size, "overlap": overlap},
        "language": data.language,
        "metadata": limits.metadata(data.metadata, settings).obj,
        "index": data.index.wanted() if data.index else {"type": "auto"},
        "attributes": data.attributes,
        "attributes_ready": data.attributes,  # there is no document yet
    }
    if values["index"]["type"] != "auto":
        values["index_state"] = "building"  # every other type has a shelf of its own, which the worker makes

    async def create(connection: Connection) -> Answer[Library]:
        await _check_language(connection, data.language)
        check = "select pgshelf.check_index(%s, %s, %s)"
        await database.rows(connection, check, Jsonb(values["index"]), dimension, data.metric)
        await database.rows(connection, "select pgshelf.check_attributes(%s)", Jsonb(data.attributes))
        [row] = await database.execute(connection, insert(libraries).values(values).returning(*COLUMNS))
        library = _library(row)
        once.note(library=str(library.id))
        return Answer(library, status_code=201, headers={"Location": f"{settings.api_prefix}/libraries/{library.id}"})

    return await once.run(create)


@get(
    "/libraries",
    responses=problems(),
    response_description="A page of libraries",
    summary="List libraries",
    operation_id="listLibraries",
)
async def list_libraries(
    reader: Reader, settings: Config, principal: Caller, limit: Limit = None, after: After = None
) -> Page[Library]:
    """List the libraries that the key sees, oldest first."""
    size = page_size(limit, settings)
    moment, last = position(after)
    query = select(*COLUMNS).where(libraries.c.deleted_at.is_(None), *principal.sees())
    if moment is not None:
        query = query.where(tuple_(libraries.c.created_at, libraries.c.id) > (moment, last))
    query = query.order_by(libraries.c.created_at, libraries.c.id).limit(size + 1)

    async def listed(connection: Connection) -> list[Library]:
        return [_library(row) for row in await database.execute(connection, query)]

    found = await database.retried(reader, listed, single=True)
    more = found[size - 1] if len(found) > size else None
    return Page(found[:size], cursor(more.created_at, more.id) if more else None)


@get(
    "/libraries/{library:str}",
    responses=LIBRARY_PROBLEMS,
    response_description="The library",
    summary="Get a library",
    operation_id="getLibrary",
)
async def get_library(library: LibraryName, reader: Reader) -> Library:
    """Get a library by its name or id."""
    return await database.retried(reader, lambda connection: _find(connection, library), single=True)


@patch(
    "/libraries/{library:str}",
    responses=problems(404, 409, 413, 415),
    response_description="The library, changed",
    summary="Change a library",
    operation_id="updateLibrary",
)
async def update_library(
    library: LibraryName, data: JSONBody[PatchLibrary], once: Write, settings: Config
) -> Answer[Library]:
    """Change name, description, chunking, metadata or attributes; chunking counts for documents written from now on."""

    async def change(connection: Connection) -> Answer[Library]:
        now = await _find(connection, library, lock=True)
        values = _changes(data, now, settings)
        if data.attributes is not UNSET:
            declare = "select pgshelf.declare_attributes(%s, %s)"
            await database.rows(connection, declare, now.id, Jsonb(data.attributes or {}))
        written = update(libraries).where(libraries.c.id == now.id).values(values).returning(*COLUMNS)
        [row] = await database.execute(connection, written)
        changed = _library(row)
        if data.metadata is not UNSET:
            limits.metadata(changed.metadata, settings)
        once.note(library=str(now.id))  # by its name it might not be found any more
        return Answer(changed, status_code=200)

    return await once.run(change)


def _changes(data: PatchLibrary, now: Library, settings: Settings) -> dict[str, Any]:
    values: dict[str, Any] = {"version": libraries.c.version + 1, "updated_at": database.now()}
    if data.name is not UNSET:
        values["name"] = _name(data.name)
    if data.description is not UNSET:
        values["description"] = data.description
    if data.chunking is not UNSET:
        size, overlap = _chunking(data.chunking, now.chunking.size, now.chunking.overlap)
        values["chunking"] = {"size": size, "overlap": overlap}
    if data.metadata is not UNSET:
        patched = limits.metadata(data.metadata, settings)
        values["metadata"] = database.merge_patch(libraries.c.metadata, patched.obj)
    return values


@delete(
    "/libraries/{library:str}",
    responses=problems(404, 409),
    response_description="Deleted",
    summary="Delete a library",
    operation_id="deleteLibrary",
)
async def delete_library(library: LibraryName, once: Write) -> Answer[None]:
    """Delete a library with all its documents; it is gone at once, its space is freed in the background."""

    async def remove(connection: Connection) -> Answer[None]:
        await database.rows(connection, "select pgshelf.delete_library(%s)", library)
        return Answer(None, status_code=204)

    return await once.run(remove, single=True)


@get(
    "/libraries/{library:str}/stats",
    responses=LIBRARY_PROBLEMS,
    response_description="The numbers",
    summary="Numbers of a library",
    operation_id="libraryStats",
)
async def library_stats(library: LibraryName, engine: Engine) -> Stats:
    """Count documents, chunks, pending and failed embeddings, and bytes."""
    rows = await database.run(
        engine,
        "select s.*, i.shelf, i.actual ->> 'type', i.state, i.progress from (select pgshelf.library_named(%s) as l) x,"
        " pgshelf.library_stats((l).id) s, pgshelf.library_index((l).id) i",
        library,
    )
    documents, chunks, pending, failed, size, shelf, *index = rows[0]
    return Stats(documents, chunks, pending, failed, size, shelf, IndexState(*index))


def _chunking(choice: ChunkingChoice | None, size: int, overlap: int) -> tuple[int, int]:
    size = choice.size if choice and choice.size is not None else size
    overlap = choice.overlap if choice and choice.overlap is not None else overlap
    if overlap >= size:
        raise invalid("chunking.overlap", f"is {overlap}; it must be smaller than the size, {size}")
    return size, overlap


def _name(name: str) -> str:
    if name in (".", ".."):
        raise invalid("name", "means something else in an address; choose another name")
    if as_id(name) is not None:
        raise invalid("name", "parses as a UUID, and those are ids; choose another name")
    if name != name.strip(" ") or any(unicodedata.category(character) == "Cc" for character in name):
        raise invalid("name", "must not begin or end with a space, nor hold control characters")
    return name


async def _check_language(connection: Connection, language: str) -> None:
    known = await database.rows(
        connection,
        "select cfgname from pg_catalog.pg_ts_config where cfgnamespace = 'pg_catalog'::regnamespace order by 1",
    )
    if language not in {name for (name,) in known}:
        names = ", ".join(name for (name,) in known)
        raise invalid("language", f"is not a text search configuration of PostgreSQL; choose one of {names}")


async def _find(connection: Connection, library: str, *, lock: bool = False) -> Library:
    query = select(*COLUMNS).where(libraries.c.deleted_at.is_(None))
    if (library_id := as_id(library)) is not None:
        query = query.where(libraries.c.id == library_id)
    else:
        query = query.where(libraries.c.name == library)
    found = await database.execute(connection, query.with_for_update(key_share=True) if lock else query)
    if not found:
        raise Problem("library_not_found", f"There is no library {library!r}.")
    return _library(found[0])


def _library(row: dict[str, Any]) -> Library:
    return msgspec.convert(row, Library)


router = Router(
    "/",
    route_handlers=[create_library, list_libraries, get_library, update_library, delete_library, library_stats],
    tags=["libraries"],
)
