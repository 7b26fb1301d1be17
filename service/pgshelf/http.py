"""What every request shares: strict bodies, answers in JSON or MessagePack, problems, request ids, timings, pages."""

from __future__ import annotations

import base64
import logging
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import nullcontext
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar
from urllib.parse import unquote

import msgspec
from litestar import Request, Response
from litestar.config.cors import CORSConfig
from litestar.di import NamedDependency
from litestar.dto import AbstractDTO
from litestar.enums import MediaType, ScopeType
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, PathParameter, QueryParameter, SkipValidation
from litestar.response.streaming import ASGIStreamingResponse
from litestar.serialization import default_serializer, encode_msgpack
from sqlalchemy.ext.asyncio import AsyncEngine

from pgshelf import consistency, logs
from pgshelf.database import Source
from pgshelf.errors import Problem, invalid, problem_of
from pgshelf.settings import Settings, listed
from pgshelf.timing import notes, stage, stages

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

    from pgshelf.tracing import Traces

log = logging.getLogger("pgshelf")
T = TypeVar("T")
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# What parses as a UUID, as pgshelf.is_id says it in SQL: such a text is an id, never a name or a key.
ID = re.compile(
    r"([0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12})|\{[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12}\}", re.I
)
ANY_VERSION = -1
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
MSGPACK_TYPES = {"application/msgpack", "application/x-msgpack", "application/vnd.msgpack"}
NDJSON = "application/x-ndjson"

Engine = NamedDependency[SkipValidation[AsyncEngine]]
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
        schema_extra={"pattern": r'^(\*|(W/)?"[0-9]{1,18}")$'},  # wanted_version says it better than a pattern can
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
        model: Any = request.route_handler.parsed_data_field.annotation
        with stage("decode"):
            return decoded(request.headers.get("content-type", ""), value, model)


def decoded(content_type: str, body: bytes, model: type[T]) -> T:
    """A body as what a struct says of it."""
    if _media_type(content_type) in MSGPACK_TYPES:
        return msgspec.msgpack.decode(body, type=model)
    return msgspec.json.decode(body, type=model)


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
        return encode_msgpack(msgspec.json.decode(content) if isinstance(content, msgspec.Raw) else content, enc_hook)


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


def _media_type(header: str) -> str:
    return header.split(",")[0].split(";")[0].strip().lower()


class Served(msgspec.Struct, frozen=True):
    """A request that was answered, as metrics and log lines may tell of it."""

    method: str
    route: str  # the template, not the address: names and keys are the client's, and there is no end of them
    status: int
    stages: dict[str, float]  # milliseconds, `total` among them
    problem: str | None  # its code
    notes: dict[str, str]  # how it was done


TRACE = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, level 1


class Edge:
    """Wraps the application: routes on the path as it was sent, checks the content type, adds ids and timings."""

    def __init__(self, app: ASGIApp, observe: Callable[[Served], None], traces: Traces | None = None) -> None:
        self.app, self.observe, self.traces = app, observe, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self.app(scope, receive, send)
            return
        started, spent, told = time.perf_counter(), dict[str, float](), dict[str, str]()
        stages.set(spent)
        consistency.committed.set([])
        notes.set(told)
        headers = dict(scope["headers"])
        sent = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if REQUEST_ID.fullmatch(sent) else os.urandom(16).hex()
        scope["pgshelf_request_id"] = request_id  # type: ignore[typeddict-unknown-key]  # ASGI scopes are open
        # keys may hold "/" as %2F, so routing must see the path undecoded; decode_path does the rest
        if raw := scope.get("raw_path"):
            scope["path"] = raw.split(b"?")[0].decode("latin-1")

        # HEAD is GET without the body; Litestar knows it only where a handler names it
        head = scope["method"] == "HEAD"
        if head:
            scope["method"] = "GET"

        known: Any = scope
        status = 499  # the client went away before there was an answer

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                told_of = {"X-Request-Id": request_id, **known.get("pgshelf_headers", {})}
                if token := consistency.newest():
                    told_of[consistency.TOKEN] = token
                spent["total"] = (time.perf_counter() - started) * 1000
                told_of["Server-Timing"] = ", ".join(f"{name};dur={ms:.2f}" for name, ms in spent.items())
                message["headers"] = _headers(message["headers"], told_of)
            elif head and message["type"] == "http.response.body":
                message["body"] = b""
            await send(message)

        method = "HEAD" if head else scope["method"] if scope["method"] in METHODS else "other"
        with self.traces.request(method, headers) if self.traces else nullcontext() as span:
            ids = {"request_id": request_id}
            if self.traces and span:
                ids["trace_id"] = self.traces.trace_id(span)
            elif trace := TRACE.fullmatch(headers.get(b"traceparent", b"").decode("latin-1")):
                ids["trace_id"] = trace[1]
            with logs.bind(**ids):
                try:
                    await self.app(scope, receive, answer)
                finally:
                    spent["total"] = (time.perf_counter() - started) * 1000
                    route, problem = scope.get("path_template") or "none", str(scope.get("pgshelf_problem", "")) or None
                    if self.traces and span:
                        known = {"request_id": request_id, **({"problem": problem} if problem else {}), **told}
                        self.traces.answered(span, method, route, status, known)
                    self.observe(Served(method, route, status, spent, problem, told))


