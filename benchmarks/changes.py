"""The change feed: what it adds to writing 10,000 documents, what giving positions costs, and how soon a reader knows.

Starts a PostgreSQL and a service of its own; about half a minute.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psycopg

from pgshelf import embedded, migrate
from pgshelf_client import Client

LIBRARY = """insert into pgshelf.libraries (name, dimension, embedder, chunking, index)
values ('feed', 3, '{"provider": "none"}', '{}', '{"type": "auto"}') returning id"""
DOCUMENTS = """insert into pgshelf.documents (place, library_id, key, metadata)
select 1, %s, %s || n::text, '{"year": 1999}' from generate_series(1, %s) n"""
UPDATE = "update pgshelf.documents set metadata = '{\"year\": 2000}', version = version + 1 where key like %s"


def main() -> None:
    """Write with the feed and without it, give positions, then follow a writer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = embedded.start(Path(folder), 18)
        try:
            migrate.upgrade(server.url(), warn=False)
            with psycopg.connect(server.url(), autocommit=True) as connection:
                writing(connection, options)
                idle(connection)
            lag(server.url(), Path(folder))
        finally:
            server.stop()


def took(connection: psycopg.Connection[Any], statement: str, *parameters: Any) -> float:
    started = time.perf_counter()
    connection.execute(statement.encode(), parameters)
    return (time.perf_counter() - started) * 1000


def writing(connection: psycopg.Connection[Any], options: argparse.Namespace) -> None:
    """The same inserts and updates in turns, with the feed's rows and without them."""
    found = connection.execute(LIBRARY).fetchone()
    library = found[0] if found else None
    bodies = {
        name: connection.execute("select pg_get_functiondef(%s::regproc)", [f"pgshelf.{name}"]).fetchone()
        for name in ("documents_inserted", "documents_updated")
    }
    times: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for feed in ("with", "without"):
            for body in bodies.values():
                assert body  # noqa: S101 - narrows the type
                connection.execute((body[0] if feed == "with" else stripped(body[0])).encode())
            prefix = f"{feed} {number} "
            times.setdefault(f"insert {feed}", []).append(
                took(connection, DOCUMENTS, library, prefix, options.documents)
            )
            times.setdefault(f"update {feed}", []).append(took(connection, UPDATE, prefix + "%"))
            if feed == "with":
                stamp = "select pgshelf.stamp_changes(%s, false, 1000000)"
                times.setdefault("stamp both", []).append(took(connection, stamp, library))
    for body in bodies.values():
        connection.execute((body[0] if body else "").encode())
    for name, values in times.items():
        print(f"{options.documents} documents, {name:15} {statistics.median(values):8.0f} ms")


def stripped(body: str) -> str:
    """A trigger function without its first insert, that of the feed."""
    begin = body.index("insert into pgshelf.change_log")
    return body[:begin] + body[body.index(";", begin) + 1 :]


def idle(connection: psycopg.Connection[Any]) -> None:
    """What one look for waiting readers costs when nothing happened."""
    look = "select library_id, last from pgshelf.look_for_changes(array(select id from pgshelf.libraries))"
    values = [took(connection, look) for _ in range(200)]
    print(f"a look when nothing has changed  {statistics.median(values):8.2f} ms")


def lag(url: str, folder: Path) -> None:
    """From the commit of a change until a reader that waits has it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    known = {name: value for name, value in os.environ.items() if not name.startswith("PGSHELF_")}
    known |= {"PGSHELF_DATABASE_URL": url, "PGSHELF_WORKERS": "1", "PGSHELF_DATA_DIR": str(folder / "none")}
    command = [str(Path(sys.executable).with_name("pgshelf")), "serve", "--port", str(port)]
    service = subprocess.Popen(command, env=known, stdin=subprocess.DEVNULL)
    try:
        with Client(f"http://127.0.0.1:{port}", retries=0) as client:
            deadline = time.monotonic() + 60
            while not _ready(client) and time.monotonic() < deadline:
                time.sleep(0.1)
            seen: dict[str, float] = {}
            cursor = client.changes_page("feed", after="now").next

            def follow() -> None:
                for change in client.changes("feed", after=cursor, follow=True):
                    seen[change.key or ""] = time.perf_counter()
                    if change.key == "last":
                        return

            follower = threading.Thread(target=follow, daemon=True)
            follower.start()
            written: dict[str, float] = {}
            with psycopg.connect(url, autocommit=True) as connection:
                for key in [*(f"lag {number}" for number in range(100)), "last"]:
                    connection.execute("select pgshelf.put_document('feed', key => %s)", [key])
                    written[key] = time.perf_counter()
                    time.sleep(0.05)
            follower.join(30)
    finally:
        service.terminate()
        service.wait(30)
    lags = sorted((seen[key] - at) * 1000 for key, at in written.items())
    print(f"from commit to a waiting reader  {statistics.median(lags):8.0f} ms, longest {lags[-1]:.0f} ms")


def _ready(client: Client) -> bool:
    try:
        return client.ready().status == "ready"
    except Exception:
        return False


if __name__ == "__main__":
    main()
