"""Cohere's rerank API, version 2, through the `cohere` package.

The package's own retries know no deadline, and sleep for as long as a Retry-After says, up to a minute. So it is told
to try once, and the retries are here: what cannot be waited for within the timeout is refused at once, with the
Retry-After that Cohere gave.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from pgshelf.rerankers import ModelUnknown, RerankerError, RerankerFailed, RerankerTimeout, RerankerUnavailable

if TYPE_CHECKING:
    import httpx
    from cohere import AsyncClientV2

MODEL = "rerank-v5.0-fast"
MAX_TEXTS = 1000  # what Cohere recommends at most for one request
MAX_CHARACTERS = 20_000  # Cohere reads the first 4096 tokens of a text; what lies behind need not travel

ATTEMPTS = 3
BACKOFF = 0.25  # seconds before the second attempt, doubled before each further one; chance takes up to half away
RETRY_AFTER = 5.0  # seconds, where Cohere does not say
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
PASSING = RETRIED - {500} | {499}  # states of Cohere, not of the request: 503 for our client


class Connection(NamedTuple):
    """A client of the package, and the HTTP client below it, which is what can be closed."""

    client: AsyncClientV2
    http: httpx.AsyncClient


# An HTTP client belongs to the event loop that opened its connections. One for each loop keeps them between searches.
_connections: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Connection]] = WeakKeyDictionary()


class CohereReranker:
    """One of Cohere's rerank models; relevance is between 0 and 1."""

    provider = "cohere"

    def __init__(self, api_key: str, base_url: str, timeout: float, model: str | None = None) -> None:
        self.model = model or MODEL
        self._api_key = api_key
        self._base_url = base_url
        self._timeout = timeout

    async def rerank(self, query: str, texts: Sequence[str], top: int) -> list[tuple[int, float]]:
        """The `top` most relevant of at most 1,000 texts, best first, as (place in `texts`, relevance).

        Of a text Cohere reads the first 4,096 tokens. 429 and what passes by itself is tried again within the timeout.
        """
        if len(texts) > MAX_TEXTS:
            raise ValueError(f"Cohere reranks at most {MAX_TEXTS} texts at a time, not {len(texts)}")
        if not texts or top < 1:
            return []
        from httpx import TimeoutException

        client = await self._client()
        try:
            async with asyncio.timeout(self._timeout) as deadline:
                sent = [text[:MAX_CHARACTERS] for text in texts]
                answer = await self._ask(client, deadline.when() or math.inf, query, sent, min(top, len(texts)))
        except (TimeoutError, TimeoutException) as error:
            raise RerankerTimeout(f"Cohere did not answer within {self._timeout:g} seconds") from error
        return _checked(answer, len(texts), top)

    async def _client(self) -> AsyncClientV2:
        connections = _connections.setdefault(asyncio.get_running_loop(), {})
        address = (self._api_key, self._base_url)
        if address not in connections:
            made = await asyncio.to_thread(_connect, *address)
            connections.setdefault(address, made)  # another search may have been faster; nothing is open so far
        return connections[address].client

    async def _ask(self, client: AsyncClientV2, deadline: float, query: str, texts: list[str], top: int) -> Any:
        import httpx
        from cohere.core.api_error import ApiError
        from cohere.core.parse_error import ParsingError

        for attempt in range(1, ATTEMPTS + 1):
            cause: Exception
            failure: RerankerError
            try:
                return await client.rerank(model=self.model, query=query, documents=texts, top_n=top)
            except ApiError as error:
                cause, failure = error, self._refusal(error.status_code, error.body)
                again, told = error.status_code in RETRIED, _retry_after(error.headers or {})
            except httpx.TimeoutException:
                raise
            except httpx.TransportError as error:
                cause, failure = error, RerankerUnavailable("Cohere cannot be reached", RETRY_AFTER)
                again, told = True, None
            except UnicodeEncodeError:
                raise  # the request's fault, not the answer's
            except httpx.InvalidURL as error:
                raise RerankerFailed("PGSHELF_COHERE_BASE_URL is no address") from error
            except (httpx.HTTPError, ParsingError, ValueError, TypeError, RecursionError) as error:
                raise RerankerFailed("Cohere's answer could not be read") from error
            if told is not None and isinstance(failure, RerankerUnavailable):
                failure.retry_after = told
            # behind a Retry-After too: those who were sent away together shall not come back together
            wait = (told or 0) + BACKOFF * 2 ** (attempt - 1) * random.uniform(0.5, 1)  # noqa: S311 - it keeps no secret
            if not again or attempt == ATTEMPTS or asyncio.get_running_loop().time() + wait >= deadline:
                raise failure from cause
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    def _refusal(self, status: int | None, body: Any) -> RerankerError:
        if status in PASSING:
            busy = "limits how often it may be asked" if status == 429 else "is not available"
            return RerankerUnavailable(f"Cohere {busy} (status {status})", RETRY_AFTER)
        if status in (401, 403, 498):
            return RerankerFailed(f"Cohere refused the key in PGSHELF_COHERE_API_KEY (status {status})")
        if status == 404:
            return ModelUnknown(f'Cohere has no rerank model "{self.model}" for the server\'s key')
        if status is None or status < 400:
            return RerankerFailed("Cohere's answer could not be read")
        said = body.get("message") if isinstance(body, dict) else None
        reason = f": {said.replace(self._api_key, '***')[:200].rstrip('. ')}" if isinstance(said, str) else ""
        return RerankerFailed(f"Cohere refused the request (status {status}){reason}")


def _connect(api_key: str, base_url: str) -> Connection:
    """Import the package, which takes most of half a second, and make a client; for a thread."""
    import httpx
    from cohere import AsyncClientV2

    http = httpx.AsyncClient(timeout=None)  # noqa: S113 - rerank's timeout spans all of its attempts
    client = AsyncClientV2(api_key, base_url=base_url, client_name="pgshelf", max_retries=0, httpx_client=http)
    return Connection(client, http)


async def close() -> None:
    """Close the connections of this event loop; whoever asks later opens new ones."""
    for connection in _connections.pop(asyncio.get_running_loop(), {}).values():
        await connection.http.aclose()


def _retry_after(headers: dict[str, str]) -> float | None:
    """Seconds to wait, from a number or a date; None where nothing usable is said."""
    said = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    try:
        seconds = float(said) if said.strip()[:1].isdigit() else _until(said)
    except (ValueError, TypeError):  # TypeError: a date without a zone
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _until(date: str) -> float:
    return (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds()


def _checked(answer: Any, count: int, top: int) -> list[tuple[int, float]]:
    """What Cohere answered, if it is an answer to what was asked."""
    found: list[tuple[Any, Any]] = [
        (getattr(item, "index", None), getattr(item, "relevance_score", None)) for item in _results(answer)
    ]
    ranked = [
        (index, float(score))
        for index, score in found
        if type(index) is int and 0 <= index < count and type(score) in (int, float) and math.isfinite(score)
    ]
    places = {index for index, _ in ranked}
    if not len(places) == len(ranked) == len(found) == min(top, count):
        raise RerankerFailed("Cohere's answer does not fit the texts: places or relevances are wrong, missing, double")
    return sorted(ranked, key=lambda item: (-item[1], item[0]))


def _results(answer: Any) -> list[Any]:
    results = getattr(answer, "results", None)
    return results if isinstance(results, list) else []
