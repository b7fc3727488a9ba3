"""The graph's contract: complete, exact, ordered, the same from every builder, differentiable, loud on bad input."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from ase.neighborlist import primitive_neighbor_list

from e2former_fairchem.graph import Graph, build_graph
from e2former_fairchem.neighbors import BUILDERS, MAX_PAIRS, choose_builder, read_systems

CUTOFF = 6.0
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Cells, periodicity and number of atoms: cells down to half the cutoff, skew, left-handed, partly periodic, none.
SYSTEMS = {
    "small_cube": (np.diag([3.0, 3.0, 3.0]), (1, 1, 1), 2),
    "triclinic": ([[4.0, 0, 0], [2.5, 3.0, 0], [1.0, 1.5, 3.3]], (1, 1, 1), 4),
    "left_handed": ([[0, 4.0, 0], [5.0, 0, 0], [0, 0, 6.0]], (1, 1, 1), 4),
    "very_skew": ([[3.0, 0, 0], [14.0, 3.0, 0], [-9.0, 7.0, 3.0]], (1, 1, 1), 3),
    "slab": ([[5.0, 0, 0], [1.0, 5.0, 0], [0, 0, 2.0]], (1, 1, 0), 5),
    "slab_without_third_vector": ([[5.0, 0, 0], [1.0, 5.0, 0], [0, 0, 0]], (1, 1, 0), 5),
    "wire": ([[0, 0, 4.0], [0, 9.0, 1.0], [9.0, 0, 0]], (1, 0, 0), 5),
    "molecule": (np.zeros((3, 3)), (0, 0, 0), 6),
    "molecule_in_tight_box": (np.diag([3.0, 3.0, 3.0]), (0, 0, 0), 6),
    "single_atom": (np.zeros((3, 3)), (0, 0, 0), 1),
}


def positions_of(name: str) -> np.ndarray:
    """Unwrapped positions, in and far outside the cell."""
    rng = np.random.default_rng(sum(map(ord, name)))
    return rng.uniform(-8.0, 12.0, (SYSTEMS[name][2], 3))


def batch_tensors(names: list[str]) -> dict[str, torch.Tensor]:
    natoms = torch.tensor([SYSTEMS[name][2] for name in names])
    return {
        "pos": torch.from_numpy(np.concatenate([positions_of(name) for name in names])),
        "cell": torch.from_numpy(np.stack([np.asarray(SYSTEMS[name][0], dtype=float) for name in names])),
        "pbc": torch.tensor([SYSTEMS[name][1] for name in names]).bool(),
        "batch": torch.repeat_interleave(torch.arange(len(names)), natoms),
        "natoms": natoms,
    }


def one_system(pos, cell=None, pbc=(0, 0, 0)) -> dict[str, torch.Tensor]:
    pos = torch.as_tensor(pos)
    cell = torch.zeros(3, 3, dtype=pos.dtype) if cell is None else torch.as_tensor(cell, dtype=pos.dtype)
    count = pos.shape[0]
    return {
        "pos": pos,
        "cell": cell.reshape(1, 3, 3),
        "pbc": torch.tensor([pbc]).bool(),
        "batch": torch.zeros(count, dtype=torch.long),
        "natoms": torch.tensor([count]),
    }


def triples(graph: Graph) -> list[tuple[int, ...]]:
    offset = torch.zeros_like(graph.source)[:, None].expand(-1, 3) if graph.offset is None else graph.offset
    return [tuple(row) for row in torch.cat([graph.source[:, None], graph.target[:, None], offset], 1).tolist()]


def ase_triples(names: list[str], cutoff: float) -> set[tuple[int, ...]]:
    """(source, target, offset) of ASE, whose pairs end just below the cutoff."""
    found, start = set(), 0
    for name in names:
        cell, pbc, count = SYSTEMS[name]
        target, source, offset = primitive_neighbor_list(
            "ijS", [bool(p) for p in pbc], np.asarray(cell, dtype=float), positions_of(name), cutoff
        )
        found |= {tuple(map(int, row)) for row in np.c_[source + start, target + start, offset]}
        start += count
    return found


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize("names", [[name] for name in SYSTEMS] + [list(SYSTEMS)], ids=[*SYSTEMS, "mixed_batch"])
def test_pairs_are_those_of_ase(builder: str, names: list[str]) -> None:
    data = batch_tensors(names)
    graph = build_graph(**data, cutoff=CUTOFF, builder=builder)
    found = triples(graph)
    assert len(found) == len(set(found)), "a pair is listed twice"
    # Images of an atom can lie at exactly the cutoff, where ASE ends and the contract does not.
    assert ase_triples(names, CUTOFF) <= set(found) <= ase_triples(names, CUTOFF + 1e-9)
    distance = graph.vec.norm(dim=1)
    assert bool((distance <= CUTOFF * (1 + 1e-12)).all())
    assert found == sorted(found, key=lambda edge: (edge[1], edge[0], edge[2:])), "not in canonical order"
    counts = torch.bincount(graph.target, minlength=graph.num_nodes)
    assert torch.equal(graph.row_ptr.diff(), counts)
    shift = 0.0 if graph.shift is None else graph.shift
    torch.testing.assert_close(graph.vec, data["pos"][graph.target] - data["pos"][graph.source] - shift)


@pytest.mark.parametrize("builder", sorted(BUILDERS))
def test_both_ends_of_the_range_are_included(builder: str) -> None:
    data = one_system(torch.tensor([[0.0, 0, 0], [1e-4, 0, 0], [5.0, 0, 0]], dtype=torch.float64))
    graph = build_graph(**data, cutoff=5.0, builder=builder)
    assert list(zip(graph.source.tolist(), graph.target.tolist(), strict=True)) == [
        (source, target) for target in range(3) for source in range(3) if source != target
    ]


#: A batch whose edges cross cells, and one of molecules whose edges do not.
BATCHES = {"crossing": list(SYSTEMS), "open": ["molecule", "single_atom", "molecule_in_tight_box"]}


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("max_neighbors", [None, 3])
@pytest.mark.parametrize("pointer_first", [False, True])
def test_transposed_csr(builder: str, names: list[str], max_neighbors: int | None, pointer_first: bool) -> None:
    graph = build_graph(**batch_tensors(names), cutoff=CUTOFF, max_neighbors=max_neighbors, builder=builder)
    if pointer_first:
        graph.source_ptr  # noqa: B018  either may be asked for first
    assert torch.equal(graph.source_order, torch.argsort(graph.source, stable=True))
    by_source = graph.source[graph.source_order]
    assert torch.equal(by_source, by_source.sort().values)
    assert torch.equal(graph.source_ptr.diff(), torch.bincount(graph.source, minlength=graph.num_nodes))
    same = by_source[1:] == by_source[:-1]
    targets = graph.target[graph.source_order]
    assert bool((targets[1:] >= targets[:-1])[same].all())
    assert graph.source_order is graph.source_order, "sorted again on every access"


def on(device: str, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in data.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("builder", [None, *sorted(BUILDERS)])
@pytest.mark.parametrize("names", [*BATCHES.values(), ["triclinic"]], ids=[*BATCHES, "triclinic"])
@pytest.mark.parametrize("max_neighbors", [None, 1, 4, 1000])
@pytest.mark.parametrize("distant", [False, True])
def test_builders_give_the_same_graph(
    builder: str | None, names: list[str], max_neighbors: int | None, distant: bool, device: str
) -> None:
    """To the last bit, whatever is asked for; and so do its gradients. None: the builder that is taken there.

    A GPU gives the CPU's edges in the CPU's order; its sums round in their own way, so the radius is not one at which
    images lie.
    """
    data = batch_tensors(names)
    options = {"cutoff": 9.0 if device == "cpu" else 8.7, "max_neighbors": max_neighbors}
    if distant:
        options |= {"lower": 4.0, "source_mask": torch.arange(data["pos"].shape[0]) % 3 != 0}
    found = []
    for where, name in ((device, builder), ("cpu", "vesin")):
        given = on(where, data | {k: v for k, v in options.items() if isinstance(v, torch.Tensor)})
        given["pos"].requires_grad_()
        graph = build_graph(**(options | given), builder=name)
        assert graph.source.device.type == where
        (slope,) = torch.autograd.grad(graph.vec.sin().sum(), given["pos"])
        found.append((graph, slope.cpu()))
    (graph, slope), (expected, expected_slope) = found
    assert graph.num_edges > 0 and triples(graph) == triples(expected)
    assert torch.equal(graph.row_ptr.cpu(), expected.row_ptr)
    assert torch.equal(graph.source_order.cpu(), expected.source_order)
    assert (graph.offset is None) == (expected.offset is None)
    rounding = 0.0 if device == "cpu" else 1e-11
    torch.testing.assert_close(graph.vec.cpu(), expected.vec, rtol=0, atol=rounding)
    torch.testing.assert_close(slope, expected_slope, rtol=0, atol=rounding)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("periodic", [False, True])
def test_large_systems(periodic: bool, device: str) -> None:
    """More pairs than are measured at once: the builder that is taken, and the dense one in blocks, against vesin."""
    count, side = (2100, 28.0) if device == "cpu" else (6000, 40.0)
    pos = torch.from_numpy(np.random.default_rng(3).uniform(-5.0, side + 5.0, (count, 3)))
    cell = np.array([[side, 0, 0], [9.0, side, 0], [0, -7.0, side]])
    data = one_system(pos, cell, (1, 1, 1)) if periodic else one_system(pos)
    expected = build_graph(**data, cutoff=4.0, builder="vesin")
    assert choose_builder(read_systems(**on(device, data)), 4.0) == {"cpu": "vesin", "cuda": "fairchem_v3"}[device]
    for builder in (None, "pairs"):
        graph = build_graph(**on(device, data), cutoff=4.0, builder=builder)
        assert triples(graph) == triples(expected)
        torch.testing.assert_close(graph.vec.cpu(), expected.vec, rtol=0, atol=1e-11)


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 3, 0, 2, 0]])
def test_systems_without_atoms(builder: str, counts: list[int]) -> None:
    total = sum(counts)
    data = {
        "pos": torch.eye(5, 3, dtype=torch.float64)[:total] + torch.arange(total).unsqueeze(1),
        "cell": torch.zeros(len(counts), 3, 3, dtype=torch.float64),
        "pbc": torch.zeros(len(counts), 3, dtype=torch.bool),
        "batch": torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        "natoms": torch.tensor(counts),
    }
    graph = build_graph(**data, cutoff=CUTOFF, builder=builder)
    assert graph.num_edges == sum(count * (count - 1) for count in counts)
    assert graph.row_ptr.shape == (total + 1,) and graph.source_ptr.shape == (total + 1,)


@pytest.mark.parametrize("width", [11.9, 12.0, 12.00001, 12.1, 17.0])
@pytest.mark.parametrize("skew", [0.0, 9.0])
def test_pairs_around_twice_the_cutoff(width: float, skew: float) -> None:
    """Where several images of a pair may be edges, and where one alone may; mixed along directions and structures."""
    rng = np.random.default_rng(5)
    cells = torch.tensor(
        [[[width, 0, 0], [skew, 14.0, 0], [0, skew, 5.0]], [[5.0, 0, 0], [0, width, 0], [skew, 0, 13]]]
    )
    data = {
        "pos": torch.from_numpy(rng.uniform(-30, 30, (60, 3))),
        "cell": cells.double(),
        "pbc": torch.tensor([[True] * 3, [True, True, False]]),
        "batch": torch.repeat_interleave(torch.arange(2), 30),
        "natoms": torch.tensor([30, 30]),
    }
    data["pos"][1] = data["pos"][0] + torch.tensor([0.5 * width, 0.0, 0.0], dtype=torch.float64)
    for cutoff in (CUTOFF, 0.5 * width):
        found, expected = (build_graph(**data, cutoff=cutoff, builder=name) for name in ("pairs", "vesin"))
        assert triples(found) == triples(expected) and torch.equal(found.vec, expected.vec)


@pytest.mark.parametrize(
    ("names", "images"),
    [(["small_cube", "triclinic", "left_handed", "slab", "wire", "molecule"], 125), (BATCHES["open"], 1)],
    ids=BATCHES,
)
def test_pairs_in_blocks(names: list[str], images: int) -> None:
    """More pairs than are measured at once. images: of an atom, at least (within two cells of the smallest cell)."""
    times = math.ceil((1.2 * MAX_PAIRS / images) ** 0.5 / int(batch_tensors(names)["natoms"].sum()))
    data = batch_tensors(names * times)
    expected = build_graph(**data, cutoff=CUTOFF, builder="vesin")
    assert triples(build_graph(**data, cutoff=CUTOFF, builder="pairs")) == triples(expected)


def test_builder_by_device_and_size() -> None:
    """All pairs of small batches on CUDA, images counted; nothing that is quadratic for large ones."""

    def chosen(count: int, box: float | None, cuda: bool = True) -> str:
        side = (count / 0.1) ** (1 / 3)
        pos = torch.from_numpy(np.random.default_rng(0).uniform(0, side, (count, 3)))
        data = one_system(pos) if box is None else one_system(pos, (side + box) * np.eye(3), (1, 1, 1))
        systems = read_systems(**data)
        if cuda:
            systems.pos = type("OnCuda", (), {"is_cuda": True, "shape": pos.shape})()
        return choose_builder(systems, CUTOFF)

    assert chosen(1500, None) == "pairs" and chosen(1500, None, cuda=False) == "vesin"
    assert chosen(2001, None) == "fairchem_v3"
    assert chosen(1500, 100.0) == "pairs", "a box that no edge crosses"
    assert chosen(1500, 0.0) == "pairs", "a box of two cutoffs or more: the nearest image is enough"
    assert chosen(140, 0.0) == "pairs" and chosen(600, -7.0) == "fairchem_v3", "27 images of 140 and 600 atoms"


def test_box_of_a_molecule_costs_nothing_and_changes_nothing() -> None:
    """A molecule in the 240 Å periodic box of molecule_cell_size gets no images, wherever it sits in the box."""
    molecule = torch.from_numpy(positions_of("molecule"))
    free = build_graph(**one_system(molecule), cutoff=CUTOFF)
    boxed = build_graph(**one_system(molecule + 120.0, 240.0 * np.eye(3), (1, 1, 1)), cutoff=CUTOFF)
    assert boxed.offset is None and boxed.shift is None
    assert triples(boxed) == triples(free)
    straddling = torch.remainder(molecule, 240.0)
    wrapped = build_graph(**one_system(straddling, 240.0 * np.eye(3), (1, 1, 1)), cutoff=CUTOFF)
    assert wrapped.offset is not None
    assert torch.equal(wrapped.source, free.source) and torch.equal(wrapped.target, free.target)
    torch.testing.assert_close(wrapped.vec, free.vec, rtol=0, atol=1e-12)


def test_box_just_wide_enough_and_just_not() -> None:
    pos = torch.tensor([[0.0, 0, 0], [4.0, 0, 0]], dtype=torch.float64)
    wide = build_graph(**one_system(pos, np.diag([10.1, 30.0, 30.0]), (1, 1, 1)), cutoff=CUTOFF)
    assert wide.offset is None and wide.num_edges == 2
    narrow = build_graph(**one_system(pos, np.diag([9.9, 30.0, 30.0]), (1, 1, 1)), cutoff=CUTOFF)
    assert narrow.num_edges == 4 and sorted(narrow.offset[:, 0].tolist()) == [-1, 0, 0, 1]


@pytest.mark.parametrize("builder", sorted(BUILDERS))
def test_lattice_moves_of_single_atoms_change_nothing(builder: str) -> None:
    data = batch_tensors(["triclinic"])
    graph = build_graph(**data, cutoff=CUTOFF, builder=builder)
    moves = torch.tensor([[0, 0, 0], [3, -2, 0], [0, 50, 1], [-7, 0, 0]], dtype=torch.float64)
    moved = build_graph(**{**data, "pos": data["pos"] + moves @ data["cell"][0]}, cutoff=CUTOFF, builder=builder)
    assert torch.equal(moved.source, graph.source) and torch.equal(moved.target, graph.target)
    assert torch.equal(moved.offset, graph.offset + (moves[graph.target] - moves[graph.source]).long())
    torch.testing.assert_close(moved.vec, graph.vec, rtol=0, atol=1e-11)


def test_offsets_beyond_a_sort_key_still_sort() -> None:
    """Lattice moves so large that target, source and offset do not fit one 64-bit key."""
    data = batch_tensors(["triclinic"])
    moves = torch.zeros(4, 3, dtype=torch.float64)
    moves[1] = 2.0e6
    moved = build_graph(**{**data, "pos": data["pos"] + moves @ data["cell"][0]}, cutoff=CUTOFF)
    assert triples(moved) == sorted(triples(moved), key=lambda edge: (edge[1], edge[0], edge[2:]))
    assert moved.num_edges == build_graph(**data, cutoff=CUTOFF).num_edges


def test_vectors_far_from_the_origin_are_exact_in_float32() -> None:
    """1,000 Å away on a 2^-12 Å grid, where float32 holds the positions exactly."""
    grid = 2.0**-12
    near = (torch.from_numpy(positions_of("triclinic")) / grid).round() * grid
    cell = (torch.tensor(SYSTEMS["triclinic"][0], dtype=torch.float64) / grid).round() * grid
    exact = build_graph(**one_system(near, cell, (1, 1, 1)), cutoff=CUTOFF)
    far = build_graph(**one_system((near + 1000.0).float(), cell.float(), (1, 1, 1)), cutoff=CUTOFF)
    assert far.vec.dtype == torch.float32
    assert torch.equal(far.source, exact.source) and torch.equal(far.vec, exact.vec.float())


def test_dtype_does_not_change_which_pairs_are_edges() -> None:
    rng = np.random.default_rng(3)
    pos = torch.from_numpy(rng.uniform(0, 12, (200, 3))).float()
    single = build_graph(**one_system(pos, 12.0 * np.eye(3), (1, 1, 1)), cutoff=5.0)
    double = build_graph(**one_system(pos.double(), 12.0 * np.eye(3), (1, 1, 1)), cutoff=5.0)
    assert triples(single) == triples(double)


def test_gradients_in_positions_and_cells() -> None:
    data = batch_tensors(["slab", "molecule", "left_handed", "single_atom"])
    edges = build_graph(**data, cutoff=3.5)
    weight = torch.linspace(0.5, 2.0, edges.num_edges * 3, dtype=torch.float64).reshape(-1, 3)

    def through_graph(pos, cell):
        graph = build_graph(**{**data, "pos": pos, "cell": cell}, cutoff=3.5)
        return (weight * graph.vec.sin()).sum() + (graph.shift * weight).square().sum()

    inputs = [data["pos"].clone().requires_grad_(True), data["cell"].clone().requires_grad_(True)]
    assert torch.autograd.gradcheck(through_graph, inputs)
    assert torch.autograd.gradgradcheck(through_graph, inputs)


def test_gradients_of_one_system() -> None:
    data = batch_tensors(["triclinic"])
    count = build_graph(**data, cutoff=3.5).num_edges
    weight = torch.linspace(0.5, 2.0, count * 3, dtype=torch.float64).reshape(-1, 3)

    def through_graph(pos, cell):
        return (weight * build_graph(**{**data, "pos": pos, "cell": cell}, cutoff=3.5).vec.sin()).sum()

    inputs = [data["pos"].clone().requires_grad_(True), data["cell"].clone().requires_grad_(True)]
    assert torch.autograd.gradcheck(through_graph, inputs)
    assert torch.autograd.gradgradcheck(through_graph, inputs)


def test_cell_of_a_molecule_has_a_zero_gradient() -> None:
    data = batch_tensors(["molecule"])
    cell = data["cell"].clone().requires_grad_(True)
    graph = build_graph(**{**data, "cell": cell}, cutoff=CUTOFF)
    (gradient,) = torch.autograd.grad(graph.vec.square().sum(), cell)
    assert torch.equal(gradient, torch.zeros_like(cell))


@pytest.mark.parametrize("builder", sorted(BUILDERS))
def test_max_neighbors_keeps_the_nearest(builder: str) -> None:
    data = batch_tensors(["triclinic", "molecule"])
    full = build_graph(**data, cutoff=CUTOFF)
    graph = build_graph(**data, cutoff=CUTOFF, max_neighbors=4, builder=builder)
    assert int(graph.row_ptr.diff().max()) == 4
    kept = set(triples(graph))
    assert triples(graph) == [edge for edge in triples(full) if edge in kept]
    for atom in range(full.num_nodes):
        row = full.vec.norm(dim=1)[full.row_ptr[atom] : full.row_ptr[atom + 1]]
        mine = graph.vec.norm(dim=1)[graph.row_ptr[atom] : graph.row_ptr[atom + 1]]
        torch.testing.assert_close(mine.sort().values, row.sort().values[:4])


@pytest.mark.parametrize("builder", sorted(BUILDERS))
def test_max_neighbors_breaks_ties_by_order(builder: str) -> None:
    pos = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]], dtype=torch.float64)
    graph = build_graph(**one_system(pos), cutoff=1.2, max_neighbors=2, builder=builder)
    assert graph.source[: graph.row_ptr[1]].tolist() == [1, 2]


def test_long_range_graph() -> None:
    data = batch_tensors(["molecule", "slab"])
    mask = torch.arange(11) % 2 == 0
    graph = build_graph(**data, cutoff=9.0, lower=4.0, source_mask=mask)
    full = build_graph(**data, cutoff=9.0)
    distance = full.vec.norm(dim=1)
    expected = [e for e, d in zip(triples(full), distance.tolist(), strict=True) if d >= 4.0 and mask[e[0]]]
    assert triples(graph) == expected and expected


def test_given_edges_are_cut_sorted_and_the_same_graph() -> None:
    data = batch_tensors(["triclinic", "slab"])
    wide = build_graph(**data, cutoff=7.0)
    shuffle = torch.randperm(wide.num_edges, generator=torch.Generator().manual_seed(0))
    given = build_graph(
        **data,
        cutoff=CUTOFF,
        edge_index=torch.stack([wide.source, wide.target])[:, shuffle],
        cell_offsets=wide.offset[shuffle].double(),
    )
    own = build_graph(**data, cutoff=CUTOFF)
    assert triples(given) == triples(own) and torch.equal(given.vec, own.vec)


@pytest.mark.parametrize(
    ("edges", "offsets", "message"),
    [
        ([[0, 1], [1, 9]], [[0, 0, 0]] * 2, "expected atoms 0 to 6, got 0 to 9"),
        ([[0, 1], [1, 5]], [[0, 0, 0]] * 2, "edge 1 joins atom 1 of structure 0 to atom 5 of structure 1"),
        ([[0, 0], [1, 1]], [[1, 0, 0]] * 2, "from atom 0 to atom 1 is listed twice with offset"),
        ([[0, 1], [1, 0]], [[0, 0, 0]], r"cell_offsets: expected shape \(2, 3\), got \(1, 3\)"),
        ([[0, 5], [1, 6]], [[1, 0, 0], [0, 0, 1]], "expected 0 along open directions"),
        ([[0, 1], [1, 0]], None, "cell_offsets: expected"),
        ([[0, 1]], [[0, 0, 0]], r"edge_index: expected shape \[2, edges\]"),
    ],
)
def test_given_edges_are_checked(edges: list, offsets: list | None, message: str) -> None:
    near = torch.tensor([[0.0, 0, 0], [1.5, 0, 0], [0, 1.5, 0], [0, 0, 1.5], [0, 0, 0], [1.5, 0, 0], [0, 1.5, 0]])
    data = {
        "pos": near.double(),
        "cell": 4.0 * torch.eye(3).double().repeat(2, 1, 1),
        "pbc": torch.tensor([[True] * 3, [True, True, False]]),
        "batch": torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        "natoms": torch.tensor([4, 3]),
    }
    with pytest.raises(ValueError, match=message):
        build_graph(
            **data,
            cutoff=CUTOFF,
            edge_index=torch.tensor(edges),
            cell_offsets=None if offsets is None else torch.tensor(offsets),
        )


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize("apart", [0.0, 5e-5])
@pytest.mark.parametrize("name", ["triclinic", "molecule"])
def test_coincident_atoms_are_named(builder: str, apart: float, name: str) -> None:
    data = batch_tensors(["molecule", name])
    pos = data["pos"].clone()
    pos[9] = pos[7] + torch.tensor([apart, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"atom 7 \(atom 1 of structure 1\) and atom 9 \(atom 3 of structure 1\)"):
        build_graph(**{**data, "pos": pos}, cutoff=CUTOFF, builder=builder)


def test_an_image_on_top_of_an_atom_is_coincident() -> None:
    data = batch_tensors(["triclinic"])
    pos = data["pos"].clone()
    pos[2] = pos[0] + data["cell"][0, 1]
    with pytest.raises(ValueError, match="coincident atoms.*atom 0 .* and atom 2 "):
        build_graph(**{**data, "pos": pos}, cutoff=CUTOFF)


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_positions_that_are_not_finite_are_named(builder: str, value: float) -> None:
    data = batch_tensors(["molecule", "triclinic"])
    pos = data["pos"].clone()
    pos[8, 1] = value
    with pytest.raises(ValueError, match=r"not finite: atom 8 \(atom 2 of structure 1\)"):
        build_graph(**{**data, "pos": pos}, cutoff=CUTOFF, builder=builder)
    alone = one_system(pos[6:], data["cell"][1], (1, 1, 1))
    with pytest.raises(ValueError, match=r"not finite: atom 2 \(atom 2 of structure 0\)"):
        build_graph(**alone, cutoff=CUTOFF, builder=builder)


@pytest.mark.parametrize(
    "cell", [np.zeros((3, 3)), [[4.0, 0, 0], [8.0, 0, 0], [0, 0, 4.0]], [[4.0, 0, 0], [0, 4.0, 0], [2.0, 2.0, 0]]]
)
def test_singular_periodic_cell_is_named(cell) -> None:
    good = one_system(positions_of("molecule"), 5 * np.eye(3), (1, 1, 1))
    data = {
        "pos": good["pos"].repeat(2, 1),
        "cell": torch.stack([good["cell"][0], torch.as_tensor(np.asarray(cell))]),
        "pbc": good["pbc"].repeat(2, 1),
        "batch": torch.repeat_interleave(torch.arange(2), 6),
        "natoms": torch.tensor([6, 6]),
    }
    with pytest.raises(ValueError, match="cell of structure 1 is singular"):
        build_graph(**data, cutoff=CUTOFF)


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize("name", ["triclinic", "molecule", "molecule_in_tight_box"])
def test_cell_that_is_not_finite_is_named(builder: str, name: str) -> None:
    data = batch_tensors(["molecule", name])
    data["cell"][1, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="cell of structure 1: expected finite lattice vectors"):
        build_graph(**data, cutoff=CUTOFF, builder=builder)


#: Cells of one atom, and cutoffs; the last two with nearly as many images as are let through.
FITTING = {
    "face-centred cubic, one atom": (1.8 * (1 - np.eye(3)), 12.0),
    "a helium toy": (np.eye(3), 6.0),
    "the toy with long range": (np.eye(3), 15.9),
    "skewed": ([[1.0, 0, 0], [50.0, 1.0, 0], [0, 0, 3.0]], 6.0),
}
#: Cells, numbers of atoms, cutoffs, and what the refusal says.
WRONG = {
    "0.2 Å": (0.2 * np.eye(3), 1, 4.0, "64,000: 1 atoms", "lattice vectors of 0.2, 0.2, 0.2 Å", "68,921 images"),
    "0.02 Å": (0.02 * np.eye(3), 1, 6.0, "216,000,000: 1", "0.02, 0.02, 0.02 Å", "217,081,801 images"),
    "copper in nm": (0.36 * np.eye(3), 4, 6.0, "148,148: 4 atoms", "of 0.36, 0.36, 0.36 Å", "42,875 images"),
    "skewed": ([[1.0, 0, 0], [400.0, 1.0, 0], [0, 0, 3.0]], 1, 6.0, "230,401: 1", "1, 400, 3 Å", "cell 0.0025, 1, 3 Å"),
    "slab": (np.diag([0.02, 0.02, 10.0]), 1, 6.0, "360,000: 1", "pbc [True, True, False]", "361,201 images"),
}


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize("name", WRONG)
def test_cell_in_a_wrong_unit_is_refused_before_it_is_searched(builder: str, name: str) -> None:
    """In milliseconds, with the numbers; the structure of a batch is named."""
    cell, count, cutoff, *parts = WRONG[name]
    cell, molecule = torch.from_numpy(np.asarray(cell, float)), torch.from_numpy(positions_of("molecule"))
    counts = torch.tensor([6, count, 6])
    data = {
        "pos": torch.cat([molecule, torch.linspace(0.1, 0.9, 3 * count).reshape(-1, 3).double() @ cell, molecule]),
        "cell": torch.stack([torch.zeros_like(cell), cell, torch.zeros_like(cell)]),
        "pbc": torch.tensor([[False] * 3, [True, True, name != "slab"], [False] * 3]),
        "batch": torch.repeat_interleave(torch.arange(3), counts),
        "natoms": counts,
    }
    begin = time.process_time()
    with pytest.raises(ValueError, match="structure 1: expected at most 32,768 atoms and periodic images") as error:
        build_graph(**data, cutoff=cutoff, builder=builder)
    assert time.process_time() - begin < 0.1
    for part in (*parts, f"cutoff {cutoff:g} Å", "are cell and positions in Å"):
        assert part in str(error.value)


@pytest.mark.parametrize("builder", sorted(BUILDERS))
@pytest.mark.parametrize("name", FITTING)
def test_small_cells_are_let_through(builder: str, name: str) -> None:
    """With as many edges as the volume tells, up to the surface of the sphere."""
    cell, cutoff = FITTING[name]
    pos = torch.zeros(1, 3, dtype=torch.float64)
    graph = build_graph(**one_system(pos, cell, (1, 1, 1)), cutoff=cutoff, builder=builder)
    volume = abs(np.linalg.det(np.asarray(cell)))
    assert graph.num_edges == pytest.approx(4 / 3 * np.pi * cutoff**3 / volume, rel=0.05)


def test_dense_cluster_in_a_wrong_unit_is_refused() -> None:
    """As many atoms within a few Å as no length unit of a molecule gives; a droplet of as many is let through."""
    pos = torch.from_numpy(np.random.default_rng(0).uniform(0, 1, (40_000, 3)))
    with pytest.raises(ValueError, match="structure 0: expected at most 32,768 .* about 40,000: 40000 atoms "):
        build_graph(**one_system(8.0 * pos), cutoff=CUTOFF)
    assert build_graph(**one_system(80.0 * pos), cutoff=1.0).num_edges > 0


@pytest.mark.parametrize(("key", "value"), [("cutoff", 0.0), ("cutoff", -1.0), ("max_neighbors", 0)])
def test_bad_arguments_are_named(key: str, value: float) -> None:
    arguments = {**batch_tensors(["molecule"]), "cutoff": CUTOFF, key: value}
    with pytest.raises(ValueError, match=f"{key}: expected a positive"):
        build_graph(**arguments)
    with pytest.raises(ValueError, match="builder: expected one of"):
        build_graph(**{**batch_tensors(["molecule"]), "cutoff": CUTOFF, "builder": "magic"})


def test_version_3_never_truncates_silently() -> None:
    """A dense crystal with more neighbours than the buffer of fairchem's version 3 holds."""
    pos = torch.tensor([[0.0, 0, 0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    data = one_system(pos, np.eye(3), (1, 1, 1))
    dense = build_graph(**data, cutoff=5.0, builder="fairchem_v3")
    assert triples(dense) == triples(build_graph(**data, cutoff=5.0, builder="vesin"))
    assert int(dense.row_ptr.diff().max()) > 900


def test_time_is_linear_in_atoms() -> None:
    def seconds(count: int) -> float:
        side = (count / 0.05) ** (1 / 3)
        pos = torch.from_numpy(np.random.default_rng(0).uniform(0, side, (count, 3)))
        data = one_system(pos, side * np.eye(3), (1, 1, 1))
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            build_graph(**data, cutoff=4.0)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(16000) < 3.0 * 4 * seconds(4000)  # quadratic would be 16


def test_int64_addresses() -> None:
    """Sort keys of a system of a million atoms exceed 32 bits."""
    count = 70_000
    pos = torch.zeros(count, 3, dtype=torch.float64)
    pos[:, 0] = torch.arange(count) * 3.0
    graph = build_graph(**one_system(pos), cutoff=4.0)
    assert graph.num_edges == 2 * (count - 1)
    assert bool((graph.target[1:] >= graph.target[:-1]).all())
    assert bool(((graph.source - graph.target).abs() == 1).all())
