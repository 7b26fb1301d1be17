"""Trying again what was given up: failed embeddings, by a client who knows that the reason is gone."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Router, post
from litestar.params import JSONBody
from msgspec import Meta

from pgshelf import database, filters
from pgshelf.connections import Connection
from pgshelf.http import Answer, Config, LibraryName, problems
from pgshelf.idempotency import Write
from pgshelf.search_forms import Filter


class RetryEmbeddings(msgspec.Struct, forbid_unknown_fields=True):
    """Which of the failed chunks to try again; all of them if there is no filter."""

    filter: Filter = None


class Retried(msgspec.Struct):
    """How many chunks are pending again."""

    retried: Annotated[int, Meta(description="Chunks that had failed and are tried again now.")]


@post(
    "/libraries/{library:str}/embeddings/retry",
    status_code=200,
    responses=problems(404, 409, 413, 415),
    response_description="Done",
    summary="Try failed embeddings again",
    operation_id="retryEmbeddings",
)
async def retry_embeddings(
    library: LibraryName, once: Write, settings: Config, data: JSONBody[RetryEmbeddings | None] = None
) -> Answer[Retried]:
    """Let the worker try again the chunks that it gave up, of all documents or of those that match a filter."""
    condition = filters.parameter(data.filter if data else None, settings)

    async def change(connection: Connection) -> Answer[Retried]:
        rows = await database.rows(connection, "select pgshelf.retry_embeddings(%s, %s)", library, condition)
        once.note(count=rows[0][0])
        return Answer(Retried(rows[0][0]), status_code=200)

    return await once.run(change, single=True)


router = Router("/", route_handlers=[retry_embeddings], tags=["documents"])
