"""What a search can be asked for beyond the nearest vectors: words, fusion, likeness, diversity, groups, counts."""

from __future__ import annotations

import math
from typing import Any

import httpx2
import msgspec
import numpy as np
import pytest

from pgshelf.searching import EMBEDDER
from tests.rest.asking import at, chunks, document, library, local, ok, problem

SEARCH = at("libraries", "shelf", "search")


async def found(client: httpx2.AsyncClient, **request: Any) -> list[dict[str, Any]]:
    hits: list[dict[str, Any]] = ok(await client.post(SEARCH, json=request))["hits"]
    return hits


def keys(hits: list[dict[str, Any]]) -> list[str]:
    return [hit["key"] for hit in hits]


async def texts(client: httpx2.AsyncClient, **documents: str) -> None:
    """A library without vectors of its own making: every text gets a random one."""
    random = np.random.default_rng(3)
    await library(client, dimension=8)
    for key, text in documents.items():
        chunk = {"text": text, "embedding": random.normal(size=8).tolist()}
        await document(client, key, chunks=[chunk], metadata={"size": len(text), "first": text.split()[0]})


WORDS = {
    "vacuum": "Vacuum reclaims the storage of dead rows.",
    "full": "A vacuum full rewrites the whole table and locks it while it rewrites.",
    "index": "An index makes a search fast and an insert slow.",
    "rows": "Rows live in pages; dead rows stay there until they are vacuumed.",
}


