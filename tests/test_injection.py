"""Hostile texts through every string that the API takes: a sample; `make soak ARGS="--only injection"` sends all."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest

from pgshelf import embedded
from tests.postgres import Choice, Databases, start_server
from tests.rest.asking import bearer, key, ok
from tests.soak.hostile import NUMBERS, TEXTS
from tests.soak.injection import Corpus

SEED, SHARE = 5, 0.01


@pytest.fixture
def own_database(postgres_version: int, vector_schema: str) -> Iterator[str]:
    """On a server of its own: roles belong to all databases of one, and other tests make some."""
    version = postgres_version if postgres_version in embedded.VERSIONS else 18
    with contextlib.closing(start_server(Choice("embedded", version))) as server:
        with contextlib.closing(Databases(server, vector_schema)) as databases:
            yield databases.migrated()


@pytest.mark.unwatched
async def test_no_text_does_anything(own_database: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(
        make_settings(own_database, auth="on", worker_enabled=False), headers=bearer(key(own_database, "root", "admin"))
    )
    corpus = Corpus(client, own_database, ok(await client.get("/schema")))
    corpus.prepare()
    await corpus.run(random.Random(SEED), SHARE)
    print(corpus.figures())
    assert corpus.answers.keys() >= {"200", "201", "400", "401", "404"}
    assert corpus.same > 5


def test_the_corpus_is_what_it_says() -> None:
    assert len(TEXTS) >= 250 and len(NUMBERS) > 20
    assert len(set(TEXTS)) == len(TEXTS)
