"""Which requests are sent again, and when. Nothing here waits: the clients do."""

import random
import time

import httpx2
import msgspec

from ._base import Call
from .errors import ConnectionFailed, PgshelfError, RateLimited, error_from

# The request never left, so sending it again cannot do anything twice.
NOT_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
# The same request would fail the same way.
HOPELESS = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.DecodingError, httpx2.TooManyRedirects)
PASSING_STATUSES = frozenset({429, 502, 503, 504})
# The server says these when this attempt has not begun, or when its transaction is rolled back; they may pass.
NOTHING_DONE = frozenset(
    {
        "conflict",
        "idempotency_key_in_use",
        "lock_timeout",
        "not_migrated",
        "not_ready",
        "pool_exhausted",
        "read_only",
        "request_timeout",
        "storage_full",
    }
)
# Another one holds what the call needs; one that was killed lets go of it after so many seconds, by itself.
HELD = {"import_running": 45.0}


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how long to try again; all waits are in seconds.

    The wait before the n-th retry is random between 0 and `base * 2**(n - 1)`, at most `cap` ("full jitter": Brooker,
    Exponential Backoff And Jitter, AWS Architecture Blog, 2015). A Retry-After is waited for in addition; one beyond
    `max_retry_after` raises the error at once, for coming back early would only be refused again.
    """

    times: int = 3
    base: float = 0.2
    cap: float = 5.0
    max_retry_after: float = 30.0

    def backoff(self, failures: int) -> float:
        """A random wait after this many failures in a row."""
        ceiling = min(self.cap, self.base * 2 ** min(failures - 1, 60))
        return random.uniform(0.0, ceiling)  # noqa: S311 - jitter keeps no secret


class Attempts:
    """One call's way through failures: after each attempt it says how long to wait, that it is over, or raises."""

    def __init__(self, call: Call, retries: Retries) -> None:
        self.call = call
        self.retries = retries
        self.failures = 0
        self.begun = time.monotonic()
        self.perhaps_done = False  # an earlier attempt may have been carried out, its answer lost

    def after_failure(self, error: httpx2.RequestError) -> float:
        """Seconds to wait before the next attempt, or the error as ConnectionFailed."""
        sent = not isinstance(error, (*NOT_SENT, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError))
        self.perhaps_done |= sent
        failed = ConnectionFailed(self.describe(error), outcome_unknown=self.perhaps_done and not self.call.reads)
        if isinstance(error, HOPELESS) or (sent and not self.call.repeatable):
            raise failed from error
        return self.wait_or_raise(failed, None, error)

    def after_answer(self, response: httpx2.Response) -> float | None:
        """None when the call is over, seconds to wait before the next attempt, or the error that the answer is."""
        error = error_from(response)
        if error is None:
            return None
        if self.call.patient and self.retries.times and time.monotonic() - self.begun < HELD.get(error.code, 0.0):
            return self.retries.cap / 5 + self.retries.backoff(1)
        nothing_done = isinstance(error, RateLimited) or error.code in NOTHING_DONE
        if not nothing_done and (error.status not in PASSING_STATUSES or not self.call.repeatable):
            raise error
        self.perhaps_done |= not nothing_done
        return self.wait_or_raise(error, error.retry_after)

    def wait_or_raise(
        self, error: PgshelfError, retry_after: float | None, cause: BaseException | None = None
    ) -> float:
        asked = retry_after or 0.0
        times = self.retries.times if self.call.patient else 0
        if self.failures >= times or asked > self.retries.max_retry_after:
            raise error from cause
        self.failures += 1
        return asked + self.retries.backoff(self.failures)

    def describe(self, error: httpx2.RequestError) -> str:
        said = str(error) or type(error).__name__
        tried = f" (attempt {self.failures + 1})" if self.failures else ""
        unknown = "; the server may have carried it out" if self.perhaps_done and not self.call.reads else ""
        return f"{self.call.method} {self.call.url}: {said}{tried}{unknown}"
