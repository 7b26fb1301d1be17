"""The embedder over sentence-transformers, against a module of its name with the same signatures.

The package itself comes with torch, gigabytes that no test here is worth. What stands in for it has the signatures of
version 6.2, for what is called here those of 5.0, and small vectors; it cannot tell what a real model does.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from pgshelf.embedders import EmbedderFailed, described, embedder_for, sentence_transformers, settled
from pgshelf.settings import Settings

MODELS = Settings(sentence_transformers_models="tiny, ./models/other")
CHOICE = {"provider": "sentence_transformers"}


class SentenceTransformer:
    """Vectors of four numbers; `prompts` as a model for search has them."""

    loaded: list[str] = []  # noqa: RUF012 - the fixture empties it
    threads: set[str] = set()  # noqa: RUF012 - likewise
    prompts = {"query": "query: ", "document": ""}  # noqa: RUF012 - nobody changes it

    def __init__(self, model_name_or_path: str | None = None, *, device: str | None = None, **_: Any) -> None:
        if model_name_or_path == "./models/other":
            raise OSError("no such file: /home/somebody/models/other")
        self.loaded.append(str(model_name_or_path))

    def encode_query(
        self,
        inputs: list[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        **_: Any,
    ) -> np.ndarray:
        return self._encode([self.prompts["query"] + text for text in inputs])

    def encode_document(
        self,
        inputs: list[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        **_: Any,
    ) -> np.ndarray:
        return self._encode([self.prompts["document"] + text for text in inputs])

    def _encode(self, inputs: list[str]) -> np.ndarray:
        self.threads.add(threading.current_thread().name)
        if "memory" in inputs:
            raise RuntimeError("CUDA out of memory")
        if "few" in inputs:
            return np.ones((1, 2), dtype=np.float32)
        return np.array([[len(text), 1, 2, 3] for text in inputs], dtype=np.float32)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[SentenceTransformer]]:
    """The package, installed."""
    module = ModuleType("sentence_transformers")
    module.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("sentence_transformers", loader=None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    SentenceTransformer.loaded.clear()
    SentenceTransformer.threads.clear()
    sentence_transformers._load.cache_clear()
    yield SentenceTransformer
    sentence_transformers._load.cache_clear()


def unit(*numbers: float) -> np.ndarray:
    return np.array(numbers) / np.linalg.norm(numbers)


async def test_queries_and_documents_have_the_prompts_of_the_model(package: type[SentenceTransformer]) -> None:
    embedder = await settled(MODELS, CHOICE)
    assert described(embedder) == {"provider": "sentence_transformers", "model": "tiny", "dimension": 4}
    embedder = embedder_for(MODELS, described(embedder))
    documents, queries = await embedder.embed(["ab", "abc"], "document"), await embedder.embed(["ab"], "query")
    np.testing.assert_allclose(documents, [unit(2, 1, 2, 3), unit(3, 1, 2, 3)], rtol=1e-6)
    np.testing.assert_allclose(queries, [unit(9, 1, 2, 3)], rtol=1e-6)
    assert documents.dtype == np.float32


async def test_the_model_is_loaded_once_in_a_thread_of_its_own(package: type[SentenceTransformer]) -> None:
    embedder = embedder_for(MODELS, {**CHOICE, "model": "tiny", "dimension": 4})
    assert package.loaded == []
    await asyncio.gather(*[embedder.embed(["a"], "query") for _ in range(8)])
    assert package.loaded == ["tiny"]
    assert len(package.threads) == 1 and "sentence-transformers" in package.threads.pop()


async def test_a_smaller_dimension_keeps_the_first_numbers(package: type[SentenceTransformer]) -> None:
    embedder = await settled(MODELS, {**CHOICE, "model": "tiny", "dimension": 2})
    np.testing.assert_allclose(await embedder.embed(["ab"], "document"), [unit(2, 1)], rtol=1e-6)
    with pytest.raises(ValueError, match="makes vectors of 4 numbers and cannot make 5"):
        await settled(MODELS, {**CHOICE, "dimension": 5})


@pytest.mark.parametrize(
    ("settings", "model", "message"),
    [
        (Settings(), "tiny", "needs PGSHELF_SENTENCE_TRANSFORMERS_MODELS"),
        (MODELS, "/etc", "must be one of tiny, ./models/other, not '/etc'"),
    ],
)
async def test_only_models_that_the_server_names(
    package: type[SentenceTransformer], settings: Settings, model: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        await settled(settings, {**CHOICE, "model": model})
    with pytest.raises(ValueError, match=message):
        embedder_for(settings, {**CHOICE, "model": model, "dimension": 4})


async def test_without_the_package_it_says_what_to_install() -> None:
    if importlib.util.find_spec("sentence_transformers"):
        pytest.fail("these tests are for an environment without the package")
    with pytest.raises(ValueError, match=r'pip install "pgshelf\[sentence-transformers\]"'):
        await settled(MODELS, CHOICE)


async def test_what_fails_in_the_model_is_a_failure_without_its_details(
    package: type[SentenceTransformer], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(EmbedderFailed, match=r"could not be loaded \(OSError\)$"):
        await settled(MODELS, {**CHOICE, "model": "./models/other"})
    assert "/home/somebody" in caplog.text  # the log says it
    embedder = embedder_for(MODELS, {**CHOICE, "model": "tiny", "dimension": 4})
    with pytest.raises(EmbedderFailed, match=r"failed \(RuntimeError\)$"):
        await embedder.embed(["memory"], "document")
    with pytest.raises(EmbedderFailed, match=r"an array of shape \(1, 2\) for 2 texts"):
        await embedder.embed(["few", "few"], "document")
