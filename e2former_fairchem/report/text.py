"""How the report writes names, numbers and times."""

from __future__ import annotations

from collections.abc import Sequence


def short_names(names: Sequence[str]) -> list[str]:
    """Names of sets without the data set's, where all have the same: `omol.val_new` is `val_new`."""
    first = {name.split(".", 1)[0] for name in names}
    if len(first) == 1 and all("." in name for name in names):
        return [name.split(".", 1)[1] for name in names]
    return list(names)


def wordy(number: float) -> str:
    """Three significant digits without exponents where people write none: 0.00123, 12.3, 12,300."""
    if number != number:
        return "–"
    if number == 0:
        return "0"
    size = abs(number)
    if size >= 1000:
        return f"{number:,.0f}"
    if size >= 100:
        return f"{number:.0f}"
    if size >= 10:
        return f"{number:.1f}"
    if size >= 1:
        return f"{number:.2f}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """42 s, 3:57 min, 5:10 h or 3.2 days."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    if seconds < 48 * 3600:
        return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02d} h"
    return f"{seconds / 86400:.1f} days"
