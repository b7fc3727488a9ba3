"""Labels, charge, spin and cells of data sets are refused by structure, and energies that references do not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lmdb
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.datasets.mt_concat_dataset import ConcatDataset
from fairchem.core.modules.loss import DDPMTLoss, L2NormLoss, PerAtomMAELoss
from fairchem.core.modules.normalization.element_references import ElementReferences
from fairchem.core.modules.normalization.normalizer import Normalizer
from fairchem.core.units.mlip_unit.mlip_unit import OutputSpec, Task, compute_loss
from omegaconf import OmegaConf

from e2former_fairchem.cli import main
from e2former_fairchem.data.database import CheckedAseDBDataset, StructureError
from e2former_fairchem.data.in_memory import create_in_memory_dataset
from e2former_fairchem.data.references import fit_element_references, read_element_references, spread
from e2former_fairchem.data.structures import check_cell
from e2former_fairchem.training import labels, resolvers
from e2former_fairchem.training.labels import LabelCollater, check_labels, check_residuals, get_dataloader
from e2former_fairchem.training.references import ElementAndChargeReferences
from e2former_fairchem.training.sampler import StructureBatchSampler

A2G = {"r_energy": True, "r_forces": True, "r_data_keys": ["spin", "charge"]}
#: eV, for energies that are made up.
MADE_UP = {"H": -16.0, "C": -1037.0, "O": -2047.0}


def energy_of(atoms: Atoms, extra: float = 0.0) -> float:
    return sum(MADE_UP[symbol] for symbol in atoms.symbols) + extra


def labelled(name: str = "H2O", energy: float | None = 0.0, forces: float | None = 0.5, **info: object) -> Atoms:
    """A molecule with made-up references plus `energy` as its energy; None leaves a label out."""
    atoms = molecule(name)
    results = {} if energy is None else {"energy": energy_of(atoms, energy)}
    results |= {} if forces is None else {"forces": np.full((len(atoms), 3), forces)}
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info = {"charge": 0, "spin": 1} | info
    return atoms


def write(folder: Path, frames: Sequence[Atoms]) -> str:
    folder.mkdir(exist_ok=True)
    with connect(str(folder / "data.aselmdb"), use_lock_file=False) as db:
        for atoms in frames:
            db.write(atoms, data=atoms.info)
    return str(folder)


def combined(source: str) -> ConcatDataset:
    config = {
        "splits": {"train": {"src": source, "no_shuffle": True}},
        "format": "e2former_fairchem.data.database.CheckedAseDBDataset",
        "a2g_args": A2G,
        "key_mapping": {"energy": "omol_energy", "forces": "omol_forces"},
        "transforms": {"common_transform": {"dataset_name": "omol"}},
    }
    sampling = {"sampling": {"type": "explicit", "ratios": {"omol.train": 1.0}}}
    return create_in_memory_dataset(OmegaConf.create({"omol": config}), sampling)


def tasks(references: Mapping[str, float] | Sequence[float] | None = None) -> list[Task]:
    """Energy and forces as in our configs."""
    if references is None or isinstance(references, Mapping):
        table = [0.0] + [math.nan] * 118
        for symbol, value in (references or MADE_UP).items():
            table[Atoms(symbol).numbers[0]] = value
        references = table
    common = {"normalizer": Normalizer(0.0, 1.0), "datasets": ["omol"], "metrics": ["mae"]}
    energy = common | {"element_references": ElementReferences(torch.DoubleTensor(references))}
    energy_loss, force_loss = DDPMTLoss(PerAtomMAELoss()), DDPMTLoss(L2NormLoss())
    return [
        Task("omol_energy", "system", "energy", OutputSpec([1], "float32"), loss_fn=energy_loss, **energy),
        Task("omol_forces", "atom", "forces", OutputSpec([3], "float32"), loss_fn=force_loss, **common),
    ]


# Charge and spin.


@pytest.mark.parametrize(
    ("key", "value", "expected"), [("charge", -0.9999999, -1), ("spin", 2.0004, 2), ("charge", np.float64(1), 1)]
)
def test_charge_and_spin_are_rounded_and_not_truncated(tmp_path: Path, key: str, value: float, expected: int) -> None:
    data = CheckedAseDBDataset({"src": write(tmp_path / "d", [labelled(**{key: value})]), "a2g_args": A2G})
    assert int(data[0][key]) == expected


@pytest.mark.parametrize("key", ["charge", "spin"])
@pytest.mark.parametrize("value", [0.5, -0.99, "1", None, math.nan, math.inf, True, [1]])
def test_charge_and_spin_that_are_no_integers_are_refused(tmp_path: Path, key: str, value: object) -> None:
    data = CheckedAseDBDataset({"src": write(tmp_path / "d", [labelled(), labelled(**{key: value})]), "a2g_args": A2G})
    assert int(data[0].spin) == 1
    with pytest.raises(StructureError, match=rf"structure 1 of {tmp_path}/d: {key}: expected an integer.*, got "):
        data[1]


def test_a_missing_charge_is_refused_where_the_config_reads_it(tmp_path: Path) -> None:
    atoms = labelled()
    del atoms.info["charge"]
    source = write(tmp_path / "d", [atoms])
    with pytest.raises(StructureError, match=r"structure 0 of .*: charge: expected an integer in .*info, got none"):
        CheckedAseDBDataset({"src": source, "a2g_args": A2G})[0]
    assert int(CheckedAseDBDataset({"src": source, "a2g_args": {"r_data_keys": ["spin"]}})[0].spin) == 1


# Cells, coordinates, rows.


@pytest.mark.parametrize(
    ("pbc", "cell", "message"),
    [
        ([True, True, True], np.diag([4.0, 4.0, 0.0]), "lattice vector along every periodic direction .* none along c"),
        ([True, False, False], np.zeros((3, 3)), "none along a"),
        ([True, True, True], np.zeros((3, 3)), "none along a, b, c"),
        ([True, True, False], [[4.0, 0, 0], [8.0, 0, 0], [0, 0, 9.0]], "linearly independent lattice vectors"),
        ([True, True, False], np.diag([4.0, 4.0, 9.0]), None),
        ([True, True, True], 4.0 * np.eye(3), None),
        ([False, False, False], np.zeros((3, 3)), None),
        ([False, False, False], np.diag([4.0, 0.0, 0.0]), None),
    ],
)
def test_periodic_directions_need_a_lattice_vector(
    tmp_path: Path, pbc: list[bool], cell: np.ndarray, message: str | None
) -> None:
    atoms = labelled()
    atoms.cell, atoms.pbc = cell, pbc
    data = CheckedAseDBDataset({"src": write(tmp_path / "d", [atoms]), "a2g_args": A2G})
    if message is None:
        check_cell(atoms)
        assert data[0].pbc[0].tolist() == pbc
        return
    with pytest.raises(ValueError, match=message):
        check_cell(atoms)
    with pytest.raises(StructureError, match=rf"structure 0 of .*d: cell: expected .*{message}"):
        data[0]


def test_the_calculators_hook_refuses_a_missing_lattice_vector(build: Callable) -> None:
    backbone = build().backbone
    atoms = labelled()
    atoms.cell, atoms.pbc = [4.0, 4.0, 0.0], True
    with pytest.raises(ValueError, match=r"cell: expected a lattice vector .* got none along c"):
        backbone.validate_atoms_data(atoms, "omol")
    backbone.validate_atoms_data(SimpleNamespace(info={"charge": 0, "spin": 1}), "omol")  # fairchem's batch server


def test_what_is_no_structure_is_refused_by_number(tmp_path: Path) -> None:
    lost = labelled()
    lost.positions[2, 1] = np.nan
    empty = Atoms(info={"charge": 0, "spin": 1})
    source = write(tmp_path / "d", [labelled(), lost, empty, labelled(charge=10**30), labelled()])
    with lmdb.open(f"{source}/data.aselmdb", subdir=False) as database, database.begin(write=True) as rows:
        rows.put(b"5", rows.get(b"5")[:40])
    data = CheckedAseDBDataset({"src": source, "a2g_args": A2G})
    for n, message in (
        (1, r"positions: expected finite coordinates, got \[.*nan.*\] for atom 2 \(1 such atoms\)"),
        (2, "atoms: expected at least one, got none"),
        (3, r"cannot be converted \(.*"),
        (4, r"cannot be read \(error: .*incomplete"),
    ):
        with pytest.raises(StructureError, match=rf"structure {n} of .*d: {message}"):
            data[n]


# Labels.


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"energy": None}, r"no energy \(omol_energy\)"),
        ({"forces": None}, r"no forces \(omol_forces\)"),
        ({"energy": math.nan}, r"energy not finite \(omol_energy\)"),
        ({"forces": math.inf}, r"forces not finite \(omol_forces\)"),
        ({"name": "NH3"}, r"elements without a reference \(omol_energy\): N"),
    ],
)
def test_bad_labels_are_refused_by_structure_or_left_out_of_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: dict, problem: str
) -> None:
    monkeypatch.setitem(MADE_UP, "N", -1490.0)
    given = tasks({symbol: value for symbol, value in MADE_UP.items() if symbol != "N"})
    data = combined(write(tmp_path / "d", [labelled(), labelled("CO", 0.25), labelled(**bad), labelled("CH4")]))
    refuse, mask = LabelCollater(given), LabelCollater(given, bad_labels="mask")
    items = [data[n] for n in range(4)]
    with pytest.raises(ValueError, match=rf"labels: expected finite .* structure 2 of omol.train: {problem}.*=mask"):
        refuse(items)
    with pytest.raises(ValueError, match=rf"structure 2 of omol.train: {problem}.* \(4 of 4 structures were checked\)"):
        check_labels(data, refuse)
    check_labels(data, mask)
    assert "1 labels of 4 checked structures (of 4) are left out" in caplog.text
    assert "structure 2 of omol.train" in caplog.text

    whole, good = mask(items), refuse([items[n] for n in (0, 1, 3)])
    losses = []
    for batch in (whole, good):
        batch.atomic_numbers_full, batch.batch_full = batch.atomic_numbers, batch.batch
        systems, atoms = batch.natoms.numel(), int(batch.natoms.sum())
        predicted = {
            "omol_energy": {"energy": torch.zeros(systems, requires_grad=True)},
            "omol_forces": {"forces": torch.zeros(atoms, 3, requires_grad=True)},
        }
        losses.append(compute_loss(given, predicted, batch))
    label = "omol_forces" if "forces" in problem else "omol_energy"
    torch.testing.assert_close(losses[0][label], losses[1][label])
    expected = math.sqrt(0.75) if label == "omol_forces" else (0 + 0.25 / 2 + 0) / 3
    assert losses[0][label].item() == pytest.approx(expected, abs=1e-4)  # energies are rounded to float32
    # What is kept in memory is not changed.
    if bad.get("forces") != math.inf:
        assert label not in data[2] or not data[2][label].isinf().any()


def test_labels_beyond_the_checked_ones_are_refused_in_their_batch(tmp_path: Path) -> None:
    assert spread(11, 4).tolist() == [0, 3, 6, 10]
    number = labels.MAX_CHECKED + 2
    first, _ = sorted(set(range(number)) - {*spread(number, labels.MAX_CHECKED).tolist()})  # that are not checked
    frames = [labelled("H", energy=math.nan if n == first else 0.0) for n in range(number)]
    data, collater = combined(write(tmp_path / "d", frames)), LabelCollater(tasks())
    loader = get_dataloader(
        data, lambda **options: StructureBatchSampler(num_structures=first, shuffle=False, **options), collater, 0
    )
    assert len(data.datasets[0]._items) == labels.MAX_CHECKED  # no more than these were read
    batches = iter(loader)
    assert next(batches).sid == [*map(str, range(first))]
    with pytest.raises(ValueError, match=rf"structure {first} of omol.train: energy not finite"):
        next(batches)


def test_a_data_set_without_tasks_is_named(tmp_path: Path) -> None:
    data = combined(write(tmp_path / "d", [labelled()]))
    data.datasets[0]._items[0] = data[0].clone()
    data.datasets[0]._items[0].dataset = "spice"
    with pytest.raises(ValueError, match="tasks: expected some for the data set 'spice' of structure 0.* got .* omol"):
        LabelCollater(tasks())([data[0]])


def test_an_unknown_treatment_of_bad_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="bad_labels: expected refuse or mask, got 'drop'"):
        LabelCollater(tasks(), bad_labels="drop")


# Energies and references.

SAMPLE = read_element_references(resolvers.DATA / "sample" / "statistics.json")


def sample_residuals(scale: float = 1.0, references: Sequence[float] = SAMPLE) -> list[tuple[float, str]]:
    """Of the bundled sample's training part, energies times `scale`."""
    folder = Path(resolvers.sample("train"))
    with connect(str(folder / "data.aselmdb"), readonly=True, use_lock_file=False) as db:
        rows = list(db.select())
    table = np.array(references)
    return [((scale * r.energy - table[r.numbers].sum()) / len(r.numbers), str(r.id)) for r in rows]


