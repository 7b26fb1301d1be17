"""Vectors and metadata on their way into a request."""

from __future__ import annotations

import array
import base64
import math
import types
import uuid
from datetime import UTC, datetime

import numpy as np
import pytest

from pgshelf_client import _base
from tests.sdk.script import DOCUMENT, LIBRARY, Script, ok

pytestmark = pytest.mark.watched

FOUND = {"hits": [], "took_ms": 0.1}


@pytest.mark.parametrize(
    "vector",
    [
        [1, 0.5],
        (1.0, 0.5),
        array.array("f", [1.0, 0.5]),
        np.array([1, 0.5]),
        np.array([1, 0.5], dtype=np.float32),
        np.array([1, 0.5], dtype=np.float16),
        [np.float32(1), np.float64(0.5)],
    ],
    ids=["list", "tuple", "array", "float64", "float32", "float16", "scalars"],
)
async def test_a_vector_may_be_any_sequence_or_array(connect, vector):
    script = Script(ok(FOUND))
    await connect(script).search("handbook", vector=vector)
    assert script.body == {"vector": [1.0, 0.5]}


async def test_a_float32_vector_is_sent_without_loss(connect):
    vector = np.random.default_rng(1).normal(size=64).astype(np.float32)
    script = Script(ok(FOUND))
    await connect(script).search("handbook", vector=vector)
    assert np.array_equal(np.array(script.body["vector"], dtype=np.float32), vector)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_numbers_that_json_cannot_say_are_refused(connect, value):
    script = Script(ok(FOUND))
    with pytest.raises(ValueError, match=r"vector\[1\] is (nan|inf|-inf)"):
        await connect(script).search("handbook", vector=[0.0, value])
    with pytest.raises(ValueError, match=r"vector\[0\]"):
        await connect(script).add_document("handbook", chunks=[{"text": "t", "embedding": np.array([value])}])
    with pytest.raises(ValueError, match="not JSON compliant"):
        await connect(script).update_document("handbook", "vacuum", metadata={"deep": [{"n": value}]})
    for options in ({"filter": {"n": {"$gt": value}}}, {"max_distance": value}, {"mmr": {"lambda": value}}):
        with pytest.raises(ValueError, match=r"finite|not JSON compliant"):
            await connect(script).search("handbook", "rows", **options)
        with pytest.raises(ValueError, match=r"finite|not JSON compliant"):
            await connect(script).search_batch("handbook", [{"query": "rows", **options}])
    assert script.requests == []


async def test_a_filter_takes_moments_and_ids(connect):
    script, moment = Script(ok(FOUND)), datetime(2024, 5, 31, 12, tzinfo=UTC)
    condition = {"published": {"$gte": moment}, "$id": {"$in": [uuid.UUID(int=1)]}}
    await connect(script).search("handbook", "rows", filter=condition)
    assert script.body["filter"] == {
        "published": {"$gte": "2024-05-31T12:00:00Z"}, "$id": {"$in": [str(uuid.UUID(int=1))]}
    }  # fmt: skip


@pytest.mark.parametrize(
    "vector",
    [
        [1, 0.5],
        array.array("d", [1.0, 0.5]),
        np.array([1, 0.5], dtype=">f8"),
        np.array([1, 9, 0.5], dtype=np.float32)[::2],
        np.array([1, 0.5], dtype=np.float16),
        [np.float32(1), np.float64(0.5)],
    ],
    ids=["list", "array", "big-endian", "strided", "float16", "scalars"],
)
@pytest.mark.parametrize("byteorder", ["little", "big"])
async def test_an_embedding_goes_as_little_endian_bytes(connect, vector, byteorder, monkeypatch):
    monkeypatch.setattr(_base, "sys", types.SimpleNamespace(byteorder=byteorder))
    script = Script(ok(DOCUMENT))
    await connect(script).add_document("handbook", chunks=[{"text": "t", "embedding": vector}])
    sent = base64.b64decode(script.body["chunks"][0]["embedding"])
    assert np.frombuffer(sent, dtype="<f4" if byteorder == "little" else ">f4").tolist() == [1.0, 0.5]


@pytest.mark.parametrize("vector", [[0.0, 1e39], np.array([0.0, 1e39])], ids=["list", "array"])
async def test_an_embedding_beyond_single_precision_is_refused(connect, vector):
    with pytest.raises(ValueError, match=r"vector\[1\] is 1e\+39, beyond single precision"):
        await connect(Script(ok())).update_chunk("handbook", "c", embedding=vector)


@pytest.mark.parametrize("vector", ["[1, 2]", b"\x00\x01", 1.5, np.ones((2, 2))])
async def test_what_is_no_vector_is_refused(connect, vector):
    with pytest.raises(TypeError):
        await connect(Script(ok(FOUND))).search("handbook", vector=vector)
    with pytest.raises(TypeError):
        await connect(Script(ok())).update_chunk("handbook", "c", embedding=vector)


@pytest.mark.parametrize(
    ("method", "argument", "said"),
    [
        ("add_documents", [{"bad": 1}],
         "a document has no field 'bad'; there are key, title, text, chunks, source, metadata"),
        ("add_documents", [{1: "t"}], "a document has no field 1; there are key"),
        ("add_documents", {"text": "t"}, "a document is a mapping, not str"),
        ("add_documents", [{"chunks": ["t"]}], "a chunk is a mapping, not str"),
        ("add_documents", [{"chunks": [{"txt": "t"}]}],
         "a chunk has no field 'txt'; there are text, embedding, metadata"),
        ("search_batch", ["x"], "a search is a mapping, not str"),
        ("search_batch", [{1: "x"}], "a search has no field 1"),
    ],
)  # fmt: skip
async def test_what_has_another_form_than_it_should_is_refused_in_words(connect, method, argument, said):
    script = Script(ok())
    with pytest.raises(TypeError, match=f"^{said}"):
        await getattr(connect(script), method)("handbook", argument)
    assert script.requests == []


async def test_a_search_of_several_may_ask_for_what_only_the_server_knows(connect):
    script = Script(ok({"results": [], "took_ms": 1}))
    await connect(script).search_batch("handbook", [{"query": "x", "newer": 1}])
    assert script.body == {"searches": [{"query": "x", "newer": 1}]}


async def test_metadata_takes_any_mapping_and_what_json_has_a_form_for(connect):
    script = Script(ok(LIBRARY))
    metadata = types.MappingProxyType({"id": uuid.UUID(int=1), "name": "Größe", "none": None})
    await connect(script).create_library("x", metadata=metadata)
    assert script.body["metadata"] == {"id": str(uuid.UUID(int=1)), "name": "Größe", "none": None}


async def test_metadata_without_a_json_form_is_refused(connect):
    with pytest.raises(TypeError):
        await connect(Script(ok(LIBRARY))).create_library("x", metadata={"a": object()})
