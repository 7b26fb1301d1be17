"""What a search may say, what it is answered, and what no library could answer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from msgspec import UNSET, Meta, UnsetType

from pgshelf import limits
from pgshelf.errors import invalid
from pgshelf.rerank import RerankChoice
from pgshelf.settings import Settings

Part = Literal["text", "metadata", "document", "embedding", "highlight"]
Mode = Literal["vector", "text", "hybrid"]
Filter = Annotated[
    dict[str, Any] | None,
    Meta(
        description="Conditions on documents and chunks: operators as in MongoDB, such as "
        '{"year": {"$gte": 2020}, "chunk.page": 3}; docs/search.md has the grammar.',
        examples=[{"year": {"$gte": 2020}}],
    ),
]


class Like(msgspec.Struct, forbid_unknown_fields=True):
    """What the hits shall be like: a chunk, or a document (the mean of its chunks); it is not among the hits itself."""

    chunk: Annotated[UUID | None, Meta(description="The id of a chunk of the library.")] = None
    document: Annotated[
        Annotated[str, Meta(min_length=1, max_length=512)] | None, Meta(description="The key or id of a document.")
    ] = None


class Fusion(msgspec.Struct, forbid_unknown_fields=True):
    """How the two sides of a hybrid search become one ranking."""

    method: Annotated[
        Literal["rrf", "weighted"],
        Meta(description="`rrf`: reciprocal ranks. `weighted`: scores of both sides brought to 0..1 and added."),
    ] = "rrf"
    k: Annotated[Annotated[int, Meta(ge=1, le=10_000)], Meta(description="The constant of rrf: 1 / (k + rank).")] = 60
    weights: Annotated[
        Annotated[list[Annotated[float, Meta(ge=0, le=1e6)]], Meta(min_length=2, max_length=2)],
        Meta(description="Of the vector side and of the words; not both zero.", extra_json_schema={"default": [1, 1]}),
    ] = msgspec.field(default_factory=lambda: [1.0, 1.0])
    candidates: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        Meta(description="How many of each side are ranked; if absent 50, and more behind the fiftieth hit."),
    ] = None


class Mmr(msgspec.Struct, forbid_unknown_fields=True, rename={"weight": "lambda"}):
    """Maximal marginal relevance: hits that are good and unlike each other."""

    weight: Annotated[
        Annotated[float, Meta(ge=0, le=1)], Meta(description="From 0, as diverse as can be, to 1, relevance alone.")
    ] = 0.5
    candidates: Annotated[
        Annotated[int, Meta(ge=1, le=10_000)] | None,
        Meta(description="How many of the best hits are chosen from; if absent 50, and 250 for more than ten hits."),
    ] = None


class Ranking(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What every search may say, whether of one library or of several."""

    query: Annotated[
        Annotated[str, Meta(min_length=1, examples=["how do I reclaim space"])] | None,
        Meta(
            description="A question or words, at most PGSHELF_MAX_QUERY_LENGTH (10000) characters. As words: "
            '"a phrase" must be there, -word must not, prefix* stands for all words that begin so.'
        ),
    ] = None
    vector: Annotated[
        Annotated[list[float], Meta(min_length=1, max_length=16000)] | bytes | None,
        Meta(description="Numbers, or their little-endian float32 bytes (base64 in JSON), of the library's dimension."),
    ] = None
    mode: Annotated[
        Mode | None,
        Meta(
            description="`vector`: by meaning. `text`: by words, BM25. `hybrid`: both, fused. If absent: hybrid for a "
            "query, vector for a vector, text where a query meets a library without embedder."
        ),
    ] = None
    k: Annotated[
        Annotated[int, Meta(ge=1)], Meta(description="How many hits at most; PGSHELF_MAX_K (1000) is the limit.")
    ] = 10
    offset: Annotated[
        Annotated[int, Meta(ge=0)], Meta(description="How many hits to skip; PGSHELF_MAX_OFFSET (10000) is the limit.")
    ] = 0
    filter: Filter = None
    max_distance: Annotated[float | None, Meta(description="Leave out what is farther away than this.")] = None
    min_score: Annotated[float | None, Meta(description="Leave out hits with a lower score.")] = None
    fusion: Annotated[Fusion | None, Meta(description="How a hybrid search fuses; rrf if absent.")] = None
    rerank: Annotated[
        RerankChoice | None, Meta(description="Lets a model read the best hits together with the query and order them.")
    ] = None
    exact: Annotated[
        bool, Meta(description="Look at every chunk that matches the filter, whatever index there is.")
    ] = False
    ef_search: Annotated[
        Annotated[int, Meta(ge=1, le=1000)] | None,
        Meta(description="How widely an hnsw or lsh index is searched (ivfflat: how many lists); chosen if absent."),
    ] = None
    include: Annotated[
        list[Part],
        Meta(description="What each hit carries.", extra_json_schema={"default": ["text", "metadata", "document"]}),
    ] = msgspec.field(default_factory=lambda: ["text", "metadata", "document"])


class SearchRequest(Ranking, forbid_unknown_fields=True, kw_only=True):
    """What to look for: at least one of `query`, `vector` and `like`; `vector` and `like` exclude each other."""

    like: Annotated[Like | None, Meta(description="Look for what is like a chunk or a document.")] = None
    mmr: Annotated[Mmr | None, Meta(description="Choose hits that are unlike each other.")] = None
    group_by: Annotated[
        Literal["document"] | None,
        Meta(description="`document`: of each document only the best hits; k and offset count documents."),
    ] = None
    group_size: Annotated[
        Annotated[int, Meta(ge=1, le=100)], Meta(description="How many hits of each document, with group_by.")
    ] = 1
    facets: Annotated[
        Annotated[list[str], Meta(max_length=20)],
        Meta(description="Metadata fields whose values shall be counted over all documents that match the filter."),
    ] = []
    total: Annotated[
        bool, Meta(description="Count all chunks that match the filter and, in mode text, hold the words.")
    ] = False
    explain: Annotated[
        bool, Meta(description="Say how: strategy, statement, plan, and recall measured for this very search.")
    ] = False


