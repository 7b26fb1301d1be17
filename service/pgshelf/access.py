"""Who may do what: who calls, and one table of all operations, of which `guard.py` reads what each asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal
from uuid import UUID

import msgspec
from litestar import Request
from litestar.di import NamedDependency
from litestar.params import SkipValidation
from sqlalchemy import ARRAY, ColumnElement, Text, cast, func

from pgshelf import http
from pgshelf.credentials import ROLES
from pgshelf.rates import Kind
from pgshelf.tables import libraries

# Where a request says which library it is about. `listed`: in the body's `libraries`. `named`: it is new, the body's
# `name` is what it will be called. `renamed`: in the path, and its new name in the body, if any. `none`: it is about
# none, or, as a list is, about all that its caller sees.
Place = Literal["none", "path", "listed", "named", "renamed"]


class Rule(msgspec.Struct, frozen=True):
    """What an operation asks of its caller; `public` when PGSHELF_PUBLIC_SEARCH opens it to everybody."""

    role: Literal["reader", "writer", "admin"] | None
    library: Place = "none"
    public: bool = False
    everything: bool = False  # for callers that see every library, whatever there may be
    counts: Kind | None = None  # as one of these, where its role does not say it
    stream: bool = False  # one that may be open for long

    @property
    def kind(self) -> Kind:
        """The class of requests whose quota it uses."""
        return self.counts or KINDS[self.role or "reader"]


KINDS: dict[str, Kind] = {"reader": "search", "writer": "write", "admin": "admin"}

OPEN, READ, WRITE, MANAGE = Rule(None), Rule("reader", "path"), Rule("writer", "path"), Rule("admin", "path")
SEARCH, KEYS = Rule("reader", "path", public=True), Rule("admin", everything=True)
EVERYTHING = KEYS  # the whole server, whatever its libraries

# By the operation's id. What is not in it is refused to everybody.
RULES: dict[str, Rule] = {
    "health": OPEN,
    "ready": OPEN,
    "errors": OPEN,
    "listLibraries": Rule("reader"),
    "createLibrary": Rule("admin", "named"),
    "getLibrary": READ,
    "updateLibrary": Rule("admin", "renamed"),
    "deleteLibrary": MANAGE,
    "libraryStats": READ,
    "getIndex": READ,
    "putIndex": MANAGE,
    "getEmbedder": READ,
    "putEmbedder": MANAGE,
    "cancelEmbedder": MANAGE,
    "addDocument": WRITE,
    "putDocument": WRITE,
    "listDocuments": READ,
    "getDocument": READ,
    "updateDocument": WRITE,
    "deleteDocument": WRITE,
    "queryDocuments": READ,
    "updateDocuments": WRITE,
    "deleteDocuments": WRITE,
    "listChunks": READ,
    "getChunk": READ,
    "updateChunk": WRITE,
    "deleteChunk": WRITE,
    "search": SEARCH,
    "searchBatch": SEARCH,
    "searchLibraries": Rule("reader", "listed", public=True),
    "facets": SEARCH,
    "addDocuments": WRITE,
    "importDocuments": Rule("writer", "path", counts="import", stream=True),
    "exportDocuments": Rule("reader", "path", counts="import", stream=True),
    "addEvent": WRITE,
    "retryEmbeddings": WRITE,
    "listChanges": Rule("reader", "path", stream=True),
    "metrics": Rule("reader", everything=True, counts="admin"),  # it names libraries
    "getCache": Rule("reader", everything=True, counts="admin"),
    "clearCache": Rule("admin", everything=True),
    "createKey": KEYS,
    "listKeys": KEYS,
    "getKey": KEYS,
    "revokeKey": KEYS,
    "rotateKey": KEYS,
    "createToken": Rule("reader", counts="write"),
    "listAudit": KEYS,
    "getReplication": EVERYTHING,
    "startBackup": EVERYTHING,
    "listBackups": EVERYTHING,
}


class Principal(msgspec.Struct, frozen=True):
    """Who calls. It sees what each of its scopes covers, as pgshelf.in_scope has it; all, when it has none."""

    kind: Literal["anybody", "key", "token", "jwt"]
    name: str
    role: str | None
    scopes: tuple[list[str], ...] = ()
    id: UUID | None = None
    hash: bytes | None = None  # of the secret that was sent

    @property
    def owner(self) -> str:
        """Whose idempotency keys it uses: those of a key and of its tokens are the same; nobody's are everybody's."""
        return "" if self.kind == "anybody" else f"jwt {self.name}" if self.kind == "jwt" else str(self.id)

    def may(self, role: str) -> bool:
        """Whether its role is this one or above."""
        return self.role is not None and ROLES.index(self.role) >= ROLES.index(role)

    def sees(self) -> list[ColumnElement[bool]]:
        """The conditions on `libraries` that leave what it sees."""
        return [
            func.pgshelf.in_scope(cast(scope, ARRAY(Text)), libraries.c.id, libraries.c.name) for scope in self.scopes
        ]


Caller = NamedDependency[SkipValidation[Principal]]


def principal(request: Request[Any, Any, Any]) -> Principal:
    """Who calls, for handlers that ask."""
    found: Principal = request.scope["pgshelf_principal"]  # type: ignore[typeddict-item]  # ASGI scopes are open
    return found


Again = Callable[[str], Awaitable[None]]


def again(request: Request[Any, Any, Any]) -> Again:
    """What a stream asks about its library from time to time, for it may outlast its key: raises as a request would."""
    found: Again = request.scope["pgshelf_again"]  # type: ignore[typeddict-item]  # ASGI scopes are open
    return found


def judged(scope: Any) -> list[str] | None:
    """The ids of the libraries that a body names, if its caller does not see all: by now a name may mean another."""
    found: list[str] | None = scope.get("pgshelf_libraries")
    return found


def canonical(entries: list[str]) -> list[str]:
    """A scope with its ids in the form that PostgreSQL writes them."""
    return [entry if (found := http.as_id(entry)) is None else str(found) for entry in entries]
