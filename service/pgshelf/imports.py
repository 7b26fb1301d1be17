"""Imports: a stream of documents in, a stream of results out, committed batch by batch and resumable by name."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Annotated, Any

import msgspec
import psycopg
import sqlalchemy
from litestar import Request, Router, post
from litestar.exceptions import InternalServerException
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, QueryParameter
from msgspec import UNSET, Meta, UnsetType

from pgshelf import access, bulk, consistency, database
from pgshelf.connections import Connection
from pgshelf.embedding import LibraryConfig, asked_again, library_config
from pgshelf.errors import Problem, invalid, problem_of
from pgshelf.http import NDJSON, Config, Duplex, Engine, LibraryName, problems
from pgshelf.idempotency import Audited, Once
from pgshelf.ingest import DocumentInput, checked
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.imports")
LEASE = timedelta(seconds=15)
BEAT = 5.0  # seconds between two renewals of the lease
BATCH_BYTES = 4 * 1024 * 1024  # of lines in one batch; what is made of them may be twice as much
BATCH_CHUNKS = 2000  # in one batch: some tenths of a second
ATTEMPTS = 8  # to write a batch that others cross, for nobody else can repeat it: 2.5 s of waits at most
PAUSE = 1.0  # seconds without a line after which what has come is committed
SHORT, LONG = 0.5, 2.0  # seconds; a batch that takes longer is followed by a smaller one
PIECE = 256 * 1024  # bytes that are unpacked at a time
BACKLOG = (
    4 * 1024 * 1024
)  # bytes of results that wait for a client which does not read; beyond it failures are only counted
DRAIN = 5.0  # seconds for which a client that is still sending is listened to after the end
DECODER = msgspec.json.Decoder(DocumentInput)

ImportWait = Annotated[
    bool | None,
    QueryParameter(
        description="Embed before a batch is committed (true), or leave it to the worker (false). If absent, the local "
        "embedder embeds at once, every other later."
    ),
]
ImportName = Annotated[
    str | None,
    HeaderParameter(
        name="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="Your name for this import: the same lines sent again go on behind those that are committed.",
    ),
]
Encoding = Annotated[str | None, HeaderParameter(name="Content-Encoding", description="`gzip`, or nothing.")]


class ImportFailure(msgspec.Struct, omit_defaults=True):
    """A line that was not written."""

    line: Annotated[int, Meta(description="Its number, 1 for the first.")]
    error: Annotated[bulk.DocumentProblem, Meta(description="Why.")]
    key: Annotated[str | None, Meta(description="The key of its document, where it could be read.")] = None


class ImportBatch(msgspec.Struct, omit_defaults=True):
    """A batch that is committed: whatever happens afterwards, its documents are stored."""

    lines: Annotated[tuple[int, int], Meta(description="Its first and its last line.")]
    created: Annotated[int, Meta(description="Documents that are new.")]
    replaced: Annotated[int, Meta(description="Documents whose key there was.")]
    pending: Annotated[int, Meta(description="How many of both wait for vectors.")]
    failed: Annotated[list[ImportFailure], Meta(description="Lines that were not written.")]
    unlisted: Annotated[
        int | UnsetType, Meta(description="Failures that are not listed, because the client does not read.")
    ] = UNSET


class ImportDone(msgspec.Struct, kw_only=True):
    """The last line of an import that came to its end."""

    done: Annotated[bool, Meta(description="True.")] = True
    lines: Annotated[int, Meta(description="All of them, empty ones included.")]
    skipped: Annotated[int, Meta(description="Lines that were committed under this Idempotency-Key before.")]
    created: Annotated[int, Meta(description="Documents that are new.")]
    replaced: Annotated[int, Meta(description="Documents whose key there was.")]
    pending: Annotated[int, Meta(description="How many of both wait for vectors.")]
    failed: Annotated[int, Meta(description="Lines that were not written.")]
    consistency_token: Annotated[
        str | UnsetType, Meta(description="For reads that shall see it; where there are replicas.")
    ] = UNSET


class ImportError(msgspec.Struct):
    """The last line of an import that broke off."""

    error: Annotated[bulk.DocumentProblem, Meta(description="Why.")]
    committed_lines: Annotated[int, Meta(description="Up to this line everything is committed.")]


class Lines:
    """Splits a body into lines, of which each may have `limit` bytes; keeps a checksum of all up to the last one."""

    def __init__(self, limit: int) -> None:
        self.limit, self.number, self.checksum = limit, 0, 0
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """The lines that `data` ends; None for one that is too long."""
        first, *others = data.split(b"\n")
        self._add(first)
        for part in others:
            yield self._take()
            self._add(part)

    def end(self) -> Iterator[bytes | None]:
        """The last line, if no newline ended it."""
        if self._size:
            yield self._take()

    def _add(self, part: bytes) -> None:
        self.checksum = zlib.crc32(part, self.checksum)
        self._size += len(part)
        if self._size <= self.limit:
            self._parts.append(part)
        else:
            self._parts.clear()

    def _take(self) -> bytes | None:
        line = b"".join(self._parts) if self._size <= self.limit else None
        self.checksum = zlib.crc32(b"\n", self.checksum)
        self.number += 1
        self._parts, self._size = [], 0
        return line


class Part(msgspec.Struct):
    """Lines that are committed together."""

    first: int
    last: int
    size: int = 0
    chunks: int = 0
    checksum: int = 0
    items: list[bulk.Item] = []


class Import:
    """One import of one runner."""

    def __init__(
        self,
        engine: sqlalchemy.Engine,
        settings: Settings,
        library: LibraryConfig,
        name: str | None,
        audited: Once,
        again: access.Again,
    ) -> None:
        self.engine, self.settings, self.library, self.name, self.audited = engine, settings, library, name, audited
        self.again = again
        self.wait = library.embedder["provider"] == "local"
        self.runner = uuid.uuid4()
        self.id: uuid.UUID | None = None
        self.committed, self.checksum = 0, 0  # what earlier runners have committed, then this one
        self.skipped = 0
        self.lines = Lines(settings.max_body_bytes)
        self.done = ImportDone(lines=0, skipped=0, created=0, replaced=0, pending=0, failed=0)
        self.size = settings.import_batch
        self._told: asyncio.Queue[bytes] = asyncio.Queue()
        self._backlog = 0

    async def begin(self) -> None:
        """Take the lease; a problem while another runner has it."""
        begin = "select import, lines, checksum from pgshelf.begin_import(%s, %s, %s, %s)"
        rows = await database.run(self.engine, begin, self.library.id, self.name, self.runner, LEASE)
        [(self.id, self.committed, self.checksum)] = rows
        self.skipped = self.committed

    async def results(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Import a body; gives the lines of the answer while it goes on."""
        run, beat = asyncio.create_task(self._run(body)), asyncio.create_task(self._live())
        try:
            while line := await self._told.get():
                self._backlog -= len(line)
                yield line
        finally:
            for task in (run, beat):
                task.cancel()
            await asyncio.gather(run, beat, return_exceptions=True)
            with contextlib.suppress(psycopg.Error, Problem):  # the lease ends by itself, a little later
                await database.run(self.engine, "select pgshelf.end_import(%s, %s)", self.id, self.runner)

    async def _live(self) -> None:
        """Keep the lease while the client takes its time."""
        live = "select pgshelf.continue_import(%s, %s, %s, null, null)"
        while True:
            await asyncio.sleep(BEAT)
            with contextlib.suppress(psycopg.Error, Problem):  # the next batch meets the same, and says so
                await database.run(self.engine, live, self.id, self.runner, LEASE)

    async def _run(self, body: AsyncIterator[bytes]) -> None:
        try:
            try:
                await self._write_all(body)
                self.done.lines, self.done.skipped = self.lines.number, self.skipped
                self.done.consistency_token = consistency.newest() or UNSET
                self._tell(self.done)
            except InternalServerException:
                raise  # the client is gone
            except Exception as error:
                problem = problem_of(error)
                known = problem.code != "internal_error"
                level = logging.ERROR if problem.status >= 500 else logging.INFO
                log.log(level, "an import broke off: %s: %s", problem.code, error, exc_info=None if known else error)
                self._tell(ImportError(bulk.told(problem), self.committed))
                # a client that sends everything before it reads shall find the answer
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(DRAIN):
                        async for _ in body:
                            pass
        finally:
            self._told.put_nowait(b"")

    async def _write_all(self, body: AsyncIterator[bytes]) -> None:
        """Read and check the next part while the last one is written, and no further."""
        writing: asyncio.Task[None] | None = None
        try:
            async for part in self._parts(body):
                if writing:
                    await writing
                writing = asyncio.create_task(self._write(part))
            if writing:
                await writing
        finally:
            if writing:
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)

    async def _parts(self, body: AsyncIterator[bytes]) -> AsyncIterator[Part]:
        part = Part(self.committed + 1, self.committed, items=[])
        reading: asyncio.Task[bytes] | None = None
        try:
            while True:
                reading = reading or asyncio.ensure_future(anext(body, b""))
                done, _ = await asyncio.wait({reading}, timeout=PAUSE if part.last >= part.first else None)
                if not done:
                    yield part
                    part = Part(part.last + 1, part.last, items=[])
                    continue
                data, reading = reading.result(), None
                for line in self.lines.feed(data) if data else self.lines.end():
                    if self.lines.number <= self.skipped:
                        self._check_skipped()
                        continue
                    await self._add(part, line)
                    if self._full(part):
                        yield part
                        part = Part(part.last + 1, part.last, items=[])
                if not data:
                    break
            if self.lines.number < self.skipped:
                raise self._differs()
            if part.last >= part.first:
                yield part
        finally:
            if reading:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    def _full(self, part: Part) -> bool:
        return part.last - part.first + 1 >= self.size or part.size >= BATCH_BYTES or part.chunks >= BATCH_CHUNKS

    def _check_skipped(self) -> None:
        if self.lines.number == self.skipped and self.lines.checksum != self.checksum:
            raise self._differs()

    def _differs(self) -> Problem:
        detail = f"The first {self.skipped} lines are not those that were committed under this Idempotency-Key. "
        return Problem(
            "import_differs", detail + "Nothing of this request was written. Use another key for other data."
        )

    async def _add(self, part: Part, line: bytes | None) -> None:
        part.last, part.checksum = self.lines.number, self.lines.checksum
        if line is not None and not line.strip():
            return
        item = bulk.Item(part.last - part.first)
        part.items.append(item)
        try:
            if line is None:
                detail = f"The line has more than {self.lines.limit} bytes (PGSHELF_MAX_BODY_BYTES)."
                raise Problem("body_too_large", detail)
            part.size += len(line)
            document = _decoded(line)
            item.key = document.key
            item.prepared = await checked(self.library, self.settings, document)
            part.chunks += len(item.prepared.texts)
        except Exception as error:
            problem = problem_of(error)
            if problem.status not in bulk.OWN_STATUSES:
                raise
            item.refuse(problem)

    async def _write(self, part: Part) -> None:
        started = asyncio.get_running_loop().time()
        again = False

        async def embed_and_write() -> None:
            nonlocal again
            if again:  # the library has another embedder than it had
                self.library = await library_config(self.engine, str(self.library.id))
                bulk.forget_made(part.items)
            again = True
            if self.wait:
                # a provider that fails leaves the texts to the worker
                await bulk.embed_new(self.engine, self.settings, self.library, part.items)
            await self.again(str(self.library.id))  # the body may have come for hours
            await bulk.without_refused(lambda: database.retried(self.engine, write, written=True, attempts=ATTEMPTS))

        # a batch is bounded, so it may take what it takes: rows go slowly into an index that is there
        going_on = "select set_config('statement_timeout', '0', true), pgshelf.continue_import(%s, %s, %s, %s, %s)"

        async def write(connection: Connection) -> None:
            await database.rows(connection, going_on, self.id, self.runner, LEASE, part.last, part.checksum)
            await bulk.write(connection, self.library, part.items)
            self.audited.note(count=sum(item.problem is None for item in part.items))
            await self.audited.record(connection)

        await asked_again(embed_and_write)
        self.committed = part.last
        took = asyncio.get_running_loop().time() - started
        if took > LONG:
            self.size = max(1, self.size // 2)
        elif took < SHORT:
            self.size = min(self.settings.import_batch, self.size * 2)
        self._tell(self._result(part))

    def _result(self, part: Part) -> ImportBatch:
        failed = [
            ImportFailure(part.first + item.place, bulk.told(item.problem), item.key)
            for item in part.items
            if item.problem
        ]
        written = [item for item in part.items if item.problem is None]
        created = sum(item.created for item in written)
        pending = sum(item.pending > 0 for item in written)
        result = ImportBatch((part.first, part.last), created, len(written) - created, pending, failed)
        if failed and self._backlog > BACKLOG:
            result.failed, result.unlisted = [], len(failed)
        self.done.created += result.created
        self.done.replaced += result.replaced
        self.done.pending += pending
        self.done.failed += len(failed)
        return result

    def _tell(self, result: msgspec.Struct) -> None:
        line = msgspec.json.encode(result) + b"\n"
        self._backlog += len(line)
        self._told.put_nowait(line)


def _decoded(line: bytes) -> DocumentInput:
    try:
        return DECODER.decode(line)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        raise Problem("invalid_json", f"The line could not be decoded: {error}.") from None


async def _body(request: Request[Any, Any, Any]) -> AsyncIterator[bytes]:
    async for data in request.stream():
        if data:
            yield data


async def unpacked(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What was packed by gzip, in one or several members, a bounded piece at a time."""
    unpacker = zlib.decompressobj(wbits=31)
    begun = False
    async for data in body:
        while data:
            begun = True
            try:
                piece = unpacker.decompress(data, PIECE)
            except zlib.error as error:
                raise invalid("body", f"is not what gzip makes: {error}") from None
            data = unpacker.unconsumed_tail
            if unpacker.eof:
                data, unpacker, begun = unpacker.unused_data, zlib.decompressobj(wbits=31), False
            if piece:
                yield piece
    if begun:
        raise invalid("body", "ends in the middle of what gzip made")


@post(
    "/libraries/{library:str}/import",
    status_code=200,
    request_max_body_size=None,
    media_type=NDJSON,
    responses={
        200: ResponseSpec(
            ImportBatch,
            generate_examples=False,
            media_type=NDJSON,
            description="A line for each batch, and an `ImportDone` or `ImportError`",
        ),
        **problems(404, 409, 413, 415),
    },
    summary="Import documents",
    operation_id="importDocuments",
)
async def import_documents(
    library: LibraryName,
    request: Request[Any, Any, Any],
    engine: Engine,
    settings: Config,
    audited: Audited,
    wait: ImportWait = None,
    name: ImportName = None,
    encoding: Encoding = None,
) -> Duplex:
    """Import a stream of any length, a document in each line; a line of the answer for each batch that is committed."""
    if encoding not in (None, "identity", "gzip"):
        raise Problem(
            "unsupported_media_type", f"Send the lines as they are or packed by gzip, not {encoding[:100]!r}."
        )
    run = Import(engine, settings, await library_config(engine, library), name, audited, access.again(request))
    if wait is not None:
        run.wait = wait and run.library.embedder["provider"] != "none"
    await run.begin()
    body = _body(request)
    return Duplex(run.results(unpacked(body) if encoding == "gzip" else body))


router = Router("/", route_handlers=[import_documents], tags=["documents"])
