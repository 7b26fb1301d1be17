"""The reconciler: pending chunks become embedded, whatever fails, dies or changes meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx2
import numpy as np
import psycopg
import pytest
import sqlalchemy
from numpy.typing import NDArray

from pgshelf import batches, database, embedding, pools, worker
from pgshelf.batches import Batches
from pgshelf.embedders import EmbedderFailed, EmbedderUnavailable, TextRefused
from pgshelf.settings import Settings

DIMENSION = 4
DEADLINE = 15.0
DIE = "select chunk_id from pgshelf.claim_pending(%s, %s)"
Connection = psycopg.Connection[Any]


def vector_of(text: str) -> list[float]:
    """A unit vector that tells texts apart."""
    raw = np.frombuffer(text.encode().ljust(16, b"~")[:16], dtype=np.uint8).reshape(4, 4).sum(axis=1).astype(float)
    return [float(number) for number in raw / np.linalg.norm(raw)]


class Fake:
    """An embedder that counts what it is asked and fails as it is told."""

    provider, model = "local", "fake"
    options: dict[str, str] = {}  # noqa: RUF012 - nobody changes it
    batch, cached = 10_000, False

    def __init__(self, dimension: int = DIMENSION) -> None:
        self.dimension = dimension
        self.calls: list[list[str]] = []
        self.errors: list[Exception] = []  # raised by the next calls, in order
        self.refused: set[str] = set()
        self.spoilt_by = ""  # a text that makes every batch with it fail
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()

    @property
    def texts(self) -> Counter[str]:
        return Counter(text for call in self.calls for text in call)

    async def embed(self, texts: Sequence[str], kind: str) -> NDArray[np.float32]:
        self.calls.append(list(texts))
        self.asked.set()
        await self.answers.wait()
        if self.errors:
            raise self.errors.pop(0)
        if self.spoilt_by in texts:
            raise EmbedderFailed("spoilt")
        for index, text in enumerate(texts):
            if text in self.refused:
                raise TextRefused(f"cannot embed {text!r}", index)
        return np.array([vector_of(text) + [0.0] * (self.dimension - 4) for text in texts], dtype=np.float32)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Stands in for the local embedder of every library."""
    made = Fake()
    monkeypatch.setattr(embedding, "embedder_for", lambda *_: made)
    return made


