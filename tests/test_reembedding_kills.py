"""Kills -9 while embedders change: the short form of `make soak`."""

from __future__ import annotations

import pytest

from pgshelf import embedded
from tests.soak.embedders import changing

SEED = 20262


@pytest.mark.xdist_group("crash")  # it measures recovery; two at once would measure each other
@pytest.mark.unwatched
def test_libraries_whose_embedder_changes_lose_and_mix_nothing(postgres_version: int) -> None:
    print(f"seed {SEED}")
    with changing(postgres_version if postgres_version in embedded.VERSIONS else 18, SEED) as changes:
        changes.change(64)
        changes.change(256, "postmaster")
        print(changes.figures())
        assert changes.counts["searches"] > 5 and changes.counts["writes"] > 5
