"""One search, carried out: check, make a vector of the question, call pgshelf.search*, shape the hits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import psycopg
import sqlalchemy
from msgspec import UNSET
from pgvector import Vector
from prometheus_client import Counter
from psycopg.types.json import Jsonb

from pgshelf import database, filters, limits
from pgshelf.connections import Connection
from pgshelf.embedding import asked_again, embed, known_embedders
from pgshelf.errors import Problem
from pgshelf.query_cache import QueryCache, States
from pgshelf.rerank import reach, rerank
from pgshelf.search_forms import (
    Explanation,
    FacetValue,
    Fusion,
    Hit,
    HitDocument,
    Like,
    Mode,
    Part,
    Ranking,
    SearchAnswer,
    SearchRequest,
    check_one,
)
from pgshelf.settings import Settings
from pgshelf.timing import note, stage


class Question(msgspec.Struct):
    """A checked request: everything but the library that the statement needs."""

    mode: Mode
    vector: Vector | None
    query: str | None
    filter: Jsonb | None
    own_filter: Jsonb | None  # as it was sent, without what `like` adds
    embedder: Jsonb | None = None  # that made the vector: PS041 when the library has another one by then
    state: int | None = None  # of the library when it was asked what decided this, if it was


# The functions of sql/ that search, by mode.
CALLS: dict[str, str] = {
    "vector": """pgshelf.search(pgshelf.embedded_by(%s, %s), %b, k => %s, "offset" => %s, max_distance => %s,
      min_score => %s, include => %s, filter => %s, exact => %s, ef_search => %s,
      group_by => %s, group_size => %s, mmr_lambda => %s, mmr_candidates => %s)""",
    "text": """pgshelf.search_text(%s, %s, k => %s, "offset" => %s, min_score => %s, include => %s, filter => %s,
      group_by => %s, group_size => %s, mmr_lambda => %s, mmr_candidates => %s)""",
    "hybrid": """pgshelf.search_hybrid(pgshelf.embedded_by(%s, %s), %s, %b, k => %s, "offset" => %s,
      max_distance => %s, min_score => %s, include => %s, filter => %s, exact => %s, ef_search => %s,
      fusion => %s, fusion_k => %s, weights => %s, candidates => %s,
      group_by => %s, group_size => %s, mmr_lambda => %s, mmr_candidates => %s)""",
}
# the state stands in one statement with the search, hence in one snapshot; where no answers are kept none is asked for;
# the strategy is asked behind the search, which sets it
PLAIN = """select h.*, current_setting('pgshelf.strategy', true), s.state
  from pgshelf.search_state(%s) s(state) left join {call} h on true"""
# facets and total, too
BESIDE = """with h as materialized (select x.*, row_number() over () as place from {call} x),
  e as materialized (select case when %s then pgshelf.total_hits(%s, %s, %s) end as total,
    (select jsonb_object_agg(a.name, coalesce((select jsonb_agg(jsonb_build_object('value', f.value,
        'documents', f.documents)) from pgshelf.facets(%s, array[a.name], %s, 10) f), '[]'))
      from unnest(%s::text[]) a(name)) as facets, pgshelf.search_state(%s) as state)
  select h.*, e.total, e.facets, current_setting('pgshelf.strategy', true), e.state
  from e left join h on true order by h.place"""
EMBEDDER = "select l.embedder, pgshelf.search_state(%s) from pgshelf.library_named(%s) l"
LIKE = """select v.*, l.embedder, pgshelf.search_state(%s)
from pgshelf.library_named(%s) l, pgshelf.vector_of(l.id::text, %s, %s) v"""
UNUSABLE = {"PS011": "zero_vector", "PS012": "invalid_vector"}  # a vector without a direction, or next to none
SEARCHES = Counter("pgshelf_searches", "Searches, and the way that their statement went.", ["mode", "strategy"])
EXPLAIN = """select pgshelf.explain_search(pgshelf.embedded_by(%s, %s), %b, %s, k => %s, "offset" => %s, filter => %s,
  exact => %s, ef_search => %s)"""


async def search(
    reader: database.Source,
    settings: Settings,
    cache: QueryCache,
    library: str,
    data: SearchRequest,
    control: str | None = None,
) -> SearchAnswer:
    """Search one library; `control` is the request's Cache-Control."""
    started = time.perf_counter()
    check_one(data, settings)
    wide = widened(data, settings)

    async def asked() -> tuple[SearchAnswer, States | None]:
        question = await ask(reader, settings, library, wide)

        async def work(connection: Connection) -> tuple[SearchAnswer, int | None]:
            return await _answer(connection, library, wide, question, kept(settings, library))

        try:
            answer, state = await database.retried(reader, work, single=not data.explain)
        except psycopg.Error as error:
            if data.like is None or data.like.document is None or error.sqlstate not in UNUSABLE:
                raise
            raise Problem(
                UNUSABLE[error.sqlstate],
                "The document has no usable mean vector: those of its chunks are zero or cancel each other out. "
                "Give `like` one of its chunks instead.",
            ) from error
        # what the question says of the library must hold in the snapshot of the search, too
        return answer, [state] if question.state in (None, state) else None

    async def find() -> tuple[SearchAnswer, States | None]:
        answer, states = await asked_again(asked)
        if data.rerank is not None:
            answer.hits = await reranked(database.primary(reader), settings, data, answer.hits)
        return answer, states

    answer = await cache.answer([library], data, "no-store" if data.explain else control, find, SearchAnswer)
    answer.took_ms = milliseconds(started)
    return answer


