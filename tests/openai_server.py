"""A server on this machine that speaks OpenAI's embeddings API, as vLLM and Ollama do, and fails as it is told to."""

from __future__ import annotations

import base64
import struct

from tests.cohere_server import Answer, CohereServer, Refused, numbers_of

MODELS = {"bge-of-tests": (16,), "matryoshka": (32, 8)}  # the dimension of their own first
MAX_INPUTS = 64
MAX_WORDS = 5000


class OpenAIServer(CohereServer):
    """The API at `base_url`, for `key`; the faults are those of the other server."""

    embeds = "/v1/embeddings"

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    def answer(self, path: str, body: Answer) -> Answer:
        if path != self.embeds:
            raise Refused(404, "not found")
        return embeddings(body)

    def refusal(self, message: str) -> Answer:
        return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}

    def texts_of(self, body: Answer) -> list[tuple[str, str]]:
        return [("", text) for text in body["input"]]


def embeddings(body: Answer) -> Answer:
    """POST /v1/embeddings."""
    model, texts, encoding = body.get("model"), body.get("input"), body.get("encoding_format", "float")
    if model not in MODELS:
        raise Refused(404, f"The model `{model}` does not exist")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise Refused(400, "'$.input' is invalid")
    if len(texts) > MAX_INPUTS:
        raise Refused(413, f"batch size {len(texts)} > maximum allowed batch size {MAX_INPUTS}")
    if any(len(text.split()) > MAX_WORDS for text in texts):
        raise Refused(400, "This model's maximum context length is exceeded")
    if encoding not in ("float", "base64"):
        raise Refused(400, "encoding_format must be float or base64")
    dimension = body.get("dimensions", MODELS[model][0])
    if dimension not in MODELS[model] or ("dimensions" in body and len(MODELS[model]) == 1):
        raise Refused(400, f"Model {model} does not support matryoshka representation")
    data = [
        {"object": "embedding", "index": index, "embedding": encoded(numbers_of("", text, dimension), encoding)}
        for index, text in enumerate(texts)
    ]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def encoded(vector: list[float], encoding: str) -> list[float] | str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if encoding == "base64" else vector
