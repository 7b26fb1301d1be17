"""pgshelf as a vector store of LlamaIndex: `pip install pgshelf-client[llama-index]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode, TextNode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from . import _stores as stores
from ._sync import Client
from .types import Hit, NewChunk, NewDocument

__all__ = ["PgshelfVectorStore"]

OPERATORS = {
    FilterOperator.EQ: "$eq",
    FilterOperator.NE: "$ne",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.IN: "$in",
    FilterOperator.NIN: "$nin",
    FilterOperator.ANY: "$contains_any",
    FilterOperator.ALL: "$contains_all",
    FilterOperator.CONTAINS: "$contains",
}
TEXTUAL = {FilterOperator.TEXT_MATCH: "$like", FilterOperator.TEXT_MATCH_INSENSITIVE: "$ilike"}
MODES = {
    VectorStoreQueryMode.DEFAULT: "vector",
    VectorStoreQueryMode.MMR: "vector",
    VectorStoreQueryMode.SPARSE: "text",
    VectorStoreQueryMode.TEXT_SEARCH: "text",
    VectorStoreQueryMode.HYBRID: "hybrid",
    VectorStoreQueryMode.SEMANTIC_HYBRID: "hybrid",
}
CANDIDATES = 4  # times as many as are wanted, which MMR chooses from


class PgshelfVectorStore(BasePydanticVectorStore):
    """The nodes of one library, whose embedder is "none" or of the same dimension as that of the index.

        store = PgshelfVectorStore(Client("http://127.0.0.1:8432"), "handbook")
        index = VectorStoreIndex.from_vector_store(store, embed_model=...)

    Queries by the modes default, mmr, text_search (or sparse) and hybrid, where `alpha` is the weight of the vectors;
    other modes are refused.
    """

    stores_text: bool = True
    library: str
    _client: Client = PrivateAttr()

    def __init__(self, client: Client, library: str) -> None:
        super().__init__(library=library)  # type: ignore[call-arg]  # pydantic makes it of the fields
        self._client = client

    @classmethod
    def class_name(cls) -> str:
        """Its name in what LlamaIndex writes down."""
        return "PgshelfVectorStore"

    @property
    def client(self) -> Client:
        """The client it was made with."""
        return self._client

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Store nodes with their embeddings; one whose id is there is replaced."""
        documents = [
            NewDocument(
                key=stores.key_of(node.node_id),
                chunks=[
                    NewChunk(text=node.get_content(metadata_mode=MetadataMode.NONE), embedding=node.get_embedding())
                ],
                metadata=node_to_metadata_dict(node, remove_text=True),
            )
            for node in nodes
        ]
        stores.store(self._client, self.library, documents)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **kwargs: Any) -> None:
        """Delete the nodes of a document of LlamaIndex."""
        self._client.delete_documents(self.library, {"ref_doc_id": ref_doc_id})

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> None:
        """Delete nodes by their ids, by filters, or those that fulfil both."""
        for filter in self._filters(node_ids, filters):
            self._client.delete_documents(self.library, filter)

    def clear(self) -> None:
        """Delete all documents of the library."""
        self._client.delete_documents(self.library, stores.ALL)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Nodes by their ids, by filters, or those that fulfil both."""
        return [
            _node(stores.id_of(found.key, found.id), text, found.metadata)
            for filter in self._filters(node_ids, filters)
            for found, text in stores.fetch(self._client, self.library, filter)
        ]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The best nodes for an embedding, for words, or for both; `kwargs` may hold what `Client.search` takes."""
        mode = MODES.get(query.mode)
        if mode is None:
            raise ValueError(
                f"pgshelf does not query by mode {query.mode.value!r}; use one of {[m.value for m in MODES]}"
            )
        options: dict[str, Any] = {"mode": mode, "k": query.similarity_top_k, "filter": _restricted(query)}
        if mode != "text":
            options["vector"] = query.query_embedding
        if mode == "hybrid":
            options["k"] = query.hybrid_top_k or query.similarity_top_k
            if query.alpha is not None:
                options["fusion"] = {"method": "weighted", "weights": [query.alpha, 1 - query.alpha]}
        if query.mode == VectorStoreQueryMode.MMR:
            weight = 0.5 if query.mmr_threshold is None else query.mmr_threshold
            options["mmr"] = {"lambda": weight, "candidates": CANDIDATES * query.similarity_top_k}
        words = None if mode == "vector" else query.query_str
        hits = self._client.search(self.library, words, **{**options, "include": stores.PARTS, **kwargs}).hits
        nodes = [_node_of(hit) for hit in hits]
        return VectorStoreQueryResult(
            nodes=nodes, similarities=[hit.score for hit in hits], ids=[node.node_id for node in nodes]
        )

    def _filters(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[dict[str, Any]]:
        """What shall be found, in filters of bounded size; without anything that says which, that is all."""
        given = [] if filters is None else [_filter(filters)]
        if node_ids is None:
            return given or [stores.ALL]
        return [{"$and": [stores.named(part), *given]} for part in stores.batches(node_ids)]


def _restricted(query: VectorStoreQuery) -> dict[str, Any] | None:
    parts = [] if query.filters is None else [_filter(query.filters)]
    if query.doc_ids:  # LlamaIndex says [] where it has none to say
        parts.append({"ref_doc_id": {"$in": query.doc_ids}})
    if query.node_ids:
        parts.append(stores.named(query.node_ids))
    return {"$and": parts} if parts else None


def _filter(filters: MetadataFilters) -> dict[str, Any]:
    parts = [_filter(each) if isinstance(each, MetadataFilters) else _condition(each) for each in filters.filters]
    if not parts:
        return stores.ALL
    if filters.condition == FilterCondition.NOT:  # none of them
        return {"$not": {"$or": parts}}
    return {"$or" if filters.condition == FilterCondition.OR else "$and": parts}


def _condition(filter: MetadataFilter) -> dict[str, Any]:
    if filter.operator == FilterOperator.IS_EMPTY:
        return {"$or": [{filter.key: {"$exists": False}}, {filter.key: {"$in": [None, "", []]}}]}
    if filter.operator in TEXTUAL:
        text = str(filter.value)
        for special in ("\\", "%", "_"):
            text = text.replace(special, "\\" + special)
        return {filter.key: {TEXTUAL[filter.operator]: f"%{text}%"}}
    return {filter.key: {OPERATORS[filter.operator]: filter.value}}


def _node_of(hit: Hit) -> BaseNode:
    metadata = hit.document.metadata if hit.document else {}
    return _node(stores.id_of(hit.key, hit.document_id), hit.text or "", {**metadata, **(hit.metadata or {})})


def _node(id: str, text: str, metadata: dict[str, Any]) -> BaseNode:
    """A node as it was stored; of what somebody else wrote, a TextNode."""
    if "_node_content" in metadata:
        return metadata_dict_to_node(metadata, text)
    return TextNode(id_=id, text=text, metadata=metadata)
