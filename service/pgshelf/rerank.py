"""Reranking the hits of a search: what a request may ask for, and the problems that it may end in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import sqlalchemy
from msgspec import Meta

from pgshelf import circuits, providers
from pgshelf.errors import Problem, invalid
from pgshelf.rerankers import (
    ModelUnknown,
    Reranker,
    RerankerError,
    RerankerTimeout,
    RerankerUnavailable,
    reranker_for,
)
from pgshelf.settings import Settings
from pgshelf.timing import stage

CANDIDATES = 50


class RerankChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Who reads the best hits again, together with the query, and puts them in order."""

    provider: Annotated[
        Literal["cohere"],
        Meta(description="`cohere`: the query and the texts of the candidates are sent to Cohere's rerank API."),
    ]
    model: Annotated[
        Annotated[str, Meta(min_length=1, max_length=200, examples=["rerank-v5.0-pro"])] | None,
        Meta(description="A rerank model of the provider; `rerank-v5.0-fast` if absent."),
    ] = None
    candidates: Annotated[
        Annotated[int, Meta(ge=1, le=1000)] | None,
        Meta(
            description="The most hits that are reranked, k + offset at least; 50 if absent. "
            "PGSHELF_MAX_RERANK_CANDIDATES (100) is the limit."
        ),
    ] = None


def reach(settings: Settings, choice: RerankChoice, wanted: int) -> int:
    """How many hits to fetch so that `wanted`, k + offset, are left; a problem where the reranker cannot be used.

    To be asked before anything else is done for the search.
    """
    _reranker(settings, choice)
    limit = settings.max_rerank_candidates
    if (choice.candidates or 0) > limit:
        raise invalid("rerank.candidates", f"is {choice.candidates}, at most {limit} is allowed")
    if wanted > limit:
        raise invalid("rerank", f"at most {limit} hits are reranked, and k + offset is {wanted}; ask for fewer")
    return max(choice.candidates or min(CANDIDATES, limit), wanted)


async def rerank(
    engine: sqlalchemy.Engine, settings: Settings, choice: RerankChoice, query: str, texts: Sequence[str], top: int
) -> list[tuple[int, float]]:
    """The `top` texts most relevant to the query, best first, as (place in `texts`, relevance).

    Ties keep the order of `texts`. There are min(top, len(texts)) of them; no texts need no provider.
    """
    if not query.strip():
        raise invalid("rerank", "needs query: it is the text that the hits are compared with")
    reranker = _reranker(settings, choice)
    try:
        with (
            stage("rerank"),
            circuits.guarded(engine, settings, circuits.reranker(reranker)),
            providers.measured(choice.provider, "rerank", circuits.RERANKER.answers),
        ):
            return await reranker.rerank(query, texts, top)
    except ModelUnknown as error:
        raise _problem("reranker_not_configured", error) from error
    except RerankerUnavailable as error:
        raise _problem("reranker_unavailable", error, error.retry_after) from error
    except RerankerTimeout as error:
        raise _problem("reranker_timeout", error) from error
    except RerankerError as error:
        raise _problem("reranker_failed", error) from error


def _problem(code: str, error: RerankerError, retry_after: float | None = None) -> Problem:
    return Problem(code, f"{error}. Search without rerank works meanwhile.", retry_after=retry_after)


def _reranker(settings: Settings, choice: RerankChoice) -> Reranker:
    try:
        return reranker_for(settings, choice.provider, choice.model)
    except ValueError as error:
        raise Problem("reranker_not_configured", f"{error}.") from None
