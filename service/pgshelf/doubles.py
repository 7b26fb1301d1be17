"""Numbers as doubles, where a form does not hold them as they are: jsonb holds many more than JSON in Python does."""

from __future__ import annotations

import sys
from typing import Any

LARGEST = sys.float_info.max


def double(number: int | str) -> float:
    """The nearest double. Beyond them all it is the largest: JSON has no word for infinity."""
    try:
        return max(-LARGEST, min(LARGEST, float(number)))
    except OverflowError:  # said of an int, not of its digits
        return LARGEST if int(number) > 0 else -LARGEST


def integer(digits: str) -> int | float:
    """The integer, or the nearest double where there are more digits than Python reads."""
    try:
        return int(digits)
    except ValueError:
        return double(digits)


def short_integers(value: Any) -> Any:
    """Of dicts and lists the same, where integers beyond 64 bits are doubles."""
    if isinstance(value, dict):
        return {name: short_integers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [short_integers(item) for item in value]
    return double(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value
