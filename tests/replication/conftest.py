"""One primary and two standbys for the tests of a file, and applications over them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from pgshelf import migrate
from tests.conftest import MakeClient, MakeSettings
from tests.postgres import in_memory
from tests.replication.cluster import Cluster

# nobody needs these servers after a power failure
FAST = {"fsync": "off", "full_page_writes": "on"}


@pytest.fixture(scope="module")
def cluster(postgres_version: int) -> Iterator[Cluster]:
    """A primary and two standbys, migrated."""
    if postgres_version not in (16, 18):
        pytest.skip("standbys are made from the bundled servers")
    directory = Path(tempfile.mkdtemp(prefix="pgshelf-r-", dir=in_memory()))
    try:
        made = Cluster(directory, postgres_version, settings=FAST)
        try:
            migrate.upgrade(made.primary.url)
            made.caught_up()
            yield made
        finally:
            made.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


Serve = Callable[..., Awaitable[httpx2.AsyncClient]]


@pytest.fixture
async def serve(cluster: Cluster, make_settings: MakeSettings, make_client: MakeClient) -> AsyncIterator[Serve]:
    """Starts an application over the whole cluster: `await serve(replica_wait=0.1)` gives an HTTP client for it."""

    async def make(**settings: Any) -> httpx2.AsyncClient:
        known = {"replica_url": cluster.replica_url, "replica_interval": 0.1, "replica_timeout": 0.5}
        known |= {"worker_enabled": False, "embedder": "none", "cache_bytes": 0, **settings}
        return await make_client(make_settings(cluster.url, **known))

    yield make
