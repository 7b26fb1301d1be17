"""Documents by a filter: listed in any order, changed, deleted."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import msgspec
from litestar import Router, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType
from psycopg.types.json import Jsonb

from pgshelf import database, filters, limits
from pgshelf.connections import Connection
from pgshelf.errors import Problem, invalid
from pgshelf.http import Answer, Config, LibraryName, Reader, page_size, problems
from pgshelf.idempotency import Write
from pgshelf.settings import Settings
from pgshelf.stored_documents import COLUMNS, COUNTS, Document, document_of

FILTER = Meta(
    description="Conditions as in searches, docs/search.md has the grammar; one on chunks means that the document "
    "has such a chunk.",
    examples=[{"year": {"$lt": 2020}}],
)


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


# What this transaction wrote: its rows of the change log have no position yet. PostgreSQL puts spaces in JSON that do
# not count: what is too large with them is measured here, a part at a time.
LARGE = """select c.id, c.document_id, c.key, d.metadata
from pgshelf.change_log c join pgshelf.documents d on d.id = c.document_id
where c.library_id = (select (pgshelf.library_named(%s)).id) and c.position is null and c.id > %s
  and c.xmin = pg_current_xact_id()::xid and octet_length(d.metadata::text) > %s order by c.id limit 100"""
QUERY = f"""with l as materialized (select pgshelf.library_named(%s) as l),
page as materialized (select s.id, s.keys, s.place
  from pgshelf.sorted_documents((select l from l), %s, %s, %s, %s) with ordinality s(id, keys, place))
select {COLUMNS}, {COUNTS}, p.keys from page p join pgshelf.documents d on d.id = p.id
left join pgshelf.count_chunks((select l from l), array(select id from page)) n on n.document_id = d.id
order by p.place"""  # noqa: S608 - put together from constants


@post(
    "/libraries/{library:str}/documents/query",
    status_code=200,
    responses=problems(404, 413, 415),
    response_description="A page of documents",
    summary="Find documents by a filter",
    operation_id="queryDocuments",
)
async def query_documents(
    library: LibraryName, reader: Reader, settings: Config, data: JSONBody[DocumentQuery | None] = None
) -> DocumentsFound:
    """List the documents that match a filter, in any order."""
    data = data or DocumentQuery()
    size = page_size(data.limit, settings)
    condition = filters.parameter(data.filter, settings)
    sort = Jsonb(msgspec.to_builtins(data.sort))
    after = None if data.after is None else Jsonb(_keys(data.after))

    async def query(connection: Connection) -> DocumentsFound:
        rows = await database.rows(connection, QUERY, library, condition, sort, after, size + 1)
        items = [document_of(row[:-1]) for row in rows[:size]]
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

    async def change(connection: Connection) -> Answer[Affected]:
        rows = await database.rows(
            connection,
            "select pgshelf.update_documents(%s, %s, %s, %s, %s)",
            library, condition, changes, data.max_affected, data.dry_run,
        )  # fmt: skip
        if not data.dry_run:
            await _check_size(connection, library, settings)
        once.note(count=0 if data.dry_run else rows[0][0])
        return Answer(Affected(rows[0][0]), status_code=200)

    return await once.run(change)


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

    async def remove(connection: Connection) -> Answer[Affected]:
        rows = await database.rows(
            connection,
            "select pgshelf.delete_documents(%s, %s, %s, %s)",
            library, condition, data.max_affected, data.dry_run,
        )  # fmt: skip
        once.note(count=0 if data.dry_run else rows[0][0])
        return Answer(Affected(rows[0][0]), status_code=200)

    return await once.run(remove, single=True)


async def _check_size(connection: Connection, library: str, settings: Settings) -> None:
    """Refuse what made the metadata of a document too large."""
    last = 0
    while found := await database.rows(connection, LARGE, library, last, settings.max_metadata_bytes):
        last = found[-1][0]
        for _, document_id, key, metadata in found:
            try:
                limits.metadata(metadata, settings)
            except Problem as error:
                name = document_id if key is None else repr(key)
                raise invalid("patch", f"too much for the document {name}: {error.detail}") from None


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


router = Router("/", route_handlers=[query_documents, update_documents, delete_documents], tags=["documents"])
