"""Vectors of Cohere, as a server on this machine speaks its API: what is sent, what comes of answers and refusals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from pgshelf import providers
from pgshelf.embedders import (
    EmbedderError,
    EmbedderFailed,
    EmbedderTimeout,
    EmbedderUnavailable,
    ModelUnknown,
    TextsRefused,
    cohere,
    described,
    embedder_for,
)
from pgshelf.settings import Settings
from tests.cohere_server import CohereServer, Fault, changed, hang, numbers_of, packed, raw, reset, status

TEXTS = ["vacuum reclaims storage", "a cat sleeps"]
CHOICE = {"provider": "cohere"}


@pytest.fixture
async def settings(cohere_server: CohereServer) -> AsyncIterator[Settings]:
    yield Settings(cohere_api_key=cohere_server.key, cohere_base_url=cohere_server.url, cohere_timeout=30.0)
    await providers.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were to be waited; nothing is."""
    noted: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        noted.append(seconds)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return noted


def unit(vector: list[float]) -> np.ndarray:
    return np.array(vector) / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("model", "dimension", "made", "asked"),
    [
        (None, None, 1024, 1024),
        (None, 256, 256, 256),
        ("embed-v4.0", None, 1024, 1024),
        ("embed-v4.0", 1536, 1536, 1536),
        ("embed-multilingual-v3.0", None, 1024, None),
        ("embed-english-light-v3.0", 384, 384, None),
        ("embed-of-tomorrow", 64, 64, 64),
    ],
)
async def test_what_cohere_is_sent_and_what_becomes_of_its_answer(
    settings: Settings, cohere_server: CohereServer, model: Any, dimension: Any, made: int, asked: Any
) -> None:
    embedder = embedder_for(settings, {**CHOICE, "model": model, "dimension": dimension})
    assert described(embedder) == {"provider": "cohere", "model": model or "embed-v5.0-fast", "dimension": made}
    vectors = await embedder.embed(TEXTS, "document")
    assert vectors.shape == (2, made) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, unit(numbers_of("search_document", text, made)), atol=1e-6)
    [sent] = cohere_server.asked
    assert (sent.path, sent.headers["authorization"]) == ("/v2/embed", f"Bearer {cohere_server.key}")
    expected = {"model": embedder.model, "texts": TEXTS, "input_type": "search_document", "truncate": "END"}
    expected |= {"embedding_types": ["float"]} | ({"output_dimension": asked} if asked else {})
    assert sent.body == expected


async def test_queries_are_queries(settings: Settings, cohere_server: CohereServer) -> None:
    [vector] = await embedder_for(settings, {**CHOICE, "dimension": 256}).embed(TEXTS[:1], "query")
    assert cohere_server.asked[0].body["input_type"] == "search_query"
    np.testing.assert_allclose(vector, unit(numbers_of("search_query", TEXTS[0], 256)), atol=1e-6)


