"""Checks of configuration and input, made before any heavy work; every message names what was expected and got."""

from __future__ import annotations

import difflib
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from ase.data import chemical_symbols
from fairchem.core.units.mlip_unit.api.inference import CHARGE_RANGE, SPIN_RANGE
from omegaconf import OmegaConf
from torch import Tensor

from e2former_fairchem.data.structures import whole_number

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData

    from e2former_fairchem.states import SeenStates

__all__ = [
    "check_batch",
    "check_keys",
    "first_time",
    "log_once",
    "plain",
    "read_other_spellings",
    "shows_keys_of",
    "symbol",
]

Function = TypeVar("Function", bound=Callable[..., Any])
_NAMED = 5
#: Distance of neighbouring coordinates (Å) from which a structure is named in a warning: float32's at 256 Å. Moved
#: there, molecules' forces change by 1e-4 eV/Å on average (1e-3 at most; at 10,000 Å 5e-3 and 5e-2), and no compact
#: system that fits a GPU reaches so far from its own centre. And the distance that is refused: float32's at 131,072 Å.
COARSE_POSITIONS = 2.0**-15
MEANINGLESS_POSITIONS = 0.01
_logged: set[str] = set()


def first_time(key: str) -> bool:
    """Whether something comes up for the first time in this process."""
    if key in _logged:
        return False
    _logged.add(key)
    return True


def log_once(message: str) -> None:
    """Log a warning the first time it comes up in this process."""
    if first_time(message):
        logging.warning(message)


def read_other_spellings(info: dict[str, Any]) -> None:
    """Set charge and spin in a structure's info from the keys that other programs use, where it has those.

    Raises:
        ValueError: such a key is no integer, or says something else than another one.
    """
    for key, others in (("charge", ("total_charge",)), ("spin", ("multiplicity", "spin_multiplicity"))):
        given = {name: whole_number(info, name) for name in others if name in info}
        if not given:
            continue
        if key in info:
            given[key] = info[key]
        first, *rest = given.values()
        if any(value != first for value in rest):
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"{key}: expected one value in the structure's info, got {said}")
        info[key] = first


def symbol(number: int) -> str:
    """An element's symbol."""
    return chemical_symbols[number] if number < len(chemical_symbols) else f"Z = {number}"


def plain(value: Any) -> Any:
    """The value without OmegaConf: what a YAML hands over as a list or dictionary node becomes one of Python's."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def shows_keys_of(config: type) -> Callable[[Function], Function]:
    """For a function whose ``**`` argument is handed to a dataclass: its signature has the dataclass's fields instead.

    Args:
        config: the dataclass.

    Returns:
        What decorates the function.
    """

    def decorate(function: Function) -> Function:
        own = inspect.signature(function)
        keys = [k.replace(kind=k.KEYWORD_ONLY) for k in inspect.signature(config).parameters.values()]
        rest = [k for k in own.parameters.values() if k.kind is not k.VAR_KEYWORD]
        places = [k for k in rest if k.kind is not k.KEYWORD_ONLY]
        function.__signature__ = own.replace(parameters=[*places, *keys, *rest[len(places) :]])
        return function

    return decorate


def check_keys(owner: str, unknown: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Refuse keys that nobody knows.

    Args:
        owner: what the keys configure.
        unknown: keys that were not accepted.
        function: takes the allowed keys.

    Raises:
        TypeError: names the first unknown key, the likely intended one and all allowed ones.
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


def check_batch(
    data: AtomicData,
    max_num_elements: int,
    seen: Tensor | None = None,
    states: SeenStates | None = None,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Charge and spin [B] int64 of a batch whose elements, charges, spins and positions are in range.

    What every atom has is reduced on the device; all is read in one synchronisation. spin 0 means not given, as
    fairchem's LAMMPS and benchmark inputs send it, and is said once in the log; so are elements, charges and
    multiplicities that training never saw, and positions so far from the origin that their precision is too coarse.

    Args:
        data: the batch.
        max_num_elements: largest atomic number.
        seen: [max_num_elements + 1] int64, 0 for atomic numbers that training never saw, 2 for those that only an
            earlier training saw; None does not ask.
        states: charges and multiplicities that training saw; None does not ask.
        strict: refuse what training never saw, or only an earlier one.

    Raises:
        ValueError: names the first offending atoms or structures.
    """
    charge, spin = (_per_system(data, key) for key in ("charge", "spin"))
    numbers, pos, cell = data["atomic_numbers"], data["pos"].detach(), data["cell"].detach()
    if numbers.numel() == 0:
        raise ValueError("expected at least one atom, got an empty batch")
    integers, reals = [numbers], [pos, cell]
    if seen is not None:  # clamped, because nothing is known of the numbers yet
        integers.append(seen.index_select(0, numbers.long().clamp(0, max_num_elements)))
    # extremes of coordinates are finite where all of them are, in one operation instead of isfinite's five
    kinds = [torch.stack([end for values in kind for end in torch.aminmax(values)]) for kind in (integers, reals)]
    wide = torch.promote_types(kinds[1].dtype, torch.float32)
    summary = torch.cat([torch.cat([kinds[0], charge, spin]).to(wide), kinds[1].to(wide)]).tolist()
    ends, rest, real_ends = summary[: kinds[0].numel()], summary[kinds[0].numel() : -4], summary[-4:]
    pairs = list(zip(rest[: charge.numel()], rest[charge.numel() :], strict=True))
    different = {(int(one), int(other)) for one, other in set(pairs)}
    if ends[0] < 1 or ends[1] > max_num_elements:
        _raise_atoms(data, (numbers < 1) | (numbers > max_num_elements), max_num_elements)
    for place, (key, values, bounds) in enumerate((("charge", charge, CHARGE_RANGE), ("spin", spin, SPIN_RANGE))):
        if not all(bounds[0] <= state[place] <= bounds[1] for state in different):
            bad = int(((values < bounds[0]) | (values > bounds[1])).nonzero()[0])
            raise ValueError(f"{key} of structure {bad}: expected {bounds[0]} to {bounds[1]}, got {int(values[bad])}")
    if not all(map(math.isfinite, real_ends)):
        _raise_not_finite(data)
    _check_precision(data, max(-real_ends[0], real_ends[1]))
    if seen is not None and (ends[2] == 0 or ends[3] == 2):
        _unseen(data, seen, strict)
    if states is not None:
        states.check(different, pairs, strict)
    if any(multiplicity == 0 for _, multiplicity in different):
        log_once(
            "e2former_v2: a structure has spin 0, which stands for a spin multiplicity that is not given. Set "
            "atoms.info['spin'] (1 for a singlet) and, for data sets, a2g_args.r_data_keys: [spin, charge]."
        )
    return charge, spin