async def test_words_find_what_holds_them(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    assert set(keys(await found(client, query="vacuum index", mode="text"))) == set(WORDS)
    assert keys(await found(client, query="rewrites tables", mode="text")) == ["full"]
    assert keys(await found(client, query='"dead rows" -pages', mode="text")) == ["vacuum"]
    assert set(keys(await found(client, query="vacu*", mode="text"))) == {"vacuum", "full", "rows"}
    assert await found(client, query="nothing of this", mode="text") == []
    for hit in await found(client, query="dead rows", mode="text"):
        assert hit["distance"] is None and hit["score"] > 0


async def test_a_query_without_an_embedder_is_a_search_by_words(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    assert await found(client, query="dead rows") == await found(client, query="dead rows", mode="text")
    problem(await client.post(SEARCH, json={"query": "rows", "mode": "vector"}), 422, "no_embedder")
    problem(await client.post(SEARCH, json={"query": "rows", "mode": "hybrid"}), 422, "no_embedder")


async def test_highlights_mark_the_words(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    (hit,) = await found(client, query="locks", mode="text", include=["highlight"])
    assert "<mark>locks</mark>" in hit["highlight"] and "text" not in hit
    (hit,) = await found(client, vector=[1] * 8, k=1, include=["highlight"])
    assert hit["highlight"] is None


async def test_hybrid_is_the_fusion_of_both_sides(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    vector, query = [1.0, 0, 0, 0.5, 0, 0, 0, 1], "dead rows rewrites"
    near = keys(await found(client, vector=vector))
    worded = keys(await found(client, query=query, mode="text"))
    hits = await found(client, query=query, vector=vector, mode="hybrid")
    assert hits == await found(client, query=query, vector=vector)

    def score(key: str, k: int, *weights: float) -> float:
        sides = zip(weights, (near, worded), strict=True)
        return sum(weight / (k + ranked.index(key) + 1) for weight, ranked in sides if key in ranked)

    assert {hit["key"]: pytest.approx(hit["score"]) for hit in hits} == {key: score(key, 60, 1, 1) for key in near}
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    fusion = {"method": "rrf", "k": 7, "weights": [0.5, 3]}
    hits = await found(client, query=query, vector=vector, fusion=fusion)
    assert {hit["key"]: pytest.approx(hit["score"]) for hit in hits} == {key: score(key, 7, 0.5, 3) for key in near}
    words_only = await found(client, query=query, vector=vector, fusion={"method": "rrf", "weights": [0, 1]})
    assert keys(words_only)[: len(worded)] == worded
    one_each = await found(client, query=query, vector=vector, k=1, fusion={"candidates": 1})
    assert one_each[0]["score"] == pytest.approx(max((near[0] == worded[0]) / 61, 0) + 1 / 61)
    problem(
        await client.post(SEARCH, json={"query": query, "vector": vector, "fusion": {"candidates": 0}}),
        400,
        "validation_failed",
    )


async def test_weighted_fusion_adds_scores_of_zero_to_one(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    vector, query = [1.0, 0, 0, 0.5, 0, 0, 0, 1], "dead rows"
    near = {hit["key"]: hit["score"] for hit in await found(client, vector=vector)}
    worded = {hit["key"]: hit["score"] for hit in await found(client, query=query, mode="text")}
    low, high = min(near.values()), max(near.values())
    expected = {
        key: 2 * (value - low) / (high - low) + 0.5 * worded.get(key, 0) / max(worded.values())
        for key, value in near.items()
    }
    fusion = {"method": "weighted", "weights": [2, 0.5]}
    hits = await found(client, query=query, vector=vector, fusion=fusion)
    assert {hit["key"]: pytest.approx(hit["score"]) for hit in hits} == expected


async def test_a_question_is_searched_both_ways(client: httpx2.AsyncClient) -> None:
    await local(client)
    await document(client, "vacuum", text="VACUUM reclaims storage occupied by dead tuples.")
    await document(client, "cake", text="Mix flour, sugar and butter, then bake for an hour.")
    hits = await found(client, query="how do I reclaim disk storage", include=["highlight"])
    assert keys(hits) == ["vacuum", "cake"]
    assert "<mark>reclaims</mark>" in hits[0]["highlight"] and hits[0]["distance"] > 0
    assert hits[1]["highlight"] is None


async def test_an_embedder_is_asked_for_once(
    database_url: str, make_settings: Any, make_client: Any, statements: list[str]
) -> None:
    """A process remembers it for questions; a library that was made anew under the name has its own."""
    client = await make_client(make_settings(database_url, worker_enabled=False))

    async def asked() -> list[bool]:
        statements.clear()
        fresh = {"Cache-Control": "no-cache"}
        assert keys(ok(await client.post(SEARCH, json={"query": "dead tuples"}, headers=fresh))["hits"]) == ["vacuum"]
        return [statement == EMBEDDER for statement in statements]

    await local(client)
    await document(client, "vacuum", text="VACUUM reclaims storage occupied by dead tuples.")
    assert [await asked() for _ in range(2)] == [[True, False], [False]]
    ok(await client.delete(at("libraries", "shelf")), 204)
    await library(client, dimension=8)
    await document(client, "vacuum", chunks=[{"text": "dead tuples", "embedding": [1.0] * 8}])
    # refused, asked for, searched by words
    assert [await asked() for _ in range(2)] == [[False, True, False], [True, False]]


async def test_filters_hold_in_every_mode(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    condition = {"size": {"$gt": 50}, "$not": {"$key": "rows"}}
    expected = {key for key, text in WORDS.items() if len(text) > 50 and key != "rows"}
    assert set(keys(await found(client, vector=[1] * 8, filter=condition))) == expected
    assert set(keys(await found(client, query="vacuum an rows", vector=[1] * 8, filter=condition))) == expected
    hits = await found(client, query="vacuum index rows", mode="text", filter=condition)
    assert set(keys(hits)) == expected
    assert await found(client, query="vacuum", mode="text", filter={"size": 1}) == []
    response = await client.post(SEARCH, json={"vector": [1] * 8, "filter": {"size": {"$above": 5}}})
    assert "$above" in problem(response, 400, "validation_failed")["detail"]


async def circle(client: httpx2.AsyncClient, documents: int = 6, each: int = 3) -> None:
    """Chunks at growing angles; neighbours in angle belong to one document."""
    await library(client, dimension=2)
    for number in range(documents):
        angles = [math.radians(10 * number + item) for item in range(each)]
        await document(client, f"d{number}", *([math.cos(angle), math.sin(angle)] for angle in angles))


async def test_like_a_chunk_or_a_document(client: httpx2.AsyncClient) -> None:
    await circle(client)
    middle = (await chunks(client, "d2"))[1]
    hits = await found(client, like={"chunk": middle["id"]}, k=4)
    places = [(hit["key"], hit["ordinal"]) for hit in hits]  # rounding decides between those on either side
    assert [set(places[:2]), set(places[2:])] == [{("d2", 0), ("d2", 2)}, {("d1", 2), ("d3", 0)}]
    hits = await found(client, like={"document": "d2"}, k=2)
    assert {hit["key"] for hit in hits} == {"d1", "d3"}
    hits = await found(client, like={"document": "d2"}, filter={"$key": {"$in": ["d2", "d5"]}})
    assert set(keys(hits)) == {"d5"}
    problem(await client.post(SEARCH, json={"like": {"document": "none"}}), 404, "document_not_found")
    problem(await client.post(SEARCH, json={"like": {"chunk": middle["document_id"]}}), 404, "chunk_not_found")


def nested(depth: int) -> dict[str, Any]:
    """A filter that all documents match, of this depth."""
    condition: dict[str, Any] = {"n": {"$gte": 0}}
    for _ in range(depth):
        condition = {"$and": [condition]}
    return condition


def many(count: int) -> dict[str, Any]:
    """A filter that all documents match, of so many conditions."""
    return {"$or": [{"n": {"$gte": number}} for number in range(count)]}


async def test_like_leaves_the_filter_as_it_is(client: httpx2.AsyncClient) -> None:
    await library(client, dimension=2)
    for n in range(4):
        await document(client, f"d{n}", [1.0, n / 10], [1.0, n / 10 + 0.05], metadata={"n": n})
    of_document, of_chunk = {"document": "d1"}, {"chunk": (await chunks(client, "d1"))[1]["id"]}
    identity = (await chunks(client, "d1"))[0]["document_id"]
    conditions: list[dict[str, Any]] = [{}, {"n": {"$lt": 3}}, {"$not": {"n": 2}}, {"$and": [{"n": {"$lt": 3}}]}]
    conditions += [{"$id": {"$ne": identity}}, {"$id": identity}, {"$or": [{"n": 1}, {"chunk.$ordinal": 1}]}, nested(8)]
    for condition in conditions:
        matching = await found(client, vector=[1, 0], filter=condition)
        counted = {"filter": condition, "facets": ["n"], "total": True}
        alone = ok(await client.post(SEARCH, json={**counted, "vector": [1, 0]}))
        for like, left in (
            (of_document, [hit["chunk_id"] for hit in matching if hit["key"] != "d1"]),
            (of_chunk, [hit["chunk_id"] for hit in matching if hit["chunk_id"] != of_chunk["chunk"]]),
        ):
            answer = ok(await client.post(SEARCH, json={**counted, "like": like}))
            assert sorted(hit["chunk_id"] for hit in answer["hits"]) == sorted(left), (condition, like)
            assert answer["facets"] == alone["facets"] and answer["total"] == len(left)
    for like, room in ((of_document, 199), (of_chunk, 198)):
        assert await found(client, like=like, filter=many(room))
    refused = [nested(9), {"n": {"$gt": []}}, {"$and": []}, {"$and": {"n": 1}}, {"$and": [{"n": {"$above": 1}}]}]
    for condition in refused:
        told = problem(
            await client.post(SEARCH, json={"vector": [1, 0], "filter": condition}), 400, "validation_failed"
        )
        for like in (of_document, of_chunk):
            response = await client.post(SEARCH, json={"like": like, "filter": condition})
            assert problem(response, 400, "validation_failed")["detail"] == told["detail"]


async def test_the_limits_of_filters_are_for_what_is_sent(
    database_url: str, make_settings: Any, make_client: Any
) -> None:
    client = await make_client(make_settings(database_url, max_filter_depth=1, max_filter_bytes=9))
    await library(client, dimension=2)
    await document(client, "a", [1.0, 0.0], metadata={"n": 1})
    await document(client, "b", [1.0, 0.0], metadata={"n": 1})
    assert keys(await found(client, like={"document": "a"}, filter={"n": 1})) == ["b"]
    problem(
        await client.post(SEARCH, json={"like": {"document": "a"}, "filter": {"n": 1111}}), 400, "validation_failed"
    )


@pytest.mark.parametrize(("rest", "code"), [(0.0, "zero_vector"), (1e-20, "invalid_vector")])
async def test_like_a_document_whose_vectors_cancel_out(client: httpx2.AsyncClient, rest: float, code: str) -> None:
    await library(client, dimension=2)
    await document(client, "a", [1.0, 0.0], [-1.0, rest])
    request = {"like": {"document": "a"}}
    told = problem(await client.post(SEARCH, json=request), 422, code)["detail"]
    assert "no usable mean vector" in told and "one of its chunks" in told
    words = {**request, "query": "chunk", "mode": "text"}
    assert await found(client, **words) == []
    assert [hit["ordinal"] for hit in await found(client, like={"chunk": (await chunks(client, "a"))[0]["id"]})] == [1]


async def test_what_has_no_vector_is_like_nothing(database_url: str, make_settings: Any, make_client: Any) -> None:
    client = await make_client(make_settings(database_url, worker_enabled=False))
    await local(client)
    await client.post(at("libraries", "shelf", "documents"), params={"wait": "false"}, json={"key": "a", "text": "a"})
    problem(await client.post(SEARCH, json={"like": {"document": "a"}}), 422, "no_vector")


async def test_groups_hold_the_best_of_each_document(client: httpx2.AsyncClient) -> None:
    await circle(client)
    hits = await found(client, vector=[1, 0], group_by="document", k=3)
    assert [(hit["key"], hit["ordinal"]) for hit in hits] == [("d0", 0), ("d1", 0), ("d2", 0)]
    hits = await found(client, vector=[1, 0], group_by="document", group_size=2, k=2, offset=1)
    assert [(hit["key"], hit["ordinal"]) for hit in hits] == [("d1", 0), ("d1", 1), ("d2", 0), ("d2", 1)]
    assert len(await found(client, vector=[1, 0], group_by="document", k=100)) == 6
    hits = await found(client, query="chunk", vector=[1, 0], group_by="document", k=6)
    assert len({hit["key"] for hit in hits}) == len(hits) == 6
    hits = await found(client, query="chunk", mode="text", group_by="document", k=2)
    assert len({hit["key"] for hit in hits}) == len(hits) == 2


async def test_a_field_may_have_any_name(client: httpx2.AsyncClient) -> None:
    await library(client, dimension=2)
    name = "\nselect h from hits h; ' \" $1 %s %L \\ --"
    await document(client, "odd", [1.0, 0.0], metadata={name: "it's"})
    await document(client, "even", [1.0, 0.1], metadata={name: "no"})
    ways: list[dict[str, Any]] = [{}, {"group_by": "document"}, {"mmr": {}}, {"facets": [name]}, {"query": "chunk"}]
    for more in ways:
        hits = await found(client, vector=[1, 0], filter={name: "it's"}, **more)
        assert keys(hits) == ["odd"], more


async def test_many_chunks_of_one_document_hide_no_other(client: httpx2.AsyncClient) -> None:
    await library(client, dimension=2)
    await document(client, "crowd", *([1.0, 0.001 * item] for item in range(200)))
    for number in range(3):
        await document(client, f"d{number}", [1.0, 1.0 + number])
    assert keys(await found(client, vector=[1, 0], group_by="document", k=4)) == ["crowd", "d0", "d1", "d2"]


async def test_mmr_picks_what_is_unlike(client: httpx2.AsyncClient) -> None:
    await library(client, dimension=2)
    for key, degrees in {"a": 1, "a2": 2, "a3": 3, "b": -79, "c": 80}.items():
        await document(client, key, [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])
    plain = keys(await found(client, vector=[1, 0]))
    assert plain == ["a", "a2", "a3", "b", "c"]
    assert keys(await found(client, vector=[1, 0], mmr={"lambda": 1})) == plain
    assert keys(await found(client, vector=[1, 0], k=3, mmr={"lambda": 0.3, "candidates": 5})) == ["a", "b", "c"]
    assert keys(await found(client, vector=[1, 0], k=3, mmr={"lambda": 0.3, "candidates": 3})) == ["a", "a2", "a3"]
    first = await found(client, vector=[1, 0], k=2, mmr={"lambda": 0.3, "candidates": 5})
    rest = await found(client, vector=[1, 0], k=3, offset=2, mmr={"lambda": 0.3, "candidates": 5})
    every = await found(client, vector=[1, 0], k=5, mmr={"lambda": 0.3, "candidates": 5})
    assert first + rest == every


async def test_totals_and_facets_come_with_the_hits(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    answer = ok(await client.post(SEARCH, json={"vector": [1] * 8, "k": 1, "total": True, "facets": ["first", "no"]}))
    assert answer["total"] == 4 and len(answer["hits"]) == 1
    firsts = [{"value": text.split()[0], "documents": 1} for text in WORDS.values()]
    assert sorted(answer["facets"]["first"], key=str) == sorted(firsts, key=str)
    assert answer["facets"]["no"] == []
    condition = {"first": {"$in": ["Rows", "A"]}}
    answer = ok(await client.post(SEARCH, json={"vector": [1] * 8, "filter": condition, "total": True, "k": 2}))
    assert answer["total"] == 2 and "facets" not in answer
    answer = ok(await client.post(SEARCH, json={"query": "dead", "mode": "text", "total": True, "facets": ["first"]}))
    assert answer["total"] == 2
    nothing = {"vector": [1] * 8, "filter": {"first": "Nobody"}, "total": True, "facets": ["first"]}
    answer = ok(await client.post(SEARCH, json=nothing))
    assert (answer["hits"], answer["total"], answer["facets"]) == ([], 0, {"first": []})


async def test_explain_says_how(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    told = ok(await client.post(SEARCH, json={"vector": [1] * 8, "explain": True, "filter": {"first": "Rows"}}))
    assert told["explain"]["strategy"] == "exact" and told["explain"]["recall"] == 1
    assert "pgshelf.documents" in told["explain"]["statement"]
    assert told["explain"]["plan"]["Plan"]["Actual Rows"] == 1
    told = ok(await client.post(SEARCH, json={"query": "rows", "mode": "text", "explain": True}))
    assert (told["explain"]["strategy"], told["explain"]["recall"]) == ("words", None)
    told = ok(await client.post(SEARCH, json={"query": "rows", "vector": [1] * 8, "explain": True}))
    assert told["explain"]["strategy"] == "exact"


async def test_a_batch_answers_each_search(client: httpx2.AsyncClient) -> None:
    await texts(client, **WORDS)
    searches: list[dict[str, Any]] = [
        {"vector": [1] * 8, "k": 2},
        {"vector": [1, 2]},
        {"query": "rows", "mode": "text"},
        {"k": 3},
    ]
    answer = ok(await client.post(f"{SEARCH}/batch", json={"searches": searches}))
    first, second, third, fourth = answer["results"]
    assert first["answer"]["hits"] == await found(client, **searches[0])
    assert third["answer"]["hits"] == await found(client, **searches[2])
    assert (second["error"]["status"], second["error"]["code"]) == (422, "wrong_dimension")
    assert (fourth["error"]["status"], fourth["error"]["code"]) == (400, "validation_failed")
    problem(await client.post(f"{SEARCH}/batch", json={"searches": []}), 400, "validation_failed")
    many = {"searches": [{"vector": [1] * 8}] * 101}
    problem(await client.post(f"{SEARCH}/batch", json=many), 400, "validation_failed")
    nowhere = at("libraries", "nobody", "search", "batch")
    problem(await client.post(nowhere, json={"searches": [{"vector": [1]}]}), 404, "library_not_found")


async def test_several_libraries_compete(client: httpx2.AsyncClient) -> None:
    for name, angles in {"one": [5, 30], "two": [10, 20], "three": [1]}.items():
        await library(client, name, dimension=2)
        for angle in angles:
            vector = [math.cos(math.radians(angle)), math.sin(math.radians(angle))]
            chunk = {"text": f"at {angle} degrees", "embedding": vector}
            await document(client, str(angle), into=name, chunks=[chunk])
    request: dict[str, Any] = {"libraries": ["one", "two", "one"], "vector": [1, 0]}
    hits = ok(await client.post("/v1/search", json=request))["hits"]
    assert [(hit["library"], hit["key"]) for hit in hits] == [("one", "5"), ("two", "10"), ("two", "20"), ("one", "30")]
    paged = [ok(await client.post("/v1/search", json={**request, "k": 1, "offset": n}))["hits"] for n in range(5)]
    assert [hit for page in paged for hit in page] == hits
    hits = ok(await client.post("/v1/search", json={"libraries": ["one", "three"], "query": "1"}))["hits"]
    assert [(hit["library"], hit["key"]) for hit in hits] == [("three", "1")]
    await library(client, "far", dimension=2, metric="l2")
    request["libraries"].append("far")
    problem(await client.post("/v1/search", json=request), 422, "libraries_differ")
    request["libraries"][-1] = "nobody"
    problem(await client.post("/v1/search", json=request), 404, "library_not_found")
    problem(await client.post("/v1/search", json={"libraries": ["one"]}), 400, "validation_failed")
    await local(client, "own")
    await document(client, "x", into="own", text="at one degree")
    mixed = {"libraries": ["one", "own"], "query": "degrees"}
    problem(await client.post("/v1/search", json=mixed), 422, "libraries_differ")
    hits = ok(await client.post("/v1/search", json={**mixed, "mode": "text"}))["hits"]
    assert {hit["library"] for hit in hits} == {"one", "own"}


async def test_several_libraries_are_looked_at_so_far_and_no_farther(client: httpx2.AsyncClient) -> None:
    await library(client, dimension=2)
    await document(client, "a", [1.0, 0.0])
    request: dict[str, Any] = {"vector": [1, 0], "k": 10, "offset": 9990}
    assert ok(await client.post("/v1/search", json={**request, "libraries": ["shelf"]}))["hits"] == []
    beyond = {**request, "libraries": ["shelf"], "offset": 9995}
    told = problem(await client.post("/v1/search", json=beyond), 400, "validation_failed")
    assert told["errors"][0]["path"] == "offset" and "k + offset is 10005, at most 10000" in told["detail"]
    assert await found(client, **{**request, "offset": 9995}) == []


NO_SEARCH = [
    ({}, "query"),
    ({"mode": "text", "vector": [1, 0]}, "query"),
    ({"mode": "hybrid", "vector": [1, 0]}, "query"),
    ({"vector": [1, 0], "like": {"document": "d0"}}, "like"),
    ({"like": {}}, "like"),
    ({"like": {"document": "d0", "chunk": "6f1c9c1e-2f0d-4c5b-9a39-0d3f5a1b7c21"}}, "like"),
    ({"vector": [1, 0], "mmr": {}, "group_by": "document"}, "mmr"),
    ({"query": "x", "fusion": {"weights": [0, 0]}}, "fusion.weights"),
    ({"query": "x", "fusion": {"weights": [1]}}, "fusion.weights"),
    ({"vector": [1, 0], "mmr": {"lambda": 1.5}}, "mmr.lambda"),
    ({"vector": [1, 0], "group_by": "chunk"}, "group_by"),
    ({"vector": [1, 0], "group_size": 0}, "group_size"),
    ({"vector": [1, 0], "ef_search": 5000}, "ef_search"),
    ({"vector": [1, 0], "rerank": {"provider": "cohere"}}, "query"),
    ({"vector": [1, 0], "facets": ["x"] * 21}, "facets"),
]


async def test_requests_that_make_no_search(client: httpx2.AsyncClient, subtests: pytest.Subtests) -> None:
    await circle(client, 1, 1)
    for request_, path in NO_SEARCH:
        with subtests.test(request_=request_, path=path):
            body = problem(await client.post(SEARCH, json=request_), 400, "validation_failed")
            assert body["errors"][0]["path"] == path, body


async def test_a_filter_that_is_not_json_is_refused(client: httpx2.AsyncClient) -> None:
    await circle(client, 1, 1)
    for value in (b"bytes", math.nan):
        body = msgspec.msgpack.encode({"vector": [1, 0], "filter": {"a": value}})
        response = await client.post(SEARCH, content=body, headers={"Content-Type": "application/msgpack"})
        assert problem(response, 400, "validation_failed")["errors"][0]["path"] == "filter"
