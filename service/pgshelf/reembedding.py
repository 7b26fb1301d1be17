"""Changing the embedder of a library: makes the vectors of the new one beside those in use, and sees to the switch.

Nothing here is a job either. A row of `embedder_changes` that is not over is the request; `sql/52_embedder_changes.sql`
holds the steps, each a transaction of its own. Vectors are kept by the hash of their text, so what is stored is
never sent again, whoever goes on after a kill. Small libraries on shelf 0 are switched here, all others by
`moves.py`, which takes them to rows with the new vectors; what is written meanwhile is embedded here until then.

One session at a time looks after a change: it holds an advisory lock, which dies with it. So the connection must be a
session of its own, by `sessions.py`; it is opened when there is something to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Sequence
from typing import Any

import psycopg
import sqlalchemy

from pgshelf import database, moves, rounds
from pgshelf.embedders import Embedder, EmbedderError, EmbedderUnavailable, TextRefused
from pgshelf.embedding import change_hash, embedder_of, store_next, vectors_of
from pgshelf.errors import Problem, problem_of
from pgshelf.sessions import UNHURRIED, Gone, Pace, Session, Step, connect, no_step
from pgshelf.settings import Settings

log = logging.getLogger("pgshelf.reembedding")

CHANGE = 0x656D62  # "emb", with the serial of a change
PAGE = 1000  # chunks that are looked through at once
AT_ONCE = 4  # batches that are with the provider at the same time
FEW = 200  # texts of a pass from which on another one is made before the switch
IN_PLACE = 500  # rows on shelf 0 that are rewritten in one transaction, while writers wait
STRAGGLERS = 500  # texts that are looked for at once while the library moves
PATIENT_FLIPS = 200  # attempts at a switch before a few chunks may wait for their vector
LOOK_AGAIN = 5.0  # seconds between two passes while a library waits for its move
EXPECTED = (Problem, psycopg.Error)
DUE = "select c from pgshelf.changes_due(%s) c"
MOVING = """select l.moving from pgshelf.embedder_changes c join pgshelf.libraries l on l.id = c.library_id
where c.serial = %s and c.phase <> 'over'"""


class Change:
    """One change of an embedder, looked after by this session. `step` is told each step when it is done: tests die."""

    def __init__(
        self, engine: sqlalchemy.Engine, session: Session, settings: Settings, serial: int, step: Step
    ) -> None:
        self.engine, self.session, self.settings, self.serial, self.step = engine, session, settings, serial, step
        self.choice: dict[str, Any] = {}

    async def work(self) -> None:
        """Go on until it is over, fails, or this session ends."""
        find = "select embedder, attempts from pgshelf.embedder_changes where serial = %s and phase <> 'over'"
        found = await self._run(find, self.serial)
        if not found:
            return
        self.choice, attempts = found[0]
        try:
            with contextlib.suppress(Gone):
                await self._carry_out()
        except (Problem, EmbedderError, psycopg.Error) as error:
            if not isinstance(error, EmbedderError) and problem_of(error).status != 422:
                raise  # not of the embedder's doing
            await self._failed(error, attempts)

    async def _failed(self, error: Exception, attempts: int) -> None:
        reason = error.detail if isinstance(error, Problem) else str(error)
        if isinstance(error, psycopg.Error):
            reason = str(error.diag.message_primary)
        wait = min(300.0, self.session.pace.retry * 2.0 ** min(attempts, 10)) * random.uniform(0.5, 1)  # noqa: S311 - jitter
        if isinstance(error, EmbedderUnavailable):
            wait = max(wait, error.retry_after)
        log.warning("changing an embedder failed, trying again in %.0f s: %s", wait, reason)
        await self._run("select pgshelf.change_failed(%s, %s, make_interval(secs => %s))", self.serial, reason, wait)

    async def _carry_out(self) -> None:
        while True:
            await self._walk()
            then = await self._next()
            if then == "flip":
                await self._flip()
            elif then == "move":
                await self._follow()
            elif then == "wait":
                await asyncio.sleep(self.settings.worker_interval)
            elif then is None:
                return

    async def _walk(self) -> None:
        """Look through the library once, and embed what has no vector of the new embedder yet."""
        while True:
            [(texts, seen, last)] = await self._run("select * from pgshelf.change_walk(%s, %s)", self.serial, PAGE)
            if seen is None:
                raise Gone
            await self._embed_all(texts or [])
            walked = "select pgshelf.change_walked(%s, %s, %s, %s)"
            if not (await self._run(walked, self.serial, last, seen, len(texts or [])))[0][0]:
                raise Gone
            await self.step("walking")
            if last is None:
                await self.step("walked")
                return

    async def _next(self) -> str | None:
        [(then,)] = await self._run("select pgshelf.change_next(%s, %s, %s)", self.serial, FEW, IN_PLACE)
        await self.step(f"next: {then}")
        return then if then is None else str(then)

    async def _embed_all(self, texts: Sequence[str]) -> None:
        """Embed and store texts, several batches at once. After a failure none is begun; what is on is not wasted."""
        if not texts:
            return
        embedder = embedder_of(self.settings, self.choice)
        size = min(self.settings.embed_batch, embedder.batch)
        starts = iter(range(0, len(texts), size))
        failures: list[Exception] = []

        async def some() -> None:
            for start in starts:
                try:
                    await self._embed(embedder, texts[start : start + size])
                except Exception as error:
                    failures.append(error)
                if failures:
                    return

        await asyncio.gather(*[some() for _ in range(AT_ONCE)])
        if failures:
            raise failures[0]

    async def _embed(self, embedder: Embedder, texts: Sequence[str]) -> None:
        rest = list(texts)
        while rest:
            try:
                vectors = await vectors_of(self.engine, self.settings, embedder, rest, "document")
            except TextRefused as error:  # one text spoils no other
                await self._refuse(rest.pop(error.index), str(error))
                continue
            if not await store_next(self.engine, self.serial, rest, vectors):
                raise Gone
            break
        await self.step("stored")

    async def _refuse(self, text: str, reason: str) -> None:
        log.warning("a text cannot be embedded by the next embedder: %s", reason)
        refuse = "select pgshelf.change_store(%s, %s, null, %s)"
        await database.run(self.engine, refuse, self.serial, [change_hash(text)], [reason[:2000]])

    async def _flip(self) -> None:
        """Switch a small library, again and again while something is written that has no vector yet."""
        flip = "select pgshelf.change_flip(%s, %s, %s)"
        for attempt in range(PATIENT_FLIPS * 2):
            tolerated = 0 if attempt < PATIENT_FLIPS else moves.TOLERATED
            [(missing,)] = await self.session.fenced(flip, self.serial, IN_PLACE, tolerated)
            if missing is None:
                raise Gone
            if 0 <= missing <= tolerated:
                await self.step("flipped")
                log.info("a library uses the embedder %s", self.choice)
                return
            await self.step("behind")
            if missing < 0:
                return  # it is moving, or has grown: see what is to be done then
            await self._walk()

    async def _follow(self) -> None:
        """Embed what is written while `moves.py` moves the library to its new vectors, until it has switched."""
        stragglers = "select pgshelf.change_stragglers(%s, %s)"
        looked = time.monotonic()
        while True:
            started = time.monotonic()
            moving = await self._run(MOVING, self.serial)
            if not moving:
                raise Gone
            [(texts,)] = await self._run(stragglers, self.serial, STRAGGLERS)
            if texts:
                await self._embed_all(texts)
                await self.step("caught up")
                continue
            if texts is None and started >= looked + LOOK_AGAIN:
                await self._walk()
                looked = time.monotonic()
            # the end is near when both shelves are written; a long log of what was written is not read all the time
            pause = 0.05 if moving[0][0] == 2 else self.settings.worker_interval
            await asyncio.sleep(max(pause, 5 * (time.monotonic() - started)))

    async def _run(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """In the session that holds the lock: when it is lost, this ends."""
        return await self.session.rows(statement, *parameters)


async def look_after(
    engine: sqlalchemy.Engine,
    settings: Settings,
    serial: int,
    pace: Pace = UNHURRIED,
    step: Step = no_step,
) -> None:
    """Carry out one change, with a session of its own, unless another one does."""
    async with await connect(settings) as connection:
        session = Session(connection, settings, pace)
        async with session.lock("pg_try_advisory_lock(%s, %s)", CHANGE, serial) as mine:
            if mine:
                await Change(engine, session, settings, serial, step).work()


async def due(engine: sqlalchemy.Engine) -> list[int]:
    """The changes that nobody looks after and that shall go on now."""
    return [serial for (serial,) in await database.run(engine, DUE, CHANGE)]


async def reap(engine: sqlalchemy.Engine) -> bool:
    """Take away a batch of vectors that changes left behind. Was there something?"""
    return bool((await database.run(engine, "select pgshelf.reap_changes()"))[0][0])


async def forever(engine: sqlalchemy.Engine, settings: Settings, pace: Pace = UNHURRIED) -> None:
    """Look after all changes until cancelled, each in a task of its own: none waits for another."""
    tasks: dict[int, asyncio.Task[None]] = {}
    pause = settings.worker_interval
    try:
        while True:
            busy = False
            try:
                for serial in await due(engine):
                    if serial not in tasks:
                        work = look_after(engine, settings, serial, pace)
                        tasks[serial] = asyncio.create_task(work, name="pgshelf change of an embedder")
                busy = await reap(engine)
                for serial, task in list(tasks.items()):
                    if task.done():
                        del tasks[serial]
                        task.result()
                pause = settings.worker_interval
                rounds.ended("embedders", busy)
            except Exception as error:
                rounds.ended("embedders", None)
                # what is wanted is still written down: the next round meets it again
                expected = isinstance(error, EXPECTED)
                log.warning("changing embedders failed, trying again: %s", rounds.reason(error), exc_info=not expected)
                pause = min(pause * 2, 10.0)
            if not busy:
                await asyncio.sleep(pause * random.uniform(0.75, 1.25))  # noqa: S311 - jitter
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
