"""The rounds of the reconciler, counted: one that stands still, or fails again and again, is seen in /metrics."""

from __future__ import annotations

import psycopg
from prometheus_client import Counter

from pgshelf.errors import problem_of

ROUNDS = Counter("pgshelf_worker_rounds", "Rounds of the worker and how they ended.", ["task", "outcome"])


def ended(task: str, busy: bool | None) -> None:
    """Count a round: was there something to do? None: it failed."""
    ROUNDS.labels(task, "failed" if busy is None else "busy" if busy else "idle").inc()


def reason(error: BaseException) -> str:
    """Why one failed, on one line; and what to do where the schema is missing, or a right."""
    if not isinstance(error, psycopg.Error):
        return str(error)
    said, problem = error.diag.message_primary or " ".join(str(error).split()), problem_of(error)
    return f"{said}. {problem.detail}" if problem.code in ("not_migrated", "database_forbidden") else said
