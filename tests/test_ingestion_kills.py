"""Kills -9 of each kind while a faulty provider embeds: the short form of `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pgshelf import embedded
from tests.soak.ingestion import KINDS, kills

SEED = 20264


@pytest.mark.xdist_group("crash")  # as tests/test_crash.py: two at once would measure each other
@pytest.mark.unwatched
def test_what_was_acknowledged_is_embedded_once_whoever_is_killed(postgres_version: int, tmp_path: Path) -> None:
    print(f"seed {SEED}")
    with kills(postgres_version if postgres_version in embedded.VERSIONS else 18, SEED, tmp_path) as target:
        for kind in KINDS:
            print(kind)
            target.run(kind, seconds=0.5, check=kind == KINDS[-1])
        print(target.figures())
        assert target.documents > 20
