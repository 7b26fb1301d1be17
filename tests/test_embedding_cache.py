"""Batches, the cache and the way from texts to vectors, over a PostgreSQL and the server that speaks Cohere's API."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy
from prometheus_client import REGISTRY

from pgshelf import connections, embedding, embedding_cache, pools, providers, worker
from pgshelf.embedders import Embedder, EmbedderFailed, EmbedderUnavailable, TextRefused, embedder_for
from pgshelf.embedders.local import LocalEmbedder
from pgshelf.settings import Settings
from tests.cohere_server import CohereServer, status

Connection = psycopg.Connection[Any]
CHOICE = {"provider": "cohere", "dimension": 256}
LONG = "word " * 6000  # refused where nothing may be left out


@pytest.fixture
def db(shared_database_url: str) -> Iterator[Connection]:
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        connection.execute("truncate pgshelf.embedding_cache")
        yield connection


@pytest.fixture
def settings(shared_database_url: str, make_settings: Callable[..., Settings], cohere_server: CohereServer) -> Settings:
    known = {"cohere_api_key": cohere_server.key, "cohere_base_url": cohere_server.url}
    return make_settings(shared_database_url, **known)


@pytest.fixture
async def engine(db: Connection, settings: Settings) -> AsyncIterator[sqlalchemy.Engine]:
    made = pools.make_engine(settings, str(settings.database_url))
    yield made
    await providers.close()
    await pools.close(made)


@pytest.fixture
def embedder(settings: Settings) -> Embedder:
    return embedder_for(settings, CHOICE)


def texts_sent(server: CohereServer) -> Counter[str]:
    return Counter(text for asked in server.asked for text in asked.body["texts"])


def counted() -> Counter[str]:
    """Lookups so far in this process, as /metrics has them."""
    name = "pgshelf_embedding_cache_lookups_total"
    found = {what: REGISTRY.get_sample_value(name, {"provider": "cohere", "outcome": what}) for what in ("hit", "miss")}
    return Counter({what: int(value or 0) for what, value in found.items()})


async def test_many_texts_go_in_batches_and_equal_ones_once(
    engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder, cohere_server: CohereServer
) -> None:
    texts = [f"text {number % 300}" for number in range(450)]
    vectors = await embedding.vectors_of(engine, settings, embedder, texts, "document")
    assert vectors.shape == (450, 256)
    assert sorted(len(asked.body["texts"]) for asked in cohere_server.asked) == [12, 96, 96, 96]
    assert set(texts_sent(cohere_server).values()) == {1}
    for place in (0, 95, 96, 299, 300, 449):
        np.testing.assert_array_equal(vectors[place], (await embedder.embed([texts[place]], "document"))[0])


async def test_no_texts_are_no_question(engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder) -> None:
    assert len(await embedding.vectors_of(engine, settings, embedder, [], "document")) == 0


async def test_what_was_answered_once_is_not_asked_again(
    engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder, cohere_server: CohereServer
) -> None:
    first = await embedding.vectors_of(engine, settings, embedder, ["a", "b"], "document")
    before = counted()
    again = await embedding.vectors_of(engine, settings, embedder, ["b", "c", "a", "b"], "document")
    assert (again[[2, 0, 3]] == first[[0, 1, 1]]).all()
    assert [asked.body["texts"] for asked in cohere_server.asked] == [["a", "b"], ["c"]]
    assert counted() - before == {"hit": 2, "miss": 1}


async def test_everything_that_decides_a_vector_is_in_its_key(
    engine: sqlalchemy.Engine, settings: Settings, cohere_server: CohereServer
) -> None:
    choices: list[dict[str, Any]] = [
        CHOICE,
        {**CHOICE, "dimension": 512},
        {**CHOICE, "model": "embed-v4.0"},
        {**CHOICE, "truncate": "start"},
        {**CHOICE, "embedding_type": "binary"},
    ]
    for _ in range(2):
        for choice in choices:
            for kind in ("document", "query"):
                await embedding.vectors_of(engine, settings, embedder_for(settings, choice), ["a"], kind)
    assert len(cohere_server.asked) == 2 * len(choices)


async def test_batches_that_came_are_kept_when_another_fails(
    engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder, cohere_server: CohereServer
) -> None:
    texts = [f"text {number}" for number in range(960)]
    cohere_server.fail(status(429, retry_after="60"))
    with pytest.raises(EmbedderUnavailable) as caught:
        await embedding.vectors_of(engine, settings, embedder, texts, "document")
    assert caught.value.retry_after == 60
    assert len(cohere_server.asked) <= 2 * embedding.CALLS_AT_ONCE  # nobody begins another one
    await embedding.vectors_of(engine, settings, embedder, texts, "document")
    answered = Counter(text for _, text in cohere_server.texts)
    assert set(answered) == set(texts) and set(answered.values()) == {1}


async def test_one_text_that_is_refused_is_found_among_the_others(
    engine: sqlalchemy.Engine, settings: Settings, cohere_server: CohereServer
) -> None:
    embedder = embedder_for(settings, {**CHOICE, "truncate": "none"})
    texts = [f"text {number}" for number in range(96)]
    texts[70] = texts[20] = LONG
    with pytest.raises(TextRefused, match="too long") as caught:
        await embedding.vectors_of(engine, settings, embedder, texts, "document")
    assert caught.value.index == 20
    cohere_server.texts.clear()
    with pytest.raises(TextRefused) as alone:
        await embedding.vectors_of(engine, settings, embedder, [LONG], "document")
    assert alone.value.index == 0
    good = [text for text in texts if text is not LONG]
    await embedding.vectors_of(engine, settings, embedder, good, "document")
    assert texts[0] not in {text for _, text in cohere_server.texts}  # the cache knows it


async def test_a_batch_that_is_only_too_large_is_halved(
    engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder, cohere_server: CohereServer
) -> None:
    cohere_server.fail(status(413, "too many tokens"))
    assert len(await embedding.vectors_of(engine, settings, embedder, ["a", "b", "c"], "document")) == 3
    assert [asked.body["texts"] for asked in cohere_server.asked] == [["a", "b", "c"], ["text"], ["a"], ["b", "c"]]


async def test_a_provider_that_refuses_everything_blames_no_text(
    engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder, cohere_server: CohereServer
) -> None:
    cohere_server.fail(*[status(400, "no such option")] * 2)
    with pytest.raises(EmbedderFailed, match="no such option") as caught:
        await embedding.vectors_of(engine, settings, embedder, ["a", "b"], "document")
    assert not isinstance(caught.value, TextRefused)
    assert len(cohere_server.asked) == 2


async def test_a_cache_that_breaks_fails_nothing(
    engine: sqlalchemy.Engine,
    settings: Settings,
    embedder: Embedder,
    cohere_server: CohereServer,
    db: Connection,
    caplog: pytest.LogCaptureFixture,
) -> None:
    db.execute("alter table pgshelf.embedding_cache rename to elsewhere")
    try:
        for _ in range(2):
            assert len(await embedding.vectors_of(engine, settings, embedder, ["a"], "query")) == 1
    finally:
        db.execute("alter table pgshelf.elsewhere rename to embedding_cache")
    assert len(cohere_server.asked) == 2
    assert "cannot be read" in caplog.text and "cannot be written" in caplog.text


async def test_a_standby_reads_the_cache_and_leaves_it_as_it_is(
    settings: Settings, embedder: Embedder, cohere_server: CohereServer, db: Connection, engine: sqlalchemy.Engine
) -> None:
    await embedding.vectors_of(engine, settings, embedder, ["a"], "query")
    db.execute("update pgshelf.embedding_cache set used_at = now() - interval '2 days'")
    read_only = "-c default_transaction_read_only=on"
    standby = pools.make_engine(settings, connections.dsn(str(settings.database_url), options=read_only))
    await embedding.vectors_of(standby, settings, embedder, ["a", "b"], "query")
    await pools.close(standby)
    assert [asked.body["texts"] for asked in cohere_server.asked] == [["a"], ["b"]]
    assert db.execute(
        "select count(*), min(used_at) < now() - interval '1 day' from pgshelf.embedding_cache"
    ).fetchone() == (
        1,
        True,
    )


async def test_a_hit_is_written_down_once_an_hour(
    engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder, db: Connection
) -> None:
    where = "select xmin::text, used_at from pgshelf.embedding_cache"
    await embedding.vectors_of(engine, settings, embedder, ["a"], "query")
    fresh = db.execute(where).fetchone()
    await embedding.vectors_of(engine, settings, embedder, ["a"], "query")
    assert db.execute(where).fetchone() == fresh
    db.execute("update pgshelf.embedding_cache set used_at = now() - interval '61 minutes'")
    await embedding.vectors_of(engine, settings, embedder, ["a"], "query")
    row = db.execute("select used_at > now() - interval '1 minute' from pgshelf.embedding_cache").fetchone()
    assert row == (True,)


async def test_the_least_recently_used_go(
    engine: sqlalchemy.Engine, settings: Settings, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_cache, "EVICT_AT_ONCE", 4)
    db.execute(
        """insert into pgshelf.embedding_cache select int4send(n), 'cohere', 'm', '[1,0]', now() - n * interval '1 day'
        from generate_series(1, 10) n"""
    )
    few = {name: getattr(settings, name) for name in settings.__struct_fields__} | {"embedding_cache_rows": 4}
    small = Settings(**few)
    assert await embedding_cache.evict(engine, small) is True  # four at once; two more are to go
    assert await embedding_cache.evict(engine, small) is False
    days = "array_agg(floor(extract(epoch from now() - used_at) / 86400)::int order by used_at desc)"
    assert db.execute(f"select {days} from pgshelf.embedding_cache").fetchone() == ([1, 2, 3, 4],)
    db.execute("insert into pgshelf.embedding_cache values ('x', 'cohere', 'm', '[1]')")
    assert await embedding_cache.evict(engine, small) is False  # not looked at again within a minute
    assert db.execute("select count(*) from pgshelf.embedding_cache").fetchone() == (5,)
    monkeypatch.setattr(embedding_cache, "_evicted", type(embedding_cache._evicted)())
    assert await worker.reconcile(engine, small) is False
    assert db.execute("select count(*) from pgshelf.embedding_cache").fetchone() == (4,)


async def test_two_evict_one_after_the_other(engine: sqlalchemy.Engine, db: Connection) -> None:
    db.execute("insert into pgshelf.embedding_cache select int4send(n), 'p', 'm', '[1]' from generate_series(1, 9) n")
    with psycopg.connect(db.info.dsn, password=db.info.password or None) as other:
        assert other.execute("select pgshelf.evict_embeddings(3, 2)").fetchone() == (2,)
        assert db.execute("select pgshelf.evict_embeddings(3, 2)").fetchone() == (0,)
    assert db.execute("select pgshelf.evict_embeddings(3, 100)").fetchone() == (4,)


async def test_lookups_and_writers_of_the_same_texts_never_wait_in_a_circle(
    engine: sqlalchemy.Engine, settings: Settings, embedder: Embedder, db: Connection
) -> None:
    texts = [f"text {number}" for number in range(40)]
    made = dict(zip(texts, np.ones((40, 256), dtype=np.float32), strict=True))

    async def one(step: int) -> None:
        order = texts if step % 2 else texts[::-1]
        await embedding_cache.remember(engine, embedder, {text: made[text] for text in order}, "document")
        await embedding_cache.look_up(engine, embedder, order, "document")

    for _ in range(3):
        await asyncio.gather(*[one(step) for step in range(8)])
        assert db.execute("select count(*) from pgshelf.embedding_cache").fetchone() == (40,)
        db.execute("update pgshelf.embedding_cache set used_at = now() - interval '1 day'")


async def test_what_is_cheaper_than_a_lookup_is_not_remembered(
    engine: sqlalchemy.Engine, settings: Settings, db: Connection, cohere_server: CohereServer
) -> None:
    await embedding.vectors_of(engine, settings, LocalEmbedder(), ["a"], "query")
    off = {name: getattr(settings, name) for name in settings.__struct_fields__} | {"embedding_cache_rows": 0}
    for _ in range(2):
        await embedding.vectors_of(engine, Settings(**off), embedder_for(settings, CHOICE), ["a"], "query")
    assert db.execute("select count(*) from pgshelf.embedding_cache").fetchone() == (0,)
    assert len(cohere_server.asked) == 2
