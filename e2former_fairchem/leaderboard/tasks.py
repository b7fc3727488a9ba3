"""The seven evaluation tasks: how each is laid out, computed, checked and scored; and their structures as flat lists.

| task | path of a result | calculation |
|---|---|---|
| ligand_pocket | id / ligand, pocket or ligand_pocket | single point |
| ligand_strain | id / bioactive; id / gas_phase / number | single point; relaxation |
| conformers | family / conformer | relaxation |
| protonation | family / name_charge_spin | relaxation |
| ieea | id / charge / spin | single point |
| spingap | id / spin | single point |
| distance_scaling | vertical / id / point of the curve | single point |

Every structure is a unit of its own: shards and resumption do not care about the top-level keys. A new task is a
layout, a check where its metric assumes something, and a line of `TASKS`.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from fairchem.core.common.safe_pickle import safe_pickle_load

from e2former_fairchem.files import read_json

KeyPath = tuple[str, ...]
Layout = Iterator[tuple[tuple[Any, ...], Atoms]]
Structures = Mapping[KeyPath, Atoms]
Findings = tuple[str, list[str]]
COMPONENTS = ("ligand", "pocket", "ligand_pocket")


@dataclass(frozen=True)
class Unit:
    """One structure: where its result belongs, what to do with it."""

    path: KeyPath
    atoms: Atoms
    relax: bool

    @property
    def name(self) -> str:
        """The path as one string."""
        return "/".join(self.path)


def _grouped(structures: Structures, depth: int = 1) -> dict[KeyPath, dict[KeyPath, Atoms]]:
    groups: dict[KeyPath, dict[KeyPath, Atoms]] = defaultdict(dict)
    for path, atoms in structures.items():
        groups[path[:depth]][path[depth:]] = atoms
    return groups


def _ligand_pocket(inputs: Mapping) -> Layout:
    for key, entry in inputs.items():
        for component in COMPONENTS:
            yield (key, component), entry[component]


def _ligand_pocket_check(structures: Structures) -> Findings:
    """The metric finds each component's atoms in the complex by element and by exactly equal position.

    Rounded positions are equal where they were, so there is no tolerance here: the metric has none.
    """
    wrong = []
    for key, parts in _grouped(structures).items():
        if set(parts) != {(c,) for c in COMPONENTS}:
            wrong.append(f"{key[0]}: has {', '.join(p[0] for p in parts)}")
            continue
        whole, *rest = (
            [(int(z), *r) for z, r in zip(parts[(c,)].numbers, parts[(c,)].positions.tolist(), strict=True)]
            for c in ("ligand_pocket", "ligand", "pocket")
        )
        if len(set(whole)) != len(whole) or set(whole) != set().union(*rest):
            wrong.append(f"{key[0]}: positions of ligand and pocket are not exactly those of ligand_pocket")
    return "ligand, pocket and ligand_pocket, the first two at exactly the positions of the third", wrong


def _ligand_strain(inputs: Mapping) -> Layout:
    for key, entry in inputs.items():
        yield (key, "bioactive"), entry["bioactive_conf"]
        for number, atoms in enumerate(entry["conformers"]):
            yield (key, "gas_phase", number), atoms


def _ligand_strain_check(structures: Structures) -> Findings:
    wrong = [
        key[0]
        for key, parts in _grouped(structures).items()
        if ("bioactive",) not in parts or not any(p[0] == "gas_phase" for p in parts)
    ]
    return "bioactive and at least one gas_phase conformer for each ligand", wrong


def _conformers(inputs: Mapping) -> Layout:
    for family, members in inputs.items():
        for member in members:
            yield (family, member["sid"]), member["initial_atoms"]


def _protonation(inputs: Mapping) -> Layout:
    for family, states in inputs.items():
        for name, state in states.items():
            yield (family, name), state["initial_atoms"]


def _protonation_check(structures: Structures) -> Findings:
    wrong = ["/".join(p) for p in structures if not re.search(r"_-?\d+_\d+$", p[-1])]
    return "states called name_charge_spin", wrong


def _ieea(inputs: Mapping) -> Layout:
    for key, charges in inputs.items():
        for charge, spins in charges.items():
            for spin, entry in spins.items():
                yield (key, charge, spin), entry["atoms"]


def _ieea_check(structures: Structures) -> Findings:
    wrong = []
    for key, states in _grouped(structures).items():
        by_charge: dict[str, int] = defaultdict(int)
        for charge, _ in states:
            by_charge[charge] += 1
        try:
            charges = sorted(by_charge, key=int)
            good = [int(c) for c in charges] == list(range(int(charges[0]), int(charges[0]) + 3))
        except ValueError:
            good = False
        if not good or by_charge[charges[1]] != 1:
            wrong.append(f"{key[0]}: charges {', '.join(by_charge)}")
    return "three consecutive charges, the middle one with one spin", wrong


def _spingap(inputs: Mapping) -> Layout:
    for key, spins in inputs.items():
        for spin, entry in spins.items():
            yield (key, spin), entry["atoms"]


def _spingap_check(structures: Structures) -> Findings:
    wrong = []
    for key, states in _grouped(structures).items():
        spins = [s for (s,) in states]
        if len(spins) < 2 or not all(s.isdigit() for s in spins):
            wrong.append(f"{key[0]}: spins {', '.join(spins)}")
    return "at least two spins, whole numbers, for each system", wrong


def _distance_scaling(inputs: Mapping) -> Layout:
    for vertical, systems in inputs.items():
        for key, points in systems.items():
            for point, atoms in points.items():
                yield (vertical, key, point), atoms


def _distance_scaling_check(structures: Structures) -> Findings:
    wrong = ["/".join(p) for p in structures if "short_range" not in p[-1] and "long_range" not in p[-1]]
    return "points called short_range or long_range", wrong


@dataclass(frozen=True)
class Task:
    """All that one task is.

    layout: paths and structures of its input, in its order. evaluator: fairchem-data-omol's function for its metrics.
    relaxed: whether the results whose paths have this many keys are relaxations; no others are there. check: what the
    metric assumes of all structures together, and the names of those for which it does not hold.
    """

    layout: Callable[[Mapping], Layout]
    evaluator: str
    relaxed: Mapping[int, bool]
    check: Callable[[Structures], Findings] | None = None


TASKS: Mapping[str, Task] = {
    "ligand_pocket": Task(_ligand_pocket, "ligand_pocket", {2: False}, _ligand_pocket_check),
    "ligand_strain": Task(_ligand_strain, "ligand_strain", {2: False, 3: True}, _ligand_strain_check),
    "conformers": Task(_conformers, "geom_conformers", {2: True}),
    "protonation": Task(_protonation, "protonation_energies", {2: True}, _protonation_check),
    "ieea": Task(_ieea, "unoptimized_ie_ea", {3: False}, _ieea_check),
    "spingap": Task(_spingap, "unoptimized_spin_gap", {2: False}, _spingap_check),
    "distance_scaling": Task(_distance_scaling, "distance_scaling", {3: False}, _distance_scaling_check),
}


def get_task(name: str) -> Task:
    """A task by name.

    Raises:
        ValueError: no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def flatten(name: str, inputs: Any, source: str | Path) -> list[Unit]:
    """All structures of a task's input in its own order; keys become strings, as in JSON.

    Raises:
        ValueError: the input is laid out otherwise, is empty, or has a key twice.
    """
    task = get_task(name)
    try:
        units = [
            Unit(tuple(str(k) for k in path), atoms, task.relaxed[len(path)]) for path, atoms in task.layout(inputs)
        ]
    except (AttributeError, KeyError, TypeError) as err:
        raise ValueError(
            f"{source}: expected the input of {name} (see leaderboard/tasks.py), got something else: "
            f"{type(err).__name__}: {err}"
        ) from err
    if not units:
        raise ValueError(f"{source}: expected at least one structure, got none")
    seen: set[KeyPath] = set()
    for unit in units:
        if not isinstance(unit.atoms, Atoms):
            raise ValueError(f"{source}: expected ase.Atoms at {unit.name}, got {type(unit.atoms).__name__}")
        if unit.path in seen:
            raise ValueError(f"{source}: expected each key once, got {unit.name} twice")
        seen.add(unit.path)
    return units


