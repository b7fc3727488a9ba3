"""Checks of configuration and input, made before any heavy work; every message names what was expected and got."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from fairchem.core.units.mlip_unit.api.inference import CHARGE_RANGE, SPIN_RANGE
from omegaconf import OmegaConf
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from fairchem.core.datasets.atomic_data import AtomicData

__all__ = [
    "check_batch",
    "check_keys",
    "log_once",
    "plain",
]

_NAMED = 5
_logged: set[str] = set()


def log_once(message: str) -> None:
    """Log a warning the first time it comes up in this process."""
    if message not in _logged:
        _logged.add(message)
        logging.warning(message)


def plain(value: Any) -> Any:
    """The value without OmegaConf: what a YAML hands over as a list or dictionary node becomes one of Python's."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_keys(owner: str, unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise TypeError naming the first unknown key, the likely intended one and all allowed ones.

    owner: what the keys configure. unknown: keys that were not accepted. function: takes the allowed keys.
    """
    if not unknown:
        return
    allowed = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    key = next(iter(unknown))
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise TypeError(f"{owner}: unknown key {key!r}{hint}; expected {', '.join(sorted(allowed))}")


def check_batch(data: AtomicData, max_num_elements: int) -> tuple[Tensor, Tensor]:
    """Charge and spin [B] int64 of a batch whose elements, charges, spins and positions are in range.

    Everything is reduced on the device and read in one synchronisation. spin 0 means not given, as fairchem's LAMMPS
    and benchmark inputs send it, and is said once in the log.
    Raises ValueError naming the first offending atoms or structures.
    """
    charge, spin = (_per_system(data, key) for key in ("charge", "spin"))
    numbers, pos, cell = data["atomic_numbers"], data["pos"].detach(), data["cell"].detach()
    if numbers.numel() == 0:
        raise ValueError("expected at least one atom, got an empty batch")
    # extremes of coordinates are finite where all of them are, in one operation instead of isfinite's five
    ranges = [torch.aminmax(values) for values in (numbers, charge, spin, pos, cell)]
    kinds = [torch.stack([end for both in kind for end in both]) for kind in (ranges[:3], ranges[3:])]
    summary = torch.cat([kind.double() for kind in kinds]).tolist()
    low_z, high_z, low_charge, high_charge, low_spin, high_spin = map(int, summary[:6])
    finite = all(map(math.isfinite, summary[6:]))
    if low_z < 1 or high_z > max_num_elements:
        _raise_atoms(data, (numbers < 1) | (numbers > max_num_elements), max_num_elements)
    for key, values, low, high, bounds in (
        ("charge", charge, low_charge, high_charge, CHARGE_RANGE),
        ("spin", spin, low_spin, high_spin, SPIN_RANGE),
    ):
        if low < bounds[0] or high > bounds[1]:
            bad = int(((values < bounds[0]) | (values > bounds[1])).nonzero()[0])
            raise ValueError(f"{key} of structure {bad}: expected {bounds[0]} to {bounds[1]}, got {int(values[bad])}")
    if not finite:
        _raise_not_finite(data)
    if low_spin == 0:
        log_once(
            "e2former_v2: a structure has spin 0, which stands for a spin multiplicity that is not given. Set "
            "atoms.info['spin'] (1 for a singlet) and, for data sets, a2g_args.r_data_keys: [spin, charge]."
        )
    return charge, spin


def _per_system(data: AtomicData, key: str) -> Tensor:
    if key not in data:
        raise ValueError(
            f"{key}: expected one integer per structure in the batch, got none; give a2g_args.r_data_keys: "
            "[spin, charge] to the data set or atoms.info to the calculator"
        )
    value = data[key].detach().reshape(-1)
    systems = data["natoms"].numel()
    if value.numel() != systems:
        raise ValueError(f"{key}: expected {systems} values, one per structure, got {value.numel()}")
    if value.is_floating_point():
        rounded = value.round()
        if not bool((rounded == value).all()):
            bad = int((rounded != value).nonzero()[0])
            raise ValueError(f"{key} of structure {bad}: expected an integer, got {float(value[bad])}")
        value = rounded
    return value.to(torch.int64)


def _raise_atoms(data: AtomicData, wrong: Tensor, max_num_elements: int) -> None:
    atoms = wrong.nonzero().squeeze(1).tolist()
    named = ", ".join(f"{name} has Z = {int(data['atomic_numbers'][atom])}" for atom, name in _names(data, atoms))
    raise ValueError(
        f"atomic_numbers: expected 1 to {max_num_elements} (max_num_elements), but {named}; {len(atoms)} atoms in all"
    )


def _raise_not_finite(data: AtomicData) -> None:
    atoms = (~torch.isfinite(data["pos"]).all(dim=1)).nonzero().squeeze(1).tolist()
    if atoms:
        named = ", ".join(f"{name} at {data['pos'][atom].tolist()}" for atom, name in _names(data, atoms))
        raise ValueError(f"positions: expected finite coordinates, but {named}; {len(atoms)} atoms in all")
    bad = int((~torch.isfinite(data["cell"]).all(dim=2).all(dim=1)).nonzero()[0])
    raise ValueError(f"cell of structure {bad}: expected finite lattice vectors, got {data['cell'][bad].tolist()}")


def _names(data: AtomicData, atoms: list[int]) -> Iterable[tuple[int, str]]:
    for atom in atoms[:_NAMED]:
        system = int(data["batch"][atom])
        yield atom, f"atom {atom} (atom {atom - int(data['natoms'][:system].sum())} of structure {system})"
