"""All checks of a run: what to do, one system after another, and the report."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from e2former_fairchem.pes import bond_scan, cutoff, extensivity, forces, nve, reflection
from e2former_fairchem.pes.potential import Potential
from e2former_fairchem.pes.result import Outcome, worst
from e2former_fairchem.pes.settings import build_settings
from e2former_fairchem.pes.systems import load_systems

#: Check -> its settings, and the function that checks one system; in the order of tables and figures.
CHECKS: dict[str, tuple[type, Callable[..., Outcome]]] = {
    "nve": (nve.NVESettings, nve.check),
    "bond_scan": (bond_scan.BondScanSettings, bond_scan.check),
    "forces": (forces.ForcesSettings, forces.check),
    "extensivity": (extensivity.ExtensivitySettings, extensivity.check),
    "reflection": (reflection.ReflectionSettings, reflection.check),
    "cutoff": (cutoff.CutoffSettings, cutoff.check),
}

#: Check -> system -> outcome.
Outcomes = dict[str, dict[str, Outcome]]


@dataclass(frozen=True)
class SelectedCheck:
    """A check that will run: its name, settings and systems."""

    check: str
    settings: Any
    systems: list[tuple[str, Atoms]]


def select_checks(
    checks: Sequence[str], settings: Mapping[str, Mapping[str, Any]], structures: Sequence[str] | None
) -> list[SelectedCheck]:
    """Check names, settings and systems, before a model is loaded.

    Args:
        checks: names, at least one.
        settings: for each check the keys of its settings that are not the default.
        structures: files whose structures replace the systems of every check; None keeps those of the settings.

    Raises:
        ValueError, FileNotFoundError: an unknown check, key or system, or a wrong value.
    """
    for key, names in (("checks", checks), ("settings", settings)):
        unknown = [str(name) for name in names if name not in CHECKS]
        if unknown or (key == "checks" and not names):
            got = ", ".join(unknown) or "none"
            raise ValueError(f"{key}: expected some of {', '.join(CHECKS)}, got {got}")
    own = None if structures is None else load_systems(structures, "structures")
    selected = []
    for name in (name for name in CHECKS if name in checks):
        kind, _ = CHECKS[name]
        built = build_settings(kind, name, settings.get(name, {}))
        selected.append(SelectedCheck(name, built, own or load_systems(built.systems, f"{name}.systems")))
    return selected


def run_checks(
    potential: Potential, selected: Sequence[SelectedCheck], seed: int, say: Callable[[str], None]
) -> Outcomes:
    """Run the checks; an exception ends the check of its system only, and is in its outcome.

    A system with an element that the checkpoint's training never saw is skipped.

    Args:
        potential: the model.
        selected: see `select_checks`.
        seed: each check and system draws its random numbers from a stream of its own.
        say: gets a line for each check of a system when it is done.
    """
    total = sum(len(one.systems) for one in selected)
    start, done = time.monotonic(), 0
    outcomes: Outcomes = {}
    for one in selected:
        _, function = CHECKS[one.check]
        found = outcomes.setdefault(one.check, {})
        for number, (name, atoms) in enumerate(one.systems):
            begun = time.monotonic()
            rng = np.random.default_rng([seed, list(CHECKS).index(one.check), number])
            unseen = sorted(set(atoms.symbols) - set(potential.elements or atoms.symbols))
            try:
                if unseen:
                    outcome = Outcome(skipped=f"training never saw {', '.join(unseen)}")
                else:
                    outcome = function(potential, name, atoms.copy(), one.settings, rng)
            except Exception as err:  # a model fails as it likes; the other checks are still worth having
                outcome = Outcome(error=f"{type(err).__name__}: {err}", traceback=traceback.format_exc())
            outcome.seconds = time.monotonic() - begun
            found[name] = outcome
            done += 1
            passed = time.monotonic() - start
            detail = outcome.error or outcome.skipped or ""
            say(
                f"pes {done}/{total} [{passed:.0f} s] {one.check} {name}: {outcome.verdict}"
                + (f" ({detail})" if detail else "")
                + f", {outcome.seconds:.1f} s"
            )
    return outcomes


def summarize(outcomes: Outcomes) -> dict[str, str]:
    """The worst verdict of each check."""
    return {check: worst(outcome.verdict for outcome in found.values()) for check, found in outcomes.items()}
