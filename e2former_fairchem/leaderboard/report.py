"""The report of a check: what holds, what does not, what was not checked."""

from __future__ import annotations

from collections.abc import Iterable

#: Examples that a problem names.
EXAMPLES = 3


def listed(items: Iterable[object], number: int) -> str:
    """`number`, and the first of the items."""
    names = [str(item) for _, item in zip(range(EXAMPLES), items, strict=False)]
    return f"{number} ({', '.join(names)}{', ...' if number > len(names) else ''})"


class Report:
    """Collects the findings of a check.

    Args:
        title: first line.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.problems: list[str] = []
        self._lines: list[str] = []

    def require(self, holds: bool, good: str, problem: str = "") -> bool:
        """Note `good` or, where it does not hold, `problem`; returns `holds`."""
        if holds:
            self._lines.append(f"  ok       {good}")
        else:
            self.problems.append(problem)
            self._lines.append(f"  PROBLEM  {problem}")
        return holds

    def note(self, text: str) -> None:
        """Say something that is neither."""
        self._lines.append(f"  note     {text}")

    def __str__(self) -> str:
        verdict = f"{len(self.problems)} problem(s): do not upload" if self.problems else "ready for the upload"
        return "\n".join([self.title, *self._lines, verdict])
