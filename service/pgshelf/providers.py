"""Asking a provider over HTTP: connections, attempts within a deadline, and what a refusal means.

The retries of the providers' own packages know no deadline, and sleep for as long as a Retry-After says. So these are
told to try once, and the retries are here: what cannot be waited for within the timeout is refused at once, with the
Retry-After that the provider gave.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
import time
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from prometheus_client import Histogram

if TYPE_CHECKING:
    import ssl

    import httpx

T = TypeVar("T")

ATTEMPTS = 3
BACKOFF = 0.25  # seconds before the second attempt, doubled before each further one; chance takes up to half away
RETRY_AFTER = 5.0  # seconds, where the provider does not say
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
PASSING = RETRIED - {500} | {499}  # states of the provider, not of the request: 503 for our client
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CALLS = Histogram(
    "pgshelf_provider_seconds",
    "Calls of embedders and rerankers with all their attempts, those in this process too.",
    ["provider", "work", "outcome"],
    buckets=SECONDS,
)
REFUSING = frozenset({400, 413, 422})  # what was sent cannot be answered


class Errors(NamedTuple):
    """What is raised, with a message; `refused` is about what was sent, `unavailable` knows the seconds to wait."""

    failed: Callable[[str], Exception]
    refused: Callable[[str], Exception]
    model_unknown: Callable[[str], Exception]
    unavailable: Callable[[str, float], Exception]
    timeout: Callable[[str], Exception]


class Provider(NamedTuple):
    """Whom to ask. `setting` is what its settings begin with, `model` what is asked of it, for its refusals."""

    name: str
    setting: str
    api_key: str | None
    timeout: float
    model: str
    errors: Errors


class Refusal(Exception):
    """An answer with an error status; `said` is the provider's own message."""

    def __init__(self, status: int | None, said: object, headers: Mapping[str, str]) -> None:
        super().__init__(status)
        self.status, self.said, self.headers = status, said, headers


class Unreadable(Exception):
    """An answer that is none."""


@contextlib.contextmanager
def measured(provider: str, work: str, refusals: tuple[type[Exception], ...]) -> Iterator[None]:
    """Around a call of a provider, for /metrics; `refusals` are answers, too."""
    started, outcome = time.perf_counter(), "answered"
    try:
        yield
    except refusals:
        outcome = "refused"
        raise
    except Exception:
        outcome = "failed"
        raise
    except BaseException:  # cancelled: says nothing of the provider
        outcome = ""
        raise
    finally:
        if outcome:
            CALLS.labels(provider, work, outcome).observe(time.perf_counter() - started)


async def ask(provider: Provider, attempt: Callable[[], Awaitable[T]]) -> T:
    """What `attempt` gives; it is made again within the timeout when what stopped it passes by itself.

    It raises Refusal, Unreadable or what httpx raises; out of here come the provider's `errors`.
    """
    from httpx import TimeoutException

    try:
        async with asyncio.timeout(provider.timeout) as deadline:
            return await _attempts(provider, deadline.when() or math.inf, attempt)
    except (TimeoutError, TimeoutException) as error:
        message = f"{provider.name} did not answer within {provider.timeout:g} seconds"
        raise provider.errors.timeout(message) from error


async def _attempts(provider: Provider, deadline: float, attempt: Callable[[], Awaitable[T]]) -> T:
    import httpx

    for number in range(1, ATTEMPTS + 1):
        cause: Exception
        try:
            return await attempt()
        except Refusal as error:
            told = _retry_after(error.headers)
            cause, failure, again = error, _refused(provider, error, told), error.status in RETRIED
        except httpx.TimeoutException:
            raise
        except httpx.TransportError as error:
            failure = provider.errors.unavailable(f"{provider.name} cannot be reached", RETRY_AFTER)
            cause, again, told = error, True, None
        except UnicodeEncodeError:
            raise  # the request's fault, not the answer's
        except httpx.InvalidURL as error:
            raise provider.errors.failed(f"{provider.setting}_BASE_URL is no address") from error
        except (httpx.HTTPError, Unreadable, ValueError, TypeError, RecursionError) as error:
            raise unreadable(provider) from error
        # behind a Retry-After too: those who were sent away together shall not come back together
        wait = (told or 0) + BACKOFF * 2 ** (number - 1) * random.uniform(0.5, 1)  # noqa: S311 - it keeps no secret
        if not again or number == ATTEMPTS or asyncio.get_running_loop().time() + wait >= deadline:
            raise failure from cause
        await asyncio.sleep(wait)
    raise AssertionError("unreachable")


def unreadable(provider: Provider) -> Exception:
    """The failure that an answer is which cannot be understood."""
    return provider.errors.failed(f"{provider.name}'s answer could not be read")


def _refused(provider: Provider, refusal: Refusal, told: float | None) -> Exception:
    name, status = provider.name, refusal.status
    if status in PASSING:
        busy = "limits how often it may be asked" if status == 429 else "is not available"
        return provider.errors.unavailable(f"{name} {busy} (status {status})", RETRY_AFTER if told is None else told)
    if status in (401, 403, 498):
        return provider.errors.failed(f"{name} refused the key in {provider.setting}_API_KEY (status {status})")
    if status == 404:
        return provider.errors.model_unknown(f"{name} has no {provider.model}")
    if status is None or status < 400:
        return unreadable(provider)
    said = refusal.said if isinstance(refusal.said, str) else ""
    if provider.api_key:
        said = said.replace(provider.api_key, "***")
    reason = f": {said[:200].rstrip('. ')}" if said else ""
    make = provider.errors.refused if status in REFUSING else provider.errors.failed
    return make(f"{name} refused the request (status {status}){reason}")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from a number or a date; None where nothing usable is said."""
    said = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    try:
        seconds = float(said) if said.strip()[:1].isdigit() else _until(said)
    except (ValueError, TypeError):  # TypeError: a date without a zone
        return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _until(date: str) -> float:
    return (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds()


class Connection(NamedTuple):
    """A provider's client, and the HTTP client below it, which is what can be closed."""

    client: Any
    http: httpx.AsyncClient


def http_client() -> httpx.AsyncClient:
    """A client that trusts whom this machine trusts; the timeout, which spans all attempts, is the caller's."""
    import httpx

    return httpx.AsyncClient(timeout=None, verify=_certificates())  # noqa: S113 - see above


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: that takes longer than many a call."""
    import httpx

    return httpx.create_ssl_context()


# An HTTP client belongs to the event loop that opened its connections. One for each loop keeps them between requests.
_connections: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, Connection]] = WeakKeyDictionary()


async def connected(address: Hashable, connect: Callable[[], Connection]) -> Any:
    """The client for an address, made in a thread when this event loop has none: importing takes a while."""
    connections = _connections.setdefault(asyncio.get_running_loop(), {})
    if address not in connections:
        made = await asyncio.to_thread(connect)
        connections.setdefault(address, made)  # another request may have been faster; nothing is open so far
    return connections[address].client


async def close() -> None:
    """Close the connections of this event loop; whoever asks later opens new ones."""
    for connection in _connections.pop(asyncio.get_running_loop(), {}).values():
        await connection.http.aclose()
