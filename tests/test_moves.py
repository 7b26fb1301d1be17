"""A library that moves and changes its index while it is searched and written: the short form of `make soak`."""

from __future__ import annotations

import pytest

from pgshelf import embedded
from tests.soak.moves import SMALL, moving

SEED = 20261


@pytest.mark.xdist_group("crash")  # it measures recovery; two at once would measure each other
def test_a_library_that_moves_loses_and_doubles_nothing(postgres_version: int) -> None:
    print(f"seed {SEED}")
    with moving(postgres_version if postgres_version in embedded.VERSIONS else 18, SEED, SMALL) as moves:
        moves.walk()
        for kind in ("mover", "service"):
            moves.kill_once(kind)
        moves.finish(patient=False)
        print(moves.figures())
        assert moves.crowd.counts["searches"] > 200 and moves.crowd.counts["writes"] > 50