@pytest.mark.parametrize(
    ("scale", "references", "median"),
    [
        (1.0, SAMPLE, None),
        (1.0, "omol25", None),  # the same functional, another basis set
        (1.0, [0.0] * 119, 694.6),  # raw energies
        (1 / 27.211386, SAMPLE, 669.1),  # Hartree
        (1 / 27.211386, [0.0] * 119, 25.53),
        (23.0605, SAMPLE, 15_320),  # kcal/mol
    ],
)
def test_energies_that_the_references_do_not_fit_are_refused(
    scale: float, references: Sequence[float] | str, median: float | None
) -> None:
    table = resolvers.element_references(references) if isinstance(references, str) else references
    found = sample_residuals(scale, list(table))
    if median is None:
        check_residuals(found, "omol.train", "FOLDER", "omol_energy", 10.0)
        return
    assert np.median([abs(r) for r, _ in found]) == pytest.approx(median, rel=1e-3)
    words = rf"element_references: omol.train: .* median size of {median:.3g} eV/atom over 601 structures"
    with pytest.raises(ValueError, match=words.replace("+", r"\+")) as caught:
        check_residuals(found, "omol.train", "FOLDER", "omol_energy", 10.0)
    for part in ("expected at most 10 (median)", "fit-references FOLDER", "element_references=references.json"):
        assert part in str(caught.value)
    check_residuals(found, "omol.train", "FOLDER", "omol_energy", None)


