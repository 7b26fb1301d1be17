"""The reconciler: compares what is wanted with what is there. It may be killed at any instruction."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any

import psycopg
import sqlalchemy

from pgshelf import (
    database,
    embedding_cache,
    pools,
    probing,
    providers,
    query_cache,
    reembedding,
    rounds,
    sessions,
    shelves,
)
from pgshelf.batches import EXPECTED, MAX_PAUSE, Batches, around, tell
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.worker")
STAMP = "select pgshelf.stamp_all_changes()"
PRUNE_CHANGES = "select pgshelf.prune_changes(%s)"
FORGET_IMPORTS = "select pgshelf.forget_imports(%s)"
PRUNE_AUDIT = "select pgshelf.prune_audit(%s)"
BEAT = "select pgshelf.beat(%s)"
PRUNE_KEYS = "select pgshelf.prune_idempotency_keys(%s)"
FORGET_RATES = "select pgshelf.forget_rate_shares()"
TIDY = 60.0  # seconds between two times
UNTIL_OWNER = 60.0  # seconds until a role that may not build is asked again
Step = Callable[[sqlalchemy.Engine, Settings], Awaitable[Any]]


async def embed_pending(engine: sqlalchemy.Engine, settings: Settings) -> bool:
    """Claim one batch of pending chunks, embed it, store it. Was there one?"""
    batch = await Batches(engine, settings).claim()
    if batch is not None:
        await batch.work()
    return batch is not None


async def reap(engine: sqlalchemy.Engine, _: Settings) -> int:
    """Take away a batch of what deleted libraries left."""
    return int((await database.run(engine, "select pgshelf.reap_deleted()"))[0][0])


async def fill_attributes(engine: sqlalchemy.Engine, _: Settings) -> bool:
    """Bring declared attributes a batch of documents nearer to being ready."""
    return bool((await database.run(engine, "select pgshelf.fill_attributes()"))[0][0])


OTHERS: tuple[Step, ...] = (fill_attributes, reap, embedding_cache.evict, query_cache.join_marks, probing.probe)


async def reconcile(
    engine: sqlalchemy.Engine, settings: Settings, steps: Sequence[Step] = (embed_pending, *OTHERS)
) -> bool | None:
    """One round of some steps. Was there something to do? None: a step failed, which keeps no other from running."""
    busy, failed = False, False
    for step in steps:
        try:
            busy = bool(await step(engine, settings)) or busy
        except Exception as error:
            tell(error)
            failed = True
    return None if failed else busy


async def _others_forever(engine: sqlalchemy.Engine, settings: Settings) -> None:
    pause = settings.worker_interval
    while True:
        busy = await reconcile(engine, settings, OTHERS)
        rounds.ended("others", busy)
        if busy:
            continue
        pause = min(pause * 2, MAX_PAUSE) if busy is None else settings.worker_interval
        await asyncio.sleep(around(pause))


async def tidy(engine: sqlalchemy.Engine, settings: Settings) -> int:
    """Forget a batch of changes, stored answers, imports, audit rows and rates that are old enough; how many."""
    changes = await database.run(engine, PRUNE_CHANGES, timedelta(days=settings.changes_retention))
    answers = await database.run(engine, PRUNE_KEYS, timedelta(hours=settings.idempotency_retention))
    imports = await database.run(engine, FORGET_IMPORTS, timedelta(hours=settings.import_retention))
    audit = await database.run(engine, PRUNE_AUDIT, timedelta(days=settings.audit_retention))
    rates = await database.run(engine, FORGET_RATES)
    return sum(int(forgotten[0][0]) for forgotten in (changes, answers, imports, audit, rates))


async def _keep_house(engine: sqlalchemy.Engine, settings: Settings) -> None:
    """Give changes their positions, for those who read them in SQL, and tidy once a minute."""
    tidied = -TIDY
    busy: bool | None
    while True:
        try:
            busy = bool((await database.run(engine, STAMP))[0][0])
            if time.monotonic() - tidied > TIDY:
                tidied = time.monotonic()
                while await tidy(engine, settings):
                    pass
        except EXPECTED as error:
            log.debug("keeping house failed, trying again: %s", error)
            busy = None
        rounds.ended("house", busy)
        if not busy:
            await asyncio.sleep(settings.worker_interval * random.uniform(0.75, 1.25))  # noqa: S311 - jitter


async def _build(engine: sqlalchemy.Engine, settings: Settings) -> None:
    """Do what it takes the owner of the tables for, as soon as this role may become it; that of a service need not."""
    while True:
        try:
            owner = await sessions.forbidden_to(settings)
        except psycopg.Error:  # the database is away, or its answer was
            await asyncio.sleep(around(settings.worker_interval))
            continue
        if owner is None:
            break
        log.info("this role builds no indexes and moves no libraries: pgshelf worker does, as a member of %s", owner)
        await asyncio.sleep(UNTIL_OWNER)
    await asyncio.gather(shelves.forever(settings), reembedding.forever(engine, settings))


async def _beat(engine: sqlalchemy.Engine, settings: Settings) -> None:
    """Let replicas know how late it is; the first of all processes in an interval does it."""
    while settings.heartbeat_interval:
        try:
            await database.run(engine, BEAT, settings.heartbeat_interval)
        except EXPECTED as error:
            log.debug("no heartbeat, trying again: %s", error)
        await asyncio.sleep(settings.heartbeat_interval * random.uniform(0.5, 1))  # noqa: S311 - jitter


async def alone(settings: Settings, stopped: asyncio.Event) -> None:
    """Reconcile without serving, until it is told to stop."""
    assert settings.database_url  # noqa: S101 - who runs a worker has a database
    engine = pools.make_engine(settings, settings.database_url, owner=True)
    try:
        async with running(engine, settings):
            await stopped.wait()
    finally:
        await providers.close()
        await pools.close(engine)


@contextlib.asynccontextmanager
async def running(engine: sqlalchemy.Engine, settings: Settings) -> AsyncIterator[None]:
    """Reconcile in the background while the block runs; building an index keeps no text from being embedded."""
    batches = Batches(engine, settings)
    others = _others_forever(engine, settings)
    work = [batches.forever(), others, _keep_house(engine, settings), _build(engine, settings), _beat(engine, settings)]
    tasks = [asyncio.create_task(each, name="pgshelf worker") for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await batches.end()
