"""The servers that the settings name: which is reachable, who is primary, how far each standby has replayed.

Who is the primary is PostgreSQL's business, or Patroni's: this looks, and never promotes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import msgspec
import psycopg
import sqlalchemy
from prometheus_client import Counter, Gauge
from sqlalchemy import event

from pgshelf import connections, pools, questions
from pgshelf.consistency import Position
from pgshelf.http import log
from pgshelf.settings import Settings

Role = Literal["primary", "standby"]
State = Literal["healthy", "lagging", "disconnected"]

UP = Gauge("pgshelf_replica_up", "1 where reads go to a server.", ["server"], multiprocess_mode="livemin")
LAG = Gauge("pgshelf_replica_lag_seconds", "How old what a replica shows is.", ["server"], multiprocess_mode="livemax")
LAG_BYTES = Gauge(
    "pgshelf_replica_lag_bytes", "WAL that a replica has not replayed.", ["server"], multiprocess_mode="livemax"
)
READS = Counter("pgshelf_replica_reads", "Transactions that read, by the server that answered.", ["server"])

ROUND = 600  # answers of the primary that are remembered, to tell how old a replica is; then they are thinned
COARSE = 1.05  # how far from its age a replica may then be told to be
POLLS = (0.001, 0.002, 0.004, 0.008)  # seconds between questions while somebody waits for a replica
# What is asked about again and again, so it reads shared memory only. A standby that is told nothing by a primary, or
# whose receiver this role may not see, knows its timeline from its last restart point.
FAR = """case when r.standby then coalesce((select w.received_tli from pg_catalog.pg_stat_wal_receiver w),
    (select c.timeline_id from pg_catalog.pg_control_checkpoint() c))
  else ('x' || left(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_flush_lsn()), 8))::bit(32)::int end,
  (case when r.standby then pg_catalog.pg_last_wal_replay_lsn()
    else pg_catalog.pg_current_wal_flush_lsn() end - '0/0')::bigint"""
REACHED = f"select r.standby, {FAR} from (select pg_catalog.pg_is_in_recovery() as standby) r"  # noqa: S608 - constants
PROBE = f"""select r.standby, {FAR}, (select s.system_identifier from pg_catalog.pg_control_system() s),
  case when pg_catalog.pg_last_wal_receive_lsn() <= pg_catalog.pg_last_wal_replay_lsn() then 0
    else r.since end, r.since
