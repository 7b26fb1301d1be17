"""Changing the embedder of a library: searched as before until the last vector is there, then all at once."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID

import httpx2
import msgspec
import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg.types.json import Jsonb

from pgshelf import embedder_choice, embedding, moves, pools, reembedding, searching, sessions, shelves, worker
from pgshelf.embedders import EmbedderFailed, EmbedderUnavailable, Kind, TextRefused
from pgshelf.settings import Settings
from tests.rest.asking import ok, problem
from tests.shelving import PACE, Connection, Died, check_tidy, literal, put, state, terminate

OLD = {"provider": "test", "model": "old", "dimension": 16}
NEW = {"provider": "test", "model": "new", "dimension": 16}
SMALLER = {"provider": "test", "model": "new", "dimension": 8}


class Maker:
    """An embedder whose vectors tell who made them of what; it counts the texts, and fails when told."""

    provider, cached, batch = "test", False, 8
    options: Mapping[str, Any] = {}

    def __init__(self, model: str, dimension: int) -> None:
        self.model, self.dimension = model, dimension
        self.texts: list[str] = []
        self.fails: list[Exception] = []
        self.refused: set[str] = set()
        self.delay = 0.0
        self.meanwhile: Callable[[], Awaitable[Any]] | None = None  # happens once, while vectors are being made

    def vector(self, text: str) -> NDArray[np.float32]:
        seed = int.from_bytes(hashlib.sha256(f"{self.model}:{text}".encode()).digest()[:8])
        made = np.random.default_rng(seed).normal(size=self.dimension)
        return (made / np.linalg.norm(made)).astype(np.float32)

    async def embed(self, texts: Sequence[str], kind: Kind) -> NDArray[np.float32]:
        await asyncio.sleep(self.delay)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            await meanwhile()
        if self.fails:
            raise self.fails.pop(0)
        for place, text in enumerate(texts):
            if text in self.refused:
                raise TextRefused("not this one", place)
        self.texts += texts
        return np.array([self.vector(text) for text in texts])


class Makers:
    """All embedders of a test: `makers(OLD)` is the one of a library's choice."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, int], Maker] = {}

    def __call__(self, choice: Mapping[str, Any]) -> Maker:
        model, dimension = choice["model"], choice["dimension"]
        return self.made.setdefault((model, dimension), Maker(model, dimension))


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> Makers:
    made = Makers()
    monkeypatch.setattr(embedding, "embedder_for", lambda _, choice: made(choice))
    return made


@pytest.fixture
def db(database_url: str) -> Iterator[Connection]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def small(make_settings: Callable[..., Settings], database_url: str) -> Settings:
    return make_settings(database_url, promote_at=10_000, worker_interval=0.02, embed_batch=8)


def make_library(db: Connection, embedder: dict[str, Any] = OLD, index: str = "auto", name: str = "notes") -> UUID:
    row = db.execute(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking, index, index_state)
        values (%s, %s, %s, '{"size": 1200, "overlap": 0}', jsonb_build_object('type', %s::text),
        case %s when 'auto' then 'ready' else 'building' end) returning id""",
        [name, embedder["dimension"], Jsonb(embedder), index, index],
    ).fetchone()
    assert row
    return UUID(str(row[0]))


def fill(db: Connection, library: UUID, makers: Makers, count: int, embedder: dict[str, Any] = OLD) -> None:
    """Documents d0, d1 ... of two chunks each: `text 0`, `text 1` ..."""
    with db.transaction():
        for first in range(0, count, 2):
            texts = [f"text {number}" for number in range(first, min(first + 2, count))]
            put(db, library, f"d{first // 2}", texts, [makers(embedder).vector(text) for text in texts])


def ask_for(db: Connection, embedder: dict[str, Any], library: str = "notes") -> bool:
    row = db.execute("select pgshelf.want_embedder(%s, %s)", [library, Jsonb(embedder)]).fetchone()
    assert row
    return bool(row[0])


def status(db: Connection, library: str = "notes") -> dict[str, Any]:
    with db.cursor(row_factory=psycopg.rows.dict_row) as cursor:
        found = cursor.execute("select * from pgshelf.embedder_status where library = %s", [library]).fetchone()
    assert found
    return found


def changes(db: Connection) -> list[tuple[str, int]]:
    """Every change that is not over: its phase, and how many vectors it has."""
    return db.execute(
        """select phase, (select count(*) from pgshelf.next_embeddings n where n.change = c.serial)
        from pgshelf.embedder_changes c where phase <> 'over'"""
    ).fetchall()


def vectors_of(db: Connection, library: UUID) -> dict[str, NDArray[np.float32] | None]:
    """What counts as the library's chunks: text and vector."""
    rows = db.execute("select text, embedding::text from pgshelf.chunks_view where library_id = %s", [library])
    return {text: None if given is None else np.fromstring(given[1:-1], np.float32, sep=",") for text, given in rows}


def check_made_by(db: Connection, library: UUID, maker: Maker, texts: Sequence[str]) -> None:
    """The library holds just these texts, each with the vector that this embedder makes of it."""
    found = vectors_of(db, library)
    assert sorted(found) == sorted(texts)
    for text, vector in found.items():
        assert vector is not None, text
        assert np.allclose(vector, maker.vector(text), atol=1e-6), text


