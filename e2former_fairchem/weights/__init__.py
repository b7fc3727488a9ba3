"""Potentials that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the potentials there are."""
    return sorted(file.stem for file in _FOLDER.glob("*.pt"))


def pretrained(name: str) -> str:
    """Path of the inference checkpoint of a potential that comes with the package.

    `FAIRChemCalculator.from_model_checkpoint(pretrained("gfn2-small"), task_name="omol")`; what it is, what it has
    seen and how well it does: `e2former-fairchem info gfn2-small`.

    Raises:
        ValueError: no potential of this name; the message lists those there are.
    """
    if name not in names():
        raise ValueError(f"name: expected a potential that comes with the package ({', '.join(names())}), got {name!r}")
    return str(_FOLDER / f"{name}.pt")
