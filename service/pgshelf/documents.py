"""Documents: write with all their chunks, read, change, delete."""

from __future__ import annotations

import base64
import contextlib
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import quote
from uuid import UUID

import msgspec
import psycopg
from litestar import Router, delete, get, patch, post, put
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType
from psycopg.types.json import Jsonb
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgshelf import database, filters, limits
from pgshelf.embedding import asked_again
from pgshelf.errors import Problem, invalid
from pgshelf.http import (
    After,
    Answer,
    Config,
    DocumentName,
    Engine,
    IfMatch,
    LibraryName,
    Limit,
    Page,
    Reader,
    Wait,
    as_id,
    cursor,
    page_size,
    position,
    problems,
    wanted_version,
)
from pgshelf.idempotency import Once, Write
from pgshelf.ingest import WRITE, DocumentInput, Prepared, Title, embed_pending, prepare
from pgshelf.settings import Settings

FILTER = Meta(
    description="Conditions as in searches, docs/search.md has the grammar; one on chunks means that the document "
    "has such a chunk.",
    examples=[{"year": {"$lt": 2020}}],
)


class PatchDocument(msgspec.Struct, forbid_unknown_fields=True):
    """What shall change of a document itself; what is absent stays."""

    title: Annotated[Title | UnsetType | None, Meta(description="Null takes it away.")] = UNSET
    source: Annotated[str | UnsetType | None, Meta(description="Where it comes from; null takes it away.")] = UNSET
    metadata: Annotated[
        dict[str, Any] | UnsetType, Meta(description="A merge patch (RFC 7396): null takes a key away.")
    ] = UNSET


class ChunkCounts(msgspec.Struct):
    """The chunks of a document, counted."""

    total: Annotated[int, Meta(description="All of them.")]
    pending: Annotated[int, Meta(description="Those that wait for their vector.")]
    failed: Annotated[int, Meta(description="Those whose embedding was given up.")]


class Document(msgspec.Struct):
    """A document. It is `ready` when all its chunks can be found."""

    id: Annotated[UUID, Meta(description="Stays when the document is replaced; addresses take id or key.")]
    key: Annotated[str | None, Meta(description="The client's own name for it, unique in the library.")]
    title: Annotated[str | None, Meta(description="The title.")]
    source: Annotated[str | None, Meta(description="Where it comes from, such as an address.")]
    metadata: Annotated[dict[str, Any], Meta(description="Anything of yours.")]
    version: Annotated[int, Meta(description="Grows with every change; the ETag, for If-Match.")]
    created_at: Annotated[datetime, Meta(description="When it was first written.")]
    updated_at: Annotated[datetime, Meta(description="When it last changed.")]
    chunks: Annotated[ChunkCounts, Meta(description="How many passages it has.")]
    status: Annotated[
        Literal["ready", "pending", "failed"],
        Meta(description="`failed` if any chunk failed, else `pending` if any waits for its vector."),
    ]


class SortKey(msgspec.Struct, forbid_unknown_fields=True):
    """What documents are ordered by; those that lack it come last, equal ones in the order of their ids."""

    field: Annotated[
        Annotated[str, Meta(min_length=1, max_length=200)],
        Meta(description="A declared attribute, or $title, $source, $key, $created_at, $updated_at or $id."),
    ]
    order: Annotated[Literal["asc", "desc"], Meta(description="Upwards or downwards.")] = "asc"


class DocumentQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which documents to list, and in which order."""

    filter: Annotated[dict[str, Any] | None, FILTER] = None
    sort: Annotated[Annotated[list[SortKey], Meta(max_length=4)], Meta(description="Oldest first if absent.")] = []
    limit: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="How many items at most: 100 if absent; PGSHELF_MAX_PAGE (1000) is the limit."),
    ] = None
    after: Annotated[
        Annotated[str, Meta(max_length=20_000)] | None,
        Meta(description="The `next` of the page before, with the same filter and sort."),
    ] = None
    total: Annotated[bool, Meta(description="Count all that match, too.")] = False


class DocumentsFound(msgspec.Struct):
    """A page of the documents that match."""

    items: Annotated[list[Document], Meta(description="The documents, in order.")]
    next: Annotated[str | None, Meta(description="Send it as `after` for the page behind; null at the end.")] = None
    total: Annotated[int | UnsetType, Meta(description="How many documents match; with `total`.")] = UNSET


class Selection(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which documents to change."""

    filter: Annotated[dict[str, Any], FILTER]
    max_affected: Annotated[
        Annotated[int, Meta(ge=0, le=10**12)] | None,
        Meta(description="When more documents match, nothing is changed and the answer is 409 too_many_affected."),
    ] = None
    dry_run: Annotated[bool, Meta(description="Only tell how many it would be.")] = False


class DeleteDocuments(Selection, forbid_unknown_fields=True, kw_only=True):
    """Which documents to delete. All of them are `{"$id": {"$exists": true}}`."""


class UpdateDocuments(Selection, forbid_unknown_fields=True, kw_only=True):
    """Which documents to change, and how."""

    patch: Annotated[
        dict[str, Any], Meta(description="A merge patch (RFC 7396) of their metadata: null takes a key away.")
    ]


class Affected(msgspec.Struct):
    """How many documents it was."""

    affected: Annotated[int, Meta(description="Documents that were changed, or would be, where `dry_run` was sent.")]


COLUMNS = "d.id, d.key, d.title, d.source, d.metadata, d.version, d.created_at, d.updated_at"
COUNTS = "coalesce(n.total, 0), coalesce(n.pending, 0), coalesce(n.failed, 0)"
QUERY = f"""with l as materialized (select pgshelf.library_named(%s) as l),
page as materialized (select s.id, s.keys, s.place
  from pgshelf.sorted_documents((select l from l), %s, %s, %s, %s) with ordinality s(id, keys, place))
select {COLUMNS}, {COUNTS}, p.keys from page p join pgshelf.documents d on d.id = p.id
left join pgshelf.count_chunks((select l from l), array(select id from page)) n on n.document_id = d.id
order by p.place"""  # noqa: S608 - put together from constants
WRITE_PROBLEMS = problems(404, 409, 413, 415, 422, 502)
WRITTEN = {
    200: ResponseSpec(Document, description="Replaced; all chunks are ready", generate_examples=False),
    202: ResponseSpec(Document, description="Stored; chunks are pending", generate_examples=False),
}


@post(
    "/libraries/{library:str}/documents",
    responses=WRITTEN | WRITE_PROBLEMS,
    response_description="Created; all chunks are ready",
    summary="Add a document, or replace the one of the same key",
    operation_id="addDocument",
)
async def add_document(
    library: LibraryName,
    data: JSONBody[DocumentInput],
    engine: Engine,
    once: Write,
    settings: Config,
    wait: Wait = True,
    if_match: IfMatch = None,
) -> Answer[Document]:
    """Store a document with all its chunks, in one transaction."""
    return await _write(engine, once, settings, library, None, data, wanted_version(if_match), wait)


@put(
    "/libraries/{library:str}/documents/{document:str}",
    responses={
        201: ResponseSpec(Document, description="Created; all chunks are ready", generate_examples=False),
        **WRITTEN,
        **WRITE_PROBLEMS,
    },
    summary="Put a document",
    operation_id="putDocument",
)
async def put_document(
    library: LibraryName,
    document: DocumentName,
    data: JSONBody[DocumentInput],
    engine: Engine,
    once: Write,
    settings: Config,
    wait: Wait = True,
    if_match: IfMatch = None,
) -> Answer[Document]:
    """Create or replace the document of a key, or replace the document of an id."""
    document_id = as_id(document)
    if document_id is None:
        if data.key not in (None, document):
            raise invalid("key", "differs from the key in the address; leave it out")
        limits.bounded_text(document, 512, "key")  # by a constraint of the table
        data.key = document
    return await _write(engine, once, settings, library, document_id, data, wanted_version(if_match), wait)


