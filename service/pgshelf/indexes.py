"""The index of a library: what is wanted, what searches use, how far the way from one to the other is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from litestar import Router, get, put
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from msgspec import Meta
from psycopg.types.json import Jsonb

from pgshelf import database
from pgshelf.connections import Connection
from pgshelf.http import Answer, Config, Engine, LibraryName, problems
from pgshelf.idempotency import Write
from pgshelf.index_choice import IndexChoice


class IndexEstimate(msgspec.Struct):
    """What building the wanted index takes, over the vectors that are there now. Not a promise."""

    rows: Annotated[int, Meta(description="Chunks of the library.")]
    bytes: Annotated[int, Meta(description="On disk.")]
    memory_bytes: Annotated[
        int,
        Meta(
            description="While it is built; a build gets PGSHELF_INDEX_MEMORY_BYTES at most, and is slower with less."
        ),
    ]
    seconds: Annotated[float, Meta(description="About how long the build takes.")]


class Index(msgspec.Struct):
    """The index of a library."""

    wanted: Annotated[dict[str, Any], Meta(description="What was asked for.")]
    actual: Annotated[
        dict[str, Any], Meta(description="What searches use now; `rows` is how many vectors it was built over.")
    ]
    state: Annotated[
        Literal["ready", "waiting", "building", "failed"],
        Meta(
            description="`ready`; `waiting` for enough vectors, searched exactly; `building`: on the way, searches use "
            "`actual` meanwhile; `failed`: tried again by itself, with growing pauses."
        ),
    ]
    progress: Annotated[float, Meta(description="How far it is, from 0 to 1.")]
    phase: Annotated[str | None, Meta(description="What is being done just now, in PostgreSQL's words; null at rest.")]
    error: Annotated[str | None, Meta(description="Why the last attempt failed.")]
    shelf: Annotated[int, Meta(description="The number of the table that holds its chunks; 0 is shared.")]
    moving: Annotated[bool, Meta(description="Whether it is moving to another table.")]
    estimate: Annotated[IndexEstimate, Meta(description="What building the wanted index takes.")]


STATUS = """
select i.wanted, i.actual, i.state, i.progress, i.phase, i.error, i.shelf, i.moving, r.rows, e.bytes, e.memory_bytes, e.seconds
from (select pgshelf.library_named(%s) as l) x
cross join lateral pgshelf.library_index((l).id) i
cross join lateral (select coalesce(i.rows, pgshelf.count_rows(l)) as rows) r
cross join lateral pgshelf.index_estimate(pgshelf.index_in_full(l), r.rows, (l).dimension, %s) e
"""  # noqa: E501 - one line for each part


def _index(found: tuple[Any, ...]) -> Index:
    wanted, actual, state, progress, phase, error, shelf, moving, *estimate = found
    return Index(wanted, actual, state, progress, phase, error, shelf, moving, IndexEstimate(*estimate))


@get(
    "/libraries/{library:str}/index",
    responses=problems(404),
    response_description="The index",
    summary="Get the index of a library",
    operation_id="getIndex",
)
async def get_index(library: LibraryName, engine: Engine, settings: Config) -> Index:
    """Tell which index is wanted, which one searches use, and how far the work is."""
    return _index((await database.run(engine, STATUS, library, settings.index_memory_bytes))[0])


@put(
    "/libraries/{library:str}/index",
    responses={202: ResponseSpec(Index, generate_examples=False, description="Accepted")}
    | problems(404, 409, 413, 415, 422),
    response_description="It is so already",
    summary="Change the index of a library",
    operation_id="putIndex",
)
async def put_index(library: LibraryName, data: JSONBody[IndexChoice], once: Write, settings: Config) -> Answer[Index]:
    """Ask for an index. It is built in the background; searches and writes go on, with the old one until it is ready.

    Asking once more for what has failed tries again at once.
    """

    async def want(connection: Connection) -> Answer[Index]:
        ask = "select pgshelf.want_index(%s, %s, %s)"
        asked = await database.rows(connection, ask, library, Jsonb(data.wanted()), settings.promote_at)
        found = await database.rows(connection, STATUS, library, settings.index_memory_bytes)
        once.note(count=int(asked[0][0]))
        return Answer(_index(found[0]), status_code=202 if asked[0][0] else 200)

    return await once.run(want)


router = Router("/", route_handlers=[get_index, put_index], tags=["indexes"])
