"""`make replicas`: a primary, two standbys and the service over them, until Ctrl-C; nothing is kept."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from types import FrameType

from tests.replication.servers import Primary, Standby, cluster

WORDS = """
  API       http://127.0.0.1:{port}/v1, writes on the primary, reads on the replicas
            http://127.0.0.1:{other}/v1, on replica1 alone: it reads, and refuses writes

  write     curl -s http://127.0.0.1:{port}/v1/libraries -H 'content-type: application/json' -d '{{"name": "notes"}}'
            curl -s http://127.0.0.1:{port}/v1/libraries/notes/documents -H 'content-type: application/json' \\
              -d '{{"text": "A standby replays what the primary has written."}}'
  read      curl -s http://127.0.0.1:{other}/v1/libraries/notes/search -H 'content-type: application/json' \\
              -d '{{"query": "replication"}}'
  status    curl -s http://127.0.0.1:{port}/v1/replication        and the same on {other}
  lag       {replica} -c 'select pg_wal_replay_pause()'      write something, look at the status; pg_wal_replay_resume()
  backup    curl -s http://127.0.0.1:{port}/v1/replication/backups -H 'content-type: application/json' -d '{{}}'
            curl -s http://127.0.0.1:{port}/v1/replication/backups
  failover  kill -9 {pid}                                            the primary
            {replica} -c 'select pg_promote()'      then {other} takes writes
  psql      {primary}
"""


def main() -> None:
    """Start everything, say what to try, wait, stop everything."""
    parser = argparse.ArgumentParser(prog="make replicas", description=__doc__)
    parser.add_argument("--port", type=int, default=8432)
    port: int = parser.parse_args().port
    told = threading.Event()

    def end(_: int, __: FrameType | None) -> None:
        told.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    print("starting a primary and two standbys ...", flush=True)
    with cluster("replica1", "replica2") as (primary, standbys), contextlib.ExitStack() as stack:
        for at, environment in ((port, over(primary, standbys)), (port + 1, alone(standbys[0]))):
            stack.enter_context(serving(at, environment, told))
        if not told.is_set():
            words = {"primary": primary.server.psql_command(), "replica": standbys[0].server.psql_command()}
            print(
                WORDS.format(port=port, other=port + 1, pid=primary.server.pid, **words), "Ctrl-C ends it.", flush=True
            )
        told.wait()
        print("stopping ...", flush=True)


def over(primary: Primary, standbys: list[Standby]) -> dict[str, str]:
    """The service that writes."""
    return {
        "PGSHELF_DATABASE_URL": primary.url,
        "PGSHELF_REPLICA_URL": ",".join(server.url for server in (primary, *standbys)),
        "PGSHELF_BACKUP_DIRECTORY": str(primary.folder.parent / "backups"),
    }


def alone(standby: Standby) -> dict[str, str]:
    """A service on one standby, which only reads."""
    return {"PGSHELF_DATABASE_URL": standby.url, "PGSHELF_WORKER_ENABLED": "false"}


@contextlib.contextmanager
def serving(port: int, environment: Mapping[str, str], told: threading.Event) -> Iterator[None]:
    """A `pgshelf serve`, ready unless everything is to end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
    fixed = {"PGSHELF_PORT": str(port), "PGSHELF_WORKERS": "1", "PGSHELF_LOG_LEVEL": "warning"}
    command = [sys.executable, "-m", "pgshelf.cli", "serve"]
    process = subprocess.Popen(
        command, env={**inherited, **fixed, **environment}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while not told.is_set() and process.poll() is None and not ready(port):
            time.sleep(0.1)
        if process.poll() is not None:
            raise SystemExit(f"pgshelf serve ended with {process.returncode}")
        yield
    finally:
        process.terminate()
        process.wait(60)


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


if __name__ == "__main__":
    main()
