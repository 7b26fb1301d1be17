"""Writes that may be sent twice: the same Idempotency-Key and the same request get the answer that is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
import psycopg
import sqlalchemy
from litestar import Request
from litestar.di import NamedDependency
from litestar.params import HeaderParameter, SkipValidation
from litestar.serialization import default_serializer
from psycopg.types.json import Jsonb

from pgshelf import auditing, database
from pgshelf.access import Caller, Principal
from pgshelf.connections import Connection
from pgshelf.errors import Problem
from pgshelf.http import Answer, Config, Engine

REPLAYED = "Idempotent-Replayed"
Key = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[!-~]+$",
        description="A name of your choice for this very request, such as a UUID. Sent again with the same key, the "
        "request is not carried out again: it gets the first answer, marked `Idempotent-Replayed: true`.",
    ),
]
Work = Callable[[Connection], Awaitable[Answer[Any]]]
# Whoever comes second waits here until the first has committed and left its answer, or has failed.
CLAIM = """
insert into pgshelf.idempotency_keys as k (scope, key, request) values (%s, %s, %s)
on conflict on constraint idempotency_keys_pkey do update set key = excluded.key
returning k.request, k.status, k.headers, k.body
"""
KEPT = "select request, status, headers, body from pgshelf.idempotency_keys where scope = %s and key = %s"
KEEP = "update pgshelf.idempotency_keys set status = %s, headers = %s, body = %s where scope = %s and key = %s"


class Once:
    """Carries out a request's write, and that once for its Idempotency-Key, if it has one.

    The answer is stored in the write's own transaction: both are there, or neither. What fails is not stored, for
    nothing was written, so the same key may try again.
    """

    def __init__(
        self,
        engine: sqlalchemy.Engine,
        owner: str,
        key: str | None,
        request: bytes,
        entry: auditing.Entry | None = None,
    ) -> None:
        self.engine, self.owner, self.key, self.request, self.entry = engine, owner, key, request, entry

    def note(self, **facts: Any) -> None:
        """What the audit log shall say that the request does not: `count` (0: nothing was done), `library` ..."""
        if self.entry is not None:
            self.entry = msgspec.structs.replace(self.entry, **facts)

    async def record(self, connection: Connection) -> None:
        """Write into the audit log what the transaction of `connection` has done."""
        if self.entry is not None and self.entry.count:
            await auditing.add(connection, self.entry)

    def recording(self, statement: str, document: str = "null", **facts: Any) -> tuple[str, list[Any]]:
        """A statement that writes its row of the audit log, too, and the parameters that this adds.

        Its own rows are `w` in `document`, the SQL that names what was written.
        """
        self.note(**facts)
        return (statement, []) if self.entry is None else auditing.beside(self.entry, statement, document)

    async def run(self, work: Work, *, single: bool = False, recording: bool = False) -> Answer[Any]:
        """Do `work` in a transaction, or answer what it answered before; `single` as in `database.transaction`.

        Work that is `recording` writes its row of the audit log itself.
        """

        async def recorded(connection: Connection) -> Answer[Any]:
            answer = await work(connection)
            if not recording:
                await self.record(connection)
            return answer

        if self.key is None:
            single = single and (recording or self.entry is None)
            return await database.retried(self.engine, recorded, single=single, written=True)

        async def claimed(connection: Connection) -> Answer[Any]:
            try:
                found = (await database.rows(connection, CLAIM, self.owner, self.key, self.request))[0]
            except psycopg.errors.LockNotAvailable:
                detail = "The first request of this key is still being carried out. Try again shortly."
                raise Problem("idempotency_key_in_use", detail) from None
            if found[1] is not None:
                return self._answer(found)
            answer = await recorded(connection)
            body = None if answer.content is None else msgspec.json.encode(answer.content, enc_hook=default_serializer)
            kept = (answer.status_code, Jsonb(dict(answer.headers)), body)
            await database.rows(connection, KEEP, *kept, self.owner, self.key)
            return answer

        return await database.retried(self.engine, claimed, written=True)

    async def replayed(self) -> Answer[Any] | None:
        """The stored answer, if there is one: for writes that would prepare at length what was done already."""
        found = None if self.key is None else await database.run(self.engine, KEPT, self.owner, self.key)
        if not found:
            return None
        await database.note_position(self.engine)
        return self._answer(found[0])

    def _answer(self, kept: tuple[Any, ...]) -> Answer[Any]:
        request, status, headers, body = kept
        if bytes(request) != self.request:
            detail = "The key came with another request before. A key names one request: take a new one for this."
            raise Problem("idempotency_key_reused", detail)
        content = None if body is None else msgspec.Raw(body)
        return Answer(content, status_code=status, headers=headers | {REPLAYED: "true"})


async def once(
    engine: Engine, settings: Config, request: Request[Any, Any, Any], principal: Caller, idempotency_key: Key = None
) -> Once:
    """The dependency `once` of a handler that writes."""
    digest = hashlib.sha256()
    if idempotency_key is not None:
        scope = request.scope
        target = (request.method, scope["path"], scope["query_string"], request.headers.get("if-match", ""))
        digest.update(msgspec.msgpack.encode(target))
        digest.update(await request.body())
    entry = _entry(request, principal) if settings.audit else None
    return Once(engine, principal.owner, idempotency_key, digest.digest(), entry)


def audited(engine: Engine, settings: Config, request: Request[Any, Any, Any], principal: Caller) -> Once:
    """The dependency `audited` of a handler that writes and takes no Idempotency-Key."""
    return Once(engine, principal.owner, None, b"", _entry(request, principal) if settings.audit else None)


def _entry(request: Request[Any, Any, Any], principal: Principal) -> auditing.Entry:
    scope: Any = request.scope
    named = request.path_params
    return auditing.Entry(
        auditing.OPERATIONS[scope["route_handler"].operation_id],
        *(principal.kind, principal.name, principal.id),
        *(named.get("library"), named.get("document"), scope["pgshelf_request_id"]),
        detail=named.get("chunk") or named.get("key"),
    )


Write = NamedDependency[SkipValidation[Once]]
Audited = NamedDependency[SkipValidation[Once]]