def check_clean(db: Connection) -> None:
    """Nothing of a change is left, and nothing of a move."""
    while db.execute("select pgshelf.reap_changes()").fetchone() != (0,):
        pass
    assert db.execute("select count(*) from pgshelf.embedder_changes").fetchone() == (0,)
    assert db.execute("select count(*) from pgshelf.next_embeddings").fetchone() == (0,)
    check_tidy(db)


@asynccontextmanager
async def engine_of(settings: Settings) -> AsyncIterator[Any]:
    engine = pools.make_engine(settings, settings.database_url or "")
    try:
        yield engine
    finally:
        await pools.close(engine)


async def carry_out(settings: Settings, step: sessions.Step | None = None, pace: sessions.Pace = PACE) -> list[str]:
    """Look after all changes, and the moves they need, until nothing is due; tells the steps. Dies with either."""
    taken: list[str] = []

    async def tell(name: str) -> None:
        taken.append(name)
        if step:
            await step(name)

    async def move() -> None:
        # the shelf that was left stays a while: what was found out a moment before may still read it
        graceful = msgspec.structs.replace(pace, grace=1.0)
        while True:
            await shelves.reconcile_all_async(settings, graceful, tell)
            await asyncio.sleep(0.01)

    async with engine_of(settings) as engine:
        mover = asyncio.create_task(move())
        try:
            while serials := await reembedding.due(engine):
                work = [reembedding.look_after(engine, settings, serial, pace, tell) for serial in serials]
                everything: asyncio.Future[Any] = asyncio.ensure_future(asyncio.gather(*work))
                await asyncio.wait([everything, mover], return_when=asyncio.FIRST_COMPLETED)
                if mover.done():
                    everything.cancel()
                    with suppress(asyncio.CancelledError):
                        await everything
                    mover.result()
                await everything
        finally:
            mover.cancel()
            with suppress(asyncio.CancelledError):
                await mover
    await shelves.reconcile_all_async(settings, pace)
    return taken


def named(count: int) -> list[str]:
    return [f"text {number}" for number in range(count)]


# -- the way from one to the other


@pytest.mark.parametrize(
    ("index", "wanted"),
    [("auto", NEW), ("auto", SMALLER), ("flat", SMALLER), ("hnsw", NEW), ("hnsw", SMALLER), ("lsh", SMALLER)],
    ids=lambda given: given if isinstance(given, str) else str(given["dimension"]),
)
async def test_all_vectors_are_of_the_new_embedder(
    db: Connection, small: Settings, makers: Makers, index: str, wanted: dict[str, Any]
) -> None:
    library = make_library(db, index=index)
    fill(db, library, makers, 30)
    await shelves.reconcile_all_async(small, PACE)
    before = state(db, library)
    assert (before["shelf"] > 0) == (index != "auto")
    rest = status(db)
    assert (rest["embedder"], rest["wanted"], rest["state"], rest["progress"]) == (OLD, None, "ready", 1.0)
    assert rest["embedded"] == rest["total"] >= 30  # an estimate on a shelf of its own

    assert ask_for(db, wanted)
    asked = status(db)
    assert (asked["embedder"], asked["wanted"], asked["state"], asked["progress"]) == (OLD, wanted, "embedding", 0.0)
    steps = await carry_out(small)
    after = state(db, library)
    assert (after["embedder"], after["dimension"]) == (wanted, wanted["dimension"])
    assert after["version"] == before["version"] + 1
    assert (after["shelf"] != before["shelf"]) == (index != "auto")
    assert ("flipped" in steps, "switched" in steps) == (index == "auto", index != "auto")
    assert after["index_actual"]["type"] == before["index_actual"]["type"]
    assert after["index_state"] == before["index_state"]
    check_made_by(db, library, makers(wanted), named(30))
    assert sorted(makers(wanted).texts) == sorted(named(30)), "each text was sent once"
    query = literal(makers(wanted).vector("text 7"))
    found = db.execute("select text, distance from pgshelf.search('notes', %s, 3)", [query]).fetchall()
    assert found[0][0] == "text 7" and found[0][1] == pytest.approx(0, abs=1e-6)
    done = status(db)
    assert (done["embedder"], done["wanted"], done["state"], done["progress"]) == (wanted, None, "ready", 1.0)
    check_clean(db)


async def test_a_library_that_is_too_large_to_be_rewritten_at_once_moves(
    db: Connection, small: Settings, makers: Makers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reembedding, "IN_PLACE", 29)
    library = make_library(db)
    fill(db, library, makers, 30)
    ask_for(db, SMALLER)
    steps = await carry_out(small)
    assert {"next: move", "built", "switched"} <= set(steps) and "flipped" not in steps
    check_made_by(db, library, makers(SMALLER), named(30))
    assert state(db, library)["shelf"] == 0, "it is small, so it came back"
    check_clean(db)


