"""The reconciler: compares what is wanted with what is there. It may be killed at any instruction."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from pgshelf import database
from pgshelf.embedders import EmbedderError, EmbedderUnavailable, TextRefused
from pgshelf.embedding import embedder_of, store
from pgshelf.errors import Problem
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.worker")
CLAIM = "select library_id, embedder, chunk_id, text, attempts from pgshelf.claim_pending(%s, %s)"
# psycopg has no infinite datetime, so the moment is made in SQL: never, or in some seconds
FAIL = """select pgshelf.fail_embeddings(%s, %s, %s,
  case when %s then 'infinity'::timestamptz else now() + make_interval(secs => %s::float8) end)"""


async def embed_pending(engine: AsyncEngine, settings: Settings) -> int:
    """Claim a batch of pending chunks of one library, embed it, store it; returns how many chunks were claimed."""
    lease = timedelta(seconds=settings.worker_lease)
    claimed = await database.run(engine, CLAIM, settings.embed_batch, lease)
    if not claimed:
        return 0
    library, choice = claimed[0][0], claimed[0][1]
    try:
        await _embed(engine, settings, library, choice, claimed)
    except Problem as error:  # the library asks for an embedder that this server has not
        await _fail(engine, settings, library, claimed, error.detail, final=False)
    return len(claimed)


async def _embed(
    engine: AsyncEngine, settings: Settings, library: UUID, choice: dict[str, Any], claimed: list[tuple[Any, ...]]
) -> None:
    embedder, rest = embedder_of(choice), list(claimed)
    while rest:
        texts = [row[3] for row in rest]
        try:
            vectors = await embedder.embed(texts, "document")
        except TextRefused as error:  # one text spoils no other
            await _fail(engine, settings, library, [rest.pop(error.index)], str(error), final=True)
            continue
        except EmbedderError as error:
            wait = error.retry_after if isinstance(error, EmbedderUnavailable) else None
            await _fail(engine, settings, library, rest, str(error), final=False, wait=wait)
            return
        await store(engine, library, [row[2] for row in rest], texts, vectors)
        return


async def _fail(
    engine: AsyncEngine,
    settings: Settings,
    library: UUID,
    chunks: list[tuple[Any, ...]],
    error: str,
    *,
    final: bool,
    wait: float | None = None,
) -> None:
    """Put the reason on the chunks: try again later, with a growing and jittered wait, or give up."""
    attempts = max(row[4] for row in chunks)
    final = final or attempts >= settings.worker_attempts
    delay = wait if wait is not None else min(300.0, 2.0**attempts) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
    log.warning("embedding %d chunks failed (attempt %d): %s", len(chunks), attempts, error)
    await database.run(engine, FAIL, library, [row[2] for row in chunks], error[:2000], final, delay)


async def reap(engine: AsyncEngine, _: Settings) -> int:
    """Take away a batch of what deleted libraries left."""
    return int((await database.run(engine, "select pgshelf.reap_deleted()"))[0][0])


async def reconcile(engine: AsyncEngine, settings: Settings) -> bool:
    """One round of everything; tells whether there was something to do."""
    busy = False
    for step in (embed_pending, reap):
        try:
            busy = bool(await step(engine, settings)) or busy
        except Exception as error:
            # whatever it was, the rows still say what is wanted: the next round meets them again
            log.warning("reconciling failed, trying again: %s", error, exc_info=not isinstance(error, Problem))
            busy = False
    return busy


async def _forever(engine: AsyncEngine, settings: Settings) -> None:
    while True:
        if not await reconcile(engine, settings):
            # jitter keeps several processes from asking in step
            await asyncio.sleep(settings.worker_interval * random.uniform(0.75, 1.25))  # noqa: S311 - jitter


@contextlib.asynccontextmanager
async def running(engine: AsyncEngine, settings: Settings) -> AsyncIterator[None]:
    """Reconcile in the background while the block runs."""
    task = asyncio.create_task(_forever(engine, settings), name="pgshelf worker") if settings.worker_enabled else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
