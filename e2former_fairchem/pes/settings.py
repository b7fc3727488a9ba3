"""A check's settings from the YAML: every key known, every value of its type, before anything heavy starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")

# How a message names the types of the fields.
_WORDS = {
    "int": "a positive integer",
    "float": "a positive number",
    "float | None": "a positive number or null",
    "list[str]": "a list of names or files",
    "list[int]": "a list of positive integers",
}


def _in_range(value: Any) -> bool:
    """Integers are positive, numbers finite and not negative, lists not empty."""
    if isinstance(value, list):
        return len(value) > 0 and all(map(_in_range, value))
    if value is None or isinstance(value, str):
        return True
    return value > 0 if isinstance(value, int) else 0 <= value < math.inf


def build_settings(kind: type[T], name: str, given: Mapping[str, Any]) -> T:
    """Settings of a check: OmegaConf's structured config of a dataclass, with the given keys merged into it.

    Args:
        kind: a dataclass whose fields are annotated by the types that `_WORDS` lists.
        name: of the check, for messages.
        given: keys and values; what is not given keeps its default.

    Returns:
        An object of `kind`.

    Raises:
        ValueError: an unknown key, or a value of another type or out of range, with key, expected and got.
    """
    config = OmegaConf.structured(kind)
    words = {field.name: _WORDS[field.type] for field in fields(kind)}
    for key, value in given.items():
        wrong = ValueError(f"{name}.{key}: expected {words.get(key)}, got {value!r}")
        try:
            config = OmegaConf.merge(config, {key: value})
        except ConfigKeyError as err:
            raise ValueError(f"{name}: expected keys among {', '.join(words)}, got {key}") from err
        except OmegaConfBaseException as err:
            raise wrong from err
        if not _in_range(OmegaConf.to_container(config)[key]):
            raise wrong
    return OmegaConf.to_object(config)