async def test_a_library_that_has_shrunk_gets_its_new_vectors_on_the_way_back(
    db: Connection, small: Settings, makers: Makers
) -> None:
    library = make_library(db)
    fill(db, library, makers, 30)
    await shelves.reconcile_all_async(msgspec.structs.replace(small, promote_at=20), PACE)
    shelf = state(db, library)["shelf"]
    assert shelf > 0
    ask_for(db, SMALLER)

    async def look(step: str) -> None:
        if step == "next: move":
            assert state(db, library)["shelf"] == shelf

    # sizes are looked at when the change has been prepared: it is that move which takes the new vectors along
    async with engine_of(small) as engine:
        change = asyncio.create_task(reembedding.look_after(engine, small, (await reembedding.due(engine))[0], PACE))
        while changes(db) != [("switching", 30)]:  # noqa: ASYNC110 - another task's doing
            await asyncio.sleep(0.01)
        await shelves.reconcile_all_async(small, PACE)
        await change
    row = state(db, library)
    assert (row["shelf"], row["index_actual"], row["dimension"]) == (0, {"type": "flat"}, 8)
    check_made_by(db, library, makers(SMALLER), named(30))
    check_clean(db)


async def test_an_empty_library_changes_too(db: Connection, small: Settings, makers: Makers) -> None:
    library = make_library(db)
    own = make_library(db, index="hnsw", name="own")
    assert ask_for(db, SMALLER) and ask_for(db, SMALLER, "own")
    await carry_out(small)
    assert [state(db, each)["dimension"] for each in (library, own)] == [8, 8]
    assert makers(SMALLER).texts == []


async def test_equal_texts_are_sent_once(db: Connection, small: Settings, makers: Makers) -> None:
    library = make_library(db)
    for key in ("a", "b", "c"):
        put(db, library, key, ["the same"], [makers(OLD).vector("the same")])
    ask_for(db, NEW)
    await carry_out(small)
    assert makers(NEW).texts == ["the same"]
    rows = db.execute("select embedding::text from pgshelf.chunks_view where library_id = %s", [library]).fetchall()
    assert len(rows) == 3 and len(set(rows)) == 1


async def test_vectors_that_the_client_brought_are_replaced(db: Connection, small: Settings, makers: Makers) -> None:
    library = make_library(db, {"provider": "none", "model": None, "dimension": 16})
    put(db, library, "a", ["brought"], [makers(OLD).vector("whatever")])
    ask_for(db, SMALLER)
    await carry_out(small)
    check_made_by(db, library, makers(SMALLER), ["brought"])


# -- whatever dies


IN_PLACE = ["stored", "walking", "walked", "next: flip", "flipped"]
MOVING = [
    "stored", "walking", "walked", "next: move", "claimed", "made", "copying", "copied", "keyed", "prepared", "built",
    "analyzed", "attached", "doubled", "drained", "filling", "switched",
]  # fmt: skip


@pytest.mark.parametrize(("index", "steps"), [("auto", IN_PLACE), ("hnsw", MOVING)], ids=["in place", "moving"])
async def test_it_goes_on_after_a_death_at_any_step(
    db: Connection, small: Settings, makers: Makers, index: str, steps: list[str]
) -> None:
    """Once a process ends, once its sessions are killed; there and back again."""
    library = make_library(db, index=index)
    fill(db, library, makers, 30)
    await shelves.reconcile_all_async(small, PACE)
    used, wanted = OLD, SMALLER
    for number, step in enumerate(steps):
        ask_for(db, wanted)
        sent = len(makers(wanted).texts)
        late = makers(wanted).vector("late")

        old = makers(used)

        async def die(name: str, at: str = step, how: int = number, old: Maker = old) -> None:
            if at == "filling" and name == "drained":  # its vector comes too late to be written with it
                put(db, library, "late", ["late"], [old.vector("late")])
            if name == at and how % 2:
                terminate(db)
            elif name == at:
                raise Died(name)

        print(step)
        with pytest.raises((Died, psycopg.OperationalError)):
            await carry_out(small, die)
        row = state(db, library)
        now = row["embedder"]
        assert now == (wanted if step in ("flipped", "switched") else used), step
        found = vectors_of(db, library)
        assert all(np.allclose(found[text], makers(now).vector(text), atol=1e-6) for text in named(30)), step  # type: ignore[arg-type]  # none is pending
        query = literal(makers(now).vector("text 3"))
        nearest = db.execute("select text from pgshelf.search('notes', %s, 1)", [query]).fetchone()
        assert nearest == ("text 3",), step

        await carry_out(small)
        texts = [*named(30), *(["late"] if "late" in found else [])]
        check_made_by(db, library, makers(wanted), texts)
        assert len(makers(wanted).texts) - sent <= len(texts) + 4 * 8, "what is stored is not sent again"
        check_clean(db)
        if "late" in found:
            assert np.allclose(vectors_of(db, library)["late"], late, atol=1e-6)  # type: ignore[arg-type]
            db.execute("select pgshelf.delete_document('notes', 'late')")
        used, wanted = wanted, used


async def test_one_session_at_a_time_sends_the_texts(db: Connection, small: Settings, makers: Makers) -> None:
    library = make_library(db)
    fill(db, library, makers, 30)
    ask_for(db, NEW)
    makers(NEW).delay = 0.05
    async with engine_of(small) as one, engine_of(small) as other:
        [serial] = await reembedding.due(one)
        first = asyncio.create_task(reembedding.look_after(one, small, serial, PACE))
        while await reembedding.due(other):  # noqa: ASYNC110 - another session's doing
            await asyncio.sleep(0.005)
        await reembedding.look_after(other, small, serial, PACE)  # had it asked before
        await first
    assert sorted(makers(NEW).texts) == sorted(named(30))
    check_made_by(db, library, makers(NEW), named(30))


