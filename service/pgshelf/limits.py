"""What a request may hold: lengths, sizes and depths by setting, and vectors that are vectors."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from pgvector import Vector
from psycopg.types.json import Jsonb

from pgshelf.errors import SILENT, Problem, invalid
from pgshelf.settings import Settings

MAX_DIMENSION = 16_000  # of pgvector's type vector
NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # in JSON, where a backslash of the text itself is doubled


def required_text(value: str, limit: int, path: str) -> str:
    """A text that is neither blank nor longer than `limit` characters."""
    if not value.strip():
        raise invalid(path, "must not be empty")
    if len(value) > limit:
        raise invalid(path, f"has {len(value)} characters, at most {limit} are allowed")
    return value


def bounded_text(value: str | None, limit: int, path: str) -> str | None:
    """An optional text of at most `limit` characters."""
    if value is not None and len(value) > limit:
        raise invalid(path, f"has {len(value)} characters, at most {limit} are allowed")
    return value


def storable(value: str | None, path: str) -> None:
    """Refuse a text that PostgreSQL would refuse: among many documents it would hold up the others there."""
    if value is not None and "\x00" in value:
        raise _unstorable(path)


def _unstorable(path: str) -> Problem:
    return Problem("invalid_text", f"{path}: {SILENT['invalid_text']}")


def metadata(value: dict[str, Any], settings: Settings, path: str = "metadata") -> Jsonb:
    """Metadata as a parameter, within its size in bytes and its depth."""
    if _deeper_than(value, settings.max_metadata_depth):
        raise invalid(path, f"is nested deeper than {settings.max_metadata_depth} levels")
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        size = len(text.encode())
    except (TypeError, ValueError):
        raise invalid(path, "holds something that is not JSON, or a number that JSON cannot express") from None
    if size > settings.max_metadata_bytes:
        raise invalid(path, f"has {size} bytes, at most {settings.max_metadata_bytes} are allowed")
    if "\\u0000" in text and NUL.search(text):
        raise _unstorable(path)
    return Jsonb(value, dumps=lambda _: text)


def _deeper_than(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_deeper_than(item, levels - 1) for item in value)
    return False


def vector(value: list[float] | bytes, path: str) -> Vector:
    """A vector as a parameter: from numbers, or from raw little-endian float32 bytes. What it must be, SQL checks."""
    if isinstance(value, bytes):
        if len(value) % 4:
            raise invalid(path, "has a number of bytes that is no multiple of 4; send little-endian float32 values")
        numbers = np.frombuffer(value, dtype="<f4")
    else:
        with np.errstate(over="ignore", under="ignore"):  # what leaves float32 is caught below, or is zero
            numbers = np.asarray(value, dtype=np.float32)
    if not 1 <= len(numbers) <= MAX_DIMENSION:
        raise invalid(path, f"has {len(numbers)} numbers; a vector has 1 to {MAX_DIMENSION}")
    if not np.isfinite(numbers).all():
        raise Problem("invalid_vector", f"{path}: holds NaN, infinity, or a number beyond single precision (3.4e38).")
    return Vector(numbers)
