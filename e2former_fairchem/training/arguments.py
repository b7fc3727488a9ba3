"""Checks of single values: each gives the value back, or an error with the key, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any


def _refuse(key: str, expected: str, value: Any) -> None:
    raise ValueError(f"{key}: expected {expected}, got {'nothing' if value is None else repr(value)}")


def integer(key: str, value: Any, least: int) -> int:
    """An integer of at least `least`; a float without a fraction, such as 1e6, is one.

    Raises:
        ValueError: something else.
    """
    whole = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not whole or value != int(value) or value < least:
        _refuse(key, f"an integer of at least {least}", value)
    return int(value)


def number(key: str, value: Any) -> float:
    """A finite number of at least 0.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        _refuse(key, "a number of at least 0", value)
    return float(value)


def positive(key: str, value: Any) -> float:
    """A finite number above 0.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        _refuse(key, "a number above 0", value)
    return float(value)


def boolean(key: str, value: Any) -> bool:
    """True or false.

    Raises:
        ValueError: something else.
    """
    if not isinstance(value, bool):
        _refuse(key, "true or false", value)
    return value