@pytest.fixture
def db(database_url: str) -> Iterator[Connection]:
    """Somebody's psql on the database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


MakeEngine = Callable[..., sqlalchemy.Engine]


@pytest.fixture
def quiet(make_settings: Callable[..., Settings], database_url: str) -> Settings:
    """Settings of an application without a reconciler: the tests say when there is a round."""
    return make_settings(database_url, worker_enabled=False, worker_attempts=3)


@pytest.fixture
async def engine(quiet: Settings, database_url: str) -> AsyncIterator[sqlalchemy.Engine]:
    made = pools.make_engine(quiet, database_url)
    yield made
    await pools.close(made)


def make_library(db: Connection, name: str = "notes", provider: str = "local", dimension: int = DIMENSION) -> UUID:
    row = db.execute(
        """insert into pgshelf.libraries (name, dimension, embedder, chunking)
        values (%s, %s, jsonb_build_object('provider', %s::text, 'model', 'fake', 'dimension', %s::int),
          '{"size": 1200, "overlap": 0}')
        returning id""",
        [name, dimension, provider, dimension],
    ).fetchone()
    assert row
    return UUID(str(row[0]))


def put(db: Connection, key: str, texts: Sequence[str], library: str = "notes") -> UUID:
    row = db.execute("select pgshelf.put_document(%s, %s, texts => %s)", [library, key, list(texts)]).fetchone()
    assert row
    return UUID(str(row[0]))


def statuses(db: Connection, library: str = "notes") -> dict[str, str]:
    rows = db.execute("select text, status from pgshelf.chunks_view where library = %s", [library])
    return dict(rows.fetchall())


def vectors(db: Connection) -> dict[str, list[float]]:
    rows = db.execute("select text, embedding::text from pgshelf.chunks_view where embedding is not null").fetchall()
    return {text: [float(number) for number in vector.strip("[]").split(",")] for text, vector in rows}


def waiting(db: Connection) -> list[tuple[Any, ...]]:
    """What analysts see: text, attempts, error, seconds to the next attempt, failed."""
    return db.execute(
        """select c.text, p.attempts, p.error, extract(epoch from p.next_attempt_at - now())::float8, p.failed
        from pgshelf.pending_embeddings p join pgshelf.chunks_view c on c.id = p.chunk_id
        order by c.document_key, c.ordinal"""
    ).fetchall()


def due(db: Connection) -> None:
    """Let every wait and lease be over."""
    db.execute("update pgshelf.chunks set embed_after = now() where embedding is null and embed_after < 'infinity'")


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE:.0f} s: {what}"
        await asyncio.sleep(0.02)


# -- what is pending becomes embedded


async def test_texts_put_in_sql_can_be_searched_soon(
    db: Connection, database_url: str, make_settings: Callable[..., Settings], make_client: Any
) -> None:
    client = await make_client(make_settings(database_url, worker_interval=0.05))
    await client.post("/v1/libraries", json={"name": "notes"})
    put(db, "birds", ["Penguins swim under the ice.", "Swifts sleep on the wing."])

    await until(lambda: set(statuses(db).values()) == {"ready"}, "both chunks embedded")

    answer = await client.post("/v1/libraries/notes/search", json={"query": "penguins under ice", "k": 1})
    assert [hit["text"] for hit in answer.json()["hits"]] == ["Penguins swim under the ice."]
    assert waiting(db) == []


async def test_a_document_that_does_not_wait_is_accepted_and_becomes_ready(
    quiet: Settings, engine: sqlalchemy.Engine, make_client: Any, fake: Fake, db: Connection
) -> None:
    make_library(db)
    client: httpx2.AsyncClient = await make_client(quiet)

    answer = await client.post(
        "/v1/libraries/notes/documents?wait=false", json={"key": "a", "chunks": [{"text": "one"}, {"text": "two"}]}
    )
    assert (answer.status_code, answer.json()["status"]) == (202, "pending")
    assert answer.json()["chunks"] == {"total": 2, "pending": 2, "failed": 0}
    assert fake.calls == []

    assert await worker.reconcile(engine, quiet) is True
    found = (await client.get("/v1/libraries/notes/documents/a")).json()
    assert (found["status"], found["chunks"]) == ("ready", {"total": 2, "pending": 0, "failed": 0})
    assert vectors(db) == pytest.approx({text: pytest.approx(vector_of(text), abs=1e-6) for text in ("one", "two")})
    assert await worker.reconcile(engine, quiet) is False


async def test_no_reconciler_runs_where_it_is_switched_off(
    quiet: Settings, make_client: Any, fake: Fake, db: Connection
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    await make_client(quiet)
    await asyncio.sleep(0.3)  # several rounds of one that ran
    assert statuses(db) == {"one": "pending"}
    assert waiting(db)[0][1] == 0
    assert fake.calls == []


async def test_a_batch_holds_chunks_of_one_library_and_no_more_than_the_setting(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, make_settings: Callable[..., Settings], fake: Fake
) -> None:
    small = make_settings(quiet.database_url, embed_batch=2)
    for library in ("notes", "diary"):
        make_library(db, library)
        put(db, "a", [f"{library} {number}" for number in range(3)], library)
    while await worker.reconcile(engine, small):
        pass
    assert sorted(map(len, fake.calls)) == [1, 1, 2, 2]
    assert all(len({text.split()[0] for text in call}) == 1 for call in fake.calls)
    assert set(statuses(db).values()) | set(statuses(db, "diary").values()) == {"ready"}


# -- what fails


async def test_one_refused_text_spoils_no_other(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, make_client: Any, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one", "bad", "two"])
    fake.refused = {"bad"}
    await worker.reconcile(engine, quiet)

    assert statuses(db) == {"one": "ready", "bad": "failed", "two": "ready"}
    assert waiting(db) == [("bad", 1, "cannot embed 'bad'", None, True)]
    client: httpx2.AsyncClient = await make_client(quiet)
    chunks = (await client.get("/v1/libraries/notes/documents/a/chunks")).json()["items"]
    assert [(chunk["status"], chunk["error"]) for chunk in chunks] == [
        ("ready", None), ("failed", "cannot embed 'bad'"), ("ready", None)
    ]  # fmt: skip
    document = (await client.get("/v1/libraries/notes/documents/a")).json()
    assert (document["status"], document["chunks"]) == ("failed", {"total": 3, "pending": 0, "failed": 1})
    stats = (await client.get("/v1/libraries/notes/stats")).json()
    assert (stats["chunks"], stats["pending"], stats["failed"]) == (3, 0, 1)
    overview = db.execute("select pending, failed from pgshelf.libraries_overview").fetchone()
    assert overview == (0, 1)

    calls = len(fake.calls)
    await worker.reconcile(engine, quiet)
    assert len(fake.calls) == calls, "what was given up is asked for again"


async def test_a_refused_chunk_is_tried_again_when_its_text_changes(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, make_client: Any, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["bad"])
    fake.refused = {"bad"}
    await worker.reconcile(engine, quiet)
    client: httpx2.AsyncClient = await make_client(quiet)
    chunk = (await client.get("/v1/libraries/notes/documents/a/chunks")).json()["items"][0]["id"]
    answer = await client.patch(f"/v1/libraries/notes/chunks/{chunk}?wait=false", json={"text": "good"})
    assert (answer.json()["status"], answer.json()["error"]) == ("pending", None)
    await worker.reconcile(engine, quiet)
    assert statuses(db) == {"good": "ready"}


async def test_failures_are_retried_with_growing_waits_and_then_given_up(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    for attempt, (shortest, longest) in enumerate([(1.0, 2.0), (2.0, 4.0)], 1):
        fake.errors = [EmbedderFailed(f"broken {attempt}")]
        await worker.reconcile(engine, quiet)
        [(_, attempts, error, seconds, failed)] = waiting(db)
        assert (attempts, error, failed) == (attempt, f"broken {attempt}", False)
        assert shortest - 0.5 <= seconds <= longest
        assert await worker.embed_pending(engine, quiet) is False, "it does not wait"
        due(db)
    fake.errors = [EmbedderFailed("broken for good")]
    await worker.reconcile(engine, quiet)
    assert waiting(db) == [("one", 3, "broken for good", None, True)]
    due(db)
    assert await worker.embed_pending(engine, quiet) is False
    assert fake.texts == {"one": 3}


async def test_a_provider_says_when_to_come_back(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one", "two"])
    fake.errors = [EmbedderUnavailable("busy", 30)]
    await worker.reconcile(engine, quiet)
    for _, attempts, error, seconds, failed in waiting(db):
        assert (attempts, error, failed) == (0, "busy", False), "an outage counts as an attempt"
        assert 28 <= seconds <= 33
    due(db)
    await worker.reconcile(engine, quiet)
    assert statuses(db) == {"one": "ready", "two": "ready"}
    errors = db.execute("select distinct embed_error from pgshelf.chunks").fetchall()
    assert errors == [(None,)], "the reason outlives the success"


async def test_a_provider_that_is_away_for_long_costs_no_chunk(
    db: Connection, engine: sqlalchemy.Engine, make_settings: Callable[..., Settings], quiet: Settings, fake: Fake
) -> None:
    patient = make_settings(quiet.database_url, worker_attempts=2, circuit_failures=100)
    make_library(db)
    put(db, "a", ["one"])
    for _ in range(5):
        fake.errors = [EmbedderUnavailable("away", 5)]
        assert await worker.reconcile(engine, patient)
        [(_, attempts, error, _, failed)] = waiting(db)
        assert (attempts, error, failed) == (0, "away", False)
        due(db)
    await worker.reconcile(engine, patient)
    assert statuses(db) == {"one": "ready"}


async def test_a_provider_that_fails_for_everybody_is_left_alone_and_no_chunk_is_given_up(
    db: Connection, engine: sqlalchemy.Engine, make_settings: Callable[..., Settings], quiet: Settings, fake: Fake
) -> None:
    hasty = make_settings(quiet.database_url, worker_attempts=3, circuit_failures=2, circuit_wait=0.6)
    make_library(db)
    put(db, "a", ["one"])
    for _ in range(5):
        fake.errors = [EmbedderFailed("it breaks")]
        assert await worker.embed_pending(engine, hasty)
        [(_, attempts, error, _, failed)] = waiting(db)
        assert (attempts <= 1, error, failed) == (True, "it breaks", False)
        due(db)
        if len(fake.calls) > 1:
            assert await worker.embed_pending(engine, hasty) is False, "it is asked all the same"
            assert waiting(db)[0][3] <= 0, "the chunk is not left as it was"
            await asyncio.sleep(0.6)
    await worker.embed_pending(engine, hasty)
    assert statuses(db) == {"one": "ready"}


async def test_of_a_batch_that_fails_in_the_end_only_the_text_at_fault_is_given_up(
    db: Connection, engine: sqlalchemy.Engine, make_settings: Callable[..., Settings], quiet: Settings, fake: Fake
) -> None:
    patient = make_settings(quiet.database_url, worker_attempts=4, circuit_failures=100, embed_batch=16)
    make_library(db)
    texts = [f"text {number}" for number in range(20)]
    put(db, "a", [*texts, "bad"])
    fake.spoilt_by = "bad"
    while await worker.embed_pending(engine, patient):
        due(db)
    assert statuses(db) == {text: "ready" for text in texts} | {"bad": "failed"}
    assert waiting(db) == [("bad", 4, "spoilt", None, True)]


async def test_a_new_chunk_is_not_given_up_for_its_neighbours_attempts(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "old", ["one"])
    for _ in range(2):
        fake.errors = [EmbedderFailed("broken")]
        await worker.reconcile(engine, quiet)
        due(db)
    put(db, "young", ["two"])
    fake.errors = [EmbedderFailed("broken")]
    await worker.reconcile(engine, quiet)
    assert sorted(fake.calls[-1]) == ["one", "two"]
    found = [(text, attempts, failed) for text, attempts, _, _, failed in waiting(db)]
    assert found == [("one", 3, True), ("two", 1, False)]


async def test_a_library_whose_embedder_this_server_lacks_says_so(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings
) -> None:
    make_library(db, provider="elsewhere")
    put(db, "a", ["one"])
    await worker.reconcile(engine, quiet)
    [(text, attempts, error, seconds, failed)] = waiting(db)
    assert (text, attempts, failed) == ("one", 1, False)
    assert "elsewhere" in error
    assert 0 < seconds <= 2


async def test_vectors_that_the_database_refuses_are_a_failure_with_a_reason(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    fake.dimension = 5
    await worker.reconcile(engine, quiet)
    [(_, attempts, error, _, failed)] = waiting(db)
    assert (attempts, failed) == (1, False)
    assert "5 dimensions" in error


async def test_an_embedder_that_breaks_in_an_unforeseen_way_stops_nothing_else(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    make_library(db, "gone")
    db.execute("select pgshelf.delete_library('gone')")
    fake.errors = [RuntimeError("a bug")]
    with caplog.at_level(logging.WARNING, "pgshelf"):
        await worker.reconcile(engine, quiet)
    assert "a bug" in caplog.text
    assert db.execute("select count(*) from pgshelf.libraries").fetchone() == (1,), "the round ended early"
    due(db)
    await worker.reconcile(engine, quiet)
    assert statuses(db) == {"one": "ready"}


# -- what was given up is tried again


def give_up(db: Connection) -> None:
    db.execute("update pgshelf.chunks set embed_after = 'infinity', embed_attempts = 8, embed_error = 'no'")


async def test_what_was_given_up_is_tried_again_when_somebody_says_so(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, make_client: Any, fake: Fake
) -> None:
    make_library(db)
    make_library(db, "other")
    put(db, "a", ["one", "two"])
    put(db, "b", ["three"])
    put(db, "b", ["elsewhere"], "other")
    give_up(db)
    db.execute("update pgshelf.documents set metadata = '{\"year\": 2025}' where key = 'b'")
    put(db, "c", ["four"])
    client: httpx2.AsyncClient = await make_client(quiet)

    answer = await client.post("/v1/libraries/notes/embeddings/retry", json={"filter": {"year": 2025}})
    assert (answer.status_code, answer.json()) == (200, {"retried": 1})
    assert statuses(db) == {"one": "failed", "two": "failed", "three": "pending", "four": "pending"}
    [(attempts, error, failed)] = [row[1:3] + row[4:] for row in waiting(db) if row[0] == "three"]
    assert (attempts, error, failed) == (0, "no", False), "the reason is gone before it is tried"
    stats = (await client.get("/v1/libraries/notes/stats")).json()
    assert (stats["pending"], stats["failed"]) == (2, 2)

    assert (await client.post("/v1/libraries/notes/embeddings/retry", json={})).json() == {"retried": 2}
    assert (await client.post("/v1/libraries/notes/embeddings/retry", json={})).json() == {"retried": 0}
    while await worker.reconcile(engine, quiet):
        pass
    assert set(statuses(db).values()) == {"ready"}
    assert statuses(db, "other") == {"elsewhere": "failed"}


async def test_trying_again_refuses_what_it_cannot_mean(
    db: Connection, quiet: Settings, make_client: Any, fake: Fake
) -> None:
    make_library(db)
    make_library(db, "mine", "none")
    client: httpx2.AsyncClient = await make_client(quiet)
    wrong = await client.post("/v1/libraries/notes/embeddings/retry", json={"filter": {"year": {"$near": 1}}})
    assert (wrong.status_code, wrong.json()["code"]) == (400, "validation_failed")
    assert (await client.post("/v1/libraries/nowhere/embeddings/retry", json={})).status_code == 404
    assert (await client.post("/v1/libraries/mine/embeddings/retry", json={})).json() == {"retried": 0}


# -- what dies or changes meanwhile


async def test_the_claim_of_a_dead_worker_is_taken_again_after_its_lease(
    db: Connection, engine: sqlalchemy.Engine, make_settings: Callable[..., Settings], quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one", "two"])
    dead = make_settings(quiet.database_url, worker_lease=0.6)
    claimed = await database.run(engine, DIE, 10, timedelta(seconds=dead.worker_lease))
    assert len(claimed) == 2  # and then its process was killed

    started = time.monotonic()
    assert await worker.embed_pending(engine, quiet) is False, "the lease does not hold"
    while not await worker.embed_pending(engine, quiet):
        assert time.monotonic() - started < DEADLINE
        await asyncio.sleep(0.05)
    assert time.monotonic() - started >= 0.4
    assert statuses(db) == {"one": "ready", "two": "ready"}


async def test_a_worker_that_is_killed_while_embedding_loses_nothing(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    fake.answers.clear()
    task = asyncio.create_task(worker.reconcile(engine, quiet))
    await asyncio.wait_for(fake.asked.wait(), DEADLINE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fake.answers.set()
    assert statuses(db) == {"one": "pending"}
    due(db)
    await worker.reconcile(engine, quiet)
    assert statuses(db) == {"one": "ready"}


async def during_embedding(
    engine: sqlalchemy.Engine, settings: Settings, fake: Fake, change: Callable[[], Any]
) -> None:
    """One round, with a change between claim and store."""
    fake.answers.clear()
    task = asyncio.create_task(worker.reconcile(engine, settings))
    await asyncio.wait_for(fake.asked.wait(), DEADLINE)
    change()
    fake.answers.set()
    await task


def patch(db: Connection, old: str, new: str) -> None:
    row = db.execute("select library_id, id from pgshelf.chunks_view where text = %s", [old]).fetchone()
    assert row
    db.execute("select pgshelf.patch_chunk(%s, %s, %s, null, '{}')", [row[0], row[1], new])


async def test_a_text_that_changes_while_it_is_embedded_gets_its_own_vector(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["old", "same"])
    await during_embedding(engine, quiet, fake, lambda: patch(db, "old", "new"))
    assert statuses(db) == {"new": "pending", "same": "ready"}
    await worker.reconcile(engine, quiet)
    assert vectors(db)["new"] == pytest.approx(vector_of("new"), abs=1e-6)


async def test_a_vector_that_came_meanwhile_is_kept(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    document = put(db, "a", ["one"])
    change = "update pgshelf.chunks set embedding = '[0,0,0,1]' where document_id = %s"
    await during_embedding(engine, quiet, fake, lambda: db.execute(change, [document]))
    assert vectors(db) == {"one": [0, 0, 0, 1]}


async def test_the_refusal_of_an_old_text_is_no_refusal_of_the_new_one(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["bad"])
    fake.refused = {"bad"}
    await during_embedding(engine, quiet, fake, lambda: patch(db, "bad", "good"))
    assert statuses(db) == {"good": "pending"}
    await worker.reconcile(engine, quiet)
    assert statuses(db) == {"good": "ready"}


async def test_vectors_of_an_embedder_that_is_replaced_meanwhile_are_made_anew_at_once(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    change = """update pgshelf.libraries set embedder = embedder || '{"model": "other"}'"""
    await during_embedding(engine, quiet, fake, lambda: db.execute(change))
    assert statuses(db) == {"one": "pending"}
    assert await worker.embed_pending(engine, quiet), "it waits for the lease"
    assert statuses(db) == {"one": "ready"}
    assert fake.texts == {"one": 2}


async def test_a_document_deleted_while_it_is_embedded_stays_gone(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    put(db, "b", ["two"])
    await during_embedding(engine, quiet, fake, lambda: db.execute("select pgshelf.delete_document('notes', 'a')"))
    assert db.execute("select text, embedding is not null from pgshelf.chunks").fetchall() == [("two", True)]


async def test_a_library_deleted_while_it_is_embedded_is_no_trouble(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    await during_embedding(engine, quiet, fake, lambda: db.execute("select pgshelf.delete_library('notes')"))
    while await worker.reconcile(engine, quiet):
        pass
    for table in ("libraries", "documents", "chunks"):
        assert db.execute(f"select count(*) from pgshelf.{table}".encode()).fetchone() == (0,)
    assert "Traceback" not in caplog.text


async def test_several_workers_embed_each_chunk_once(
    db: Connection, quiet: Settings, make_settings: Callable[..., Settings], fake: Fake
) -> None:
    make_library(db)
    for number in range(40):
        put(db, f"{number}", [f"{number}.{chunk}" for chunk in range(5)])
    small = make_settings(quiet.database_url, embed_batch=7, worker_interval=0.01)
    async with AsyncExitStack() as stack:
        for _ in range(4):
            engine = pools.make_engine(small, str(small.database_url))
            stack.push_async_callback(pools.close, engine)
            await stack.enter_async_context(worker.running(engine, small))
        await until(lambda: waiting(db) == [], "all embedded")
    assert fake.texts == {f"{number}.{chunk}": 1 for number in range(40) for chunk in range(5)}
    assert {text: pytest.approx(vector_of(text), abs=1e-6) for text in fake.texts} == vectors(db)


# -- clean-up


async def test_what_a_deleted_library_left_is_reaped(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    make_library(db, "kept")
    put(db, "k", ["stays"], "kept")
    db.execute("select pgshelf.put_document('notes', n::text, texts => array['x']) from generate_series(1, 620) n")
    db.execute("select pgshelf.delete_library('notes')")
    assert await worker.reap(engine, quiet) == 500  # a batch is bounded
    while await worker.reap(engine, quiet):
        pass
    assert db.execute("select name from pgshelf.libraries").fetchall() == [("kept",)]
    assert db.execute("select text from pgshelf.chunks").fetchall() == [("stays",)]


@asynccontextmanager
async def referenced(db: Connection, document: UUID) -> AsyncIterator[None]:
    """A table of the application's that holds a foreign key to a document, made after its library was deleted."""
    db.execute("create table invoices (document uuid constraint invoices_document references pgshelf.documents (id))")
    db.execute("insert into invoices values (%s)", [document])
    try:
        yield
    finally:
        db.execute("drop table invoices")


