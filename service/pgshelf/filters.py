"""A filter as it arrives: its form and bounds. What it means is defined once, in sql/57_filters.sql."""

from __future__ import annotations

import json
from typing import Any

from psycopg.types.json import Jsonb

from pgshelf.errors import invalid
from pgshelf.settings import Settings


def parameter(value: dict[str, Any] | None, settings: Settings, path: str = "filter") -> Jsonb | None:
    """A filter as a bound parameter; none stays none."""
    if value is None:
        return None
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError):
        raise invalid(path, "holds something that is not JSON, or a number that JSON cannot express") from None
    if (size := len(text.encode())) > settings.max_filter_bytes:
        raise invalid(path, f"has {size} bytes, at most {settings.max_filter_bytes} are allowed")
    if _deeper_than(value, settings.max_filter_depth):
        raise invalid(path, f"is nested deeper than {settings.max_filter_depth} levels")
    return Jsonb(value, dumps=lambda _: text)


def narrowed(value: dict[str, Any] | None, condition: dict[str, Any]) -> dict[str, Any]:
    """A filter with a condition more, which leaves all of it at its paths: what is said of them stays true.

    An `$and` that is none stays as it is, to be refused as such.
    """
    given = value or {}
    arms = given.get("$and", [])
    return {**given, "$and": [*arms, condition]} if isinstance(arms, list) and (arms or "$and" not in given) else given


def _deeper_than(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value)
    return False
