"""What the server answers, and what its requests are made of.

Answers are frozen structs. A field that a newer server adds is ignored, one that it leaves out has its default.
"""

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NotRequired, Protocol, TypedDict

import msgspec

__all__ = [
    "Chunk",
    "ChunkCounts",
    "Chunking",
    "Document",
    "DocumentSummary",
    "Embedder",
    "Health",
    "Hit",
    "IndexState",
    "Library",
    "LibraryStats",
    "Metadata",
    "Name",
    "NewChunk",
    "Readiness",
    "SearchResult",
    "Vector",
]

Name = str | uuid.UUID
"""A name, a key or an id."""

Metadata = Mapping[str, Any]
"""A JSON object; NaN and infinity are refused, for JSON has neither."""


class HasToList(Protocol):
    """An array that can turn itself into a list: numpy's, torch's, `array.array`."""

    def tolist(self) -> Any: ...


Vector = Sequence[float] | HasToList
"""Finite numbers, one per dimension of the library."""


class NewChunk(TypedDict):
    """A chunk to store; without an embedding the library's embedder makes it."""

    text: str
    embedding: NotRequired[Vector | None]
    metadata: NotRequired[Metadata | None]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What all answers have in common: they cannot be changed, and unknown fields are ignored."""


class Embedder(Answer, frozen=True):
    """What turns the texts of a library into vectors of `dimension` numbers."""

    provider: str
    model: str | None = None
    dimension: int | None = None


class Chunking(Answer, frozen=True):
    """How long a chunk becomes, and how much of it the next one repeats, in characters."""

    size: int
    overlap: int = 0


class Library(Answer, frozen=True):
    """A library: documents that share an embedder, a dimension and a metric."""

    id: str
    name: str
    dimension: int
    metric: str
    embedder: Embedder
    description: str | None = None
    chunking: Chunking | None = None
    language: str | None = None
    metadata: dict[str, Any] = {}
    version: int = 1
    created_at: datetime | None = None
    updated_at: datetime | None = None


class IndexState(Answer, frozen=True):
    """The index that a library has, and how far it is built (1.0 is whole)."""

    type: str
    state: str = "ready"
    progress: float = 1.0


class LibraryStats(Answer, frozen=True):
    """What a library holds; `pending` and `failed` count chunks without an embedding."""

    documents: int
    chunks: int
    pending: int = 0
    failed: int = 0
    bytes: int = 0
    shelf: int = 0
    index: IndexState | None = None


class ChunkCounts(Answer, frozen=True):
    """How many chunks a document has, and how many of them have no embedding (yet)."""

    total: int
    pending: int = 0
    failed: int = 0


class Document(Answer, frozen=True):
    """A document without its text, which is in its chunks. `version` is what `if_match` takes."""

    id: str
    version: int
    status: str
    key: str | None = None
    title: str | None = None
    source: str | None = None
    metadata: dict[str, Any] = {}
    chunks: ChunkCounts | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None


class Chunk(Answer, frozen=True):
    """A piece of a document; `embedding` is there only when asked for."""

    id: str
    document_id: str
    ordinal: int
    text: str
    status: str
    metadata: dict[str, Any] = {}
    error: str | None = None
    embedding: list[float] | None = None


class DocumentSummary(Answer, frozen=True):
    """What a hit says about its document."""

    title: str | None = None
    source: str | None = None
    metadata: dict[str, Any] = {}


class Hit(Answer, frozen=True):
    """A chunk that was found. A higher `score` is better; `distance` is the metric's own.

    `text`, `metadata`, `document` and `embedding` are None when `include` left them out.
    """

    chunk_id: str
    document_id: str
    ordinal: int
    score: float
    distance: float
    key: str | None = None
    text: str | None = None
    metadata: dict[str, Any] | None = None
    document: DocumentSummary | None = None
    embedding: list[float] | None = None


class SearchResult(Answer, frozen=True):
    """The hits of a search, best first, and the milliseconds it took inside the server."""

    hits: list[Hit]
    took_ms: float


class Health(Answer, frozen=True):
    """The server answers; whether it can work is what `Readiness` says."""

    status: str
    version: str = ""


class Readiness(Answer, frozen=True):
    """The server can work; `checks` holds what it looked at."""

    status: str
    checks: dict[str, Any] = {}