from (select pg_catalog.pg_is_in_recovery() as standby,
  extract(epoch from clock_timestamp() - pg_catalog.pg_last_xact_replay_timestamp())::float8 as since
) r"""  # noqa: S608 - constants


class ServerState(msgspec.Struct, frozen=True):
    """A server that the settings name, as this process sees it."""

    name: str
    role: Role | None  # None until it has answered
    state: State
    position: Position | None
    lag_bytes: int | None
    lag_seconds: float | None
    error: str | None


class Server:
    """One server and what is known of it; a question each PGSHELF_REPLICA_INTERVAL keeps that true."""

    def __init__(self, name: str, settings: Settings, url: str) -> None:
        self.name, self.settings = name, settings
        self.reachable = False
        self.standby: bool | None = None
        self.position: Position | None = None
        self.estimate: float | None = None  # the server's own idea of its lag, in seconds
        self.replayed: float | None = None  # when the last commit was made that it shows, by the clock of this process
        self.error: str | None = None
        self.host: tuple[str, int] | None = None  # that the last answer came from
        self.answered = asyncio.Event()  # once
        self._target = connections.serving_dsn(settings, url, "pgshelf probe")
        self._connection: connections.Connection | None = None
        self._rest = 0.0  # not asked before
        self._woken = asyncio.Event()
        self._opening: set[asyncio.Timeout] = set()
        self._waiting: dict[asyncio.Future[bool], Position] = {}

    @property
    def role(self) -> Role | None:
        """What it last said that it is."""
        return None if self.standby is None else "standby" if self.standby else "primary"

    async def watch(self) -> None:
        """Ask how it is, for ever."""
        poll = 0
        while True:
            await asyncio.sleep(max(0.0, self._rest - time.monotonic()))
            self._woken.clear()
            await self._ask()
            for waiter, position in list(self._waiting.items()):
                if not waiter.done() and (not self.reachable or self._is_at(position)):
                    waiter.set_result(self.reachable)
            poll = min(poll + 1, len(POLLS) - 1) if self._waiting else 0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLLS[poll] if self._waiting else self.settings.replica_interval):
                    await self._woken.wait()

    async def _ask(self) -> None:
        silence: asyncio.TimerHandle | None = None
        try:
            if self._connection is None:
                limit = asyncio.timeout(self.settings.replica_timeout)
                self._connection = await connections.opened(self._target, lambda: limit, autocommit=True)
            # a question that is cancelled would wait for the server to say so, seconds where it says nothing
            silence = asyncio.get_running_loop().call_later(self.settings.replica_timeout, self._connection.cut)
            row = await (await self._connection.execute(PROBE, prepare=True)).fetchone()
        except (TimeoutError, psycopg.Error, OSError) as error:
            over = silence is not None and silence.when() <= asyncio.get_running_loop().time()
            self.lost(TimeoutError() if over else error, silent=over or isinstance(error, TimeoutError))
            return
        finally:
            if silence is not None:
                silence.cancel()
        assert row is not None  # noqa: S101 - narrows the type: the statement has one row
        standby, timeline, lsn, system, estimate, since = row
        position = None if lsn is None or timeline is None else Position(system % 2**64, timeline, lsn)
        info = self._connection.info
        host = (info.host, info.port)
        before, self.position, self.host = self.position, position, host
        self.standby, self.estimate, self.error = standby, estimate, None
        self.replayed = None if since is None else time.monotonic() - since
        if not self.reachable:
            log.info("%s answers: %s", self.name, "a standby" if standby else "a primary")
            self.reachable = True
        self.answered.set()
        self.heard(before)

    @contextlib.asynccontextmanager
    async def opening(self) -> AsyncIterator[None]:
        """Refuse to open connections while it is away, and give those up that are being opened when it goes."""
        if not self.reachable:
            raise psycopg.OperationalError(f"{self.name} is away")
        try:
            async with asyncio.timeout(None) as end:
                self._opening.add(end)
                try:
                    yield
                finally:
                    self._opening.discard(end)
        except TimeoutError:
            raise psycopg.OperationalError(f"{self.name} says nothing") from None

    def heard(self, before: Position | None) -> None:
        """For whoever has more to do with an answer."""

    def lost(self, error: BaseException, *, silent: bool = False) -> None:
        """It failed: nothing goes there until it answers again, on a new connection, after a rest."""
        if self.reachable:
            log.warning("%s is away: %s", self.name, str(error) or "no answer in time")
        self.reachable = False
        self.error = str(error).split("\n")[0] or "no answer in time"
        self._rest = time.monotonic() + self.settings.replica_interval
        while self._opening:
            self._opening.pop().reschedule(asyncio.get_running_loop().time())
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.cut()
            connection.pgconn.finish()
        self.answered.set()
        self._woken.set()

    async def reach(self, position: Position, seconds: float) -> bool:
        """Wait until it has replayed up to a position; False when it has not in time."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = position
        self._woken.set()
        try:
            async with asyncio.timeout(seconds):
                return bool(await waiter)
        except TimeoutError:
            return False
        finally:
            del self._waiting[waiter]

    def _is_at(self, position: Position) -> bool:
        return self.position is not None and self.position.reached(position)

    async def close(self) -> None:
        """Give back what it holds."""
        if self._connection is not None:
            await self._connection.close()


class Primary(Server):
    """Whichever server takes writes now. Where the settings name none but standbys, it is one of these."""

    def __init__(self, settings: Settings, url: str, engine: sqlalchemy.Engine) -> None:
        super().__init__("primary", settings, url)
        self.engine = engine
        self.beside = questions.Beside(settings, url, "auth", self.opening)
        self._past: list[tuple[float, int]] = []
        self._open = _open_connections(engine)

    def heard(self, before: Position | None) -> None:
        """Remember when the WAL was how long; leave a server behind that another one has taken over from."""
        if self.standby or self.position is None:
            return
        if before is not None and (before.system, before.timeline) != (self.position.system, self.position.timeline):
            log.warning("the primary is another one: %s", self.position.token)
            self._past.clear()
            for connection in list(self._open):
                if (connection.info.host, connection.info.port) != self.host:
                    connection.cut()
        self._past.append((time.monotonic(), self.position.lsn))
        if len(self._past) > ROUND:
            self._past = _thinned(self._past)

    def lost(self, error: BaseException, *, silent: bool = False) -> None:
        """It failed; what is asked about callers need not wait for it."""
        super().lost(error, silent=silent)
        if silent:
            self.beside.cut()

    @property
    def known(self) -> Position | None:
        """How far it was when it last answered, as a primary."""
        return None if self.standby or not self._past else self.position

    def age(self, lsn: int, replayed: float | None) -> float:
        """For how long it had had more than this, in seconds, when it last answered; that long at least.

        What is older than all that is remembered is as old as the last commit that is in it.
        """
        last = self._past[-1][0]
        for moment, end in reversed(self._past):
            if end <= lsn:
                return last - moment
        return max(last - self._past[0][0], math.inf if replayed is None else last - replayed)

    async def close(self) -> None:
        """Give back what it holds, but for the pool, which is not its own."""
        await super().close()
        await self.beside.close()


