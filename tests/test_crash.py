"""Kills -9 of each kind while clients write: the short form of `make soak`."""

from __future__ import annotations

import pytest

from pgshelf import embedded
from tests.soak.crash import Ingestion, service

SEED = 20260


@pytest.mark.xdist_group("crash")  # it measures recovery; two at once would measure each other
@pytest.mark.unwatched
async def test_nothing_answered_is_lost_and_nothing_is_there_in_part(postgres_version: int) -> None:
    print(f"seed {SEED}")
    with service(postgres_version if postgres_version in embedded.VERSIONS else 18) as target:
        ingestion = Ingestion(target, SEED)
        await ingestion.start()
        for kind in ("worker", "postmaster", "parent", "backend"):
            print(kind)
            await ingestion.cycle(kind)
        print(ingestion.figures())
        assert sum(count for answer, count in ingestion.answers.items() if answer in (200, 201, 202, 204)) > 50