async def test_binary_documents_are_signs_and_their_queries_are_whole(
    settings: Settings, cohere_server: CohereServer
) -> None:
    choice = {**CHOICE, "dimension": 256, "embedding_type": "binary", "truncate": "start"}
    embedder = embedder_for(settings, choice)
    assert described(embedder) == {**choice, "model": "embed-v5.0-fast"}
    document, query = (await embedder.embed(TEXTS[:1], "document"))[0], (await embedder.embed(TEXTS[:1], "query"))[0]
    signs = [1 if number > 0 else -1 for number in numbers_of("search_document", TEXTS[0], 256)]
    assert packed([float(sign) for sign in signs]) == packed(numbers_of("search_document", TEXTS[0], 256))
    np.testing.assert_allclose(document, np.array(signs) / 16)
    np.testing.assert_allclose(query, unit(numbers_of("search_query", TEXTS[0], 256)), atol=1e-6)
    assert [asked.body["embedding_types"] for asked in cohere_server.asked] == [["ubinary"], ["float"]]
    assert {asked.body["truncate"] for asked in cohere_server.asked} == {"START"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"dimension": 100}, "must be one of 256, 512, 768, 1024, 1536, 2048, not 100"),
        ({"model": "embed-v4.0", "dimension": 2048}, "must be one of 256, 512, 1024, 1536, not 2048"),
        ({"model": "embed-english-v3.0", "dimension": 512}, "must be one of 1024, not 512"),
        ({"model": "embed-of-tomorrow"}, "needs a dimension; known are embed-v5.0-fast"),
        ({"embedding_type": "int8"}, "must be one of float, binary, not 'int8'"),
        ({"truncate": "middle"}, "must be one of end, start, none, not 'middle'"),
        ({"model": "x", "dimension": 12, "embedding_type": "binary"}, "that 8 divides, not 12"),
    ],
)
def test_a_choice_that_is_impossible(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedder_for(Settings(cohere_api_key="key"), {**CHOICE, **choice})


def test_the_models_that_are_known_are_those_of_the_server() -> None:
    from tests.cohere_server import EMBED_MODELS

    for model, dimensions in cohere.MODELS.items():
        assert set(dimensions) == set(EMBED_MODELS.get(model, dimensions))


def test_a_server_without_a_key_says_so() -> None:
    with pytest.raises(ValueError, match="needs PGSHELF_COHERE_API_KEY"):
        embedder_for(Settings(), CHOICE)


@pytest.mark.parametrize(
    ("faults", "kind", "message", "calls"),
    [
        ([status(429, retry_after="60")], EmbedderUnavailable, "how often it may be asked", 1),
        ([status(503)] * 3, EmbedderUnavailable, "not available", 3),
        ([reset] * 3, EmbedderUnavailable, "cannot be reached", 3),
        ([status(500, "oh")] * 3, EmbedderFailed, "status 500\\): oh$", 3),
        ([status(401, "no")], EmbedderFailed, "refused the key in PGSHELF_COHERE_API_KEY", 1),
        ([status(404)], ModelUnknown, 'no embedding model "embed-v5.0-fast"', 1),
        ([status(400, "too long")], TextsRefused, "too long", 1),
        ([raw(b"<html>")], EmbedderFailed, "could not be read", 1),
    ],
)
async def test_refusals(
    settings: Settings,
    cohere_server: CohereServer,
    waits: list[float],
    faults: list[Fault],
    kind: type[Exception],
    message: str,
    calls: int,
) -> None:
    cohere_server.fail(*faults)
    with pytest.raises(EmbedderError, match=message) as caught:
        await embedder_for(settings, CHOICE).embed(TEXTS, "document")
    assert type(caught.value) is kind
    assert len(cohere_server.asked) == calls and not cohere_server.texts
    if isinstance(caught.value, EmbedderUnavailable):
        assert caught.value.retry_after == (60 if calls == 1 else providers.RETRY_AFTER)


async def test_no_answer_in_time(cohere_server: CohereServer) -> None:
    hasty = Settings(cohere_api_key=cohere_server.key, cohere_base_url=cohere_server.url, cohere_timeout=0.5)
    cohere_server.fail(hang)
    with pytest.raises(EmbedderTimeout, match=r"within 0\.5 seconds"):
        await embedder_for(hasty, CHOICE).embed(TEXTS, "document")
    await providers.close()


def floats(change: Any) -> Fault:
    """The right answer, whose vectors are changed."""
    return changed(lambda answer: answer["embeddings"].update(float=change(answer["embeddings"]["float"])))


WRONG: dict[str, tuple[Fault, str]] = {
    "too few": (floats(lambda rows: rows[1:]), "not one vector for each"),
    "too many": (floats(lambda rows: [*rows, rows[0]]), "not one vector for each"),
    "shorter": (floats(lambda rows: [row[:-1] for row in rows]), "dimension 1023, not 1024"),
    "longer": (floats(lambda rows: [rows[0], [*rows[1], 1.0]]), "dimension 1025, not 1024"),
    "zero": (floats(lambda rows: [rows[0], [0] * 1024]), "zero or not finite"),
    "NaN": (floats(lambda rows: [[float("nan"), *rows[0][1:]], rows[1]]), "zero or not finite"),
    "infinite": (floats(lambda rows: [[float("inf"), *rows[0][1:]], rows[1]]), "zero or not finite"),
    "enormous": (floats(lambda rows: [[1e300, *rows[0][1:]], rows[1]]), "zero or not finite"),
    "beyond": (floats(lambda rows: [[10**400, *rows[0][1:]], rows[1]]), "out of range"),
    "words": (floats(lambda rows: [["x", *rows[0][1:]], rows[1]]), "not made of numbers"),
    "true": (floats(lambda rows: [[True, *rows[0][1:]], rows[1]]), "not made of numbers"),
    "no list": (floats(lambda rows: [7, rows[1]]), "not made of numbers"),
    "null": (floats(lambda rows: None), "not one vector for each"),
    "other type": (changed(lambda answer: answer["embeddings"].clear()), "not one vector for each"),
    "no embeddings": (changed(lambda answer: answer.pop("embeddings")), "not one vector for each"),
    "embeddings list": (changed(lambda answer: answer.update(embeddings=[[1.0]])), "could not be read"),
    "nothing": (raw(b""), "could not be read"),
    "number": (raw(b"7"), "could not be read"),
    "depth": (raw(b"[" * 100_000), "could not be read"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_answer_that_is_none(settings: Settings, cohere_server: CohereServer, name: str) -> None:
    fault, message = WRONG[name]
    cohere_server.fail(fault)
    with pytest.raises(EmbedderFailed, match=message):
        await embedder_for(settings, CHOICE).embed(TEXTS, "document")
    assert len(cohere_server.asked) == 1


@pytest.mark.parametrize("byte", [-1, 256])
async def test_binary_vectors_are_made_of_bytes(settings: Settings, cohere_server: CohereServer, byte: int) -> None:
    cohere_server.fail(changed(lambda answer: answer["embeddings"]["ubinary"][0].__setitem__(0, byte)))
    with pytest.raises(EmbedderFailed, match="not made of bytes"):
        await embedder_for(settings, {**CHOICE, "embedding_type": "binary"}).embed(TEXTS, "document")


async def test_the_key_stays_out_of_logs_and_messages(
    settings: Settings, cohere_server: CohereServer, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (None, "httpx", "httpcore", "cohere"):
        caplog.set_level(logging.DEBUG, name)
    cohere_server.fail(status(400, f"what is {cohere_server.key}?"))
    with pytest.raises(TextsRefused, match=r"what is \*\*\*\?"):
        await embedder_for(settings, CHOICE).embed(TEXTS, "document")
    assert caplog.text and cohere_server.key not in caplog.text