def test_residuals_are_those_of_the_labels(tmp_path: Path) -> None:
    """Atomisation energies of isolated atoms' references pass; a structure in another unit among good ones does not."""
    good = [labelled("H2O", -9.6), labelled("CO", 11.1), labelled("CH4", -17.0)]
    data, collater = combined(write(tmp_path / "good", good)), LabelCollater(tasks())
    found = [labels.residual(data[n], collater.tasks_of(data[n])[0]) for n in range(3)]
    assert found == pytest.approx([-3.2, 5.55, -3.4], abs=1e-3)
    check_labels(data, collater)
    with pytest.raises(ValueError, match=r"median size of 3.4 eV/atom .*largest 5.55 eV/atom \(structure 1 .*most 3 "):
        check_labels(data, collater, max_energy_residual=3.0)
    hartree = labelled("H2O", -76.4 - energy_of(molecule("H2O")))
    data = combined(write(tmp_path / "mixed", [*good, hartree]))
    with pytest.raises(ValueError, match=r"largest 668 eV/atom \(structure 3 of omol.train\); expected .* 100 \(one"):
        check_labels(data, collater)


def test_wrong_references_stop_a_run_before_it_begins(
    repo: Path, launch: Callable, tiny: Sequence[str], elsewhere: Path
) -> None:
    with pytest.raises(Exception, match=r"median size of 695 eV/atom over 601 .*fit-references .*sample/train -o"):
        launch(repo / "configs" / "quickstart.yaml", *tiny, "element_references=spice")
    assert not [p for p in elsewhere.rglob("*") if p.suffix in (".pt", ".distcp", ".jsonl")]


