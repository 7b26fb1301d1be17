"""Is the process alive, can it serve, and what do its problems mean."""

from __future__ import annotations

import functools
from typing import Annotated, Any, Literal

import msgspec
import psycopg
from litestar import Request, Response, Router, get
from msgspec import Meta

from pgshelf import __version__, database, schema
from pgshelf.errors import Problem
from pgshelf.http import Config, Reader, problems
from pgshelf.settings import Settings

INSTALLED = """
select (select version_num from pgshelf.alembic_version), (select sql_hash from pgshelf.installation),
  (select extversion from pg_catalog.pg_extension where extname = 'vector')
"""


# Only a standby says something: how far it is behind is what decides whether it may serve.
BEHIND = """
select s.lag_bytes, s.lag_seconds, s.health from pgshelf.replication(%s, %s) s
where pg_catalog.pg_is_in_recovery() and s.role = 'standby'
"""


class Health(msgspec.Struct):
    """The process runs."""

    status: Annotated[Literal["ok"], Meta(description="It answers, so it is.")]
    version: Annotated[str, Meta(description="The version of pgshelf.")]


class Checks(msgspec.Struct):
    """What was looked at."""

    database: Annotated[Literal["ok"], Meta(description="It answers.")]
    schema: Annotated[str, Meta(description="The revision of the schema pgshelf.")]
    pgvector: Annotated[str, Meta(description="The version of the extension vector.")]


class Ready(msgspec.Struct):
    """The service can serve."""

    status: Annotated[Literal["ready"], Meta(description="Anything else is a 503.")]
    checks: Annotated[Checks, Meta(description="What was looked at.")]


@functools.cache
def expected() -> tuple[str, str]:
    """The revision and the fingerprint of sql/ that this code was made for."""
    return schema.head(), schema.sql_hash()


async def check(reader: database.Source, settings: Settings) -> Checks:
    """Raise what keeps this process from serving."""
    try:
        revision, sql_hash, pgvector = (await database.run(reader, INSTALLED))[0]
    except psycopg.errors.UndefinedTable:
        raise Problem("not_ready", "The schema pgshelf is missing: run `pgshelf migrate`.") from None
    if (revision, sql_hash) != expected():
        detail = f"The schema is at revision {revision}, this code wants {expected()[0]}: run `pgshelf migrate`."
        if revision == expected()[0]:
            detail = "The functions in the database are those of another version: run `pgshelf migrate`."
        raise Problem("not_ready", detail)
    if pgvector is None:
        raise Problem("not_ready", "The extension pgvector is missing: a DBA runs create extension vector.")
    await _check_standby(reader, settings)
    return Checks("ok", revision, pgvector)


async def _check_standby(reader: database.Source, settings: Settings) -> None:
    """A standby that is too far behind takes itself out of rotation."""
    limits = (settings.replication_lag_bytes, settings.replication_lag_seconds)
    for lag_bytes, lag_seconds, condition in await database.run(reader, BEHIND, *limits):
        # one that is cut off serves until it may be too old; a limit of 0 is none
        old = condition == "disconnected" and (lag_seconds or 0) > (limits[1] or float("inf"))
        if old or condition == "lagging":
            behind = f"{lag_bytes} bytes of WAL" + ("" if lag_seconds is None else f" and {lag_seconds:.1f} seconds")
            detail = f"The database is a standby that is {behind} behind, more than PGSHELF_REPLICATION_LAG_* allow."
            raise Problem("not_ready", detail)


@get("/health", response_description="Alive", summary="Is the process alive", operation_id="health")
async def health() -> Health:
    """Answer without looking at anything else."""
    return Health("ok", __version__)


@get(
    "/ready",
    responses=problems(503),
    response_description="It can",
    summary="Can the service serve",
    operation_id="ready",
)
async def ready(reader: Reader, settings: Config) -> Ready:
    """Ask the database; 503 says what is missing."""
    return Ready("ready", await check(reader, settings))


# not in the OpenAPI document, which lists the codes: it is what the `type` of a problem leads to
@get("/errors", media_type="text/markdown", include_in_schema=False, operation_id="errors")
async def errors(request: Request[Any, Any, Any]) -> Response[str]:
    """What each problem means, when it happens and what to do: docs/errors.md of this version, for browsers as HTML."""
    wanted = "text/html" if "text/html" in request.headers.get("accept", "").lower() else "text/markdown"
    return Response(_errors_page(wanted), media_type=wanted, headers={"Vary": "Accept"})


@functools.cache
def _errors_page(wanted: str) -> str:
    text = (schema.resource("docs") / "errors.md").read_text(encoding="utf-8")
    if wanted != "text/html":
        return text
    from pgshelf import errors_page  # few ask, and what it brings need not be there at the start

    return errors_page.page(text)


router = Router("/", route_handlers=[health, ready, errors], tags=["health"])
