"""A library that moves and changes its index while it is searched and written, with kills -9 or without.

It is promoted because it grows, given one index after the other through PUT /index, and moved back because it shrinks.
Whatever is killed meanwhile, it becomes right by itself within a bounded time. Used by tests/test_moves.py (some
seconds, two kills) and `make soak` (twenty).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx2
import numpy as np

from pgshelf import shelves
from pgshelf.settings import Settings
from tests.shelving import PACE, check_tidy, literal
from tests.soak.crash import Service, ended, service
from tests.soak.crowd import (
    ADDRESS,
    DIMENSION,
    FAILURES,
    LIBRARY,
    Crowd,
    K,
    Outage,
    Session,
    State,
    Statics,
    distances,
    vector_of,
)

ROOM = 150  # chunks that the writers may have at most
PART, BATCH = 20, 10  # chunks of a document of ballast, documents of it in one transaction
ARRIVAL_SECONDS = 60.0  # within which a library is right, kills or not
TIDY_SECONDS = 120.0  # a shelf that was left is dropped a minute later
WORKERS = 2  # that serve; crash.py starts so many
KINDS = ("worker", "service", "postmaster", "mover")


@dataclass(frozen=True)
class Size:
    """How large the library is: chunks that stay, and ballast without which it is small enough for shelf 0."""

    static: int
    ballast: int

    @property
    def promote_at(self) -> int:
        return 4 * (self.static + ROOM)


SMALL = Size(200, 1300)
LARGE = Size(1000, 3800)


@dataclass(frozen=True)
class Step:
    """What is asked of the library, and the index that it has then."""

    name: str
    goal: dict[str, Any]
    index: dict[str, Any] | None = None
    ballast: bool | None = None
    recall: float = 0.95  # at least; these vectors have no structure that lists and codes could use


STEPS = (
    Step("promotion", {"type": "hnsw", "storage": "halfvec", "m": 16}, ballast=True),
    Step("ivfflat", {"type": "ivfflat"}, {"type": "ivfflat"}, recall=0.6),
    Step("lsh", {"type": "lsh", "bits": 128}, {"type": "lsh", "bits": 128}, recall=0.8),
    Step("bit", {"type": "hnsw", "storage": "bit"}, {"type": "hnsw", "storage": "bit"}, recall=0.4),
    Step("vector", {"type": "hnsw", "storage": "vector", "m": 8}, {"type": "hnsw", "storage": "vector", "m": 8}),
    Step("flat", {"type": "flat"}, {"type": "flat"}),
    Step("auto", {"type": "hnsw", "storage": "halfvec", "m": 16}, {"type": "auto"}),
    Step("demotion", {"type": "flat"}, ballast=False),
)


FOUND = """
select d.key, (d.metadata ->> 'n')::int, coalesce(c.texts, '{}'), c.count, c.ids from pgshelf.documents_view d
cross join lateral (select array_agg(c.text order by c.ordinal) as texts, count(*), count(distinct c.id) as ids
  from pgshelf.chunks_view c where c.document_id = d.id) c
where d.library = %s
"""
# What a dead mover, or a build that died, leaves; a shelf that was left in good order may stay for a while.
LEFT = """
select (select array_agg(s.shelf) from pgshelf.lost_shelves('1 hour') s),
  (select array_agg(i) from pgshelf.lost_indexes() i),
  (select count(*) from pgshelf.chunks_s0 c join pgshelf.libraries l on l.id = c.library_id where l.shelf <> 0),
  (select count(*) from pgshelf.move_log),
  (select array_agg(c.relname) from pg_index i join pg_class c on c.oid = i.indexrelid, pgshelf.libraries l
    where i.indrelid = to_regclass('pgshelf.chunks_s' || l.shelf) and not i.indisvalid)
