"""Log lines: where they go, in which form, what each of them carries, and how loud libraries may be."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.typing import Processor

log = logging.getLogger("pgshelf.requests")

# They say at `info` what concerns their own developers.
CHATTY = ("alembic", "httpcore", "httpcore2", "httpx", "httpx2", "sqlalchemy", "wordllama")

bind = structlog.contextvars.bound_contextvars


def configure(level: str, form: str = "console") -> None:
    """Log to stderr from `level` on, libraries from warnings on: lines for people, or one JSON object a line.

    Whatever is bound (`bind`) while a request is served, its id first, stands on every line that comes of it.
    """
    known: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    if form == "json":
        rendered: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        plain = structlog.dev.plain_traceback  # the richer one shows local variables, and so texts and vectors
        rendered = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=known, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered]
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])  # none but the first counts
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def request(slow: bool, method: str, route: str, status: int, stages: dict[str, float], notes: dict[str, str]) -> None:
    """Log a request that was answered, with its milliseconds by stage and how it was done."""
    spent = {f"{name}_ms": round(milliseconds, 2) for name, milliseconds in stages.items()}
    level, text = (logging.WARNING, "slow request") if slow else (logging.INFO, "request")
    log.log(level, text, extra={"method": method, "route": route, "status": status, **notes, **spent})
