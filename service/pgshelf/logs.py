"""Where log lines go, and how loud libraries may be."""

from __future__ import annotations

import logging

# They say at `info` what concerns their own developers.
CHATTY = ("alembic", "httpcore", "httpcore2", "httpx", "httpx2", "sqlalchemy", "wordllama")


def configure(level: str) -> None:
    """Log to stderr from `level` on; libraries from warnings on."""
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
