"""A library that moves and changes its index while it is searched and written: the short form of `make soak`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import psycopg
import pytest

from pgshelf import embedded, imports
from pgshelf.settings import Settings
from tests.conftest import MakeClient, MakeSettings
from tests.rest.asking import until
from tests.shelving import PROMOTE_AT, check_tidy, fill, make_library, put, reconcile, search, state, texts, vectors
from tests.soak.moves import SMALL, moving

SEED = 20261


@pytest.mark.xdist_group("crash")  # it measures recovery; two at once would measure each other
@pytest.mark.unwatched
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


@pytest.mark.parametrize("to", ["own", "shared"])
@pytest.mark.unwatched
async def test_an_import_goes_on_while_its_library_moves(
    database_url: str, make_settings: MakeSettings, make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """At every step of the move the next lines are written: new documents, and one that replaces an older one."""
    monkeypatch.setattr(imports, "PAUSE", 0.01)
    with psycopg.connect(database_url, autocommit=True) as db:
        library = make_library(db, index={"type": "hnsw" if to == "own" else "auto"})
        fill(db, library, vectors(PROMOTE_AT), per_document=1)
        settings = make_settings(database_url, promote_at=PROMOTE_AT)
        if to == "shared":
            await reconcile(settings)
            settings = make_settings(database_url, promote_at=1000)
        client = await make_client(make_settings(database_url, worker_enabled=False))
        lines: asyncio.Queue[bytes] = asyncio.Queue()
        sent: list[str] = []
        replaced: list[int] = []

        async def body() -> AsyncIterator[bytes]:
            while line := await lines.get():
                yield line

        async def write(step: str) -> None:
            number, old = len(sent), len(replaced)
            sent.append(f"{step} {number}")
            replaced.append(old)
            for key, text in ((f"new {number}", sent[-1]), (f"d{old}", f"again {old}")):
                chunk = {"text": text, "embedding": vectors(1, seed=number + 2)[0].tolist()}
                lines.put_nowait(json.dumps({"key": key, "chunks": [chunk]}).encode() + b"\n")

            async def written() -> bool:
                return {sent[-1], f"again {old}"} <= set(texts(db, library))

            await until(written)

        answer = asyncio.create_task(
            client.post("/v1/libraries/notes/import", content=body(), headers={"Content-Type": "application/x-ndjson"})
        )
        steps = await reconcile(settings, step=write)
        lines.put_nowait(b"")
        done = json.loads((await answer).text.splitlines()[-1])
        assert {"claimed", "copied", "doubled", "drained", "switched"} <= set(steps)
        assert (done["created"], done["replaced"], done["failed"]) == (len(steps), len(steps), 0)
        assert (state(db, library)["shelf"] > 0) == (to == "own")
        kept = sorted(sent + [f"again {n}" for n in replaced] + [f"text {n}" for n in range(len(steps), PROMOTE_AT)])
        assert texts(db, library) == kept
        assert sorted(search(db, library, vectors(1)[0], k=100)) == kept
        check_tidy(db)
