"""What goes into the audit log: a row with each write, in its transaction; refused attempts, some at a time."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Any
from uuid import UUID

import msgspec
import sqlalchemy
from psycopg.types.json import Jsonb

from pgshelf import database
from pgshelf.connections import Connection

log = logging.getLogger("pgshelf.audit")

# What each operation that changes something is called in the log. docs/security.md lists all actions.
OPERATIONS = {
    "createLibrary": "library.create",
    "updateLibrary": "library.update",
    "deleteLibrary": "library.delete",
    "putIndex": "index.change",
    "putEmbedder": "embedder.change",
    "cancelEmbedder": "embedder.cancel",
    "addDocument": "document.write",
    "putDocument": "document.write",
    "addDocuments": "document.write",
    "importDocuments": "document.import",
    "addEvent": "document.write",
    "updateDocument": "document.update",
    "updateDocuments": "document.update",
    "deleteDocument": "document.delete",
    "deleteDocuments": "document.delete",
    "updateChunk": "chunk.update",
    "deleteChunk": "chunk.delete",
    "retryEmbeddings": "embedding.retry",
    "clearCache": "cache.clear",
    "startBackup": "backup.start",
    "createKey": "key.create",
    "rotateKey": "key.rotate",
    "revokeKey": "key.revoke",
    "createToken": "token.create",
}
# Besides: what SQL writes itself, and what was refused of operations that change nothing.
ACTIONS = {*OPERATIONS.values(), "grant.create", "grant.revoke", "access"}

ADD = "select pgshelf.audit(%s, 'done', %s, %s, %s, %s, %s, %s, %s, %s)"
ADD_REFUSED = """
select count(pgshelf.audit(x.action, 'refused', x.kind, x.principal, x.principal_id, x.library, null, x.request_id, x.count, x.detail)::text)
from jsonb_to_recordset(%s) x(action text, kind text, principal text, principal_id uuid, library text, request_id text, count bigint, detail text)
"""  # noqa: E501 - one line for each part
PAUSE = 5.0  # seconds for which refused attempts are put together
LONGEST = 600  # characters of a name; those that may exist are shorter
MOST = 20  # different ones of that time that get a row of their own


class Entry(msgspec.Struct):
    """A row of the log before it is written: who does what to which library, in which request."""

    action: str
    kind: str
    principal: str
    principal_id: UUID | None
    library: str | None = None
    document: str | None = None
    request_id: str | None = None
    count: int = 1
    detail: str | None = None

    def __post_init__(self) -> None:
        """Whatever a client calls things, a row can hold it."""
        self.principal = _storable(self.principal)
        self.library, self.document, self.detail = (
            None if text is None else _storable(text) for text in (self.library, self.document, self.detail)
        )


def _storable(text: str) -> str:
    return text[:LONGEST].replace("\x00", "\ufffd").encode(errors="replace").decode()


def beside(entry: Entry, statement: str, document: str) -> tuple[str, list[Any]]:
    """A statement that adds a row, too, and the parameters behind its own; `document` is SQL over its rows, w."""
    parameters = [value for name, value in msgspec.structs.asdict(entry).items() if name != "document"]
    both = f"""with w as materialized ({statement}),
      a as materialized (select pgshelf.audit(%s, 'done', %s, %s, %s, %s, {document}, %s, %s, %s))
      select w.* from w, a"""  # noqa: S608 - put together from constants
    return both, parameters


async def add(connection: Connection, entry: Entry) -> None:
    """Write a row in the transaction of what it tells of."""
    await database.rows(connection, ADD, *msgspec.structs.astuple(entry))


class Refusals:
    """Attempts that were refused: alike ones are counted, and written a few seconds later.

    Whatever is sent, a process writes `MOST` rows and one for all others in `PAUSE` seconds. What it holds is lost when
    it is killed, or when the database does not take it.
    """

    def __init__(self, engine: sqlalchemy.Engine) -> None:
        self._engine = engine
        self._seen: dict[tuple[Any, ...], Entry] = {}
        self._writing: asyncio.Task[None] | None = None

    def note(self, entry: Entry) -> None:
        """Count an attempt; nobody waits for its row."""
        key: tuple[Any, ...] = (
            entry.action,
            entry.kind,
            entry.principal,
            entry.principal_id,
            entry.library,
            entry.detail,
        )
        if key not in self._seen and len(self._seen) >= MOST:
            key, entry = (), Entry("access", "anybody", "", None, detail="others")
        if (known := self._seen.get(key)) is not None:
            known.count += 1
        else:
            self._seen[key] = entry
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_soon(), context=contextvars.Context())

    async def close(self) -> None:
        """Write what is there."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        await self._write()

    async def _write_soon(self) -> None:
        await asyncio.sleep(PAUSE)
        await self._write()

    async def _write(self) -> None:
        found, self._seen = self._seen, {}
        if not found:
            return
        rows = Jsonb(msgspec.to_builtins(list(found.values())))
        try:
            await database.run(self._engine, ADD_REFUSED, rows)
        except Exception as error:
            log.warning("%d refused attempts were not recorded: %s", len(found), error)
