"""Embedding providers behind one small protocol: `embedder_for` gives the one that a library names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pgshelf.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["document", "query"]

PROVIDERS = ("local", "cohere", "openai", "sentence_transformers", "none")

OPTIONS = {"cohere": ("embedding_type", "truncate"), "openai": ("query_prefix", "document_prefix")}


class EmbedderError(Exception):
    """A provider gave no vectors; the message says why and holds no text of the caller's."""


class EmbedderFailed(EmbedderError):
    """The provider refused or broke, and asking again with the same texts will not help."""


class TextRefused(EmbedderFailed):
    """One text has no vector; `index` is its place in the batch, so that the others can be embedded without it."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class TextsRefused(EmbedderFailed):
    """The provider refuses a batch for what is in it, and does not say which text it was."""


class ModelUnknown(EmbedderFailed):
    """The provider has no such model."""


class EmbedderUnavailable(EmbedderError):
    """The provider cannot answer now; ask again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EmbedderTimeout(EmbedderUnavailable):
    """The provider did not answer in time."""


class EmbedderAway(EmbedderUnavailable):
    """The provider has been failing for everybody, and so it was not asked."""


class Embedder(Protocol):
    """Turns texts into vectors; equal texts give equal vectors, in whatever batch they come."""

    @property
    def provider(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def dimension(self) -> int: ...
    @property
    def options(self) -> Mapping[str, Any]:
        """What else the library chose, where it is not the default."""
        ...

    @property
    def batch(self) -> int:
        """How many texts it takes at a time; `pgshelf.embedding` splits what is more."""
        ...

    @property
    def cached(self) -> bool:
        """Whether its vectors are worth a place in the cache."""
        ...

    async def embed(self, texts: Sequence[str], kind: Kind) -> NDArray[np.float32]:
        """Embed texts into a float32 array of shape (n, dimension): finite rows of length 1.

        Raises TextRefused for a text without a vector, TextsRefused for a batch with such a text, EmbedderFailed,
        EmbedderUnavailable and EmbedderTimeout for the provider.
        """
        ...


def embedder_for(settings: Settings, choice: Mapping[str, Any]) -> Embedder:
    """The embedder of a choice, {"provider", "model", "dimension", ...}; what is absent is the provider's default.

    Raises ValueError saying what is missing where the provider cannot be used. Provider `none` has no embedder: its
    libraries bring vectors.
    """
    provider, model, dimension = choice["provider"], choice.get("model"), choice.get("dimension")
    if provider == "none":
        raise ValueError('provider "none" has no embedder: send vectors with the chunks and with the searches')
    if provider == "local":
        from pgshelf.embedders.local import LocalEmbedder

        return LocalEmbedder(model, dimension)
    if provider == "cohere":
        from pgshelf.embedders.cohere import CohereEmbedder

        return CohereEmbedder(settings, model, dimension, choice.get("embedding_type"), choice.get("truncate"))
    if provider in ("openai", "sentence_transformers"):
        if dimension is None:
            raise ValueError(f'the embedder "{provider}" needs a dimension')
        if provider == "openai":
            from pgshelf.embedders.openai import OpenAIEmbedder

            prefixes = choice.get("query_prefix") or "", choice.get("document_prefix") or ""
            return OpenAIEmbedder(settings, model or "", dimension, bool(choice.get("shortened")), *prefixes)
        from pgshelf.embedders import sentence_transformers

        return sentence_transformers.embedder_of(settings, model, dimension)
    raise ValueError(f"embedder provider must be one of {', '.join(PROVIDERS)}, not {provider[:80]!r}")


async def settled(settings: Settings, choice: Mapping[str, Any]) -> Embedder:
    """The embedder of a new library: a provider whose models are not known is asked for what the choice leaves open.

    Raises ValueError where the choice is impossible here, and EmbedderError where the provider had to be asked.
    """
    for name, value in choice.items():
        if value is not None and name not in ("provider", "model", "dimension", *OPTIONS.get(choice["provider"], ())):
            raise ValueError(f'the embedder "{choice["provider"]}" takes no {name}')
    if choice["provider"] == "openai":
        from pgshelf.embedders import openai

        return await openai.settled(settings, choice)
    if choice["provider"] == "sentence_transformers":
        from pgshelf.embedders import sentence_transformers

        return await sentence_transformers.settled(settings, choice)
    return embedder_for(settings, choice)


def described(embedder: Embedder) -> dict[str, Any]:
    """What a library keeps of its embedder, and `embedder_for` takes."""
    return {
        "provider": embedder.provider,
        "model": embedder.model,
        "dimension": embedder.dimension,
        **embedder.options,
    }


def matrix(provider: str, found: Any, count: int, width: int) -> NDArray[np.float64]:
    """What a provider answered, if it is an answer to what was asked: `count` lists of `width` numbers."""
    import numpy as np

    if not isinstance(found, list) or len(found) != count:
        raise EmbedderFailed(f"{provider}'s answer does not fit the texts: there is not one vector for each")
    if not all(isinstance(row, list) and all(type(number) in (int, float) for number in row) for row in found):
        raise EmbedderFailed(f"{provider}'s answer holds vectors that are not made of numbers")
    for row in found:
        if len(row) != width:
            raise EmbedderFailed(f"{provider}'s answer holds vectors of dimension {len(row)}, not {width}")
    try:
        return np.array(found, dtype=np.float64).reshape(count, width)
    except OverflowError:  # an integer of hundreds of digits
        raise EmbedderFailed(f"{provider}'s answer holds numbers out of range") from None


def unit(provider: str, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Rows made unit length; EmbedderFailed for one that has no direction."""
    import numpy as np

    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise EmbedderFailed(f"{provider}'s answer holds vectors that are zero or not finite")
    rows: NDArray[np.float32] = (vectors / lengths).astype(np.float32)
    return rows
