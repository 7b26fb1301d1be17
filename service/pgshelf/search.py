"""Search: decode, embed the text if there is no vector, run the one statement, encode."""

from __future__ import annotations

import math
import time
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from litestar import Router, post
from litestar.params import JSONBody
from msgspec import UNSET, Meta, UnsetType
from pgvector import Vector

from pgshelf import database, limits
from pgshelf.embedding import embed, library_config
from pgshelf.errors import Problem, invalid
from pgshelf.http import Config, Engine, LibraryName, problems
from pgshelf.settings import Settings

Part = Literal["text", "metadata", "document", "embedding"]


class SearchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """What to look for: either `query`, which the library's embedder turns into a vector, or `vector`."""

    query: Annotated[
        Annotated[str, Meta(min_length=1, examples=["how do I reclaim space"])] | None,
        Meta(description="A text, at most PGSHELF_MAX_QUERY_LENGTH (10000) characters; needs an embedder."),
    ] = None
    vector: Annotated[
        Annotated[list[float], Meta(min_length=1, max_length=16000)] | bytes | None,
        Meta(description="Numbers, or their little-endian float32 bytes (base64 in JSON), of the library's dimension."),
    ] = None
    mode: Annotated[
        Literal["vector", "text", "hybrid"] | None,
        Meta(description="`vector` if absent; `text` and `hybrid` answer 422 mode_unavailable in this version."),
    ] = None
    k: Annotated[
        Annotated[int, Meta(ge=1)], Meta(description="How many hits at most; PGSHELF_MAX_K (1000) is the limit.")
    ] = 10
    offset: Annotated[
        Annotated[int, Meta(ge=0)], Meta(description="How many hits to skip; PGSHELF_MAX_OFFSET (10000) is the limit.")
    ] = 0
    max_distance: Annotated[float | None, Meta(description="Leave out hits farther away than this.")] = None
    min_score: Annotated[float | None, Meta(description="Leave out hits with a lower score.")] = None
    include: Annotated[
        list[Part],
        Meta(description="What each hit carries.", extra_json_schema={"default": ["text", "metadata", "document"]}),
    ] = msgspec.field(default_factory=lambda: ["text", "metadata", "document"])
    exact: Annotated[bool, Meta(description="Every search is exact in this version, whatever is sent.")] = True


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
    score: Annotated[float, Meta(description="Better when higher, whatever the metric.")]
    distance: Annotated[float, Meta(description="Better when lower; the metric's own.")]
    text: Annotated[str | UnsetType, Meta(description="The passage; with `text` in `include`.")] = UNSET
    metadata: Annotated[
        dict[str, Any] | UnsetType, Meta(description="The chunk's metadata; with `metadata` in `include`.")
    ] = UNSET
    document: Annotated[
        HitDocument | UnsetType, Meta(description="About its document; with `document` in `include`.")
    ] = UNSET
    embedding: Annotated[list[float] | UnsetType, Meta(description="Its vector; with `embedding` in `include`.")] = (
        UNSET
    )


class SearchAnswer(msgspec.Struct):
    """What was found."""

    hits: Annotated[list[Hit], Meta(description="Best first; ties are in the order of the chunk ids.")]
    took_ms: Annotated[float, Meta(description="Milliseconds in the server, the embedding of the query included.")]


# the statement that pgshelf.search executes, by calling it
STATEMENT = """select * from pgshelf.search(
  %s, %b, k => %s, "offset" => %s, max_distance => %s, min_score => %s, include => %s)"""


@post(
    "/libraries/{library:str}/search",
    status_code=200,
    responses=problems(404, 413, 415, 422, 502),
    response_description="The hits, maybe none",
    summary="Search a library",
    operation_id="search",
)
async def search(library: LibraryName, data: JSONBody[SearchRequest], engine: Engine, settings: Config) -> SearchAnswer:
    """Find the chunks nearest to a text or a vector, exactly."""
    started = time.perf_counter()
    _check(data, settings)
    if data.vector is not None:
        vector = limits.vector(data.vector, "vector")
    else:
        vector = await _embed(library, data.query or "", engine)
    rows = await database.run(
        engine, STATEMENT, library, vector, data.k, data.offset, data.max_distance, data.min_score, list(data.include)
    )
    hits = [_hit(row, data.include) for row in rows]
    return SearchAnswer(hits, round((time.perf_counter() - started) * 1000, 3))


async def _embed(library: str, query: str, engine: Engine) -> Vector:
    config = await library_config(engine, library)
    return (await embed(config.embedder, [query], "query", ["query"]))[0]


def _check(data: SearchRequest, settings: Settings) -> None:
    if data.mode in ("text", "hybrid"):
        raise Problem("mode_unavailable", f'mode {data.mode} is not available yet; leave it out, or use "vector".')
    if (data.query is None) == (data.vector is None):
        raise invalid("query", "give either query or vector")
    if data.query is not None:
        limits.required_text(data.query, settings.max_query_length, "query")
    for name in ("max_distance", "min_score"):  # MessagePack can say NaN and infinity
        if (bound := getattr(data, name)) is not None and not math.isfinite(bound):
            raise invalid(name, "must be a finite number")
    if data.k > settings.max_k:
        raise invalid("k", f"is {data.k}, at most {settings.max_k} is allowed")
    if data.offset > settings.max_offset:
        raise invalid(
            "offset", f"is {data.offset}, at most {settings.max_offset} is allowed; narrow the search instead"
        )


def _hit(row: tuple[Any, ...], include: list[Part]) -> Hit:
    hit = Hit(*row[:6])
    if "text" in include:
        hit.text = row[6]
    if "metadata" in include:
        hit.metadata = row[7]
    if "document" in include:
        hit.document = HitDocument(*row[8:11])
    if "embedding" in include:
        hit.embedding = row[11].to_list()
    return hit


router = Router("/", route_handlers=[search], tags=["search"])
