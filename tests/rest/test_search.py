"""Search over REST: by text and by vector, exact, deterministic, bounded."""

from __future__ import annotations

import base64
import math
from typing import Any

import httpx2
import msgspec
import numpy as np
import pytest

from tests.rest.asking import at, chunks, document, library, local, ok, raw

SEARCH = at("libraries", "shelf", "search")
PARTS = ("text", "metadata", "document", "embedding")


async def found(client: httpx2.AsyncClient, **request: Any) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = ok(await client.post(SEARCH, json=request))["hits"]
    return hits


async def plane(client: httpx2.AsyncClient, count: int = 9, **fields: Any) -> None:
    """Vectors at growing angles from the first axis, one document each: key 0 is nearest to [1, 0, 0]."""
    await library(client, **fields)
    for number in reversed(range(count)):
        angle = number * math.pi / 2 / count
        await document(client, str(number), [math.cos(angle), math.sin(angle), 0.0])


async def test_a_question_finds_the_passage_that_answers_it(client: httpx2.AsyncClient) -> None:
    await local(client)
    await document(client, "vacuum", title="Vacuum", text="VACUUM reclaims storage occupied by dead tuples.")
    await document(client, "join", title="Joins", text="A join combines the rows of two tables.")
    await document(client, "cake", title="Cake", text="Mix flour, sugar and butter, then bake for an hour.")
    answer = ok(await client.post(SEARCH, json={"query": "how do I reclaim disk storage"}))
    first = answer["hits"][0]
    assert first["key"] == "vacuum" and len(answer["hits"]) == 3
    assert first["text"].startswith("VACUUM") and first["metadata"] == {}
    assert first["document"] == {"title": "Vacuum", "source": None, "metadata": {}}
    assert answer["took_ms"] > 0


async def test_hits_are_nearest_first(client: httpx2.AsyncClient) -> None:
    await plane(client)
    hits = await found(client, vector=[2.0, 0, 0])
    assert [hit["key"] for hit in hits] == list("012345678")
    for number, hit in enumerate(hits):
        assert hit["distance"] == pytest.approx(1 - math.cos(number * math.pi / 18), abs=1e-6)
        assert hit["score"] == pytest.approx(1 - hit["distance"])


@pytest.mark.parametrize(
    ("metric", "distance", "score"),
    [
        ("cosine", lambda a, b: 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b), lambda d: 1 - d),
        ("l2", lambda a, b: np.linalg.norm(a - b), lambda d: 1 / (1 + d)),
        ("l1", lambda a, b: np.abs(a - b).sum(), lambda d: 1 / (1 + d)),
        ("inner_product", lambda a, b: -(a @ b), lambda d: -d),
    ],
)
async def test_every_metric_ranks_as_its_formula(
    client: httpx2.AsyncClient, metric: str, distance: Any, score: Any
) -> None:
    random = np.random.default_rng(7)
    vectors, wanted = random.normal(size=(40, 3)), random.normal(size=3)
    await library(client, metric=metric)
    await document(client, "k", *vectors.tolist())
    hits = await found(client, vector=wanted.tolist(), k=40)
    expected = sorted((distance(vector, wanted), ordinal) for ordinal, vector in enumerate(vectors))
    assert [hit["ordinal"] for hit in hits] == [ordinal for _, ordinal in expected]
    assert [hit["distance"] for hit in hits] == pytest.approx([d for d, _ in expected], abs=1e-5)
    assert [hit["score"] for hit in hits] == pytest.approx([score(d) for d, _ in expected], abs=1e-5)


async def test_k_and_offset_page_through_the_hits(client: httpx2.AsyncClient) -> None:
    await plane(client, 12)
    assert len(await found(client, vector=[1, 0, 0])) == 10
    every = await found(client, vector=[1, 0, 0], k=1000)
    assert len(every) == 12
    for size in (1, 5, 12):
        paged = [await found(client, vector=[1, 0, 0], k=size, offset=start) for start in range(0, 12, size)]
        assert [hit for page in paged for hit in page] == every
    assert await found(client, vector=[1, 0, 0], offset=12) == []
    assert await found(client, vector=[1, 0, 0], offset=10_000) == []


async def test_bounds_of_distance_and_score(client: httpx2.AsyncClient) -> None:
    await plane(client)
    every = await found(client, vector=[1, 0, 0])
    limit = every[3]["distance"]
    assert await found(client, vector=[1, 0, 0], max_distance=limit) == every[:4]
    assert await found(client, vector=[1, 0, 0], min_score=every[2]["score"]) == every[:3]
    assert await found(client, vector=[1, 0, 0], max_distance=limit, min_score=0.999) == every[:1]
    assert await found(client, vector=[1, 0, 0], max_distance=limit, k=2, offset=1) == every[1:3]
    assert await found(client, vector=[1, 0, 0], max_distance=-1) == []
    assert await found(client, vector=[1, 0, 0], min_score=-5, max_distance=None) == every


