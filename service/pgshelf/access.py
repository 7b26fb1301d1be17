"""Who may do what: one table of all operations, and the guard that every request passes first."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol
from uuid import UUID

import msgspec
from litestar import Request
from litestar.di import NamedDependency
from litestar.enums import ScopeType
from litestar.params import SkipValidation
from sqlalchemy import ARRAY, ColumnElement, Text, cast, func
from sqlalchemy.ext.asyncio import AsyncEngine

from pgshelf import auditing, connections, credentials, database, http
from pgshelf.credentials import ROLES
from pgshelf.errors import CODES, Problem, invalid
from pgshelf.rates import Kind, Rates
from pgshelf.settings import Settings, is_loopback, listed
from pgshelf.tables import libraries
from pgshelf.timing import stage

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Receive, Scope, Send

    from pgshelf.jwts import Issuer

MOST = 100  # libraries that one request names
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
HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\[\]:@]+?)\.?)(?::[0-9]*)?")
EVERYBODY = Principal("anybody", "anybody", "admin")  # while nobody need say who it is
ASKED = """
select k.id, k.name, coalesce(s.role, k.role), k.libraries, s.libraries, s.token,
  case when k.revoked_at is not null then 'key_revoked' when least(k.expires_at, s.expires_at) <= now() then 'key_expired' end,
  coalesce(k.last_used_at, '-infinity') < now() - interval '1 minute',
  case when k.libraries is not null or s.libraries is not null
    then pgshelf.library_in_scope(%(library)s, k.libraries, s.libraries) end
from pgshelf.key_secrets s join pgshelf.keys k on k.id = s.key_id where s.hash = %(hash)s
"""  # noqa: E501 - one line for each answer
SEEN = """
select (select array_agg(pgshelf.library_in_scope(r.name, %(scope)s, %(within)s) order by r.n)
  from unnest(%(names)s::text[]) with ordinality r(name, n)),
  pgshelf.in_scope(%(scope)s, null, %(new)s) and pgshelf.in_scope(%(within)s, null, %(new)s)
