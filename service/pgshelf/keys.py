"""Keys and tokens: make, list, rotate, revoke, exchange."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Router, delete, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import UNSET, Meta, UnsetType
from sqlalchemy import select, tuple_

from pgshelf import credentials, database
from pgshelf.access import Caller, canonical
from pgshelf.connections import Connection
from pgshelf.errors import Problem, invalid
from pgshelf.http import After, Answer, Config, Engine, Limit, Page, as_id, cursor, page_size, position, problems
from pgshelf.idempotency import Audited, Write
from pgshelf.tables import keys

Role = Literal["reader", "writer", "admin"]
Entry = Annotated[str, Meta(min_length=1, max_length=128)]
Scope = Annotated[list[Entry], Meta(min_length=1, max_length=1000)]
KeyName = Annotated[str, PathParameter(description="Name or id of the key.")]
Revoked = Annotated[bool, QueryParameter(description="true lists the revoked ones, too.")]
DAY = 86_400
SECRET_ANSWER = {"Cache-Control": "no-store"}


class CreateKey(msgspec.Struct, forbid_unknown_fields=True):
    """A new key. Its secret comes with the answer and never again."""

    name: Annotated[
        Annotated[str, Meta(min_length=1, max_length=128, examples=["crawler"])],
        Meta(description="What the key is called; unique among those that were not revoked."),
    ]
    role: Annotated[
        Role,
        Meta(description="`reader` reads and searches, `writer` also changes documents, `admin` also libraries."),
    ]
    libraries: Annotated[
        Scope | None,
        Meta(
            description="The libraries it sees: ids, names, or patterns such as `team-*`; all if absent. Names and "
            "patterns mean what libraries are called at the time of a request, ids stay with their library."
        ),
    ] = None
    expires_at: Annotated[
        Annotated[datetime, Meta(tz=True)] | None, Meta(description="When it ends; never if absent.")
    ] = None


class RotateKey(msgspec.Struct, forbid_unknown_fields=True):
    """How a key gets another secret."""

    overlap: Annotated[
        Annotated[int, Meta(ge=0, le=90 * DAY)],
        Meta(description="Seconds that the secret before is still valid, a day if absent; 0 when it has leaked."),
    ] = DAY
    expires_at: Annotated[
        Annotated[datetime, Meta(tz=True)] | UnsetType | None,
        Meta(description="When the key ends from now on; null: never. As it was if absent."),
    ] = UNSET


class CreateToken(msgspec.Struct, forbid_unknown_fields=True):
    """A token for somebody who shall not have the key, a browser for one."""

    role: Annotated[Role | None, Meta(description="At most the key's; that one if absent.")] = None
    libraries: Annotated[
        Scope | None, Meta(description="What it sees of the libraries that the key sees; all of them if absent.")
    ] = None
    expires_in: Annotated[
        Annotated[int, Meta(ge=1, le=DAY)] | None,
        Meta(description="Seconds until it ends, at most PGSHELF_TOKEN_LIFETIME (3600); 900 if absent."),
    ] = None


class KeyFields(msgspec.Struct):
    """What everybody who manages keys may know of one."""

    id: Annotated[UUID, Meta(description="Its id, for ever.")]
    name: Annotated[str, Meta(description="What it is called.")]
    role: Annotated[Role, Meta(description="What it may do.")]
    libraries: Annotated[list[str], Meta(description='The libraries it sees; `["*"]`: all.')]
    created_at: Annotated[datetime, Meta(description="When it was made.")]
    expires_at: Annotated[datetime | None, Meta(description="When it ends; null: never.")]
    revoked_at: Annotated[datetime | None, Meta(description="When it was revoked.")]
    last_used_at: Annotated[datetime | None, Meta(description="When it was used last, exact to a minute.")]


class KeySecret(msgspec.Struct):
    """A secret of a key, without itself."""

    hint: Annotated[str, Meta(description="How it begins.")]
    created_at: Annotated[datetime, Meta(description="When it was made.")]
    expires_at: Annotated[datetime | None, Meta(description="When it ends by a rotation; null: with its key.")]


class Key(KeyFields):
    """A key, without its secret."""

    secrets: Annotated[list[KeySecret], Meta(description="Those that are valid, the newest first; tokens apart.")]


class NewKey(KeyFields):
    """A key with its new secret, which nobody can see again."""

    secret: Annotated[str, Meta(description="Send it as `Authorization: Bearer pgs_...`.")]


class Token(msgspec.Struct):
    """A token, which nobody can see again."""

    token: Annotated[str, Meta(description="Send it as `Authorization: Bearer pgt_...`.")]
    role: Annotated[Role, Meta(description="What it may do.")]
    libraries: Annotated[
        list[str], Meta(description='What it sees of the libraries that its key sees; `["*"]`: all of them.')
    ]
    expires_at: Annotated[datetime, Meta(description="When it ends, unless its key does before.")]


COLUMNS = [keys.c[name] for name in KeyFields.__struct_fields__]
FIELDS = ", ".join(f"k.{name}" for name in KeyFields.__struct_fields__)
SECRETS = """
select s.key_id, s.hint, s.created_at, s.expires_at from pgshelf.key_secrets s
where s.key_id = any (%s) and not s.token and coalesce(s.expires_at > now(), true) order by s.created_at desc, s.hint
"""


@post(
    "/keys",
    responses=problems(409, 413, 415),
    response_description="Made; `secret` is shown this once",
    summary="Create a key",
    operation_id="createKey",
)
async def create_key(data: JSONBody[CreateKey], audited: Audited, settings: Config) -> Answer[NewKey]:
    """Make a key. Only a hash of its secret is kept."""
    check_name(data.name)
    check_expiry(data.expires_at)
    made = credentials.mint()
    statement = f"select {FIELDS} from pgshelf.create_key(%s, %s, %s, %s, %s, %s) k"  # noqa: S608 - constants
    given = [data.name, data.role, stored_scope(data.libraries), data.expires_at, made.hash, made.hint]
    audited.note(detail=data.name)

    async def create(connection: Connection) -> Answer[NewKey]:
        [row] = await database.rows(connection, statement, *given)
        headers = {**SECRET_ANSWER, "Location": f"{settings.api_prefix}/keys/{row[0]}"}
        return Answer(NewKey(**_fields(row), secret=made.secret), status_code=201, headers=headers)

    return await audited.run(create, single=True)


@get(
    "/keys",
    responses=problems(),
    response_description="A page of keys",
    summary="List keys",
    operation_id="listKeys",
)
async def list_keys(
    engine: Engine, settings: Config, limit: Limit = None, after: After = None, revoked: Revoked = False
) -> Page[Key]:
    """List keys, oldest first; their secrets are not among what is known."""
    size = page_size(limit, settings)
    moment, last = position(after)
    query = select(*COLUMNS)
    if not revoked:
        query = query.where(keys.c.revoked_at.is_(None))
    if moment is not None:
        query = query.where(tuple_(keys.c.created_at, keys.c.id) > (moment, last))
    async with database.transaction(engine) as connection:
        query = query.order_by(keys.c.created_at, keys.c.id).limit(size + 1)
        rows = [tuple(row.values()) for row in await database.execute(connection, query)]
        secrets = await database.rows(connection, SECRETS, [row[0] for row in rows])
    found = [_key(row, secrets) for row in rows]
    more = found[size - 1] if len(found) > size else None
    return Page(found[:size], cursor(more.created_at, more.id) if more else None)


@get(
    "/keys/{key:str}",
    responses=problems(404),
    response_description="The key",
    summary="Get a key",
    operation_id="getKey",
)
async def get_key(key: KeyName, engine: Engine) -> Key:
    """Get a key by its name or id; a revoked one has only its id."""
    statement = f"select {FIELDS} from pgshelf.key_named(%s) k"  # noqa: S608 - put together from constants
    [row] = await database.run(engine, statement, key)
    return _key(row, await database.run(engine, SECRETS, [row[0]]))


@delete(
    "/keys/{key:str}",
    responses=problems(404, 409),
    response_description="Revoked",
    summary="Revoke a key",
    operation_id="revokeKey",
)
async def revoke_key(key: KeyName, once: Write) -> Answer[None]:
    """End a key and all its tokens, at once in every process of every server."""

    async def revoke(connection: Connection) -> Answer[None]:
        await database.rows(connection, "select pgshelf.revoke_key(%s)", key)
        return Answer(None, status_code=204)

    return await once.run(revoke, single=True)


@post(
    "/keys/{key:str}/rotate",
    status_code=200,
    responses=problems(404, 409, 413, 415),
    response_description="Rotated; `secret` is shown this once",
    summary="Give a key another secret",
    operation_id="rotateKey",
)
async def rotate_key(key: KeyName, audited: Audited, data: JSONBody[RotateKey | None] = None) -> Answer[NewKey]:
    """Make another secret for a key. The one before, with its tokens, is valid for a while yet."""
    data = data or RotateKey()
    renewed = data.expires_at is not UNSET
    ends = data.expires_at if data.expires_at is not UNSET else None
    check_expiry(ends)
    made = credentials.mint()
    statement = f"select {FIELDS} from pgshelf.rotate_key(%s, %s, %s, %s, %s, %s) k"  # noqa: S608 - constants
    given = [key, made.hash, made.hint, timedelta(seconds=data.overlap), ends, renewed]

    async def rotate(connection: Connection) -> Answer[NewKey]:
        [row] = await database.rows(connection, statement, *given)
        return Answer(NewKey(**_fields(row), secret=made.secret), status_code=200, headers=dict(SECRET_ANSWER))

    return await audited.run(rotate, single=True)


@post(
    "/token",
    responses=problems(409, 413, 415),
    response_description="Made; it is shown this once",
    summary="Exchange the key for a token",
    operation_id="createToken",
)
async def create_token(
    audited: Audited, settings: Config, principal: Caller, data: JSONBody[CreateToken | None] = None
) -> Answer[Token]:
    """Make a token of the key that was sent. It lives for minutes, may do less, and ends when its key does."""
    if principal.kind != "key":
        raise Problem("forbidden", "Only a key (pgs_...) can be exchanged for a token; send one.")
    data = data or CreateToken()
    role: Any = data.role or principal.role
    if not principal.may(role):
        raise Problem("forbidden", f"The key has the role {principal.role}, its tokens cannot have {role}.")
    longest = settings.token_lifetime
    if data.expires_in is not None and data.expires_in > longest:
        raise invalid("expires_in", f"is {data.expires_in}, at most {longest} is allowed")
    lifetime = timedelta(seconds=data.expires_in or min(900, longest))
    scope, made = stored_scope(data.libraries), credentials.mint("token")
    statement = "select pgshelf.issue_token(%s, %s, %s, %s, %s, %s)"
    given = [principal.hash, made.hash, made.hint, role, scope, lifetime]

    async def issue(connection: Connection) -> Answer[Token]:
        [(ends,)] = await database.rows(connection, statement, *given)
        token = Token(made.secret, role, scope or ["*"], ends)
        return Answer(token, status_code=201, headers=dict(SECRET_ANSWER))

    return await audited.run(issue, single=True)


def stored_scope(entries: list[str] | None) -> list[str] | None:
    """A scope as it is stored; null sees all."""
    return None if entries is None or "*" in entries else canonical(entries)


def check_name(name: str) -> None:
    """Refuse a name that could not be told from an id, or could not be sent."""
    if as_id(name) is not None:
        raise invalid("name", "parses as a UUID, and those are ids; choose another name")
    if name in (".", "..") or name != name.strip() or not name.isprintable():
        raise invalid("name", "must be printable, must not begin or end with a space, nor be dots alone")


def check_expiry(moment: datetime | None) -> None:
    """Refuse a key that would be dead on arrival."""
    if moment is not None and moment <= datetime.now(UTC):
        raise invalid("expires_at", "has passed already")


def _fields(row: tuple[Any, ...]) -> dict[str, Any]:
    fields = dict(zip(KeyFields.__struct_fields__, row, strict=True))
    return fields | {"libraries": ["*"] if fields["libraries"] is None else fields["libraries"]}


def _key(row: tuple[Any, ...], secrets: list[tuple[Any, ...]]) -> Key:
    own = [KeySecret(hint, made, ends) for key, hint, made, ends in secrets if key == row[0]]
    return Key(**_fields(row), secrets=own)


router = Router(
    "/",
    route_handlers=[create_key, list_keys, get_key, revoke_key, rotate_key, create_token],
    tags=["keys"],
)
