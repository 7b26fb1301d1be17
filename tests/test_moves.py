"""A library that moves and changes its index while it is searched and written: the short form of `make soak`."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from pgshelf import embedded
from pgshelf.settings import Settings
from tests.shelving import PROMOTE_AT, fill, make_library, put, reconcile, state, vectors
from tests.soak.moves import SMALL, moving

SEED = 20261


@pytest.mark.xdist_group("crash")  # it measures recovery; two at once would measure each other
def test_a_library_that_moves_loses_and_doubles_nothing(postgres_version: int) -> None:
    print(f"seed {SEED}")
    with moving(postgres_version if postgres_version in embedded.VERSIONS else 18, SEED, SMALL) as moves:
        moves.walk()
        for kind in ("postmaster", "service"):
            moves.kill_once(kind)
        moves.finish(patient=False)
        print(moves.figures())
        assert moves.crowd.counts["searches"] > 200 and moves.crowd.counts["writes"] > 50


async def test_a_crash_that_takes_the_statistics_keeps_no_library_from_moving_back(
    database_url: str, make_settings: Callable[..., Settings]
) -> None:
    with psycopg.connect(database_url, autocommit=True) as db:
        library = make_library(db)
        fill(db, library, vectors(PROMOTE_AT), per_document=1)
        await reconcile(make_settings(database_url, promote_at=PROMOTE_AT))
        shelf = state(db, library)["shelf"]
        db.execute(f"alter table pgshelf.chunks_s{shelf} set (autovacuum_enabled = false)".encode())
        db.execute("select pg_stat_force_next_flush()")
        db.execute("select pg_stat_reset()")  # as after a crash
        for number in range(PROMOTE_AT - 3):
            db.execute("select pgshelf.delete_document('notes', %s)", [f"d{number}"])
        db.execute("select pg_stat_force_next_flush()")
        sized = db.execute("select tasks from pgshelf.index_sized(null, 20000, %s)", [PROMOTE_AT]).fetchone()
        assert sized == ([library],)
        put(db, library, "more", ["a", "b"], vectors(2))
        db.execute("select pg_stat_force_next_flush()")
        assert db.execute("select pgshelf.shelf_rows(%s)", [shelf]).fetchone() == (5,)
