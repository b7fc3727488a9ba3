"""What can be had of fairchem's calculator: several checkpoints as one, dispersion, node embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from e3nn import o3
from fairchem.core.calculate.ase_calculator import FAIRChemCalculator

from e2former_fairchem import DispersionCalculator, EnsembleCalculator, embeddings
from e2former_fairchem.testing import random_rotation
from e2former_fairchem.training.card import write_card

OPTIONS = {"inference_settings": "traineval", "device": "cpu"}


@pytest.fixture(scope="module")
def trained(write_checkpoint, tmp_path_factory) -> Callable[..., Path]:
    """A small checkpoint, another one for every number of channels, with a level of theory and references in it."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def write(channels: int = 8, level: str | None = "PBE", hydrogen: float | None = None, **options) -> Path:
        path = folder / f"{channels}_{str(level).replace('/', '_')}_{hydrogen}.pt"
        write_checkpoint(path, num_layers=1, sphere_channels=channels, **options)
        write_card(path, {} if level is None else {"level_of_theory": level})
        if hydrogen is not None:
            content = torch.load(path, weights_only=False)
            references = {"_target_": "fairchem.core.modules.normalization.element_references.ElementReferences"}
            values = {"_target_": "torch.tensor", "data": [0.0, hydrogen]}
            content.tasks_config[0]["element_references"] = references | {"element_references": values}
            torch.save(content, path)
        return path

    return write


def of(calculator, atoms: Atoms) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms


def test_ensemble(trained, structures) -> None:
    """Means and deviations are those of the members, also after a change of the charge alone."""
    paths = [trained(channels) for channels in (8, 16, 24)]
    ensemble = EnsembleCalculator(paths, "omol", **OPTIONS)
    members = [FAIRChemCalculator.from_model_checkpoint(str(path), "omol", **OPTIONS) for path in paths]
    atoms = of(ensemble, structures["crystal"])
    before = None
    for charge, spin in ((0, 1), (1, 2)):
        atoms.info.update(charge=charge, spin=spin)
        energy, forces, stress = atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        singles = [of(member, atoms) for member in members]
        energies = np.array([single.get_potential_energy() for single in singles])
        each = np.array([single.get_forces() for single in singles])
        assert energy == pytest.approx(energies.mean()) != before
        assert np.allclose(forces, each.mean(0), atol=1e-7)
        assert np.allclose(stress, np.mean([single.get_stress() for single in singles], axis=0), atol=1e-9)
        found = ensemble.results
        assert found["energy_std"] == pytest.approx(np.sqrt(((energies - energies.mean()) ** 2).sum() / 2))
        assert np.allclose(found["forces_std"], np.sqrt(((each - each.mean(0)) ** 2).sum((0, 2)) / 2), rtol=1e-4)
        before = energy
    atoms.info.clear()
    assert atoms.get_potential_energy() != before
    assert ensemble.check_state(atoms) == []


def test_members_of_an_ensemble_agree(trained, tmp_path) -> None:
    one = trained(hydrogen=-13.5)
    for other, message in (
        (trained(16, level="r2SCAN", hydrogen=-13.5), "level of theory of .*PBE, got r2SCAN"),
        (trained(16, level=None, hydrogen=-13.5), "level of theory of .*PBE, got None"),
        (trained(16, hydrogen=-13.6), "element reference of H of .*-13.5, got -13.6"),
        (trained(16), "element reference of H of .*-13.5, got None"),
    ):
        with pytest.raises(ValueError, match=f"{other}: expected the {message}"):
            EnsembleCalculator([one, other], "omol", **OPTIONS)
    with pytest.raises(ValueError, match=f"{one}: Invalid task_name 'omat'"):
        EnsembleCalculator([one, one], "omat", **OPTIONS)
    with pytest.raises(ValueError, match="checkpoints: expected two or more"):
        EnsembleCalculator([one], "omol", **OPTIONS)
    with pytest.raises(FileNotFoundError, match=r"absent.pt"):
        EnsembleCalculator([one, tmp_path / "absent.pt"], "omol", **OPTIONS)


def test_dispersion(trained, d3_table) -> None:
    """The checkpoint's energy, and -s6 C6/(r^6 + f^6) - s8 C8/(r^8 + f^8) with PBE's constants (Grimme et al. 2011)."""
    path = trained(level="PBE/def2-TZVP")
    atoms = Atoms("HF", [[0, 0, 0], [0, 0, 4.0]], info={"charge": 0, "spin": 1})
    plain = of(FAIRChemCalculator.from_model_checkpoint(str(path), "omol", **OPTIONS), atoms)
    found = of(DispersionCalculator(path, "omol", param_file=d3_table, **OPTIONS), atoms)
    r, ratio = 4.0 / 0.529177210544, 3 * 2.0 * 2.0
    damping = 0.4289 * ratio**0.5 + 4.4407
    d3 = -27.211386 * 6.5 * (1 / (r**6 + damping**6) + 0.7875 * ratio / (r**8 + damping**8))
    assert found.get_potential_energy() - plain.get_potential_energy() == pytest.approx(d3, rel=1e-2)
    assert found.calc.results["energy_contributions"] == pytest.approx([plain.get_potential_energy(), d3])
    assert found.get_forces()[0, 2] > plain.get_forces()[0, 2]
    before = found.get_potential_energy()
    found.info.update(charge=1, spin=2)
    assert found.get_potential_energy() != before
    found.info.clear()
    assert found.get_potential_energy() == before
    assert found.calc.check_state(found) == []


@pytest.mark.parametrize("level", ["PBE0", "PBE-D3(BJ)/PAW", "wB97M-V/def2-SVP", None])
def test_dispersion_is_refused_where_labels_are_not_plain_pbe(level, trained, d3_table) -> None:
    with pytest.raises(ValueError, match="expected the level of theory PBE, for which this D3 is, got"):
        DispersionCalculator(trained(level=level), "omol", param_file=d3_table, **OPTIONS)


def test_embeddings(trained, structures) -> None:
    """A turned molecule has the same invariants; degree l turns with e3nn's matrix of that degree."""
    calculator = FAIRChemCalculator.from_model_checkpoint(str(trained()), "omol", **OPTIONS)
    atoms, rotation = structures["ethanol"], random_rotation(3)
    turned = atoms.copy()
    turned.positions = atoms.positions @ rotation.T
    before, after = embeddings(calculator, atoms), embeddings(calculator, turned)
    assert before.invariant.shape == (9, 8) and before.equivariant.shape == (9, 9, 8)
    assert not before.equivariant.requires_grad
    assert torch.allclose(after.invariant, before.invariant, atol=1e-5)
    matrix = o3.Irreps("0e+1e+2e").D_from_matrix(torch.tensor(rotation)).float()
    assert torch.allclose(after.equivariant, matrix @ before.equivariant, atol=1e-5)
    assert float((after.equivariant - before.equivariant)[:, 1:].abs().max()) > 0.01
    ion = atoms.copy()
    ion.info.update(charge=1, spin=2)
    assert float((embeddings(calculator, ion).invariant - before.invariant).abs().max()) > 1e-3
    calculator.predictor.model.module.backbone = torch.nn.Identity()
    with pytest.raises(TypeError, match="expected one E2FormerV2Backbone in this process, got Identity"):
        embeddings(calculator, atoms)