def test_fitted_references_are_those_of_the_energies() -> None:
    names = ["H2", "H2O", "CO", "CH4", "CH3OH", "C2H6", "CO2"]
    systems = [molecule(name) for name in names]
    fitted = fit_element_references([a.numbers for a in systems], [energy_of(a) for a in systems])
    for symbol, value in MADE_UP.items():
        assert fitted.table[Atoms(symbol).numbers[0]] == pytest.approx(value, abs=1e-8)
    assert np.isnan(np.delete(fitted.table, [0, 1, 6, 8])).all()  # an element that is not there has no reference
    assert fitted.residuals.max() < 1e-9
    assert fitted.undetermined == []


def test_charges_have_a_reference_of_their_own(tmp_path: Path) -> None:
    """Fitted where charges differ, written and read, taken off the labels and added to what is predicted."""
    systems = [molecule(name) for name in ("H2", "H2O", "CO", "CH4", "CH3OH")] * 2
    charges = [0, 1, -1, 0, 2] * 2
    energies = [energy_of(a) + 5.5 * q for a, q in zip(systems, charges, strict=True)]
    fitted = fit_element_references([a.numbers for a in systems], energies, charges)
    assert fitted.table[0] == pytest.approx(5.5) and fitted.residuals.max() < 1e-9
    assert fit_element_references([a.numbers for a in systems], energies, [1] * 10).table[0] == 0.0  # as good as none
    file = tmp_path / "references.json"
    file.write_text(json.dumps({"element_references": {"1": -13.0, "8": -2040.0}, "charge_reference": 5.5}))
    table = read_element_references(file)
    assert (table[0], table[1], table[8]) == (5.5, -13.0, -2040.0)
    references = ElementAndChargeReferences(torch.tensor(table, dtype=torch.float64))
    water, hydroxide = molecule("H2O"), molecule("OH")
    water.info |= {"charge": 1, "spin": 2}
    hydroxide.info |= {"charge": -1, "spin": 1}
    batch = atomicdata_list_to_batch(
        [AtomicData.from_ase(a, task_name="omol", r_data_keys=["spin", "charge"]) for a in (water, hydroxide)]
    )
    batch.batch_full, batch.atomic_numbers_full = batch.batch, batch.atomic_numbers  # as the backbone does
    energy = torch.tensor([-2066.0 + 5.5, -2053.0 - 5.5], dtype=torch.float64)
    assert references.apply_refs(batch, energy).tolist() == [0.0, 0.0]
    assert references.undo_refs(batch, torch.zeros(2)).tolist() == energy.tolist()
    file.write_text(json.dumps({"element_references": {"1": -13.0}, "charge_reference": "5.5"}))
    with pytest.raises(ValueError, match=r"element_references: expected an energy \(eV\) per unit of charge .* '5.5'"):
        read_element_references(file, key="element_references")