def _unseen(data: AtomicData, seen: Tensor, strict: bool) -> None:
    """Name the elements of a batch that the last training never saw."""
    known = seen[data["atomic_numbers"].long()]

    def named(value: int) -> str:
        return ", ".join(map(symbol, data["atomic_numbers"][known == value].unique().tolist()))

    never, before = named(0), named(2)
    if not strict:
        if never:
            log_once(
                f"e2former_v2: training never saw {never}: predictions for structures with these elements mean "
                "nothing. The backbone's key strict_elements: true refuses them."
            )
        if before:
            log_once(
                f"e2former_v2: only an earlier training saw {before}: forces on structures with these elements rest on "
                "it, and their energies are of its level of theory. The backbone's key strict_elements: true refuses "
                "them."
            )
        return
    atoms = (known != 1).nonzero().squeeze(1).tolist()
    expected = ", ".join(map(symbol, (seen[1:] == 1).nonzero().squeeze(1).add(1).tolist()))
    got = ", ".join(filter(None, [never, f"{before} of an earlier training" if before else ""]))
    where = ", ".join(f"{name} is {symbol(int(data['atomic_numbers'][atom]))}" for atom, name in _names(data, atoms))
    raise ValueError(
        f"atomic_numbers: expected elements that training has seen (strict_elements), {expected}, got {got}: {where}; "
        f"{len(atoms)} atoms in all"
    )


def _check_precision(data: AtomicData, reach: float) -> None:
    """Name the structure whose positions, up to `reach` Å from the origin, are too coarse in their precision."""
    dtype = data["pos"].dtype
    spacing = torch.finfo(dtype).eps * 2.0 ** (math.frexp(reach)[1] - 1)
    if spacing < COARSE_POSITIONS:
        return
    meaningless = spacing > MEANINGLESS_POSITIONS
    if not meaningless and not first_time(f"positions {spacing} Å apart"):
        return
    atom = int(data["pos"].detach().abs().amax(1).argmax())
    where = (
        f"structure {int(data['batch'][atom])} reaches {reach:,.0f} Å from the origin, where neighbouring "
        f"{str(dtype).removeprefix('torch.')} numbers are {spacing:.2g} Å apart"
    )
    remedy = "centre it first: atoms.positions -= atoms.positions.mean(0)"
    if meaningless:
        raise ValueError(
            f"positions: expected coordinates that are known to {MEANINGLESS_POSITIONS} Å, but {where}; {remedy}"
        )
    logging.warning(f"e2former_v2: {where}, so that forces change with the place; {remedy}.")


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