"""
MOVERS = "select pid from pg_stat_activity where application_name = 'pgshelf shelves' order by state"  # active first
STATUS = """
select shelf, moving, index_state, index_actual, index_error, index_attempts from pgshelf.libraries where name = %s
"""


class Moves:
    """The library that moves, and whoever moves and kills."""

    def __init__(self, service: Service, session: Session, seed: int, size: Size) -> None:
        self.service, self.session, self.size, self.seed = service, session, size, seed
        self.rng = random.Random(seed)
        self.crowd = Crowd(service, seed, Statics(size.static))
        self._steps = itertools.cycle(STEPS)
        self.took: dict[str, float] = {}  # seconds of each step
        self.kills: Counter[str] = Counter()
        self.recoveries: list[float] = []  # seconds from a kill to a library that is right
        self.ballast = False

    def start(self) -> None:
        """Make the library, and fill in what stays."""
        self._recover()
        self.session.ask("POST", "/v1/libraries", {
            "name": LIBRARY, "dimension": DIMENSION, "embedder": {"provider": "none"}, "attributes": {"year": "number"},
        })  # fmt: skip
        with self.session.connection().transaction():
            for number in range(0, self.size.static, 4):
                self.session.put(*self.crowd.statics.document(number))

    def walk(self) -> None:
        """Take every step without a kill."""
        for step in STEPS:
            self.take(step)
            print(f"  {step.name:<10} {self.took[step.name]:5.1f} s", flush=True)

    def take(self, step: Step) -> None:
        """Ask for a step, wait until it is done and nothing of the way there is left, and check everything."""
        begun = time.monotonic()
        if step.ballast is not None:
            (self._load if step.ballast else self._unload)()
        if step.index is not None:
            self._insist(lambda: self.session.ask("PUT", f"{ADDRESS}/index", step.index))
        self._until(lambda: self._arrived(step))
        self.took[step.name] = time.monotonic() - begun
        self.check(step)

    def kill_once(self, kind: str) -> None:
        """Go on taking steps until one was cut off by a kill of this kind."""
        while True:
            step = next(self._steps)
            begun = time.monotonic()
            if doing := self.take_killing(step, kind):
                print(
                    f"{self.kills.total():3} {kind:<10} {step.name:<10} {doing}: {time.monotonic() - begun:.1f} s",
                    flush=True,
                )
                return

    def take_killing(self, step: Step, kind: str) -> str | None:
        """Take a step with a kill at a random moment of it; tells what was under way, None if nothing was."""
        seen: list[str] = []
        killer = threading.Thread(target=self._killer, args=(step, kind, self.rng.random(), seen))
        usual = self.took[step.name]
        killer.start()
        try:
            self.take(step)
        finally:
            killer.join()
        self.took[step.name] = usual
        if not seen:
            return None
        self.check(step)  # the kill may have come when it was done
        self.kills[kind] += 1
        self.recoveries.append(time.monotonic() - self.crowd.outages[-1].begun)
        return seen[0]

    def check(self, step: Step) -> None:
        """The step is done, nothing is left over, and what was answered is there once, in tables and in searches."""
        self._until(lambda: self._arrived(step) or self._clean())
        with self.crowd.quiet():
            self._until(self._unanswered_is_over)
            self._insist(lambda: self._searched(self._stored(), step))
        self.crowd.check()

    def finish(self, *, patient: bool) -> None:
        """Nothing is left over in the end: by itself after a minute (patient), or because the grace is taken away."""
        settings = Settings(database_url=self.service.database.url(), promote_at=self.size.promote_at)
        deadline = time.monotonic() + TIDY_SECONDS
        while True:
            if not patient:
                asyncio.run(shelves.reconcile_all_async(settings, PACE))
            try:
                return check_tidy(self.session.connection())
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def figures(self) -> str:
        counts, recalls = self.crowd.counts, self.crowd.recalls
        lines = [
            f"{counts['searches']} searches and {counts['writes']} writes, none wrong; mean recall of what the indexes "
            f"found {np.mean(recalls):.4f}; {counts['excused']} requests were cut off by a kill"
        ]
        if self.recoveries:
            usual, slowest = float(np.median(self.recoveries)), max(self.recoveries)
            lines.append(
                f"right again after {usual:.1f} s (median), {slowest:.1f} s at most; kills: {dict(self.kills)}"
            )
        return "\n".join(lines)

    # -- what is asked for

    def _load(self) -> None:
        for first in range(0, self.size.ballast, PART * BATCH):
            self._insist(functools.partial(self._load_part, first))
        self.ballast = True

    def _load_part(self, first: int) -> None:
        with self.session.connection().transaction():
            for number in range(first, min(first + PART * BATCH, self.size.ballast), PART):
                self.session.put(f"ballast-{number}", _ballast(number), {"kind": 1})

    def _unload(self) -> None:
        self._insist(lambda: self.session.ask("POST", f"{ADDRESS}/documents/delete", {"filter": {"kind": 1}}))
        self.ballast = False

    def _insist(self, act: Callable[[], Any]) -> Any:
        """Do what may be done twice, again where a kill kept it from being answered."""
        while True:
            begun = time.monotonic()
            try:
                return act()
            except FAILURES as error:
                if not self.crowd.excuses(error, begun):
                    raise
            time.sleep(0.1)

    # -- what becomes of it

    def _until(self, complaint_of: Callable[[], str | None]) -> None:
        """Wait until there is nothing to complain of."""
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while complaint := self._insist(complaint_of):
            self.crowd.check()
            assert time.monotonic() < deadline, f"seed {self.seed}: {complaint}\n{self.service.output[-3000:]}"
            time.sleep(0.03)

    def _arrived(self, step: Step) -> str | None:
        [(shelf, moving, state, actual, *rest)] = self.session.sql(STATUS, LIBRARY)
        there = (shelf == 0) == (step.ballast is False) and moving == 0 and state == "ready"
        if there and actual.items() >= step.goal.items():
            return None
        return f"{step.name}: on shelf {shelf}, moving {moving}, {state}, {actual}, {rest}"

    def _clean(self) -> str | None:
        [left] = self.session.sql(LEFT)
        return f"left over: {left}" if any(left) else None

    def _unanswered_is_over(self) -> str | None:
        """What a killed service had begun may go on in the database, but not for ever."""
        if not self.crowd.outages:
            return None
        since = self.crowd.outages[-1].begun - time.monotonic() + time.time()
        going = self.session.sql(
            "select query from pg_stat_activity where application_name = 'pgshelf serve' and state = 'active'"
            " and query_start < %s",
            datetime.fromtimestamp(since, UTC),
        )
        return f"still under way: {going}" if going else None

    def _stored(self) -> list[str]:
        """Every document is in the state that was answered; tells the texts of all chunks."""
        found = {
            key: (number, tuple(texts), count, ids)
            for key, number, texts, count, ids in self.session.sql(FOUND, LIBRARY)
        }
        expected: dict[str, list[State]] = {key: each.possible for key, each in self.crowd.histories.items()}
        for number in range(0, self.size.static, 4):
            key, texts, *_ = self.crowd.statics.document(number)
            expected[key] = [(-1, tuple(texts))]
        for number in range(0, self.size.ballast if self.ballast else 0, PART):
            expected[f"ballast-{number}"] = [(-1, tuple(_ballast(number)))]
        assert found.keys() <= expected.keys(), sorted(found.keys() - expected.keys())
        for key, possible in expected.items():
            row = found.get(key)
            state = (-1 if row[0] is None else row[0], row[1]) if row else None
            assert state in possible, f"seed {self.seed}: {key} is {state}, it may be one of {possible}"
            assert row is None or row[2] == row[3] == len(row[1]), f"{key} has {row}"
            if key in self.crowd.histories:
                self.crowd.histories[key].settle(state)
        texts = [text for row in found.values() for text in row[1]]
        [counts] = self.session.sql(
            "select documents, chunks, pending from pgshelf.libraries_overview where name = %s", LIBRARY
        )
        assert counts == (len(found), len(texts), 0), f"{counts} are counted, {len(found)}, {len(texts)} are there"
        self._forget_gone()
        return texts

    def _forget_gone(self) -> None:
        for key in [key for key, each in self.crowd.histories.items() if each.state is None]:
            del self.crowd.histories[key]

    def _searched(self, texts: list[str], step: Step) -> None:
        """An exact search finds what is nearest of all that is there, an index nearly always."""
        every, recalls = np.array([vector_of(text) for text in texts]), list[float]()
        for text in self.rng.sample(texts, 20):
            away = distances(vector_of(text), every)
            nearest = np.sort(away)[:K]
            for exact in (True, False):
                find = "select text, distance from pgshelf.search(%s, %s, exact => %s)"
                found = self.session.sql(find, LIBRARY, literal(vector_of(text)), exact)
                assert len({hit[0] for hit in found}) == K and found[0][0] == text, f"{text}: {found}"
                given = np.array([hit[1] for hit in found])
                if exact:
                    np.testing.assert_allclose(given, nearest, atol=1e-5)
                else:
                    recalls.append(float(np.mean(given <= nearest[-1] + 1e-5)))
        assert np.mean(recalls) >= step.recall, f"seed {self.seed}: recalls {recalls}"

    # -- kills

    def _killer(self, step: Step, kind: str, moment: float, seen: list[str]) -> None:
        """Kill when a share of the usual time of the step is over, unless it is done; wait until all serves again."""
        deadline = time.monotonic() + ARRIVAL_SECONDS
        with Session(self.service) as session:
            while not _under_way(session):
                if self._arrived_for(session, step) or time.monotonic() > deadline:
                    return
                time.sleep(0.005)
            time.sleep(moment * self.took[step.name])
            if doing := _under_way(session):
                seen.append(doing)
                self._kill(kind, session)
                self._recover()
                self.crowd.outages[-1].ended = time.monotonic()

    def _arrived_for(self, session: Session, step: Step) -> bool:
        [(_, _, state, actual, *_)] = session.sql(STATUS, LIBRARY)
        return state == "ready" and actual.items() >= step.goal.items()

    def _kill(self, kind: str, session: Session) -> None:
        [(mover,), *_] = session.sql(MOVERS)
        workers = self.service.workers()
        self.crowd.outages.append(Outage(kind in ("worker", "service"), time.monotonic()))
        if kind == "service":
            os.killpg(self.service.process.pid, signal.SIGKILL)
            assert ended(workers, 2), f"workers outlive their group: {workers}"
        elif kind == "worker":
            workers[0].kill()
            assert ended(workers[:1], 2)
        elif kind == "postmaster":
            assert self.service.database.pid
            os.kill(self.service.database.pid, signal.SIGKILL)
        else:  # a session of PostgreSQL that moves or builds; PostgreSQL then throws out all others
            os.kill(mover, signal.SIGKILL)

    def _recover(self) -> None:
        """Wait until it serves again; that takes no help but a start of what has ended."""
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while not (self._ready() and len(self.service.workers()) == WORKERS):
            assert time.monotonic() < deadline, self.service.output[-5000:]
            time.sleep(0.05)
            self.service.keep_up()

    def _ready(self) -> bool:
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(f"{self.service.url}/ready", timeout=10).status_code == 200
        return False


@contextlib.contextmanager
def moving(version: int, seed: int, size: Size) -> Iterator[Moves]:
    """A service, the library and its clients; in the end all that they said is true."""
    settings = {"promote_at": str(size.promote_at), "worker_interval": "0.1", "worker_lease": "60"}
    with service(version, **settings) as target, Session(target) as session:
        moves = Moves(target, session, seed, size)
        moves.start()
        with moves.crowd:
            yield moves
        moves.crowd.check()


def _ballast(number: int) -> list[str]:
    return [f"ballast {number + place}" for place in range(PART)]


def _under_way(session: Session) -> str | None:
    """What is being done for the library, None at rest."""
    [(moving, state, progress, phase)] = session.sql(
        "select l.moving, l.index_state, i.progress, i.phase from pgshelf.libraries l, pgshelf.library_index(l.id) i"
        " where l.name = %s",
        LIBRARY,
    )
    return f"moving {moving}, {progress:.2f} {phase}" if moving or state != "ready" else None
