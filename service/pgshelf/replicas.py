"""Which server reads for a request: a replica that is fresh enough and does least, or the primary."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

import psycopg
import psycopg.conninfo
import sqlalchemy
from litestar.di import NamedDependency
from litestar.params import HeaderParameter, SkipValidation
from prometheus_client import Counter

from pgshelf import connections, database
from pgshelf.connections import Connection
from pgshelf.consistency import FORM, LEVEL, TOKEN, Level, Position
from pgshelf.errors import Problem
from pgshelf.http import Engine, log
from pgshelf.servers import REACHED, READS, Primary, Replica, ServerState, State
from pgshelf.settings import Settings, connection_strings

T = TypeVar("T")
RETRIES = Counter("pgshelf_replica_retries", "Reads that a replica could not answer, by what kept it.", ["reason"])
PRIMARY_READS = READS.labels("primary")


class Topology:
    """The servers of a service, its primary and its replicas, whose pools give out cursors of the class `cursor`."""

    def __init__(
        self,
        settings: Settings,
        engine: sqlalchemy.Engine,
        url: str,
        replicas: Mapping[str, str],
        cursor: type[psycopg.AsyncCursor[Any]] = psycopg.AsyncCursor,
    ) -> None:
        self.settings = settings
        self.primary = Primary(settings, url, engine)
        self.replicas = [Replica(name, settings, each, self.primary, cursor) for name, each in replicas.items()]

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Ask all servers how they are while the block runs, and once before it."""
        servers = [self.primary, *self.replicas]
        tasks = [asyncio.create_task(server.watch(), name=f"pgshelf probe of {server.name}") for server in servers]
        try:
            await asyncio.gather(*(server.answered.wait() for server in servers))
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for server in servers:
                await server.close()

    def servers(self) -> list[ServerState]:
        """All of them as they are now: for the status, /ready and whoever else asks."""
        primary = self.primary
        state: State = "healthy" if primary.reachable else "disconnected"
        found = [ServerState(primary.name, primary.role, state, primary.position, None, None, primary.error)]
        for each in self.replicas:
            size, seconds = each.lag
            found.append(ServerState(each.name, each.role, each.state, each.position, size, seconds, each.error))
        return found

    def choose(self, wanted: Position | None, tried: list[Replica]) -> Replica | None:
        """The replica that does least just now, out of those that are fresh enough or will be soon."""
        usable = [each for each in self.replicas if each.usable and each not in tried]
        if wanted is not None:
            known = self.primary.known
            if known is not None and known.timeline > wanted.timeline and wanted.lsn > known.lsn:
                return None  # the failover has lost it, so nobody has it
            usable = [each for each in usable if each.hopeful(wanted)]
        return min(usable, key=lambda each: (each.reading, each.turn), default=None)

    async def ask(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """A question about the caller. The primary answers; only while it is away a replica, as of its lag."""
        if self.primary.reachable:
            try:
                return await self.primary.beside.ask(statement, *parameters)
            except (psycopg.Error, Problem) as error:
                if not connections.is_lost(error) and self.primary.reachable:
                    raise
        for replica in sorted(filter(lambda each: each.usable, self.replicas), key=lambda each: each.lag[1] or 0.0):
            with contextlib.suppress(psycopg.OperationalError, Problem):
                return await replica.beside.ask(statement, *parameters)
        return await self.primary.beside.ask(statement, *parameters)

    async def close(self) -> None:
        """For whoever asks about callers: all is closed with the watch."""


class _Elsewhere(Exception):
    """A replica cannot answer; its text is the reason that is counted."""


class _Behind(Exception):
    """A replica has not replayed what a request has seen."""


class Routed(database.Reads):
    """The reads of one request: all on one replica, if it can answer them, else on the primary."""

    def __init__(self, topology: Topology, wanted: Position | None) -> None:
        self.topology, self.primary = topology, topology.primary.engine
        self._wanted = wanted
        self._server: Replica | None = None
        self._tried: list[Replica] = []
        self._until: float | None = None  # to wait for a replica

    async def retried(self, work: Callable[[Connection], Awaitable[T]], *, single: bool = False) -> T:
        """Do `work`, which changes nothing, on a replica; on the primary where that is no help."""
        for _ in range(2):
            server = self._server
            if server is None or not server.usable:
                server = self.topology.choose(self._wanted, self._tried)
            if server is None:
                break
            try:
                answer = await self._there(server, work, single)
            except _Elsewhere as reason:
                RETRIES.labels(str(reason)).inc()
                self._tried.append(server)
                self._server = None
            else:
                self._server = server
                server.answer_counted()
                return answer
        answer = await database.retried(self.primary, work, single=single)
        PRIMARY_READS.inc()
        return answer

    async def _there(self, server: Replica, work: Callable[[Connection], Awaitable[T]], single: bool) -> T:
        again = True
        while True:
            try:
                with server.used():
                    async with database.transaction(server.engine, single=single) as connection:
                        if self._wanted is not None:
                            await _check(connection, self._wanted)
                        return await work(connection)
            except _Behind:
                if not await self._patience(server, self._wanted):
                    raise _Elsewhere("behind") from None
            except Problem as problem:
                if problem.code != "pool_exhausted":
                    raise
                raise _Elsewhere("busy") from None
            except psycopg.Error as error:
                reason = of_standby(error)
                if reason is None:
                    raise
                if reason == "lost":
                    server.lost(error)
                if reason != "conflict" or not again:
                    log.info("%s did not answer (%s): %s", server.name, reason, error)
                    raise _Elsewhere(reason) from None
                again = False
                RETRIES.labels("conflict").inc()

    async def _patience(self, server: Replica, wanted: Position | None) -> bool:
        assert wanted is not None  # noqa: S101 - narrows the type: who wants nothing is behind nothing
        now = time.monotonic()
        self._until = self._until or now + self.topology.settings.replica_wait
        return self._until > now and await server.reach(wanted, self._until - now)


async def _check(connection: Connection, wanted: Position) -> None:
    """Make sure, on the very connection that will answer, that its server has replayed what is wanted.

    What a server has replayed stays replayed for as long as its connections live, so it is asked once for each step.
    The transaction is READ COMMITTED: what comes next has a snapshot of its own.
    """
    if connection.seen is not None and connection.seen.reached(wanted):
        return
    standby, timeline, lsn = (await database.rows(connection, REACHED))[0]
    if not standby or timeline is None or lsn is None or connection.system is None:
        raise _Elsewhere("behind")
    connection.seen = Position(connection.system % 2**64, timeline, lsn)
    if not connection.seen.reached(wanted):
        raise _Behind


def of_standby(error: psycopg.Error) -> str | None:
    """Why a read that failed on a standby may succeed elsewhere; None where it would not.

    `conflict` may pass on the standby itself: a recovery conflict, or an index that vacuum has changed under a scan,
    for which PostgreSQL and pgvector raise internal errors.
    """
    state = error.sqlstate
    if "conflict with recovery" in str(error):
        return "conflict"
    if connections.is_lost(error):
        return "lost"
    if state is None:  # the driver's own: it could not read the answer, as where the extension is not there yet
        return None if isinstance(error, psycopg.DataError) else "other"
    if state in ("40001", "40P01") or state[:2] in ("XX", "58"):
        return "conflict"
    client = state[:2] in ("PS", "22", "23", "54") and state != "PS900"
    return None if client or state in ("57014", "42501") else "other"


def targets(settings: Settings) -> dict[str, str]:
    """The servers of PGSHELF_REPLICA_URL by their names, each with a connection string of its own."""
    found: dict[str, str] = {}
    for url in connection_strings(settings.replica_url) if settings.replica_url else []:
        known = psycopg.conninfo.conninfo_to_dict(connections.dsn(url))
        hosts = str(known.get("host") or known.get("hostaddr") or "").split(",")
        addresses = str(known.get("hostaddr") or "").split(",")
        ports = str(known.get("port") or "5432").split(",")
        for place, host in enumerate(hosts):
            port = ports[place] if len(ports) > 1 else ports[0]
            own: dict[str, Any] = {**known, "host": host, "port": port}
            own.pop("target_session_attrs", None)
            if known.get("hostaddr"):
                own["hostaddr"] = addresses[place]
            found.setdefault(f"{host or 'localhost'}:{port}", psycopg.conninfo.make_conninfo("", **own))
    return found


Shape = NamedDependency[SkipValidation[Topology | None]]
Wanted = Annotated[
    str | None,
    HeaderParameter(
        name=TOKEN,
        description="What a write answered: this read sees it. Where the replicas have not got that far in time, the "
        "primary answers.",
        schema_extra={"pattern": FORM},
    ),
]
Asked = Annotated[
    Level | None,
    HeaderParameter(
        name=LEVEL,
        description="`eventual`: any replica that does not lag too far. `session`, the default: one that shows what "
        "the token stands for. `strong`: the primary.",
    ),
]


def reader(engine: Engine, topology: Shape, consistency: Asked = None, consistency_token: Wanted = None) -> Any:
    """The dependency `reader` of a handler that reads: the primary's pool itself where there are no replicas."""
    wanted = None if consistency_token is None else Position.of(consistency_token)
    if topology is None or consistency == "strong":
        return engine
    return Routed(topology, None if consistency == "eventual" else wanted)
