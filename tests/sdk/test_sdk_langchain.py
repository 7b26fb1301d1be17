"""The vector store for LangChain, against a real server: as a chain, a retriever and an indexer use it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.indexing import InMemoryRecordManager, index

from pgshelf_client import BadRequest, Client, NewChunk, NotFound, Unprocessable
from pgshelf_client.langchain import PgshelfVectorStore

TEXTS = {
    "vacuum": ("Vacuum reclaims the space of dead rows.", {"year": 2020, "source": "manual"}),
    "analyze": ("Analyze counts rows for the planner.", {"year": 2023, "source": "manual"}),
    "locks": ("A transaction waits for the rows that another one changed.", {"year": 2026, "source": "wiki"}),
}


@pytest.fixture
def client(shared_live_server: Any) -> Iterator[Client]:
    with Client(shared_live_server.url) as client:
        yield client
        for library in list(client.libraries()):
            client.delete_library(library.name)


@pytest.fixture(params=["the server embeds", "LangChain embeds"])
def store(request: pytest.FixtureRequest, client: Client) -> PgshelfVectorStore:
    """A store of three documents."""
    if request.param == "the server embeds":
        client.create_library("handbook", embedder={"provider": "local"})
        store = PgshelfVectorStore(client, "handbook")
    else:
        client.create_library("handbook", dimension=16)
        store = PgshelfVectorStore(client, "handbook", DeterministicFakeEmbedding(size=16))
    texts = [text for text, _ in TEXTS.values()]
    store.add_texts(texts, [metadata for _, metadata in TEXTS.values()], ids=list(TEXTS))
    return store


def document(id: str) -> Document:
    text, metadata = TEXTS[id]
    return Document(id=id, page_content=text, metadata=metadata)


async def test_searches(store: PgshelfVectorStore) -> None:
    text = TEXTS["vacuum"][0]
    assert store.similarity_search(text, k=1) == [document("vacuum")]
    assert await store.asimilarity_search(text, k=1) == [document("vacuum")]
    [(found, score), *others] = store.similarity_search_with_score(text)
    assert found == document("vacuum") and score == pytest.approx(1, abs=1e-5)
    assert len(others) == 2 and all(score >= other for _, other in others)
    newer = store.similarity_search(text, filter={"year": {"$gt": 2020}, "source": "manual"})
    assert newer == [document("analyze")]
    relevant = store.similarity_search_with_relevance_scores(text, k=3, score_threshold=0.99)
    assert [item.id for item, _ in relevant] == ["vacuum"]
    assert store.similarity_search("dead rows", mode="text", k=1) == [document("vacuum")]
    assert store.similarity_search("dead rows", mode="hybrid", k=3)[0].id in TEXTS
    with pytest.raises(BadRequest, match="operator"):
        store.similarity_search(text, filter={"year": {"$near": 2020}})


def test_diverse_and_by_vector(store: PgshelfVectorStore) -> None:
    text = TEXTS["locks"][0]
    found = store.max_marginal_relevance_search(text, k=3, fetch_k=3, lambda_mult=0.5)
    assert found[0] == document("locks") and {item.id for item in found} == set(TEXTS)
    [vector] = [
        chunk.embedding for chunk in store.client.chunks("handbook", "locks", include=["embedding"]) if chunk.embedding
    ]
    assert store.similarity_search_by_vector(vector, k=1) == [document("locks")]
    assert store.max_marginal_relevance_search_by_vector(vector, k=1)[0] == document("locks")


def test_a_retriever(store: PgshelfVectorStore) -> None:
    retriever = store.as_retriever(search_kwargs={"k": 1, "filter": {"source": "wiki"}})
    assert retriever.invoke(TEXTS["vacuum"][0]) == [document("locks")]


def test_replacing_getting_and_deleting(store: PgshelfVectorStore) -> None:
    assert store.add_documents([Document(id="locks", page_content="Locks are held.", metadata={})]) == ["locks"]
    assert store.get_by_ids(["locks"]) == [Document(id="locks", page_content="Locks are held.", metadata={})]
    assert {item.id for item in store.get_by_ids(["vacuum", "locks", "vacuum", "nowhere"])} == {"vacuum", "locks"}
    assert store.get_by_ids([]) == []
    assert store.delete(["locks", "nowhere"])
    assert store.get_by_ids(["locks"]) == []
    assert store.delete(filter={"year": 2020})
    assert [item.id for item in store.similarity_search("rows")] == ["analyze"]
    assert store.delete()
    assert store.similarity_search("rows") == []


def test_ids_that_look_like_pgshelfs_own(store: PgshelfVectorStore) -> None:
    """LangChain makes up UUIDs; pgshelf takes none for a key."""
    [made] = store.add_texts(["An autovacuum worker runs."])
    assert uuid.UUID(made)
    odd = f"id:{made}"
    store.add_documents([Document(id=odd, page_content="Another one.", metadata={"n": 1})])
    assert [item.page_content for item in store.get_by_ids([made])] == ["An autovacuum worker runs."]
    assert [item.id for item in store.get_by_ids([odd])] == [odd]
    store.delete([made])
    assert store.get_by_ids([made]) == [] and store.get_by_ids([odd]) != []


def test_documents_of_others(client: Client) -> None:
    """What was written over REST is found, too: passages of long documents, and documents without a key."""
    client.create_library("handbook", dimension=2)
    chunks: list[NewChunk] = [
        {"text": "one", "embedding": [1, 0], "metadata": {"page": 1}},
        {"text": "two", "embedding": [0, 1]},
    ]
    added = client.add_document("handbook", chunks=chunks, metadata={"page": 0, "lang": "en"})
    store = PgshelfVectorStore(client, "handbook")
    [first, second] = store.similarity_search_by_vector([1, 0])
    assert (first.id, first.page_content, first.metadata) == (str(added.id), "one", {"page": 1, "lang": "en"})
    assert second.metadata == {"page": 0, "lang": "en"}
    assert [item.page_content for item in store.get_by_ids([str(added.id)])] == ["one\n\ntwo"]
    store.delete([str(added.id)])
    assert list(client.documents("handbook")) == []


def test_what_is_refused(client: Client) -> None:
    client.create_library("handbook", dimension=3)
    store = PgshelfVectorStore(client, "handbook", DeterministicFakeEmbedding(size=4))
    with pytest.raises(Unprocessable, match="first"):
        store.add_texts(["a", "b"], ids=["first", "second"])
    with pytest.raises(ValueError, match="2 texts, but 1 metadatas"):
        store.add_texts(["a", "b"], [{}])
    with pytest.raises(ValueError, match="2 texts, but 3 ids"):
        store.add_texts(["a", "b"], ids=["1", "2", "3"])
    with pytest.raises(ValueError, match="mode='vector'"):
        PgshelfVectorStore(client, "handbook", mode="hybrid").similarity_search_with_relevance_scores("a")
    with pytest.raises(NotFound):
        PgshelfVectorStore(client, "nowhere").similarity_search("a")
    with pytest.raises(ValueError, match="client="):
        PgshelfVectorStore.from_texts(["a"], DeterministicFakeEmbedding(size=3))


def test_made_from_texts_and_many_of_them(client: Client) -> None:
    client.create_library("handbook", dimension=8)
    embedding = DeterministicFakeEmbedding(size=8)
    texts = [f"passage {number}" for number in range(250)]
    store = PgshelfVectorStore.from_texts(texts, embedding, client=client, library="handbook")
    assert client.count_documents("handbook") == 250
    assert store.embeddings is embedding
    assert [item.page_content for item in store.similarity_search("passage 249", k=1)] == ["passage 249"]
    other = PgshelfVectorStore.from_documents([Document("more")], embedding, client=client, library="handbook")
    assert [item.page_content for item in other.similarity_search("more", k=1)] == ["more"]
    assert store.add_texts([]) == []


def test_the_indexing_api(client: Client) -> None:
    """LangChain's `index` writes what is new, skips what is there, and deletes what is gone."""
    client.create_library("handbook", embedder={"provider": "local"})
    store = PgshelfVectorStore(client, "handbook")
    records = InMemoryRecordManager("handbook")
    records.create_schema()

    def run(*numbers: int) -> dict[str, Any]:
        given = [Document(f"Passage {number}.", metadata={"source": "book"}) for number in numbers]
        done = index(given, records, store, cleanup="full", source_id_key="source", key_encoder="sha256")
        return {name: count for name, count in done.items() if count}

    assert run(1, 2, 3) == {"num_added": 3}
    assert run(2, 3, 4) == {"num_added": 1, "num_skipped": 2, "num_deleted": 1}
    assert {item.page_content for item in store.similarity_search("passage", k=9)} == {
        "Passage 2.", "Passage 3.", "Passage 4."
    }  # fmt: skip
