"""Searching over REST: one library, several searches at once, several libraries at once."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import msgspec
from litestar import Request, Router, post
from litestar.di import NamedDependency
from litestar.params import HeaderParameter, JSONBody, SkipValidation
from msgspec import UNSET, Meta, UnsetType

from pgshelf import access, database
from pgshelf.embedding import asked_again
from pgshelf.errors import Problem, invalid, problem_of
from pgshelf.http import Config, LibraryName, Reader, problems
from pgshelf.query_cache import QueryCache, States
from pgshelf.search_forms import Hit, Ranking, SearchAnswer, SearchRequest, check
from pgshelf.searching import ask, call, hit, milliseconds, reranked, search, searched, widened
from pgshelf.settings import Settings

DEEPEST = 10_000  # how far down each of several libraries is looked for what may be among the best of all
AT_ONCE = 4  # searches of a batch that run beside each other; each takes a connection of the pool
KNOWN = """select l.id, l.name, l.metric, pgshelf.search_state(case when %s then u.name end)
from unnest(%s::text[]) with ordinality u(name, place), pgshelf.library_named(u.name) l order by u.place"""
STATES = """select array(select pgshelf.search_state(u.name)
  from unnest(%s::text[]) with ordinality u(name, place) order by u.place)"""
Cache = NamedDependency[SkipValidation[QueryCache]]
CacheControl = Annotated[
    str | None,
    HeaderParameter(
        name="Cache-Control",
        max_length=200,
        description="`no-cache`: search anew, whatever is in the query cache. `no-store`: keep nothing of it, either.",
    ),
]
PROBLEMS = problems(404, 413, 415, 422, 502)


class Batch(msgspec.Struct, forbid_unknown_fields=True):
    """Several searches of one library."""

    searches: Annotated[
        Annotated[list[SearchRequest], Meta(min_length=1)],
        Meta(description="At most PGSHELF_MAX_BATCH (100) of them."),
    ]


class BatchProblem(msgspec.Struct):
    """Why one search of a batch failed; the others are not affected."""

    status: Annotated[int, Meta(description="The status that it would have had alone.")]
    code: Annotated[str, Meta(description="The stable code of the problem.")]
    detail: Annotated[str, Meta(description="What to do.")]


class BatchResult(msgspec.Struct):
    """The answer to one search of a batch: `answer` or `error`."""

    answer: Annotated[SearchAnswer | UnsetType, Meta(description="What was found.")] = UNSET
    error: Annotated[BatchProblem | UnsetType, Meta(description="Why it failed.")] = UNSET


class BatchAnswer(msgspec.Struct):
    """One result for each search, in their order."""

    results: Annotated[list[BatchResult], Meta(description="In the order of the searches.")]
    took_ms: Annotated[float, Meta(description="Milliseconds in the server.")]


class LibrariesRequest(Ranking, forbid_unknown_fields=True, kw_only=True):
    """A search of several libraries, with `query` or `vector`; hits compete by their scores."""

    libraries: Annotated[
        Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=100)],
        Meta(description="Names or ids. Where vectors count, all must have the same metric."),
    ]
    offset: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(description=f"How many hits to skip; PGSHELF_MAX_OFFSET is the limit, and {DEEPEST} of k + offset."),
    ] = 0


class LibrariesAnswer(msgspec.Struct):
    """What was found; each hit names its library."""

    hits: Annotated[list[Hit], Meta(description="Best first, whatever library they are in.")]
    took_ms: Annotated[float, Meta(description="Milliseconds in the server.")]
    cached: Annotated[
        bool, Meta(description="Whether this is the answer to an equal search before; nothing has changed since then.")
    ] = False


@post(
    "/libraries/{library:str}/search",
    status_code=200,
    responses=PROBLEMS,
    response_description="The hits, maybe none",
    summary="Search a library",
    operation_id="search",
)
async def search_library(
    library: LibraryName,
    data: JSONBody[SearchRequest],
    reader: Reader,
    settings: Config,
    cache: Cache,
    cache_control: CacheControl = None,
) -> SearchAnswer:
    """Find chunks by meaning, by words, or by both, among those that match a filter."""
    return await search(reader, settings, cache, library, data, cache_control)


@post(
    "/libraries/{library:str}/search/batch",
    status_code=200,
    responses=PROBLEMS,
    response_description="One result for each search",
    summary="Search a library several times",
    operation_id="searchBatch",
)
async def search_batch(
    library: LibraryName,
    data: JSONBody[Batch],
    reader: Reader,
    settings: Config,
    cache: Cache,
    cache_control: CacheControl = None,
) -> BatchAnswer:
    """Carry out several searches; one that fails spoils no other."""
    started = time.perf_counter()
    if len(data.searches) > settings.max_batch:
        raise invalid("searches", f"has {len(data.searches)} searches, at most {settings.max_batch} are allowed")
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(request: SearchRequest) -> BatchResult:
        async with turn:
            try:
                return BatchResult(answer=await search(reader, settings, cache, library, request, cache_control))
            except Exception as error:
                problem = problem_of(error)
                if problem.code in ("library_not_found", "internal_error"):  # of the request as a whole
                    raise
                return BatchResult(error=BatchProblem(problem.status, problem.code, problem.detail))

    results = await asyncio.gather(*(one(request) for request in data.searches))
    return BatchAnswer(list(results), milliseconds(started))


@post(
    "/search",
    status_code=200,
    responses=PROBLEMS,
    response_description="The hits, maybe none",
    summary="Search several libraries",
    operation_id="searchLibraries",
)
async def search_libraries(
    data: JSONBody[LibrariesRequest],
    request: Request[Any, Any, Any],
    reader: Reader,
    settings: Config,
    cache: Cache,
    cache_control: CacheControl = None,
) -> LibrariesAnswer:
    """Search several libraries in one statement; each embeds the query with its own embedder."""
    started = time.perf_counter()
    check(data, settings)
    if data.query is None and data.vector is None:
        raise invalid("query", "give query or vector")
    if data.k + data.offset > DEEPEST:
        raise invalid(
            "offset",
            f"k + offset is {data.k + data.offset}, at most {DEEPEST} is allowed over several libraries; "
            "narrow the search, or search them one by one",
        )
    wide = widened(data, settings)
    names = list(dict.fromkeys(access.judged(request.scope) or data.libraries))

    async def find() -> tuple[LibrariesAnswer, States | None]:
        hits, states = await asked_again(lambda: _several(reader, settings, names, wide))
        if data.rerank is not None:
            hits = await reranked(database.primary(reader), settings, data, hits)
        return LibrariesAnswer(hits, 0.0), states

    answer = await cache.answer(names, data, cache_control, find, LibrariesAnswer)
    answer.took_ms = milliseconds(started)
    return answer


async def _several(
    reader: database.Source, settings: Settings, names: list[str], data: LibrariesRequest
) -> tuple[list[Hit], States | None]:
    """The hits, and the states that the libraries were in all the time that they were looked at."""
    asked = await database.run(reader, KNOWN, settings.cache_bytes > 0, names)
    known = list({row[0]: row[:3] for row in asked}.values())
    shared = {field: getattr(data, field) for field in Ranking.__struct_fields__}
    questions = await asyncio.gather(*(ask(reader, settings, str(row[0]), SearchRequest(**shared)) for row in known))
    modes = {question.mode for question in questions}
    if len(modes) > 1:
        raise Problem(
            "libraries_differ",
            "Some of the libraries have no embedder; name the mode: text searches them all by words.",
        )
    if modes != {"text"} and len({row[2] for row in known}) > 1:
        metrics = ", ".join(f"{row[1]}: {row[2]}" for row in known)
        raise Problem(
            "libraries_differ", f"Scores of different metrics cannot be compared ({metrics}). Search them one by one."
        )
    every = msgspec.structs.replace(data, k=data.k + data.offset, offset=0)
    statements, parameters = [], list[Any]()
    for (library, name, _), question in zip(known, questions, strict=True):
        statement, given = call(str(library), every, question)
        statements.append(f"(select h.*, %s::text as library from {statement} h)")  # noqa: S608 - constants
        parameters += [name, *given]
    # whichever way its libraries are found, each snapshot must say the same of them
    merged = f"""select x.*, s.states from ({STATES}) s(states) left join
      (select * from ({" union all ".join(statements)}) y order by y.score desc, y.chunk_id limit %s offset %s) x
      on true order by x.score desc, x.chunk_id"""  # noqa: S608 - put together from constants
    rows = await database.run(reader, merged, names if settings.cache_bytes else [], *parameters, data.k, data.offset)
    states: States = rows[0][-1]
    rows = [row for row in rows if row[0] is not None]
    searched(questions[0].mode, data.filter is not None, data.k, "several")  # libraries, each in its own way
    found = [hit(row, data.include) for row in rows]
    for item, row in zip(found, rows, strict=True):
        item.library = row[-2]
    before = {row[0]: row[3] for row in asked}
    same = [row[3] for row in asked] == states and all(
        question.state in (None, before[library]) for (library, *_), question in zip(known, questions, strict=True)
    )
    return found, states if same else None


router = Router("/", route_handlers=[search_library, search_batch, search_libraries], tags=["search"])
