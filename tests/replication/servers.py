"""A primary and its standbys, real servers from the bundled binaries, each in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo

from pgshelf.embedded import DATABASE, EmbeddedServer
from tests.postgres import in_memory

FAST = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "32MB", "max_wal_size": "256MB"}


class Postgres:
    """One server; `url` reaches it through its socket. What kills or freezes it leaves its folder as it is."""

    def __init__(self, folder: Path, version: int = 18, settings: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.settings = {**FAST, **(settings or {})}
        self.server = EmbeddedServer(folder, version, self.settings, 60)

    @property
    def url(self) -> str:
        """Of the database that pgshelf has on it."""
        return self.server.url()

    @property
    def pgdata(self) -> Path:
        return self.folder / "postgres"

    def start(self) -> None:
        """Start it, or start it again after `kill`."""
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        """kill -9 of the postmaster; its processes end by themselves, or at the next start."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """Stop all its processes: it answers nothing, and its connections stay open."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        import psutil

        assert self.server.pid is not None
        postmaster = psutil.Process(self.server.pid)
        for process in [postmaster] if number == signal.SIGKILL else [postmaster, *postmaster.children(recursive=True)]:
            os.kill(process.pid, number)

    def query(self, statement: str, *parameters: Any, database: str = DATABASE) -> list[tuple[Any, ...]]:
        """Run one statement by itself, as superuser."""
        with psycopg.connect(self.server.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, *parameters: Any) -> Any:
        """The one value that a statement gives."""
        return self.query(statement, *parameters)[0][0]

    def promote(self) -> None:
        """Make a standby the primary; returns when it takes writes."""
        assert self.one("select pg_promote(true, 60)")

    def run(self, program: str, *arguments: str) -> None:
        """Run one of PostgreSQL's programs as this server's account (it may be root who runs the tests)."""
        done = self.server._run(program, *arguments)
        assert done.returncode == 0, done.stderr


class Primary(Postgres):
    """The server that takes writes; `start` makes it with an empty database `pgshelf`."""

    def standby(self, folder: Path, name: str, *, slot: bool = True, settings: dict[str, str] | None = None) -> Standby:
        """Copy this running server and start the copy as a standby that follows it under a name, with a slot."""
        copy = Standby(folder, self.server.version, settings)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.server._account:
            os.chown(folder, *self.server._account)
        source = conninfo.make_conninfo(self.server.url("postgres"), application_name=name)
        slots = ["--create-slot", f"--slot={name}"] if slot else []
        self.run(
            "pg_basebackup", f"--dbname={source}", f"--pgdata={copy.pgdata}", "--write-recovery-conf",
            "--checkpoint=fast", "--no-sync", *slots,
        )  # fmt: skip
        copy.start()
        return copy


class Standby(Postgres):
    """A server that follows another one; `Primary.standby` makes it."""

    def wait_for(self, primary: Postgres, seconds: float = 20) -> None:
        """Wait until it has replayed all that the primary has written by now."""
        reached = primary.one("select pg_current_wal_lsn()")
        wait_until(lambda: self.one("select pg_last_wal_replay_lsn() >= %s::pg_lsn", reached), seconds)


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Fail when something does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A short-lived folder: pytest's own are too deep for a socket, and closed to the account of servers under root.

    In memory where there is room: some disks take long to forget a thousand files that were flushed.
    """
    made = Path(tempfile.mkdtemp(prefix="pgshelf-replication-", dir=in_memory()))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def running(*servers: Postgres) -> Iterator[None]:
    """Stop servers at the end, the last one first, whatever state they are in."""
    try:
        yield
    finally:
        for server in reversed(servers):
            with contextlib.suppress(Exception):
                server.resume()
            server.stop()


@contextlib.contextmanager
def cluster(*names: str, version: int = 18, **settings: str) -> Iterator[tuple[Primary, list[Standby]]]:
    """A migrated primary and standbys of these names, all with the same settings, for as long as the block runs."""
    from pgshelf import migrate

    with folder() as place, contextlib.ExitStack() as stack:
        primary = Primary(place / "primary", version, settings)
        stack.enter_context(running(primary))
        primary.start()
        migrate.upgrade(primary.url, warn=False)
        standbys = []
        for name in names:
            standbys.append(primary.standby(place / name, name, settings=settings))
            stack.enter_context(running(standbys[-1]))
        yield primary, standbys
