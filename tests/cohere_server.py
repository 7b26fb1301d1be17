"""A server on this machine that speaks Cohere's API as far as pgshelf uses it, and fails as it is told to.

Relevance is the share of words that query and text have in common, so that tests can tell what must come out.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

Answer = dict[str, Any]
Fault = Callable[["Handler", Answer], None]

RERANK_MODELS = {"rerank-v5.0-fast", "rerank-v5.0-pro", "rerank-v4.0-fast", "rerank-v3.5"}
MAX_DOCUMENTS = 10_000
EMBED_MODELS: dict[str, tuple[int, ...]] = {  # the dimension that comes unasked first
    "embed-v5.0-fast": (2048, 256, 512, 768, 1024, 1536),
    "embed-v5.0-pro": (2048, 256, 512, 768, 1024, 1536),
    "embed-v4.0": (1536, 256, 512, 1024),
    "embed-english-v3.0": (1024,),
    "embed-multilingual-v3.0": (1024,),
    "embed-english-light-v3.0": (384,),
    "embed-of-tomorrow": (64, 8),
}
MAX_TEXTS = 96
MAX_WORDS = 3500  # beyond them a text is too long


class Asked(NamedTuple):
    """A request that came in."""

    path: str
    headers: dict[str, str]
    body: Any


class Refused(Exception):
    """What the API answers instead of a result."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class CohereServer:
    """The API at `url`, for `key`; `asked` holds what came in, `fail` says what goes wrong with the next requests."""

    key = "a-key-for-tests"
    embeds = "/v2/embed"  # where texts become vectors

    def __init__(self, port: int = 0) -> None:
        self.outage: Fault | None = None  # what every request ends in for the time being
        self.asked: list[Asked] = []
        self.texts: list[tuple[str, str]] = []  # (input_type, text) of all that was embedded and answered well
        self.connections = 0
        self.released = threading.Event()  # whoever hangs waits for it
        self._faults: deque[Fault] = deque()
        self._server = Listener(("127.0.0.1", port), Handler)
        self._server.cohere = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, *faults: Fault) -> None:
        """Let the next requests end in these faults, one each; those behind them are answered well."""
        self._faults.extend(faults)

    def answer(self, path: str, body: Answer) -> Answer:
        """The right answer; Refused where there is none."""
        if path not in ROUTES:
            raise Refused(404, "not found")
        return ROUTES[path](body)

    def refusal(self, message: str) -> Answer:
        return {"id": str(uuid.uuid4()), "message": message}

    def texts_of(self, body: Answer) -> list[tuple[str, str]]:
        return [(body["input_type"], text) for text in body["texts"]]

    def fault(self) -> Fault | None:
        return self._faults.popleft() if self._faults else self.outage

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class Listener(ThreadingHTTPServer):
    """Threads end with the process: a client may keep a connection open for longer than the server lives."""

    daemon_threads = True
    cohere: CohereServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""
        if not isinstance(sys.exception(), (ConnectionError, json.JSONDecodeError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Listener

    def setup(self) -> None:
        super().setup()
        self.server.cohere.connections += 1

    def do_POST(self) -> None:
        cohere = self.server.cohere
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        cohere.asked.append(Asked(self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        try:
            if self.headers.get("authorization") != f"Bearer {cohere.key}":
                raise Refused(401, "invalid api token")
            answer = cohere.answer(self.path, body)
        except Refused as error:
            self.send(error.status, cohere.refusal(str(error)))
            return
        if (fault := cohere.fault()) is not None:
            fault(self, answer)
            return
        if self.path == cohere.embeds:
            cohere.texts += cohere.texts_of(body)
        self.send(200, answer)

    def send(self, status: int, answer: object, **headers: str) -> None:
        """Answer with JSON, or with bytes as they are."""
        payload = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def relevance(query: str, text: str) -> float:
    """The share of words that both have in common, between 0 and 1."""
    return len(words(query) & words(text)) / len(words(query) | words(text))


def rerank(body: Answer) -> Answer:
    """POST /v2/rerank."""
    model, query, documents = body.get("model"), body.get("query"), body.get("documents")
    if not isinstance(model, str) or not model:
        raise Refused(400, "invalid request: model is required")
    if model not in RERANK_MODELS:
        raise Refused(404, f"model '{model}' not found, make sure the correct model ID was used")
    if not isinstance(query, str) or not query.strip():
        raise Refused(400, "invalid request: query must not be empty or be only whitespace")
    if not isinstance(documents, list) or not documents:
        raise Refused(400, "invalid request: list of documents must not be empty")
    if len(documents) > MAX_DOCUMENTS or not all(isinstance(document, str) for document in documents):
        raise Refused(400, "invalid request: documents must be strings, 10000 at most")
    top = body.get("top_n", len(documents))
    if type(top) is not int or top < 1:
        raise Refused(400, "invalid request: top_n must be at least 1")
    results = [{"index": n, "relevance_score": relevance(query, text)} for n, text in enumerate(documents)]
    results.sort(key=lambda result: -result["relevance_score"])
    return {"id": str(uuid.uuid4()), "results": results[:top], "meta": meta({"search_units": 1})}


def embed(body: Answer) -> Answer:
    """POST /v2/embed, of texts."""
    model, texts, types = body.get("model"), body.get("texts"), body.get("embedding_types") or ["float"]
    if model not in EMBED_MODELS:
        raise Refused(404, f"model '{model}' not found, make sure the correct model ID was used")
    if body.get("input_type") not in ("search_document", "search_query", "classification", "clustering"):
        raise Refused(400, "invalid request: valid input_type must be provided with the provided model")
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
        raise Refused(400, f"invalid request: total number of texts must be at most {MAX_TEXTS}")
    if not all(isinstance(text, str) and text for text in texts):
        raise Refused(400, "invalid request: all elements in texts must be non-empty strings")
    if body.get("truncate", "END") not in ("END", "START", "NONE"):
        raise Refused(400, "invalid request: truncate must be one of NONE, START, END")
    if body.get("truncate") == "NONE" and any(len(text.split()) > MAX_WORDS for text in texts):
        raise Refused(400, "invalid request: a text is too long for the model")
    dimensions = EMBED_MODELS[model]
    if len(dimensions) == 1 and "output_dimension" in body:
        raise Refused(400, "invalid request: output_dimension is not supported by this model")
    dimension = body.get("output_dimension", dimensions[0])
    if dimension not in dimensions:
        raise Refused(400, f"invalid request: output_dimension must be one of {sorted(dimensions)}")
    vectors = [numbers_of(body["input_type"], text, dimension) for text in texts]
    embeddings: Answer = {}
    for kind in types:
        if kind not in ("float", "ubinary"):
            raise Refused(400, "invalid request: embedding_types are float, int8, uint8, binary, ubinary, base64")
        embeddings[kind] = vectors if kind == "float" else [packed(vector) for vector in vectors]
    answer = {"id": str(uuid.uuid4()), "response_type": "embeddings_by_type", "texts": texts, "embeddings": embeddings}
    return {**answer, "meta": meta({"input_tokens": sum(len(text.split()) for text in texts)})}


def numbers_of(kind: str, text: str, dimension: int) -> list[float]:
    """The vector of a text: each word adds to places that its hash names, so texts with words in common are near.

    It is not of unit length, and queries differ from documents by their last number.
    """
    vector = [0.0] * dimension
    for word in words(text) or {text}:
        digest = hashlib.sha256(word.encode("utf-8", "replace")).digest()
        for at in range(0, 16, 4):
            place = int.from_bytes(digest[at : at + 4], "big")
            vector[place % (dimension - 1)] += 1.0 if place >> 31 else -1.0
    vector[-1] = 0.5 if kind == "search_query" else 0.25
    return vector


def packed(vector: list[float]) -> list[int]:
    """Eight signs a byte, the first in the highest bit."""
    bits = [number > 0 for number in vector]
    return [sum(bit << (7 - n) for n, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]


def meta(billed: dict[str, int]) -> Answer:
    return {"api_version": {"version": "2"}, "billed_units": billed}


ROUTES: dict[str, Callable[[Answer], Answer]] = {"/v2/rerank": rerank, "/v2/embed": embed}


def status(code: int, message: str = "something happened", **headers: str) -> Fault:
    """An error of the API; headers with underscores, such as retry_after="2"."""
    return lambda handler, _: handler.send(code, {"id": str(uuid.uuid4()), "message": message}, **headers)


def raw(body: bytes, code: int = 200) -> Fault:
    """A body as it is."""
    return lambda handler, _: handler.send(code, body)


def changed(change: Callable[[Answer], object]) -> Fault:
    """The right answer, changed: `change` gets it and works on it."""

    def fault(handler: Handler, answer: Answer) -> None:
        change(answer)
        handler.send(200, answer)

    return fault


def hang(handler: Handler, _: Answer) -> None:
    """Say nothing until the server is closed."""
    handler.server.cohere.released.wait()
    handler.close_connection = True


def reset(handler: Handler, _: Answer) -> None:
    """Tear the connection down without an answer, as a crashed machine does."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def cut_off(handler: Handler, answer: Answer) -> None:
    """Promise an answer, send half of it and go."""
    payload = json.dumps(answer).encode()
    handler.send_response(200)
    handler.send_header("content-length", str(len(payload)))
    handler.end_headers()
    handler.wfile.write(payload[: len(payload) // 2])
    handler.close_connection = True
