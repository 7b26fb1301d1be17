"""Cohere's embed API, version 2.

With `embedding_type` "binary" the vectors of documents come as one bit a number, far less traffic, and are unpacked to
plus and minus one. Queries are float in either case: an index of storage `bit` finds candidates by the signs of both
sides, and the distances of the float query to the signs of the documents rank these, which Cohere calls rescoring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pgshelf import cohere_api
from pgshelf.cohere_api import NAME
from pgshelf.embedders import (
    EmbedderFailed,
    EmbedderTimeout,
    EmbedderUnavailable,
    Kind,
    ModelUnknown,
    TextsRefused,
    matrix,
    unit,
)
from pgshelf.providers import RETRY_AFTER, Errors
from pgshelf.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

MODEL = "embed-v5.0-fast"
DIMENSION = 1024  # where a model leaves the choice; a vector of 2,048 numbers fits no page of PostgreSQL
MODELS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "embed-v5.0-fast": (256, 512, 768, 1024, 1536, 2048),
        "embed-v5.0-pro": (256, 512, 768, 1024, 1536, 2048),
        "embed-v4.0": (256, 512, 1024, 1536),
        "embed-english-v3.0": (1024,),
        "embed-multilingual-v3.0": (1024,),
        "embed-english-light-v3.0": (384,),
        "embed-multilingual-light-v3.0": (384,),
    }
)
INPUT_TYPES = {"document": "search_document", "query": "search_query"}
TRUNCATE = ("end", "start", "none")  # what of a text that is too long for the model is left out
EMBEDDING_TYPES = ("float", "binary")
ERRORS = Errors(
    EmbedderFailed,
    TextsRefused,
    ModelUnknown,
    EmbedderUnavailable,
    lambda message: EmbedderTimeout(message, RETRY_AFTER),
)


class CohereEmbedder:
    """One of Cohere's embedding models, of version 3 or newer."""

    provider = "cohere"
    batch = 96  # what Cohere takes at a time
    cached = True

    def __init__(
        self,
        settings: Settings,
        model: str | None = None,
        dimension: int | None = None,
        embedding_type: str | None = None,
        truncate: str | None = None,
    ) -> None:
        if settings.cohere_api_key is None:
            raise ValueError("embedding through Cohere needs PGSHELF_COHERE_API_KEY on the server")
        self.model = model or MODEL
        self.dimension = _dimension(self.model, dimension)
        self._type = _one_of("embedding_type", embedding_type, EMBEDDING_TYPES)
        self._truncate = _one_of("truncate", truncate, TRUNCATE)
        if self._type == "binary" and self.dimension % 8:
            raise ValueError(f"binary embeddings need a dimension that 8 divides, not {self.dimension}")
        self.options = {
            name: value
            for name, value, usual in (("embedding_type", self._type, "float"), ("truncate", self._truncate, "end"))
            if value != usual
        }
        self._settings = settings

    async def embed(self, texts: Sequence[str], kind: Kind) -> NDArray[np.float32]:
        """Embed at most 96 texts into unit vectors, array (n, dimension).

        429 and what passes by itself is tried again within PGSHELF_COHERE_TIMEOUT.
        """
        binary = self._type == "binary" and kind == "document"
        wanted: Literal["ubinary", "float"] = "ubinary" if binary else "float"
        request: dict[str, Any] = {
            "model": self.model,
            "texts": list(texts),
            "input_type": INPUT_TYPES[kind],
            "embedding_types": [wanted],
            "truncate": self._truncate.upper(),
        }
        if len(MODELS.get(self.model, (256, 512))) > 1:  # a model with one dimension refuses to be told
            request["output_dimension"] = self.dimension
        model = f'embedding model "{self.model}" for the server\'s key'
        answer = await cohere_api.ask(self._settings, model, ERRORS, lambda client: client.embed(**request))
        found = getattr(getattr(answer, "embeddings", None), "ubinary" if binary else "float_", None)
        if not binary:
            return unit(NAME, matrix(NAME, found, len(texts), self.dimension))
        packed = matrix(NAME, found, len(texts), self.dimension // 8)
        if not ((packed >= 0) & (packed < 256)).all():
            raise EmbedderFailed("Cohere's answer holds binary vectors that are not made of bytes")
        return unit(NAME, np.unpackbits(packed.astype(np.uint8), axis=1).astype(np.float32) * 2 - 1)


def _dimension(model: str, dimension: int | None) -> int:
    allowed = MODELS.get(model)
    if allowed is None:
        if dimension is None:
            known = ", ".join(MODELS)
            raise ValueError(f'model "{model[:80]}" of the embedder "cohere" needs a dimension; known are {known}')
        return dimension
    if dimension is not None and dimension not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ValueError(f'dimension of the model "{model}" must be one of {listed}, not {dimension}')
    return dimension or (DIMENSION if DIMENSION in allowed else allowed[0])


def _one_of(name: str, value: str | None, allowed: Sequence[str]) -> str:
    if value is not None and value not in allowed:
        raise ValueError(f'{name} of the embedder "cohere" must be one of {", ".join(allowed)}, not {value[:80]!r}')
    return value or allowed[0]
