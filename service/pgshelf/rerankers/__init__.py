"""Reranking providers behind one small protocol: `reranker_for` gives the one that a search names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pgshelf.settings import Settings

PROVIDERS = ("cohere",)


class RerankerError(Exception):
    """A provider gave no order; the message says why."""


class RerankerFailed(RerankerError):
    """The provider refused or broke, and asking again with the same texts will not help."""


class ModelUnknown(RerankerFailed):
    """The provider has no such model."""


class RefusedToRank(RerankerFailed):
    """The provider does not take what it was sent."""


class RerankerUnavailable(RerankerError):
    """The provider cannot answer now; ask again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RerankerTimeout(RerankerError):
    """The provider did not answer in time."""


class Reranker(Protocol):
    """Says how relevant texts are to a query, by reading both together."""

    @property
    def provider(self) -> str: ...
    @property
    def model(self) -> str: ...

    async def rerank(self, query: str, texts: Sequence[str], top: int) -> list[tuple[int, float]]:
        """The `top` most relevant texts, best first, as (place in `texts`, relevance); ties keep the order of `texts`.

        Relevance is finite and higher when better. Raises ModelUnknown, RerankerFailed, RerankerUnavailable and
        RerankerTimeout.
        """
        ...


def reranker_for(settings: Settings, provider: str, model: str | None = None) -> Reranker:
    """The reranker that a search asks for; without a model the provider's default.

    Raises ValueError saying what is missing where the provider cannot be used.
    """
    if provider != "cohere":
        raise ValueError(f"rerank provider must be one of {', '.join(PROVIDERS)}, not {provider[:80]!r}")
    if settings.cohere_api_key is None:
        raise ValueError("reranking through Cohere needs PGSHELF_COHERE_API_KEY on the server")
    from pgshelf.rerankers.cohere import CohereReranker

    return CohereReranker(settings, model)
