"""Documents: write with all their chunks, read, change, delete."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import msgspec
from litestar import Router, delete, get, patch, post, put
from litestar.datastructures import ResponseHeader
from litestar.openapi.datastructures import ResponseSpec
from msgspec import UNSET, Meta, UnsetType
from pgvector import Vector
from psycopg.types.json import Jsonb
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgshelf import database, limits
from pgshelf.chunking import split
from pgshelf.embedding import LibraryConfig, embed, library_config, store
from pgshelf.errors import Problem, invalid
from pgshelf.http import (
    After,
    Answer,
    Config,
    Engine,
    IfMatch,
    Limit,
    Page,
    Wait,
    cursor,
    page_size,
    position,
    problems,
    wanted_version,
)
from pgshelf.settings import Settings

Key = Annotated[str, Meta(min_length=1, max_length=512, examples=["guide/vacuum"])]
Title = Annotated[str, Meta(examples=["Vacuum"])]
Floats = Annotated[list[float], Meta(min_length=1, max_length=16000)]


class ChunkInput(msgspec.Struct, forbid_unknown_fields=True):
    """One passage; without an embedding the embedder makes it. Bytes are little-endian float32, base64 in JSON."""

    text: str
    embedding: Floats | bytes | None = None
    metadata: dict[str, Any] = {}


class DocumentInput(msgspec.Struct, forbid_unknown_fields=True):
    """A whole document: `text`, which is split into chunks, or `chunks`."""

    key: Key | None = None
    title: Title | None = None
    text: Annotated[str, Meta(examples=["VACUUM reclaims storage occupied by dead tuples."])] | None = None
    chunks: list[ChunkInput] | None = None
    source: str | None = None
    metadata: dict[str, Any] = {}


class PatchDocument(msgspec.Struct, forbid_unknown_fields=True):
    """What shall change of a document itself; `metadata` is a merge patch (RFC 7396)."""

    title: Title | UnsetType | None = UNSET
    source: str | UnsetType | None = UNSET
    metadata: dict[str, Any] | UnsetType = UNSET


class ChunkCounts(msgspec.Struct):
    """The chunks of a document; pending ones wait for their vector, failed ones were given up."""

    total: int
    pending: int
    failed: int


class Document(msgspec.Struct):
    """A document. It is `ready` when all its chunks can be found."""

    id: UUID
    key: str | None
    title: str | None
    source: str | None
    metadata: dict[str, Any]
    version: int
    created_at: datetime
    updated_at: datetime
    chunks: ChunkCounts
    status: str


COLUMNS = "d.id, d.key, d.title, d.source, d.metadata, d.version, d.created_at, d.updated_at"
COUNTS = "coalesce(n.total, 0), coalesce(n.pending, 0), coalesce(n.failed, 0)"
ETAG = ResponseHeader(name="ETag", description="The version of the document, for If-Match.", documentation_only=True)
WRITE_PROBLEMS = problems(404, 409, 413, 415, 422, 502)
WRITTEN = {
    200: ResponseSpec(Document, description="Replaced", generate_examples=False),
    202: ResponseSpec(Document, description="Stored; chunks are pending", generate_examples=False),
}


@post(
    "/libraries/{library:str}/documents",
    responses=WRITTEN | WRITE_PROBLEMS,
    summary="Add a document, or replace the one of the same key",
    operation_id="addDocument",
    response_headers=[ETAG],
)
async def add_document(
    library: str, data: DocumentInput, engine: Engine, settings: Config, wait: Wait = True
) -> Answer[Document]:
    """Store a document with all its chunks, in one transaction."""
    return await _write(engine, settings, library, None, data, None, wait)


@put(
    "/libraries/{library:str}/documents/{document:str}",
    responses={
        201: ResponseSpec(Document, description="Created", generate_examples=False),
        **WRITTEN,
        **WRITE_PROBLEMS,
    },
    summary="Put a document",
    operation_id="putDocument",
    response_headers=[ETAG],
)
async def put_document(
    library: str,
    document: str,
    data: DocumentInput,
    engine: Engine,
    settings: Config,
    wait: Wait = True,
    if_match: IfMatch = None,
) -> Answer[Document]:
    """Create or replace the document of a key, or replace the document of an id."""
    document_id = _id(document)
    if document_id is None:
        if data.key not in (None, document):
            raise invalid("key", "differs from the key in the address; leave it out")
        data.key = document
    return await _write(engine, settings, library, document_id, data, wanted_version(if_match), wait)


@get(
    "/libraries/{library:str}/documents",
    responses=problems(404),
    summary="List documents",
    operation_id="listDocuments",
)
async def list_documents(
    library: str, engine: Engine, settings: Config, limit: Limit = None, after: After = None
) -> Page[Document]:
    """List the documents of a library, oldest first."""
    size = page_size(limit, settings)
    moment, last = position(after)
    rows = await database.run(
        engine,
        f"""with l as materialized (select pgshelf.library_named(%s) as l),
        page as materialized (select {COLUMNS} from pgshelf.documents d where d.library_id = (select (l).id from l)
          and (%s::timestamptz is null or (d.created_at, d.id) > (%s::timestamptz, %s::uuid))
          order by d.created_at, d.id limit %s)
        select {COLUMNS}, {COUNTS} from page d
        left join pgshelf.count_chunks((select l from l), array(select id from page)) n on n.document_id = d.id
        order by d.created_at, d.id""",  # noqa: S608 - put together from constants
        library, moment, moment, last, size + 1,
    )  # fmt: skip
    found = [_document(row) for row in rows]
    more = found[size - 1] if len(found) > size else None
    return Page(found[:size], cursor(more.created_at, more.id) if more else None)


@get(
    "/libraries/{library:str}/documents/{document:str}",
    responses=problems(404),
    summary="Get a document",
    operation_id="getDocument",
    response_headers=[ETAG],
)
async def get_document(library: str, document: str, engine: Engine) -> Answer[Document]:
    """Get a document by its key or id."""
    async with database.transaction(engine) as connection:
        return _answer(await _read(connection, library, document))


@patch(
    "/libraries/{library:str}/documents/{document:str}",
    responses=problems(404, 409, 413, 415),
    summary="Change a document",
    operation_id="updateDocument",
    response_headers=[ETAG],
)
async def update_document(
    library: str, document: str, data: PatchDocument, engine: Engine, settings: Config, if_match: IfMatch = None
) -> Answer[Document]:
    """Change title, source or metadata; the chunks stay."""
    if data.title is not UNSET:
        limits.bounded_text(data.title, settings.max_title_length, "title")
    if data.source is not UNSET:
        limits.bounded_text(data.source, settings.max_title_length, "source")
    patched = None if data.metadata is UNSET else limits.metadata(data.metadata, settings)
    changed = {name: value for name in ("title", "source") if (value := getattr(data, name)) is not UNSET}
    async with database.transaction(engine) as connection:
        await database.rows(
            connection,
            "select pgshelf.patch_document(%s, %s, %s, %s, %s)",
            library, document, Jsonb(changed), patched, wanted_version(if_match),
        )  # fmt: skip
        found = await _read(connection, library, document)
        limits.metadata(found.metadata, settings)
    return _answer(found)


@delete(
    "/libraries/{library:str}/documents/{document:str}",
    responses=problems(404, 409),
    summary="Delete a document",
    operation_id="deleteDocument",
)
async def delete_document(library: str, document: str, engine: Engine, if_match: IfMatch = None) -> None:
    """Delete a document with its chunks."""
    version = wanted_version(if_match)
    await database.run(engine, "select pgshelf.delete_document(%s, %s, %s)", library, document, version)


def _id(document: str) -> UUID | None:
    try:
        return UUID(document)
    except ValueError:
        return None


async def _write(
    engine: AsyncEngine,
    settings: Settings,
    library: str,
    document_id: UUID | None,
    data: DocumentInput,
    version: int | None,
    wait: bool,
) -> Answer[Document]:
    _check(data, document_id, settings)
    config = await library_config(engine, library)
    texts, vectors, metadata, paths = _passages(data, config, settings)
    if wait and config.embedder["provider"] != "none":
        await _embed_new(engine, config, document_id, data.key, texts, vectors, paths)
    rows = await database.run(
        engine,
        "select * from pgshelf.write_document(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
        config.id, document_id, data.key, data.title, data.source, limits.metadata(data.metadata, settings),
        texts, vectors if any(vectors) else None, metadata, version,
    )  # fmt: skip
    written, created, pending = rows[0]
    if pending and wait:
        await _embed_pending(engine, config, written)
    async with database.transaction(engine) as connection:
        found = await _read(connection, str(config.id), str(written))
    waiting = found.chunks.pending > 0
    return _answer(
        found, 202 if waiting else 201 if created else 200, f"{settings.api_prefix}/libraries/{quote(library, safe='')}"
    )


def _check(data: DocumentInput, document_id: UUID | None, settings: Settings) -> None:
    if data.key is not None and _id(data.key) is not None:
        raise invalid("key", "parses as a UUID, and those are ids; choose another key")
    if document_id is not None and data.key is not None:
        raise invalid("key", "cannot be changed; leave it out when putting a document by its id")
    limits.bounded_text(data.title, settings.max_title_length, "title")
    limits.bounded_text(data.source, settings.max_title_length, "source")
    if (data.text is None) == (data.chunks is None):
        raise invalid("text", "give either text or chunks")


Passages = tuple[list[str], list[Vector | None], list[Jsonb], list[str]]


def _passages(data: DocumentInput, config: LibraryConfig, settings: Settings) -> Passages:
    if data.text is not None:
        limits.required_text(data.text, settings.max_text_length, "text")
        texts = split(data.text, config.chunking["size"], config.chunking["overlap"])
        if not texts:
            raise invalid("text", "holds nothing that can be searched")
        given = [ChunkInput(text) for text in texts]
        paths = ["text"] * len(given)
    else:
        given = data.chunks or []
        paths = [f"chunks[{index}].text" for index in range(len(given))]
        for chunk, path in zip(given, paths, strict=True):
            limits.required_text(chunk.text, settings.max_chunk_length, path)
    if len(given) > settings.max_chunks:
        detail = f"would make {len(given)} chunks, at most {settings.max_chunks} are allowed; split the document"
        raise invalid("text" if data.text is not None else "chunks", detail)
    vectors = [
        None if chunk.embedding is None else limits.vector(chunk.embedding, f"chunks[{index}].embedding")
        for index, chunk in enumerate(given)
    ]
    metadata = [
        limits.metadata(chunk.metadata, settings, f"chunks[{index}].metadata") for index, chunk in enumerate(given)
    ]
    return [chunk.text for chunk in given], vectors, metadata, paths


async def _embed_new(
    engine: AsyncEngine,
    config: LibraryConfig,
    document_id: UUID | None,
    key: str | None,
    texts: Sequence[str],
    vectors: list[Vector | None],
    paths: Sequence[str],
) -> None:
    """Embed, before anything is written, the texts that the stored document does not hold already."""
    known: set[str] = set()
    if document_id is not None or key is not None:
        rows = await database.run(engine, "select pgshelf.embedded_texts(%s, %s, %s)", config.id, document_id, key)
        known = {text for (text,) in rows}
    missing = [index for index, text in enumerate(texts) if vectors[index] is None and text not in known]
    if missing:
        made = await embed(config.embedder, [texts[i] for i in missing], "document", [paths[i] for i in missing])
        for index, vector in zip(missing, made, strict=True):
            vectors[index] = vector


async def _embed_pending(engine: AsyncEngine, config: LibraryConfig, document_id: UUID) -> None:
    """Chunks that were thought to be known lost their vectors to another writer: embed what is still missing."""
    rows = await database.run(engine, "select * from pgshelf.pending_chunks(%s, %s)", config.id, document_id)
    if rows:
        ids, texts = [row[0] for row in rows], [row[1] for row in rows]
        made = await embed(config.embedder, texts, "document", ["text"] * len(texts))
        await store(engine, config.id, ids, texts, made)


async def _read(connection: AsyncConnection, library: str, document: str) -> Document:
    rows = await database.rows(
        connection,
        f"""with l as materialized (select pgshelf.library_named(%s) as l)
        select {COLUMNS}, {COUNTS} from l, pgshelf.documents d
        left join pgshelf.count_chunks((select l from l), array[d.id]) n on true
        where d.id = (select pgshelf.document_named((l).id, %s) from l)""",  # noqa: S608 - put together from constants
        library, document,
    )  # fmt: skip
    if not rows:
        raise Problem("document_not_found", "The document was deleted meanwhile.")
    return _document(rows[0])


def _document(row: tuple[Any, ...]) -> Document:
    *columns, total, pending, failed = row
    counts = ChunkCounts(total, pending, failed)
    status = "failed" if failed else "pending" if pending else "ready"
    return Document(**dict(zip(Document.__struct_fields__, (*columns, counts, status), strict=True)))


def _answer(document: Document, status: int = 200, library_path: str | None = None) -> Answer[Document]:
    headers = {"ETag": f'"{document.version}"'}
    if library_path is not None:
        headers["Location"] = f"{library_path}/documents/{document.id}"
    return Answer(document, status_code=status, headers=headers)


router = Router(
    "/",
    route_handlers=[add_document, put_document, list_documents, get_document, update_document, delete_document],
    tags=["documents"],
)