# -- calling it off


@pytest.mark.parametrize(
    ("index", "step"),
    [("auto", "stored"), ("auto", "walked"), ("auto", "next: flip")]
    + [("hnsw", step) for step in ("next: move", "claimed", "built", "drained")],
)
async def test_a_change_is_called_off(db: Connection, small: Settings, makers: Makers, index: str, step: str) -> None:
    library = make_library(db, index=index)
    fill(db, library, makers, 30)
    await shelves.reconcile_all_async(small, PACE)
    before = state(db, library)
    ask_for(db, SMALLER)

    async def cancel(name: str) -> None:
        if name == step and changes(db):
            db.execute("select pgshelf.cancel_embedder('notes')")
            assert (status(db)["wanted"], status(db)["state"]) == (None, "ready")

    await carry_out(small, cancel)
    await shelves.reconcile_all_async(small, PACE)
    after = state(db, library)
    for column in ("embedder", "dimension", "shelf", "index_actual", "index_state", "version", "moving_change"):
        assert after[column] == before[column], column
    check_made_by(db, library, makers(OLD), named(30))
    check_clean(db)
    assert db.execute("select pgshelf.cancel_embedder('notes')").fetchone() == (False,)


async def test_the_one_in_use_calls_it_off_and_a_third_one_takes_its_place(
    db: Connection, small: Settings, makers: Makers
) -> None:
    library = make_library(db, index="hnsw")
    fill(db, library, makers, 30)
    assert ask_for(db, NEW)
    assert not ask_for(db, OLD)
    assert changes(db) == []

    ask_for(db, NEW)

    async def another(name: str) -> None:
        if name == "built" and status(db)["wanted"] == NEW:
            ask_for(db, SMALLER)

    await carry_out(small, another)
    assert state(db, library)["embedder"] == SMALLER
    check_made_by(db, library, makers(SMALLER), named(30))
    check_clean(db)


@pytest.mark.parametrize(
    ("index", "step"), [("auto", "stored"), ("auto", "next: flip"), ("hnsw", "copied"), ("hnsw", "drained")]
)
async def test_a_library_is_deleted_meanwhile(
    db: Connection, small: Settings, makers: Makers, index: str, step: str
) -> None:
    library = make_library(db, index=index)
    fill(db, library, makers, 30)
    await shelves.reconcile_all_async(small, PACE)
    ask_for(db, SMALLER)

    async def delete(name: str) -> None:
        if name == step:
            with suppress(psycopg.Error):
                db.execute("select pgshelf.delete_library(%s)", [str(library)])

    await carry_out(small, delete)
    while db.execute("select pgshelf.reap_deleted()").fetchone() != (0,):
        pass
    await shelves.reconcile_all_async(small, PACE)
    assert db.execute("select count(*) from pgshelf.libraries").fetchone() == (0,)
    check_clean(db)


# -- while others search and write


async def meddle(db: Connection, library: UUID, makers: Makers) -> list[str]:
    """Write, replace, patch and delete, with vectors of the old embedder; tells which texts are there then."""
    old = makers(OLD)
    put(db, library, "new", ["new", "newer"], [old.vector("new"), old.vector("newer")])
    put(db, library, "d1", ["replaced"], [old.vector("replaced")])
    db.execute("select pgshelf.delete_document('notes', 'd2')")
    for text, change in (("text 6", "patch_chunk(%s, %s, 'patched', null, null)"), ("text 7", "delete_chunk(%s, %s)")):
        row = db.execute("select id from pgshelf.chunks_view where text = %s", [text]).fetchone()
        assert row
        db.execute(f"select pgshelf.{change}".encode(), [library, row[0]])
    gone = {f"text {number}" for number in (2, 3, 4, 5, 6, 7)}
    return sorted((set(named(30)) - gone) | {"new", "newer", "replaced", "patched"})


@pytest.mark.parametrize(
    ("index", "step"),
    [("auto", step) for step in ("stored", "walked", "next: flip", "flipped")]
    + [("hnsw", step) for step in ("next: move", "copied", "doubled", "drained", "switched")],
)
async def test_what_is_written_at_a_step_gets_its_new_vector(
    db: Connection, small: Settings, makers: Makers, index: str, step: str
) -> None:
    library = make_library(db, index=index)
    fill(db, library, makers, 30)
    await shelves.reconcile_all_async(small, PACE)
    ask_for(db, NEW)
    there: list[str] = []

    async def write(name: str) -> None:
        if name == step and not there:
            there.extend(await meddle(db, library, makers))

    await carry_out(small, write)
    found = vectors_of(db, library)
    assert sorted(found) == there
    if step in ("flipped", "switched"):  # too late: vectors that the client brings are what he says they are
        there = [text for text in there if text not in ("new", "newer", "replaced", "patched")]
        assert found["patched"] is None
    for text in there:
        vector = found[text]
        assert vector is not None and np.allclose(vector, makers(NEW).vector(text), atol=1e-6), text
    check_clean(db)