@get(
    "/libraries/{library:str}/documents",
    responses=problems(404),
    response_description="A page of documents",
    summary="List documents",
    operation_id="listDocuments",
)
async def list_documents(
    library: LibraryName, reader: Reader, settings: Config, limit: Limit = None, after: After = None
) -> Page[Document]:
    """List the documents of a library, oldest first."""
    size = page_size(limit, settings)
    moment, last = position(after)
    rows = await database.run(
        reader,
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
    response_description="The document",
    summary="Get a document",
    operation_id="getDocument",
)
async def get_document(library: LibraryName, document: DocumentName, reader: Reader) -> Answer[Document]:
    """Get a document by its key or id."""
    return _answer(await database.retried(reader, lambda connection: _read(connection, library, document), single=True))


@patch(
    "/libraries/{library:str}/documents/{document:str}",
    responses=problems(404, 409, 413, 415),
    response_description="The document, changed",
    summary="Change a document",
    operation_id="updateDocument",
)
async def update_document(
    library: LibraryName,
    document: DocumentName,
    data: JSONBody[PatchDocument],
    once: Write,
    settings: Config,
    if_match: IfMatch = None,
) -> Answer[Document]:
    """Change title, source or metadata; the chunks stay."""
    if data.title is not UNSET:
        limits.bounded_text(data.title, settings.max_title_length, "title")
    if data.source is not UNSET:
        limits.bounded_text(data.source, settings.max_title_length, "source")
    patched = None if data.metadata is UNSET else limits.metadata(data.metadata, settings)
    changed = {name: value for name in ("title", "source") if (value := getattr(data, name)) is not UNSET}

    async def change(connection: AsyncConnection) -> Answer[Document]:
        await database.rows(
            connection,
            "select pgshelf.patch_document(%s, %s, %s, %s, %s)",
            library, document, Jsonb(changed), patched, wanted_version(if_match),
        )  # fmt: skip
        found = await _read(connection, library, document)
        limits.metadata(found.metadata, settings)
        return _answer(found)

    return await once.run(change)


@delete(
    "/libraries/{library:str}/documents/{document:str}",
    responses=problems(404, 409),
    response_description="Deleted",
    summary="Delete a document",
    operation_id="deleteDocument",
)
async def delete_document(
    library: LibraryName, document: DocumentName, once: Write, if_match: IfMatch = None
) -> Answer[None]:
    """Delete a document with its chunks."""
    version = wanted_version(if_match)

    async def remove(connection: AsyncConnection) -> Answer[None]:
        await database.rows(connection, "select pgshelf.delete_document(%s, %s, %s)", library, document, version)
        return Answer(None, status_code=204)

    return await once.run(remove, single=True)


@post(
    "/libraries/{library:str}/documents/query",
    status_code=200,
    responses=problems(404, 413, 415),
    response_description="A page of documents",
    summary="Find documents by a filter",
    operation_id="queryDocuments",
)
async def query_documents(
    library: LibraryName, data: JSONBody[DocumentQuery], reader: Reader, settings: Config
) -> DocumentsFound:
    """List the documents that match a filter, in any order."""
    size = page_size(data.limit, settings)
    condition = filters.parameter(data.filter, settings)
    sort = Jsonb(msgspec.to_builtins(data.sort))
    after = None if data.after is None else Jsonb(_keys(data.after))

    async def query(connection: AsyncConnection) -> DocumentsFound:
        rows = await database.rows(connection, QUERY, library, condition, sort, after, size + 1)
        items = [_document(row[:-1]) for row in rows[:size]]
        found = DocumentsFound(items, _after(rows[size - 1][-1]) if len(rows) > size else None)
        if data.total:
            counted = await database.rows(connection, "select pgshelf.count_documents(%s, %s)", library, condition)
            found.total = counted[0][0]
        return found

    return await database.retried(reader, query)


