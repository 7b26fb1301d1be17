"""Documents: write with all their chunks, read, change, delete."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

import msgspec
import psycopg
import sqlalchemy
from litestar import Router, delete, get, patch, post, put
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType
from psycopg.types.json import Jsonb

from pgshelf import database, limits
from pgshelf.connections import Connection
from pgshelf.embedding import asked_again
from pgshelf.errors import Problem, invalid
from pgshelf.http import (
    After,
    Answer,
    Config,
    DocumentName,
    Engine,
    IfMatch,
    IfNoneMatch,
    LibraryName,
    Limit,
    Page,
    Reader,
    Wait,
    as_id,
    cursor,
    is_known,
    page_size,
    position,
    problems,
    wanted_version,
)
from pgshelf.idempotency import Once, Write
from pgshelf.ingest import WRITE, DocumentInput, Prepared, Title, embed_pending, prepare
from pgshelf.settings import Settings
from pgshelf.stored_documents import COLUMNS, COUNTS, Document, document_of


class PatchDocument(msgspec.Struct, forbid_unknown_fields=True):
    """What shall change of a document itself; what is absent stays."""

    title: Annotated[Title | UnsetType | None, Meta(description="Null takes it away.")] = UNSET
    source: Annotated[str | UnsetType | None, Meta(description="Where it comes from; null takes it away.")] = UNSET
    metadata: Annotated[
        dict[str, Any] | UnsetType, Meta(description="A merge patch (RFC 7396): null takes a key away.")
    ] = UNSET


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
    found = [document_of(row) for row in rows]
    more = found[size - 1] if len(found) > size else None
    return Page(found[:size], cursor(more.created_at, more.id) if more else None)


@get(
    "/libraries/{library:str}/documents/{document:str}",
    responses={304: ResponseSpec(None, generate_examples=False, description="You have it as it is")} | problems(404),
    response_description="The document",
    summary="Get a document",
    operation_id="getDocument",
)
async def get_document(
    library: LibraryName, document: DocumentName, reader: Reader, if_none_match: IfNoneMatch = None
) -> Answer[Document]:
    """Get a document by its key or id."""
    found = await database.retried(reader, lambda connection: _read(connection, library, document), single=True)
    answer: Answer[Any] = _answer(found)
    if is_known(answer.headers["ETag"], if_none_match):
        answer.content, answer.status_code = None, 304
    return answer


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

    async def change(connection: Connection) -> Answer[Document]:
        await database.rows(
            connection,
            "select pgshelf.patch_document(%s, %s, %s, %s, %s)",
            library, document, Jsonb(changed), patched, wanted_version(if_match),
        )  # fmt: skip
        found = await _read(connection, library, document)
        if patched is not None:
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

    async def remove(connection: Connection) -> Answer[None]:
        await database.rows(connection, "select pgshelf.delete_document(%s, %s, %s)", library, document, version)
        return Answer(None, status_code=204)

    return await once.run(remove, single=True)


WRITTEN_DOCUMENT = "(select coalesce(w.key, w.id::text) from w)"  # as the audit log names it


async def _write(
    engine: sqlalchemy.Engine,
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

        async def write(connection: Connection) -> Answer[Document]:
            nonlocal made
            statement, recorded = once.recording(WRITE, WRITTEN_DOCUMENT, library=str(prepared.library.id))
            *columns, created, pending = (
                await database.rows(connection, statement, *prepared.parameters, version, *recorded)
            )[0]
            made = 201 if created else 200
            # of what was given up nothing stays: it waits anew
            found = document_of((*columns, len(prepared.texts), pending, 0))
            return _answer(found, 202 if pending else made, path)

        return prepared, await once.run(write, single=True, recording=True)

    prepared, answer = await asked_again(prepare_and_write)
    found = answer.content
    if wait and isinstance(found, Document) and found.chunks.pending:
        # the write is done, so a failure here is no error of it: 202, and the worker goes on
        with contextlib.suppress(Problem, psycopg.Error):
            found.chunks.pending -= await embed_pending(engine, settings, prepared.library, found.id)
            found.status = "pending" if found.chunks.pending else "ready"
        return _answer(found, 202 if found.chunks.pending else made, path)
    return answer


async def _read(connection: Connection, library: str, document: str) -> Document:
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
    return document_of(rows[0])


def _answer(document: Document, status: int = 200, library_path: str | None = None) -> Answer[Document]:
    headers = {"ETag": _etag(document)}
    if library_path is not None:
        headers["Location"] = f"{library_path}/documents/{document.id}"
    return Answer(document, status_code=status, headers=headers)


def _etag(document: Document) -> str:
    """The version; with the counts behind it that change without it, so that whoever has an ETag has all of it."""
    waits = document.chunks.pending, document.chunks.failed
    return f'"{document.version}-{waits[0]}-{waits[1]}"' if any(waits) else f'"{document.version}"'


router = Router(
    "/",
    route_handlers=[
        add_document,
        put_document,
        list_documents,
        get_document,
        update_document,
        delete_document,
    ],
    tags=["documents"],
)
