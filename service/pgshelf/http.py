"""What handlers share: strict bodies, answers in JSON or MessagePack, problems, ids, pages."""

from __future__ import annotations

import base64
import logging
import re
import uuid
from collections.abc import AsyncIterator
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

import msgspec
import sqlalchemy
from litestar import Request, Response
from litestar.di import NamedDependency
from litestar.dto import AbstractDTO
from litestar.enums import MediaType, ScopeType
from litestar.exceptions import ValidationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, PathParameter, QueryParameter, SkipValidation
from litestar.response.streaming import ASGIStreamingResponse
from litestar.serialization import default_serializer, encode_msgpack

from pgshelf.database import Source
from pgshelf.doubles import short_integers
from pgshelf.errors import Problem, choices, invalid, problem_of, problem_of_value
from pgshelf.settings import Settings
from pgshelf.timing import stage

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Receive, Scope, Send


log = logging.getLogger("pgshelf")
T = TypeVar("T")
# What parses as a UUID, as pgshelf.is_id says it in SQL: such a text is an id, never a name or a key.
ID = re.compile(
    r"([0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12})|\{[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}\}", re.I
)
ANY_VERSION = -1
VERSION = re.compile(r"([0-9]{1,18})(-[0-9]{1,18}-[0-9]{1,18})?")  # as documents.py makes them
TAGS = re.compile(r'"[^"]*"')
MSGPACK_TYPES = {"application/msgpack", "application/x-msgpack", "application/vnd.msgpack"}
NDJSON = "application/x-ndjson"

Engine = NamedDependency[SkipValidation[sqlalchemy.Engine]]
Reader = NamedDependency[SkipValidation[Source]]  # for what changes nothing: a replica may answer
Config = NamedDependency[SkipValidation[Settings]]
LibraryName = Annotated[str, PathParameter(description="Name or id of the library.")]
DocumentName = Annotated[str, PathParameter(description="Key or id of the document, percent-encoded.")]
ChunkId = Annotated[str, PathParameter(description="Id of the chunk.")]
Limit = Annotated[int | None, QueryParameter(ge=1, description="How many items at most.")]
After = Annotated[str | None, QueryParameter(max_length=500, description="The `next` of the page before.")]
Wait = Annotated[bool, QueryParameter(description="false stores now and embeds later: 202 while chunks are pending.")]
IfMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-Match",
        description='The ETag that the document must still have, such as "3".',
        # wanted_version says it better than a pattern can
        schema_extra={"pattern": r'^(\*|(W/)?"[0-9]{1,18}(-[0-9]{1,18}-[0-9]{1,18})?")$'},
    ),
]
IfNoneMatch = Annotated[
    str | None,
    HeaderParameter(
        name="If-None-Match",
        description="ETags that you have the document of, or `*`: if it still has one of them, the answer is 304.",
    ),
]


class Page(msgspec.Struct, Generic[T]):
    """One page of a list; `next` is null at the end."""

    items: list[T]
    next: str | None = None


class FieldError(msgspec.Struct):
    """One finding of a validation: where, and what."""

    path: str
    message: str


