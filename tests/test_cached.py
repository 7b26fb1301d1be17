"""The query cache under writers: the short form of what `make soak` does for 50,000 reads."""

from __future__ import annotations

import random

import pytest

from tests.conftest import MakeLiveServer
from tests.soak.cached import PROCESSES, consistency


@pytest.mark.unwatched
def test_no_answer_is_stale(database_url: str, make_live_server: MakeLiveServer) -> None:
    """And the test would notice: where the state is always the same, it finds stale answers."""
    server = make_live_server(database_url, "--workers", str(PROCESSES), PGSHELF_EMBEDDER="none")
    seed = random.randrange(10**6)
    figures, stale = consistency(database_url, server.url, seed, 400, pause=1.5)
    print(f"seed {seed}: {figures}")
    assert not stale, stale[:5]
    figures, stale = consistency(database_url, server.url, seed + 1, 100, pause=0.5, broken=True)
    print(f"seed {seed + 1}, broken: {figures}")
    assert stale
