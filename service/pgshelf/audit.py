"""The audit log over REST."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

import msgspec
from litestar import Router, get
from litestar.params import QueryParameter
from msgspec import Meta
from sqlalchemy import or_, select, tuple_

from pgshelf import database
from pgshelf.auditing import ACTIONS
from pgshelf.errors import invalid
from pgshelf.http import After, Config, Engine, Limit, Page, as_id, cursor, page_size, position, problems
from pgshelf.tables import audit_log

Action = Annotated[str | None, QueryParameter(description="Only this action, such as `document.delete`.")]
OfLibrary = Annotated[
    str | None, QueryParameter(max_length=200, description="Only a library: its id, or what it was called then.")
]
Since = Annotated[datetime | None, QueryParameter(description="Only what happened at this time or later.")]
Outcome = Annotated[Literal["done", "refused"] | None, QueryParameter(description="Only what ended so.")]


class AuditEntry(msgspec.Struct):
    """Who did what to which library."""

    id: Annotated[UUID, Meta(description="Of the row.")]
    at: Annotated[datetime, Meta(description="When it was written, in the transaction of what it tells of.")]
    action: Annotated[str, Meta(description="What was done; docs/security.md lists all actions.")]
    outcome: Annotated[Literal["done", "refused"], Meta(description="What is done is there; what was refused is not.")]
    principal_kind: Annotated[
        str, Meta(description="`key`, `token`, `jwt`, `anybody`; `role`: of PostgreSQL, in SQL or on the command line.")
    ]
    principal: Annotated[str, Meta(description="What the key or role is called, the subject of a JWT.")]
    principal_id: Annotated[UUID | None, Meta(description="Of the key.")]
    library_id: Annotated[UUID | None, Meta(description="The library, if it was about one.")]
    library: Annotated[str | None, Meta(description="What it was called then.")]
    document: Annotated[str | None, Meta(description="The document, as the request named it, if it was about one.")]
    count: Annotated[int, Meta(description="How many documents; of refused attempts: how many, within some seconds.")]
    detail: Annotated[str | None, Meta(description="A chunk, a key; of a refused attempt the operation and why.")]
    request_id: Annotated[str | None, Meta(description="As in `X-Request-Id` and in log lines.")]


COLUMNS = [audit_log.c[name] for name in AuditEntry.__struct_fields__]


@get(
    "/audit",
    responses=problems(),
    response_description="A page of the log",
    summary="Read the audit log",
    operation_id="listAudit",
)
async def list_audit(
    engine: Engine,
    settings: Config,
    limit: Limit = None,
    after: After = None,
    action: Action = None,
    library: OfLibrary = None,
    since: Since = None,
    outcome: Outcome = None,
) -> Page[AuditEntry]:
    """List who did what, newest first."""
    size = page_size(limit, settings)
    moment, last = position(after)
    if action is not None and action not in ACTIONS:
        raise invalid("action", f"is none; actions are {', '.join(sorted(ACTIONS))}")
    if since is not None and since.tzinfo is None:
        raise invalid("since", "needs an offset, as in 2027-01-31T00:00:00Z")
    query = select(*COLUMNS)
    if action is not None:
        query = query.where(audit_log.c.action == action)
    if outcome is not None:
        query = query.where(audit_log.c.outcome == outcome)
    if library is not None:
        library_id = as_id(library)
        named = audit_log.c.library == library
        query = query.where(named if library_id is None else or_(named, audit_log.c.library_id == library_id))
    if since is not None:
        query = query.where(audit_log.c.at >= since)
    if moment is not None:
        query = query.where(tuple_(audit_log.c.at, audit_log.c.id) < (moment, last))
    async with database.transaction(engine) as connection:
        query = query.order_by(audit_log.c.at.desc(), audit_log.c.id.desc()).limit(size + 1)
        found = [AuditEntry(*row.values()) for row in await database.execute(connection, query)]
    more = found[size - 1] if len(found) > size else None
    return Page(found[:size], cursor(more.at, more.id) if more else None)


router = Router("/", route_handlers=[list_audit], tags=["audit"])