class ProblemBody(msgspec.Struct, omit_defaults=True):
    """An error, RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    sqlstate: str | None = None
    errors: list[FieldError] | None = None


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """What a route documents of its errors; those that any route may answer are added."""
    return {
        status: ResponseSpec(
            ProblemBody, generate_examples=False, media_type="application/problem+json", description=text
        )
        for status, text in PROBLEMS.items()
        if status in {400, 401, 403, 408, 429, 500, 503, 504, *statuses}
    }


PROBLEMS = {
    400: "Malformed or invalid",
    401: "No key, or one that is not valid; see WWW-Authenticate",
    403: "The key may not do this",
    404: "Not found",
    408: "The body did not come in time",
    409: "Conflict, or a stale If-Match",
    410: "Not kept any more",
    413: "Too large",
    415: "Content type not supported",
    422: "Well-formed but impossible here",
    429: "Too many requests, in this time or at once; see Retry-After",
    500: "Internal error",
    502: "The embedding or reranking provider failed",
    503: "Database or provider unavailable; see Retry-After",
    504: "Timed out",
}


class Body(AbstractDTO[Any]):
    """Decodes a request's body strictly: no unknown fields, no coercion, JSON or MessagePack."""

    @classmethod
    def create_for_field_definition(cls, *_: Any, **__: Any) -> None:
        """Nothing to prepare: the structs are the transfer models."""

    @classmethod
    def create_openapi_schema(cls, field_definition: Any, handler_id: str, schema_creator: Any) -> Any:
        """The schema of the struct itself."""
        return schema_creator.for_field_definition(field_definition)

    def decode_bytes(self, value: bytes) -> Any:
        """The body as the struct that the handler asks for."""
        request = self.asgi_connection
        field = request.route_handler.parsed_data_field
        model: Any = next(part for part in [*field.inner_types, field] if not part.is_none_type).annotation
        with stage("decode"):
            return decoded(request.headers.get("content-type", ""), value, model)


def decoded(content_type: str, body: bytes, model: type[T]) -> T:
    """A body as what a struct says of it."""
    decode = msgspec.msgpack.decode if _media_type(content_type) in MSGPACK_TYPES else msgspec.json.decode
    try:
        return decode(body, type=model)
    except msgspec.ValidationError as error:
        raise problem_of_value(error, model) from None


class Answer(Response[T]):
    """An answer in the format that the client prefers."""

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **options: Any) -> Any:
        """Render as MessagePack where `Accept` names it, else as JSON."""
        with stage("encode"):
            accepted = _media_type(request.headers.get("accept", ""))
            if self.media_type in (None, MediaType.JSON) and accepted in MSGPACK_TYPES:
                self.media_type = accepted
            return super().to_asgi_response(app, request, **options)

    def render(self, content: Any, media_type: str, enc_hook: Any = default_serializer) -> bytes:
        """The body; Litestar itself knows one name of MessagePack only."""
        if media_type not in MSGPACK_TYPES:
            return super().render(content, media_type, enc_hook)
        # what was stored is JSON
        found: Any = msgspec.json.decode(content) if isinstance(content, msgspec.Raw) else content
        try:
            return encode_msgpack(found, enc_hook)
        except OverflowError:  # MessagePack has no integers beyond 64 bits, JSON has
            plain = msgspec.to_builtins(found, builtin_types=(bytes, datetime), enc_hook=enc_hook)
            return encode_msgpack(short_integers(plain), enc_hook)


class _Duplex(ASGIStreamingResponse):
    async def send_body(self, send: Send, receive: Receive) -> None:
        await self._stream(send)


class Duplex(Response[Any]):
    """Lines that are answered while the body is still coming: unlike Litestar's stream it leaves the body to others."""

    def __init__(self, lines: AsyncIterator[bytes]) -> None:
        super().__init__(b"", media_type=NDJSON)
        self.lines = lines

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **options: Any) -> Any:
        """The response that sends the lines."""
        wanted: dict[str, Any] = {name: options.get(name) for name in ("encoded_headers", "headers", "status_code")}
        return _Duplex(iterator=self.lines, media_type=NDJSON, **wanted)


def render_problem(request: Request[Any, Any, Any], error: Exception) -> Response[ProblemBody]:
    """The exception handler of the whole application."""
    if isinstance(error, ValidationException):
        _name_choices(request.route_handler, error)
    problem = problem_of(error)
    request_id = str(request.scope.get("pgshelf_request_id", ""))
    request.scope["pgshelf_problem"] = problem.code  # type: ignore[typeddict-unknown-key]  # ASGI scopes are open
    if problem.status >= 500:
        known = isinstance(error, Problem) or problem.code != "internal_error"
        told = {"request_id": request_id}
        log.error("%s: %s", problem.code, error, exc_info=None if known else error, extra=told)
    body = ProblemBody(
        type=f"/errors#{problem.code}",  # health.py has the page
        title=problem.title,
        status=problem.status,
        detail=problem.detail,
        instance=request.scope["path"],
        code=problem.code,
        request_id=request_id,
        sqlstate=problem.sqlstate,
        errors=[FieldError(**item) for item in problem.errors] if problem.errors else None,
    )
    return Response(body, status_code=problem.status, headers=problem.headers, media_type="application/problem+json")


