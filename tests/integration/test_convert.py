"""The authors' weights as checkpoints that fairchem reads, and checkpoints without pickles."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from fairchem.core.calculate.ase_calculator import FAIRChemCalculator
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit
from safetensors.torch import save_file

from e2former_fairchem.commands import convert_molfm
from e2former_fairchem.commands import safetensors as safetensors_command
from e2former_fairchem.data.references import read_element_references
from e2former_fairchem.interop.checkpoint_file import export_safetensors, import_safetensors, read_tensors
from e2former_fairchem.interop.molfm import StateDictError, convert_molfm_checkpoint
from e2former_fairchem.interop.references import element_references, table_of_head
from e2former_fairchem.training.card import read_card
from e2former_fairchem.training.checkpoint import initialize_from_checkpoint, read_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
from molfm_fixtures import Fixture, atomic_data, load_fixture

NAMES = ("v2tag_QKdotS_alpha", "head_QKdot_alpha_painn", "head_QK_alpha_node")
OMOL25 = element_references("omol25")


@pytest.fixture(scope="module", params=NAMES)
def fixture(request, fixtures_dir) -> Fixture:
    return load_fixture(fixtures_dir / f"{request.param}.npz")


@pytest.fixture(scope="module")
def one(fixtures_dir) -> Fixture:
    return load_fixture(fixtures_dir / "head_QK_alpha.npz")


def release_files(fixture: Fixture, folder: Path, conserving: bool = True, **config) -> tuple[Path, Path]:
    """The files of a release: a torch file with more in it than weights, and the flattened YAML."""
    flat = {k: v for k, v in fixture.config(conserving).items() if k != "backbone_config"}
    weights, settings = folder / "weights.pt", folder / "config.yaml"
    torch.save({"model": OrderedDict(fixture.state_dict), "epoch": 3, "optimizer": {"state": {}}}, weights)
    settings.write_text(yaml.safe_dump({**flat, "lr": 8e-4, **config}))
    return weights, settings


def predict_unit(path: Path, dtype: torch.dtype = torch.float64, **settings) -> MLIPPredictUnit:
    return MLIPPredictUnit(
        str(path), "cpu", inference_settings=InferenceSettings(base_precision_dtype=dtype, **settings)
    )


def total_energy(system: dict[str, np.ndarray], energy: np.ndarray, references=OMOL25) -> np.ndarray:
    per_atom = np.array(references)[system["atomic_numbers"]]
    return energy + np.bincount(system["batch"], weights=per_atom, minlength=len(energy))


def convert(arguments: list[str], capsys) -> str:
    parser = argparse.ArgumentParser()
    convert_molfm.add_arguments(parser)
    assert convert_molfm.run(parser.parse_args(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("conserving", [True, False], ids=["conserving", "direct"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_predictions_are_the_fixtures(fixture, conserving, dtype, tmp_path) -> None:
    """Through fairchem's predict unit: total energies, forces, for every system of a file."""
    weights, config = release_files(fixture, tmp_path, conserving)
    convert_molfm_checkpoint(weights, config, tmp_path / "out.pt", release=fixture.release)
    unit = predict_unit(tmp_path / "out.pt", dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 5e-5
    for name, system in fixture.systems.items():
        found = unit.predict(atomic_data(system, dtype))
        energy = system[f"{fixture.outputs}/energy"]
        forces = system[f"{fixture.outputs}/{'forces' if conserving else 'direct_forces'}"]
        # The references are summed in double precision: the error is the network's.
        error = np.abs(found["energy"].detach().double().numpy() - total_energy(system, energy)).max()
        assert error <= tolerance * np.abs(energy).max() + 1e-9, f"{name}: energy off by {error}"
        error = np.abs(found["forces"].detach().double().numpy() - forces).max()
        assert error <= tolerance * np.abs(forces).max(), f"{name}: forces off by {error}"


def test_calculator_and_fine_tuning(one, tmp_path, capsys) -> None:
    weights, config = release_files(one, tmp_path)
    out = convert([str(weights), str(config), "-o", str(tmp_path / "out.pt")], capsys)
    assert "release v1.5, head omol25" in out and "task omol" in out and "the energy's gradient" in out
    assert "decoder.decoder.heads2basis.weight" in out and "head.force_heads.omol25.sing_linear.weight" in out
    system = one.systems["ethanol"]
    atoms = Atoms(system["atomic_numbers"], system["pos"], info={"charge": 0, "spin": 1})
    atoms.info["spin"] = int(system["multiplicity"][0])
    atoms.calc = FAIRChemCalculator(predict_unit(tmp_path / "out.pt"), task_name="omol")
    assert atoms.get_potential_energy() == pytest.approx(total_energy(system, system["out/energy"])[0], abs=1e-7)
    assert np.allclose(atoms.get_forces(), system["out/forces"], atol=1e-9)
    # Heads of our own configs take over every weight.
    heads = {"efs": {"module": "e2former_fairchem.heads.E2FormerV2GradientHead", "prefix": "omol"}}
    model = initialize_from_checkpoint(str(tmp_path / "out.pt"), heads=heads)
    trained = model.train()(atomic_data(system, torch.float32))
    assert trained["omol_energy"]["energy"].item() == pytest.approx(system["out/energy"][0], rel=1e-4)
    assert model.no_weight_decay()


def test_an_element_without_reference_has_no_energy(one, tmp_path, caplog, nothing_said) -> None:
    weights, config = release_files(one, tmp_path)
    report = convert_molfm_checkpoint(weights, config, tmp_path / "out.pt")
    assert report.elements[0] == "H" and report.elements[-1] == "Bi" and len(report.elements) == 83
    atoms = Atoms("PoH", [[0, 0, 0], [0, 0, 1.8]], info={"charge": 0, "spin": 2})
    atoms.calc = FAIRChemCalculator(predict_unit(tmp_path / "out.pt"), task_name="omol")
    assert math.isnan(atoms.get_potential_energy()) and np.isfinite(atoms.get_forces()).all()
    assert "training never saw Po:" in caplog.text
    assert atoms.calc.predictor.model.module.backbone.elements == report.elements


def test_units_heads_and_references(one, tmp_path) -> None:
    """A head in other units, named after its data set; references of one's own."""
    renamed = {k.replace(".omol25.", ".svp-gems."): v for k, v in one.state_dict.items()}
    fixture = Fixture(one.name, {**one.meta, "dataset": "svp-gems"}, renamed, one.systems)
    weights, config = release_files(fixture, tmp_path, loss_unit="kcal/mol")
    report = convert_molfm_checkpoint(weights, config, tmp_path / "out.pt")
    assert report.head == "svp-gems" and report.unit == 0.0433634
    system = fixture.systems["ethanol"]
    found = predict_unit(tmp_path / "out.pt").predict(atomic_data(system, torch.float64))
    assert np.allclose(found["forces"].detach().numpy(), 0.0433634 * system["out/forces"], atol=1e-8)
    expected = total_energy(system, 0.0433634 * system["out/energy"], element_references("svp"))
    assert np.allclose(found["energy"].detach().numpy(), expected, atol=1e-7)
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"1": -13.6, "6": -1000.0}))
    report = convert_molfm_checkpoint(weights, config, tmp_path / "out.pt", references=own, task="mine")
    assert report.elements == ("H", "C") and report.task == "mine"
    report = convert_molfm_checkpoint(weights, config, tmp_path / "out.pt", references="none")
    assert len(report.elements) == 118


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": "absent.pt"}, FileNotFoundError, "weights: expected a file.*absent.pt, which does not exist"),
        ({"config": "absent.yaml"}, FileNotFoundError, "config: expected the flattened MolFM YAML.*absent.yaml"),
        ({"config": "list.yaml"}, ValueError, "config: expected keys and values in .*list.yaml, got list"),
        ({"config": "wrong.yaml"}, ValueError, r"config: wrong.yaml: MolFM configuration: missing keys \['num_layers'"),
        ({"config": "section.yaml"}, ValueError, "config: section.yaml: "),
        ({"weights": "code.pt"}, ValueError, "weights: expected nothing but tensors.*code.pt"),
        ({"weights": "text.pt"}, ValueError, "weights: expected a file written by torch.save, got .*text.pt"),
        ({"weights": "other.pt"}, ValueError, "weights: expected an entry 'model'.*other.pt, got state_dict"),
        ({"weights": "extra.pt"}, StateDictError, "unknown keys: decoder.surprise"),
        ({"head": "spice"}, ValueError, "head: expected one of omol25"),
        ({"release": "v3"}, ValueError, "release: expected 'v2' or 'v1.5', got 'v3'"),
        ({"task": "no name"}, ValueError, "task: expected letters, digits and underscores, got 'no name'"),
        ({"references": "absent.json"}, FileNotFoundError, "references: expected a JSON file"),
    ],
)
def test_what_is_refused(change, error, message, one, tmp_path, monkeypatch) -> None:
    """Each says what is wrong, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    weights, config = release_files(one, tmp_path)
    Path("list.yaml").write_text("- 1\n")
    Path("wrong.yaml").write_text("job: local\n")
    Path("section.yaml").write_text("backbone_config: 3\n")
    Path("text.pt").write_text("no archive")
    torch.save({"model": one.state_dict, "args": argparse.Namespace(lr=1)}, "code.pt")
    torch.save({"state_dict": one.state_dict}, "other.pt")
    torch.save({"model": {**one.state_dict, "decoder.surprise": torch.zeros(1)}}, "extra.pt")
    arguments = {"weights": weights, "config": config} | change
    source, settings = arguments.pop("weights"), arguments.pop("config")
    with pytest.raises(error, match=message):
        convert_molfm_checkpoint(source, settings, "out.pt", **arguments)
    assert not list(tmp_path.glob("*out.pt*"))


def test_references_of_heads() -> None:
    assert table_of_head("tzvpd-small") == "tzvpd" and table_of_head("svp-enhance") == "svp"
    assert set(element_references("spice")) == {0.0}
    assert OMOL25[6] == -1037.14414 and math.isnan(OMOL25[84])
    with pytest.raises(ValueError, match="head: element references are known for omol25.*got 'ani'"):
        element_references("ani")


@pytest.mark.parametrize("content", ["{", "3", '{"1": "x"}', '{"119": 1.0}', '["a", "b"]'])
def test_references_that_cannot_be(content, tmp_path) -> None:
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(ValueError, match=r"references: expected.*table\.json"):
        read_element_references(tmp_path / "table.json")


def test_without_pickles(one, tmp_path, capsys) -> None:
    """The authors' weights in, a checkpoint out, all as safetensors; imported it predicts the same."""
    weights, config = release_files(one, tmp_path)
    save_file({k: v.contiguous() for k, v in one.state_dict.items()}, tmp_path / "weights.safetensors")
    convert_molfm_checkpoint(tmp_path / "weights.safetensors", config, tmp_path / "direct.safetensors")
    convert_molfm_checkpoint(weights, config, tmp_path / "out.pt")
    parser = argparse.ArgumentParser()
    safetensors_command.add_arguments(parser)
    for source, target in (("out.pt", "exported.safetensors"), ("exported.safetensors", "again.pt")):
        arguments = parser.parse_args([str(tmp_path / source), "-o", str(tmp_path / target)])
        assert safetensors_command.run(arguments) == 0
        assert target in capsys.readouterr().out
    import_safetensors(tmp_path / "direct.safetensors", tmp_path / "from_direct.pt")
    first = read_checkpoint(tmp_path / "out.pt")
    for name in ("again.pt", "from_direct.pt"):
        second = read_checkpoint(tmp_path / name)
        assert second.model_config == first.model_config
        assert read_card(second) == read_card(first) != {}
        assert str(second.tasks_config) == str(first.tasks_config)  # NaN is not equal to itself
        assert second.model_state_dict.keys() == first.model_state_dict.keys()
        for key, tensor in first.ema_state_dict.items():
            assert torch.equal(tensor, second.ema_state_dict[key])
    data = atomic_data(one.systems["ethanol"], torch.float32)
    same = [predict_unit(tmp_path / n, torch.float32).predict(data.clone())["energy"] for n in ("out.pt", "again.pt")]
    assert torch.equal(*same)


