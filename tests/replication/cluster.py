"""A primary and its standbys on the bundled PostgreSQL, each in a directory of its own; kill, promote, rewind."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import psycopg
import psycopg.conninfo

from pgshelf import embedded, embedded_account

SETTINGS = {
    "wal_log_hints": "on",  # pg_rewind asks for it where there are no checksums
    "wal_keep_size": "512MB",
    "max_wal_senders": "10",
    "shared_buffers": "64MB",
    "max_connections": "60",
    "hot_standby_feedback": "off",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "200ms",
    "wal_receiver_timeout": "10s",
    # a failover shall not wait for a checkpoint of five minutes
    "checkpoint_timeout": "30s",
}


class Node:
    """One server; whether it is the primary or a standby changes in its life."""

    def __init__(self, directory: Path, version: int, settings: dict[str, str]) -> None:
        self.directory, self.version = directory, version
        self.settings = {**SETTINGS, **settings}
        self.server = embedded.EmbeddedServer(directory, version, self.settings, 60)
        self.pgdata = directory / "postgres"

    @property
    def socket(self) -> str:
        """The directory of its socket, which is the `host` of a connection string."""
        return str(self.server.socket_dir)

    @property
    def url(self) -> str:
        """The connection string of this very server, whatever it is."""
        return self.server.url()

    def start(self) -> None:
        self.server.start()

    def run(self, program: str, *arguments: str) -> None:
        done = self.server._run(program, *arguments)
        assert done.returncode == 0, f"{program}: {done.stdout}\n{done.stderr}"

    def follow(self, primary: Node) -> None:
        """Be a standby of another server from the next start on."""
        self.settings["primary_conninfo"] = (
            f"host={primary.socket} user=postgres application_name={self.directory.name}"
        )
        signal_file = self.pgdata / "standby.signal"
        signal_file.touch()
        os.chown(signal_file, self.pgdata.stat().st_uid, self.pgdata.stat().st_gid)

    def set(self, **settings: str) -> None:
        """Change settings of the running server, by `alter system`, until it is started anew or they are reset."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            for name, value in settings.items():
                connection.execute(f"alter system set {name} = {psycopg.sql.quote(value)}")
            connection.execute("select pg_reload_conf()")

    def ask(self, statement: str, *parameters: Any) -> Any:
        """The first column of the first row."""
        with psycopg.connect(self.url, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement, parameters)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None

    def processes(self) -> list[psutil.Process]:
        pid = self.server.pid
        if pid is None:
            return []
        postmaster = psutil.Process(pid)
        return [postmaster, *postmaster.children()]

    def signal(self, number: int) -> None:
        """Send a signal to the postmaster and to all its backends."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        """Kill -9 all of it, and wait until nothing is left."""
        processes = self.processes()
        self.signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """SIGSTOP while the block runs: connections stay open and nothing answers."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


class Cluster:
    """A primary and standbys; `primary` is whichever is it now."""

    def __init__(
        self, directory: Path, version: int, standbys: int = 2, settings: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.nodes = [Node(directory / f"n{number}", version, dict(settings or {})) for number in range(standbys + 1)]
        self.primary = self.nodes[0]
        self.primary.start()
        for node in self.standbys:
            self.copy(node)
            node.start()

    @property
    def standbys(self) -> list[Node]:
        return [node for node in self.nodes if node is not self.primary]

    def copy(self, node: Node) -> None:
        """Make a standby of the primary by pg_basebackup."""
        node.directory.mkdir(mode=0o700, exist_ok=True)
        os.chown(node.directory, self.primary.pgdata.stat().st_uid, self.primary.pgdata.stat().st_gid)
        node.server._account = embedded_account.account_for(self.primary.pgdata)
        backup = ["-D", str(node.pgdata), "-h", self.primary.socket, "-U", "postgres", "-X", "stream", "-c", "fast"]
        node.run("pg_basebackup", *backup, "--no-sync")
        node.follow(self.primary)

    @property
    def url(self) -> str:
        """All servers, for whoever writes."""
        hosts = ",".join(node.socket for node in self.nodes)
        return f"postgresql://postgres@/{embedded.DATABASE}?host={hosts}&port=5432"

    @property
    def replica_url(self) -> str:
        """All servers again, for whoever reads: which of them is the primary changes."""
        return self.url

    def caught_up(self, seconds: float = 20) -> None:
        """Wait until all standbys have replayed what the primary has."""
        end = self.primary.ask("select pg_current_wal_flush_lsn()::text")
        for node in self.standbys:
            until(lambda node=node: node.ask("select pg_last_wal_replay_lsn() >= %s::pg_lsn", end), seconds)  # type: ignore[misc]

    def promote(self, node: Node) -> None:
        """Make a standby the primary, as an operator or Patroni would; the old one is dead, the others follow it."""
        old, self.primary = self.primary, node
        assert node.ask("select pg_promote(true, 30)")
        for other in self.standbys:
            if other is not old:
                other.follow(node)
                other.server._write_config()
                other.ask("select pg_reload_conf()")

    def rewind(self, node: Node) -> None:
        """Bring a former primary, or a standby that went another way, back as a standby."""
        source = psycopg.conninfo.make_conninfo(self.primary.server.url("postgres"))
        # pg_rewind writes it as the server's user; the last one to write it may have been root
        os.chown(node.pgdata / embedded.CONFIG_FILE, node.pgdata.stat().st_uid, node.pgdata.stat().st_gid)
        node.run("pg_rewind", "-D", str(node.pgdata), f"--source-server={source}", "--no-sync")
        node.follow(self.primary)
        node.start()

    def close(self) -> None:
        for node in [*self.standbys, self.primary]:
            node.signal(signal.SIGCONT)
            node.server.stop()


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for something that a server does by itself."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