@pytest.mark.parametrize(
    "include", [[], ["text"], ["metadata"], ["document"], ["embedding"], list(PARTS), ["text"] * 9]
)
async def test_hits_hold_what_is_included(client: httpx2.AsyncClient, include: list[str]) -> None:
    await library(client)
    chunk = {"text": "x", "embedding": [1, 0, 0.5], "metadata": {"page": 3}}
    made = await document(client, "k", title="T", source="S", metadata={"a": 1}, chunks=[chunk])
    (stored,) = await chunks(client, "k")
    (hit,) = await found(client, vector=[1, 0, 0.5], include=include)
    assert {name for name in PARTS if name in hit} == set(include)
    full = {**chunk, "document": {"title": "T", "source": "S", "metadata": {"a": 1}}}
    assert {name: hit[name] for name in include} == {name: full[name] for name in include}
    known = {"chunk_id": stored["id"], "document_id": made["id"], "key": "k", "ordinal": 0}
    assert known.items() <= hit.items()


async def test_ties_are_in_the_order_of_the_chunk_ids(client: httpx2.AsyncClient) -> None:
    await library(client)
    await document(client, "a", *([1.0, 0.0, 0.0] for _ in range(20)))
    await document(client, "b", *([2.0, 0.0, 0.0] for _ in range(20)))
    hits = [hit["chunk_id"] for hit in await found(client, vector=[1, 0, 0], k=40)]
    assert hits == sorted(hits)
    assert [hit["chunk_id"] for hit in await found(client, vector=[1, 0, 0], k=7, offset=5)] == hits[5:12]
    assert hits == [hit["chunk_id"] for hit in await found(client, vector=[1, 0, 0], k=40)]


async def test_a_vector_in_every_form_is_the_same_vector(client: httpx2.AsyncClient) -> None:
    await plane(client)
    vector = [0.3, 0.7, 0.1]
    expected = await found(client, vector=vector)
    assert await found(client, vector=base64.b64encode(raw(*vector)).decode()) == expected
    for content_type in ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack"):
        for form in (vector, raw(*vector)):
            body = msgspec.msgpack.encode({"vector": form})
            response = await client.post(SEARCH, content=body, headers={"Content-Type": content_type})
            assert ok(response)["hits"] == expected


async def test_answers_in_msgpack(client: httpx2.AsyncClient) -> None:
    await plane(client)
    for accept in ("application/msgpack", "application/msgpack;q=0.9, application/json"):
        response = await client.post(
            SEARCH, json={"vector": [1, 0, 0], "include": ["embedding", "document"]}, headers={"Accept": accept}
        )
        assert response.headers["content-type"] == "application/msgpack"
        hits = msgspec.msgpack.decode(response.content)["hits"]
        assert hits == await found(client, vector=[1, 0, 0], include=["embedding", "document"])


async def test_documents_travel_in_msgpack_with_raw_vectors(client: httpx2.AsyncClient) -> None:
    await library(client)
    vector = [0.25, -1.5, 1e-7]
    body = {"key": "k", "chunks": [{"text": "x", "embedding": raw(*vector)}], "metadata": {"ü": [1, None, 2.5]}}
    headers = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
    response = await client.post(
        at("libraries", "shelf", "documents"), content=msgspec.msgpack.encode(body), headers=headers
    )
    assert response.status_code == 201
    made = msgspec.msgpack.decode(response.content)
    assert made["metadata"] == body["metadata"] and made["key"] == "k"
    (chunk,) = await chunks(client, "k", embedding=True)
    assert raw(*chunk["embedding"]) == raw(*vector)
    patched = await client.patch(
        at("libraries", "shelf", "chunks", chunk["id"]),
        content=msgspec.msgpack.encode({"embedding": raw(0, 1, 0)}),
        headers={"Content-Type": "application/msgpack"},
    )
    assert ok(patched)["id"] == chunk["id"]
    assert (await chunks(client, "k", embedding=True))[0]["embedding"] == [0, 1, 0]


async def test_only_the_library_that_was_asked_answers(client: httpx2.AsyncClient) -> None:
    await library(client)
    other = await library(client, "other")
    await document(client, "mine")
    await document(client, "theirs", into="other")
    assert [hit["key"] for hit in await found(client, vector=[1, 0, 0])] == ["mine"]
    response = await client.post(at("libraries", other["id"], "search"), json={"vector": [1, 0, 0]})
    assert [hit["key"] for hit in ok(response)["hits"]] == ["theirs"]


async def test_what_has_no_vector_yet_is_not_found(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, worker_enabled=False))
    await local(client)
    assert await found(client, query="anything") == []
    path = at("libraries", "shelf", "documents")
    ok(await client.post(path, params={"wait": "false"}, json={"key": "late", "text": "storage"}), 202)
    assert await found(client, query="storage", mode="vector") == []
    assert [hit["distance"] for hit in await found(client, query="storage")] == [None]  # its words are there
    await document(client, "late", text="storage")
    assert [hit["key"] for hit in await found(client, query="storage", mode="vector", exact=True)] == ["late"]


async def test_reads_see_writes(client: httpx2.AsyncClient) -> None:
    await library(client)
    for number in range(5):
        await document(client, "k", [1, number, 0])
        (hit,) = await found(client, vector=[1, number, 0])
        assert hit["distance"] == pytest.approx(0, abs=1e-6)
    ok(await client.delete(at("libraries", "shelf", "documents", "k")), 204)
    assert await found(client, vector=[1, 0, 0]) == []


async def test_zero_vectors_have_a_place_where_the_metric_has_one_for_them(client: httpx2.AsyncClient) -> None:
    await library(client, metric="l2")
    await document(client, "zero", [0, 0, 0])
    await document(client, "one", [1, 0, 0])
    assert [(hit["key"], hit["distance"]) for hit in await found(client, vector=[0, 0, 0])] == [("zero", 0), ("one", 1)]