async def test_a_reaping_that_a_reference_blocks_stops_neither_embedding_nor_other_reaping(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db, "blocked")
    document = put(db, "a", ["referenced"], "blocked")
    db.execute("select pgshelf.delete_library('blocked')")
    make_library(db, "other")
    put(db, "a", ["goes"], "other")
    db.execute("select pgshelf.delete_library('other')")
    make_library(db)
    async with referenced(db, document):
        put(db, "a", ["one"])
        for _ in range(3):
            await worker.reconcile(engine, quiet)
        assert statuses(db) == {"one": "ready"}
        assert sorted(db.execute("select text from pgshelf.chunks").fetchall()) == [("one",), ("referenced",)]
        assert await worker.reconcile(engine, quiet) is False, "it asks again and again without a pause"
        postponed = db.execute(
            "select deleted_at > now() + '50 s' from pgshelf.libraries where name = 'blocked'"
        ).fetchall()
        assert postponed == [(True,)]
    db.execute("update pgshelf.libraries set deleted_at = now() where name = 'blocked'")  # a minute later
    await worker.reconcile(engine, quiet)
    await worker.reconcile(engine, quiet)
    assert db.execute("select name from pgshelf.libraries").fetchall() == [("notes",)]


async def test_the_chunk_that_waited_longest_comes_first(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db, "busy")
    make_library(db, "patient")
    put(db, "a", ["first"], "patient")
    put(db, "a", [f"later {number}" for number in range(quiet.embed_batch * 2)], "busy")
    assert await worker.embed_pending(engine, quiet)
    assert fake.texts == {"first": 1}