@pytest.mark.parametrize(("energy", "near"), [(-2079.0 - 9.6, "omol25"), (-9.6, "zero")])
def test_elements_that_always_come_together_stay_near_what_they_could_be(energy: float, near: str) -> None:
    """Water alone fixes 2 H + O; plain least squares would say H -834 eV, O -417 eV for total energies."""
    systems = [molecule("H2O").numbers] * 3
    fitted = fit_element_references(systems, [energy, energy + 0.3, energy - 0.3])
    assert 2 * fitted.table[1] + fitted.table[8] == pytest.approx(energy)
    assert fitted.undetermined == ["H", "O"]
    start = np.array(resolvers.element_references("omol25") if near == "omol25" else [0.0] * 119)
    assert np.abs((fitted.table - start)[[1, 8]]).max() < 10
    assert fitted.residuals == pytest.approx([0, 0.1, 0.1])


def test_the_command_fits_what_training_then_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["H2O", "CO", "CH4", "CH3OH", "CO2"]
    source = write(tmp_path / "d", [labelled(name, 0.01 * n) for n, name in enumerate(names)])
    write(tmp_path / "d", [labelled(energy=None)])  # appended: a structure without a label
    assert main(["fit-references", "d", "-o", "mine.json"]) == 0
    said = capsys.readouterr().out
    assert "left of the energies of 5 structures" in said
    content = json.loads((tmp_path / "mine.json").read_text())
    assert set(content["element_references"]) == {"1", "6", "8"}
    assert content["element_references"]["8"] == pytest.approx(MADE_UP["O"], abs=0.1)
    assert (content["unit"], content["data"], content["structures"]) == ("eV", source, 5)
    given = tasks(list(resolvers.element_references("mine.json")))
    data = combined(source)
    assert max(abs(labels.residual(data[n], given[0])) for n in range(5)) < 0.05
    assert main(["fit-references", "absent", "-o", "other.json"]) == 2
    assert "DATA: expected a folder of .aselmdb files" in capsys.readouterr().err
    assert main(["fit-references", "d", "-o", "other.txt"]) == 2
    assert not (tmp_path / "other.txt").exists()