def milliseconds(started: float) -> float:
    """Since a moment of `time.perf_counter`."""
    return round((time.perf_counter() - started) * 1000, 3)


def widened(data: Ranking, settings: Settings) -> Any:
    """The request that fetches what a reranker shall read: more hits, with their texts.

    Grouped, the documents that are wanted have room for as many hits each as can be read; more documents fill the rest.
    """
    if data.rerank is None:
        return data
    wanted = data.k + data.offset
    texts = reach(settings, data.rerank, wanted)
    wide = msgspec.structs.replace(data, k=texts, offset=0, include=[*data.include, "text"], min_score=None)
    if isinstance(wide, SearchRequest) and wide.group_by is not None:
        wide.group_size = min(wide.group_size, texts // wanted)
    return wide


async def reranked(engine: sqlalchemy.Engine, settings: Settings, data: Ranking, hits: list[Hit]) -> list[Hit]:
    """What is wanted of hits, as many as `widened` asked for, in the reranker's order; their score is its relevance,
    which min_score then means."""
    choice, query, wanted = data.rerank, data.query or "", data.k + data.offset
    assert choice is not None  # noqa: S101 - narrows the type: the caller looked
    hits = hits[: reach(settings, choice, wanted)]
    grouped = isinstance(data, SearchRequest) and data.group_by is not None
    top = len(hits) if grouped else wanted
    order = await rerank(engine, settings, choice, query, [str(hit.text) for hit in hits], top)
    found = [msgspec.structs.replace(hits[place], score=relevance) for place, relevance in order]
    if data.min_score is not None:
        found = [hit for hit in found if hit.score >= data.min_score]
    if "text" not in data.include:
        found = [msgspec.structs.replace(hit, text=UNSET) for hit in found]
    groups = dict[Any, list[Hit]]()  # in the order of the best hit of each: a document, or a hit alone
    for each in found:
        groups.setdefault(each.document_id if grouped else each.chunk_id, []).append(each)
    return [each for group in list(groups.values())[data.offset : wanted] for each in group]


async def ask(reader: database.Source, settings: Settings, library: str, data: SearchRequest) -> Question:
    """Decide the mode, and find or make the vector."""
    own = parameter = filters.parameter(data.filter, settings)
    vector = limits.vector(data.vector, "vector") if data.vector is not None else None
    maker: Jsonb | None = None
    state: int | None = None
    if data.like is not None:
        vector, itself, maker, state = await _like(reader, settings, library, data.like)
        parameter = Jsonb(filters.narrowed(data.filter, itself))
    mode: Mode = data.mode or ("vector" if data.query is None else "hybrid")
    if mode == "text":
        return Question(mode, None, data.query, parameter, own, state=state)
    if vector is None:
        known = known_embedders(reader)
        if (embedder := known.get(library)) is None:
            embedder, state = (await database.run(reader, EMBEDDER, kept(settings, library), library))[0]
            if embedder["provider"] != "none":
                known[library] = embedder
            elif data.mode is None:
                return Question("text", None, data.query, parameter, own, state=state)
        vector = (await embed(database.primary(reader), settings, embedder, [data.query or ""], "query", ["query"]))[0]
        maker = Jsonb(embedder)
    return Question(mode, vector, data.query, parameter, own, maker, state)


def kept(settings: Settings, library: str) -> str | None:
    """The library whose state a statement shall tell: none where no answers are kept."""
    return library if settings.cache_bytes else None


async def _like(
    reader: database.Source, settings: Settings, library: str, like: Like
) -> tuple[Vector, dict[str, Any], Jsonb, int | None]:
    """The vector of a chunk or a document, the filter that keeps it from being its own best hit, who made it, and the
    state of the library."""
    rows = await database.run(reader, LIKE, kept(settings, library), library, like.chunk, like.document)
    vector, document, ordinal, embedder, state = rows[0]
    others: dict[str, Any] = {"$id": {"$ne": str(document)}}
    if ordinal is not None:
        others = {"$not": {"$id": str(document), "chunk.$ordinal": ordinal}}
    return vector, others, Jsonb(embedder), state


def call(library: Any, data: Ranking, question: Question) -> tuple[str, list[Any]]:
    """The call of the function that searches, and its parameters."""
    grouping: list[Any] = [None, 1, None, None]
    if isinstance(data, SearchRequest):
        mmr = data.mmr
        grouping = [data.group_by, data.group_size, mmr.weight if mmr else None, mmr.candidates if mmr else None]
    window, include, fusion = [data.k, data.offset], list(data.include), data.fusion or Fusion()
    if question.mode == "text":
        rest = [data.min_score, include, question.filter]
        return CALLS["text"], [library, question.query, *window, *rest, *grouping]
    bounds = [data.max_distance, data.min_score, include, question.filter, data.exact, data.ef_search]
    if question.mode == "vector":
        return CALLS["vector"], [library, question.embedder, question.vector, *window, *bounds, *grouping]
    fused = [fusion.method, fusion.k, [float(weight) for weight in fusion.weights], fusion.candidates]
    given = [library, question.embedder, question.query, question.vector, *window]
    return CALLS["hybrid"], [*given, *bounds, *fused, *grouping]


async def _answer(
    connection: Connection, library: str, data: SearchRequest, question: Question, state_of: str | None
) -> tuple[SearchAnswer, int | None]:
    """What was found, and the state of a library in the same snapshot."""
    statement, parameters = call(library, data, question)
    answer = SearchAnswer([], 0.0)
    if data.total or data.facets:
        words = question.query if question.mode == "text" else None
        beside = [data.total, library, question.filter, words, library, question.own_filter, data.facets, state_of]
        rows = await database.rows(connection, BESIDE.replace("{call}", statement), *parameters, *beside)
        total, facets = rows[0][-4:-2]
        answer.total = total if data.total else UNSET
        if data.facets:
            answer.facets = msgspec.convert(facets, dict[str, list[FacetValue]])
    else:
        rows = await database.rows(connection, PLAIN.replace("{call}", statement), state_of, *parameters)
    searched(question.mode, question.filter is not None, data.k, rows[0][-2] or "words")
    with stage("encode"):
        answer.hits = [hit(row, data.include) for row in rows if row[0] is not None]
    if data.explain:
        answer.explain = await _explain(connection, library, data, question)
    return answer, rows[0][-1]


def searched(mode: Mode, filtered: bool, k: int, strategy: str) -> None:
    """Count a search, and note for the log how it was done."""
    SEARCHES.labels(mode, strategy).inc()
    note(mode=mode, strategy=strategy, filtered=str(filtered).lower(), k=str(k))


async def _explain(connection: Connection, library: str, data: SearchRequest, question: Question) -> Explanation:
    words = None if question.mode == "vector" else question.query
    window = [data.k, data.offset, question.filter, data.exact, data.ef_search]
    rows = await database.rows(connection, EXPLAIN, library, question.embedder, question.vector, words, *window)
    return msgspec.convert(rows[0][0], Explanation)


def hit(row: Sequence[Any], include: Sequence[Part]) -> Hit:
    """A row of pgshelf.search* as a hit, with the parts asked for."""
    found = Hit(*row[:6])
    if "text" in include:
        found.text = row[6]
    if "metadata" in include:
        found.metadata = row[7]
    if "document" in include:
        found.document = HitDocument(*row[8:11])
    if "embedding" in include:
        found.embedding = None if row[11] is None else row[11].to_list()
    if "highlight" in include:
        found.highlight = row[12]
    return found