# -- the database goes and comes back


async def test_the_reconciler_outlives_the_loss_of_its_database(
    db: Connection,
    database_url: str,
    postgres: Any,
    make_settings: Callable[..., Settings],
    make_client: Any,
    fake: Fake,
) -> None:
    make_library(db)
    client: httpx2.AsyncClient = await make_client(make_settings(database_url, worker_interval=0.05, connect_timeout=2))
    put(db, "a", ["before"])
    await until(lambda: statuses(db) == {"before": "ready"}, "the first text embedded")
    name = db.info.dbname
    with psycopg.connect(postgres.admin_url, autocommit=True) as admin:
        admin.execute(f'alter database "{name}" with allow_connections false'.encode())
        try:
            kill = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> %s"
            admin.execute(kill, [name, db.info.backend_pid])
            put(db, "b", ["meanwhile"])
            answer = await client.get("/v1/libraries")
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["Retry-After"]) >= 1
            await asyncio.sleep(0.3)  # several rounds without a database
            assert statuses(db)["meanwhile"] == "pending"
        finally:
            admin.execute(f'alter database "{name}" with allow_connections true'.encode())
    await until(lambda: statuses(db) == {"before": "ready", "meanwhile": "ready"}, "the second text embedded")
    assert (await client.get("/v1/libraries")).status_code == 200


