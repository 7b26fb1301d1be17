"""The local embedder: real vectors from the installed model, and clear errors for what has none."""

import asyncio
import importlib.util
import inspect
import json
import logging
import subprocess
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgshelf.embedders import (
    EmbedderError,
    EmbedderFailed,
    EmbedderUnavailable,
    TextRefused,
    described,
    embedder_for,
    local,
)
from pgshelf.settings import Settings


def embed(*texts, dimension=256, kind="document"):
    return asyncio.run(local.LocalEmbedder(None, dimension).embed(texts, kind))


@pytest.fixture
def no_model_yet():
    """As in a process that has embedded nothing so far."""
    local._model.cache_clear()
    yield
    local._model.cache_clear()


@pytest.mark.parametrize("dimension", local.DIMENSIONS)
def test_vectors_are_unit_float32_rows_of_the_dimension_asked_for(dimension):
    vectors = embed("PostgreSQL keeps data", "a cat sleeps", "x" * 20_000, dimension=dimension)
    assert vectors.shape == (3, dimension)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_meaning_decides_which_vectors_are_near():
    query, near, far = embed(
        "reading a file from disk", "open files and read their content", "a cat sleeps on the sofa"
    )
    assert query @ near > query @ far + 0.2


def test_smaller_dimensions_are_the_beginning_of_the_larger():
    whole, half = embed("some text", dimension=256)[0], embed("some text", dimension=128)[0]
    np.testing.assert_allclose(half, whole[:128] / np.linalg.norm(whole[:128]), atol=1e-6)


def test_vectors_equal_those_of_wordllama_itself():
    texts = ["how do I parse command line arguments", "Ünïcödé 漢字 🎉", "one\ntwo\n\n  three", "x" * 500]
    code = """
import json, pathlib, sys, wordllama
model = wordllama.WordLlama.load(cache_dir=pathlib.Path(wordllama.__file__).parent, disable_download=True)
json.dump(model.embed(json.load(sys.stdin), norm=True).tolist(), sys.stdout)
"""

    answer = subprocess.run([sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    np.testing.assert_allclose(embed(*texts), np.array(json.loads(answer.stdout)), atol=1e-5)


def test_a_text_has_the_same_vector_in_every_batch():
    texts = [f"text number {n} " * (n % 7 + 1) for n in range(200)]
    together = embed(*texts)
    assert all(np.array_equal(together[n], embed(texts[n])[0]) for n in (0, 1, 63, 64, 65, 199))


def test_long_texts_are_read_to_their_end():
    start = "bread " * (local.TOKENS_AT_ONCE + 10)
    assert not np.array_equal(embed(start)[0], embed(start + "database " * 5000)[0])


def test_no_texts_give_no_rows():
    assert embed().shape == (0, 256)


@pytest.mark.parametrize("text", ["\u200b", " ", "\n\t", "🎉", "\x00", "a\x00b", "\U0010ffff", "</s>", "<unk>", "▁"])
def test_blank_and_unknown_characters_have_vectors_too(text):
    assert np.isclose(np.linalg.norm(embed(text)[0]), 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4))
def test_every_text_has_a_finite_unit_vector(texts):
    vectors = embed(*texts)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_every_token_of_the_model_has_a_row_that_is_not_zero():
    for dimension in local.DIMENSIONS:
        assert (np.linalg.norm(local.load().table[:, :dimension], axis=1) > 0).all()


@pytest.mark.parametrize(("text", "why"), [("", "empty"), ("a\ud800b", "lone surrogate at character 1")])
def test_a_text_without_a_vector_is_refused_by_its_place(text, why):
    with pytest.raises(TextRefused, match=why) as caught:
        embed(*["fine"] * 70, text, "fine")
    assert caught.value.index == 70


def test_a_text_whose_tokens_cancel_out_is_refused(monkeypatch):
    real = local.load()
    monkeypatch.setattr(local, "load", lambda: local.Model(real.tokenizer, np.zeros_like(real.table)))
    with pytest.raises(TextRefused, match="zero") as caught:
        embed("anything")
    assert caught.value.index == 0


def test_embedders_say_what_they_are():
    whole = {"provider": "local", "model": "wordllama-l2-supercat", "dimension": 256}
    assert described(embedder_for(Settings(), {"provider": "local"})) == whole
    assert described(embedder_for(Settings(), {**whole, "dimension": 64})) == {**whole, "dimension": 64}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"provider": "none"}, "send vectors"),
        ({"provider": "other"}, "one of local, cohere, openai, sentence_transformers, none, not 'other'"),
        ({"provider": "local", "model": "gpt-2"}, "\"wordllama-l2-supercat\", not 'gpt-2'"),
        ({"provider": "local", "dimension": 384}, "one of 64, 128, 256, not 384"),
        ({"provider": "local", "dimension": 0}, "one of 64, 128, 256, not 0"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(choice, message):
    with pytest.raises(ValueError, match=message):
        embedder_for(Settings(), choice)


def test_the_model_is_loaded_once_by_many_threads(no_model_yet):
    threads = [threading.Thread(target=local.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert local._model.cache_info().misses == 1


async def test_the_event_loop_runs_on_while_the_model_loads_and_while_a_batch_is_embedded(no_model_yet, monkeypatch):
    seen = []
    real = local.LocalEmbedder._embed

    def noted(self, texts):
        seen.append(threading.current_thread() is threading.main_thread())
        return real(self, texts)

    monkeypatch.setattr(local.LocalEmbedder, "_embed", noted)
    embedder = local.LocalEmbedder()
    await embedder.embed(["short"], "query")
    await embedder.embed(["short"], "query")
    await embedder.embed(["a batch"] * 500, "document")
    assert seen == [False, True, False]


def test_nothing_heavy_is_imported_before_the_first_text_and_wordllama_never():
    code = """
import sys, logging
from pgshelf.embedders import embedder_for
from pgshelf.settings import Settings
embedder = embedder_for(Settings(), {"provider": "local"})
assert not {"tokenizers", "safetensors", "wordllama", "requests"} & set(sys.modules)
import asyncio
asyncio.run(embedder.embed(["text"], "query"))
assert not {"wordllama", "requests", "torch"} & set(sys.modules)
assert not logging.getLogger().handlers
"""
    service = Path(inspect.getfile(local)).parents[2]
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=service, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert logging.getLogger("wordllama").handlers == []


@pytest.mark.parametrize("broken", [None, "empty folder"])
def test_an_incomplete_installation_is_an_error_that_says_what_to_do(no_model_yet, monkeypatch, tmp_path, broken):
    spec = ModuleSpec("wordllama", None, origin=str(tmp_path / "__init__.py")) if broken else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(EmbedderFailed, match=r"install") as caught:
        embed("text")
    assert str(tmp_path) not in str(caught.value)


def test_errors_are_one_tree():
    assert issubclass(TextRefused, EmbedderFailed)
    assert issubclass(EmbedderFailed, EmbedderError)
    unavailable = EmbedderUnavailable("busy", retry_after=2.5)
    assert isinstance(unavailable, EmbedderError)
    assert unavailable.retry_after == 2.5
