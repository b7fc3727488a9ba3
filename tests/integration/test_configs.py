"""Every run file composes, builds and trains two steps on a fake data set of the right format."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import pytest
import torch
import yaml
from ase.build import molecule
from fairchem.core._cli import get_hydra_config_from_yaml
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from hydra import initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from e2former_fairchem.backbone import E2FormerV2Backbone
from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.training.checkpoint import read_checkpoint
from e2former_fairchem.training.metrics import read_metrics
from e2former_fairchem.training.resolvers import at_most
from e2former_fairchem.training.runner import evaluation_interval

TRAIN = ("omol25_direct", "omol25_conserving", "spice_direct")


def compose(config: Path, *overrides: str) -> dict:
    """What the command line would run, as plain containers."""
    return OmegaConf.to_container(get_hydra_config_from_yaml(str(config), list(overrides)), resolve=True)


@pytest.mark.parametrize("name", TRAIN)
def test_training_config_takes_two_steps(
    name: str, repo: Path, launch: Callable, tiny: Sequence[str], fake_omol25: Sequence[str], elsewhere: Path
) -> None:
    batch = "batch_size=4" if name == "spice_direct" else "max_atoms=20"
    batch = (batch, "element_references=spice")  # zero, as suits labels that are made up
    overrides = (*tiny, *fake_omol25, "num_workers=0", "steps=2", "warmup_steps=1", *batch)
    launch(repo / "configs" / "train" / f"{name}.yaml", *overrides)
    (final,) = elsewhere.glob("runs/*/checkpoints/final")
    assert (final / "inference_ckpt.pt").is_file()
    records = {record["kind"]: record for record in read_metrics(final.parents[1] / "metrics.jsonl")}
    assert records["train"]["step"] == 2
    values = records["evaluation"]["metrics"]["omol.val"]
    assert set(values) >= {"omol_energy,per_atom_mae", "omol_forces,mae"}
    assert all(math.isfinite(v) for v in values.values())


def test_second_stage_continues_from_the_first(
    repo: Path, launch: Callable, tiny: Sequence[str], fake_omol25: Sequence[str], elsewhere: Path
) -> None:
    """The line in omol25_conserving.yaml: the first stage's network and energy head, at a learning rate of zero."""
    short = (*tiny, *fake_omol25, "num_val=6", "num_workers=0", "steps=2", "warmup_steps=1", "max_atoms=20")
    short = (*short, "element_references=spice")
    launch(repo / "configs" / "train" / "omol25_direct.yaml", *short, "job.run_dir=one")
    first = next((elsewhere / "one").rglob("inference_ckpt.pt"))
    launch(
        repo / "configs" / "train" / "omol25_conserving.yaml",
        "model=from_checkpoint",
        f"checkpoint={first}",
        "backbone=e2former_v2_omol25",
        "backbone.direct_forces=false",
        *short,
        "job.run_dir=two",
        "runner.train_eval_unit.optimizer_fn.lr=0.0",
    )
    before = read_checkpoint(first).ema_state_dict
    after = read_checkpoint(next((elsewhere / "two").rglob("inference_ckpt.pt"))).model_state_dict
    assert any("output_heads.efs.energy" in key for key in after)
    for key, value in after.items():
        torch.testing.assert_close(value, before["module." + key.replace("efs.energy", "energy.energy")])


