"""The seven evaluation tasks as flat lists of structures, and back to the nested results that the leaderboard takes.

| task | path of a result | calculation |
|---|---|---|
| ligand_pocket | id / ligand, pocket or ligand_pocket | single point |
| ligand_strain | id / bioactive; id / gas_phase / number | single point; relaxation |
| conformers | family / conformer | relaxation |
| protonation | family / name_charge_spin | relaxation |
| ieea | id / charge / spin | single point |
| spingap | id / spin | single point |
| distance_scaling | vertical / id / point of the curve | single point |

Every structure is a unit of its own: shards and resumption do not care about the top-level keys.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms
from fairchem.core.common.safe_pickle import safe_pickle_load

from e2former_fairchem.files import read_json

KeyPath = tuple[str, ...]
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


def _ligand_pocket(inputs: Mapping) -> Iterator[Unit]:
    for key, entry in inputs.items():
        for component in COMPONENTS:
            yield Unit((key, component), entry[component], False)


def _ligand_strain(inputs: Mapping) -> Iterator[Unit]:
    for key, entry in inputs.items():
        yield Unit((key, "bioactive"), entry["bioactive_conf"], False)
        for number, atoms in enumerate(entry["conformers"]):
            yield Unit((key, "gas_phase", number), atoms, True)


def _conformers(inputs: Mapping) -> Iterator[Unit]:
    for family, members in inputs.items():
        for member in members:
            yield Unit((family, member["sid"]), member["initial_atoms"], True)


def _protonation(inputs: Mapping) -> Iterator[Unit]:
    for family, states in inputs.items():
        for name, state in states.items():
            yield Unit((family, name), state["initial_atoms"], True)


def _ieea(inputs: Mapping) -> Iterator[Unit]:
    for key, charges in inputs.items():
        for charge, spins in charges.items():
            for spin, entry in spins.items():
                yield Unit((key, charge, spin), entry["atoms"], False)


def _spingap(inputs: Mapping) -> Iterator[Unit]:
    for key, spins in inputs.items():
        for spin, entry in spins.items():
            yield Unit((key, spin), entry["atoms"], False)


def _distance_scaling(inputs: Mapping) -> Iterator[Unit]:
    for vertical, systems in inputs.items():
        for key, points in systems.items():
            for point, atoms in points.items():
                yield Unit((vertical, key, point), atoms, False)


@dataclass(frozen=True)
class Task:
    """A task: how its input is laid out, and fairchem-data-omol's function for its metrics."""

    flatten: Callable[[Mapping], Iterator[Unit]]
    evaluator: str


TASKS: Mapping[str, Task] = {
    "ligand_pocket": Task(_ligand_pocket, "ligand_pocket"),
    "ligand_strain": Task(_ligand_strain, "ligand_strain"),
    "conformers": Task(_conformers, "geom_conformers"),
    "protonation": Task(_protonation, "protonation_energies"),
    "ieea": Task(_ieea, "unoptimized_ie_ea"),
    "spingap": Task(_spingap, "unoptimized_spin_gap"),
    "distance_scaling": Task(_distance_scaling, "distance_scaling"),
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
        units = [Unit(tuple(str(k) for k in u.path), u.atoms, u.relax) for u in task.flatten(inputs)]
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