def _headers(answered: Iterable[tuple[bytes, bytes]], told: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Those of an answer, with ours behind; where GET is allowed, so is HEAD."""
    allowed = ((name, value + b", HEAD" if name == b"allow" and b"GET" in value else value) for name, value in answered)
    return [*allowed, *((name.lower().encode(), value.encode("latin-1")) for name, value in told.items())]


def decode_path(app: ASGIApp) -> ASGIApp:
    """Behind routing: percent-decode path parameters once."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            if scope["method"] == "OPTIONS":
                await _options(scope, receive, send)
                return
            if len(scope["path"]) > 1 and scope.get("raw_path", b"").split(b"?")[0].endswith(b"/"):
                # Litestar would take it for the address without the slash: ".../documents/.." for the library
                raise Problem("route_not_found", "No address ends in a slash; /schema lists them.")
            try:
                scope["path_params"] = {
                    name: unquote(value, errors="strict") if isinstance(value, str) else value
                    for name, value in scope["path_params"].items()
                }
            except UnicodeDecodeError:
                raise invalid("path", "is not valid UTF-8 behind its percent-encoding") from None
        await app(scope, receive, send)

    return middleware


def known_content(app: ASGIApp) -> ASGIApp:
    """Behind the guard: refuse bodies of another type than the route takes."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == ScopeType.HTTP:
            check_content_type(scope)
        await app(scope, receive, send)

    return middleware


EXPOSED = ("ETag", "Location", "Server-Timing", "WWW-Authenticate", "X-Request-Id")


def cors(settings: Settings) -> CORSConfig | None:
    """Which web pages of other origins may call; none unless PGSHELF_CORS_ORIGINS names them."""
    origins = listed(settings.cors_origins)
    if not origins:
        return None
    return CORSConfig(
        allow_origins=origins,
        allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
        allow_headers=[
            "Authorization",
            "Cache-Control",
            "Content-Type",
            "If-Match",
            "Idempotency-Key",
            "X-Request-Id",
            consistency.LEVEL,
            consistency.TOKEN,
        ],
        expose_headers=[*EXPOSED, "Retry-After", "RateLimit", "RateLimit-Policy", consistency.TOKEN],
    )


async def _options(scope: Any, receive: Receive, send: Send) -> None:
    """All methods of an address: Litestar's own answer knows those of one handler only."""
    routes = [route for route in scope["litestar_app"].routes if route.path_format == scope["path_template"]]
    allow = ", ".join(sorted({method for route in routes for method in route.methods}))
    headers: list[tuple[bytes, bytes]] = [(b"allow", allow.encode())]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def check_content_type(scope: Any) -> None:
    """Refuse a body that is neither JSON nor MessagePack."""
    if scope["method"] not in {"POST", "PUT", "PATCH"}:
        return
    headers = dict(scope["headers"])
    if headers.get(b"content-length", b"0") == b"0" and b"transfer-encoding" not in headers:
        return  # no body; who needs one says so
    # no type is no JSON: a web page may send such a body anywhere without asking first
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
    if not re.fullmatch(r"[0-9]{1,18}", tag):
        raise invalid("If-Match", 'is not an ETag of pgshelf, such as "3"')
    return int(tag)
