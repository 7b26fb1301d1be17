"""Against a real server, through both clients: searches, facets, writes by filter, indexes."""

from __future__ import annotations

from typing import Any

import pytest

from pgshelf_client import (
    AsyncClient,
    BadRequest,
    BatchItem,
    Client,
    Conflict,
    FacetValue,
    NotFound,
    Search,
    SearchFailure,
    Unprocessable,
)
from tests.conftest import LiveServer
from tests.sdk.script import Caller

pytestmark = pytest.mark.watched

TEXTS = {
    "vacuum": ("Vacuum reclaims the space of dead rows.", {"year": 2020, "topic": "storage"}),
    "analyze": ("Analyze counts rows for the planner.", {"year": 2023, "topic": "planner"}),
    "locks": ("A transaction waits for the rows that another one changed.", {"year": 2026, "topic": "planner"}),
}


@pytest.fixture(scope="module")
def shared_environment() -> dict[str, str]:
    return {}  # the embedder by default


@pytest.fixture(params=["Client", "AsyncClient"])
async def shelf(request: pytest.FixtureRequest, shared_live_server: LiveServer) -> Any:
    """A client of either kind, and `handbook`, the only library, with three documents."""
    with Client(shared_live_server.url) as client:
        for library in client.libraries():
            client.delete_library(library.name)
        client.create_library("handbook")
        for key, (text, metadata) in TEXTS.items():
            client.put_document("handbook", key, text=text, metadata=metadata)
        if request.param == "Client":
            yield Caller(client)
            return
    async with AsyncClient(shared_live_server.url) as awaited:
        yield Caller(awaited)


def keys(result: Any) -> list[str]:
    return [hit.key for hit in result.hits]


async def test_a_document_has_one_id_wherever_it_is_told(shelf: Caller) -> None:
    [result] = await shelf.add_documents("handbook", [{"key": "locks", "text": "Locks are held."}])
    assert result.id == (await shelf.get_document("handbook", "locks")).id


async def test_a_document_that_changed_since_it_was_seen_is_not_replaced(shelf: Caller) -> None:
    version = (await shelf.get_document("handbook", "locks")).version
    with pytest.raises(Conflict):
        await shelf.add_document("handbook", key="locks", text="Other.", if_match=version + 1)
    assert (await shelf.add_document("handbook", key="locks", text="Other.", if_match=version)).version > version


async def test_a_chunk_is_changed_while_its_document_is_as_it_was_seen(shelf: Caller) -> None:
    version = (await shelf.get_document("handbook", "locks")).version
    [chunk] = await shelf.chunks("handbook", "locks")
    assert (await shelf.update_chunk("handbook", chunk.id, metadata={"n": 1}, if_match=version)).metadata == {"n": 1}
    for change, fields in ((shelf.update_chunk, {"metadata": {"n": 2}}), (shelf.delete_chunk, {})):
        with pytest.raises(Conflict):
            await change("handbook", chunk.id, if_match=version, **fields)
    assert [found.metadata for found in await shelf.chunks("handbook", "locks")] == [{"n": 1}]
    await shelf.delete_chunk("handbook", chunk.id, if_match=version + 1)


@pytest.mark.parametrize("key", ["batch", "delete", "query", "update"])
async def test_a_key_may_be_the_name_of_a_route(shelf: Caller, key: str) -> None:
    made = await shelf.put_document("handbook", key, text="Locks are held.")
    assert (await shelf.update_document("handbook", key, title="T")).id == made.id
    assert (await shelf.get_document("handbook", key)).title == "T"
    assert [chunk.text for chunk in await shelf.chunks("handbook", key)] == ["Locks are held."]
    await shelf.delete_document("handbook", key)
    with pytest.raises(NotFound):
        await shelf.get_document("handbook", key)


async def test_searches(shelf: Caller) -> None:
    found = await shelf.search(
        "handbook", "dead rows", mode="text", filter={"year": {"$lt": 2025}}, include=["highlight"],
        facets=["topic"], total=True, explain=True,
    )  # fmt: skip
    assert keys(found) == ["vacuum", "analyze"]
    assert "<mark>dead</mark>" in found.hits[0].highlight
    assert (found.hits[0].text, found.hits[0].distance) == (None, None)
    assert found.total == 2
    assert {(value.value, value.documents) for value in found.facets["topic"]} == {("storage", 1), ("planner", 1)}
    assert found.explain.strategy == "words"
    assert found.explain.statement.startswith("with")

    near = await shelf.search("handbook", like={"document": "vacuum"}, mmr={"lambda": 0.5}, explain=True, exact=True)
    assert sorted(keys(near)) == ["analyze", "locks"]
    assert (near.explain.strategy, near.explain.recall) == ("exact", 1.0)

    first = await shelf.search(
        "handbook", "rows", k=1, offset=1, fusion={"method": "weighted", "weights": [0, 1]}, group_by="document"
    )
    both = await shelf.search("handbook", "rows", k=2, fusion={"method": "weighted", "weights": [0, 1]})
    assert keys(first) == keys(both)[1:]


