"""Who calls: the bearer of a key, of a token or of a JWT, or anybody where nobody need say who it is."""

from __future__ import annotations

import asyncio
import contextvars
import time
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

import sqlalchemy

from pgshelf import credentials, database, http
from pgshelf.access import Principal, canonical
from pgshelf.errors import Problem
from pgshelf.settings import Settings, is_loopback, listed
from pgshelf.timing import stage

if TYPE_CHECKING:
    from pgshelf.jwts import Issuer

EVERYBODY = Principal("anybody", "anybody", "admin")  # while nobody need say who it is
ASKED = """
select k.id, k.name, coalesce(s.role, k.role), k.libraries, s.libraries, s.token,
  case when k.revoked_at is not null then 'key_revoked' when least(k.expires_at, s.expires_at) <= now() then 'key_expired' end,
  coalesce(k.last_used_at, '-infinity') < now() - interval '1 minute',
  case when k.libraries is not null or s.libraries is not null
    then pgshelf.library_in_scope($2, k.libraries, s.libraries) end
from pgshelf.key_secrets s join pgshelf.keys k on k.id = s.key_id where s.hash = $1
"""  # noqa: E501 - one line for each answer
SEEN = """
select (select array_agg(pgshelf.library_in_scope(r.name, $1, $2) order by r.n)
  from unnest($3::text[]) with ordinality r(name, n)),
  pgshelf.in_scope($1, null, $4) and pgshelf.in_scope($2, null, $4)
"""


class Beside(Protocol):
    """Answers short questions beside the requests' own."""

    async def ask(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Run a statement that changes nothing."""

    async def close(self) -> None:
        """Give back what it holds."""


class Authenticator:
    """Asks PostgreSQL about the key of every request: what is revoked there is refused everywhere from then on.

    `beside`, which answers, is closed by whoever gave it.
    """

    def __init__(self, settings: Settings, engine: sqlalchemy.Engine, beside: Beside) -> None:
        self._engine, self._beside = engine, beside
        self._issuer: Issuer | None = None
        if settings.jwt:
            from pgshelf.jwts import Issuer  # what checks signatures takes a while to load

            self._issuer = Issuer(settings)
        self._public = public_scope(settings)
        # settled for this process: open or closed; None is open until there is the first key
        self._closed = requires_keys(settings)
        self._open_until, self._looking = 0.0, asyncio.Lock()
        self._used: set[UUID] = set()
        self._noting: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Wait until the use of keys is recorded."""
        if self._noting is not None:
            await self._noting

    async def caller(self, header: bytes | None, library: str | None, *, public: bool) -> tuple[Principal, UUID | None]:
        """Who calls, by the header Authorization, and the id of the `library` it named, where its scopes cover that.

        No id where it sees all libraries: then there is nothing to judge.
        `public`: what it asks for is open to everybody where PGSHELF_PUBLIC_SEARCH says so. Raises Unauthorized.
        """
        if not await self._is_closed(sent=header is not None):
            return EVERYBODY, None
        if header is None:
            if not public or self._public == []:
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
        rows = await self._beside.ask(ASKED, hashed, library)
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
        return principal, (await self.seen(principal, [library], None))[0][0]

    async def seen(self, principal: Principal, names: list[str], new: str | None) -> tuple[list[UUID | None], bool]:
        """Of each library its id, if it is in scope; and whether a library of a new name would be."""
        scope, within = [*principal.scopes, None, None][:2]
        [(ids, covered)] = await self._beside.ask(SEEN, scope, within, names, new)
        return ids or [], covered

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


class Unauthorized(Problem):
    """Somebody was not let in; `who`, where the secret was that of a key."""

    who: Principal | None = None


def _unauthorized(code: str, detail: str, *, wrong: bool = False, who: Principal | None = None) -> Problem:
    challenge = 'Bearer realm="pgshelf"' + (', error="invalid_token"' if wrong else "")
    problem = Unauthorized(code, detail, headers={"WWW-Authenticate": challenge})
    problem.who = who
    return problem
