"""Workflows around a checkpoint: docs that name what exists, and fairchem's script for data sets."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.io import read, write
from ase.io.lammpsdata import write_lammps_data
from fairchem.core.datasets import AseDBDataset
from fairchem.core.scripts.create_finetune_dataset import write_ase_db

from e2former_fairchem import cli
from e2former_fairchem.training.resolvers import sample


def test_docs_name_every_example_and_command(repo: Path) -> None:
    text = (repo / "docs" / "workflows.md").read_text()
    listed = set(re.findall(r"`(\w+\.py)`", text)) & {p.name for p in (repo / "examples").glob("*.py")}
    assert listed == {p.name for p in (repo / "examples").glob("*.py")} - {"common.py"}
    for command in re.findall(r"^    e2former-fairchem ([\w-]+)", text, re.MULTILINE):
        assert command in cli.COMMANDS
    for path in re.findall(r"`(configs/quickstart\.yaml)", text):
        assert (repo / path).is_file()


@pytest.mark.parametrize("page", ["README.md", "docs/workflows.md"])
def test_the_documented_line_for_umas_yaml_composes(page: str, repo: Path, fake_omol25, elsewhere: Path) -> None:
    from fairchem.core._cli import get_hydra_config_from_yaml

    text = (repo / page).read_text()
    line = (
        re.search(r"fairchem -c uma_sm_direct_pretrain\.yaml ((?:.|\n)*?)\n(?:\n|```)", text)
        .group(1)
        .replace("\\\n", " ")
        .split()
    )
    data = f"cluster.data_root_dir={Path(fake_omol25[0].split('=')[1]).parent}"
    host = repo / "tests" / "integration" / "host" / "uma_sm_direct.yaml"
    model = get_hydra_config_from_yaml(str(host), [data, *line]).runner.train_eval_unit.model
    assert model.backbone.model == "e2former_fairchem.backbone.E2FormerV2Backbone"
    assert sorted(model.heads) == ["omol_energy", "omol_forces"]


def test_the_documented_line_for_allscaips_yaml_composes(repo: Path, fake_omol25, elsewhere: Path) -> None:
    """A host with the keys, the backbone's use of them, and the heads that AllScAIP's training YAMLs have."""
    from fairchem.core._cli import get_hydra_config_from_yaml

    host = elsewhere / "host"
    shutil.copytree(repo / "tests" / "integration" / "host", host)
    yaml = (host / "uma_sm_direct.yaml").read_text()
    yaml = re.sub(r"^(moe_layer_type|num_moe_experts|otf_graph|cpu_graph): .*\n", "", yaml, flags=re.MULTILINE)
    dataset = host / "dataset" / "omol.yaml"
    dataset.write_text(re.sub(r"^    (r_edges|r_stress|radius|max_neigh): .*\n", "", dataset.read_text(), flags=re.M))
    yaml = yaml.replace("bf16: false\n", "bf16: false\nmax_neighbors_pad_size: 50\nuse_pbc: false\nuse_compile: true\n")
    yaml = yaml.replace("  omol_forces:\n    module: fairchem", "  forces:\n    module: fairchem")
    (host / "omol_4m.yaml").write_text(yaml)
    text = (repo / "docs" / "workflows.md").read_text()
    line = re.search(r"fairchem -c omol_4m\.yaml ((?:.|\n)*?)\n\n", text).group(1).replace("\\\n", " ").split()
    data = f"cluster.data_root_dir={Path(fake_omol25[0].split('=')[1]).parent}"
    model = get_hydra_config_from_yaml(str(host / "omol_4m.yaml"), [data, *line]).runner.train_eval_unit.model
    small = {"sphere_channels": 8, "num_layers": 1, "num_heads": 4, "num_radial_basis": 8}
    built = hydra.utils.instantiate(model, backbone=small)
    assert {name: type(head).__name__ for name, head in built.output_heads.items()} == {
        "forces": "E2FormerV2DirectForceHead",
        "omol_energy": "E2FormerV2EnergyHead",
    }


def test_data_from_fairchems_script(launch, tiny, repo, elsewhere: Path) -> None:
    """create_finetune_dataset keeps charge and spin, and our configs train on what it writes."""
    data = AseDBDataset({"src": sample("val_new")})
    frames = [data.get_atoms(n) for n in range(4)]
    frames[0].info.update(charge=-1, spin=2)
    for part, chosen in (("train", frames[:3]), ("val", frames[3:])):
        folder = elsewhere / part
        folder.mkdir()
        write(elsewhere / f"{part}.xyz", chosen)
        assert read(elsewhere / f"{part}.xyz", 0).info["charge"] == chosen[0].info["charge"]
        _, natoms, kept, failed = write_ase_db((folder / "data.0000.aselmdb", [elsewhere / f"{part}.xyz"], 0))
        assert len(kept) == len(chosen) and not failed
        np.savez_compressed(folder / "metadata.npz", natoms=natoms)
    keys = {"src": str(elsewhere / "train"), "a2g_args": {"r_data_keys": ["spin", "charge"]}}
    first = AseDBDataset(keys)[0]
    assert int(first.charge) == -1 and int(first.spin) == 2
    folders = (f"data_train={elsewhere / 'train'}", f"data_val={elsewhere / 'val'}")
    launch(repo / "configs" / "quickstart.yaml", *tiny, "dataset=folders", *folders, "epochs=1")
    assert (elsewhere / "runs" / "quickstart" / "inference_ckpt.pt").is_file()


@pytest.fixture
def lammps_run(tmp_path: Path) -> Callable[..., Any]:
    """A water molecule in harmonic wells under LAMMPS, with the model's n-th answer a refusal."""
    pytest.importorskip("fairchem.lammps.lammps_fc")
    from e2former_fairchem.interop.lammps import run_lammps

    class Wells:
        def __init__(self, refusal: int) -> None:
            self.calls, self.refusal = 0, refusal

        def predict(self, data: Any) -> dict[str, torch.Tensor]:
            self.calls += 1
            if self.calls == self.refusal:
                raise ValueError("spin of structure 0: expected 0 to 100")
            away = data.pos - 8.0
            return {"forces": -away, "energy": 0.5 * (away**2).sum().reshape(1)}

    atoms = molecule("H2O")
    atoms.center(vacuum=8.0)
    write_lammps_data(tmp_path / "water.data", atoms, specorder=["O", "H"])

    def run(*commands: str, units: str = "metal", refusal: int = 0) -> Any:
        script = tmp_path / "in.water"
        setup = ["atom_style atomic", "atom_modify map array", "boundary f f f", f"read_data {tmp_path / 'water.data'}"]
        setup += ["mass 1 15.999", "mass 2 1.008", "timestep 0.0005", "fix 1 all nve", "thermo 1"]
        script.write_text("\n".join([f"units {units}", *setup, *commands, ""]))
        return run_lammps(Wells(refusal), script, "omol", spin=1)

    return run


def test_lammps_stops_at_a_refusal_of_the_model(lammps_run: Callable) -> None:
    for command in ("run 50", "minimize 0 1e-9 50 100"):
        with pytest.raises(ValueError, match="spin of structure 0: expected 0 to 100") as caught:
            lammps_run(command, refusal=3)
        assert caught.value.__notes__ == ["LAMMPS was stopped at step 2"]


@pytest.mark.parametrize("units", ["real", "lj"])
def test_lammps_in_other_units_is_refused(units: str, lammps_run: Callable) -> None:
    with pytest.raises(ValueError, match=f"in.water: expected units metal .* got units {units}"):
        lammps_run("run 1", units=units)


def test_lammps_without_a_run(lammps_run: Callable) -> None:
    with pytest.raises(ValueError, match="in.water: expected a line with one of run, minimize, rerun, got none"):
        lammps_run("run_style verlet")


def test_lammps_minimises_and_runs_again(lammps_run: Callable) -> None:
    lmp = lammps_run("minimize 0 1e-6 50 100", "run 2", "run 3")
    assert abs(lmp.get_thermo("pe")) < 1e-3  # eV, at the bottom of the wells
    lmp.close()
