"""The embedder of a library: the one that is used, the one that is wanted, how far the way from one to the other is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from litestar import Router, delete, get, put
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from msgspec import Meta
from psycopg.types.json import Jsonb

from pgshelf import database
from pgshelf.connections import Connection
from pgshelf.embedder_choice import EmbedderChoice, EmbedderUsed, chosen
from pgshelf.embedding import library_config
from pgshelf.errors import Problem
from pgshelf.http import Answer, Config, Engine, LibraryName, problems
from pgshelf.idempotency import Write


class EmbedderState(msgspec.Struct):
    """The embedder of a library, and the one that it is to have."""

    embedder: Annotated[EmbedderUsed, Meta(description="Who makes the vectors that searches use now.")]
    wanted: Annotated[EmbedderUsed | None, Meta(description="Who shall make them; null where nobody else is wanted.")]
    state: Annotated[
        Literal["ready", "embedding", "switching", "failed"],
        Meta(
            description="`ready`; `embedding`: vectors of the wanted one are made, searches use those of the other; "
            "`switching`: they are all there, and get their place and index; `failed`: tried again by itself, with "
            "growing pauses."
        ),
    ]
    progress: Annotated[float, Meta(description="How far it is, from 0 to 1.")]
    embedded: Annotated[int, Meta(description="Chunks whose text has a vector of the wanted one, about.")]
    total: Annotated[int, Meta(description="Chunks of the library, about.")]
    error: Annotated[str | None, Meta(description="Why the last attempt failed.")]


NO_WAY_TO_NONE = (
    "With the embedder none nobody would make the vectors that take the place of those in use. Create another library "
    "with it and write the documents there, with their vectors."
)
STATUS = "select e.* from pgshelf.library_named(%s) l, pgshelf.library_embedder(l.id) e"


def _state(found: tuple[Any, ...]) -> EmbedderState:
    return msgspec.convert(dict(zip(EmbedderState.__struct_fields__, found, strict=True)), EmbedderState)


@get(
    "/libraries/{library:str}/embedder",
    responses=problems(404),
    response_description="The embedder",
    summary="Get the embedder of a library",
    operation_id="getEmbedder",
)
async def get_embedder(library: LibraryName, engine: Engine) -> EmbedderState:
    """Tell which embedder searches use, which one is wanted, and how far the work is."""
    return _state((await database.run(engine, STATUS, library))[0])


@put(
    "/libraries/{library:str}/embedder",
    responses={202: ResponseSpec(EmbedderState, generate_examples=False, description="Accepted")}
    | problems(404, 409, 413, 415, 422, 502),
    response_description="It is so already",
    summary="Change the embedder of a library",
    operation_id="putEmbedder",
)
async def put_embedder(
    library: LibraryName, data: JSONBody[EmbedderChoice], engine: Engine, once: Write, settings: Config
) -> Answer[EmbedderState]:
    """Ask for another embedder: another provider, model or dimension. The metric stays.

    All texts are embedded anew in the background, and what is written meanwhile too. Searches use the vectors of the
    old one until the last is there; then all change at once. Vectors that clients brought are replaced by those of
    their texts. Asking for the one in use calls a change off; asking once more for what has failed tries again at once.
    """
    wanted = await chosen(settings, data)
    used = (await library_config(engine, library)).embedder
    if wanted["provider"] == "none" and wanted != used:
        raise Problem("no_embedder", NO_WAY_TO_NONE)

    async def want(connection: Connection) -> Answer[EmbedderState]:
        asked = await database.rows(connection, "select pgshelf.want_embedder(%s, %s)", library, Jsonb(wanted))
        state = _state((await database.rows(connection, STATUS, library))[0])
        return Answer(state, status_code=202 if asked[0][0] else 200)

    return await once.run(want)


@delete(
    "/libraries/{library:str}/embedder",
    status_code=200,
    responses=problems(404, 409),
    response_description="The embedder that the library keeps",
    summary="Call off a change of the embedder",
    operation_id="cancelEmbedder",
)
async def cancel_embedder(library: LibraryName, once: Write) -> Answer[EmbedderState]:
    """Call off a change of the embedder: the library keeps the one in use, which may be the new one already."""

    async def cancel(connection: Connection) -> Answer[EmbedderState]:
        cancelled = await database.rows(connection, "select pgshelf.cancel_embedder(%s)", library)
        once.note(count=int(cancelled[0][0]))
        return Answer(_state((await database.rows(connection, STATUS, library))[0]), status_code=200)

    return await once.run(cancel)


router = Router("/", route_handlers=[get_embedder, put_embedder, cancel_embedder], tags=["embedders"])
