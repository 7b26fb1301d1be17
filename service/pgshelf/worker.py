"""The reconciler: compares what is wanted with what is there. It may be killed at any instruction."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
from sqlalchemy.ext.asyncio import AsyncEngine

from pgshelf import database, embedding_cache, shelves
from pgshelf.embedders import Embedder, EmbedderError, EmbedderUnavailable, TextRefused
from pgshelf.embedding import embedder_of, store, text_hash, vectors_of
from pgshelf.errors import Problem, problem_of
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.worker")
CLAIM = "select library_id, embedder, chunk_id, text, attempts from pgshelf.claim_pending(%s, %s)"
# a wait of null gives the chunk up
FAIL = "select pgshelf.fail_embeddings(%s, %s, %s, %s, %s::float8[])"
STAMP = "select pgshelf.stamp_all_changes()"
PRUNE_CHANGES = "select pgshelf.prune_changes(%s)"
PRUNE_KEYS = "select pgshelf.prune_idempotency_keys(%s)"
TIDY = 60.0  # seconds between two times
EXPECTED = (Problem, psycopg.Error)  # the database is away, busy or refuses: the message says enough
MAX_PAUSE = 10.0  # seconds between two rounds while they fail
Claimed = tuple[Any, ...]  # a row of CLAIM


async def embed_pending(engine: AsyncEngine, settings: Settings) -> int:
    """Claim a batch of pending chunks of one library, embed it, store it; returns how many chunks were claimed."""
    lease = timedelta(seconds=settings.worker_lease)
    claimed = await database.run(engine, CLAIM, settings.embed_batch, lease)
    if not claimed:
        return 0
    library, choice = claimed[0][0], claimed[0][1]
    try:
        embedder = embedder_of(settings, choice)
    except Problem as error:  # the library asks for an embedder that this server has not
        await _fail(engine, settings, library, claimed, error.detail)
    else:
        await _embed(engine, settings, library, embedder, claimed)
    return len(claimed)


async def _embed(
    engine: AsyncEngine, settings: Settings, library: UUID, embedder: Embedder, claimed: list[Claimed]
) -> None:
    rest = list(claimed)
    while rest:
        texts = [row[3] for row in rest]
        try:
            vectors = await vectors_of(engine, settings, embedder, texts, "document")
            await store(engine, library, [row[2] for row in rest], texts, vectors)
            return
        except TextRefused as error:  # one text spoils no other
            await _fail(engine, settings, library, [rest.pop(error.index)], str(error), final=True)
        except EmbedderError as error:
            wait = error.retry_after if isinstance(error, EmbedderUnavailable) else None
            await _fail(engine, settings, library, rest, str(error), wait=wait)
            return
        except psycopg.Error as error:
            if problem_of(error).status != 422:
                raise
            await _fail(engine, settings, library, rest, str(error.diag.message_primary))  # vectors that do not fit
            return


async def _fail(
    engine: AsyncEngine,
    settings: Settings,
    library: UUID,
    chunks: list[Claimed],
    error: str,
    *,
    final: bool = False,
    wait: float | None = None,
) -> None:
    """Put the reason on the chunks: try again later, with a growing and jittered wait, or give up.

    A provider that says when to come back (`wait`) is away, not refusing: chunks are never given up for that.
    """
    log.warning("embedding %d chunks failed: %s", len(chunks), error)
    waits = [wait or (None if final or row[4] >= settings.worker_attempts else _backoff(row[4])) for row in chunks]
    hashes = [text_hash(row[3]) for row in chunks]
    await database.run(engine, FAIL, library, [row[2] for row in chunks], hashes, error[:2000], waits)


def _backoff(attempts: int) -> float:
    return min(300.0, 2.0**attempts) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


async def reap(engine: AsyncEngine, _: Settings) -> int:
    """Take away a batch of what deleted libraries left."""
    return int((await database.run(engine, "select pgshelf.reap_deleted()"))[0][0])


async def fill_attributes(engine: AsyncEngine, _: Settings) -> bool:
    """Bring declared attributes a batch of documents nearer to being ready."""
    return bool((await database.run(engine, "select pgshelf.fill_attributes()"))[0][0])


async def forget_imports(engine: AsyncEngine, settings: Settings) -> int:
    """Forget imports that ended long ago."""
    after = timedelta(seconds=settings.import_retention)
    return int((await database.run(engine, "select pgshelf.forget_imports(%s)", after))[0][0])


async def reconcile(engine: AsyncEngine, settings: Settings) -> bool | None:
    """One round of everything. Was there something to do? None: a step failed, which keeps no other from running."""
    busy, failed = False, False
    for step in (embed_pending, fill_attributes, reap, embedding_cache.evict, forget_imports):
        try:
            busy = bool(await step(engine, settings)) or busy
        except Exception as error:
            # whatever it was, the rows still say what is wanted: the next round meets them again
            log.warning("reconciling failed, trying again: %s", error, exc_info=not isinstance(error, EXPECTED))
            failed = True
    return None if failed else busy


async def _forever(engine: AsyncEngine, settings: Settings) -> None:
    pause = settings.worker_interval
    while True:
        busy = await reconcile(engine, settings)
        if busy:
            continue
        # a database that is away is not asked, nor complained about, twice a second
        pause = min(pause * 2, MAX_PAUSE) if busy is None else settings.worker_interval
        # jitter keeps several processes from asking in step
        await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - jitter


async def tidy(engine: AsyncEngine, settings: Settings) -> int:
    """Forget a batch of changes and of stored answers that are old enough; returns how many."""
    changes = await database.run(engine, PRUNE_CHANGES, timedelta(days=settings.changes_retention))
    answers = await database.run(engine, PRUNE_KEYS, timedelta(hours=settings.idempotency_retention))
    return int(changes[0][0]) + int(answers[0][0])


async def _keep_house(engine: AsyncEngine, settings: Settings) -> None:
    """Give changes their positions, for those who read them in SQL, and tidy once a minute."""
    tidied = -TIDY
    while True:
        try:
            busy = bool((await database.run(engine, STAMP))[0][0])
            if time.monotonic() - tidied > TIDY:
                tidied = time.monotonic()
                while await tidy(engine, settings):
                    pass
        except EXPECTED as error:
            log.debug("keeping house failed, trying again: %s", error)
            busy = False
        if not busy:
            await asyncio.sleep(settings.worker_interval * random.uniform(0.75, 1.25))  # noqa: S311 - jitter


@contextlib.asynccontextmanager
async def running(engine: AsyncEngine, settings: Settings) -> AsyncIterator[None]:
    """Reconcile in the background while the block runs; building an index keeps no text from being embedded."""
    work = (
        [_forever(engine, settings), _keep_house(engine, settings), shelves.forever(settings)]
        if settings.worker_enabled
        else []
    )
    tasks = [asyncio.create_task(each, name="pgshelf worker") for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
