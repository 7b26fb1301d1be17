"""The rounds of the reconciler, counted: one that stands still, or fails again and again, is seen in /metrics."""

from __future__ import annotations

from prometheus_client import Counter

ROUNDS = Counter("pgshelf_worker_rounds", "Rounds of the worker and how they ended.", ["task", "outcome"])


def ended(task: str, busy: bool | None) -> None:
    """Count a round: was there something to do? None: it failed."""
    ROUNDS.labels(task, "failed" if busy is None else "busy" if busy else "idle").inc()