async def test_a_batch_and_several_libraries(shelf: Caller) -> None:
    good: Search = {"query": "dead rows", "k": 1, "include": ["text"], "filter": {"topic": "storage"}}
    batch = await shelf.search_batch("handbook", [good, {"vector": [1.0, 2.0]}])
    assert keys(batch.results[0].answer) == ["vacuum"]
    with pytest.raises(Unprocessable) as raised:
        await shelf.search("handbook", vector=[1.0, 2.0])
    failure = SearchFailure(status=422, code="wrong_dimension", detail=raised.value.detail)
    assert batch.results[1] == BatchItem(error=failure)

    await shelf.create_library("other")
    await shelf.put_document("other", "bloat", text="Dead rows make a table grow.")
    found = await shelf.search_libraries(["handbook", "other"], "dead rows", mode="text", k=2)
    assert {(hit.library, hit.key) for hit in found.hits} == {("handbook", "vacuum"), ("other", "bloat")}


async def test_facets(shelf: Caller) -> None:
    found = await shelf.facets("handbook", ["topic", "year"], filter={"year": {"$gt": 2020}}, limit=1)
    assert found.facets == {
        "topic": [FacetValue(value="planner", documents=2)], "year": [FacetValue(value=2023, documents=1)]
    }  # fmt: skip
    assert found.documents == 2


async def test_documents_by_filter(shelf: Caller) -> None:
    await shelf.update_library("handbook", attributes={"year": "number"})
    newest: list[dict[str, str]] = [{"field": "year", "order": "desc"}]
    found = await shelf.query_documents("handbook", sort=newest, page_size=1)
    assert [document.key for document in found] == ["locks", "analyze", "vacuum"]
    recent = {"year": {"$gt": 2020}}
    assert [document.key for document in await shelf.query_documents("handbook", filter=recent)] == ["analyze", "locks"]
    assert await shelf.count_documents("handbook", filter=recent) == 2

    with pytest.raises(Conflict, match="too_many_affected"):
        await shelf.update_documents("handbook", recent, {"seen": True}, max_affected=1)
    assert await shelf.update_documents("handbook", recent, {"seen": True}, dry_run=True) == 2
    assert await shelf.count_documents("handbook", filter={"seen": True}) == 0
    assert await shelf.update_documents("handbook", recent, {"seen": True, "topic": None}, max_affected=2) == 2
    assert (await shelf.get_document("handbook", "locks")).metadata == {"year": 2026, "seen": True}

    assert await shelf.delete_documents("handbook", {"seen": True}, dry_run=True) == 2
    assert await shelf.delete_documents("handbook", {"seen": True}) == 2
    assert await shelf.count_documents("handbook") == 1
    with pytest.raises(BadRequest, match="A filter is required"):
        await shelf.delete_documents("handbook", {})


async def test_an_index(shelf: Caller) -> None:
    asked = await shelf.set_index("handbook", "hnsw", storage="vector", m=8, ef_construction=40)
    assert (asked.wanted["type"], asked.wanted["m"]) == ("hnsw", 8)
    index = await shelf.wait_for_index("handbook", timeout=60)
    assert (index.state, index.actual["type"], index.actual["storage"]) == ("ready", "hnsw", "vector")
    assert index == await shelf.get_index("handbook")
    assert len((await shelf.search("handbook", "dead rows")).hits) == 3
    with pytest.raises(Unprocessable, match="index_impossible"):
        await shelf.set_index("handbook", "kdtree")


async def test_another_embedder(shelf: Caller) -> None:
    before = await shelf.get_embedder("handbook")
    assert (before.embedder.dimension, before.wanted, before.state, before.progress) == (256, None, "ready", 1.0)
    nearest = [hit.text for hit in (await shelf.search("handbook", "dead rows", mode="vector")).hits]
    asked = await shelf.set_embedder("handbook", "local", dimension=64)
    assert asked.wanted is not None and asked.wanted.dimension == 64 and asked.embedder == before.embedder
    found = await shelf.wait_for_embedder("handbook", timeout=60)
    assert (found.state, found.embedder, found.wanted) == ("ready", asked.wanted, None)
    assert (await shelf.get_library("handbook")).dimension == 64
    hits = (await shelf.search("handbook", "dead rows", mode="vector", include=["text", "embedding"])).hits
    assert sorted(hit.text for hit in hits) == sorted(nearest)
    assert {len(hit.embedding) for hit in hits} == {64}
    assert await shelf.cancel_embedder("handbook") == found
    with pytest.raises(Unprocessable, match="no_embedder"):
        await shelf.set_embedder("handbook", "none", dimension=64)
