"""What the tests of shelves and indexes share: libraries in SQL, a reconciler that dies when told, the whole truth."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from pgshelf import sessions, shelves
from pgshelf.settings import Settings

Connection = psycopg.Connection[Any]
PACE = sessions.Pace(grace=0, sweep=0, retry=0)
PROMOTE_AT = 20
RECONCILERS = "from pg_stat_activity where application_name = 'pgshelf shelves' and datname = current_database()"


class Died(Exception):
    """Raised at a step: the process is gone."""


def vectors(count: int, dimension: int = 8, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def literal(vector: Iterable[float]) -> str:
    return "[" + ",".join(map(str, vector)) + "]"


def make_library(
    db: Connection, name: str = "notes", dimension: int = 8, metric: str = "cosine", index: dict[str, Any] | None = None
) -> UUID:
    """A library in SQL, as POST /v1/libraries makes it."""
    wanted = index or {"type": "auto"}
    db.execute("select pgshelf.check_index(%s, %s, %s)", [Jsonb(wanted), dimension, metric])
    row = db.execute(
        """insert into pgshelf.libraries (name, dimension, metric, embedder, chunking, index, index_state)
        values (%s, %s, %s, jsonb_build_object('provider', 'none', 'dimension', %s::int), '{"size": 1200, "overlap": 0}', %s, %s)
        returning id""",  # noqa: E501 - one row
        [name, dimension, metric, dimension, Jsonb(wanted), "ready" if wanted["type"] == "auto" else "building"],
    ).fetchone()
    assert row
    return UUID(str(row[0]))


def put(db: Connection, library: str | UUID, key: str, texts: list[str], given: Iterable[Iterable[float]]) -> None:
    db.execute(
        "select pgshelf.put_document(%s, %s, texts => %s, embeddings => %s::text[]::@vector@[])".replace(
            "@vector@", vector_type(db)
        ).encode(),
        [str(library), key, texts, [literal(vector) for vector in given]],
    )


def vector_type(db: Connection) -> str:
    row = db.execute(
        "select format('%I.vector', n.nspname) from pg_extension e join pg_namespace n on n.oid = e.extnamespace"
        " where e.extname = 'vector'"
    ).fetchone()
    assert row
    return str(row[0])


def fill(
    db: Connection, library: str | UUID, given: NDArray[np.float32], per_document: int = 5, first: int = 0
) -> None:
    """Documents d0, d1 ... of several chunks `text 0`, `text 1` ..."""
    with db.transaction():
        for start in range(0, len(given), per_document):
            part = given[start : start + per_document]
            texts = [f"text {first + start + number}" for number in range(len(part))]
            put(db, library, f"d{(first + start) // per_document}", texts, part)


def want(db: Connection, library: str | UUID, index: dict[str, Any], promote_at: int = PROMOTE_AT) -> bool:
    row = db.execute("select pgshelf.want_index(%s, %s, %s)", [str(library), Jsonb(index), promote_at]).fetchone()
    assert row
    return bool(row[0])


async def reconcile(settings: Settings, pace: sessions.Pace = PACE, step: sessions.Step | None = None) -> list[str]:
    """Bring everything to its wanted state; tells the steps that were taken."""
    taken: list[str] = []

    async def tell(name: str) -> None:
        taken.append(name)
        if step:
            await step(name)

    await shelves.reconcile_all_async(settings, pace, tell)
    return taken


def dying_at(step: str) -> sessions.Step:
    """A process that ends at a step, in an orderly way: its session is closed."""

    async def die(name: str) -> None:
        if name == step:
            raise Died(name)

    return die


def killed_at(db: Connection, step: str) -> sessions.Step:
    """A backend that is terminated at a step; returns when it is gone."""

    async def kill(name: str) -> None:
        if name == step:
            terminate(db)

    return kill


def terminate(db: Connection) -> None:
    """End the sessions of reconcilers on this database, and wait until they are gone."""
    db.execute(f"select pg_terminate_backend(pid) {RECONCILERS}".encode())
    deadline = time.monotonic() + 10
    while db.execute(f"select 1 {RECONCILERS}".encode()).fetchone():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state(db: Connection, library: UUID) -> dict[str, Any]:
    """The row of a library."""
    with db.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute("select * from pgshelf.libraries where id = %s", [library]).fetchone()
    assert found
    return found


def texts(db: Connection, library: UUID) -> list[str]:
    """What counts as the library's chunks, in order."""
    rows = db.execute("select text from pgshelf.chunks_view where library_id = %s order by text", [library])
    return [text for (text,) in rows.fetchall()]


def expected(count: int) -> list[str]:
    return sorted(f"text {number}" for number in range(count))


def search(db: Connection, library: str | UUID, vector: Iterable[float], k: int = 10, **options: Any) -> list[str]:
    """The texts that a search finds."""
    extra = "".join(f", {name} => %s" for name in options)
    rows = db.execute(
        f"select s.text from pgshelf.search(%s, %s, %s{extra}) s".encode(),
        [str(library), literal(vector), k, *options.values()],
    )
    return [text for (text,) in rows.fetchall()]


def shelf_indexes(db: Connection, shelf: int) -> list[str]:
    rows = db.execute(
        "select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid"
        " where i.indrelid = to_regclass('pgshelf.chunks_s' || %s) order by 1",
        [shelf],
    )
    return [name for (name,) in rows.fetchall()]


def check_tidy(db: Connection) -> None:
    """Nothing is left lying about: no table, index, row or plane that nobody uses, and nothing stuck."""
    assert db.execute("select id from pgshelf.libraries where moving <> 0 or index_state = 'building'").fetchall() == []
    tables = db.execute(
        "select substr(relname, 9)::int from pg_class where relname ~ '^chunks_s[0-9]+$' and relkind = 'r' order by 1"
    ).fetchall()
    used = db.execute("select distinct shelf from pgshelf.libraries union select 0 order by 1").fetchall()
    assert tables == used
    attached = "select count(*) from pg_inherits where inhparent = 'pgshelf.chunks'::regclass and not inhdetachpending"
    assert db.execute(attached.encode()).fetchone() == (len(used),)
    serials = db.execute(
        """select format('chunks_s%s_v%s', shelf, index_actual ->> 'serial') from pgshelf.libraries
        where index_actual ? 'serial' order by 1"""
    ).fetchall()
    built = db.execute(
        "select c.relname::text from pg_index i join pg_class c on c.oid = i.indexrelid"
        " where c.relname ~ '^chunks_s[0-9]+_v' and i.indisvalid order by 1"
    ).fetchall()
    assert built == serials
    invalid = "select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid where not i.indisvalid"
    assert db.execute(invalid.encode()).fetchall() == []
    planes = db.execute("select distinct serial::text from pgshelf.planes order by 1").fetchall()
    with_planes = db.execute(
        "select index_actual ->> 'serial' from pgshelf.libraries where index_actual ->> 'type' = 'lsh'"
    ).fetchall()
    assert sorted(planes) == sorted(with_planes)
    stray = """select count(*) from pgshelf.chunks c
      left join pgshelf.libraries l on l.id = c.library_id and l.shelf = c.shelf where l.id is null"""
    assert db.execute(stray.encode()).fetchone() == (0,)
    assert db.execute("select count(*) from pgshelf.move_log").fetchone() == (0,)
    assert db.execute("select count(*) from pgshelf.retired_shelves").fetchone() == (0,)
