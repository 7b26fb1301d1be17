"""A filter as it arrives: its form and bounds. What it means is defined once, in sql/57_filters.sql."""

from __future__ import annotations

import json
from typing import Any

from psycopg.types.json import Jsonb

from pgshelf.errors import invalid

MAX_BYTES = 65_536
MAX_DEPTH = 40  # levels of JSON; SQL allows eight of $and, $or and $not, and values may be nested too


def parameter(value: dict[str, Any] | None, path: str = "filter") -> Jsonb | None:
    """A filter as a bound parameter; none stays none."""
    if value is None:
        return None
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError):
        raise invalid(path, "holds something that is not JSON, or a number that JSON cannot express") from None
    if (size := len(text.encode())) > MAX_BYTES:
        raise invalid(path, f"has {size} bytes, at most {MAX_BYTES} are allowed")
    if _deeper_than(value, MAX_DEPTH):
        raise invalid(path, f"is nested deeper than {MAX_DEPTH} levels")
    return Jsonb(value, dumps=lambda _: text)


def _deeper_than(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value)
    return False
