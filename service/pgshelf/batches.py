"""Pending chunks on their way to vectors: claimed, embedded, stored, several batches at once.

Killed at any instruction nothing is lost: what was claimed is free again when its lease is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg
import sqlalchemy
from psycopg.types.json import Jsonb

from pgshelf import database, rounds
from pgshelf.circuits import away, is_away
from pgshelf.embedders import EmbedderAway, EmbedderError, EmbedderUnavailable, TextRefused
from pgshelf.embedders.cohere import CohereEmbedder
from pgshelf.embedding import EMBEDDER_CHANGED, embedder_of, store, text_hash, vectors_of
from pgshelf.errors import Problem, problem_of
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.batches")
CLAIM = "select library_id, embedder, chunk_id, text, attempts from pgshelf.claim_pending(%s, %s, %s, %s, %s, %s)"
LEASE = "select pgshelf.lease_again(%s, %s, %s, %s)"
# a wait of null gives the chunk up
FAIL = "select pgshelf.fail_embeddings(pgshelf.embedded_with(%s, %s), %s, %s, %s, %s::float8[], %s)"
EXPECTED = (Problem, psycopg.Error)  # the database is away, busy or refuses: the message says enough
MAX_PAUSE = 10.0  # seconds between two rounds while they fail
GRACE = 5.0  # seconds that batches have to end when the process shall
STORE_PATIENCE = 60.0  # seconds for which vectors that are paid for wait for a database that is away
LOCAL = ("local", "sentence_transformers")  # they compute on this machine
LOCAL_AT_ONCE = 2  # while one batch is stored another is embedded; more would only share the processors
REMEMBERED = 100  # libraries whose turn it was
Claimed = tuple[Any, ...]  # a row of CLAIM


class Batch:
    """Claimed chunks of one library, on their way to vectors; their lease is renewed for as long as that takes."""

    def __init__(self, engine: sqlalchemy.Engine, settings: Settings, claimed: list[Claimed]) -> None:
        self.engine, self.settings = engine, settings
        self.library: UUID = claimed[0][0]
        self.choice: dict[str, Any] = claimed[0][1]
        self._rest = list(claimed)  # what is neither stored nor failed

    @property
    def provider(self) -> str:
        return str(self.choice["provider"])

    async def work(self) -> None:
        """Embed and store. Cancelled, it gives back at once what it has not done; killed, the lease runs out."""
        renewal = asyncio.create_task(self._renew(), name="pgshelf lease")
        try:
            await self._embed()
        except asyncio.CancelledError:
            with contextlib.suppress(*EXPECTED):
                await self._lease(0)
            raise
        except psycopg.Error as error:
            if error.sqlstate != EMBEDDER_CHANGED:
                raise  # else the chunks were made pending anew, for the other one
        finally:
            renewal.cancel()

    async def _embed(self) -> None:
        try:
            embedder = embedder_of(self.settings, self.choice)
        except Problem as error:  # the library asks for an embedder that this server has not
            await self._fail(self._rest, error.detail)
            return
        while self._rest:
            try:
                vectors = await vectors_of(
                    self.engine, self.settings, embedder, [row[3] for row in self._rest], "document"
                )
            except TextRefused as error:  # one text spoils no other
                await self._fail([self._rest[error.index]], str(error), final=True)
            except EmbedderAway as error:  # not even asked: the reason on the chunks stays
                await self._lease(_jittered(error.retry_after))
                return
            except EmbedderUnavailable as error:
                await self._fail(self._rest, str(error), wait=error.retry_after)
            except EmbedderError as error:
                await self._fail(self._rest, str(error), counts=not is_away(self.engine, embedder))
            else:
                await self._store(vectors)

    async def _store(self, vectors: Any) -> None:
        """Store what was answered, however long the database takes to come back: asking again costs more."""
        loop, rest = asyncio.get_running_loop(), self._rest
        until, pause = loop.time() + STORE_PATIENCE, 0.1
        while True:
            try:
                ids, texts = [row[2] for row in rest], [row[3] for row in rest]
                await store(self.engine, self.library, self.choice, ids, texts, vectors)
                self._rest = []
                return
            except EXPECTED as error:
                problem = problem_of(error)
                if problem.status == 422 and isinstance(error, psycopg.Error):  # vectors that do not fit
                    await self._fail(rest, str(error.diag.message_primary))
                    return
                if isinstance(error, psycopg.Error) and error.sqlstate == EMBEDDER_CHANGED:
                    await self._lease(0)  # the next batch asks the new one
                    self._rest = []
                    return
                if problem.status != 503 or loop.time() > until:
                    raise
                log.warning("%d vectors wait to be stored: %s", len(rest), error)
            await asyncio.sleep(_jittered(pause))
            pause = min(2 * pause, 2.0)

    async def _fail(
        self,
        chunks: Sequence[Claimed],
        error: str,
        *,
        final: bool = False,
        wait: float | None = None,
        counts: bool = True,
    ) -> None:
        """Put the reason on the chunks: try again later, with a growing and jittered wait, or give up.

        A provider that says when to come back (`wait`) is away, not refusing, and so is one that fails for everybody
        (not `counts`): chunks are never given up for that.
        """
        log.warning("embedding %d chunks failed: %s", len(chunks), error)
        counts = counts and wait is None
        waits = [self._wait(row[4] + 1, final, wait, counts) for row in chunks]
        hashes = [text_hash(row[3]) for row in chunks]
        ids = [row[2] for row in chunks]
        maker = Jsonb(self.choice)
        await database.run(self.engine, FAIL, self.library, maker, ids, hashes, error[:2000], waits, counts)
        self._rest = [row for row in self._rest if row not in chunks]

    def _wait(self, attempts: int, final: bool, wait: float | None, counts: bool) -> float | None:
        if wait is not None:
            return _jittered(wait)
        if final or (counts and attempts >= self.settings.worker_attempts):
            return None
        return min(300.0, 2.0**attempts) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret

    async def _renew(self) -> None:
        """A call that takes longer than the lease is no reason to send its texts twice."""
        while True:
            await asyncio.sleep(self.settings.worker_lease / 3)
            with contextlib.suppress(*EXPECTED):  # the next time comes before the lease is over
                await self._lease(self.settings.worker_lease)

    async def _lease(self, seconds: float) -> None:
        rest = list(self._rest)
        hashes = [text_hash(row[3]) for row in rest]
        ids = [row[2] for row in rest]
        await database.run(self.engine, LEASE, self.library, ids, hashes, timedelta(seconds=seconds))


def _jittered(seconds: float) -> float:
    """A little more: those who were sent away together shall not come back together, nor too early."""
    return seconds * random.uniform(1, 1.1)  # noqa: S311 - jitter, not a secret


class Batches:
    """What this process embeds at the moment: several batches at once, so that none waits for another's provider.

    Each provider has so many places; one library may not take the last of them. Libraries take turns. A provider whose
    circuit is open is passed over: its chunks stay as they are, however long that takes.
    """

    def __init__(self, engine: sqlalchemy.Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self._running: dict[asyncio.Task[None], Batch] = {}
        self._served: dict[UUID, None] = {}  # in the order of their last turn
        self._ended = asyncio.Event()
        # a batch is one call where calls cost money: a kill costs no more
        self._call_texts = {"cohere": CohereEmbedder.batch, "openai": settings.openai_batch}

    async def claim(self) -> Batch | None:
        """The next batch, if there is one that is due and a place for it."""
        places = Counter(batch.provider for batch in self._running.values())
        taken = Counter((batch.provider, batch.library) for batch in self._running.values())
        busy = [{"provider": provider} for provider, count in places.items() if count >= self._places(provider)]
        full = [library for (provider, library), count in taken.items() if count >= max(2, self._places(provider) - 1)]
        most = self.settings.embed_batch
        claimed = await database.run(
            self.engine, CLAIM, most, timedelta(seconds=self.settings.worker_lease),
            Jsonb({provider: min(most, texts) for provider, texts in self._call_texts.items()}),
            Jsonb(busy + away(self.engine)), full, list(self._served),
        )  # fmt: skip
        if not claimed:
            return None
        batch = Batch(self.engine, self.settings, claimed)
        self._served.pop(batch.library, None)
        self._served[batch.library] = None
        if len(self._served) > REMEMBERED:
            self._served.pop(next(iter(self._served)))
        return batch

    def _places(self, provider: str) -> int:
        places = self.settings.worker_concurrency
        return min(places, LOCAL_AT_ONCE) if provider in LOCAL else places

    async def forever(self) -> None:
        """Start batches for as long as there are any, then look again when one ends, or after a pause."""
        pause = self.settings.worker_interval
        while True:
            self._ended.clear()
            try:
                if (batch := await self.claim()) is not None:
                    self._start(batch)
                    rounds.ended("embedding", True)
                    continue
                rounds.ended("embedding", False)
                pause = self.settings.worker_interval
            except Exception as error:
                tell(error)
                rounds.ended("embedding", None)
                # a database that is away is not asked, nor complained about, twice a second
                pause = min(pause * 2, MAX_PAUSE)
                await asyncio.sleep(around(pause))
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(around(pause)):
                    await self._ended.wait()

    def _start(self, batch: Batch) -> None:
        task = asyncio.create_task(batch.work(), name="pgshelf batch")
        self._running[task] = batch
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._ended.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            tell(error)

    async def end(self) -> None:
        """Let the batches end that soon will; the others give back their leases."""
        if self._running:
            await asyncio.wait(self._running, timeout=GRACE)
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def tell(error: BaseException) -> None:
    """Log what went wrong in a round."""
    # whatever it was, the rows still say what is wanted: the next round meets them again
    unexpected = None if isinstance(error, EXPECTED) else error
    log.warning("reconciling failed, trying again: %s", rounds.reason(error), exc_info=unexpected)


def around(seconds: float) -> float:
    """Jitter keeps several processes from asking in step."""
    return seconds * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
