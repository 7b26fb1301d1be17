"""Any endpoint that speaks OpenAI's embeddings API: vLLM, Ollama, Text Embeddings Inference, llama.cpp, OpenAI itself.

It is asked through httpx: one request and one answer, where the package `openai` would bring a second set of retries,
types and settings from the environment.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from pgshelf import providers
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
from pgshelf.providers import RETRY_AFTER, Connection, Errors, Provider, Refusal, Unreadable
from pgshelf.settings import Settings

if TYPE_CHECKING:
    import httpx
    from numpy.typing import NDArray

NAME = "The embedding endpoint"
ERRORS = Errors(
    EmbedderFailed,
    TextsRefused,
    ModelUnknown,
    EmbedderUnavailable,
    lambda message: EmbedderTimeout(message, RETRY_AFTER),
)
MISSING_URL = 'the embedder "openai" needs PGSHELF_OPENAI_BASE_URL on the server'
MISSING_MODEL = 'the embedder "openai" needs a model'


class Item(msgspec.Struct):
    """One vector of an answer: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str


class Answer(msgspec.Struct):
    """What the endpoint says, as far as it matters."""

    data: list[Item]


class OpenAIEmbedder:
    """A model of the endpoint in PGSHELF_OPENAI_BASE_URL.

    `shortened`: the dimension is not the model's own, so each request asks for it. The prefixes go before each text of
    their kind, for models that were trained with some.
    """

    provider = "openai"
    cached = True

    def __init__(
        self,
        settings: Settings,
        model: str,
        dimension: int,
        shortened: bool = False,
        query_prefix: str = "",
        document_prefix: str = "",
    ) -> None:
        if settings.openai_base_url is None:
            raise ValueError(MISSING_URL)
        if not model:
            raise ValueError(MISSING_MODEL)
        self.model = model
        self.dimension = dimension
        self.batch = settings.openai_batch
        self._settings = settings
        self._shortened = shortened
        self._prefixes: Mapping[Kind, str] = {"query": query_prefix, "document": document_prefix}
        known = {"shortened": shortened, "query_prefix": query_prefix, "document_prefix": document_prefix}
        self.options = {name: value for name, value in known.items() if value}

    async def embed(self, texts: Sequence[str], kind: Kind) -> NDArray[np.float32]:
        """Embed at most PGSHELF_OPENAI_BATCH texts into unit vectors, array (n, dimension).

        429 and what passes by itself is tried again within PGSHELF_OPENAI_TIMEOUT.
        """
        dimension = self.dimension if self._shortened else None
        sent = [self._prefixes[kind] + text for text in texts]
        found = await _ask(self._settings, self.model, sent, dimension)
        return unit(NAME, matrix(NAME, found, len(texts), self.dimension))


async def settled(settings: Settings, choice: Mapping[str, Any]) -> OpenAIEmbedder:
    """The embedder of a new library. The endpoint is asked once, for the dimension that the model has by itself.

    Another one that was chosen is tried: ValueError where the model has none but its own. Raises EmbedderError, too.
    """
    model, dimension = choice.get("model"), choice.get("dimension")
    if settings.openai_base_url is None:
        raise ValueError(MISSING_URL)
    if not model:
        raise ValueError(MISSING_MODEL)
    prefixes = choice.get("query_prefix") or "", choice.get("document_prefix") or ""
    found = await _ask(settings, model, [prefixes[1] + "text"])
    own = len(found[0]) if len(found) == 1 else 0
    if not own:
        raise EmbedderFailed(f"{NAME}'s answer does not fit the texts: there is not one vector for each")
    if dimension in (None, own):
        return OpenAIEmbedder(settings, model, own, False, *prefixes)
    shortened = OpenAIEmbedder(settings, model, dimension, True, *prefixes)
    try:
        await shortened.embed(["text"], "document")
    except EmbedderFailed as error:
        raise ValueError(f'model "{model}" makes vectors of {own} numbers and cannot make {dimension}') from error
    return shortened


async def _ask(settings: Settings, model: str, texts: list[str], dimension: int | None = None) -> list[list[float]]:
    url, key = f"{(settings.openai_base_url or '').rstrip('/')}/embeddings", settings.openai_api_key
    request: dict[str, Any] = {"model": model, "input": texts, "encoding_format": settings.openai_encoding}
    if dimension is not None:
        request["dimensions"] = dimension
    body = msgspec.json.encode(request)
    headers = {"Content-Type": "application/json", "User-Agent": "pgshelf"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    client: httpx.AsyncClient = await providers.connected(NAME, _connect)

    async def attempt() -> list[list[float]]:
        response = await client.post(url, content=body, headers=headers)
        if not response.is_success:
            raise Refusal(response.status_code, _said(response.content), response.headers)
        return _vectors(response.content)

    called = f'embedding model "{model}" at PGSHELF_OPENAI_BASE_URL'
    return await providers.ask(Provider(NAME, "PGSHELF_OPENAI", key, settings.openai_timeout, called, ERRORS), attempt)


def _connect() -> Connection:
    http = providers.http_client()
    return Connection(http, http)


def _vectors(content: bytes) -> list[list[float]]:
    try:
        items = msgspec.json.decode(content, type=Answer).data
        rows = {item.index: _numbers(item.embedding) for item in items}
    except (msgspec.MsgspecError, binascii.Error, ValueError) as error:
        raise Unreadable from error
    if sorted(rows) != list(range(len(items))):
        raise Unreadable
    return [rows[index] for index in range(len(items))]


def _numbers(embedding: list[float] | str) -> list[float]:
    if isinstance(embedding, str):
        found: list[float] = np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4").tolist()
        return found
    return embedding


def _said(content: bytes) -> object:
    """The message in an error, which is written in several ways."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.MsgspecError, RecursionError):
        return None
    for _ in range(2):  # {"error": {"message": ...}}
        if isinstance(body, dict):
            body = body.get("error") or body.get("message") or body.get("detail")
    return body
