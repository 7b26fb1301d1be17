"""Chunks: the passages of a document, one by one."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Router, delete, get, patch
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody, QueryParameter
from msgspec import Meta
from pgvector import Vector
from psycopg.types.json import Jsonb

from pgshelf import database, limits
from pgshelf.connections import Connection
from pgshelf.embedding import asked_again, embed_for_writing, library_config
from pgshelf.errors import Problem, invalid, problem_of_state
from pgshelf.http import (
    ANY_VERSION,
    After,
    Answer,
    ChunkId,
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
    page_size,
    problems,
    wanted_version,
)
from pgshelf.idempotency import Write

Include = Annotated[
    list[Literal["embedding"]] | None,
    QueryParameter(description="`embedding` returns the vectors too; they are left out by default.", max_items=1),
]


class PatchChunk(msgspec.Struct, forbid_unknown_fields=True):
    """What shall change; what is absent or null stays."""

    text: Annotated[
        str | None, Meta(description="A new text; without an embedding it is embedded anew (needs an embedder).")
    ] = None
    embedding: Annotated[
        Annotated[list[float], Meta(min_length=1, max_length=16000)] | bytes | None,
        Meta(description="A new vector: numbers, or their little-endian float32 bytes (base64 in JSON)."),
    ] = None
    metadata: Annotated[dict[str, Any] | None, Meta(description="A merge patch (RFC 7396): null takes a key away.")] = (
        None
    )


class Chunk(msgspec.Struct, omit_defaults=True):
    """A passage of a document."""

    id: Annotated[UUID, Meta(description="For addresses; hits carry it as `chunk_id`.")]
    document_id: Annotated[UUID, Meta(description="The document that it belongs to.")]
    ordinal: Annotated[int, Meta(description="Its place in the document, from 0; gaps are left by deleted chunks.")]
    text: Annotated[str, Meta(description="The passage.")]
    metadata: Annotated[dict[str, Any], Meta(description="Anything of yours.")]
    status: Annotated[
        Literal["ready", "pending", "failed"],
        Meta(description="`ready` can be found, `pending` waits for its vector, `failed` was given up."),
    ]
    error: Annotated[str | None, Meta(description="Why embedding failed when it was last tried; else null.")]
    embedding: Annotated[
        list[float] | None, Meta(description="The vector; only with `include=embedding`, and only if there is one.")
    ] = None


COLUMNS = """c.id, c.document_id, c.ordinal, c.text, c.metadata, case when c.embedding is not null then 'ready'
  when c.embed_after = 'infinity' then 'failed' else 'pending' end, c.embed_error, case when %s then c.embedding end"""


@get(
    "/libraries/{library:str}/documents/{document:str}/chunks",
    responses=problems(404),
    response_description="A page of chunks",
    summary="List the chunks of a document",
    operation_id="listChunks",
)
async def list_chunks(
    library: LibraryName,
    document: DocumentName,
    reader: Reader,
    settings: Config,
    limit: Limit = None,
    after: After = None,
    include: Include = None,
) -> Page[Chunk]:
    """List chunks in their order."""
    size = page_size(limit, settings)
    if after is not None and not (after.isascii() and after.isdigit() and len(after) < 10):
        raise invalid("after", "is not a cursor; send the `next` of the page before, unchanged")
    rows = await database.run(
        reader,
        f"""select {COLUMNS} from (select pgshelf.library_named(%s) as l) x,
        pgshelf.document_chunks(l, pgshelf.document_named((l).id, %s), %s, %s) c order by c.ordinal""",  # noqa: S608 - put together from constants
        bool(include), library, document, int(after or -1), size + 1,
    )  # fmt: skip
    found = [_chunk(row) for row in rows]
    return Page(found[:size], str(found[size - 1].ordinal) if len(found) > size else None)


@get(
    "/libraries/{library:str}/chunks/{chunk:str}",
    responses=problems(404),
    response_description="The chunk",
    summary="Get a chunk",
    operation_id="getChunk",
)
async def get_chunk(library: LibraryName, chunk: ChunkId, reader: Reader, include: Include = None) -> Chunk:
    """Get a chunk by its id."""
    rows = await database.run(
        reader,
        f"select {COLUMNS} from (select pgshelf.library_named(%s) as l) x, pgshelf.chunk_named(l, %s) c",  # noqa: S608 - put together from constants
        bool(include), library, _id(chunk),
    )  # fmt: skip
    return _chunk(rows[0])


@patch(
    "/libraries/{library:str}/chunks/{chunk:str}",
    responses={
        202: ResponseSpec(Chunk, description="Stored; the chunk is pending", generate_examples=False),
        **problems(404, 409, 413, 415, 422, 502),
    },
    response_description="The chunk, changed and ready, or failed as before",
    summary="Change a chunk in place",
    operation_id="updateChunk",
)
async def update_chunk(
    library: LibraryName,
    chunk: ChunkId,
    data: JSONBody[PatchChunk],
    engine: Engine,
    once: Write,
    settings: Config,
    wait: Wait = True,
    if_match: IfMatch = None,
) -> Answer[Chunk]:
    """Change text, embedding or metadata of a chunk; its id and its place stay."""
    if (kept := await once.replayed()) is not None:
        return kept
    chunk_id, version = _id(chunk), wanted_version(if_match)
    vector = None if data.embedding is None else limits.vector(data.embedding, "embedding")
    metadata = None if data.metadata is None else limits.metadata(data.metadata, settings)
    if data.text is not None:
        limits.required_text(data.text, settings.max_chunk_length, "text")

    async def embed_and_change() -> Answer[Chunk]:
        config = await library_config(engine, library)
        wanted, maker = vector, None
        if data.text is not None and wait:
            if vector is None and config.embedder["provider"] != "none":
                [wanted] = await embed_for_writing(engine, settings, config, [data.text], ["text"])
                maker = Jsonb(config.embedder)
            else:
                await embed_for_writing(engine, settings, config, [], [], [data.text])

        async def change(connection: Connection) -> Answer[Chunk]:
            rows = await database.rows(
                connection,
                f"select {COLUMNS} from pgshelf.patch_chunk(pgshelf.embedded_with(%s, %s), %s, %s, %b, %s) c",  # noqa: S608 - put together from constants
                False, config.id, maker, chunk_id, data.text, wanted, metadata,
            )  # fmt: skip
            changed = _chunk(rows[0])
            await _check_version(connection, changed.document_id, version)
            if metadata is not None:
                limits.metadata(changed.metadata, settings)
            return Answer(changed, status_code=202 if changed.status == "pending" else 200)

        return await once.run(change)

    return await asked_again(embed_and_change)


@delete(
    "/libraries/{library:str}/chunks/{chunk:str}",
    responses=problems(404, 409),
    response_description="Deleted",
    summary="Delete a chunk",
    operation_id="deleteChunk",
)
async def delete_chunk(library: LibraryName, chunk: ChunkId, once: Write, if_match: IfMatch = None) -> Answer[None]:
    """Delete a chunk; the ordinals of the others stay."""
    chunk_id, version = _id(chunk), wanted_version(if_match)
    delete_it = "select pgshelf.delete_chunk((pgshelf.library_named(%s)).id, %s)"

    async def remove(connection: Connection) -> Answer[None]:
        await database.rows(connection, delete_it, library, chunk_id)
        return Answer(None, status_code=204)

    async def remove_version(connection: Connection) -> Answer[None]:
        find_it = "select (pgshelf.chunk_named(pgshelf.library_named(%s), %s)).document_id"
        document_id = (await database.rows(connection, find_it, library, chunk_id))[0][0]
        answer = await remove(connection)
        await _check_version(connection, document_id, version)
        return answer

    if version is None:
        return await once.run(remove, single=True)
    return await once.run(remove_version)


async def _check_version(connection: Connection, document_id: UUID, wanted: int | None) -> None:
    """Refuse what has just been done to a chunk, if its document had another version; the write holds its lock."""
    if wanted in (None, ANY_VERSION):
        return
    rows = await database.rows(connection, "select d.version - 1 from pgshelf.documents d where d.id = %s", document_id)
    if rows[0][0] != wanted:
        said = f"the document is at version {rows[0][0]}, not {wanted}"
        raise problem_of_state("PS020", said, "Read the document again and repeat the change on what it is now.")


def _id(chunk: str) -> UUID:
    chunk_id = as_id(chunk)
    if chunk_id is None:
        raise Problem("chunk_not_found", f"There is no chunk {chunk[:100]!r}: a chunk has a UUID.")
    return chunk_id


def _chunk(row: tuple[Any, ...]) -> Chunk:
    *columns, embedding = row
    chunk = Chunk(*columns)
    chunk.embedding = embedding.to_list() if isinstance(embedding, Vector) else None
    return chunk


router = Router("/", route_handlers=[list_chunks, get_chunk, update_chunk, delete_chunk], tags=["chunks"])
