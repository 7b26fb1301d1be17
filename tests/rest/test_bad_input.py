"""Bad input: each a 4xx that says what to do, never a 500, and nothing half-written."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2
import msgspec
import psycopg
import pytest
import pytest_asyncio

from pgshelf.errors import CODES
from tests.rest.asking import at, chunks, document, library, local, problem, raw

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIBRARIES, SHELF = "/v1/libraries", at("libraries", "shelf")
DOCUMENTS, SEARCH = f"{SHELF}/documents", f"{SHELF}/search"
LOCAL, LOCAL_SEARCH = "/v1/libraries/local/documents", "/v1/libraries/local/search"
NAN, INF = float("nan"), float("inf")
EMPTY: Any = {}
ID = "00000000-0000-4000-8000-000000000000"
IDS = [ID, ID.upper(), ID.replace("-", ""), "{" + ID + "}"]
INVALID, JSON, TEXT = "validation_failed", "invalid_json", "invalid_text"


class Case(NamedTuple):
    """A request, the code of its problem, and words that the detail holds."""

    method: str
    path: str
    body: Any
    code: str
    words: str = ""
    headers: dict[str, str] = {}  # noqa: RUF012 - never changed

    def __str__(self) -> str:
        return ascii(f"{self.method} {self.path[:50]} {str(self.body)[:60]}")


def post(path: str, body: Any, code: str, words: str = "") -> Case:
    return Case("POST", path, body, code, words)


def chunk(embedding: Any = None, **fields: Any) -> dict[str, Any]:
    given = {"text": "x", **fields} | ({} if embedding is None else {"embedding": embedding})
    return {"key": "new", "chunks": [given]}


def searching(fields: Any) -> dict[str, Any]:
    return {"vector": [1, 0, 0], **fields}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def packed(value: Any) -> tuple[bytes, str]:
    return msgspec.msgpack.encode(value), "application/msgpack"


VECTORS = [
    *(post(DOCUMENTS, body, code, words) for vector, code, words in [
        ([1, 0], "wrong_dimension", "3 numbers"),
        ([1, 0, 0, 0], "wrong_dimension", "3 numbers"),
        ([0, 0, 0], "zero_vector", "l2"),
        ([1e-46, 0, 0], "zero_vector", "zero"),
        ([1e39, 0, 0], "invalid_vector", "single precision"),
        ([1e308, 0, 0], "invalid_vector", "single precision"),
        ([1e30, 0, 0], "invalid_vector", "Scale"),
        ([1e-30, 0, 0], "invalid_vector", "Scale"),
        ([], INVALID, ">= 1"),
        ([1] * 16001, INVALID, "16000"),
        ([1, "0", 0], INVALID, "float"),
        ([1, None, 0], INVALID, "float"),
        ([1, [0], 0], INVALID, "float"),
        ([True, 0, 0], INVALID, "float"),
        (5, INVALID, "array"),
        ({"0": 1}, INVALID, "array"),
        ("", INVALID, "numbers"),
        ("no base64!", INVALID, "base64"),
        (base64.b64encode(raw(1, 0)).decode(), "wrong_dimension", "3 numbers"),
        (base64.b64encode(b"12345").decode(), INVALID, "float32"),
        (base64.b64encode(raw(NAN, 0, 1)).decode(), "invalid_vector", "NaN"),
    ] for body in [chunk(vector)]),
    *(post(SEARCH, {"vector": vector}, code, words) for vector, code, words in [
        ([1, 0], "wrong_dimension", "3 numbers"),
        ([0, 0, 0], "zero_vector", "zero"),
        ([-0.0, 0, 0], "zero_vector", "zero"),
        ([1e39, 0, 0], "invalid_vector", "single precision"),
        ([1e-46, 0, 0], "zero_vector", "zero"),
        ([1e20, 1, 0], "invalid_vector", "Scale"),
        ([], INVALID, ">= 1"),
        ("AAAA", INVALID, "float32"),
    ]),
    *(post(SEARCH, packed({"vector": vector}), code, words) for vector, code, words in [
        (raw(NAN, 0, 0), "invalid_vector", "NaN"),
        (raw(INF, 0, 0), "invalid_vector", "infinity"),
        (raw(-INF, 0, 0), "invalid_vector", "infinity"),
        ([NAN, 0.0, 0.0], "invalid_vector", "NaN"),
        ([INF, 0.0, 0.0], "invalid_vector", "infinity"),
        (raw(0, 0, 0), "zero_vector", "zero"),
        (raw(1, 0), "wrong_dimension", "3 numbers"),
        (b"", INVALID, "numbers"),
        (b"123", INVALID, "float32"),
    ]),
    *(post(DOCUMENTS, packed(chunk(vector)), "invalid_vector", "NaN") for vector in (raw(NAN, 1, 1), raw(INF, 1, 1))),
]  # fmt: skip

FORMS = [
    *(post(LIBRARIES, (content, "application/json"), code, words) for content, code, words in [
        (b" ", JSON, ""),
        (b'{"name": "a",}', JSON, "Send JSON"),
        (b'{"name": "\xff"}', TEXT, "Unicode"),
        (b'{"name": "a"} x', JSON, "Send JSON"),
        (b'{"name": NaN}', JSON, "Send JSON"),
        (b'[{"name": "a"}]', INVALID, "object"),
        (b'{"metadata":' + b'{"a":' * 30_000, JSON, "flatter"),
        (b'{"metadata":{"a":' + b"[" * 100_000, JSON, "flatter")]),
    *(post(path, (content, "application/json"), code, words)
      for path in (LIBRARIES, DOCUMENTS, SEARCH)
      for content, code, words in [
        (b"", INVALID, "JSON object"),
        (b"{", JSON, "Send JSON"),
        (b"{]", JSON, "Send JSON"),
        (b"nonsense", JSON, "Send JSON"),
        (b"\xff\xfe", JSON, ""),
        (b"[]", INVALID, "object"),
        (b"null", INVALID, "object"),
        (b'"text"', INVALID, "object"),
        (b"5", INVALID, "object"),
        (b"[" * 100_000, INVALID, "object")]),
    post(LIBRARIES, (b'{"name": "n", "metadata": {"n": 1' + b"0" * 5000 + b"}}", "application/json"), INVALID, ""),
    post(LIBRARIES, (b'{"name": "n", "metadata": {"n": 1e999}}', "application/json"), "?", ""),
    post(LIBRARIES, (b'{"name": "n", "dimension": 1' + b"0" * 5000 + b"}", "application/json"), "?", ""),
    post(LIBRARIES, (b'{"name": "n", "dimension": 1e999}', "application/json"), "?", ""),
    post(LIBRARIES, (b'{"name": "n", "metadata": {"a": "\\ud800"}}', "application/json"), "?", ""),
    post(LIBRARIES, (b'{"name": "\\udfff"}', "application/json"), "?", ""),
    post(LOCAL, (b'{"text": "\\ud800"}', "application/json"), "?", ""),
    post(LOCAL_SEARCH, (b'{"query": "\\ud800"}', "application/json"), "?", ""),
    *(post(path, (content, "application/msgpack"), "?", "") for path in (LIBRARIES, SEARCH) for content in
      [b"\xc1", b"\x81", b"\xdf\xff\xff\xff\xff", b"\x90", b"\xc0", b"\x91" * 60_000, b"\x81\xa4name\xa1\xff"]),
    post(LIBRARIES, packed({"name": "n", "metadata": {"a": b"bytes"}}), INVALID, "JSON"),
    post(LIBRARIES, packed({"name": "n", "metadata": {"a": NAN}}), INVALID, "JSON"),
    post(LIBRARIES, packed({"name": "n", "metadata": {"a": [INF]}}), INVALID, "JSON"),
    post(LIBRARIES, packed({"name": "n", "metadata": {"a": msgspec.msgpack.Ext(5, b"x")}}), INVALID, "JSON"),
    post(LIBRARIES, packed({"name": "n", "metadata": {1: "a"}}), INVALID, "str"),
    post(LIBRARIES, packed({"name": "n", "metadata": {"a": {(1, 2): "b"}}}), "?", ""),
    *(post(LIBRARIES, (b'{"name": "n"}', kind), "unsupported_media_type", "application/json")
      for kind in ["text/plain", "text/html", "application/xml", "multipart/form-data; boundary=x", "nonsense",
                   "application/x-www-form-urlencoded", "application/jsonl", "image/png"]),
    post(DOCUMENTS, (b'{"text": "' + b"x" * 200_000 + b'"}', "application/json"), "body_too_large",
      "PGSHELF_MAX_BODY_BYTES"),
    post(SEARCH, (b" " * 200_001, "application/json"), "body_too_large", "less"),
    Case("PUT", f"{DOCUMENTS}/k", (b" " * 200_001, "application/json"), "body_too_large"),
]  # fmt: skip

WRONG_TYPES = [
    Case(method, path, {field: value}, INVALID)
    for method, path, fields in [
        ("POST", LIBRARIES, {"name": "s", "description": "s", "embedder": "o", "dimension": "i", "metric": "s",
                             "language": "s", "chunking": "o", "metadata": "o"}),
        ("PATCH", SHELF, {"name": "s", "description": "s", "chunking": "o", "metadata": "o"}),
        ("POST", DOCUMENTS, {"key": "s", "title": "s", "text": "s", "chunks": "a", "source": "s", "metadata": "o"}),
        ("PUT", f"{DOCUMENTS}/k", {"title": "s", "text": "s", "chunks": "a", "source": "s", "metadata": "o"}),
        ("PATCH", f"{DOCUMENTS}/k", {"title": "s", "source": "s", "metadata": "o"}),
        ("PATCH", f"{SHELF}/chunks/{ID}", {"text": "s", "embedding": "a", "metadata": "o"}),
        ("POST", SEARCH, {"query": "s", "vector": "a", "mode": "s", "k": "i", "offset": "i", "max_distance": "n",
                          "min_score": "n", "include": "a", "exact": "b"}),
    ]
    for field, kind in fields.items()
    for value in [5, "5", ["5"], {"a": 5}, True, 1.5]
    if not {"s": isinstance(value, str), "o": isinstance(value, dict), "i": type(value) is int,
            "a": False, "n": type(value) in (int, float), "b": value is True}[kind]
]  # fmt: skip

TEXTS = [
    *(post(LOCAL, {"key": "new", "text": text}, INVALID, "empty") for text in ["", " ", "\n\t ", "\u2003", "\u00a0"]),
    *(post(LOCAL, chunk(text=text), INVALID, "chunks[0].text") for text in ["", " ", "\n\u3000"]),
    *(post(LOCAL_SEARCH, {"query": text}, INVALID, "") for text in ["", " ", "\n\t "]),
    post(LOCAL, {"text": "x" * 50_001}, INVALID, "50000"),
    post(LOCAL, chunk(text="x" * 2001), INVALID, "2000"),
    post(LOCAL, {"text": "x", "title": "x" * 101}, INVALID, "title: has 101 characters, at most 100"),
    post(LOCAL, {"text": "x", "source": "x" * 101}, INVALID, "source"),
    Case("PATCH", f"{DOCUMENTS}/k", {"title": "x" * 101}, INVALID, "at most 100"),
    Case("PATCH", f"{DOCUMENTS}/k", {"source": "x" * 101}, INVALID, "at most 100"),
    post(LOCAL_SEARCH, {"query": "x" * 501}, INVALID, "at most 500"),
    post(LOCAL, {"chunks": [{"text": "x"}] * 21}, INVALID, "at most 20"),
    post(LOCAL, {"text": "x", "chunks": [{"text": "x"}]}, INVALID, "either text or chunks"),
    post(LOCAL, {"title": "x"}, INVALID, "either text or chunks"),
    post(LOCAL, {}, INVALID, "either text or chunks"),
    post(LOCAL, {"chunks": [{}]}, INVALID, "text"),
    post(LOCAL, {"key": "", "text": "x"}, INVALID, "key"),
    post(LOCAL, {"key": "x" * 513, "text": "x"}, INVALID, "512"),
    post(LIBRARIES, {"name": ""}, INVALID, "name"),
    post(LIBRARIES, {"name": "x" * 129}, INVALID, "128"),
    post(LIBRARIES, {"name": " a"}, INVALID, "space"),
    post(LIBRARIES, {"name": "a\n"}, INVALID, "control"),
    post(LIBRARIES, {"name": "a\x85b"}, INVALID, "control"),
    post(LIBRARIES, {"name": "n", "description": "x" * 2001}, INVALID, "2000"),
]

NUL = "a\x00b"
NULS = [
    post(LIBRARIES, {"name": NUL}, INVALID, "control"),
    post(LIBRARIES, {"name": "n", "description": NUL}, TEXT, "NUL"),
    post(LIBRARIES, {"name": "n", "metadata": {"a": NUL}}, TEXT, "NUL"),
    post(LIBRARIES, {"name": "n", "metadata": {NUL: 1}}, TEXT, "NUL"),
    post(LIBRARIES, {"name": "n", "language": NUL}, INVALID, "language"),
    post(LIBRARIES, {"name": "n", "embedder": {"provider": "none", "model": NUL}, "dimension": 3}, TEXT, "NUL"),
    post(LIBRARIES, {"name": "n", "embedder": {"provider": NUL}}, "embedder_not_configured", "local"),
    Case("PATCH", SHELF, {"name": NUL}, INVALID, "control"),
    Case("PATCH", SHELF, {"description": NUL}, TEXT, "NUL"),
    Case("PATCH", SHELF, {"metadata": {"a": {"b": NUL}}}, TEXT, "NUL"),
    *(post(LOCAL, {"text": "x", "key": "new"} | {field: NUL}, TEXT, "NUL") for field in ["key", "title", "source",
      "text"]),
    post(LOCAL, {"text": "x", "metadata": {"a": [NUL]}}, TEXT, "NUL"),
    post(DOCUMENTS, chunk([1, 0, 0], text=NUL), TEXT, "NUL"),
    post(DOCUMENTS, chunk([1, 0, 0], metadata={"a": NUL}), TEXT, "NUL"),
    Case("PATCH", f"{DOCUMENTS}/k", {"title": NUL}, TEXT, "NUL"),
    Case("PATCH", f"{DOCUMENTS}/k", {"metadata": {NUL: None}}, TEXT, "NUL"),
    Case("PATCH", f"{SHELF}/chunks/CHUNK", {"text": NUL, "embedding": [1, 0, 0]}, TEXT, "NUL"),
    Case("PATCH", f"{SHELF}/chunks/CHUNK", {"metadata": {"a": NUL}}, TEXT, "NUL"),
    *(Case("GET", path, None, TEXT, "NUL") for path in [
        "/v1/libraries/a%00b", "/v1/libraries/%00/stats", "/v1/libraries/%00/documents", f"{DOCUMENTS}/%00",
        f"{DOCUMENTS}/%00/chunks"]),
    Case("GET", f"{SHELF}/chunks/%00", None, "chunk_not_found"),
    Case("GET", f"{DOCUMENTS}?after=%00", None, INVALID, "cursor"),
    *(Case("DELETE", path, None, TEXT, "NUL") for path in ["/v1/libraries/%00", f"{DOCUMENTS}/%00"]),
    Case("PUT", f"{DOCUMENTS}/%00", {"chunks": []}, TEXT, "NUL"),
    Case("PATCH", f"{DOCUMENTS}/%00", {"title": "t"}, TEXT, "NUL"),
    Case("PATCH", "/v1/libraries/%00", {}, TEXT, "NUL"),
    post("/v1/libraries/%00/search", {"vector": [1, 0, 0]}, TEXT, "NUL"),
    post("/v1/libraries/%00/documents", {"text": "x"}, TEXT, "NUL"),
]  # fmt: skip

NAMES = [
    *(Case(method, f"/v1/libraries/{name}{rest}", body, "library_not_found", "there is no library")
      for name in ["none", ID, "SHELF", "%F0%9F%93%9A", "shelf%2F", "%7B" + ID]
      for method, rest, body in [
        ("GET", "", None), ("PATCH", "", {}), ("DELETE", "", None), ("GET", "/stats", None), ("GET",
          "/documents", None),
        ("POST", "/documents", {"text": "x"}), ("GET", "/documents/k", None), ("PUT", "/documents/k", {"text": "x"}),
        ("PATCH", "/documents/k", {}), ("DELETE", "/documents/k", None), ("GET", "/documents/k/chunks", None),
        ("GET", f"/chunks/{ID}", None), ("PATCH", f"/chunks/{ID}", {"text": "x"}), ("DELETE", f"/chunks/{ID}", None),
        ("POST", "/search", {"vector": [1, 0, 0]}), ("POST", "/search", {"query": "x"})]),
    *(Case(method, f"{DOCUMENTS}/{name}{rest}", body, "document_not_found", "there is no document")
      for name in ["none", ID, "K", "%2Fk", "%7B" + ID] for method, rest, body in [
        ("GET", "", None), ("PATCH", "", EMPTY), ("DELETE", "", None), ("GET", "/chunks", None)]),
    Case("PUT", f"{DOCUMENTS}/{ID}", {"chunks": []}, "document_not_found", "key"),
    *(Case(method, f"{SHELF}/chunks/{name}", body, "chunk_not_found", "there is no chunk")
      for name in ["none", ID, "1"] for method, body in [("GET", None), ("PATCH", EMPTY), ("DELETE", None)]),
    *(post(LIBRARIES, {"name": name}, INVALID, "another name") for name in IDS),
    Case("PATCH", SHELF, {"name": ID}, INVALID, "another name"),
    Case("PATCH", SHELF, {"name": None}, INVALID, "name"),
    Case("PATCH", SHELF, {"metadata": None}, INVALID, "metadata"),
    Case("PATCH", SHELF, {"name": "local"}, "library_exists", "another name"),
    post(LIBRARIES, {"name": "shelf"}, "library_exists", "another name"),
    *(post(LOCAL, {"key": key, "text": "x"}, INVALID, "another key") for key in IDS),
    Case("PUT", f"{DOCUMENTS}/k", {"key": "other", "chunks": []}, INVALID, "leave it out"),
    Case("PUT", f"{DOCUMENTS}/{ID}", {"key": "k", "chunks": []}, INVALID, "leave it out"),
    *(Case(method, path, body, INVALID, "UTF-8") for method, path, body in [
        ("GET", "/v1/libraries/%FF", None), ("GET", f"{DOCUMENTS}/%C3%28", None), ("DELETE", f"{DOCUMENTS}/%FF", None),
        ("PUT", f"{DOCUMENTS}/%ED%A0%80", EMPTY),
        ("POST", "/v1/libraries/%80/search", EMPTY)]),
    Case("PUT", f"{DOCUMENTS}/{'x' * 513}", {"chunks": []}, INVALID, "512"),
]  # fmt: skip

LIBRARY_RULES = [
    post(LIBRARIES, {}, INVALID, "name"),
    post(LIBRARIES, {"name": "n", "metric": "manhattan"}, INVALID, "metric"),
    post(LIBRARIES, {"name": "n", "language": "klingon"}, INVALID, "english"),
    post(LIBRARIES, {"name": "n", "language": ""}, INVALID, "language"),
    post(LIBRARIES, {"name": "n", "language": "english; drop"}, INVALID, "english"),
    post(LIBRARIES, {"name": "n", "embedder": {}}, INVALID, "provider"),
    post(LIBRARIES, {"name": "n", "embedder": {"provider": "other"}}, "embedder_not_configured", "local"),
    post(LIBRARIES, {"name": "n", "embedder": {"provider": "local", "model": "x"}}, "embedder_not_configured",
      "wordllama"),
    post(LIBRARIES, {"name": "n", "embedder": {"provider": "local", "dimension": 100}}, "embedder_not_configured",
      "256"),
    post(LIBRARIES, {"name": "n", "dimension": 3}, "embedder_not_configured", "256"),
    post(LIBRARIES, {"name": "n", "embedder": {"provider": "local", "dimension": 64}, "dimension": 128}, INVALID, "64"),
    post(LIBRARIES, {"name": "n", "embedder": {"provider": "none"}}, INVALID, "dimension"),
    *(post(LIBRARIES, {"name": "n", "embedder": {"provider": "none"}, "dimension": dimension}, INVALID, "dimension")
      for dimension in [0, -1, 16001, 10**30, 1.5]),
    *(post(LIBRARIES, {"name": "n", "chunking": chunking}, INVALID, "chunking") for chunking in [
        {"size": 49}, {"size": 20_001}, {"size": -1}, {"overlap": -1}, {"size": 100, "overlap": 100},
        {"overlap": 1200}, {"size": 100, "overlap": 101}, {"size": 1.5}]),
    Case("PATCH", SHELF, {"chunking": {"overlap": 5000}}, INVALID, "smaller"),
    Case("PATCH", SHELF, {"chunking": {"size": 10}}, INVALID, "size"),
    *(Case(method, path, {**body, "metadata": metadata}, INVALID, words)
      for metadata, words in [({"a": "x" * 2000}, "at most 2000"), (deep(6), "5 levels"), ({"a": [[[[[1]]]]]},
        "5 levels"),
                              ({str(n): n for n in range(400)}, "2000")]
      for method, path, body in [("POST", LIBRARIES, {"name": "n"}), ("PATCH", SHELF, {}),
        ("POST", LOCAL, {"text": "x"}),
                                 ("PATCH", f"{DOCUMENTS}/k", {}), ("PATCH", f"{SHELF}/chunks/CHUNK", {})]),
    post(DOCUMENTS, chunk([1, 0, 0], metadata=deep(6)), INVALID, "chunks[0].metadata"),
]  # fmt: skip

EMBEDDERS = [
    post(DOCUMENTS, {"key": "new", "text": "x"}, "embedding_required", "embedding"),
    post(f"{DOCUMENTS}?wait=false", {"key": "new", "text": "x"}, "embedding_required", "embedding"),
    post(DOCUMENTS, {"chunks": [{"text": "x", "embedding": [1, 0, 0]}, {"text": "y"}]}, "embedding_required",
      "embedding"),
    post(DOCUMENTS, {"key": "k", "chunks": [{"text": "y"}]}, "embedding_required", "embedding"),
    Case("PATCH", f"{SHELF}/chunks/CHUNK", {"text": "other"}, "embedding_required", "embedding"),
    Case("PATCH", f"{SHELF}/chunks/CHUNK", {"embedding": [1, 0]}, "wrong_dimension", "3"),
    Case("PATCH", f"{SHELF}/chunks/CHUNK", {"embedding": [0, 0, 0]}, "zero_vector", "zero"),
    Case("PATCH", f"{SHELF}/chunks/CHUNK", {"text": " "}, INVALID, "empty"),
    Case("PATCH", f"{SHELF}/chunks/CHUNK", {"text": "x" * 2001}, INVALID, "2000"),
    post(SEARCH, {"query": "x", "mode": "vector"}, "no_embedder", "vectors"),
    post(SEARCH, {"query": "x", "mode": "hybrid"}, "no_embedder", "vectors"),
    post(LOCAL, chunk([1.0, 0, 0]), "wrong_dimension", "256"),
    post(LOCAL, {"key": "new", "chunks": [{"text": "a"}, {"text": "b", "embedding": [1.0]}]}, "wrong_dimension", "256"),
]  # fmt: skip

SEARCHES = [
    post(SEARCH, {}, INVALID, "at least one of query, vector and like"),
    post(LOCAL_SEARCH, {"query": "x", "vector": [1, 0, 0]}, "wrong_dimension", "256"),
    post(SEARCH, {"query": None, "vector": None}, INVALID, "at least one of query, vector and like"),
    post(SEARCH, {"vector": [1, 0, 0], "mode": "text"}, INVALID, "query"),
    *(post(SEARCH, searching(wrong), INVALID, words) for wrong, words in [
        ({"mode": "magic"}, "mode"), ({"k": 0}, "k"), ({"k": -1}, "k"), ({"k": 101}, "at most 100"), ({"k": 10**25},
          "k"),
        ({"k": 2**63}, "k"), ({"k": None}, "k"), ({"offset": -1}, "offset"), ({"offset": 201}, "at most 200"),
        ({"offset": 10**25}, "offset"), ({"include": ["vectors"]}, "include"), ({"include": "text"}, "include"),
        ({"include": None}, "include"), ({"exact": "yes"}, "exact"), ({"max_distance": "far"}, "max_distance")]),
    post(SEARCH, searching({"filter": {"a": {"$in": ["x" * 3000]}}}), INVALID, "at most 3000"),
    post(SEARCH, searching({"filter": {"a": deep(20)}}), INVALID, "deeper than 20 levels"),
    Case("GET", f"{SHELF}/export?filter=" + "%7B%22a%22:" * 21 + "1" + "%7D" * 21, None, INVALID, "deeper than"),
    post(SEARCH, packed({"vector": raw(1, 0, 0), "max_distance": NAN}), INVALID, "max_distance"),
    post(SEARCH, packed({"vector": raw(1, 0, 0), "min_score": INF}), INVALID, "min_score"),
]  # fmt: skip

QUERIES: list[Case] = [
    *(Case("GET", f"{path}?{query}", None, INVALID, words)
      for path in (LIBRARIES, DOCUMENTS, f"{DOCUMENTS}/k/chunks")
      for query, words in [
        ("limit=0", "limit"), ("limit=-1", "limit"), ("limit=51", "at most 50"), ("limit=x", "limit"), ("limit=",
          "limit"),
        ("limit=1.5", "limit"), ("limit=" + "9" * 30, "limit"), ("limit=" + "9" * 5000, "limit"),
          ("limit=1&limit=x", "limit"),
        ("after=x", "next"), ("after=%FF", "next"), ("after=" + "a" * 600, "after"), ("after=AAAA", "next"),
        ("after=%F0%9F%93%9A", "next"), ("after=-1", "next"), ("after=", "next")]),
    *(Case("GET", path, None, INVALID, "include") for path in [
        f"{DOCUMENTS}/k/chunks?include=vectors", f"{DOCUMENTS}/k/chunks?include=embedding&include=text",
        f"{DOCUMENTS}/k/chunks?include=", f"{DOCUMENTS}/k/chunks?include=embedding&include=embedding"]),
    *(Case("POST", f"{LOCAL}?wait={wait}", {"text": "x"}, INVALID, "wait") for wait in ["maybe", "", "2", "truee",
      "%00"]),
    *(Case(method, f"{DOCUMENTS}/k", body, INVALID, "ETag", {"If-Match": tag})
      for tag in ["x", '"a"', '"-1"', '"1", "2"', '"' + "9" * 19 + '"', '""', "1.5", '"' + "1" * 200 + '"']
      for method, body in [("PUT", {"chunks": []}), ("PATCH", {"title": "x"}), ("DELETE", None)]),
]  # fmt: skip

CHOICES = [
    post(LIBRARIES, {"name": "n", "metric": "foo"}, INVALID, "'foo'; choose cosine, inner_product, l1 or l2"),
    post(LIBRARIES, {"name": "n", "attributes": {"a": "foo"}}, INVALID, "choose datetime, number or text"),
    post(SEARCH, {"query": "q", "mode": "foo"}, INVALID, "mode: Invalid enum value 'foo'; choose hybrid"),
    post(SEARCH, {"query": "q", "include": ["text", "foo"]}, INVALID, "choose document, embedding, highlight"),
    post(SEARCH, {"query": "q", "fusion": {"method": "foo"}}, INVALID, "choose rrf or weighted"),
    post(SEARCH, {"query": "q", "group_by": "foo"}, INVALID, "'foo'; choose document"),
    post(f"{SEARCH}/batch", {"searches": [{"query": "q", "mode": "foo"}]}, INVALID, "choose hybrid, text or vector"),
    post(SEARCH, packed({"query": "q", "mode": "foo"}), INVALID, "choose hybrid, text or vector"),
    Case("PUT", f"{SHELF}/index", {"type": "foo"}, INVALID, "choose auto, flat, hnsw, ivfflat, kdtree or lsh"),
    Case("GET", f"{SHELF}/chunks/{ID}?include=foo", None, INVALID, "include: Invalid enum value 'foo'; choose"),
    Case("GET", "/v1/audit?outcome=foo", None, INVALID, "choose done or refused"),
    Case("GET", LIBRARIES, None, INVALID, "choose eventual, session or strong", {"Pgshelf-Consistency": "foo"}),
]  # fmt: skip

EVERY = [
    *VECTORS,
    *FORMS,
    *WRONG_TYPES,
    *TEXTS,
    *NULS,
    *NAMES,
    *LIBRARY_RULES,
    *EMBEDDERS,
    *SEARCHES,
    *QUERIES,
    *CHOICES,
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stored(api: httpx2.AsyncClient) -> str:
    """Two libraries, a document with the key `k` in one of them; the id of its chunk."""
    await library(api)
    await local(api, "local")
    await document(api, "k", [1, 0, 0], [0, 1, 0])
    return str((await chunks(api, "k"))[0]["id"])


@pytest.fixture(scope="module")
def session(shared_database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A session beside the application."""
    with psycopg.connect(shared_database_url, autocommit=True) as connection:
        yield connection


def everything(session: psycopg.Connection[Any]) -> Any:
    """All that is stored, as the database has it."""
    tables = ("libraries", "documents", "chunks")
    parts = [f"(select array_agg(t::text order by t::text) from pgshelf.{table} t)" for table in tables]
    return session.execute(f"select {', '.join(parts)}").fetchone()


@pytest.mark.parametrize("case", EVERY, ids=[f"{number} {case}" for number, case in enumerate(EVERY)])
async def test_bad_input(api: httpx2.AsyncClient, stored: str, session: psycopg.Connection[Any], case: Case) -> None:
    before = everything(session)
    content, kind = case.body if isinstance(case.body, tuple) else (json.dumps(case.body).encode(), "application/json")
    headers = {} if case.body is None else {"Content-Type": kind}
    path = case.path.replace("CHUNK", stored)
    response = await api.request(
        case.method, path, content=None if case.body is None else content, headers=headers | case.headers
    )
    code = response.json()["code"] if case.code == "?" else case.code
    assert CODES[code][0] < 500, response.text
    body = problem(response, CODES[code][0], code)
    assert case.words.lower() in body["detail"].lower(), body["detail"]
    assert everything(session) == before
