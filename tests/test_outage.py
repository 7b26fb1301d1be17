"""A provider that is away: writes go on, searches that need no new vector go on, and all heals by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pgshelf import providers
from pgshelf.settings import Settings
from tests.soak.outage import Outage, Provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["refused", "hang"])  # make soak has all of them
@pytest.mark.unwatched
async def test_what_needs_no_provider_goes_on_without_it(
    kind: str,
    provider: Provider,
    database_url: str,
    make_settings: Callable[..., Settings],
    make_client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(providers, "RETRY_AFTER", 0.3)  # what a provider that says nothing is taken to mean
    settings = make_settings(
        database_url,
        cohere_api_key=provider.key,
        cohere_base_url=provider.url,
        # where nothing hangs an answer may take its time: one that comes too late would be asked for again
        cohere_timeout=1.0 if kind == "hang" else 3.0,
        circuit_failures=3,
        circuit_wait=0.5,
        worker_interval=0.05,
        worker_attempts=2,
    )
    outage = Outage(await make_client(settings), provider, kind)
    await outage.run(1.0)
    assert outage.answers.keys() <= {
        "503 embedder_unavailable", "502 embedder_failed", "504 embedder_timeout"
    }  # fmt: skip
    assert outage.answers["503 embedder_unavailable"] >= 1