def load_inputs(name: str, source: str | Path | None, key: str = "data") -> list[Unit]:
    """The structures of a task's pickle, read by fairchem's restricted unpickler; `key` is named in messages.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no file was named, or it holds something else.
    """
    if source is None:
        raise ValueError(f"{key}: expected the task's input pickle, got nothing; add {key}=FILE.pkl")
    path = Path(source).expanduser().absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{key}: expected the input pickle of {name}, got {path}, which is no file")
    try:
        with warnings.catch_warnings(), path.open("rb") as handle:
            warnings.simplefilter("ignore")  # that it is a pickle
            inputs = safe_pickle_load(handle)
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as err:
        raise ValueError(
            f"{key}: expected the input pickle of {name}, got {path}: {type(err).__name__}: {err}"
        ) from err
    return flatten(name, inputs, path)


def assemble(results: Iterable[tuple[KeyPath, Any]]) -> dict[str, Any]:
    """Nested dictionaries from paths, in the order given."""
    tree: dict[str, Any] = {}
    for path, value in results:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def leaves(tree: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Results of a nested tree with their paths: single points (`energy`) and relaxations (`final`).

    Raises:
        ValueError: something else hangs in the tree.
    """
    if isinstance(tree, dict) and ("energy" in tree or "final" in tree or "initial" in tree):
        yield path, tree
    elif isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, (*path, key))
    else:
        raise ValueError(
            f"{'/'.join(path) or 'the top level'}: expected an object with results, got "
            f"{'an empty object' if tree == {} else type(tree).__name__}"
        )


def read_results(path: str | Path, key: str | None = None) -> dict[KeyPath, dict[str, Any]]:
    """The results of a gzipped or plain JSON file by path; `key` is named in messages.

    Raises:
        FileNotFoundError, ValueError: not there, not JSON, or not laid out as results.
    """
    before = "" if key is None else f"{key}: "
    try:
        content = read_json(path)
    except ValueError as err:
        raise ValueError(f"{before}{err}") from err
    try:
        return dict(leaves(content))
    except ValueError as err:
        raise ValueError(f"{before}{path}: {err}") from err
