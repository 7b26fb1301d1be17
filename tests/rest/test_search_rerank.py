"""Reranking over REST: a provider that stands in for Cohere's, its order, and its failures."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from tests.cohere_server import CohereServer, hang, relevance, status
from tests.rest.asking import at, document, library, ok, problem, until

SEARCH = at("libraries", "shelf", "search")
TEXTS = ["cats sleep", "dogs bark at cats", "cats and dogs", "birds sing", "dogs"]


@pytest.fixture
async def client(database_url: str, make_settings: Any, make_client: Any, cohere_server: CohereServer) -> Any:
    settings = make_settings(
        database_url, cohere_api_key=cohere_server.key, cohere_base_url=cohere_server.url, cohere_timeout=1.0
    )
    client = await make_client(settings)
    await library(client, dimension=2)
    chunks = [{"text": text, "embedding": [1.0, 0.1 * place]} for place, text in enumerate(TEXTS)]
    await document(client, "k", chunks=chunks)
    return client


async def found(client: httpx2.AsyncClient, **request: Any) -> list[dict[str, Any]]:
    request = {"vector": [1, 0], "query": "dogs", "mode": "vector", "rerank": {"provider": "cohere"}, **request}
    hits: list[dict[str, Any]] = ok(await client.post(SEARCH, json=request))["hits"]
    return hits


async def test_hits_come_in_the_order_of_the_reranker(client: httpx2.AsyncClient) -> None:
    expected = sorted(TEXTS, key=lambda text: (-relevance("dogs", text), TEXTS.index(text)))
    hits = await found(client)
    assert [hit["text"] for hit in hits] == expected
    assert [hit["score"] for hit in hits] == pytest.approx([relevance("dogs", text) for text in expected])
    assert hits[0]["distance"] > 0


async def test_candidates_are_what_is_read(client: httpx2.AsyncClient, cohere_server: CohereServer) -> None:
    hits = await found(client, k=2, rerank={"provider": "cohere", "candidates": 3})
    assert {hit["text"] for hit in hits} == {"dogs bark at cats", "cats and dogs"}
    assert cohere_server.asked[-1].body["documents"] == TEXTS[:3]
    assert [hit["text"] for hit in await found(client, k=1, offset=1)] == [(await found(client))[1]["text"]]


async def test_parts_and_bounds_are_those_of_the_request(client: httpx2.AsyncClient) -> None:
    hits = await found(client, include=["metadata"], k=1)
    assert "text" not in hits[0] and hits[0]["metadata"] == {}
    least = relevance("dogs", "dogs")
    assert [hit["text"] for hit in await found(client, min_score=least)] == ["dogs"]
    several = {"libraries": ["shelf"], "vector": [1, 0], "query": "dogs", "mode": "vector", "k": 1}
    answer = ok(await client.post("/v1/search", json={**several, "rerank": {"provider": "cohere"}}))
    assert [(hit["library"], hit["text"]) for hit in answer["hits"]] == [("shelf", "dogs")]


@pytest.fixture
async def crowded(client: httpx2.AsyncClient) -> dict[str, list[str]]:
    """Twenty documents of six chunks each, from near to far; the more relevant the later they and their chunks come."""
    await library(client, "crowd", dimension=2)
    made = {}
    for place in range(20):
        others = [" ".join(f"no{number}" for number in range(120 - 6 * place - nth)) for nth in range(6)]
        texts = made[str(place)] = [f"dogs {words}".strip() for words in others]
        vectors = [[1.0, 0.01 * place + 0.001 * nth] for nth in range(6)]
        chunks = [{"text": text, "embedding": vector} for text, vector in zip(texts, vectors, strict=True)]
        await document(client, str(place), into="crowd", chunks=chunks)
    return made


@pytest.mark.parametrize(
    ("size", "candidates", "sent", "each"),
    [(1, None, 20, 1), (3, 30, 30, 3), (10, 50, 50, 5), (10, 10, 10, 1), (2, 25, 25, 2), (100, 100, 100, 6)],
)
async def test_grouped_the_documents_are_ranked_and_counted(
    client: httpx2.AsyncClient,
    cohere_server: CohereServer,
    crowded: dict[str, list[str]],
    size: int,
    candidates: int | None,
    sent: int,
    each: int,
) -> None:
    request = {"vector": [1, 0], "query": "dogs", "mode": "vector", "group_by": "document", "group_size": size}
    request["rerank"] = {"provider": "cohere", "candidates": candidates}
    path = at("libraries", "crowd", "search")
    hits = ok(await client.post(path, json={**request, "k": 7, "offset": 3}))["hits"]
    asked = cohere_server.asked[-1].body
    read = [text for texts in crowded.values() for text in texts[:each]][:sent]  # near first
    assert (asked["documents"], asked["top_n"]) == (read, sent)
    groups = [[text for text in reversed(texts) if text in read] for texts in reversed(crowded.values())]
    groups = [group for group in groups if group]
    assert [hit["text"] for hit in hits] == [text for group in groups[3:10] for text in group]
    scores = [relevance("dogs", hit["text"]) for hit in hits]
    assert [hit["score"] for hit in hits] == pytest.approx(scores)
    first = ok(await client.post(path, json={**request, "k": 10}))["hits"]
    bound = hits[0]["score"]
    bounded = ok(await client.post(path, json={**request, "k": 10, "min_score": bound}))["hits"]
    assert bounded == [hit for hit in first if hit["score"] >= bound]


async def test_failures_of_the_provider_are_told(client: httpx2.AsyncClient, cohere_server: CohereServer) -> None:
    request = {"vector": [1, 0], "query": "dogs", "mode": "vector", "rerank": {"provider": "cohere"}}
    cohere_server.fail(status(429, "slow down", retry_after="30"))
    response = await client.post(SEARCH, json=request)
    problem(response, 503, "reranker_unavailable")
    assert response.headers["retry-after"] == "30"
    cohere_server.fail(hang, hang, hang)
    problem(await client.post(SEARCH, json=request), 504, "reranker_timeout")
    too_many = {**request, "rerank": {"provider": "cohere", "candidates": 500}}
    problem(await client.post(SEARCH, json=too_many), 400, "validation_failed")


async def test_one_that_keeps_failing_is_left_alone_until_it_is_back(
    database_url: str, make_settings: Any, make_client: Any, cohere_server: CohereServer
) -> None:
    settings = make_settings(
        database_url, cohere_api_key=cohere_server.key, cohere_base_url=cohere_server.url, circuit_failures=2
    )
    client = await make_client(settings)
    await library(client, dimension=2)
    await document(client, "k", chunks=[{"text": text, "embedding": [1.0, 0.1]} for text in TEXTS])
    request = {"vector": [1, 0], "query": "dogs", "mode": "vector", "rerank": {"provider": "cohere"}}
    refused = {**request, "rerank": {"provider": "cohere", "model": "embed-v4.0"}}
    for _ in range(3):  # what is refused says nothing of the provider
        problem(await client.post(SEARCH, json=refused), 422, "reranker_not_configured")
    cohere_server.outage = status(401)
    for _ in range(2):
        problem(await client.post(SEARCH, json=request), 502, "reranker_failed")
    asked = len(cohere_server.asked)
    response = await client.post(SEARCH, json=request)
    assert "has been failing" in problem(response, 503, "reranker_unavailable")["detail"]
    assert int(response.headers["retry-after"]) >= 1 and len(cohere_server.asked) == asked
    ok(await client.post(SEARCH, json={**request, "rerank": None}))
    cohere_server.outage = None

    async def back() -> bool:
        return (await client.post(SEARCH, json=request)).status_code == 200

    await until(back)
    assert len(await found(client)) == len(TEXTS)


async def test_without_a_key_there_is_no_reranking(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url))
    await library(client, dimension=2)
    request = {"vector": [1, 0], "query": "dogs", "rerank": {"provider": "cohere"}}
    problem(await client.post(SEARCH, json=request), 422, "reranker_not_configured")