class Replica(Server):
    """A server of PGSHELF_REPLICA_URL. It is read from while it is a standby of the primary and does not lag."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        url: str,
        primary: Primary,
        cursor: type[psycopg.AsyncCursor[Any]] = psycopg.AsyncCursor,
    ) -> None:
        super().__init__(name, settings, url)
        self._primary = primary
        patient = msgspec.structs.replace(settings, connect_timeout=math.ceil(max(2.0, settings.replica_timeout)))
        self.engine = pools.make_engine(patient, url, self.opening, cursor=cursor)
        self.beside = questions.Beside(patient, url, "auth", self.opening)
        self.reading = 0
        self.turn = 0.0
        self._open = _open_connections(self.engine)
        for gauge in (UP, LAG, LAG_BYTES):
            gauge.labels(name).set(0)
        self._reads = READS.labels(name)

    @property
    def lag(self) -> tuple[int, float] | tuple[None, None]:
        """Bytes and seconds that it is behind the primary; without one, what itself knows of seconds."""
        if self.position is None or not self.standby:
            return None, None
        known = self._primary.known
        if known is None:
            return (None, None) if self.estimate is None else (0, self.estimate)
        if known.timeline > self.position.timeline:  # on its way to the new primary, if it gets there
            return max(0, known.lsn - self.position.lsn), self._primary.age(0, self.replayed)
        return max(0, known.lsn - self.position.lsn), self._primary.age(self.position.lsn, self.replayed)

    @property
    def state(self) -> State:
        """How it is."""
        if not self.reachable or self.position is None:
            return "disconnected"
        known = self._primary.known
        if known is not None and known.system != self.position.system:
            return "disconnected"
        seconds = self.lag[1]
        return "lagging" if seconds is not None and seconds > self.settings.replica_max_lag else "healthy"

    @property
    def usable(self) -> bool:
        """Whether it may be read from."""
        return bool(self.standby) and self.state == "healthy"

    def hopeful(self, position: Position) -> bool:
        """Whether it may have replayed up to a position soon."""
        return self._is_at(position) or (self.lag[1] or 0.0) <= self.settings.replica_wait

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Count a read while it goes on."""
        self.reading += 1
        self.turn = time.monotonic()
        try:
            yield
        finally:
            self.reading -= 1

    def answer_counted(self) -> None:
        """Count a read that was answered."""
        self._reads.inc()

    def heard(self, before: Position | None) -> None:
        """Show how it is."""
        size, seconds = self.lag
        UP.labels(self.name).set(self.usable)
        LAG.labels(self.name).set(seconds or 0)
        LAG_BYTES.labels(self.name).set(size or 0)

    def lost(self, error: BaseException, *, silent: bool = False) -> None:
        """It failed; where it says nothing at all, those who wait for its answers go elsewhere."""
        super().lost(error, silent=silent)
        UP.labels(self.name).set(0)
        if silent:
            self.beside.cut()
            for connection in list(self._open):
                connection.cut()

    async def close(self) -> None:
        """Give back what it holds."""
        await super().close()
        await self.beside.close()
        await pools.close(self.engine)


def _thinned(past: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """The older, the coarser, back to the first: the span is that of the service, whatever the settings are."""
    now, kept = past[-1][0], [past[-1]]
    for each, older in zip(past[-2:0:-1], past[-3::-1], strict=True):
        if now - older[0] > COARSE * (now - kept[-1][0]):
            kept.append(each)
    return [past[0], *reversed(kept)]


def _open_connections(engine: sqlalchemy.Engine) -> set[connections.Connection]:
    """The connections of a pool, kept up to date."""
    found: set[connections.Connection] = set()
    event.listen(engine.pool, "connect", lambda _, record: found.add(record.driver_connection))
    event.listen(engine.pool, "close", lambda _, record: found.discard(record.driver_connection))
    event.listen(engine.pool, "close_detached", lambda connection: found.discard(connection.driver_connection))
    return found
