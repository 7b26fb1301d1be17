"""Bodies: a client that sends nothing, or next to nothing, is not waited for without end; short ones come meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from litestar.enums import ScopeType

from pgshelf.errors import Problem
from pgshelf.http import NDJSON
from pgshelf.settings import Settings
from pgshelf.timing import stage

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Receive, Scope, Send

PACE = 1000  # bytes a second; what comes faster may take as long as it takes


def patience(settings: Settings) -> Callable[[ASGIApp], ASGIApp]:
    """A middleware behind routing: bodies are waited for as `patient` does it."""

    def middleware(app: ASGIApp) -> ASGIApp:
        async def impatient(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == ScopeType.HTTP:
                handler: Any = scope["route_handler"]
                length = next((int(value) for name, value in scope["headers"] if name == b"content-length"), None)
                receive = patient(receive, settings.body_timeout, stream=handler.media_type == NDJSON, length=length)
            await app(scope, receive, send)

        return impatient

    return middleware


@contextlib.contextmanager
def early(receive: Receive) -> Iterator[Receive]:
    """A `receive` whose first part is asked for at once: it comes while the block waits for something else."""
    first, taken = asyncio.create_task(_first(receive)), False
    first.add_done_callback(_noticed)

    async def receive_next() -> Any:
        nonlocal taken
        if taken:
            return await receive()
        taken = True
        return await first

    try:
        yield receive_next
    finally:
        if not taken:
            first.cancel()


def late(receive: Receive, seconds: float, judge: Callable[[], Awaitable[None]]) -> Receive:
    """A `receive` that asks `judge` before the end of a body that has taken longer."""
    begun, ended = time.monotonic(), False

    async def judged() -> Any:
        nonlocal ended
        message = await receive()
        if not ended and message["type"] == "http.request" and not message.get("more_body", False):
            ended = True
            if time.monotonic() - begun > seconds:
                await judge()
        return message

    return judged


def once_more(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, in one part, and then goes on."""
    given = False

    async def receive_next() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_next


async def _first(receive: Receive) -> Any:
    return await receive()


def _noticed(asked: asyncio.Task[Any]) -> None:
    """What went wrong with a part that nobody wanted is no news."""
    if not asked.cancelled():
        asked.exception()


def patient(receive: Receive, seconds: float, *, stream: bool = False, length: int | None = None) -> Receive:
    """A `receive` that gives up when nothing has come for so long, or, but for a stream, too little in all.

    Once the body is there it waits as long as it is asked to: then only the end of the connection can come. Where the
    `length` of the body was told its last part says that it is the last: granian says so in an empty one behind it.
    """
    begun: float | None = None
    came, ended = 0, False

    async def wait() -> Any:
        nonlocal begun, came, ended
        if ended:
            return await receive()
        now = time.monotonic()
        begun = begun or now
        left = seconds if stream else min(seconds, begun + seconds + came / PACE - now)
        try:
            with stage("receive"):
                async with asyncio.timeout(left):
                    message = await receive()
        except TimeoutError:
            detail = f"Only {came} bytes of the body came, then nothing for too long. Send it faster, or in parts."
            raise Problem("request_timeout", detail) from None
        if message["type"] == "http.request":
            came += len(message.get("body", b""))
            if came == length:
                message["more_body"] = False
        ended = not message.get("more_body", False)
        return message

    return wait
