"""What the server answers, and what its requests are made of.

Answers are frozen structs. A field that a newer server adds is ignored, one that it leaves out has its default.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NotRequired, Protocol, Required, TypedDict

import msgspec

from .errors import FieldError

__all__ = [
    "AttributeType",
    "Backup",
    "BatchItem",
    "BatchResult",
    "Chunk",
    "ChunkCounts",
    "ChunkPart",
    "Chunking",
    "ChunkingChoice",
    "ConsistencyLevel",
    "Document",
    "DocumentFailure",
    "DocumentResult",
    "DocumentResults",
    "DocumentSummary",
    "Embedder",
    "EmbedderChoice",
    "EmbedderState",
    "EmbeddingType",
    "Explanation",
    "ExportedChunk",
    "ExportedDocument",
    "FacetValue",
    "FacetsResult",
    "Fusion",
    "FusionMethod",
    "GroupBy",
    "Health",
    "Hit",
    "HitPart",
    "ImportFailure",
    "ImportProgress",
    "ImportResult",
    "Index",
    "IndexChoice",
    "IndexEstimate",
    "IndexState",
    "IndexStorage",
    "IndexType",
    "Library",
    "LibraryStats",
    "Like",
    "Metadata",
    "Metric",
    "Mmr",
    "Mode",
    "Name",
    "NewChunk",
    "NewDocument",
    "Outcome",
    "Provider",
    "Readiness",
    "Replication",
    "Rerank",
    "RerankProvider",
    "Role",
    "Search",
    "SearchFailure",
    "SearchResult",
    "Server",
    "SortKey",
    "SortOrder",
    "Truncate",
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

# What a request may choose from. Answers say str, for a newer server may know more.

AttributeType = Literal["number", "text", "datetime"]
"""What an indexed field of the metadata holds."""

ChunkPart = Literal["embedding"]
"""What a chunk carries beside the rest."""

ConsistencyLevel = Literal["eventual", "session", "strong"]
"""How fresh reads are, where the server reads from replicas."""

EmbeddingType = Literal["float", "binary"]
"""How Cohere's vectors come."""

FusionMethod = Literal["rrf", "weighted"]
"""How the two sides of a hybrid search become one ranking."""

GroupBy = Literal["document"]
"""What gives only its best hits."""

HitPart = Literal["text", "metadata", "document", "embedding", "highlight"]
"""What a hit carries."""

IndexStorage = Literal["halfvec", "vector", "bit"]
"""How an index keeps vectors."""

IndexType = Literal["auto", "flat", "hnsw", "ivfflat", "lsh", "kdtree"]
"""Which index a library shall have."""

Metric = Literal["cosine", "l2", "inner_product", "l1"]
"""How the distance of two vectors is measured."""

Mode = Literal["vector", "text", "hybrid"]
"""By meaning, by words, or both."""

Outcome = Literal["done", "refused"]
"""How something in the audit log ended."""

Provider = Literal["local", "cohere", "openai", "sentence_transformers", "none"]
"""Who makes vectors."""

RerankProvider = Literal["cohere"]
"""Who puts the best hits in order."""

Role = Literal["reader", "writer", "admin"]
"""What a key may do."""

SortOrder = Literal["asc", "desc"]
"""Upwards or downwards."""

Truncate = Literal["end", "start", "none"]
"""What Cohere leaves out of a text that is too long."""


class EmbedderChoice(TypedDict, total=False):
    """Who shall make the vectors of a library."""

    provider: Required[Provider]
    model: str | None
    dimension: int | None
    query_prefix: str
    document_prefix: str
    embedding_type: EmbeddingType
    truncate: Truncate


class IndexChoice(TypedDict, total=False):
    """Which index a library shall have; what is absent is chosen by the server."""

    type: Required[IndexType]
    storage: IndexStorage
    m: int
    ef_construction: int
    lists: int
    bits: int
    seed: int


class ChunkingChoice(TypedDict, total=False):
    """How long a chunk may become, and how much of it the next one repeats, in characters."""

    size: int | None
    overlap: int | None


class Like(TypedDict, total=False):
    """What hits shall be like: a chunk by its id, or a document by its key or id."""

    chunk: Name | None
    document: Name | None


