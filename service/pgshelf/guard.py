"""The guard that every request passes first: it holds who calls against the table in `access.py`."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import sqlalchemy
from litestar import Request
from litestar.enums import ScopeType

from pgshelf import auditing, bodies, connections, http, questions
from pgshelf.access import OPEN, RULES, Principal, Rule
from pgshelf.authentication import Authenticator, Beside, Unauthorized
from pgshelf.errors import CODES, Problem, invalid
from pgshelf.hosts import allowed_hosts, is_allowed_host
from pgshelf.rates import Rates
from pgshelf.settings import Settings

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Receive, Scope, Send

MOST = 100  # libraries that one request names
SHORT = 65_536  # bytes of a body
LATE = 1.0  # seconds; when a body has taken longer its caller is judged again


class Names(msgspec.Struct):
    """What a body says of libraries; its handler decodes it again, strictly."""

    libraries: list[str] = []
    name: str | None = None


class Guard:
    """Lets a request through when its caller may do what it asks for, and answers it when not."""

    def __init__(
        self,
        settings: Settings,
        engine: sqlalchemy.Engine,
        url: str,
        beside: Beside | None = None,
        opening: connections.Opening = contextlib.nullcontext,
    ) -> None:
        self._beside = beside or questions.Beside(settings, url)
        self._callers = Authenticator(settings, engine, self._beside)
        self._rates = Rates(settings, url, opening)
        self._hosts = allowed_hosts(settings)
        self._refusals = auditing.Refusals(engine) if settings.audit else None

    async def close(self) -> None:
        """Give back what it holds."""
        await self._callers.close()
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
                headers = dict(scope["headers"])
                if _has_short_body(headers):
                    receive = held.enter_context(bodies.early(receive))
                try:
                    receive = await self._admit(scope, headers, receive, held)
                except Problem as problem:
                    self._note_refusal(scope, problem.code, problem.who if isinstance(problem, Unauthorized) else None)
                    raise
                try:
                    await app(scope, receive, send)
                finally:
                    if (code := scope.get("pgshelf_problem")) is not None:  # what a handler raised was answered below
                        self._note_refusal(scope, str(code), None)

        return guarded

    async def _admit(
        self, scope: Any, headers: dict[bytes, bytes], receive: Receive, held: contextlib.ExitStack
    ) -> Receive:
        """Judge a request; gives what the rest of it is to be received from."""
        handler = scope["route_handler"]
        rule = RULES.get(handler.operation_id or "")
        if rule == OPEN or _is_reference(handler):
            return receive
        self._check_host(headers.get(b"host", b"").decode("latin-1"))
        if rule is None or rule.role is None:
            raise Problem("forbidden", "This address has no rule about who may use it, so nobody may.")
        named = scope["path_params"].get("library") if rule.library in ("path", "renamed") else None
        header = headers.get(b"authorization")
        try:
            principal, library = await self._callers.caller(header, named, public=rule.public)
        except Problem as problem:
            if problem.status == 401:  # whoever tries keys is counted, too
                await self._rates.admit(self._rates.address(scope), rule.kind)
            raise
        scope["pgshelf_principal"] = principal
        caller = principal.owner or self._rates.address(scope)
        held.enter_context(self._rates.at_once(caller, stream=rule.stream))
        scope["pgshelf_headers"] = await self._rates.admit(caller, rule.kind)
        _judge(principal, rule, named, library)
        if library is not None:
            # the handler finds the very library that was judged, whatever it is called by then
            named = scope["path_params"]["library"] = str(library)
        again = functools.partial(self._again, scope, rule, header)
        if rule.stream:
            scope["pgshelf_again"] = again
        else:
            receive = bodies.late(receive, LATE, functools.partial(again, named))
        if principal.scopes and rule.library in ("listed", "named", "renamed"):
            body = await self._check_body(principal, rule, Request(scope, receive))
            return bodies.once_more(body, receive)  # the query cache reads it, too
        return receive

    async def _again(self, scope: Any, rule: Rule, header: bytes | None, library: str | None) -> None:
        """Judge the caller of a request that takes long as if it came now."""
        try:
            principal, found = await self._callers.caller(header, library, public=rule.public)
            _judge(principal, rule, library, found)
        except Problem as problem:
            scope["pgshelf_problem"] = problem.code  # where the answer has begun nobody else says so
            raise

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

    async def _check_body(self, principal: Principal, rule: Rule, request: Request[Any, Any, Any]) -> bytes:
        """Judge the libraries that a body names, and give it back; one that cannot be read goes no further."""
        http.check_content_type(request.scope)
        body = await request.body()
        told = http.decoded(request.headers.get("content-type", ""), body, Names)
        if rule.library == "listed":
            if len(told.libraries) > MOST:
                raise invalid("libraries", f"has {len(told.libraries)} entries, at most {MOST} are allowed")
            ids, _ = await self._callers.seen(principal, told.libraries, None)
            for name, library in zip(told.libraries, ids, strict=True):
                if library is None:
                    raise _missing(name)
            scope: Any = request.scope
            scope["pgshelf_libraries"] = [str(library) for library in ids]  # as with one in the path
        elif told.name is not None and not (await self._callers.seen(principal, [], told.name))[1]:
            raise Problem("forbidden", "The key may give only names that it sees libraries by; an id does not count.")
        return body


def _has_short_body(headers: dict[bytes, bytes]) -> bool:
    """Whether a body may come while PostgreSQL is asked about the caller: not one that waits to be invited."""
    length = headers.get(b"content-length", b"0")
    short = length.isdigit() and len(length) < 6 and 0 < int(length) <= SHORT
    return short and b"authorization" in headers and b"expect" not in headers


def _is_reference(handler: Any) -> bool:
    """Whether it answers /schema: Litestar's own, the same for every installation of a version."""
    return bool(handler.operation_id is None and handler.fn.__module__ == "litestar._openapi.plugin")


def _judge(principal: Principal, rule: Rule, named: str | None, library: UUID | None) -> None:
    """Refuse what its role and its scopes do not cover; `library` is that of the name, where they do."""
    if rule.role is not None and not principal.may(rule.role):
        raise Problem("forbidden", _lacks(principal, rule.role))
    if rule.everything and principal.scopes:
        raise Problem("forbidden", f"It takes a {principal.kind} that sees all libraries; this one sees only some.")
    if principal.scopes and named is not None and library is None:
        raise _missing(named)


def _missing(library: str) -> Problem:
    return Problem("library_not_found", f"There is no library {library!r}.")


def _lacks(principal: Principal, role: str) -> str:
    if principal.role is None:
        return "The token names no role of pgshelf."
    return f"It takes the role {role}, and the {principal.kind} has the role {principal.role}."
