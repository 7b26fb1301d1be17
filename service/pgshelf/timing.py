"""Stages of a request, timed into its `Server-Timing` header."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Milliseconds by stage; one dict a request, shared with the tasks it starts.
stages: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time spent inside towards a stage of the current request; outside a request it counts nowhere."""
    started = time.perf_counter()
    try:
        yield
    finally:
        spent = stages.get()
        if spent is not None:
            spent[name] = spent.get(name, 0.0) + (time.perf_counter() - started) * 1000
