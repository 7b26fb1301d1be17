"""Stages of a request, timed into its `Server-Timing` header."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

# Milliseconds by stage; one dict a request, shared with the tasks it starts.
stages: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)

# Opens the span of a stage, where traces are on: tracing.py puts it here.
span: Callable[[str], AbstractContextManager[None]] | None = None
# What else a log line says of a request: how it was searched, never what was searched for.
notes: ContextVar[dict[str, str] | None] = ContextVar("notes", default=None)


def note(**told: str) -> None:
    """Say something of the current request, once; what differs between its parts becomes "various"."""
    found = notes.get()
    if found is not None:
        for name, value in told.items():
            found[name] = value if found.get(name, value) == value else "various"


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time spent inside towards a stage of the current request; outside a request it counts nowhere."""
    started = time.perf_counter()
    try:
        if span is None:
            yield
        else:
            with span(name):
                yield
    finally:
        spent = stages.get()
        if spent is not None:
            spent[name] = spent.get(name, 0.0) + (time.perf_counter() - started) * 1000
