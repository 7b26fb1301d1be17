"""Exports: all documents of a library, or those that match a filter, as a stream that an import takes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any
from weakref import WeakKeyDictionary

import msgspec
import sqlalchemy
from litestar import Request, Router, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter
from litestar.response import Stream
from sqlalchemy import QueuePool

from pgshelf import access, database, filters
from pgshelf.errors import Problem, invalid
from pgshelf.http import NDJSON, Config, Engine, LibraryName, problems
from pgshelf.ingest import DocumentInput
from pgshelf.settings import Settings

ROWS = 100  # that are fetched at a time, each a chunk
AGAIN = 1.0  # seconds between two questions about the caller
FETCH = f"fetch {ROWS} from export"
Embeddings = Annotated[bool, QueryParameter(description="false leaves the vectors out.")]
ExportFilter = Annotated[
    str | None,
    QueryParameter(
        name="filter", description="Only documents that match: a filter in JSON, as in searches.", min_length=1
    ),
]


@get(
    "/libraries/{library:str}/export",
    media_type=NDJSON,
    responses={
        200: ResponseSpec(DocumentInput, generate_examples=False, media_type=NDJSON, description="A document a line"),
        **problems(404),
    },
    summary="Export documents",
    operation_id="exportDocuments",
)
async def export_documents(
    library: LibraryName,
    request: Request[Any, Any, Any],
    engine: Engine,
    settings: Config,
    embeddings: Embeddings = True,
    condition: ExportFilter = None,
) -> Stream:
    """Export documents as they are at one moment, oldest first, each in a line, as an import takes them."""
    lines = _lines(engine, access.again(request), library, _filter(condition, settings), embeddings)
    first = await anext(lines)  # what is wrong with the request is a problem and no stream that breaks off

    async def answer() -> AsyncIterator[bytes]:
        yield first
        async for piece in lines:
            yield piece

    return Stream(answer(), media_type=NDJSON)


def _filter(text: str | None, settings: Settings) -> Any:
    if text is None:
        return None
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise invalid("filter", f"is not an object in JSON: {error}") from None
    return filters.parameter(value, settings)


# How many exports each engine has open: clients that do not read must not take all connections from the others.
_open: WeakKeyDictionary[sqlalchemy.Engine, int] = WeakKeyDictionary()


@asynccontextmanager
async def _one_of_half(engine: sqlalchemy.Engine) -> AsyncIterator[None]:
    pool, now = engine.pool, _open.get(engine, 0)
    if isinstance(pool, QueuePool) and now >= max(1, pool.size() // 2):
        raise Problem("pool_exhausted", f"Exports use {now} connections already, half of this process's. Try later.")
    _open[engine] = now + 1
    try:
        yield
    finally:
        _open[engine] -= 1


async def _lines(
    engine: sqlalchemy.Engine, again: access.Again, library: str, condition: Any, embeddings: bool
) -> AsyncIterator[bytes]:
    """The export in pieces, while its key lasts; a slow client is waited for, as long as a transaction may idle."""
    async with _one_of_half(engine), database.transaction(engine, snapshot=True) as connection:
        await database.rows(connection, "select pgshelf.open_export(%s, %s, %s)", library, condition, embeddings)
        asked = time.monotonic()
        begun, inside = False, False  # whether there is a line before, and whether it has a chunk
        while rows := await database.rows(connection, FETCH):
            pieces = []
            for document, chunk in rows:
                if document is not None:
                    pieces.append("]}\n" + document if begun else document)
                    begun, inside = True, False
                if chunk is not None:
                    pieces.append("," + chunk if inside else chunk)
                    inside = True
            if time.monotonic() - asked > AGAIN:
                await again(library)
                asked = time.monotonic()
            yield "".join(pieces).encode()
        yield b"]}\n" if begun else b""


router = Router("/", route_handlers=[export_documents], tags=["documents"])
