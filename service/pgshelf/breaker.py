"""A circuit breaker: a provider that keeps failing is left alone for a while, and whoever wants it is told so at once.

The packages whose source was read do not fit: purgatory has a fixed wait and no single probe when it is over, pybreaker
knows asynchronous code of Tornado only. The last release of aiobreaker is of 2021.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

log = logging.getLogger("pgshelf.breaker")

FIRST_WAIT = 1.0  # seconds after it opened, doubled each time a probe fails
PROBE_WAIT = 1.0  # what others are told while a probe is under way


class CircuitOpen(Exception):
    """The provider has been failing and is not asked now; it will be after `retry_after` seconds."""

    def __init__(self, name: str, retry_after: float) -> None:
        super().__init__(f"{name} has been failing and is not asked before {max(1, retry_after):.0f} s are over")
        self.retry_after = retry_after


class Breaker:
    """The circuit of one provider in one process; not for several threads.

    Closed, everything passes. After `failures` failures in a row it opens: `enter` refuses. When the wait is over, one
    call passes as a probe; its success closes the circuit, its failure opens it again for twice as long, `longest`
    seconds at most. Whoever has entered says how it ended by exactly one of `succeeded`, `failed` and `left`.
    `changed` is told when the circuit opens (True) and when it closes.
    """

    def __init__(
        self,
        name: str,
        failures: int,
        longest: float,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.name = name
        self._changed = changed
        self._failures, self._longest, self._clock = failures, longest, clock
        self._in_a_row = 0
        self._opened = 0  # times in a row
        self._until = 0.0
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether the provider counts as away, waiting or being probed."""
        return self._opened > 0

    def remaining(self) -> float:
        """Seconds until it makes sense to ask; 0 now."""
        if not self._opened:
            return 0.0
        if self._probing:
            return PROBE_WAIT
        return max(0.0, self._until - self._clock())

    def enter(self) -> bool:
        """Ask to call the provider; raises CircuitOpen. True: the call is the probe, and its end is told with it."""
        if not self._opened:
            return False
        if (wait := self.remaining()) > 0:
            raise CircuitOpen(self.name, wait)
        self._probing = True
        return True

    def succeeded(self) -> None:
        """The provider answered, be it with a refusal of this very text; however old the call is, it is alive."""
        if self._opened:
            log.warning("%s answers again", self.name)
            self._changed(False)
        self._in_a_row, self._opened, self._probing = 0, 0, False

    def failed(self, probe: bool, retry_after: float | None = None) -> None:
        """The provider is away or broken; a Retry-After of its own counts, up to `longest`."""
        if self._opened and not probe:
            return  # a call from before it opened says nothing new
        self._probing = False
        self._in_a_row += 1
        if not probe and self._in_a_row < self._failures:
            return
        grown = min(self._longest, FIRST_WAIT * 2.0**self._opened)
        wait = max(grown * random.uniform(0.75, 1), min(retry_after or 0, self._longest))  # noqa: S311 - jitter
        if not self._opened:
            self._changed(True)
        self._opened = min(self._opened + 1, 30)
        self._until = self._clock() + wait
        log.warning("%s keeps failing and is left alone for %.1f s", self.name, wait)

    def left(self, probe: bool) -> None:
        """The caller gave up before there was an answer: nothing is known, and another may probe."""
        if probe:
            self._probing = False
