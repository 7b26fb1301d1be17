"""How much one caller may ask: requests in a time, counted for all processes by PostgreSQL, and requests at once.

A process takes a few of a caller's requests from PostgreSQL in advance, so that most are let in without asking anybody.
It takes more the faster they come, up to a tenth of the quota. So in any time of t seconds a caller gets at most
quota * (1 + t / window), and for each process a tenth of the quota more.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import math
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import msgspec
import psycopg

from pgshelf import connections, http, questions
from pgshelf.errors import Problem
from pgshelf.settings import Network, Settings, listed, networks
from pgshelf.timing import stage

Kind = Literal["search", "write", "import", "admin"]
KINDS: tuple[Kind, ...] = ("search", "write", "import", "admin")
# What benchmarks/rate_limits.py measures them against: two cores serve some hundred searches a second.
PRESETS: dict[str, dict[Kind, str]] = {
    "off": {},
    "team": {"search": "100/s", "write": "20/s", "import": "60/min", "admin": "120/min"},
    "public": {"search": "10/s", "write": "2/s", "import": "6/min", "admin": "30/min"},
}
SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
KNOWN = 10_000  # callers that a process remembers; what it had taken for one that it forgets is lost to that one
SOON, LATE = 0.1, 1.0  # seconds; who has used up what was taken sooner gets twice as much, later half of it
AGAIN = 0.05  # seconds in which a caller that has nothing left is not asked for again
SILENCE = 1.0  # seconds for which PostgreSQL is left alone after it did not answer
TAKE = """
select granted, remaining, wait
from pgshelf.take_requests($1, $2, $3::int, $4::int, $5::float8)
"""


class Quota(msgspec.Struct, frozen=True):
    """So many requests in a time."""

    requests: int
    window: int  # seconds

    @property
    def most(self) -> int:
        """How many of them a process takes in advance."""
        return max(1, self.requests // 10)

    def regained(self, requests: int) -> int:
        """Seconds in which so many are there again, rounded up."""
        return math.ceil(requests * self.window / self.requests)


def quota(text: str) -> Quota | None:
    """A setting such as `100/s`, `600/10min`; none for `off`."""
    found = re.fullmatch(r"([0-9]+)/([0-9]*)(s|min|h|d)", text)
    return Quota(int(found[1]), int(found[2] or 1) * SECONDS[found[3]]) if found else None


def quotas(settings: Settings) -> dict[Kind, Quota]:
    """The quotas of a caller: of the preset, but where a class has a setting of its own."""
    preset = PRESETS[settings.rate_limits]
    told = {kind: getattr(settings, f"rate_limit_{kind}") or preset.get(kind, "off") for kind in KINDS}
    return {kind: found for kind, text in told.items() if (found := quota(text)) is not None}


class Share:
    """What this process may still let in of one caller and class."""

    def __init__(self, whole: int) -> None:
        self.taken, self.step, self.remaining = 0, 1, whole
        self.asked = self.closed_until = 0.0
        self.turn = asyncio.Lock()


class Rates:
    """Lets a caller's requests in, or refuses them."""

    def __init__(self, settings: Settings, url: str, opening: connections.Opening = contextlib.nullcontext) -> None:
        self._quotas = quotas(settings)
        self._beside = questions.Beside(settings, url, "rates", opening, together=False)
        self._shares: OrderedDict[tuple[str, Kind], Share] = OrderedDict()
        self._silent_until = 0.0
        self._most = {False: settings.max_concurrent_requests, True: settings.max_concurrent_streams}
        self._open: Counter[tuple[str, bool]] = Counter()
        self._proxies = networks(settings.trusted_proxies)

    async def close(self) -> None:
        """Give back what it holds."""
        await self._beside.close()

    def address(self, scope: Any) -> str:
        """Whose budget a request without a key uses: its address, as a trusted proxy has it; of IPv6 the network."""
        peer = scope["client"][0] if scope.get("client") else ""
        if self._proxies and is_among(peer, self._proxies):
            header = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
            for entry in reversed(listed(header.decode("latin-1"))):
                peer = entry
                if not is_among(entry, self._proxies):
                    break
        return f"address {_block(peer)}"

    async def admit(self, caller: str, kind: Kind) -> dict[str, str]:
        """Count a request; the headers that tell the caller where it stands. A problem when it has none left."""
        quota = self._quotas.get(kind)
        if quota is None:
            return {}
        share = self._share(caller, kind, quota)
        async with share.turn:
            now = time.monotonic()
            if not share.taken and now >= max(share.closed_until, self._silent_until):
                await self._take(share, caller, kind, quota)
            if share.taken:
                share.taken -= 1
            elif (wait := share.closed_until - time.monotonic()) > 0:
                raise self._refused(kind, quota, math.ceil(wait))
        left = share.taken + share.remaining
        return _headers(kind, quota, left, quota.regained(quota.requests - left))

    def _share(self, caller: str, kind: Kind, quota: Quota) -> Share:
        share = self._shares.get((caller, kind))
        if share is None:
            share = self._shares[caller, kind] = Share(quota.requests)
            if len(self._shares) > KNOWN:
                self._shares.popitem(last=False)
        else:
            self._shares.move_to_end((caller, kind))
        return share

    async def _take(self, share: Share, caller: str, kind: Kind, quota: Quota) -> None:
        """Ask PostgreSQL for some of what the caller has left."""
        now = time.monotonic()
        if now - share.asked < SOON:
            share.step = min(share.step * 2, quota.most)
        elif now - share.asked > LATE:
            share.step = max(share.step // 2, 1)
        try:
            with stage("rates"):
                rows = await self._beside.ask(TAKE, caller, kind, share.step, quota.requests, float(quota.window))
        except (psycopg.Error, Problem) as error:
            # who cannot be counted is let in: nearly everything behind fails for the same reason, and says so
            http.log.debug("a request was not counted: %s", error)
            self._silent_until = now + SILENCE
            return
        [(share.taken, share.remaining, wait)] = rows
        share.asked = now
        if not share.taken:
            share.closed_until = time.monotonic() + max(wait, AGAIN)

    def _refused(self, kind: Kind, quota: Quota, wait: int) -> Problem:
        window = "a second" if quota.window == 1 else f"{quota.window} seconds"
        detail = f"At most {quota.requests} requests of the class {kind!r} in {window}. Try again later."
        return Problem("rate_limited", detail, retry_after=wait, headers=_headers(kind, quota, 0, wait))

    @contextmanager
    def at_once(self, caller: str, *, stream: bool) -> Iterator[None]:
        """One of the requests that a caller has open in this process; streams count among themselves."""
        most, place = self._most[stream], (caller, stream)
        if not most:
            yield
            return
        if self._open[place] >= most:
            what = "streams (imports, exports, changes that wait)" if stream else "requests"
            raise Problem("too_many_concurrent", f"At most {most} {what} of one caller at once. Try again shortly.")
        self._open[place] += 1
        try:
            yield
        finally:
            self._open[place] -= 1
            if not self._open[place]:
                del self._open[place]


def _headers(kind: Kind, quota: Quota, left: int, wait: int) -> dict[str, str]:
    """draft-ietf-httpapi-ratelimit-headers-11, and its three fields before draft 7, which most clients read."""
    return {
        "RateLimit-Policy": f'"{kind}";q={quota.requests};w={quota.window}',
        "RateLimit": f'"{kind}";r={left};t={wait}',
        "RateLimit-Limit": str(quota.requests),
        "RateLimit-Remaining": str(left),
        "RateLimit-Reset": str(wait),
    }


def is_among(address: str, networks: list[Network]) -> bool:
    """Whether an address lies in one of the networks; what is none does not."""
    found = _parsed(address)
    return found is not None and any(found in network for network in networks)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


@functools.lru_cache(1000)
def _block(address: str) -> str:
    """An IPv4 address, or the /64 of an IPv6 one, which is what one customer has."""
    found = _parsed(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found or "unknown")
