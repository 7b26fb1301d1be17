"""The change feed of a library: in pages, by waiting for the next change, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from types import FrameType
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
import psycopg
import sqlalchemy
from litestar import Request, Router, get
from litestar.di import NamedDependency
from litestar.params import HeaderParameter, QueryParameter, SkipValidation
from litestar.response import Stream
from msgspec import UNSET, Meta, UnsetType

from pgshelf import access, database
from pgshelf.errors import Problem, invalid, problem_of
from pgshelf.http import Answer, Config, Engine, LibraryName, Limit, page_size, problems
from pgshelf.settings import Settings
from pgshelf.timing import stage

HEARTBEAT = 15.0  # seconds; proxies close what is silent for long
EVENT_STREAM = "text/event-stream"
NOW = "now"

Cursor = Annotated[
    str | None,
    QueryParameter(
        max_length=100,
        description="The `next` of the page before, or the `cursor` of a change: what came behind it. `now`: nothing "
        "that has happened already. If absent, from the oldest change that is kept.",
    ),
]
Seconds = Annotated[
    float,
    QueryParameter(
        ge=0,
        description="Seconds to wait for a change if there is none yet, at most PGSHELF_CHANGES_MAX_WAIT (60).",
    ),
]
LastEvent = Annotated[
    str | None,
    HeaderParameter(name="Last-Event-ID", max_length=100, description="For event streams: goes before `after`."),
]


class Change(msgspec.Struct):
    """Something that was committed."""

    cursor: Annotated[str, Meta(description="Its place; send it as `after` for what comes behind it.")]
    kind: Annotated[
        Literal["put", "delete", "embedded", "library"],
        Meta(
            description="`put`: a document or its chunks are new or changed. `delete`: a document is gone. `embedded`: "
            "chunks that waited for their vectors are found now. `library`: what searches say may have changed for all "
            "documents, as by another index."
        ),
    ]
    version: Annotated[int, Meta(description="Of the document then, or of the library.")]
    at: Annotated[datetime, Meta(description="When it came into the feed.")]
    document_id: Annotated[UUID | UnsetType, Meta(description="The document, unless it is about the library.")] = UNSET
    key: Annotated[str | UnsetType | None, Meta(description="The key of the document, if it has one.")] = UNSET
    created: Annotated[bool | UnsetType, Meta(description="With `put`: whether the document is new.")] = UNSET


class Changes(msgspec.Struct):
    """A page of the feed."""

    items: Annotated[list[Change], Meta(description="In the order in which they were committed.")]
    next: Annotated[str, Meta(description="Always there: send it as `after` to go on, now or later.")]


START = "select (l).id, pgshelf.stamp_changes((l).id, true) from (select pgshelf.library_named(%s) as l) x"
STAMP = "select pgshelf.stamp_changes(%s, true)"
LAST = "select coalesce(max(c.position), 0) from pgshelf.change_log c where c.library_id = %s"
FIRST = "select coalesce(min(c.position), 1) - 1 from pgshelf.change_log c where c.library_id = %s"
READ = """select c.position, c.kind, c.version, c.stamped_at, c.document_id, c.key, c.created
from pgshelf.read_changes(%s, %s, %s) c order by c.position"""
LOOK = "select library_id, last from pgshelf.look_for_changes(%s)"


class Readers:
    """Readers of this process that wait for changes: one question at a time for all of them, and no connection held.

    They are asked for by polling: a NOTIFY in each writer's commit would make all commits wait for each other.
    """

    def __init__(self, engine: sqlalchemy.Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.ended = False
        self.count = 0
        self._waiting: dict[UUID, dict[asyncio.Event, int]] = {}
        self._some = asyncio.Event()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Count a reader; there are no more than PGSHELF_CHANGES_READERS."""
        self.check()
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1

    def check(self) -> None:
        """Refuse one reader too many."""
        if self.count >= self.settings.changes_readers:
            raise Problem("too_many_readers", "Ask again without `wait`, or raise PGSHELF_CHANGES_READERS.")

    async def wait(self, library: UUID, after: int, seconds: float) -> None:
        """Until the library has a change behind `after` or is gone, the time is over, or the process shall end."""
        if self.ended:
            return
        woken = asyncio.Event()
        self._waiting.setdefault(library, {})[woken] = after
        self._some.set()
        try:
            async with asyncio.timeout(seconds):
                await woken.wait()
        except TimeoutError:
            pass
        finally:
            del self._waiting[library][woken]
            if not self._waiting[library]:
                del self._waiting[library]
            if not self._waiting:
                self._some.clear()

    def end(self) -> None:
        """Let all of them go."""
        self.ended = True
        for waiting in self._waiting.values():
            for woken in waiting:
                woken.set()

    async def look(self) -> None:
        """Wake those whose libraries have changed, as long as somebody waits."""
        while True:
            await self._some.wait()
            with contextlib.suppress(Problem, psycopg.Error):  # the database is away: they wait on
                last: dict[UUID, int] = dict(await database.run(self.engine, LOOK, list(self._waiting)))
                for library, waiting in self._waiting.items():
                    for woken, after in waiting.items():
                        if last.get(library, after + 1) > after:
                            woken.set()
            await asyncio.sleep(self.settings.changes_interval)


@contextlib.asynccontextmanager
async def waking(readers: Readers) -> AsyncIterator[None]:
    """Wake readers while the block runs. A server that is told to stop waits for its requests: so they end then."""
    task = asyncio.create_task(readers.look(), name="pgshelf changes")
    try:
        with _told_to_stop(readers.end):
            yield
    finally:
        readers.end()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@contextlib.contextmanager
