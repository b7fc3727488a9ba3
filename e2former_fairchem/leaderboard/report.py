"""The report of a check: what holds, what does not, what was not checked."""

from __future__ import annotations

from collections.abc import Collection, Iterable

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
        complete: whether a reference tells that nothing is missing.
    """

    def __init__(self, title: str, complete: bool) -> None:
        self.title, self.complete = title, complete
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

    def require_matches(self, what: str, given: Collection[object], expected: Collection[object]) -> bool:
        """Note that what the file and the reference hold is the same; False where they have nothing in common.

        Args:
            what: `ids` or `calculations`.
            given: names of the file's.
            expected: names of the reference's.
        """
        mine, theirs = set(given), set(expected)
        missing, unknown = ([i for i in a if i not in b] for a, b in ((expected, mine), (given, theirs)))
        if len(missing) == len(expected):
            return self.require(
                False,
                "",
                f"{what}: expected the {len(expected)} of the reference, like {next(iter(expected), 'none')}, got "
                f"{len(given)} others, like {next(iter(given), 'none')}: the reference belongs to something else",
            )
        self.require(
            not missing,
            f"all {len(expected)} {what} of the reference",
            f"{what}: expected {len(expected)} of the reference, got none of {listed(missing, len(missing))}",
        )
        self.require(
            not unknown,
            f"no {what} that are not in the reference",
            f"{what}: got unknown {listed(unknown, len(unknown))}",
        )
        return True

    def note(self, text: str) -> None:
        """Say something that is neither."""
        self._lines.append(f"  note     {text}")

    def __str__(self) -> str:
        if self.problems:
            verdict = f"{len(self.problems)} problem(s): do not upload"
        else:
            verdict = "ready for the upload" if self.complete else "well formed, completeness not checked"
        return "\n".join([self.title, *self._lines, verdict])