class HitDocument(msgspec.Struct):
    """The document that a hit belongs to."""

    title: Annotated[str | None, Meta(description="Its title.")]
    source: Annotated[str | None, Meta(description="Where it comes from.")]
    metadata: Annotated[dict[str, Any], Meta(description="The document's metadata.")]


class Hit(msgspec.Struct):
    """A chunk that was found."""

    chunk_id: Annotated[UUID, Meta(description="The chunk.")]
    document_id: Annotated[UUID, Meta(description="Its document.")]
    key: Annotated[str | None, Meta(description="The document's key.")]
    ordinal: Annotated[int, Meta(description="The chunk's place in its document.")]
    score: Annotated[
        float,
        Meta(description="Better when higher: of the distance, of BM25, of the fusion, or the reranker's relevance."),
    ]
    distance: Annotated[
        float | None, Meta(description="Better when lower; the metric's own. Null for what only the words found.")
    ]
    text: Annotated[str | UnsetType, Meta(description="The passage; with `text` in `include`.")] = UNSET
    metadata: Annotated[
        dict[str, Any] | UnsetType, Meta(description="The chunk's metadata; with `metadata` in `include`.")
    ] = UNSET
    document: Annotated[
        HitDocument | UnsetType, Meta(description="About its document; with `document` in `include`.")
    ] = UNSET
    embedding: Annotated[
        list[float] | UnsetType | None, Meta(description="Its vector; with `embedding` in `include`.")
    ] = UNSET
    highlight: Annotated[
        str | UnsetType | None,
        Meta(description="The passage around the words, these in <mark>; with `highlight` in `include`."),
    ] = UNSET
    library: Annotated[str | UnsetType, Meta(description="The library it is in; in a search of several.")] = UNSET


class FacetValue(msgspec.Struct):
    """A value and how often it occurs."""

    value: Annotated[Any, Meta(description="The value, as it stands in the metadata.")]
    documents: Annotated[int, Meta(description="How many documents have it.")]


class Explanation(msgspec.Struct):
    """How a search was carried out."""

    strategy: Annotated[
        str,
        Meta(
            description="`index`, `exact` (few chunks match the filter, or there is no index), `index then exact` "
            "(the index did not come up with enough), or `words`."
        ),
    ]
    statement: Annotated[str, Meta(description="The SQL that was run.")]
    plan: Annotated[dict[str, Any], Meta(description="What EXPLAIN (ANALYZE, FORMAT JSON) says of it.")]
    rows_removed: Annotated[int, Meta(description="Rows that were looked at and did not match the filter.")]
    recall: Annotated[
        float | None,
        Meta(description="The share of the true nearest k that this search finds; null unless mode is vector."),
    ]


class SearchAnswer(msgspec.Struct):
    """What was found."""

    hits: Annotated[list[Hit], Meta(description="Best first; ties are in the order of the chunk ids.")]
    took_ms: Annotated[float, Meta(description="Milliseconds in the server, the embedding of the query included.")]
    cached: Annotated[
        bool, Meta(description="Whether this is the answer to an equal search before; nothing has changed since then.")
    ] = False
    total: Annotated[int | UnsetType, Meta(description="How many chunks match; with `total`.")] = UNSET
    facets: Annotated[
        dict[str, list[FacetValue]] | UnsetType,
        Meta(description="For each field of `facets` its values, most frequent first, as of the same moment."),
    ] = UNSET
    explain: Annotated[Explanation | UnsetType, Meta(description="How it was done; with `explain`.")] = UNSET


def check(data: Ranking, settings: Settings) -> None:
    """Refuse what no library could answer."""
    if data.query is not None:
        limits.required_text(data.query, settings.max_query_length, "query")
    if data.mode in ("text", "hybrid") and data.query is None:
        raise invalid("query", f"is required in mode {data.mode}")
    if data.rerank is not None and data.query is None:
        raise invalid("query", "is required for rerank")
    for name in ("max_distance", "min_score"):  # MessagePack can say NaN and infinity
        if (bound := getattr(data, name)) is not None and not math.isfinite(bound):
            raise invalid(name, "must be a finite number")
    if data.fusion is not None and not any(data.fusion.weights):
        raise invalid("fusion.weights", "must not both be zero")
    if data.k > settings.max_k:
        raise invalid("k", f"is {data.k}, at most {settings.max_k} is allowed")
    if data.offset > settings.max_offset:
        raise invalid(
            "offset", f"is {data.offset}, at most {settings.max_offset} is allowed; narrow the search instead"
        )


def check_one(data: SearchRequest, settings: Settings) -> None:
    """Refuse what makes no search of one library."""
    check(data, settings)
    if data.query is None and data.vector is None and data.like is None:
        raise invalid("query", "give at least one of query, vector and like")
    if data.vector is not None and data.like is not None:
        raise invalid("like", "cannot be combined with vector")
    if data.like is not None and (data.like.chunk is None) == (data.like.document is None):
        raise invalid("like", "give either chunk or document")
    if data.mmr is not None and data.group_by is not None:
        raise invalid("mmr", "cannot be combined with group_by: groups are diverse already")