async def test_ending_gives_back_what_is_not_done(
    db: Connection,
    engine: sqlalchemy.Engine,
    make_settings: Callable[..., Settings],
    quiet: Settings,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "GRACE", 0.2)
    make_library(db)
    put(db, "a", ["one"])
    fake.answers.clear()
    started = datetime.now(UTC)
    async with worker.running(engine, make_settings(quiet.database_url, worker_interval=60)):
        await asyncio.wait_for(fake.asked.wait(), DEADLINE)
    assert datetime.now(UTC) - started < timedelta(seconds=3)
    [(_, attempts, error, seconds, _)] = waiting(db)
    assert (attempts, error) == (0, None)
    assert seconds <= 0, "the lease holds although nobody works on it"
    fake.answers.set()
    assert await worker.embed_pending(engine, quiet)
    assert statuses(db) == {"one": "ready"}


async def test_ending_lets_a_batch_end_that_soon_will(
    db: Connection, engine: sqlalchemy.Engine, make_settings: Callable[..., Settings], quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    fake.answers.clear()
    async with worker.running(engine, make_settings(quiet.database_url)):
        await asyncio.wait_for(fake.asked.wait(), DEADLINE)
        asyncio.get_running_loop().call_later(0.3, fake.answers.set)
    assert statuses(db) == {"one": "ready"}
    assert fake.texts == {"one": 1}


# -- several batches at once


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    """Stand in for the embedders of libraries, by provider."""
    made = {"local": Fake(), "remote": Fake()}
    made["remote"].provider = "remote"
    monkeypatch.setattr(embedding, "embedder_for", lambda _, choice: made[choice["provider"]])
    return made


async def test_a_provider_that_hangs_delays_no_other(
    db: Connection,
    engine: sqlalchemy.Engine,
    make_settings: Callable[..., Settings],
    quiet: Settings,
    fakes: dict[str, Fake],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "GRACE", 0.0)
    make_library(db, "slow", "remote")
    make_library(db)
    fakes["remote"].answers.clear()
    put(db, "a", [f"slow {number}" for number in range(40)], "slow")
    async with worker.running(engine, make_settings(quiet.database_url, embed_batch=4, worker_interval=0.05)):
        await asyncio.wait_for(fakes["remote"].asked.wait(), DEADLINE)
        put(db, "a", [f"{number}" for number in range(10)])
        await until(lambda: set(statuses(db).values()) == {"ready"}, "the other library embedded")
        assert set(statuses(db, "slow").values()) == {"pending"}
        assert len(fakes["remote"].calls) == 3, "one library takes all places, or too few"
        put(db, "b", ["quick"], make_library_name(db, "quick", "remote"))
        await until(lambda: ["quick"] in fakes["remote"].calls, "a library of the same provider is asked for")
        put(db, "c", ["late"], make_library_name(db, "late", "remote"))
        await asyncio.sleep(0.3)
        assert len(fakes["remote"].calls) == 4, "more calls at once than are allowed"
        fakes["remote"].answers.set()
        await until(lambda: waiting(db) == [], "all embedded")
    assert set(fakes["remote"].texts.values()) == {1}


def make_library_name(db: Connection, name: str, provider: str) -> str:
    make_library(db, name, provider)
    return name


async def test_libraries_take_turns(
    db: Connection, engine: sqlalchemy.Engine, make_settings: Callable[..., Settings], quiet: Settings, fake: Fake
) -> None:
    make_library(db, "large")
    make_library(db, "small")
    put(db, "a", [f"large {number}" for number in range(30)], "large")
    running = Batches(engine, make_settings(quiet.database_url, embed_batch=5))
    for number in range(6):
        if number == 2:
            put(db, "a", ["small"], "small")
        batch = await running.claim()
        assert batch is not None
        await batch.work()
    assert [call[0].split()[0] for call in fake.calls] == ["large", "large", "small", "large", "large", "large"]


async def test_a_long_list_of_turns_is_cut(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "REMEMBERED", 2)
    running = Batches(engine, quiet)
    for name in ("one", "two", "three"):
        make_library(db, name)
        put(db, "a", [name], name)
        batch = await running.claim()
        assert batch is not None and batch.provider == "local"
        await batch.work()
    assert fake.texts == {"one": 1, "two": 1, "three": 1}


async def test_the_lease_of_a_slow_call_is_renewed(
    db: Connection, engine: sqlalchemy.Engine, make_settings: Callable[..., Settings], quiet: Settings, fake: Fake
) -> None:
    short = make_settings(quiet.database_url, worker_lease=0.6, worker_enabled=False)
    make_library(db)
    put(db, "a", ["one", "two"])
    fake.answers.clear()
    task = asyncio.create_task(worker.embed_pending(engine, short))
    await asyncio.wait_for(fake.asked.wait(), DEADLINE)
    for _ in range(15):
        assert await worker.embed_pending(engine, short) is False, "texts are sent twice"
        await asyncio.sleep(0.1)
    fake.answers.set()
    await task
    assert fake.texts == {"one": 1, "two": 1}
    assert waiting(db) == []


async def test_a_lease_is_renewed_only_where_nobody_is_in_the_way(
    db: Connection, database_url: str, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["free"])
    put(db, "b", ["held"])
    put(db, "c", ["old"])
    batch = await Batches(engine, quiet).claim()
    assert batch is not None
    patch(db, "old", "new")
    with psycopg.connect(database_url) as other:
        other.execute("select 1 from pgshelf.chunks where text = 'held' for update")
        await batch._lease(1000)
    assert [(row[0], row[3] > 900) for row in waiting(db)] == [("free", True), ("held", False), ("new", False)]
    db.execute("select pgshelf.delete_library('notes')")
    await batch._lease(0)  # what is gone needs no lease


async def test_vectors_wait_for_a_database_that_is_away(
    db: Connection, postgres: Any, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake
) -> None:
    make_library(db)
    put(db, "a", ["one"])
    name = db.info.dbname
    fake.answers.clear()
    task = asyncio.create_task(worker.embed_pending(engine, quiet))
    await asyncio.wait_for(fake.asked.wait(), DEADLINE)
    with psycopg.connect(postgres.admin_url, autocommit=True) as admin:
        admin.execute(f'alter database "{name}" with allow_connections false'.encode())
        try:
            kill = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> %s"
            admin.execute(kill, [name, db.info.backend_pid])
            fake.answers.set()
            await asyncio.sleep(0.5)
            assert not task.done()
        finally:
            admin.execute(f'alter database "{name}" with allow_connections true'.encode())
    assert await task
    assert statuses(db) == {"one": "ready"}
    assert fake.texts == {"one": 1}


async def test_vectors_that_nobody_can_store_are_not_kept_for_ever(
    db: Connection, engine: sqlalchemy.Engine, quiet: Settings, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "STORE_PATIENCE", 0.3)
    make_library(db)
    put(db, "a", ["one"])
    db.execute("alter function pgshelf.store_embeddings set lock_timeout = '50ms'")
    with db.transaction():
        db.execute("update pgshelf.documents set title = 'held'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await worker.embed_pending(engine, quiet)
    assert statuses(db) == {"one": "pending"}
    due(db)
    assert await worker.embed_pending(engine, quiet)
    assert statuses(db) == {"one": "ready"}
