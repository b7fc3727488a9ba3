"""Workflows around a checkpoint: docs that name what exists, and fairchem's script for data sets."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import hydra
import numpy as np
from ase.io import read, write
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


def test_the_documented_line_for_umas_yaml_composes(repo: Path, fake_omol25, elsewhere: Path) -> None:
    from fairchem.core._cli import get_hydra_config_from_yaml

    text = (repo / "docs" / "workflows.md").read_text()
    line = re.search(r"fairchem -c uma_sm_direct\.yaml ((?:.|\n)*?)\n\n", text).group(1).replace("\\\n", " ").split()
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
    yaml = re.sub(r"^(moe_layer_type|num_moe_experts|otf_graph): .*\n", "", yaml, flags=re.MULTILINE)
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
