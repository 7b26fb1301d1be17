"""pgshelf as a vector store of LangChain: `pip install pgshelf-client[langchain]`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore

from . import _stores as stores
from ._sync import Client
from .types import Hit, Mode, NewChunk, NewDocument

__all__ = ["PgshelfVectorStore"]


class PgshelfVectorStore(VectorStore):
    """The documents of one library.

        store = PgshelfVectorStore(Client("http://127.0.0.1:8432"), "handbook")

    Without `embedding` the library's own embedder makes all vectors, on the server. With one, vectors are made here:
    the library then has the embedder "none", or one of the same dimension. Filters are pgshelf's, over the metadata:
    `filter={"year": {"$gte": 2020}}`. Searches are by `mode` "vector"; "hybrid" and "text" use the words, too, and
    can be asked for in each search. What a search of pgshelf takes else (`max_distance`, `rerank`, `ef_search`) may be
    given to each search as well. Errors are those of the client.
    """

    def __init__(
        self, client: Client, library: str, embedding: Embeddings | None = None, *, mode: Mode = "vector"
    ) -> None:
        self.client, self.library, self.mode = client, library, mode
        self._embedding = embedding

    @property
    def embeddings(self) -> Embeddings | None:
        """What makes the vectors here, if anything does."""
        return self._embedding

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Store texts, and return their ids. One whose id is there is replaced; ids that are None are made up."""
        given = list(texts)
        for what, others in (("metadatas", metadatas), ("ids", ids)):
            if others is not None and len(others) != len(given):
                raise ValueError(f"there are {len(given)} texts, but {len(others)} {what}")
        named: list[str] = [id or str(uuid.uuid4()) for id in ids or [""] * len(given)]
        vectors = self._embedding.embed_documents(given) if self._embedding and given else [None] * len(given)
        chunks = [
            NewChunk(text=text) if vector is None else NewChunk(text=text, embedding=vector)
            for text, vector in zip(given, vectors, strict=True)
        ]
        described = metadatas or [{}] * len(given)
        documents = [
            NewDocument(key=stores.key_of(id), chunks=[chunk], metadata=metadata)
            for id, chunk, metadata in zip(named, chunks, described, strict=True)
        ]
        stores.store(self.client, self.library, documents)
        return named

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        """Store documents, and return their ids: those of `ids`, or their own."""
        kwargs.setdefault("ids", [document.id for document in documents])
        return self.add_texts(
            [document.page_content for document in documents], [document.metadata for document in documents], **kwargs
        )

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete the documents of these ids, those that match a `filter`, or, without both, all of the library."""
        if ids is not None:
            stores.remove(self.client, self.library, ids)
        else:
            self.client.delete_documents(self.library, kwargs.get("filter") or stores.ALL)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of these ids that there are."""
        return [
            Document(id=stores.id_of(found.key, found.id), page_content=text, metadata=found.metadata)
            for part in stores.batches(ids)
            for found, text in stores.fetch(self.client, self.library, stores.named(part))
        ]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The `k` best passages for a text."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(self, query: str, k: int = 4, **kwargs: Any) -> list[tuple[Document, float]]:
        """The `k` best passages for a text, with their scores: higher is better; `1 - distance` by cosine."""
        return [(_document(hit), hit.score) for hit in self._search(query, None, k, kwargs)]

    def similarity_search_by_vector(self, embedding: list[float], k: int = 4, **kwargs: Any) -> list[Document]:
        """The `k` passages nearest to a vector."""
        return [_document(hit) for hit in self._search(None, embedding, k, kwargs)]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """`k` of the `fetch_k` best passages for a text, unlike each other; `lambda_mult` is 1 for the best alone."""
        mmr = {"lambda": lambda_mult, "candidates": max(k, fetch_k)}
        return [_document(hit) for hit in self._search(query, None, k, {**kwargs, "mmr": mmr})]

    def max_marginal_relevance_search_by_vector(
        self, embedding: list[float], k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """The same, for a vector."""
        mmr = {"lambda": lambda_mult, "candidates": max(k, fetch_k)}
        return [_document(hit) for hit in self._search(None, embedding, k, {**kwargs, "mmr": mmr})]

    def _search(self, query: str | None, vector: list[float] | None, k: int, options: dict[str, Any]) -> list[Hit]:
        options = {"mode": self.mode if query is not None else "vector", **options}
        if query is not None and self._embedding is not None and options["mode"] != "text":
            vector = self._embedding.embed_query(query)
            if options["mode"] == "vector":
                query = None
        return self.client.search(self.library, query, vector=vector, k=k, include=stores.PARTS, **options).hits

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        """Scores of a search by cosine are between -1 and 1, by other distances between 0 and 1."""
        if self.mode != "vector":
            raise ValueError(f"scores by mode {self.mode!r} compare passages of one search only; use mode='vector'")
        return lambda score: min(1.0, max(0.0, score))

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        client: Client | None = None,
        library: str = "",
        **kwargs: Any,
    ) -> Self:
        """Store texts in a library, which must be there: `from_texts(texts, client=client, library="handbook")`."""
        if client is None or not library:
            raise ValueError("from_texts needs client=pgshelf_client.Client(...) and library='...'")
        store = cls(client, library, embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store


def _document(hit: Hit) -> Document:
    """A passage as LangChain has it; the chunk's own metadata go before those of its document."""
    metadata = {**(hit.document.metadata if hit.document else {}), **(hit.metadata or {})}
    return Document(id=stores.id_of(hit.key, hit.document_id), page_content=hit.text or "", metadata=metadata)