async def test_a_writer_whose_snapshot_is_older_than_the_switch_is_refused(
    db: Connection, small: Settings, makers: Makers
) -> None:
    library = make_library(db)
    fill(db, library, makers, 4)
    with psycopg.connect(small.database_url or "") as old:
        old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        old.execute("select count(*) from pgshelf.libraries")
        ask_for(db, SMALLER)
        await carry_out(small)
        with pytest.raises(psycopg.errors.SerializationFailure):
            put(old, library, "late", ["late"], [makers(OLD).vector("late")])


async def test_what_waits_for_its_vector_gets_that_of_the_embedder_of_the_day(
    db: Connection, small: Settings, makers: Makers
) -> None:
    library = make_library(db)
    fill(db, library, makers, 4)
    db.execute("select pgshelf.put_document('notes', 'p', texts => '{waits}')")
    async with engine_of(small) as engine:
        makers(OLD).meanwhile = lambda: change_to(db, small, SMALLER)
        assert await worker.embed_pending(engine, small) == 1, "claimed for the old one, whose vector comes too late"
        check_made_by(db, library, makers(SMALLER), [*named(4), "waits"])

        db.execute("select pgshelf.put_document('notes', 'q', texts => '{fails}')")
        makers(SMALLER).meanwhile = lambda: change_to(db, small, OLD)
        makers(SMALLER).fails.append(EmbedderFailed("out of order"))
        await worker.embed_pending(engine, small)
        errors = "select embed_error from pgshelf.chunks where embed_error is not null"
        assert db.execute(errors.encode()).fetchall() == [], "what the old one says is no matter any more"
        check_made_by(db, library, makers(OLD), [*named(4), "waits", "fails"])


async def change_to(db: Connection, settings: Settings, wanted: dict[str, Any]) -> None:
    """A whole change, at once."""
    ask_for(db, wanted)
    await carry_out(settings)


Rest = tuple[httpx2.AsyncClient, UUID]


@pytest.fixture
async def rest(db: Connection, small: Settings, makers: Makers, make_client: Any) -> Rest:
    """A service without a worker, and its library `notes` of four chunks."""
    library = make_library(db)
    fill(db, library, makers, 4)
    return await make_client(msgspec.structs.replace(small, worker_enabled=False)), library


SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "vector": ("libraries/notes/search", {"query": "text 1", "mode": "vector"}),
    "hybrid": ("libraries/notes/search", {"query": "text 1", "total": True}),
    "explained": ("libraries/notes/search", {"query": "text 1", "mode": "vector", "explain": True}),
    "several": ("search", {"query": "text 1", "mode": "vector", "libraries": ["notes"]}),
}


@pytest.mark.parametrize("wanted", [NEW, SMALLER], ids=["same dimension", "smaller"])
@pytest.mark.parametrize("how", SEARCHES)
async def test_a_query_that_was_embedded_before_the_switch_is_embedded_again(
    db: Connection, small: Settings, makers: Makers, rest: Rest, how: str, wanted: dict[str, Any]
) -> None:
    client, _ = rest
    address, body = SEARCHES[how]
    makers(OLD).meanwhile = lambda: change_to(db, small, wanted)
    hits = ok(await client.post(f"/v1/{address}", json=body | {"include": ["text", "embedding"]}))["hits"]
    assert (hits[0]["text"], len(hits)) == ("text 1", 4)
    assert hits[0]["distance"] == pytest.approx(0, abs=1e-6)
    assert len(hits[0]["embedding"]) == wanted["dimension"]


