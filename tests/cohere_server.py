"""A server on this machine that speaks Cohere's API as far as pgshelf uses it, and fails as it is told to.

Relevance is the share of words that query and text have in common, so that tests can tell what must come out.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import uuid
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Answer = dict[str, Any]
Fault = Callable[["Handler", Answer], None]

RERANK_MODELS = {"rerank-v5.0-fast", "rerank-v5.0-pro", "rerank-v4.0-fast", "rerank-v3.5"}
MAX_DOCUMENTS = 10_000


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

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.connections = 0
        self.released = threading.Event()  # whoever hangs waits for it
        self._faults: deque[Fault] = deque()
        self._server = Listener(("127.0.0.1", 0), Handler)
        self._server.cohere = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, *faults: Fault) -> None:
        """Let the next requests end in these faults, one each; those behind them are answered well."""
        self._faults.extend(faults)

    def fault(self) -> Fault | None:
        return self._faults.popleft() if self._faults else None

    def __enter__(self) -> CohereServer:
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
            if self.path not in ROUTES:
                raise Refused(404, "not found")
            answer = ROUTES[self.path](body)
        except Refused as error:
            self.send(error.status, {"id": str(uuid.uuid4()), "message": str(error)})
            return
        if (fault := cohere.fault()) is not None:
            fault(self, answer)
        else:
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


def meta(billed: dict[str, int]) -> Answer:
    return {"api_version": {"version": "2"}, "billed_units": billed}


ROUTES: dict[str, Callable[[Answer], Answer]] = {"/v2/rerank": rerank}


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
