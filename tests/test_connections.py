"""How many connections to PostgreSQL a service opens: what `pgshelf doctor` and the documentation say."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from pgshelf import connections
from pgshelf.settings import Settings
from pgshelf_client import Client

DOCS = Path(__file__).parent.parent / "docs"
OPEN = """
select application_name, count(*) from pg_stat_activity
where datname = current_database() and backend_type = 'client backend' and application_name like 'pgshelf %' group by 1
"""


@pytest.mark.unwatched
def test_a_busy_service_opens_no_more_than_it_says(database_url: str, make_live_server: Any) -> None:
    """Writers, searchers, all its limits and caches, a library that gets its shelf and index, another embedder."""
    known = {"PGSHELF_POOL_SIZE": "3", "PGSHELF_PROMOTE_AT": "100", "PGSHELF_WORKER_INTERVAL": "0.05"}
    known |= {"PGSHELF_RATE_LIMIT_SEARCH": "100000/s", "PGSHELF_RATE_LIMIT_WRITE": "100000/s"}
    server = make_live_server(database_url, "--workers", "1", **known)
    most, done = Counter[str](), threading.Event()

    def write(client: Client, number: int) -> None:
        client.put_document("busy", f"d{number}", chunks=[{"text": f"Text {part} of {number}."} for part in range(10)])

    def search(client: Client, number: int) -> None:
        client.search("busy", f"text {number % 5}", k=3)

    def repeat(work: Any, numbers: Any) -> None:
        with Client(server.url) as client:
            while not done.is_set():
                work(client, next(numbers))

    with psycopg.connect(database_url, autocommit=True) as db, Client(server.url) as client:
        client.create_library("busy", embedder={"provider": "local", "dimension": 64})
        with ThreadPoolExecutor(16) as pool:
            tasks = [
                pool.submit(repeat, work, itertools.count(start)) for work in (write, search) for start in range(8)
            ]
            began, changed = time.monotonic(), False
            try:
                while time.monotonic() < began + 8:
                    now: dict[str, int] = dict(db.execute(OPEN).fetchall())
                    most["in all"] = max(most["in all"], sum(now.values()))
                    for name, number in now.items():
                        most[name] = max(most[name], number)
                    if not changed and time.monotonic() > began + 4:
                        client.set_embedder("busy", "local", dimension=128)
                        changed = True
                    time.sleep(0.02)
            finally:
                done.set()
        for task in tasks:
            task.result()
    limit = connections.most(msgspec.structs.replace(Settings(), pool_size=3))
    assert {name: number for name, number in most.items() if name not in ("pgshelf shelves", "in all")} == {
        "pgshelf serve": 3,
        "pgshelf auth": 1,
        "pgshelf rates": 1,
        "pgshelf cache": 1,
    }
    assert 1 <= most["pgshelf shelves"] <= connections.RECONCILER + 1  # one for the change of an embedder
    assert 3 + 4 <= most["in all"] <= limit + 1


def test_the_documentation_has_the_same_number() -> None:
    """A process with its worker, without replicas."""
    beside = connections.most(Settings()) - Settings().pool_size
    for name in ("operations.md", "deployment.md"):
        said = re.findall(r"\(`PGSHELF_POOL_SIZE` \+ (\d+)\)", (DOCS / name).read_text())
        assert said and set(said) == {str(beside)}, name
