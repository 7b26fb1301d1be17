"""The edge of the application: what it does to every request before routing and behind it, and to every answer."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec
from litestar.config.cors import CORSConfig
from litestar.enums import ScopeType

from pgshelf import consistency, logs
from pgshelf.errors import Problem, invalid
from pgshelf.settings import Settings, listed
from pgshelf.timing import notes, stages

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

    from pgshelf.tracing import Traces

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
TRACE = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")  # W3C Trace Context, level 1
# what is asked of many documents, by POST, has the address of a document of that key
SHARED = re.compile(r"(.*/libraries/[^/]+/documents/)(batch|delete|query|update)(/.*)?")
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class Served(msgspec.Struct, frozen=True):
    """A request that was answered, as metrics and log lines may tell of it."""

    method: str
    route: str  # the template, not the address: names and keys are the client's, and there is no end of them
    status: int
    stages: dict[str, float]  # milliseconds, `total` among them
    problem: str | None  # its code
    notes: dict[str, str]  # how it was done


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
        scope["path"] = path = _sent_path(scope)

        # HEAD is GET without the body; Litestar knows it only where a handler names it
        head = scope["method"] == "HEAD"
        if head:
            scope["method"] = "GET"
        if (shared := SHARED.fullmatch(path)) and (shared[3] or scope["method"] in {"GET", "PUT", "PATCH", "DELETE"}):
            # with a letter encoded it is routed as any other key
            scope["path"] = f"{shared[1]}%{ord(shared[2][0]):02x}{shared[2][1:]}{shared[3] or ''}"

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


def _sent_path(scope: Scope) -> str:
    raw = scope.get("raw_path")
    return raw.split(b"?")[0].decode("latin-1") if raw else scope["path"]


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
            scope["path"] = _sent_path(scope)
            if len(scope["path"]) > 1 and scope["path"].endswith("/"):
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


async def _options(scope: Any, receive: Receive, send: Send) -> None:
    """All methods of an address: Litestar's own answer knows those of one handler only."""
    templates = {scope["path_template"], SHARED.sub(r"\1{document}", scope["path_template"])}
    routes = [route for route in scope["litestar_app"].routes if route.path_format in templates]
    allow = ", ".join(sorted({method for route in routes for method in route.methods}))
    headers: list[tuple[bytes, bytes]] = [(b"allow", allow.encode())]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


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
            "If-None-Match",
            "Idempotency-Key",
            "X-Request-Id",
            consistency.LEVEL,
            consistency.TOKEN,
        ],
        expose_headers=[*EXPOSED, "Retry-After", "RateLimit", "RateLimit-Policy", consistency.TOKEN],
    )
