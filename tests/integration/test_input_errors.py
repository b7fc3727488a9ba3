"""Bad configuration and bad input: one clear message that names key or atom, before any heavy work."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sphere_chanels": 16}, TypeError, r"'sphere_chanels' \(did you mean 'sphere_channels'\?\); expected"),
        ({"mmax": 2}, TypeError, r"unknown key 'mmax'"),
        ({"num_heads": 5}, ValueError, "sphere_channels: expected a multiple of num_heads = 5, got 16; num_heads=4 "),
        ({"lmax": 5}, ValueError, "lmax: expected an integer in 1..4, got 5"),
        ({"lmax": 0}, ValueError, "lmax: expected an integer in 1..4, got 0"),
        ({"radial_width": 0}, ValueError, "radial_width: expected an integer at least 1, got 0"),
        ({"cutoff": -1.0}, ValueError, "cutoff: expected a positive"),
        ({"score": "softmax"}, ValueError, "score: expected one of qk, qk_dot, qk_dot_scalar, got 'softmax'"),
        ({"message_order": [1, 1, 1]}, ValueError, r"message_order: expected 2 entries \(num_layers\), got 3"),
        ({"long_range": {"layer": 2}}, ValueError, r"long_range: unknown keys \['layer'\]"),
        ({"max_neighbors": 0}, ValueError, "max_neighbors: expected a positive integer or null, got 0"),
        ({"otf_graph": "yes"}, ValueError, "otf_graph: expected true or false, got 'yes'"),
        ({"direct_forces": True, "regress_stress": True}, ValueError, "regress_stress: expected false with direct"),
        ({"direct_forces": True, "regress_forces": False}, ValueError, "regress_forces: expected true with direct"),
        ({"regress_stress": True, "regress_forces": False}, ValueError, "regress_forces: expected true with regress"),
        ({"dataset_mapping": {"omol": "oc20"}}, ValueError, r"dataset_mapping: expected values among its keys"),
        ({"dataset_mapping": {}}, ValueError, "dataset_mapping: expected a non-empty mapping"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configuration(options: dict, error: type[Exception], message: str, build) -> None:
    with pytest.raises(error, match=message):
        build(**options)


@pytest.fixture
def refuse(build):
    """Run a batch that must fail before the network is called; returns nothing, checks the message."""

    def run(data, message: str, **options) -> None:
        model = build(**options)

        def never(*_: object, **__: object) -> None:
            raise AssertionError("the network ran")

        model.backbone.model.register_forward_pre_hook(never)
        with pytest.raises(ValueError, match=message):
            model(data)

    return run


def test_element_outside_the_table(refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"], structures["crystal"])
    refuse(data, r"atomic_numbers: expected 1 to 10 .*atom 3 \(atom 0 of structure 1\) has Z = 14", max_num_elements=10)


@pytest.mark.parametrize("number", [0, -1, 119])
def test_atomic_number_that_is_no_element(number: int, refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"])
    data["atomic_numbers"][1] = number
    refuse(data, rf"expected 1 to 118 .*atom 1 .* has Z = {number}; 1 atoms")


@pytest.mark.parametrize("key", ["charge", "spin"])
def test_missing_charge_or_spin(key: str, refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"])
    delattr(data, key)
    data.__keys__.discard(key)
    refuse(data, rf"{key}: expected one integer per structure.*r_data_keys: \[spin, charge\]")


@pytest.mark.parametrize(
    ("key", "value", "bounds"),
    [
        ("charge", 101, "-100 to 100"),
        ("charge", -101, "-100 to 100"),
        ("spin", -1, "0 to 100"),
        ("spin", 101, "0 to 100"),
    ],
)
def test_charge_or_spin_out_of_range(key: str, value: int, bounds: str, refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"], structures["ethanol"])
    data[key][1] = value
    refuse(data, f"{key} of structure 1: expected {bounds}, got {value}")


def test_charge_that_is_not_whole(refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"])
    data["charge"] = torch.tensor([0.5])
    refuse(data, "charge of structure 0: expected an integer, got 0.5")


def test_one_charge_for_two_structures(refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"], structures["ethanol"])
    data["charge"] = data["charge"][:1]
    refuse(data, "charge: expected 2 values, one per structure, got 1")


def test_charges_as_floats_are_accepted(build, batch_of, structures) -> None:
    data = batch_of(structures["ammonia"])
    expected = build()(data.clone())["energy"]["energy"]
    data["charge"], data["spin"] = data["charge"].double(), data["spin"].double()
    assert torch.equal(build()(data)["energy"]["energy"], expected)


def test_spin_zero_is_said_once(build, batch_of, structures, caplog, nothing_said) -> None:
    data = batch_of(structures["water"])
    data["spin"][0] = 0
    model = build()
    for _ in range(2):
        model(data.clone())
    assert caplog.text.count("spin 0") == 1


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_positions_that_are_not_finite(value: float, refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"], structures["ethanol"])
    data["pos"][5, 2] = value
    refuse(data, r"positions: expected finite coordinates, but atom 5 \(atom 2 of structure 1\) at .*; 1 atoms")


def test_float32_positions_far_from_the_origin(build, batch_of, structures, caplog, nothing_said) -> None:
    """One warning for each spacing of the numbers there, by structure; an error where they mean nothing."""
    model = build(dtype=torch.float32)

    def moved(distance: float, dtype: torch.dtype = torch.float32):
        water = structures["water"].copy()
        water.positions -= [0, distance, 0]
        return batch_of(structures["ethanol"], water, dtype=dtype)

    model(moved(200.0))
    assert not caplog.text
    for distance in (1500.0, 1500.0, 1600.0, 10_000.0):
        model(moved(distance))
    first, second = (record.getMessage() for record in caplog.records)
    assert "structure 1 reaches 1,501 Å from the origin, where neighbouring float32 numbers are 0.00012" in first
    assert "atoms.positions -= atoms.positions.mean(0)" in first
    assert "structure 1 reaches 10,001 Å" in second and "0.00098 Å apart" in second
    message = (
        r"positions: expected coordinates that are known to 0.01 Å, but structure 1 reaches 1,000,001 Å .* 0.062 Å"
    )
    with pytest.raises(ValueError, match=message):
        model(moved(1e6))
    caplog.clear()
    build()(moved(1e6, torch.float64))
    assert not caplog.text


def test_cell_that_is_not_finite(refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"], structures["crystal"])
    data["cell"][1, 0, 0] = float("nan")
    refuse(data, "cell of structure 1: expected finite lattice vectors")


def test_coincident_atoms(refuse, batch_of, structures) -> None:
    data = batch_of(structures["water"], structures["ethanol"])
    data["pos"][6] = data["pos"][4]
    refuse(data, r"coincident atoms.*atom 4 \(atom 1 of structure 1\) and atom 6 \(atom 3 of structure 1\)")


def test_singular_cell(refuse, batch_of, structures) -> None:
    data = batch_of(structures["crystal"])
    data["cell"][0, 2] = data["cell"][0, 0] + data["cell"][0, 1]
    refuse(data, "cell of structure 0 is singular: pbc is .*linearly independent")


def test_cutoff_larger_than_the_cell_counts_every_image(build, batch_of, structures) -> None:
    """Not an error here: a 3 Å cell under a 5 Å cutoff gives the energy of its supercell."""
    small = structures["crystal"].copy()
    model = build(cutoff=7.0)
    assert float(small.cell.lengths().min()) < 3.2
    one, many = (model(batch_of(atoms))["energy"]["energy"].detach() for atoms in (small, small * (3, 3, 3)))
    torch.testing.assert_close(27 * one, many, rtol=1e-10, atol=1e-10)


def test_missing_edges(build, batch_of, structures) -> None:
    data = batch_of(structures["water"])
    delattr(data, "edge_index")
    data.__keys__.discard("edge_index")
    with pytest.raises(ValueError, match="edge_index: expected in the data because otf_graph is false"):
        build(otf_graph=False)(data)