def test_the_fit_of_the_sample_is_the_bundled_one() -> None:
    with connect(f"{resolvers.sample('train')}/data.aselmdb", readonly=True, use_lock_file=False) as db:
        rows = list(db.select())
    fitted = fit_element_references(
        [r.numbers for r in rows], [r.energy for r in rows], [r.data["charge"] for r in rows]
    )
    np.testing.assert_allclose(np.nan_to_num(fitted.table), np.nan_to_num(SAMPLE), atol=1e-6)


# Every config of ours is protected.


def test_every_config_checks_structures_and_labels(repo: Path) -> None:
    """Those of the benchmark train on labels that fairchem makes up."""
    seen = []
    for path in sorted((repo / "configs").glob("**/*.yaml")):
        if path.is_relative_to(repo / "configs" / "benchmarks"):
            continue
        for node in nodes(yaml.safe_load(path.read_text())):
            if "format" in node and "a2g_args" in node:
                assert node["format"] == "e2former_fairchem.data.database.CheckedAseDBDataset", path
                seen.append(path.name)
            if "collate_fn" in node:
                assert node["_target_"] == "e2former_fairchem.training.labels.get_dataloader", path
                assert node["collate_fn"]["_target_"] == "e2former_fairchem.training.labels.LabelCollater", path
                assert node["collate_fn"]["bad_labels"] == "${oc.select:dataset.bad_labels,refuse}", path
                assert node["max_energy_residual"] == "${oc.select:dataset.max_energy_residual,10.0}", path
                seen.append(path.name)
    for name in ("folders", "sample", "omol25", "omol25_val", "quickstart", "omol25_direct", "spice_direct"):
        assert f"{name}.yaml" in seen


def nodes(node: object) -> list[dict]:
    """All mappings of a YAML file."""
    inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return ([node] if isinstance(node, dict) else []) + [found for part in inner for found in nodes(part)]


def test_evaluations_are_protected_too(
    repo: Path, launch: Callable, elsewhere: Path, tmp_path: Path, write_checkpoint: Callable
) -> None:
    write_checkpoint(elsewhere / "checkpoint.pt")
    source = write(tmp_path / "d", [labelled(energy=9.6 - energy_of(molecule("H2O"))), labelled(forces=math.nan)])
    overrides = ["checkpoint=checkpoint.pt", "dataset=omol25_val", f"data_val={source}", "job.device_type=CPU"]
    overrides += ["dataset.key_mapping.energy=energy", "dataset.key_mapping.forces=forces"]
    evaluate = repo / "configs" / "evaluate" / "omol25.yaml"
    with pytest.raises(Exception, match=r"structure 1 of omol.val: forces not finite \(forces\)"):
        launch(evaluate, *overrides)
    with pytest.raises(Exception, match=r"element_references: omol.val: energy .*structure 1 of omol.val"):
        launch(evaluate, *overrides, "dataset.bad_labels=mask")
    assert not list(elsewhere.rglob("results.json"))


def test_structures_that_the_sampler_leaves_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fairchem.core.datasets.samplers.max_atom_distributed_sampler import MaxAtomDistributedBatchSampler

    data = combined(write(tmp_path / "d", [labelled(), labelled("C2H6"), labelled("CO")]))
    sampler = partial(MaxAtomDistributedBatchSampler, max_atoms=6, shuffle=False, seed=0)
    loader = get_dataloader(data, sampler, LabelCollater(tasks()), 0)
    assert sum(len(batch.sid) for batch in loader) == 2
    assert "1 of 3 structures of omol.train have more than 6 atoms (max_atoms) and are left out" in caplog.text
