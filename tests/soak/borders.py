"""Thousands of probes across the border between libraries: tests/probes.py on a PostgreSQL of its own."""

from __future__ import annotations

from pathlib import Path

import httpx2
import psycopg

from pgshelf import embedded, migrate
from pgshelf.app import create_app
from pgshelf.settings import Settings
from tests import probes
from tests.conftest import _lifespan
from tests.postgres import FAST
from tests.rest.asking import key
from tests.roles import logins


async def crossed(folder: Path, count: int, seed: int, version: int) -> str:
    """Send probes to an application in this process, which runs as a member of pgshelf_service; tells what was sent."""
    with embedded.start(folder, version, settings=FAST) as server:
        url = server.url()
        migrate.upgrade(url, warn=False)
        with logins(url, "public") as login:
            settings = Settings(
                database_url=login("pgshelf_service"), data_dir=folder, auth="on", worker_enabled=False, max_page=100
            )
            app = create_app(settings)
            transport = httpx2.ASGITransport(app=app)  # type: ignore[arg-type]  # the same protocol, typed closer
            async with _lifespan(app), httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
                some = key(url, "some", "writer", *probes.OWN)
                border = probes.Border(client, key(url, "root", "admin"), some, seed)
                await border.build()
                role = login("pgshelf_writer", libraries=dict.fromkeys(probes.OWN, "write"))
                async with await psycopg.AsyncConnection.connect(role, autocommit=True) as session:
                    return await probes.probe(border, session, count)
