"""The vector store for LlamaIndex, against a real server: through an index, and by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core import Document, MockEmbedding, VectorStoreIndex
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from pgshelf_client import Client
from pgshelf_client.llama_index import PgshelfVectorStore

VECTORS = {"vacuum": [1.0, 0.0, 0.0], "analyze": [0.8, 0.6, 0.0], "locks": [0.0, 0.0, 1.0]}
TEXTS = {"vacuum": "Vacuum reclaims dead rows.", "analyze": "Analyze counts rows.", "locks": "A 100% lock_wait."}
METADATA: dict[str, dict[str, Any]] = {
    "vacuum": {"year": 2020, "tags": ["disk", "daily"], "author": "Knuth"},
    "analyze": {"year": 2023, "tags": ["planner"], "author": ""},
    "locks": {"year": 2026, "tags": []},
}


@pytest.fixture
def client(shared_live_server: Any) -> Iterator[Client]:
    with Client(shared_live_server.url) as client:
        yield client
        for library in list(client.libraries()):
            client.delete_library(library.name)


@pytest.fixture
def store(client: Client) -> PgshelfVectorStore:
    """A store of three nodes, two of them of the document `book`."""
    client.create_library("handbook", dimension=3)
    store = PgshelfVectorStore(client, "handbook")
    assert store.add([node(id) for id in VECTORS]) == list(VECTORS)
    return store


def node(id: str) -> TextNode:
    source = RelatedNodeInfo(node_id="wiki" if id == "locks" else "book")
    relationships = {NodeRelationship.SOURCE: source}
    return TextNode(id_=id, text=TEXTS[id], embedding=VECTORS[id], metadata=METADATA[id], relationships=relationships)


def ids(store: PgshelfVectorStore, **query: Any) -> list[str] | None:
    return store.query(VectorStoreQuery(**{"query_embedding": [1, 0, 0], "similarity_top_k": 9, **query})).ids


def test_a_node_comes_back_as_it_was(store: PgshelfVectorStore) -> None:
    found = store.query(VectorStoreQuery(query_embedding=[1, 0, 0], similarity_top_k=2))
    assert found.ids == ["vacuum", "analyze"]
    assert found.similarities == pytest.approx([1, 0.8])
    [first, _] = found.nodes or []
    assert isinstance(first, TextNode)
    assert (first.node_id, first.text, first.metadata, first.ref_doc_id) == (
        "vacuum", TEXTS["vacuum"], METADATA["vacuum"], "book"
    )  # fmt: skip
    assert store.client.get_document("handbook", "vacuum").metadata["year"] == 2020


def test_modes(store: PgshelfVectorStore) -> None:
    assert ids(store, mode=VectorStoreQueryMode.TEXT_SEARCH, query_str="counts") == ["analyze"]
    assert ids(store, mode=VectorStoreQueryMode.SPARSE, query_str="counts") == ["analyze"]
    hybrid = {"mode": VectorStoreQueryMode.HYBRID, "query_str": "counts", "hybrid_top_k": 1}
    assert ids(store, **hybrid, alpha=0.0) == ["analyze"]
    assert ids(store, **hybrid, alpha=1.0) == ["vacuum"]
    assert len(ids(store, mode=VectorStoreQueryMode.HYBRID, query_str="counts") or []) == 3
    # of two that are alike the second waits
    assert ids(store, mode=VectorStoreQueryMode.MMR, mmr_threshold=0.1) == ["vacuum", "locks", "analyze"]
    assert ids(store, mode=VectorStoreQueryMode.MMR) is not None
    with pytest.raises(ValueError, match="does not query by mode 'svm'"):
        ids(store, mode=VectorStoreQueryMode.SVM)


@pytest.mark.parametrize(
    ("key", "operator", "value", "found"),
    [
        ("year", FilterOperator.EQ, 2020, {"vacuum"}),
        ("year", FilterOperator.NE, 2020, {"analyze", "locks"}),
        ("year", FilterOperator.GT, 2023, {"locks"}),
        ("year", FilterOperator.GTE, 2023, {"analyze", "locks"}),
        ("year", FilterOperator.LT, 2023, {"vacuum"}),
        ("year", FilterOperator.LTE, 2023, {"vacuum", "analyze"}),
        ("year", FilterOperator.IN, [2020, 2026], {"vacuum", "locks"}),
        ("year", FilterOperator.NIN, [2020, 2026], {"analyze"}),
        ("tags", FilterOperator.CONTAINS, "disk", {"vacuum"}),
        ("tags", FilterOperator.ANY, ["disk", "planner"], {"vacuum", "analyze"}),
        ("tags", FilterOperator.ALL, ["disk", "daily"], {"vacuum"}),
        ("author", FilterOperator.TEXT_MATCH, "nut", {"vacuum"}),
        ("author", FilterOperator.TEXT_MATCH, "NUT", set()),
        ("author", FilterOperator.TEXT_MATCH, "%", set()),
        ("author", FilterOperator.TEXT_MATCH_INSENSITIVE, "NUT", {"vacuum"}),
        ("author", FilterOperator.IS_EMPTY, None, {"analyze", "locks"}),
        ("tags", FilterOperator.IS_EMPTY, None, {"locks"}),
    ],
)
def test_filters(store: PgshelfVectorStore, key: str, operator: FilterOperator, value: Any, found: set[str]) -> None:
    filters = MetadataFilters(filters=[MetadataFilter(key=key, operator=operator, value=value)])
    assert set(ids(store, filters=filters) or []) == found
    assert {each.node_id for each in store.get_nodes(filters=filters)} == found


def test_filters_combined(store: PgshelfVectorStore) -> None:
    old, planner = (
        MetadataFilter(key="year", value=2020),
        MetadataFilter(key="tags", value="planner", operator=FilterOperator.CONTAINS),
    )

    def combined(condition: FilterCondition, *filters: Any) -> set[str]:
        return set(ids(store, filters=MetadataFilters(filters=list(filters), condition=condition)) or [])

    assert combined(FilterCondition.AND, old, planner) == set()
    assert combined(FilterCondition.OR, old, planner) == {"vacuum", "analyze"}
    assert combined(FilterCondition.NOT, old, planner) == {"locks"}
    nested = MetadataFilters(filters=[old, planner], condition=FilterCondition.OR)
    assert combined(FilterCondition.AND, nested, old) == {"vacuum"}
    assert combined(FilterCondition.AND) == set(VECTORS)
    assert ids(store, doc_ids=["book"], node_ids=["analyze", "locks"]) == ["analyze"]


def test_getting_and_deleting(store: PgshelfVectorStore) -> None:
    assert {each.node_id for each in store.get_nodes()} == set(VECTORS)
    assert [each.get_content() for each in store.get_nodes(["locks", "nowhere"])] == [TEXTS["locks"]]
    year = MetadataFilters(filters=[MetadataFilter(key="year", value=2020)])
    store.delete_nodes(["locks"], year)  # nothing fulfils both
    store.delete_nodes(["locks"])
    assert ids(store) == ["vacuum", "analyze"]
    store.delete("book")
    assert ids(store) == []
    store.add([node("vacuum"), node("locks")])
    store.delete_nodes(filters=year)
    assert ids(store) == ["locks"]
    store.clear()
    assert store.get_nodes() == []


def test_what_others_wrote_becomes_text_nodes(client: Client) -> None:
    client.create_library("handbook", dimension=3)
    client.put_document("handbook", "note", chunks=[{"text": "hello", "embedding": [1, 0, 0]}], metadata={"a": 1})
    store = PgshelfVectorStore(client, "handbook")
    [found] = store.query(VectorStoreQuery(query_embedding=[1, 0, 0])).nodes or []
    assert (found.node_id, found.get_content(), found.metadata) == ("note", "hello", {"a": 1})


async def test_through_an_index(client: Client) -> None:
    client.create_library("handbook", dimension=4)
    store = PgshelfVectorStore(client, "handbook")
    index = VectorStoreIndex.from_vector_store(store, embed_model=MockEmbedding(embed_dim=4))
    index.insert(Document(text="Vacuum reclaims dead rows.", id_="book", metadata={"year": 2020}))
    [found] = index.as_retriever().retrieve("rows")
    assert found.node.get_content() == "Vacuum reclaims dead rows."
    assert found.node.metadata == {"year": 2020} and found.score == pytest.approx(1)
    [again] = await index.as_retriever().aretrieve("rows")
    assert again.node.node_id == found.node.node_id
    index.delete_ref_doc("book")
    assert index.as_retriever().retrieve("rows") == []