def _told_to_stop(tell: Any) -> Iterator[None]:
    """Call `tell` in the event loop when SIGTERM or SIGINT comes, and leave the rest to whoever listened before."""
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {}

    def told(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(tell)
        if callable(before[number]):
            before[number](number, frame)

    # handlers of a loop are not replaced: it learns of signals by another way
    numbers = [int(signal.SIGTERM), int(signal.SIGINT)] if threading.current_thread() is threading.main_thread() else []
    for number in numbers:
        before[number] = signal.getsignal(number)
        if callable(before[number]):  # else nobody would end the process
            signal.signal(number, told)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is told:
                signal.signal(number, handler)


Waiting = NamedDependency[SkipValidation[Readers]]


@get(
    "/libraries/{library:str}/changes",
    responses=problems(404, 410),
    response_description="The next changes, perhaps none yet",
    summary="Follow the changes of a library",
    operation_id="listChanges",
)
async def list_changes(
    library: LibraryName,
    request: Request[Any, Any, Any],
    engine: Engine,
    settings: Config,
    readers: Waiting,
    limit: Limit = None,
    after: Cursor = None,
    wait: Seconds = 0.0,
    last_event_id: LastEvent = None,
) -> Answer[Changes] | Stream:
    """Give the changes of a library in the order of their commits, each once to whoever keeps the cursor.

    With `Accept: text/event-stream` it does not end: every change is an event named by its kind, with its cursor as id.
    A cursor whose changes are not kept any more is answered with 410: begin anew, from an export.
    """
    size = page_size(limit, settings)
    streaming = EVENT_STREAM in request.headers.get("accept", "")
    library_id = (await database.run(engine, START, library))[0][0]
    since = last_event_id if streaming and last_event_id else after
    if since is None or since == NOW:
        known = (await database.run(engine, FIRST if since is None else LAST, library_id))[0][0]
    else:
        known = _position(since, library_id)
    items, position = await _read(engine, library_id, known, size)
    if streaming:
        readers.check()
        return Stream(
            _events(readers, access.again(request), library_id, items, position, size),
            media_type=EVENT_STREAM,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    if not items and wait > 0:
        until = time.monotonic() + min(wait, settings.changes_max_wait)
        with readers.place():
            while not items and not readers.ended and (left := until - time.monotonic()) > 0:
                with stage("wait"):
                    await readers.wait(library_id, position, left)
                await access.again(request)(str(library_id))
                items, position = await _look_again(engine, library, library_id, position, size)
    return Answer(Changes(items, _cursor(position, library_id)), status_code=200)


async def _look_again(
    engine: sqlalchemy.Engine, library: str, library_id: UUID, position: int, size: int
) -> tuple[list[Change], int]:
    """As `_read`, for one who has waited: the library may be gone."""
    await database.run(engine, START, library)
    return await _read(engine, library_id, position, size)


async def _read(engine: sqlalchemy.Engine, library_id: UUID, after: int, size: int) -> tuple[list[Change], int]:
    """The changes behind a position, and the position that the last of them has."""
    rows = await database.run(engine, READ, library_id, after, size)
    return [_change(row, library_id) for row in rows], rows[-1][0] if rows else after


async def _events(
    readers: Readers, again: access.Again, library_id: UUID, items: list[Change], position: int, size: int
) -> AsyncIterator[bytes]:
    """Server-sent events, until the client or the library goes, the client's key ends, or the process shall end.

    The key is looked at before each look for changes: whoever has none any more is not told of them.
    """
    with readers.place():
        yield b": from here\n\n"
        try:
            while True:
                for item in items:
                    yield _event(item.cursor, item.kind, msgspec.json.encode(item))
                if readers.ended:
                    return
                if not items:
                    await readers.wait(library_id, position, HEARTBEAT)
                await again(str(library_id))
                await database.run(readers.engine, START, str(library_id))
                items, position = await _read(readers.engine, library_id, position, size)
                if not items:
                    yield b": nothing yet\n\n"
        except (Problem, psycopg.Error) as error:
            problem = problem_of(error)
            said = {"code": problem.code, "status": problem.status, "detail": problem.detail}
            yield _event(None, "error", msgspec.json.encode(said))


def _event(cursor: str | None, name: str, data: bytes) -> bytes:
    identity = f"id: {cursor}\n" if cursor else ""
    return f"{identity}event: {name}\ndata: ".encode() + data + b"\n\n"


def _change(row: tuple[Any, ...], library_id: UUID) -> Change:
    position, kind, version, at, document_id, key, created = row
    change = Change(_cursor(position, library_id), kind, version, at)
    if document_id is not None:
        change.document_id, change.key = document_id, key
    if created is not None:
        change.created = created
    return change


def _cursor(position: int, library_id: UUID) -> str:
    """A place in the feed of a library, opaque to clients."""
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((position, library_id.bytes))).decode().rstrip("=")


def _position(cursor: str, library_id: UUID) -> int:
    """What `_cursor` wrote."""
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        position, owner = msgspec.msgpack.decode(base64.urlsafe_b64decode(padded), type=tuple[int, bytes])
    except (ValueError, msgspec.DecodeError):
        raise invalid("after", "is not a cursor of changes; send `next` of a page, unchanged, or `now`") from None
    if owner != library_id.bytes or not 0 <= position < 2**63:
        raise invalid("after", "is a cursor of another library")
    return position


router = Router("/", route_handlers=[list_changes], tags=["changes"])
