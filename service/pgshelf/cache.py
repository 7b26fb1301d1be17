"""The query cache over REST: how it does, and clearing it. What it keeps and why: query_cache.py."""

from __future__ import annotations

from typing import Annotated

import msgspec
from litestar import Router, delete, get
from litestar.di import NamedDependency
from litestar.params import QueryParameter, SkipValidation
from msgspec import Meta

from pgshelf import counts, database
from pgshelf.connections import Connection
from pgshelf.counts import Folder
from pgshelf.http import Answer, Config, problems
from pgshelf.idempotency import Write
from pgshelf.query_cache import QueryCache

Kept = NamedDependency[SkipValidation[QueryCache]]
Whose = Annotated[str | None, QueryParameter(description="Name or id of a library; if absent, all.")]


class CacheInfo(msgspec.Struct):
    """How the query cache does: of all processes of this service on its machine, since it started."""

    enabled: Annotated[bool, Meta(description="Whether answers are kept: unless PGSHELF_CACHE_BYTES is 0.")]
    max_bytes: Annotated[int, Meta(description="PGSHELF_CACHE_BYTES: what each process may keep.")]
    ttl: Annotated[float, Meta(description="PGSHELF_CACHE_TTL: seconds after which an answer goes in any case.")]
    entries: Annotated[int, Meta(description="Answers that are kept now.")]
    bytes: Annotated[int, Meta(description="Their size.")]
    hits: Annotated[int, Meta(description="Searches that were answered from it.")]
    misses: Annotated[int, Meta(description="Searches that were not, although they might have been.")]
    evictions: Annotated[
        int,
        Meta(description="Answers that went: for want of room, for age, for a change, or cleared."),
    ]


@get(
    "/cache",
    responses=problems(),
    response_description="How it does",
    summary="Look at the query cache",
    operation_id="getCache",
)
async def get_cache(settings: Config, metrics_folder: Folder) -> CacheInfo:
    """Count hits, misses and evictions; `/metrics` has them by their reasons."""
    found = counts.sums(metrics_folder, "pgshelf_query_cache")
    return CacheInfo(
        enabled=settings.cache_bytes > 0,
        max_bytes=settings.cache_bytes,
        ttl=settings.cache_ttl,
        entries=found("pgshelf_query_cache_entries"),
        bytes=found("pgshelf_query_cache_bytes"),
        hits=found("pgshelf_query_cache_lookups_total", outcome="hit"),
        misses=found("pgshelf_query_cache_lookups_total", outcome="miss"),
        evictions=found("pgshelf_query_cache_evictions_total"),
    )


@delete(
    "/cache",
    responses=problems(404, 409),
    response_description="Cleared",
    summary="Clear the query cache",
    operation_id="clearCache",
)
async def clear_cache(once: Write, cache: Kept, library: Whose = None) -> Answer[None]:
    """Forget what was found so far, in every process; each gives back the memory when it comes upon an answer."""
    once.note(library=library)

    async def clear(connection: Connection) -> Answer[None]:
        await database.rows(connection, "select pgshelf.forget_answers(%s)", library)
        return Answer(None, status_code=204)

    answer = await once.run(clear, single=True)
    cache.clear(library)
    return answer


router = Router("/", route_handlers=[get_cache, clear_cache], tags=["cache"])
