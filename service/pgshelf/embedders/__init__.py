"""Embedding providers behind one small protocol: `embedder_for` gives the one that a library names."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["document", "query"]

PROVIDERS = ("local", "none")


class EmbedderError(Exception):
    """A provider gave no vectors; the message says why and holds no text of the caller's."""


class EmbedderFailed(EmbedderError):
    """The provider refused or broke, and asking again with the same texts will not help."""


class TextRefused(EmbedderFailed):
    """One text has no vector; `index` is its place in the batch, so that the others can be embedded without it."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class EmbedderUnavailable(EmbedderError):
    """The provider cannot answer now; ask again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Embedder(Protocol):
    """Turns texts into vectors; equal texts give equal vectors, in whatever batch they come."""

    @property
    def provider(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def dimension(self) -> int: ...

    async def embed(self, texts: Sequence[str], kind: Kind) -> NDArray[np.float32]:
        """Embed texts into a float32 array of shape (n, dimension): finite rows of length 1.

        Raises TextRefused for a text without a vector, EmbedderFailed and EmbedderUnavailable for the provider.
        """
        ...


@functools.cache
def embedder_for(provider: str, model: str | None = None, dimension: int | None = None) -> Embedder:
    """The embedder that a library asks for, the same object each time; None means the provider's default.

    Raises ValueError naming the allowed values. Provider `none` has no embedder: its libraries bring vectors.
    """
    if provider == "none":
        raise ValueError('provider "none" has no embedder: send vectors with the chunks and with the searches')
    if provider != "local":
        raise ValueError(f"embedder provider must be one of {', '.join(PROVIDERS)}, not {provider[:80]!r}")
    from pgshelf.embedders.local import LocalEmbedder

    return LocalEmbedder(model, dimension)
