"""Single connections: how one is addressed, opened and cut, and what its errors say of it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

import psycopg
import psycopg.conninfo

from pgshelf.consistency import Position
from pgshelf.settings import Settings

# What a connection answers whose server was migrated or demoted, or is another one, since it was opened.
STALE_STATES = {"25006", "26000", "3F000", "42704", "42883", "42P01", "42P05"}
STALE_MESSAGES = ("cache lookup failed", "cached plan must not change")


def dsn(url: str, **parameters: str | int) -> str:
    """A libpq connection string from any form of one; SQLAlchemy's `postgresql+psycopg://` is understood too."""
    return psycopg.conninfo.make_conninfo(url.replace("postgresql+psycopg://", "postgresql://", 1), **parameters)


class Connection(psycopg.AsyncConnection[Any]):
    """A connection of a pool, and what is known of its server."""

    system: int | None = None  # the cluster, where clients are told how far their writes are
    seen: Position | None = None  # of a standby: how far it had replayed when it was last asked
    unconfirmed = False  # a commit that no standby confirmed has gone through
    patience = 30.0  # seconds that a commit may wait for standbys

    def heed(self, notice: psycopg.errors.Diagnostic) -> None:
        """Remember that the wait for a standby was cut short: what was committed may be lost with this server."""
        # the function's name, for the message is in the server's language
        self.unconfirmed |= notice.source_function == "SyncRepWaitForLSN"

    # SQLAlchemy sets these of a connection that it takes out of its pool, and loses it where that is cancelled
    async def set_autocommit(self, value: bool) -> None:
        """Without giving way to others, as psycopg does on a busy loop: it asks the server nothing."""
        _at_once(super().set_autocommit(value))

    async def set_isolation_level(self, value: psycopg.IsolationLevel | None) -> None:
        """Likewise."""
        _at_once(super().set_isolation_level(value))

    def cut(self) -> None:
        """End it at once, from outside: whoever waits for its answer learns that it is lost."""
        with contextlib.suppress(OSError, psycopg.Error), socket.socket(fileno=os.dup(self.fileno())) as beside:
            beside.shutdown(socket.SHUT_RDWR)


def _at_once(work: Coroutine[Any, Any, None]) -> None:
    try:
        while work.send(None) is None:
            pass
    except StopIteration:
        return
    finally:
        work.close()
    raise RuntimeError("somebody else uses the connection")


# What a process opens beside its pool, each once: for who calls, for rates, for whether a kept answer is good;
# with a worker a session for shelves and another while it moves a library; with replicas one that watches the
# primary, and one more where the primary is itself among PGSHELF_REPLICA_URL.
QUESTIONS, RECONCILER, WATCHES = 3, 2, 2


def most(settings: Settings) -> int:
    """How many connections a serving process opens at most; a change of an embedder takes one more while it lasts."""
    worker = RECONCILER if settings.worker_enabled else 0
    return settings.pool_size + QUESTIONS + worker + (WATCHES if settings.replica_url else 0)


def connect(url: str, name: str) -> psycopg.Connection[Any]:
    """A plain connection for commands that ask the server something; autocommit."""
    # the encoding is named lest a database that has none hand out bytes
    target = dsn(url, application_name=f"pgshelf {name}", connect_timeout=5, client_encoding="UTF8")
    return psycopg.connect(target, autocommit=True)


def serving_dsn(settings: Settings, url: str, name: str, **parameters: str | int) -> str:
    """The connection string of a serving process; of several hosts the one that takes writes is wanted.

    A server that has vanished without a word is noticed within seconds.
    """
    known = psycopg.conninfo.conninfo_to_dict(dsn(url))
    lively: dict[str, str | int] = {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
    lively["tcp_user_timeout"] = 15_000
    if "," in str(known.get("host") or known.get("hostaddr") or ""):
        lively["target_session_attrs"] = "read-write"
    given = {key: value for key, value in lively.items() if key not in known}
    return dsn(url, application_name=name, connect_timeout=settings.connect_timeout, **given, **parameters)


Opening = Callable[[], AbstractAsyncContextManager[Any]]  # around the making of a connection; may refuse or end it


async def opened(target: str, opening: Opening = contextlib.nullcontext, *, autocommit: bool = False) -> Connection:
    """A new connection, unless `opening` has something against it."""
    connection: Connection | None = None
    try:
        async with opening():
            connection = await Connection.connect(target, autocommit=autocommit)
    except BaseException:
        if connection is not None:  # made a moment before it was given up
            connection.pgconn.finish()
        raise
    return connection


def is_lost(error: BaseException | None) -> bool:
    """Whether the connection is gone, or there was none."""
    if not isinstance(error, psycopg.OperationalError):
        return False
    state = error.sqlstate
    return state is None or state[:2] == "08" or state in ("53300", "57P01", "57P02", "57P03", "57P05")


def is_stale(error: psycopg.Error) -> bool:
    """Whether the server has changed under the connection, so that a new one may fare better."""
    if error.sqlstate is None:  # the driver learned no vector type, when there was none yet
        return isinstance(error, psycopg.ProgrammingError)
    return error.sqlstate in STALE_STATES or str(error).startswith(STALE_MESSAGES)