class Fusion(TypedDict, total=False):
    """How a hybrid search fuses; `weights` are of the vectors and of the words, of which each ranks `candidates`."""

    method: FusionMethod
    k: int
    weights: Sequence[float]
    candidates: int | None


Mmr = TypedDict("Mmr", {"lambda": float, "candidates": int | None}, total=False)
"""Hits that are unlike each other; `lambda` is from 0, as diverse as can be, to 1, relevance alone."""


class Rerank(TypedDict, total=False):
    """Who reads the best `candidates` together with the query."""

    provider: Required[RerankProvider]
    model: str | None
    candidates: int | None


class SortKey(TypedDict, total=False):
    """A declared attribute or a column that documents are ordered by; "asc" if there is no `order`."""

    field: Required[str]
    order: SortOrder


class NewChunk(TypedDict):
    """A chunk to store; without an embedding the library's embedder makes it."""

    text: str
    embedding: NotRequired[Vector | None]
    metadata: NotRequired[Metadata | None]


class NewDocument(TypedDict, total=False):
    """A document to store, as `text` or as `chunks`; one with the same `key` is replaced."""

    key: str | None
    title: str | None
    text: str | None
    chunks: Iterable[NewChunk] | None
    source: str | None
    metadata: Metadata | None


class Search(TypedDict, total=False):
    """One search of a batch: what `search` takes, under the same names."""

    query: str | None
    vector: Vector | None
    like: Like | None
    mode: Mode | None
    k: int | None
    offset: int | None
    filter: Mapping[str, Any] | None
    max_distance: float | None
    min_score: float | None
    fusion: Fusion | None
    mmr: Mmr | None
    group_by: GroupBy | None
    group_size: int | None
    rerank: Rerank | None
    exact: bool | None
    ef_search: int | None
    include: HitPart | Sequence[HitPart] | None
    facets: Sequence[str] | None
    total: bool | None
    explain: bool | None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What all answers have in common: they cannot be changed, and unknown fields are ignored."""


class Embedder(Answer, frozen=True, omit_defaults=True):
    """What turns the texts of a library into vectors of `dimension` numbers."""

    provider: str
    model: str | None = None
    dimension: int | None = None
    embedding_type: str | None = None
    truncate: str | None = None
    query_prefix: str | None = None
    document_prefix: str | None = None


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
    attributes: dict[str, str] = {}
    attributes_ready: dict[str, str] = {}
    metadata: dict[str, Any] = {}
    version: int = 1
    created_at: datetime | None = None
    updated_at: datetime | None = None


class IndexState(Answer, frozen=True):
    """The index that a library has, and how far it is built (1.0 is whole)."""

    type: str
    state: str = "ready"
    progress: float = 1.0


class IndexEstimate(Answer, frozen=True):
    """What building the wanted index takes, about: disk, memory and seconds for `rows` chunks."""

    rows: int = 0
    bytes: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0


class Index(Answer, frozen=True):
    """The index of a library: the one that was asked for, and the one that searches use now.

    `state` is "ready", "building" (`progress` goes from 0 to 1), "waiting" (for enough vectors, searched exactly
    meanwhile) or "failed" (`error` says why; the server tries again by itself). `shelf` is the table of its chunks.
    """

    wanted: dict[str, Any]
    actual: dict[str, Any]
    state: str
    progress: float = 1.0
    phase: str | None = None
    error: str | None = None
    shelf: int = 0
    moving: bool = False
    estimate: IndexEstimate | None = None


class EmbedderState(Answer, frozen=True):
    """Who makes the vectors of a library, and who shall (`wanted`, None where nobody else is).

    `state` is "ready", "embedding" (vectors of the wanted embedder are made; `embedded` of `total` chunks have one),
    "switching" (all are there, they get their place and index) or "failed" (`error` says why; the server tries again
    by itself). Searches use `embedder` until all change at once.
    """

    embedder: Embedder
    wanted: Embedder | None = None
    state: str = "ready"
    progress: float = 1.0
    embedded: int = 0
    total: int = 0
    error: str | None = None


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


class Change(Answer, frozen=True):
    """Something that was committed. Keep its `cursor` once you have dealt with it, and go on from there.

    `kind` is "put" (a document is new or changed; `created` says which), "delete", "embedded" (chunks are found now
    that waited for their vectors), or "library": what searches say may have changed altogether, by another index, say.
    """

    cursor: str
    kind: str
    version: int
    at: datetime
    document_id: str | None = None
    key: str | None = None
    created: bool | None = None


class Changes(Answer, frozen=True):
    """A page of changes, perhaps an empty one; `next` goes on behind it, now or later."""

    items: list[Change]
    next: str


class EventTaken(Answer, frozen=True):
    """An event that is stored; `duplicate` says that it had been before. `key` is that of its document."""

    id: str
    document_id: str
    key: str
    duplicate: bool


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
    """A chunk that was found. A higher `score` is better; `distance` is the metric's own, None where only words count.

    `text`, `metadata`, `document`, `embedding` and `highlight` are None when `include` left them out, `highlight` also
    where no word of the query is in the text. `library` is the name of its library, in a search of several.
    """

    chunk_id: str
    document_id: str
    ordinal: int
    score: float
    distance: float | None = None
    key: str | None = None
    text: str | None = None
    metadata: dict[str, Any] | None = None
    document: DocumentSummary | None = None
    embedding: list[float] | None = None
    highlight: str | None = None
    library: str | None = None


class FacetValue(Answer, frozen=True):
    """A value of a metadata field, and how many documents have it."""

    value: Any
    documents: int


class FacetsResult(Answer, frozen=True):
    """For each field its values, most frequent first, and how many documents match."""

    facets: dict[str, list[FacetValue]]
    documents: int


class Explanation(Answer, frozen=True):
    """How a search was carried out: "exact", "index", "index then exact" or "words", and the SQL that did it.

    `recall` is the share of the true nearest `k` that this search finds; None unless it is by vector alone.
    """

    strategy: str
    statement: str
    plan: dict[str, Any] = {}
    rows_removed: int = 0
    recall: float | None = None


class SearchResult(Answer, frozen=True):
    """The hits of a search, best first, and the milliseconds it took inside the server.

    `cached` says that an equal search found them before, and that nothing has changed since then.
    `total`, `facets` (for each field its values, most frequent first) and `explain` are None unless asked for.
    """

    hits: list[Hit]
    took_ms: float
    cached: bool = False
    total: int | None = None
    facets: dict[str, list[FacetValue]] | None = None
    explain: Explanation | None = None


class CacheInfo(Answer, frozen=True):
    """How the query cache does: of all processes of the server on its machine, since it started.

    `max_bytes` is what each process may keep, `ttl` the seconds after which an answer goes in any case.
    """

    enabled: bool
    max_bytes: int
    ttl: float
    entries: int
    bytes: int
    hits: int
    misses: int
    evictions: int


class SearchFailure(Answer, frozen=True):
    """Why one search of a batch failed: what its `ApiError` would have carried, had it been sent alone."""

    status: int
    code: str = ""
    detail: str = ""


class DocumentFailure(Answer, frozen=True):
    """Why one document of several was not stored: what its `ApiError` would have carried, had it been sent alone."""

    status: int
    code: str = ""
    detail: str = ""
    errors: tuple[FieldError, ...] = ()


class DocumentResult(Answer, frozen=True):
    """What became of one document of several: its `status` is the one that it would have had alone.

    201 created, 200 replaced, 202 stored while chunks wait for their vectors; else `id` is None and `error` says why.
    """

    status: int
    id: str | None = None
    key: str | None = None
    error: DocumentFailure | None = None


class DocumentResults(Answer, frozen=True):
    """What became of several documents, in their order."""

    results: list[DocumentResult]


class BatchItem(Answer, frozen=True):
    """The answer to one search of a batch, or why it failed."""

    answer: SearchResult | None = None
    error: SearchFailure | None = None


class BatchResult(Answer, frozen=True):
    """One item for each search of a batch, in their order."""

    results: list[BatchItem]
    took_ms: float


class ExportedChunk(Answer, frozen=True):
    """A chunk as it is exported; `embedding` is None where it has none yet, or where none were asked for."""

    text: str
    embedding: list[float] | None = None
    metadata: dict[str, Any] = {}


class ExportedDocument(Answer, frozen=True):
    """A whole document as it is exported; `import_documents` takes it again."""

    key: str | None = None
    title: str | None = None
    source: str | None = None
    metadata: dict[str, Any] = {}
    chunks: list[ExportedChunk] = []


class ImportFailure(Answer, frozen=True):
    """A document that was not imported: its place among those given, from 0, itself, and why.

    `code`, `detail` and `errors` are what its `ApiError` would have carried; `code` is "not_sendable" where it has no
    form in JSON.
    """

    index: int
    document: Any
    key: str | None = None
    code: str = ""
    detail: str = ""
    errors: tuple[FieldError, ...] = ()


class ImportProgress(Answer, frozen=True):
    """How far an import is: documents that the server has answered for, and what became of them.

    `skipped` were dealt with before, by an earlier run of the same name or by a request whose answer was lost;
    `pending` wait for embeddings.
    """

    documents: int = 0
    created: int = 0
    replaced: int = 0
    skipped: int = 0
    pending: int = 0
    failed: int = 0


class ImportResult(Answer, frozen=True):
    """What became of the documents of an import: counted as in `ImportProgress`, and in their order those that failed.

    `failed` is empty where `on_failure` took them.
    """

    created: int = 0
    replaced: int = 0
    skipped: int = 0
    pending: int = 0
    failed: list[ImportFailure] = []


class Health(Answer, frozen=True):
    """The server answers; whether it can work is what `Readiness` says."""

    status: str
    version: str = ""


class Readiness(Answer, frozen=True):
    """The server can work; `checks` holds what it looked at."""

    status: str
    checks: dict[str, Any] = {}


class KeySecret(Answer, frozen=True):
    """A secret of a key, without itself: how it begins, and when it ends by a rotation."""

    hint: str
    created_at: datetime | None = None
    expires_at: datetime | None = None


class KeyFields(Answer, frozen=True):
    """What a key and a new one tell."""

    id: str
    name: str
    role: str
    libraries: list[str] = []
    created_at: datetime | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class Key(KeyFields, frozen=True):
    """A key of the API. `libraries` are ids, names and patterns; ["*"] is all."""

    secrets: list[KeySecret] = []


class NewKey(KeyFields, frozen=True, kw_only=True):
    """A key with its new `secret`, which the server cannot show again."""

    secret: str


class AuditEntry(Answer, frozen=True):
    """Who did what to which library, or was refused it (`outcome`); what the library was called then."""

    id: str
    at: datetime
    action: str
    outcome: str
    principal_kind: str
    principal: str
    principal_id: str | None = None
    library_id: str | None = None
    library: str | None = None
    document: str | None = None
    count: int = 1
    detail: str | None = None
    request_id: str | None = None


class Token(Answer, frozen=True):
    """A token made from a key: an `api_key` for minutes."""

    token: str
    role: str
    expires_at: datetime
    libraries: list[str] = []


class Server(Answer, frozen=True):
    """A server that takes part in replication; None is what it does not have, or what is hidden.

    `role` is "primary" or "standby" for the one that was asked, "replica" or "subscriber" for those that follow it.
    `health` is "healthy", "lagging" or "disconnected".
    """

    role: str
    name: str | None = None
    address: str | None = None
    slot: str | None = None
    state: str | None = None
    sync_state: str | None = None
    timeline: int | None = None
    sent_lsn: str | None = None
    written_lsn: str | None = None
    flushed_lsn: str | None = None
    replayed_lsn: str | None = None
    lag_bytes: int | None = None
    lag_seconds: float | None = None
    last_message_at: datetime | None = None
    last_heartbeat_at: datetime | None = None
    wal_status: str | None = None
    retained_bytes: int | None = None
    conflicts: dict[str, int] | None = None
    health: str | None = None


class Replication(Server, frozen=True):
    """The server that the service is connected to, and those that follow it.

    `overall` is the worst health that is visible; `hidden` says why some is not.
    """

    overall: str | None = None
    hidden: str | None = None
    replicas: list[Server] = []


class Backup(Answer, frozen=True):
    """A backup of the whole PostgreSQL server; `state` is "running", "done" or "failed", then `error` says why."""

    id: str
    state: str
    label: str | None = None
    error: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    bytes: int | None = None
    start_lsn: str | None = None
    end_lsn: str | None = None
    timeline: int | None = None
    postgres: str | None = None
