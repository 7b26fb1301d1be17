"""Cohere's rerank API, version 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pgshelf import cohere_api
from pgshelf.providers import Errors
from pgshelf.rerankers import ModelUnknown, RefusedToRank, RerankerFailed, RerankerTimeout, RerankerUnavailable
from pgshelf.settings import Settings

MODEL = "rerank-v5.0-fast"
MAX_TEXTS = 1000  # what Cohere recommends at most for one request
MAX_CHARACTERS = 20_000  # Cohere reads the first 4096 tokens of a text; what lies behind need not travel
ERRORS = Errors(RerankerFailed, RefusedToRank, ModelUnknown, RerankerUnavailable, RerankerTimeout)


class CohereReranker:
    """One of Cohere's rerank models; relevance is between 0 and 1."""

    provider = "cohere"

    def __init__(self, settings: Settings, model: str | None = None) -> None:
        self.model = model or MODEL
        self._settings = settings

    async def rerank(self, query: str, texts: Sequence[str], top: int) -> list[tuple[int, float]]:
        """The `top` most relevant of at most 1,000 texts, best first, as (place in `texts`, relevance).

        Of a text Cohere reads the first 4,096 tokens. 429 and what passes by itself is tried again within the timeout.
        """
        if len(texts) > MAX_TEXTS:
            raise ValueError(f"Cohere reranks at most {MAX_TEXTS} texts at a time, not {len(texts)}")
        if not texts or top < 1:
            return []
        sent, top_n = [text[:MAX_CHARACTERS] for text in texts], min(top, len(texts))
        answer = await cohere_api.ask(
            self._settings,
            f'rerank model "{self.model}" for the server\'s key',
            ERRORS,
            lambda client: client.rerank(model=self.model, query=query, documents=sent, top_n=top_n),
        )
        return _checked(answer, len(texts), top)


def _checked(answer: Any, count: int, top: int) -> list[tuple[int, float]]:
    """What Cohere answered, if it is an answer to what was asked."""
    found: list[tuple[Any, Any]] = [
        (getattr(item, "index", None), getattr(item, "relevance_score", None)) for item in _results(answer)
    ]
    ranked = [
        (index, float(score))
        for index, score in found
        if type(index) is int and 0 <= index < count and type(score) in (int, float) and math.isfinite(score)
    ]
    places = {index for index, _ in ranked}
    if not len(places) == len(ranked) == len(found) == min(top, count):
        raise RerankerFailed("Cohere's answer does not fit the texts: places or relevances are wrong, missing, double")
    return sorted(ranked, key=lambda item: (-item[1], item[0]))


def _results(answer: Any) -> list[Any]:
    results = getattr(answer, "results", None)
    return results if isinstance(results, list) else []