def _name_choices(handler: Any, error: ValidationException) -> None:
    """Let what is said against parameters, of a handler or of what it depends on, say what could be chosen."""
    models = [part.signature_model for part in (handler, *handler.resolve_dependencies().values())]
    types = {field.name: field.type for model in models for field in msgspec.structs.fields(model)}
    for found in error.extra or []:
        if isinstance(found, dict) and found.get("key") in types:
            found["message"] += choices(found["message"], types[found["key"]])


def _media_type(header: str) -> str:
    return header.split(",")[0].split(";")[0].strip().lower()


def known_content(app: ASGIApp) -> ASGIApp:
    """Behind the guard: refuse bodies of another type than the route takes."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            check_content_type(scope)
        await app(scope, receive, send)

    return middleware


def check_content_type(scope: Any) -> None:
    """Refuse a body that is neither JSON nor MessagePack."""
    if scope["method"] not in {"POST", "PUT", "PATCH"}:
        return
    headers = dict(scope["headers"])
    empty = headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers
    if empty and b"content-type" not in headers and b"origin" not in headers:
        return  # no body; who needs one says so
    # no type is no JSON: a web page may send such a body, or none, anywhere without asking first
    header = headers.get(b"content-type", b"").decode("latin-1")
    # a route that answers with lines takes lines
    lines = scope["route_handler"].media_type == NDJSON
    allowed = {NDJSON} if lines else {"application/json", *MSGPACK_TYPES}
    if _media_type(header) not in allowed:
        wanted = NDJSON if lines else "application/json or application/msgpack"
        raise Problem("unsupported_media_type", f"Send {wanted}, not {header[:100]!r}.")


def as_id(text: str) -> uuid.UUID | None:
    """The id that a text is, or None: then it is a name or a key."""
    return uuid.UUID(text) if ID.fullmatch(text) else None


def page_size(limit: int | None, settings: Settings) -> int:
    """The size of a page: 100 unless asked otherwise, at most PGSHELF_MAX_PAGE."""
    if limit is not None and limit > settings.max_page:
        raise invalid("limit", f"at most {settings.max_page}")
    return limit or min(100, settings.max_page)


def cursor(moment: datetime, row_id: uuid.UUID) -> str:
    """Where a page ended, opaque to clients."""
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((moment.isoformat(), row_id.bytes))).decode().rstrip("=")


def position(after: str | None) -> tuple[datetime | None, uuid.UUID | None]:
    """What `cursor` wrote; nothing for the first page."""
    if after is None:
        return None, None
    try:
        moment, row_id = msgspec.msgpack.decode(
            base64.urlsafe_b64decode(after.encode("ascii") + b"=" * (-len(after) % 4)), type=tuple[str, bytes]
        )
        return datetime.fromisoformat(moment), uuid.UUID(bytes=row_id)
    except (ValueError, msgspec.DecodeError):
        raise invalid("after", "is not a cursor; send the `next` of the page before, unchanged") from None


def wanted_version(if_match: str | None) -> int | None:
    """The version that an If-Match names; ANY_VERSION for `*`, which asks that there be one."""
    if if_match is None:
        return None
    if if_match.strip() == "*":
        return ANY_VERSION
    tag = if_match.strip().removeprefix("W/").strip('"')
    if not (found := VERSION.fullmatch(tag)):
        raise invalid("If-Match", 'is not an ETag of pgshelf, such as "3"')
    return int(found[1])


def is_known(etag: str, if_none_match: str | None) -> bool:
    """Whether an If-None-Match names an ETag, weak or not (RFC 9110, 13.1.2); what is no list of them names none."""
    known = (if_none_match or "").strip()
    return known == "*" or etag in TAGS.findall(known)