def test_trained_checkpoints_are_exported_with_their_averages(write_checkpoint, tmp_path) -> None:
    path = write_checkpoint(tmp_path / "trained.pt")
    checkpoint = read_checkpoint(path)
    for key, tensor in checkpoint.ema_state_dict.items():
        if key != "n_averaged":
            checkpoint.ema_state_dict[key] = tensor + 1
    checkpoint.ema_state_dict["n_averaged"] = torch.tensor(7)
    torch.save(checkpoint, path)
    import_safetensors(export_safetensors(path, tmp_path / "t.safetensors"), tmp_path / "back.pt")
    back = read_checkpoint(tmp_path / "back.pt")
    assert int(back.ema_state_dict["n_averaged"]) == 7
    for key, tensor in back.model_state_dict.items():
        assert torch.equal(tensor, checkpoint.ema_state_dict[f"module.{key}"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model_config", "_target_"), "os.system"),
        (("model_config", "backbone", "model"), "fairchem.core.models.base.os.system"),
        (("model_config", "heads", "efs", "module"), "e2former_fairchem.training.checkpoint.read_checkpoint"),
        (("tasks_config", 0, "normalizer", "_target_"), "subprocess.call"),
        (("tasks_config", 0, "name"), "${oc.env:HOME}"),
    ],
)
def test_foreign_classes_are_not_imported(path, value, write_checkpoint, tmp_path) -> None:
    exported = export_safetensors(write_checkpoint(tmp_path / "a.pt"), tmp_path / "a.safetensors")
    tensors, metadata = read_tensors(exported)
    content = json.loads(metadata["content"])
    where = content
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    save_file(tensors, exported, {**metadata, "content": json.dumps(content)})
    with pytest.raises(
        ValueError, match=r"source: expected classes of e2former_fairchem.*a\.safetensors, got"
    ) as error:
        import_safetensors(exported, tmp_path / "b.pt")
    assert value in str(error.value) and not (tmp_path / "b.pt").exists()


def test_safetensors_files_that_are_refused(write_checkpoint, tmp_path) -> None:
    path = write_checkpoint(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"destination: expected a name that ends in \.safetensors"):
        export_safetensors(path, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*a\.pt"):
        import_safetensors(path, tmp_path / "b.pt")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors, which does not exist"):
        import_safetensors(tmp_path / "absent.safetensors", tmp_path / "b.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"expected the format 'e2former-fairchem.*c\.safetensors.*got None"):
        import_safetensors(tmp_path / "c.safetensors", tmp_path / "b.pt")
