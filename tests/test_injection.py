"""Hostile texts through every string that the API takes: a sample; `make soak ARGS="--only injection"` sends all."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.rest.asking import bearer, key, ok
from tests.soak.hostile import NUMBERS, TEXTS
from tests.soak.injection import Corpus

SEED, SHARE = 5, 0.01


@pytest.mark.unwatched
async def test_no_text_does_anything(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(
        make_settings(database_url, auth="on", worker_enabled=False), headers=bearer(key(database_url, "root", "admin"))
    )
    corpus = Corpus(client, database_url, ok(await client.get("/schema")))
    corpus.prepare()
    await corpus.run(random.Random(SEED), SHARE)
    print(corpus.figures())
    assert corpus.answers.keys() >= {"200", "201", "400", "401", "404"}
    assert corpus.same > 5


def test_the_corpus_is_what_it_says() -> None:
    assert len(TEXTS) >= 250 and len(NUMBERS) > 20
    assert len(set(TEXTS)) == len(TEXTS)