@post(
    "/libraries/{library:str}/documents/update",
    status_code=200,
    responses=problems(404, 409, 413, 415),
    response_description="Done",
    summary="Change documents by a filter",
    operation_id="updateDocuments",
)
async def update_documents(
    library: LibraryName, data: JSONBody[UpdateDocuments], once: Write, settings: Config
) -> Answer[Affected]:
    """Change the metadata of all documents that match, in one transaction; their chunks stay."""
    condition, changes = filters.parameter(data.filter, settings), limits.metadata(data.patch, settings, "patch")

    async def change(connection: AsyncConnection) -> Answer[Affected]:
        rows = await database.rows(
            connection,
            "select pgshelf.update_documents(%s, %s, %s, %s, %s)",
            library, condition, changes, data.max_affected, data.dry_run,
        )  # fmt: skip
        once.note(count=0 if data.dry_run else rows[0][0])
        return Answer(Affected(rows[0][0]), status_code=200)

    return await once.run(change, single=True)


@post(
    "/libraries/{library:str}/documents/delete",
    status_code=200,
    responses=problems(404, 409, 413, 415),
    response_description="Done",
    summary="Delete documents by a filter",
    operation_id="deleteDocuments",
)
async def delete_documents(
    library: LibraryName, data: JSONBody[DeleteDocuments], once: Write, settings: Config
) -> Answer[Affected]:
    """Delete all documents that match, with their chunks, in one transaction."""
    condition = filters.parameter(data.filter, settings)

    async def remove(connection: AsyncConnection) -> Answer[Affected]:
        rows = await database.rows(
            connection,
            "select pgshelf.delete_documents(%s, %s, %s, %s)",
            library, condition, data.max_affected, data.dry_run,
        )  # fmt: skip
        once.note(count=0 if data.dry_run else rows[0][0])
        return Answer(Affected(rows[0][0]), status_code=200)

    return await once.run(remove, single=True)


def _after(keys: list[str | None]) -> str:
    """The place of a document in an order, opaque to clients."""
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(keys)).decode().rstrip("=")


def _keys(after: str) -> list[str | None]:
    """What `_after` wrote; SQL checks that it fits the order."""
    try:
        padded = after.encode("ascii") + b"=" * (-len(after) % 4)
        return msgspec.msgpack.decode(base64.urlsafe_b64decode(padded), type=list[str | None])
    except (ValueError, msgspec.DecodeError):
        raise invalid("after", "is not a cursor; send the `next` of the page before, unchanged") from None


async def _write(
    engine: AsyncEngine,
    once: Once,
    settings: Settings,
    library: str,
    document_id: UUID | None,
    data: DocumentInput,
    version: int | None,
    wait: bool,
) -> Answer[Document]:
    if (kept := await once.replayed()) is not None:  # lest its texts be embedded again
        return kept
    made = 200
    path = f"{settings.api_prefix}/libraries/{quote(library, safe='')}"

    async def prepare_and_write() -> tuple[Prepared, Answer[Document]]:
        prepared = await prepare(engine, settings, library, document_id, data, wait)

        async def write(connection: AsyncConnection) -> Answer[Document]:
            nonlocal made
            written, created, _ = (await database.rows(connection, WRITE, *prepared.parameters, version))[0]
            made = 201 if created else 200
            found = await _read(connection, str(prepared.library.id), str(written))
            once.note(library=str(prepared.library.id), document=found.key or str(written))
            return _answer(found, 202 if found.chunks.pending else made, path)

        return prepared, await once.run(write)

    prepared, answer = await asked_again(prepare_and_write)
    found = answer.content
    if wait and isinstance(found, Document) and found.chunks.pending:
        # the write is done, so a failure here is no error of it: 202, and the worker goes on
        with contextlib.suppress(Problem, psycopg.Error):
            found.chunks.pending -= await embed_pending(engine, settings, prepared.library, found.id)
            found.status = "pending" if found.chunks.pending else "ready"
        return _answer(found, 202 if found.chunks.pending else made, path)
    return answer


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
    route_handlers=[
        add_document,
        put_document,
        list_documents,
        get_document,
        update_document,
        delete_document,
        query_documents,
        update_documents,
        delete_documents,
    ],
    tags=["documents"],
)