async def test_what_is_like_a_chunk_is_looked_for_by_the_vector_of_the_day(
    db: Connection, small: Settings, makers: Makers, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = rest
    found = searching._like
    asked = []

    async def slow(*given: Any) -> Any:
        answer = await found(*given)
        asked.append(answer)
        if len(asked) == 1:  # between the vector and the search
            await change_to(db, small, NEW)
        return answer

    monkeypatch.setattr(searching, "_like", slow)
    row = db.execute("select id from pgshelf.chunks_view where text = 'text 2'").fetchone()
    assert row
    body = {"like": {"chunk": str(row[0])}, "include": ["text"]}
    hits = ok(await client.post("/v1/libraries/notes/search", json=body))["hits"]
    assert len(asked) == 2
    mine = makers(NEW).vector("text 2")
    expected = sorted((1 - float(mine @ makers(NEW).vector(f"text {n}")), f"text {n}") for n in (0, 1, 3))
    assert [hit["text"] for hit in hits] == [text for _, text in expected]
    assert [hit["distance"] for hit in hits] == pytest.approx([distance for distance, _ in expected], abs=1e-6)


@pytest.mark.parametrize("wanted", [NEW, SMALLER], ids=["same dimension", "smaller"])
async def test_vectors_made_before_the_switch_are_not_written_after_it(
    db: Connection, small: Settings, makers: Makers, rest: Rest, wanted: dict[str, Any]
) -> None:
    client, library = rest
    makers(OLD).meanwhile = lambda: change_to(db, small, wanted)
    ok(await client.put("/v1/libraries/notes/documents/w", json={"chunks": [{"text": "written"}]}), 201)
    check_made_by(db, library, makers(wanted), [*named(4), "written"])

    row = db.execute("select id from pgshelf.chunks_view where text = 'written'").fetchone()
    assert row
    makers(wanted).meanwhile = lambda: change_to(db, small, OLD)
    ok(await client.patch(f"/v1/libraries/notes/chunks/{row[0]}", json={"text": "patched"}))
    check_made_by(db, library, makers(OLD), [*named(4), "patched"])


@pytest.mark.parametrize("wanted", [NEW, SMALLER], ids=["same dimension", "smaller"])
async def test_nor_are_those_of_many_documents(
    db: Connection, small: Settings, makers: Makers, rest: Rest, wanted: dict[str, Any]
) -> None:
    client, library = rest
    documents = [{"key": f"b{number}", "chunks": [{"text": f"batch {number}"}]} for number in range(3)]
    makers(OLD).meanwhile = lambda: change_to(db, small, wanted)
    results = ok(await client.post("/v1/libraries/notes/documents/batch", json={"documents": documents}))["results"]
    assert [result["status"] for result in results] == [201] * 3
    there = [*named(4), *(f"batch {number}" for number in range(3))]
    check_made_by(db, library, makers(wanted), there)

    makers(wanted).meanwhile = lambda: change_to(db, small, OLD)
    lines = b"".join(msgspec.json.encode({"chunks": [{"text": f"line {number}"}]}) + b"\n" for number in range(3))
    headers = {"Content-Type": "application/x-ndjson"}
    answer = await client.post("/v1/libraries/notes/import?wait=true", content=lines, headers=headers)
    last = msgspec.json.decode(answer.content.splitlines()[-1])
    assert (last["created"], last["failed"], last["pending"]) == (3, 0, 0), answer.text
    there += [f"line {number}" for number in range(3)]
    check_made_by(db, library, makers(OLD), there)


async def test_a_library_whose_embedder_never_rests_is_busy(db: Connection, makers: Makers, rest: Rest) -> None:
    client, _ = rest
    models = iter(f"m{number}" for number in range(100))

    async def again(model: str = "m") -> None:
        model = next(models)
        makers(OLD | {"model": model}).meanwhile = again
        db.execute(
            "update pgshelf.libraries set embedder = jsonb_set(embedder, '{model}', to_jsonb(%s::text))", [model]
        )

    makers(OLD).meanwhile = again
    problem(await client.post("/v1/libraries/notes/search", json={"query": "text 1"}), 503, "lock_timeout")


async def test_writers_make_both_vectors(db: Connection, small: Settings, makers: Makers, rest: Rest) -> None:
    client, library = rest
    ask_for(db, NEW)
    chunks = [{"text": "made"}, {"text": "brought", "embedding": makers(OLD).vector("b").tolist()}, {"text": "made"}]
    ok(await client.put("/v1/libraries/notes/documents/w", json={"chunks": chunks}), 201)
    assert makers(OLD).texts == ["made"] and sorted(makers(NEW).texts) == ["brought", "made"]
    row = db.execute("select id from pgshelf.chunks_view where text = 'brought'").fetchone()
    assert row
    body = {"text": "patched", "embedding": makers(OLD).vector("p").tolist()}
    ok(await client.patch(f"/v1/libraries/notes/chunks/{row[0]}", json=body))
    assert changes(db) == [("embedding", 3)]

    makers(NEW).fails.append(EmbedderUnavailable("busy", 5))  # no matter of the writer's
    ok(await client.put("/v1/libraries/notes/documents/x", json={"chunks": [{"text": "alone"}]}), 201)
    assert changes(db) == [("embedding", 3)]
    makers(NEW).delay = 30  # nor that it is slow
    started = time.monotonic()
    ok(await client.put("/v1/libraries/notes/documents/y", json={"chunks": [{"text": "slow"}]}), 201)
    assert time.monotonic() - started < 5
    makers(NEW).delay = 0
    await carry_out(small)
    for text, vector in vectors_of(db, library).items():
        assert vector is not None and np.allclose(vector, makers(NEW).vector(text), atol=1e-6), text
    assert sorted(makers(NEW).texts) == sorted([*named(4), "made", "brought", "patched", "alone", "slow"])


@pytest.mark.parametrize("index", ["auto", "hnsw"])
async def test_searches_see_vectors_of_one_embedder_and_all_of_them(
    db: Connection, small: Settings, makers: Makers, make_client: Any, index: str
) -> None:
    """Through REST, with readers and writers that do not stop; there and back again."""
    library = make_library(db, index=index)
    fill(db, library, makers, 30)
    await shelves.reconcile_all_async(small, PACE)
    client = await make_client(msgspec.structs.replace(small, worker_enabled=False))
    ended, seen, written = False, set(), ["text 0"]

    async def read() -> None:
        while not ended:
            text, there = written[-1], len(written)
            body = {"query": text, "mode": "vector", "k": 1000, "include": ["text", "embedding"]}
            hits = ok(await client.post("/v1/libraries/notes/search", json=body))["hits"]
            of = {choice["model"] for choice in (OLD, SMALLER) if len(hits[0]["embedding"]) == choice["dimension"]}
            assert len(of) == 1 and len({len(hit["embedding"]) for hit in hits}) == 1
            maker = makers(OLD if of == {"old"} else SMALLER)
            assert hits[0]["text"] == text and hits[0]["distance"] == pytest.approx(0, abs=1e-6)
            assert all(np.allclose(hit["embedding"], maker.vector(hit["text"]), atol=1e-6) for hit in hits)
            found = [hit["text"] for hit in hits]
            assert len(found) == len(set(found)) and {*named(30), *written[:there]} <= set(found)
            seen.add(maker.model)

    async def write() -> None:
        while not ended:
            text = f"more {len(written)}"
            address = f"/v1/libraries/notes/documents/{len(written)}"
            ok(await client.put(address, json={"chunks": [{"text": text}]}), 201)
            written.append(text)

    tasks = [asyncio.create_task(each()) for each in (read, read, write)]
    for wanted in (SMALLER, OLD):
        await asyncio.sleep(0.1)
        await change_to(db, small, wanted)
    await asyncio.sleep(0.1)
    ended = True
    await asyncio.gather(*tasks)
    assert seen == {"old", "new"} and len(written) > 3
    check_made_by(db, library, makers(OLD), [*named(30), *written[1:]])
    check_clean(db)


# -- when the new one does not work


async def test_a_provider_that_is_away_is_asked_again_and_says_why_until_then(
    db: Connection, small: Settings, makers: Makers
) -> None:
    library = make_library(db)
    fill(db, library, makers, 4)
    ask_for(db, NEW)
    makers(NEW).fails = [EmbedderUnavailable("the provider rests", 30)]
    async with engine_of(small) as engine:
        [serial] = await reembedding.due(engine)
        await reembedding.look_after(engine, small, serial, PACE)
        failed = status(db)
        assert (failed["embedder"], failed["state"], failed["error"]) == (OLD, "failed", "the provider rests")
        waits = db.execute("select due - now() > interval '25 s' from pgshelf.embedder_changes").fetchone()
        assert waits == (True,) and await reembedding.due(engine) == []
    check_made_by(db, library, makers(OLD), named(4))
    assert ask_for(db, NEW), "at once, then"
    assert (status(db)["state"], status(db)["error"]) == ("embedding", None)
    await carry_out(small)
    check_made_by(db, library, makers(NEW), named(4))


async def test_a_provider_that_gives_other_vectors_than_it_says_changes_nothing(
    db: Connection, small: Settings, makers: Makers
) -> None:
    library = make_library(db)
    fill(db, library, makers, 4)
    ask_for(db, SMALLER)
    makers(SMALLER).dimension = 5
    async with engine_of(small) as engine:
        [serial] = await reembedding.due(engine)
        await reembedding.look_after(engine, small, serial)
    assert status(db)["state"] == "failed" and "has 5 dimensions, the library has 8" in status(db)["error"]
    check_made_by(db, library, makers(OLD), named(4))


async def test_a_provider_that_this_server_has_not(
    db: Connection, small: Settings, makers: Makers, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(db)
    fill(db, library, makers, 4)
    ask_for(db, NEW)

    def unknown(*_: Any) -> Any:
        raise ValueError("there is no such embedder here")

    monkeypatch.setattr(embedding, "embedder_for", unknown)
    async with engine_of(small) as engine:
        [serial] = await reembedding.due(engine)
        await reembedding.look_after(engine, small, serial)
    assert (status(db)["state"], status(db)["error"]) == ("failed", "There is no such embedder here.")


@pytest.mark.parametrize("index", ["auto", "hnsw"])
async def test_a_text_that_is_refused_keeps_no_other_from_changing(
    db: Connection, small: Settings, makers: Makers, index: str
) -> None:
    library = make_library(db, index=index)
    fill(db, library, makers, 6)
    await shelves.reconcile_all_async(small, PACE)
    makers(NEW).refused = {"text 3"}
    ask_for(db, NEW)
    await carry_out(small)
    found = vectors_of(db, library)
    assert [text for text, vector in sorted(found.items()) if vector is None] == ["text 3"]
    given_up = "select error, failed from pgshelf.pending_embeddings"
    assert db.execute(given_up.encode()).fetchall() == [("not this one", True)]
    check_clean(db)


@pytest.mark.parametrize("index", ["auto", "hnsw"])
async def test_a_library_that_is_written_all_the_time_changes_in_the_end(
    db: Connection, small: Settings, makers: Makers, index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through SQL, with vectors of the client's, faster than the new embedder answers: the last ones wait a moment."""
    monkeypatch.setattr(reembedding, "PATIENT_FLIPS", 5)
    library = make_library(db, index=index)
    fill(db, library, makers, 30)
    await shelves.reconcile_all_async(small, PACE)
    makers(NEW).delay = 0.05
    written: list[str] = []
    ask_for(db, NEW)

    async def write() -> None:
        while state(db, library)["embedder"] == OLD:
            text = f"steady {len(written)}"
            put(db, library, text, [text], [makers(OLD).vector(text)])
            written.append(text)
            await asyncio.sleep(0.005)

    writer = asyncio.create_task(write())
    await carry_out(small, pace=sessions.Pace(grace=0, sweep=0, retry=0, patience=0.3))
    await writer
    found = vectors_of(db, library)
    assert sorted(found) == sorted([*named(30), *written])
    late = [text for text, vector in found.items() if vector is None]
    assert 0 < len(late) <= moves.TOLERATED
    assert db.execute("select count(*) from pgshelf.waiting").fetchone() != (0,)
    # the very last one may have been written, by its client, just after
    odd = [t for t, v in found.items() if v is not None and not np.allclose(v, makers(NEW).vector(t), atol=1e-6)]
    assert odd in ([], written[-1:])


async def test_vectors_that_never_come_make_a_move_end_and_begin_again(
    db: Connection, small: Settings, makers: Makers
) -> None:
    library = make_library(db, index="hnsw")
    fill(db, library, makers, 4)
    await shelves.reconcile_all_async(small, PACE)
    ask_for(db, NEW)
    pace = sessions.Pace(grace=0, sweep=0, retry=0, despair=0.1)
    begun = False

    async def write(step: str) -> None:
        nonlocal begun
        if step == "drained" and not begun:
            begun = True
            makers(NEW).fails = [EmbedderUnavailable("the provider rests", 0.01)] * 1000
            put(db, library, "late", ["late"], [makers(OLD).vector("late")])
        elif step == "aborted" or (step == "claimed" and begun):
            makers(NEW).fails = []

    async def meanwhile() -> None:
        while state(db, library)["index_error"] != "1 chunks have no vector of the new embedder yet":  # noqa: ASYNC110 - another session's doing
            await asyncio.sleep(0.005)
        assert (state(db, library)["embedder"], status(db)["state"]) == (OLD, "failed")
        makers(NEW).fails = []

    looking = asyncio.create_task(meanwhile())
    async with asyncio.timeout(20):
        while state(db, library)["embedder"] == OLD:
            await carry_out(small, write, pace)
        await looking
    check_made_by(db, library, makers(NEW), [*named(4), "late"])
    check_clean(db)


async def test_the_worker_looks_after_changes_by_itself(
    db: Connection, small: Settings, makers: Makers, make_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = make_library(db)
    other = make_library(db, name="other")
    fill(db, library, makers, 4)
    put(db, other, "slow", ["slow"], [makers(OLD).vector("slow")])
    found, broken = reembedding.due, [RuntimeError("broken"), psycopg.OperationalError("away")]

    async def due(engine: Any) -> list[int]:
        if broken:
            raise broken.pop()
        return await found(engine)

    monkeypatch.setattr(reembedding, "due", due)
    await make_client(small)
    makers(SMALLER).delay = 1
    ask_for(db, SMALLER, "other")
    ask_for(db, NEW)
    async with asyncio.timeout(20):
        while state(db, library)["embedder"] != NEW:  # noqa: ASYNC110 - the worker's doing
            await asyncio.sleep(0.02)
        assert state(db, other)["embedder"] == OLD, "none waits for another"
        while db.execute("select count(*) from pgshelf.embedder_changes").fetchone() != (0,):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    check_made_by(db, library, makers(NEW), named(4))
    check_made_by(db, other, makers(SMALLER), ["slow"])


# -- what is refused


async def test_an_index_that_the_new_dimension_cannot_have(
    db: Connection, small: Settings, makers: Makers, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = rest
    monkeypatch.setattr(embedder_choice, "PROVIDERS", ("test",))

    async def settled(_: Settings, choice: Mapping[str, Any]) -> Maker:
        return makers(choice)

    monkeypatch.setattr(embedding, "settled", settled)
    address = "/v1/libraries/notes/embedder"
    make_library(db, {"provider": "none", "dimension": 3}, name="points")
    db.execute("update pgshelf.libraries set metric = 'l2', index = '{\"type\": \"kdtree\"}' where name = 'points'")
    problem(await client.put("/v1/libraries/points/embedder", json=NEW), 422, "index_impossible")
    vector = {"type": "hnsw", "storage": "vector"}
    ok(await client.put("/v1/libraries/notes/index", json=vector), 202)
    problem(await client.put(address, json=NEW | {"dimension": 3000}), 422, "index_impossible")

    ok(await client.put("/v1/libraries/notes/index", json={"type": "auto"}))
    asked = ok(await client.put(address, json=NEW | {"dimension": 3000}), 202)
    assert (asked["embedder"], asked["wanted"]["dimension"], asked["state"]) == (OLD, 3000, "embedding")
    assert (asked["progress"], asked["embedded"], asked["total"], asked["error"]) == (0.0, 0, 4, None)
    problem(await client.put("/v1/libraries/notes/index", json=vector), 422, "index_impossible")
    assert ok(await client.delete(address))["wanted"] is None
    assert ok(await client.put(address, json=OLD))["state"] == "ready"


async def test_what_cannot_be_asked_for(client: httpx2.AsyncClient) -> None:
    address = "/v1/libraries/shelf/embedder"
    problem(await client.get(address), 404, "library_not_found")
    problem(await client.put(address, json={"provider": "local"}), 404, "library_not_found")
    problem(await client.delete(address), 404, "library_not_found")
    ok(await client.post("/v1/libraries", json={"name": "shelf"}), 201)
    problem(await client.put(address, json={"provider": "none", "dimension": 256}), 422, "no_embedder")
    problem(await client.put(address, json={"provider": "none"}), 400, "validation_failed")
    problem(await client.put(address, json={"provider": "who"}), 422, "embedder_not_configured")
    problem(await client.put(address, json={"provider": "local", "dimension": 7}), 422, "embedder_not_configured")
    problem(await client.put(address, json={"provider": "local", "metric": "l2"}), 400, "validation_failed")
    assert ok(await client.put(address, json={"provider": "local"}))["wanted"] is None, "it is in use"
