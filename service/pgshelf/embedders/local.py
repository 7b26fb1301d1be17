"""The local embedder: WordLlama's token table out of its wheel, averaged; no network, no key, no GPU.

A text is read whole, however long: nothing is cut off, but the mean over thousands of tokens says little. The order of
words does not count. Documents and queries are embedded alike.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pgshelf.embedders import EmbedderFailed, Kind, TextRefused

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

MODEL = "wordllama-l2-supercat"
DIMENSION = 256
DIMENSIONS = (64, 128, 256)  # trained so that the first 64 and 128 numbers of a vector are vectors by themselves

INLINE_CHARACTERS = 500  # up to here the work costs less than handing it to a thread
TOKENS_AT_ONCE = 8192  # 8 MB of gathered rows, however long a text is
TEXTS_AT_ONCE = 64

_WEIGHTS = Path("weights", "l2_supercat_256.safetensors")
_TOKENIZER = Path("tokenizers", "l2_supercat_tokenizer_config.json")
_loading = threading.Lock()


class Model(NamedTuple):
    """A tokenizer and one row of 256 numbers for each of its 32,000 tokens."""

    tokenizer: Tokenizer
    table: NDArray[np.float32]


class LocalEmbedder:
    """WordLlama l2_supercat in 256, 128 or 64 dimensions; the model is loaded at first use, once per process."""

    provider = "local"
    options: Mapping[str, Any] = MappingProxyType({})
    batch = sys.maxsize
    cached = False  # a lookup would take longer

    def __init__(self, model: str | None = None, dimension: int | None = None) -> None:
        if model not in (None, MODEL):
            raise ValueError(f'model of the embedder "local" must be "{MODEL}", not {model[:80]!r}')
        if dimension is not None and dimension not in DIMENSIONS:
            allowed = ", ".join(map(str, DIMENSIONS))
            raise ValueError(f'dimension of the embedder "local" must be one of {allowed}, not {dimension}')
        self.model = MODEL
        self.dimension = dimension or DIMENSION

    async def embed(self, texts: Sequence[str], kind: Kind) -> NDArray[np.float32]:
        """Embed texts into unit vectors, array (n, dimension); `kind` makes no difference to this model.

        Raises TextRefused for an empty text and for one that is no valid Unicode (blank, NUL and unknown characters
        do have vectors), EmbedderFailed when the installed wordllama lacks its model.
        """
        if _model.cache_info().currsize and sum(map(len, texts)) <= INLINE_CHARACTERS:
            return self._embed(texts)
        return await asyncio.to_thread(self._embed, texts)

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        model = load()
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            tokens = _tokens(model.tokenizer, texts[start : start + TEXTS_AT_ONCE], start)
            for index, ids in enumerate(tokens, start):
                total = _sum_of_rows(model.table, ids, self.dimension)
                length = np.sqrt(total @ total)
                if not length:
                    raise TextRefused("text has no meaning to this model: its vector would be zero", index)
                vectors[index] = total / length  # the sum points where the mean points
        return vectors


def load() -> Model:
    """The model, loaded now unless it is there already (a fifth of a second); safe from several threads at once."""
    with _loading:
        return _model()


@functools.cache
def _model() -> Model:
    # Its two files are read without importing wordllama, which configures the root logger and imports an HTTP client.
    from safetensors import SafetensorError, safe_open
    from tokenizers import Tokenizer

    package = importlib.util.find_spec("wordllama")
    if package is None or package.origin is None:
        raise EmbedderFailed("the package wordllama is not installed; reinstall pgshelf")
    folder = Path(package.origin).parent
    try:
        with safe_open(folder / _WEIGHTS, framework="numpy") as weights:
            table = np.ascontiguousarray(weights.get_tensor("embedding.weight"), dtype=np.float32)
        tokenizer = Tokenizer.from_buffer((folder / _TOKENIZER).read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise EmbedderFailed("the installed wordllama lacks its model; install wordllama 0.4 again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Model(tokenizer, table)


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], offset: int) -> list[list[int]]:
    for index, text in enumerate(texts, offset):
        if not text:
            raise TextRefused("an empty text has no vector", index)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextRefused(f"text is no valid Unicode: a lone surrogate at character {error.start}", index) from None
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _sum_of_rows(table: NDArray[np.float32], ids: list[int], dimension: int) -> NDArray[np.float64]:
    total = np.zeros(dimension, dtype=np.float64)
    for start in range(0, len(ids), TOKENS_AT_ONCE):
        total += table[ids[start : start + TOKENS_AT_ONCE], :dimension].sum(axis=0)
    return total
