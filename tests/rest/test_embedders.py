"""Libraries with embedders of providers, over REST: made, written, searched, and what a client is told of failures."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from pgshelf import breaker, providers, shelves
from tests.cohere_server import CohereServer, hang, raw, status
from tests.openai_server import OpenAIServer
from tests.rest.asking import at, ok, problem

LIBRARIES = "/v1/libraries"
SHELF = at("libraries", "shelf")
DOCUMENTS, SEARCH = f"{SHELF}/documents", f"{SHELF}/search"
TEXTS = ["vacuum reclaims storage", "a cat sleeps on the sofa", "indexes find rows"]


@pytest.fixture
async def client(
    database_url: str,
    make_settings: Any,
    make_client: Any,
    cohere_server: CohereServer,
    openai_server: OpenAIServer,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    monkeypatch.setattr(providers, "BACKOFF", 0.001)
    return await make_client(
        make_settings(
            database_url,
            cohere_api_key=cohere_server.key,
            cohere_base_url=cohere_server.url,
            cohere_timeout=1.0,
            openai_api_key=openai_server.key,
            openai_base_url=openai_server.base_url,
            worker_enabled=False,
        )
    )


async def make(client: httpx2.AsyncClient, **embedder: Any) -> dict[str, Any]:
    library: dict[str, Any] = ok(await client.post(LIBRARIES, json={"name": "shelf", "embedder": embedder}), 201)
    return library


@pytest.mark.parametrize(
    "embedder",
    [
        {"provider": "cohere", "dimension": 256},
        {"provider": "cohere", "dimension": 256, "embedding_type": "binary", "truncate": "start"},
        {"provider": "openai", "model": "bge-of-tests", "query_prefix": "query: "},
        {"provider": "openai", "model": "matryoshka", "dimension": 8},
    ],
    ids=["cohere", "binary", "openai", "shortened"],
)
async def test_what_is_written_is_found(client: httpx2.AsyncClient, embedder: dict[str, Any]) -> None:
    made = await make(client, **embedder)
    assert {**made["embedder"], **embedder} == made["embedder"]
    assert made["embedder"]["dimension"] == made["dimension"]
    assert ok(await client.get(SHELF)) == made
    document = {"key": "k", "chunks": [{"text": text} for text in TEXTS]}
    assert ok(await client.post(DOCUMENTS, json=document), 201)["status"] == "ready"
    for text in TEXTS:
        hits = ok(await client.post(SEARCH, json={"query": text, "mode": "vector", "k": 3}))["hits"]
        assert (hits[0]["text"], len(hits)) == (text, 3)


async def test_binary_embeddings_fit_an_index_of_bits(
    client: httpx2.AsyncClient, database_url: str, make_settings: Any
) -> None:
    embedder = {"provider": "cohere", "dimension": 256, "embedding_type": "binary"}
    index = {"type": "hnsw", "storage": "bit"}
    ok(await client.post(LIBRARIES, json={"name": "shelf", "embedder": embedder, "index": index}), 201)
    ok(await client.post(DOCUMENTS, json={"key": "k", "chunks": [{"text": text} for text in TEXTS]}), 201)
    await shelves.reconcile_all_async(make_settings(database_url))
    found = ok(await client.get(f"{SHELF}/index"))
    assert (found["state"], found["actual"]["storage"]) == ("ready", "bit")
    request = {"query": TEXTS[0], "mode": "vector", "include": ["text", "embedding"]}
    [best, *_] = ok(await client.post(SEARCH, json=request))["hits"]
    assert best["text"] == TEXTS[0] and {abs(number) for number in best["embedding"]} == {1 / 16}


async def test_a_query_is_sent_once(client: httpx2.AsyncClient, cohere_server: CohereServer) -> None:
    await make(client, provider="cohere")
    first = await client.post(SEARCH, json={"query": "vacuum", "mode": "vector"})
    again = await client.post(SEARCH, json={"query": "vacuum", "mode": "vector"})
    assert "embed;" in first.headers["server-timing"] and "cache;" in first.headers["server-timing"]
    assert "embed;" not in again.headers["server-timing"] and "cache;" in again.headers["server-timing"]
    assert [asked.body["texts"] for asked in cohere_server.asked] == [["vacuum"]]


async def test_with_a_key_cohere_is_the_default(client: httpx2.AsyncClient) -> None:
    made = ok(await client.post(LIBRARIES, json={"name": "shelf"}), 201)
    assert made["embedder"] == {"provider": "cohere", "model": "embed-v5.0-fast", "dimension": 1024}


async def test_the_default_has_a_model_and_a_dimension(
    database_url: str, make_settings: Any, make_client: Any, cohere_server: CohereServer
) -> None:
    known = {"embedder_model": "embed-v4.0", "embedder_dimension": 512, "cohere_api_key": cohere_server.key}
    client = await make_client(make_settings(database_url, **known))
    made = ok(await client.post(LIBRARIES, json={"name": "shelf"}), 201)
    assert made["embedder"] == {"provider": "cohere", "model": "embed-v4.0", "dimension": 512}
    local = await make_client(make_settings(database_url, cohere_api_key=cohere_server.key, embedder="local"))
    assert ok(await local.post(LIBRARIES, json={"name": "other"}), 201)["embedder"]["provider"] == "local"


@pytest.mark.parametrize(
    ("embedder", "words"),
    [
        ({"provider": "cohere"}, "PGSHELF_COHERE_API_KEY"),
        ({"provider": "openai", "model": "m"}, "PGSHELF_OPENAI_BASE_URL"),
        ({"provider": "sentence_transformers"}, "PGSHELF_SENTENCE_TRANSFORMERS_MODELS"),
    ],
)
async def test_what_the_server_is_not_set_up_for(
    database_url: str, make_settings: Any, make_client: Any, embedder: dict[str, Any], words: str
) -> None:
    client = await make_client(make_settings(database_url))
    response = await client.post(LIBRARIES, json={"name": "shelf", "embedder": embedder})
    assert words in problem(response, 422, "embedder_not_configured")["detail"]


@pytest.mark.parametrize(
    ("embedder", "words"),
    [
        ({"provider": "cohere", "dimension": 100}, "must be one of"),
        ({"provider": "local", "truncate": "end"}, "takes no truncate"),
        ({"provider": "openai", "model": "bge-of-tests", "dimension": 8}, "cannot make 8"),
        ({"provider": "openai", "model": "of-another"}, "has no embedding model"),
    ],
)
async def test_a_choice_that_is_impossible(client: httpx2.AsyncClient, embedder: dict[str, Any], words: str) -> None:
    response = await client.post(LIBRARIES, json={"name": "shelf", "embedder": embedder})
    assert words in problem(response, 422, "embedder_not_configured")["detail"]


async def test_the_choice_of_an_embedder_asks_past_the_circuit(
    database_url: str,
    make_settings: Any,
    make_client: Any,
    openai_server: OpenAIServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(breaker, "FIRST_WAIT", 30.0)
    known = {"openai_api_key": openai_server.key, "openai_base_url": openai_server.base_url}
    client = await make_client(make_settings(database_url, **known, circuit_failures=2, worker_enabled=False))
    embedder = {"provider": "openai", "model": "bge-of-tests"}
    await make(client, **embedder)
    openai_server.outage = status(401)
    other = {"name": "other", "embedder": embedder}
    for _ in range(3):  # no failure counts
        problem(await client.post(LIBRARIES, json=other), 502, "embedder_failed")
    for code in ("embedder_failed", "embedder_failed", "embedder_unavailable"):
        problem(await client.post(DOCUMENTS, json={"text": "x"}), 503 if code.endswith("able") else 502, code)
    openai_server.outage = None
    ok(await client.post(LIBRARIES, json=other), 201)
    # its success is no probe of the circuit, which closes when its own time has come
    problem(await client.post(DOCUMENTS, json={"text": "x"}), 503, "embedder_unavailable")


@pytest.mark.parametrize(
    ("fault", "times", "code", "words", "retry_after"),
    [
        (status(429, "slow down", retry_after="30"), 1, "embedder_unavailable", "how often", "30"),
        (status(503), 3, "embedder_unavailable", "not available", "5"),
        (hang, 1, "embedder_timeout", "within 1 second", "5"),
        (status(500), 3, "embedder_failed", "status 500", None),
        (raw(b"<html>"), 1, "embedder_failed", "could not be read", None),
        (status(401), 1, "embedder_failed", "refused the key", None),
        (status(404), 1, "embedder_not_configured", "no embedding model", None),
    ],
)
async def test_failures_of_a_provider_are_told(
    client: httpx2.AsyncClient,
    cohere_server: CohereServer,
    fault: Any,
    times: int,
    code: str,
    words: str,
    retry_after: str | None,
) -> None:
    from pgshelf.errors import CODES

    await make(client, provider="cohere")
    for path, body in ((DOCUMENTS, {"key": "k", "text": "x"}), (SEARCH, {"query": "x", "mode": "vector"})):
        cohere_server.fail(*[fault] * times)
        response = await client.post(path, json=body)
        assert words in problem(response, CODES[code][0], code)["detail"]
        assert response.headers.get("retry-after") == retry_after
        assert cohere_server.key not in response.text
    assert ok(await client.get(DOCUMENTS))["items"] == []


async def test_a_text_that_the_provider_refuses_is_named(client: httpx2.AsyncClient) -> None:
    await make(client, provider="cohere", truncate="none")
    long = "word " * 3900
    chunks = [{"text": "short"}, {"text": long}, {"text": "also short"}]
    body = problem(await client.post(DOCUMENTS, json={"key": "k", "chunks": chunks}), 422, "text_not_embeddable")
    assert [error["path"] for error in body["errors"]] == ["chunks[1].text"]
