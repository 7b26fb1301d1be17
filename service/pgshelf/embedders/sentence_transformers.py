"""Models of sentence-transformers in this process; `pip install "pgshelf[sentence-transformers]"` brings the package.

The server says which models there are: loading one takes memory, may download it, and reads files that
are not only data. A text that is longer than its model reads is cut off at the end.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from pgshelf.embedders import EmbedderFailed, Kind, unit
from pgshelf.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "The model"
log = logging.getLogger("pgshelf.embedding")
# One thread: a model uses all cores by itself, and shall keep no other work from the threads of the event loop.
_thread = ThreadPoolExecutor(1, thread_name_prefix="pgshelf-sentence-transformers")


class SentenceTransformersEmbedder:
    """One of PGSHELF_SENTENCE_TRANSFORMERS_MODELS, loaded at first use; a smaller dimension keeps the first numbers."""

    provider = "sentence_transformers"
    options: Mapping[str, Any] = MappingProxyType({})
    batch = 32
    cached = True

    def __init__(self, model: str, dimension: int) -> None:
        self.model = model
        self.dimension = dimension

    async def embed(self, texts: Sequence[str], kind: Kind) -> NDArray[np.float32]:
        """Embed texts into unit vectors, array (n, dimension), with the model's own prompts for either kind."""
        found = await asyncio.get_running_loop().run_in_executor(_thread, _encode, self.model, list(texts), kind)
        if found.ndim != 2 or len(found) != len(texts) or found.shape[1] < self.dimension:
            raise EmbedderFailed(f"{NAME} made an array of shape {found.shape} for {len(texts)} texts")
        return unit(NAME, found[:, : self.dimension])


def embedder_of(settings: Settings, model: str | None, dimension: int) -> SentenceTransformersEmbedder:
    """The embedder of a library; ValueError where this server lacks the package or the model."""
    return SentenceTransformersEmbedder(_allowed(settings, model), dimension)


async def settled(settings: Settings, choice: Mapping[str, Any]) -> SentenceTransformersEmbedder:
    """The embedder of a new library; the model is loaded to learn its dimension. Raises ValueError, EmbedderFailed."""
    model, dimension = _allowed(settings, choice.get("model")), choice.get("dimension")
    found = await asyncio.get_running_loop().run_in_executor(_thread, _encode, model, ["text"], "document")
    own = int(found.shape[1])
    if dimension is not None and dimension > own:
        raise ValueError(f'model "{model}" makes vectors of {own} numbers and cannot make {dimension}')
    return SentenceTransformersEmbedder(model, dimension or own)


def _allowed(settings: Settings, model: str | None) -> str:
    models = [name.strip() for name in (settings.sentence_transformers_models or "").split(",") if name.strip()]
    if not models:
        raise ValueError(
            'the embedder "sentence_transformers" needs PGSHELF_SENTENCE_TRANSFORMERS_MODELS on the server'
        )
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError('the server lacks a package: pip install "pgshelf[sentence-transformers]"')
    if model is not None and model not in models:
        listed = ", ".join(models)
        raise ValueError(f'model of the embedder "sentence_transformers" must be one of {listed}, not {model[:80]!r}')
    return model or models[0]


@functools.cache
def _load(model: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(model)


def _encode(model: str, texts: list[str], kind: Kind) -> NDArray[np.float32]:
    """In the thread of the models: load the model at its first use, and let it encode."""
    try:
        loaded = _load(model)
    except Exception as error:  # files, network, configuration: the package names no tree of errors
        log.warning("the model %s could not be loaded", model, exc_info=True)
        raise EmbedderFailed(f'the model "{model}" could not be loaded ({type(error).__name__})') from error
    encode = loaded.encode_query if kind == "query" else loaded.encode_document
    try:
        found: NDArray[np.float32] = np.asarray(encode(texts, show_progress_bar=False), dtype=np.float32)
    except Exception as error:  # such as memory of a GPU
        log.warning("the model %s failed", model, exc_info=True)
        raise EmbedderFailed(f'the model "{model}" failed ({type(error).__name__})') from error
    return found
