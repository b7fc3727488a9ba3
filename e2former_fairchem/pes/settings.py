"""A check's settings from the YAML: every key known, every value of its type, before anything heavy starts."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

# How a message names the types of the fields.
_WORDS = {
    bool: "true or false",
    int: "a positive integer",
    float: "a positive number",
    str: "a string",
    tuple[str, ...]: "a list of names or files",
    tuple[int, ...]: "a list of positive integers",
    types.NoneType: "null",
}


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or a ValueError without a message."""
    if kind is types.NoneType:
        if value is None:
            return None
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return float(value)
    elif kind is str:
        if isinstance(value, str):
            return value
    else:
        (item, _) = typing.get_args(kind)
        if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0:
            return tuple(_convert(one, item) for one in value)
    raise ValueError


def build_settings(kind: type[T], name: str, given: Mapping[str, Any]) -> T:
    """Settings of a check.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, tuples of str or int, or one of these or None.
            Integers are positive, numbers finite and not negative, lists not empty.
        name: of the check, for messages.
        given: keys and values; what is not given keeps its default.

    Raises:
        ValueError: an unknown key or a wrong value, with key, expected and got.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(given) - set(hints))
    if unknown:
        raise ValueError(f"{name}: expected keys among {', '.join(hints)}, got {', '.join(unknown)}")
    values = {}
    for key, value in given.items():
        options = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
        for option in options:
            try:
                values[key] = _convert(value, option)
                break
            except ValueError:
                continue
        else:
            wanted = " or ".join(_WORDS[option] for option in options)
            raise ValueError(f"{name}.{key}: expected {wanted}, got {value!r}")
    return kind(**values)


def as_json(settings: Any) -> dict[str, Any]:
    """The settings as plain data."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(settings).items()}
