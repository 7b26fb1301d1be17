"""Vectors of an endpoint that speaks OpenAI's API: what is sent, what comes of answers and refusals, new libraries."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from pgshelf import providers
from pgshelf.embedders import (
    Embedder,
    EmbedderError,
    EmbedderFailed,
    EmbedderTimeout,
    EmbedderUnavailable,
    ModelUnknown,
    TextsRefused,
    described,
    embedder_for,
    settled,
)
from pgshelf.settings import Settings, SettingsError
from tests.cohere_server import Fault, changed, cut_off, hang, numbers_of, raw, reset, status
from tests.openai_server import OpenAIServer

pytestmark = pytest.mark.watched  # each case is another way

TEXTS = ["vacuum reclaims storage", "a cat sleeps"]
CHOICE = {"provider": "openai", "model": "bge-of-tests", "dimension": 16}


def settings_for(server: OpenAIServer, **given: Any) -> Settings:
    return Settings(**{"openai_base_url": server.base_url, "openai_api_key": server.key, **given})


@pytest.fixture
async def embedder(openai_server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Embedder]:
    monkeypatch.setattr(providers, "BACKOFF", 0.001)
    yield embedder_for(settings_for(openai_server), CHOICE)
    await providers.close()


def unit(vector: list[float]) -> np.ndarray:
    return np.array(vector) / np.linalg.norm(vector)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_what_is_sent_and_what_becomes_of_the_answer(openai_server: OpenAIServer, encoding: str) -> None:
    settings = settings_for(openai_server, openai_encoding=encoding, openai_base_url=openai_server.base_url + "/")
    vectors = await embedder_for(settings, CHOICE).embed(TEXTS, "document")
    assert vectors.shape == (2, 16) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, unit(numbers_of("", text, 16)), atol=1e-6)
    [asked] = openai_server.asked
    assert (asked.path, asked.headers["authorization"]) == ("/v1/embeddings", f"Bearer {openai_server.key}")
    assert asked.body == {"model": "bge-of-tests", "input": TEXTS, "encoding_format": encoding}
    await providers.close()


async def test_without_a_key_none_is_sent(openai_server: OpenAIServer) -> None:
    with pytest.raises(EmbedderFailed, match="refused the key in PGSHELF_OPENAI_API_KEY"):
        await embedder_for(settings_for(openai_server, openai_api_key=None), CHOICE).embed(TEXTS, "document")
    assert "authorization" not in openai_server.asked[0].headers
    await providers.close()


async def test_prefixes_go_before_the_texts_of_their_kind(openai_server: OpenAIServer, embedder: Embedder) -> None:
    prefixes = {"query_prefix": "query: ", "document_prefix": "passage: "}
    made = await settled(settings_for(openai_server), {**CHOICE, **prefixes})
    assert described(made) == {**CHOICE, **prefixes}
    openai_server.asked.clear()
    again = embedder_for(settings_for(openai_server), described(made))
    await again.embed(["a"], "query")
    await again.embed(["a"], "document")
    assert [asked.body["input"] for asked in openai_server.asked] == [["query: a"], ["passage: a"]]


@pytest.mark.parametrize(
    ("choice", "made", "calls"),
    [
        ({"model": "bge-of-tests"}, {"dimension": 16}, 1),
        ({"model": "bge-of-tests", "dimension": 16}, {"dimension": 16}, 1),
        ({"model": "matryoshka"}, {"dimension": 32}, 1),
        ({"model": "matryoshka", "dimension": 8}, {"dimension": 8, "shortened": True}, 2),
    ],
)
async def test_a_new_library_learns_the_dimension(
    openai_server: OpenAIServer, embedder: Embedder, choice: dict[str, Any], made: dict[str, Any], calls: int
) -> None:
    settings = settings_for(openai_server)
    found = await settled(settings, {"provider": "openai", "dimension": None, **choice})
    assert described(found) == {"provider": "openai", "model": choice["model"], **made}
    assert len(openai_server.asked) == calls
    assert (await embedder_for(settings, described(found)).embed(TEXTS, "query")).shape == (2, made["dimension"])
    assert openai_server.asked[-1].body.get("dimensions") == (8 if "shortened" in made else None)


@pytest.mark.parametrize(
    ("given", "choice", "message"),
    [
        ({"openai_base_url": None}, {}, "needs PGSHELF_OPENAI_BASE_URL"),
        ({}, {"model": None}, "needs a model"),
        ({}, {"dimension": 8}, 'model "bge-of-tests" makes vectors of 16 numbers and cannot make 8'),
        ({}, {"truncate": "end"}, 'the embedder "openai" takes no truncate'),
    ],
)
async def test_a_choice_that_is_impossible(
    openai_server: OpenAIServer, embedder: Embedder, given: dict[str, Any], choice: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        await settled(settings_for(openai_server, **given), {**CHOICE, **choice})


async def test_an_endpoint_that_makes_nothing_makes_no_library(openai_server: OpenAIServer, embedder: Embedder) -> None:
    openai_server.fail(changed(lambda answer: answer["data"].clear()))
    with pytest.raises(EmbedderFailed, match="not one vector for each"):
        await settled(settings_for(openai_server), CHOICE)


@pytest.mark.parametrize("lacking", ["model", "dimension"])
def test_a_library_without_model_or_dimension_was_not_made_here(openai_server: OpenAIServer, lacking: str) -> None:
    with pytest.raises(ValueError, match=f"needs a {lacking}"):
        embedder_for(settings_for(openai_server), {**CHOICE, lacking: None})
    with pytest.raises(ValueError, match="needs PGSHELF_OPENAI_BASE_URL"):
        embedder_for(Settings(), CHOICE)


@pytest.mark.parametrize(
    ("faults", "kind", "message"),
    [
        ([status(429, retry_after="60")], EmbedderUnavailable, "how often it may be asked"),
        ([status(503)] * 3, EmbedderUnavailable, "not available"),
        ([reset] * 3, EmbedderUnavailable, "cannot be reached"),
        ([cut_off] * 3, EmbedderUnavailable, "cannot be reached"),
        ([status(500, "oh")] * 3, EmbedderFailed, "status 500\\): oh$"),
        ([status(401)], EmbedderFailed, "refused the key in PGSHELF_OPENAI_API_KEY"),
        ([status(404)], ModelUnknown, 'has no embedding model "bge-of-tests" at PGSHELF_OPENAI_BASE_URL'),
        ([raw(b'{"error": {"message": "too long"}}', 400)], TextsRefused, "status 400\\): too long"),
        ([raw(b'{"error": "Input is too long", "type": "x"}', 422)], TextsRefused, "Input is too long"),
        ([raw(b'{"detail": "no"}', 413)], TextsRefused, "status 413\\): no"),
        ([raw(b'{"detail": [1]}', 400)], TextsRefused, "status 400\\)$"),
        ([raw(b"<html>", 400)], TextsRefused, "status 400\\)$"),
        ([status(302, location="/elsewhere")], EmbedderFailed, "could not be read"),
    ],
)
async def test_refusals(
    openai_server: OpenAIServer, embedder: Embedder, faults: list[Fault], kind: type[Exception], message: str
) -> None:
    openai_server.fail(*faults)
    with pytest.raises(EmbedderError, match=message) as caught:
        await embedder.embed(TEXTS, "document")
    assert type(caught.value) is kind
    assert len(openai_server.asked) == len(faults)
    assert openai_server.key not in str(caught.value)


async def test_what_passes_is_tried_again(openai_server: OpenAIServer, embedder: Embedder) -> None:
    openai_server.fail(status(503), reset)
    assert len(await embedder.embed(TEXTS, "document")) == 2
    assert len(openai_server.asked) == 3


async def test_no_answer_in_time(openai_server: OpenAIServer) -> None:
    openai_server.fail(hang)
    with pytest.raises(EmbedderTimeout, match=r"within 0\.5 seconds"):
        await embedder_for(settings_for(openai_server, openai_timeout=0.5), CHOICE).embed(TEXTS, "query")
    await providers.close()


def first(value: Any) -> Fault:
    """The right answer, whose first vector is another."""
    return changed(lambda answer: answer["data"][0].update(embedding=value))


WRONG: dict[str, tuple[Fault, str]] = {
    "too few": (changed(lambda answer: answer["data"].pop()), "not one vector for each"),
    "twice": (changed(lambda answer: answer["data"][1].update(index=0)), "could not be read"),
    "a place too far": (changed(lambda answer: answer["data"][1].update(index=2)), "could not be read"),
    "shorter": (first([1.0]), "dimension 1, not 16"),
    "zero": (first([0] * 16), "zero or not finite"),
    "enormous": (first([1e300] * 16), "zero or not finite"),
    "words": (first(["x"] * 16), "could not be read"),
    "no base64": (first("???"), "could not be read"),
    "no float32": (first(base64.b64encode(b"abc").decode()), "could not be read"),
    "NaN": (first(base64.b64encode(struct.pack("<16f", *[float("nan")] * 16)).decode()), "zero or not finite"),
    "nothing": (raw(b""), "could not be read"),
    "HTML": (raw(b"<html>"), "could not be read"),
    "no data": (raw(b"{}"), "could not be read"),
    "depth": (raw(b"[" * 100_000), "could not be read"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_an_answer_that_is_none(openai_server: OpenAIServer, embedder: Embedder, name: str) -> None:
    fault, message = WRONG[name]
    openai_server.fail(fault)
    with pytest.raises(EmbedderFailed, match=message):
        await embedder.embed(TEXTS, "document")
    assert len(openai_server.asked) == 1


async def test_an_answer_out_of_order_is_put_in_order(openai_server: OpenAIServer, embedder: Embedder) -> None:
    expected = await embedder.embed(TEXTS, "document")
    openai_server.fail(changed(lambda answer: answer["data"].reverse()))
    np.testing.assert_array_equal(await embedder.embed(TEXTS, "document"), expected)


def test_key_and_address_are_not_shown(openai_server: OpenAIServer) -> None:
    with pytest.raises(SettingsError, match=r"PGSHELF_OPENAI_API_KEY=\*\*\* cannot be used"):
        Settings.from_env({"PGSHELF_OPENAI_API_KEY": "two words"})
    with pytest.raises(SettingsError, match="openai_base_url must be an address such as http"):
        Settings.from_env({"PGSHELF_OPENAI_BASE_URL": "http://h:port/v1"})
    summary = settings_for(openai_server, openai_base_url="https://somebody:hunter2@gateway.example/v1").summary()
    assert summary["openai_api_key"] == "***"
    assert summary["openai_base_url"] == "https://somebody:***@gateway.example/v1"