"""


class Names(msgspec.Struct):
    """What a body says of libraries; its handler decodes it again, strictly."""

    libraries: list[str] = []
    name: str | None = None


class Beside(Protocol):
    """Answers short questions beside the requests' own."""

    async def ask(self, question: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """Run a statement that changes nothing."""

    async def close(self) -> None:
        """Give back what it holds."""


class Guard:
    """Asks PostgreSQL about the key of every request: what is revoked there is refused everywhere from then on."""

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        url: str,
        beside: Beside | None = None,
        opening: connections.Opening = contextlib.nullcontext,
    ) -> None:
        self._settings, self._engine = settings, engine
        self._beside = beside or connections.Beside(settings, url)
        self._rates = Rates(settings, url, opening)
        self._issuer: Issuer | None = None
        if settings.jwt:
            from pgshelf.jwts import Issuer  # what checks signatures takes a while to load

            self._issuer = Issuer(settings)
        self._public = public_scope(settings)
        self._hosts = allowed_hosts(settings)
        # settled for this process: open or closed; None is open until there is the first key
        self._closed = requires_keys(settings)
        self._open_until, self._looking = 0.0, asyncio.Lock()
        self._used: set[UUID] = set()
        self._noting: asyncio.Task[None] | None = None
        self._refusals = auditing.Refusals(engine) if settings.audit else None

    async def close(self) -> None:
        """Give back what it holds."""
        if self._noting is not None:
            await self._noting
        if self._refusals is not None:
            await self._refusals.close()
        await self._beside.close()
        await self._rates.close()

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """Behind routing: let a request through, with its `pgshelf_principal`, or answer it."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != ScopeType.HTTP:
                await app(scope, receive, send)
                return
            with contextlib.ExitStack() as held:
                try:
                    await self._admit(scope, receive, held)
                except Problem as problem:
                    self._note_refusal(scope, problem.code, getattr(problem, "who", None))
                    raise
                await app(scope, receive, send)
            if (code := scope.get("pgshelf_problem")) is not None:  # what a handler raised was answered below
                self._note_refusal(scope, str(code), None)

        return guarded

    async def _admit(self, scope: Any, receive: Receive, held: contextlib.ExitStack) -> None:
        handler = scope["route_handler"]
        rule = RULES.get(handler.operation_id or "")
        if rule == OPEN or _is_reference(handler):
            return
        headers = dict(scope["headers"])
        self._check_host(headers.get(b"host", b"").decode("latin-1"))
        if rule is None or rule.role is None:
            raise Problem("forbidden", "This address has no rule about who may use it, so nobody may.")
        named = scope["path_params"].get("library") if rule.library in ("path", "renamed") else None
        try:
            principal, library = await self._who(headers.get(b"authorization"), rule, named)
        except Problem as problem:
            if problem.status == 401:  # whoever tries keys is counted, too
                await self._rates.admit(self._rates.address(scope), rule.kind)
            raise
        scope["pgshelf_principal"] = principal
        caller = principal.owner or self._rates.address(scope)
        held.enter_context(self._rates.at_once(caller, stream=rule.stream))
        scope["pgshelf_headers"] = await self._rates.admit(caller, rule.kind)
        if not principal.may(rule.role):
            raise Problem("forbidden", _lacks(principal, rule.role))
        if rule.everything and principal.scopes:
            raise Problem("forbidden", f"It takes a {principal.kind} that sees all libraries; this one sees only some.")
        if not principal.scopes:
            return
        if named is not None:
            if library is None:
                raise _missing(named)
            # the handler finds the very library that was judged, whatever it is called by then
            scope["path_params"]["library"] = str(library)
        if rule.library in ("listed", "named", "renamed"):
            await self._check_body(principal, rule, Request(scope, receive))

    def _note_refusal(self, scope: Any, code: str, who: Principal | None) -> None:
        """Note for the audit log that somebody was not let in, or to do what it asked for."""
        if self._refusals is None or CODES[code][0] not in (401, 403):
            return
        operation = scope["route_handler"].operation_id or ""
        who = who or scope.get("pgshelf_principal")
        # nobody else can say who it is: the other end of the connection
        name = (scope.get("client") or ("",))[0] if who is None else who.name
        entry = auditing.Entry(
            auditing.OPERATIONS.get(operation, "access"),
            *("anybody" if who is None else who.kind, name, None if who is None else who.id),
            library=scope["path_params"].get("library"),
            request_id=scope["pgshelf_request_id"],
            detail=f"{operation}: {code}",
        )
        self._refusals.note(entry)

    def _check_host(self, host: str) -> None:
        if self._hosts and not is_allowed_host(host, self._hosts):
            detail = (
                f"This server does not answer for the host {host[:100]!r}. PGSHELF_ALLOWED_HOSTS lists those it does."
            )
            raise Problem("host_not_allowed", detail)

    async def _who(self, header: bytes | None, rule: Rule, library: str | None) -> tuple[Principal, UUID | None]:
        """Who calls, and the library that it named, if it sees only some and that is among them."""
        if not await self._is_closed(sent=header is not None):
            return EVERYBODY, None
        if header is None:
            if not rule.public or self._public == []:
                raise _unauthorized("unauthorized", "Send a key: Authorization: Bearer pgs_...")
            scopes = () if self._public is None else (self._public,)
            return await self._placed(Principal("anybody", "anybody", "reader", scopes), library)
        scheme, _, secret = header.decode("latin-1").partition(" ")
        secret = secret.strip(" ")
        with stage("auth"):
            if scheme.lower() == "bearer" and credentials.well_formed(secret):
                return await self._by_key(secret, library)
            if scheme.lower() == "bearer" and self._issuer is not None and secret.count(".") == 2:
                return await self._placed(await self._by_jwt(self._issuer, secret), library)
        detail = "It is not one of pgshelf's: Authorization: Bearer pgs_... is what is expected, as it was shown."
        raise _unauthorized("invalid_key", detail, wrong=True)

    async def _by_key(self, secret: str, library: str | None) -> tuple[Principal, UUID | None]:
        hashed = credentials.digest(secret)
        rows = await self._beside.ask(ASKED, {"hash": hashed, "library": library})
        if not rows:
            raise _unauthorized(
                "invalid_key", "There is no such key. pgshelf keys list shows those there are.", wrong=True
            )
        key, name, role, scope, within, token, fault, unnoted, found = rows[0]
        if fault is not None:
            todo = {"key_revoked": "Ask for another one.", "key_expired": "Get another one, or the newer secret."}[
                fault
            ]
            who = Principal("token" if token else "key", name, role, (), key)
            raise _unauthorized(
                fault, f"The {'token' if token else 'key'} is no longer valid. {todo}", wrong=True, who=who
            )
        if unnoted:
            self._note(key)
        scopes = tuple(each for each in (scope, within) if each is not None)
        return Principal("token" if token else "key", name, role, scopes, key, hashed), found

    async def _by_jwt(self, issuer: Issuer, token: str) -> Principal:
        try:
            claims = await issuer.check(token)
        except Problem as problem:
            if problem.code == "invalid_token":
                raise _unauthorized(problem.code, problem.detail, wrong=True) from None
            raise
        scopes = () if "*" in claims.libraries else (canonical(claims.libraries),)
        return Principal("jwt", claims.subject, claims.role, scopes)

    async def _placed(self, principal: Principal, library: str | None) -> tuple[Principal, UUID | None]:
        if library is None or not principal.scopes:
            return principal, None
        return principal, (await self._seen(principal, [library], None))[0][0]

    async def _seen(self, principal: Principal, names: list[str], new: str | None) -> tuple[list[UUID | None], bool]:
        """Of each library its id, if it is in scope; and whether a library of a new name would be."""
        scope, within = [*principal.scopes, None, None][:2]
        [(ids, covered)] = await self._beside.ask(SEEN, {"scope": scope, "within": within, "names": names, "new": new})
        return ids or [], covered

    async def _check_body(self, principal: Principal, rule: Rule, request: Request[Any, Any, Any]) -> None:
        """Judge the libraries that a body names; one that cannot be read goes no further."""
        http.check_content_type(request.scope)
        told = http.decoded(request.headers.get("content-type", ""), await request.body(), Names)
        if rule.library == "listed":
            if len(told.libraries) > MOST:
                raise invalid("libraries", f"has {len(told.libraries)} entries, at most {MOST} are allowed")
            ids, _ = await self._seen(principal, told.libraries, None)
            for name, library in zip(told.libraries, ids, strict=True):
                if library is None:
                    raise _missing(name)
        elif told.name is not None and not (await self._seen(principal, [], told.name))[1]:
            raise Problem("forbidden", "The key may give only names that it sees libraries by; an id does not count.")

    async def _is_closed(self, *, sent: bool) -> bool:
        """Whether callers must say who they are. Where nothing was set, they must once there has been a key."""
        if self._in_doubt(sent=sent):
            async with self._looking:  # the answer to the first of a crowd is that to all
                if self._in_doubt(sent=sent):
                    [(any_key,)] = await self._beside.ask("select exists (select from pgshelf.keys)")
                    self._closed = True if any_key else None
                    self._open_until = time.monotonic() + 1
        return bool(self._closed)

    def _in_doubt(self, *, sent: bool) -> bool:
        return self._closed is None and (sent or time.monotonic() > self._open_until)

    def _note(self, key: UUID) -> None:
        """Record that a key was used, in nobody's way; should it fail, the next use records it.

        It is no part of the request: not of its timings, nor of its log lines.
        """
        self._used.add(key)
        if self._noting is None or self._noting.done():
            self._noting = asyncio.create_task(self._write_used(), context=contextvars.Context())

    async def _write_used(self) -> None:
        keys, self._used = list(self._used), set()
        try:
            await database.run(self._engine, "select pgshelf.key_used(%s)", keys)
        except Exception as error:
            http.log.debug("the use of a key was not recorded: %s", error)


def requires_keys(settings: Settings) -> bool | None:
    """Whether callers must have a key; None: as soon as there is one."""
    if settings.auth != "auto":
        return settings.auth == "on"
    if settings.jwt or not (is_loopback(settings.host) or settings.allow_unauthenticated):
        return True
    return None


def public_scope(settings: Settings) -> list[str] | None:
    """The libraries that anybody may search; None: all."""
    entries = {"true": ["*"], "false": []}.get(settings.public_search.lower(), listed(settings.public_search))
    return None if "*" in entries else canonical(entries)


def canonical(entries: list[str]) -> list[str]:
    """A scope with its ids in the form that PostgreSQL writes them."""
    return [entry if (found := http.as_id(entry)) is None else str(found) for entry in entries]


def allowed_hosts(settings: Settings) -> list[str]:
    """The hosts that requests may be for; none: any. On loopback, a name that leads there is not enough (rebinding)."""
    if settings.allowed_hosts:
        return (
            [] if settings.allowed_hosts.strip() == "*" else [host.lower() for host in listed(settings.allowed_hosts)]
        )
    return ["localhost", "127.0.0.1", "::1", settings.host.lower()] if is_loopback(settings.host) else []


def is_allowed_host(header: str, hosts: list[str]) -> bool:
    """Whether a Host header names one of them, whatever its port; *.example.org stands for all below it."""
    found = HOST.fullmatch(header.lower())
    host = (found["v6"] or found["name"]) if found else ""
    return any(host == each or (each.startswith("*.") and host.endswith(each[1:])) for each in hosts)


def principal(request: Request[Any, Any, Any]) -> Principal:
    """Who calls, for handlers that ask."""
    found: Principal = request.scope["pgshelf_principal"]  # type: ignore[typeddict-item]  # ASGI scopes are open
    return found


def _is_reference(handler: Any) -> bool:
    """Whether it answers /schema: Litestar's own, the same for every installation of a version."""
    return bool(handler.operation_id is None and handler.fn.__module__ == "litestar._openapi.plugin")


def _missing(library: str) -> Problem:
    return Problem("library_not_found", f"There is no library {library!r}.")


def _lacks(principal: Principal, role: str) -> str:
    if principal.role is None:
        return "The token names no role of pgshelf."
    return f"It takes the role {role}, and the {principal.kind} has the role {principal.role}."


class Unauthorized(Problem):
    """Somebody was not let in; `who`, where the secret was that of a key."""

    who: Principal | None = None


def _unauthorized(code: str, detail: str, *, wrong: bool = False, who: Principal | None = None) -> Problem:
    challenge = 'Bearer realm="pgshelf"' + (', error="invalid_token"' if wrong else "")
    problem = Unauthorized(code, detail, headers={"WWW-Authenticate": challenge})
    problem.who = who
    return problem
