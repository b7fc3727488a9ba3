"""A list of neighbours that is kept: the same graphs, edge by edge, from fewer searches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ase import Atoms

from e2former_fairchem import graph as graphs
from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.verlet import VerletList

CUTOFF, SKIN = 4.0, 0.6


def inputs(*structures: Atoms) -> dict[str, torch.Tensor]:
    counts = torch.tensor([len(atoms) for atoms in structures])
    return {
        "pos": torch.tensor(np.concatenate([atoms.positions for atoms in structures])),
        "cell": torch.tensor(np.stack([np.array(atoms.cell) for atoms in structures])),
        "pbc": torch.tensor(np.stack([atoms.pbc for atoms in structures])),
        "batch": torch.arange(len(structures)).repeat_interleave(counts),
        "natoms": counts,
    }


def same(one: Graph, other: Graph) -> None:
    for name in ("source", "target", "vec", "row_ptr"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("offset", "shift"):
        found, expected = getattr(one, name), getattr(other, name)
        if expected is None:
            assert found is None or not found.any(), name
        else:
            assert torch.equal(found, expected), name


def follow(kept: VerletList, *structures: Atoms, **options: object) -> int:
    """Compare with a graph of its own, and say how often neighbours were searched until now."""
    given = inputs(*structures)
    options = {"builder": "vesin"} | options  # a few atoms without images are quicker measured than looked up
    same(build_graph(**given, cutoff=CUTOFF, kept=kept, **options), build_graph(**given, cutoff=CUTOFF, **options))
    return kept.searches


def box(seed: int, atoms: int = 40, length: float = 8.0, pbc: bool | list[bool] = True) -> Atoms:
    """Atoms at random, apart from each other by more than what they move in the tests."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(4)] * 3), -1).reshape(-1, 3)
    positions = (rng.permutation(grid)[:atoms] + 0.3 * rng.random((atoms, 3))) * length / 4
    return Atoms("C" * atoms, positions, cell=np.eye(3) * length + 0.4 * rng.random((3, 3)), pbc=pbc)


@pytest.mark.parametrize("pbc", [True, False, [True, True, False]])
@pytest.mark.parametrize("options", [{}, {"max_neighbors": 9}])
def test_atoms_that_move(pbc: bool | list[bool], options: dict) -> None:
    """Random walks: the search is repeated when an atom is half of the skin away, and not sooner."""
    atoms, kept, rng = box(0, pbc=pbc), VerletList(SKIN), np.random.default_rng(1)
    assert follow(kept, atoms, **options) == 1
    reference, expected = atoms.positions.copy(), 1
    for _ in range(25):
        atoms.positions += 0.03 * rng.standard_normal(atoms.positions.shape)
        if np.linalg.norm(atoms.positions - reference, axis=1).max() > SKIN / 2:
            reference, expected = atoms.positions.copy(), expected + 1
        assert follow(kept, atoms, **options) == expected
    assert 2 < expected < 15


def test_pairs_that_approach_each_other() -> None:
    """From just outside the skin, both atoms at once: the worst that a list may miss."""
    atoms, kept = Atoms("H2", [[0, 0, 0], [CUTOFF + SKIN + 1e-6, 0, 0]]), VerletList(SKIN)
    assert follow(kept, atoms) == 1
    for step in (0.29, 0.009, 0.0011):
        atoms.positions[:, 0] += [step, -step]
        found = follow(kept, atoms)
    assert found == 2 and build_graph(**inputs(atoms), cutoff=CUTOFF).num_edges == 2


def test_cells_that_change() -> None:
    """With a barostat every step has another cell; atoms that follow it have not moved."""
    atoms, kept = box(2), VerletList(SKIN)
    assert follow(kept, atoms) == 1
    for _ in range(10):
        atoms.set_cell(np.array(atoms.cell) @ (np.eye(3) + 1e-3 * np.diag([-1, 0.5, 0.2])), scale_atoms=True)
        found = follow(kept, atoms)
    assert found == 1, "by 1 % in all"
    atoms.set_cell(np.array(atoms.cell) * 0.9, scale_atoms=True)
    assert follow(kept, atoms) == 2
    open_one = box(2, pbc=[True, True, False])
    assert follow(kept, open_one) == 3
    open_one.set_cell(np.array(open_one.cell) * 1.0001)
    assert follow(kept, open_one) == 4, "cells with an open direction may not change"


def test_other_structures() -> None:
    kept = VerletList(SKIN)
    one, other, third = box(3, 20), box(4, 30), box(5, 10, pbc=False)
    assert follow(kept, one) == 1
    assert follow(kept, one, other) == 2
    assert follow(kept, other, one) == 3, "as many atoms and systems, but not the same"
    assert follow(kept, other, one) == 3
    other.positions[3, 0] += 0.31
    assert follow(kept, other, one, third) == 4
    one.pbc = False
    assert follow(kept, other, one, third) == 5
    wrapped = other.copy()
    wrapped.positions[0] += wrapped.cell[0]
    assert follow(kept, wrapped, one, third) == 6, "an atom in another cell has other offsets"


def test_errors_are_those_of_a_search() -> None:
    atoms, kept = box(6), VerletList(SKIN)
    follow(kept, atoms)
    atoms.positions[5] = np.nan
    with pytest.raises(ValueError, match="positions that are not finite: atom 5 "):
        build_graph(**inputs(atoms), cutoff=CUTOFF, kept=kept)
    atoms.positions[5] = atoms.positions[4]
    with pytest.raises(ValueError, match="coincident atoms"):
        build_graph(**inputs(atoms), cutoff=CUTOFF, kept=kept)


def test_backbone_keeps_neighbors(build: Callable, batch_of: Callable, spy: Callable) -> None:
    """Energy and forces to the last bit, with a long-range graph too."""
    searches = spy(graphs, "find_neighbors")
    model = build(cutoff=3.0, long_range={"lower": 2.5, "upper": 5.0, "layers": 1})
    backbone = model.backbone
    atoms = box(7, 12)
    atoms.info.update(charge=0, spin=1)
    results: dict[float, list[torch.Tensor]] = {}
    for skin in (0.0, 0.5):
        backbone.keep_neighbors(skin)
        moving, rng, found = atoms.copy(), np.random.default_rng(8), []
        searches.clear()
        for _ in range(4):
            moving.positions += 0.01 * rng.standard_normal(moving.positions.shape)
            out = model(batch_of(moving))
            found += [value for head in out.values() for value in head.values()]
        results[skin] = found
        assert len(searches) == (8 if skin == 0.0 else 2)
    assert results[0.5] and all(map(torch.equal, results[0.0], results[0.5]))
    with pytest.raises(ValueError, match="skin: expected a number of at least 0, got -1"):
        backbone.keep_neighbors(-1)