@pytest.mark.parametrize(("available", "name"), [(True, "CUDA"), (False, "CPU")])
def test_a_gpu_is_used_where_there_is_one(
    available: bool, name: str, repo: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert compose(repo / "configs" / "quickstart.yaml")["job"]["device_type"].name == name


def test_element_references_of_ones_own(repo: Path, elsewhere: Path) -> None:
    (elsewhere / "mine.json").write_text("[0.0, -16.0]")
    config = compose(repo / "configs" / "quickstart.yaml", "element_references=mine.json")
    energy = config["runner"]["train_eval_unit"]["tasks"][0]
    (references,) = energy["element_references"]["element_references"]["_args_"]
    assert references[:2] == [0.0, -16.0]
    assert len(references) == 119
    assert all(math.isnan(value) for value in references[2:])  # not zero: the file does not say


@pytest.mark.parametrize("name", TRAIN)
def test_training_config_has_the_authors_settings(name: str, repo: Path, fake_omol25: Sequence[str]) -> None:
    config = compose(repo / "configs" / "train" / f"{name}.yaml", *fake_omol25)
    unit = config["runner"]["train_eval_unit"]
    energy, forces = unit["tasks"]
    published = {  # docs/network.md, section 15.4, v1.5: lr, decay, w_E, w_F, steps, cutoff, score, direct
        "omol25_direct": (8e-4, 1e-3, 1, 30, 1_400_000, 6.0, "qk_dot", True),
        "omol25_conserving": (4e-4, 0.0, 20, 2, 1_400_000, 4.5, "qk", False),
        "spice_direct": (4e-4, 0.0, 0.2, 0.9, 200_000, 5.0, "qk_dot", True),
    }[name]
    backbone = unit["model"]["backbone"]
    assert published == (
        unit["optimizer_fn"]["lr"],
        unit["optimizer_fn"]["weight_decay"],
        energy["loss_fn"]["coefficient"],
        forces["loss_fn"]["coefficient"],
        config["runner"]["max_steps"],
        backbone["cutoff"],
        backbone["score"],
        backbone["direct_forces"],
    )
    widths = ("sphere_channels", "lmax", "num_layers", "num_heads", "head_dim", "num_radial_basis")
    assert [backbone[k] for k in widths] == [256, 2, 4, 128, 8, 256]
    assert unit["clip_grad_norm"] == 100
    assert backbone["model"] == "e2former_fairchem.backbone.E2FormerV2Backbone"
    assert backbone["max_neighbors"] is None
    assert backbone["attention_norm"] == "smooth"
    data = config["runner"]["train_dataloader"]["dataset"]["dataset_configs"]["omol"]
    assert sorted(data["a2g_args"]["r_data_keys"]) == ["charge", "spin"]
    sampler = config["runner"]["train_dataloader"]["batch_sampler_fn"]
    size = {"omol25_direct": 2048, "omol25_conserving": 1024, "spice_direct": 64}[name]
    assert size in (sampler.get("max_atoms"), sampler.get("num_structures"))
    (references,) = energy["element_references"]["element_references"]["_args_"]
    assert len(references) == 119
    assert references[8] == (0.0 if name == "spice_direct" else pytest.approx(-2047.70253))


def test_published_width_builds_with_the_published_parameters(repo: Path, fake_omol25: Sequence[str]) -> None:
    """All but the embedding tables, which have other lengths here: docs/network.md, section 14.2, `qk_dot`."""
    config = compose(repo / "configs" / "train" / "omol25_direct.yaml", *fake_omol25)
    model = instantiate(config["runner"]["train_eval_unit"]["model"])
    tables = 2 * 300 * 256 + 4 * 2 * 256 * 128 + 2 * 30 * 256  # edge degree, four blocks, charge and multiplicity
    assert sum(p.numel() for n, p in model.named_parameters() if "embedding" not in n) == 25_768_193 - tables
    decayed = {n for n, _ in model.named_parameters()} - set(model.no_weight_decay())
    assert decayed
    assert not [n for n in decayed if "bias" in n or "norm" in n or "embedding" in n]


GROUPS = Path(__file__).parents[2] / "e2former_fairchem" / "configs"


@pytest.mark.parametrize("group", sorted(GROUPS.glob("backbone/*.yaml")), ids=lambda path: path.stem)
def test_backbone_groups_have_only_the_designs_keys(group: Path) -> None:
    with initialize_config_dir(str(GROUPS), version_base=None):
        config = OmegaConf.to_container(hydra.compose(overrides=[f"+backbone={group.stem}"]).backbone)
    assert config.pop("model") == "e2former_fairchem.backbone.E2FormerV2Backbone"
    assert "mmax" not in config  # fairchem would take the network for UMA
    known = set(E2FormerV2Config.__dataclass_fields__) | {
        *("max_neighbors", "otf_graph", "direct_forces", "regress_forces", "regress_stress", "dataset_mapping"),
        "strict_elements",
    }
    assert set(config) == known
    if group.stem == "e2former_v2":  # with which the others begin
        keys = inspect.signature(E2FormerV2Backbone.__init__).parameters
        assert config == {key: keys[key].default for key in config} | {"dataset_mapping": {"omol": "omol"}}
    backbone = E2FormerV2Backbone(**config | {"sphere_channels": 8, "num_heads": 4, "num_layers": 1})
    assert backbone.cutoff == config["cutoff"]


BASELINES = ("baselines/allscaip_quickstart.yaml", "baselines/escn_md_quickstart.yaml")


@pytest.mark.parametrize("name", ["quickstart.yaml", "evaluate/omol25.yaml", *BASELINES])
def test_run_files_compose_from_any_folder(name: str, repo: Path, elsewhere: Path, write_checkpoint: Callable) -> None:
    checkpoint = write_checkpoint(elsewhere / "checkpoint.pt")  # whose tasks become a part of the config
    overrides = [f"checkpoint={checkpoint}"] if "evaluate" in name else []
    config = compose(repo / "configs" / name, *overrides)
    expected = "CUDA" if torch.cuda.is_available() else "CPU"
    assert config["job"]["device_type"].name == expected
    assert Path(config["job"]["run_dir"]).parents[1] == elsewhere
    assert "${" not in str(config)
    assert not list(elsewhere.glob("runs*"))  # composing writes nothing


def test_allscaip_has_all_keys_that_it_is_given(repo: Path) -> None:
    """AllScAIP takes any key and ignores those that it does not know; energies and forces are those of our tasks."""
    overrides = ("backbone.hidden_size=64", "backbone.num_layers=3")  # of benchmarks/training/run.py
    config = compose(repo / "configs" / BASELINES[0], *overrides)["runner"]["train_eval_unit"]["model"]
    model = instantiate(config)
    parts = ("global_cfg", "molecular_graph_cfg", "gnn_cfg", "reg_cfg")
    taken = {key: value for part in parts for key, value in vars(getattr(model.backbone, part)).items()}
    given = {key: value for key, value in config["backbone"].items() if key != "model"}
    assert given == {key: taken.get(key) for key in given}
    atoms = AtomicData.from_ase(molecule("CH4"), task_name="omol")
    output = model(atomicdata_list_to_batch([atoms, atoms]))
    assert output["omol_energy"]["energy"].shape == (2,)
    assert output["omol_forces"]["forces"].shape == (10, 3)


def test_two_processes_on_one_machine(
    repo: Path, fairchem_process: Callable, elsewhere: Path, tiny: Sequence[str]
) -> None:
    """job=local_2gpu starts two ranks that train one model; gloo stands in for NCCL where there are no two GPUs."""
    overrides = ("job=local_2gpu", *tiny, "epochs=1", "batch_size=16")
    result = fairchem_process(repo / "configs" / "quickstart.yaml", *overrides)
    assert result.stdout.count("inference checkpoint:") == 1
    assert "19 steps an epoch" in result.stdout  # 601 structures in batches of 16 on two ranks
    assert (elsewhere / "runs" / "quickstart" / "inference_ckpt.pt").is_file()
    assert result.stdout.count("report: ") == 1
    (run,) = (elsewhere / "runs" / "quickstart").glob("*/report")
    sets = json.loads((run / "summary.json").read_text())
    # 135 structures in two equal shares: one is repeated, as in fairchem's metrics
    assert sum(errors["structures"] for errors in sets.values()) == 136
    (evaluated,) = [r for r in read_metrics(run.parent / "metrics.jsonl") if r["kind"] == "evaluation"]
    for name, errors in sets.items():
        assert errors["force_mae"] == pytest.approx(1000 * evaluated["metrics"][name]["omol_forces,mae"], rel=1e-4)


def test_evaluation_of_other_data_needs_no_training_data(
    repo: Path, elsewhere: Path, fake_omol25: Sequence[str], write_checkpoint: Callable
) -> None:
    write_checkpoint(elsewhere / "checkpoint.pt")
    overrides = ["checkpoint=checkpoint.pt", "dataset=omol25_val", fake_omol25[1]]
    config = compose(repo / "configs" / "evaluate" / "omol25.yaml", *overrides, "num_val=null")
    data = config["runner"]["dataloader"]["dataset"]["dataset_configs"]["omol"]
    assert data["splits"] == {"val": {"src": fake_omol25[1].split("=")[1], "sample_n": None}}
    assert config["runner"]["eval_unit"]["model"]["checkpoint_location"] == str(elsewhere / "checkpoint.pt")


def test_fewer_validation_structures_than_num_val_are_all_used(
    fake_omol25: Sequence[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(fake_omol25[1].split("=")[1], tmp_path / "val")  # it is said once for each data set
    assert at_most("num_val", None, "data_val", folder) is None
    assert at_most("num_val", 4, "data_val", folder) == 4
    assert not caplog.text
    assert at_most("num_val", 20_000, "data_val", folder) == 6
    assert "num_val: 20000 structures asked for, data_val has 6; all of them are used" in caplog.text
    assert at_most("num_val", 20_000, "data_val", [folder, f"{folder}/data.aselmdb"]) == 12


@pytest.mark.parametrize(("every", "epochs", "interval"), [(5, 60, 5), (5, 1, 1), (5, 7, 1), (4, 6, 3), (5, None, 5)])
def test_the_last_epoch_is_evaluated(every: int, epochs: int | None, interval: int) -> None:
    assert evaluation_interval(every, epochs) == interval


def test_slurm_job_is_what_fairchem_sends(
    repo: Path, launch: Callable, elsewhere: Path, fake_omol25: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for sbatch records the script that submitit wrote; the pickled job holds the canonical config."""
    from submitit.core.utils import DelayedSubmission

    tools = elsewhere / "bin"
    tools.mkdir()
    for name, body in {
        "sbatch": 'cp "$1" "$(dirname "$0")/../submitted.sh"; echo "Submitted batch job 4242"',
        "srun": "exit 1",
        "sacct": "exit 1",
        "sinfo": "exit 1",
        "scontrol": "exit 1",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_SUBMIT_HOST", raising=False)
    launch(
        repo / "configs" / "train" / "omol25_direct.yaml",
        *fake_omol25,
        "job=slurm",
        "job.scheduler.num_nodes=4",
        "job.scheduler.slurm.account=chem",
        "job.scheduler.slurm.partition=gpu",
    )
    script = (elsewhere / "submitted.sh").read_text()
    for line in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=8",
        "--mem=480GB",
        "--time=4320",
        "--account=chem",
        "--partition=gpu",
        "--job-name=e2former_v2_omol25_direct",
    ):
        assert f"#SBATCH {line}" in script, script
    (pickled,) = elsewhere.rglob("4242_submitted.pkl")
    job = DelayedSubmission.load(pickled)
    config = job.args[0]
    assert type(job.function).__name__ == "SlurmSPMDProgram"
    assert config.job.device_type.name == "CUDA"
    assert config.runner.train_eval_unit.model.backbone.model == "e2former_fairchem.backbone.E2FormerV2Backbone"
    assert "${" not in OmegaConf.to_yaml(config.runner)


CONFIGS = Path(__file__).parents[2] / "configs"
TRAININGS = ("quickstart.yaml", "train/*.yaml", "baselines/*.yaml")


@pytest.mark.parametrize(
    "path", sorted(p for pattern in TRAININGS for p in CONFIGS.glob(pattern)), ids=lambda p: p.stem
)
def test_checkpoints_have_a_key_of_their_own(path: Path) -> None:
    """No one has to count callbacks."""
    config = yaml.safe_load(path.read_text())
    (found,) = [c for c in config["runner"]["callbacks"] if "checkpoint_every_n_steps" in c]
    assert found["checkpoint_every_n_steps"] == "${e2former.integer:checkpoint_every,${checkpoint_every},1}"
    assert config["checkpoint_every"] > 0


def test_checkpoint_every_reaches_the_callback(repo: Path) -> None:
    callbacks = compose(repo / "configs" / "quickstart.yaml", "checkpoint_every=50")["runner"]["callbacks"]
    assert [c["checkpoint_every_n_steps"] for c in callbacks if "checkpoint_every_n_steps" in c] == [50]


def test_hints_in_comments_hold() -> None:
    """Other data go into another folder; a data set's comment names only keys that its file has, or a group."""
    hints = [line for line in (CONFIGS / "quickstart.yaml").read_text().splitlines() if line.startswith("# ")]
    hints = [line for line in hints if "data_train=" in line or "checkpoint=" in line]
    assert len(hints) == 2 and all("job.run_dir=" in hint for hint in hints)
    for path in (CONFIGS / "dataset").glob("*.yaml"):
        text = path.read_text()
        for key in re.findall(r"(\w+)=", " ".join(re.findall(r"^ *#(.*)$", text, flags=re.MULTILINE))):
            assert key == "dataset" or re.search(rf"^ *{key}:", text, flags=re.MULTILINE), f"{path}: {key}="
