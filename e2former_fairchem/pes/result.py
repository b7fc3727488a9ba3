"""What a check finds: metrics with a threshold and a verdict, and curves for the figure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

#: Verdicts, the worst first. `error`: the check raised. `unresolved`: above the threshold, but not above what rounding
#: alone can do at this precision. `info`: no threshold. `skipped`: the check does not apply to this system.
VERDICTS = ("error", "fail", "unresolved", "pass", "info", "skipped")


@dataclass(frozen=True)
class Metric:
    """A number with its unit.

    Attributes:
        name: what it is.
        value: not negative where there is a threshold.
        unit: e.g. `meV/atom/ps`; empty for counts.
        threshold: largest value that passes; None: reported without a verdict.
        resolution: what rounding alone can do to the value, same unit; None: not estimated.
    """

    name: str
    value: float
    unit: str
    threshold: float | None = None
    resolution: float | None = None

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`; a value that is not finite never passes."""
        if self.threshold is None:
            return "info" if math.isfinite(self.value) else "fail"
        if self.value <= self.threshold:
            return "pass"
        if self.resolution is not None and self.value <= self.resolution:
            return "unresolved"
        return "fail"

    def as_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        numbers = {"value": self.value, "threshold": self.threshold, "resolution": self.resolution}
        clean = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {"name": self.name, **clean, "unit": self.unit, "verdict": self.verdict}


@dataclass
class Outcome:
    """A check of one system.

    Attributes:
        metrics: the numbers.
        curves: lists of numbers for the figure; each check documents its own.
        notes: sentences for the reader.
        skipped: why the check does not apply, or None.
        error, traceback: the exception that ended it, or None.
        seconds: wall time.
    """

    metrics: list[Metric] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    skipped: str | None = None
    error: str | None = None
    traceback: str | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The worst verdict of the metrics."""
        if self.error is not None:
            return "error"
        if self.skipped is not None:
            return "skipped"
        return worst(metric.verdict for metric in self.metrics)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "verdict": self.verdict,
            "seconds": round(self.seconds, 2),
            "metrics": [metric.as_json() for metric in self.metrics],
            "notes": self.notes,
            "skipped": self.skipped,
            "error": self.error,
            "traceback": self.traceback,
            "curves": self.curves,
        }


def worst(verdicts: Iterable[str]) -> str:
    """The worst of some verdicts; `skipped` where there are none."""
    return min(verdicts, key=VERDICTS.index, default="skipped")
