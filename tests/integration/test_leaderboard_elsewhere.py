"""S2EF with another fairchem model, and as a SLURM array with a stand-in for sbatch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from e2former_fairchem.leaderboard.check_submission import check
from e2former_fairchem.training.resolvers import sample


@pytest.fixture(scope="module")
def escn_md(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small eSCN-MD (the architecture of UMA) of random weights, with fairchem's own head."""
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    model = {
        "_target_": "fairchem.core.models.base.HydraModel",
        "backbone": {
            "model": "fairchem.core.models.uma.escn_md.eSCNMDBackbone",
            "max_num_elements": 100,
            "sphere_channels": 8,
            "lmax": 2,
            "mmax": 2,
            "otf_graph": True,
            "max_neighbors": 300,
            "cutoff": 5.0,
            "edge_channels": 8,
            "distance_function": "gaussian",
            "num_distance_basis": 8,
            "direct_forces": False,
            "regress_forces": True,
            "regress_stress": False,
            "num_layers": 1,
            "hidden_channels": 8,
            "norm_type": "rms_norm_sh",
            "act_type": "gate",
            "ff_type": "spectral",
            "chg_spin_emb_type": "rand_emb",
            "cs_emb_grad": True,
            "dataset_mapping": {"omol": "omol"},
        },
        "heads": {"efs": {"module": "fairchem.core.models.uma.escn_md.MLP_EFS_Head", "prefix": "omol"}},
        "pass_through_head_outputs": True,
    }
    unit = "fairchem.core.units.mlip_unit.mlip_unit"
    tasks = [
        {
            "_target_": f"{unit}.Task",
            "name": f"omol_{name}",
            "level": level,
            "property": name,
            "out_spec": {"_target_": f"{unit}.OutputSpec", "dim": dim, "dtype": "float32"},
            "normalizer": {
                "_target_": "fairchem.core.modules.normalization.normalizer.Normalizer",
                "mean": 0.0,
                "rmsd": 1.0,
            },
            "datasets": ["omol"],
        }
        for name, level, dim in (("energy", "system", [1]), ("forces", "atom", [3]))
    ]
    torch.manual_seed(0)
    weights = hydra.utils.instantiate(model).state_dict()
    path = tmp_path_factory.mktemp("escn_md") / "inference_ckpt.pt"
    checkpoint = MLIPInferenceCheckpoint(
        model_config=OmegaConf.create(model),
        model_state_dict=weights,
        ema_state_dict={"n_averaged": torch.tensor(1), **{f"module.{k}": v for k, v in weights.items()}},
        tasks_config=[OmegaConf.create(task) for task in tasks],
    )
    torch.save(checkpoint, path)
    return path


def test_slurm_array_of_another_model(
    repo: Path, launch: Callable, escn_md: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit writes an array of three; its tasks, run one by one, end with the file for the upload."""
    from submitit.core.utils import DelayedSubmission

    tools = elsewhere / "bin"
    tools.mkdir()
    for name, body in {
        "sbatch": 'cp "$1" "$(dirname "$0")/../submitted.sh"; echo "Submitted batch job 4242"',
        **dict.fromkeys(("srun", "sacct", "sinfo", "scontrol"), "exit 1"),
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_SUBMIT_HOST", raising=False)
    launch(
        repo / "configs" / "leaderboard" / "s2ef.yaml",
        f"checkpoint={escn_md}",
        f"data={sample('val_new')}",
        "num_workers=0",
        "job=slurm",
        "job.device_type=CPU",
        "job.scheduler.num_array_jobs=3",
        "job.run_dir=out",
    )
    assert "#SBATCH --array=0-2%3" in (elsewhere / "submitted.sh").read_text()
    pickled = sorted(elsewhere.rglob("*_submitted.pkl"))
    assert len(pickled) == 3  # no fourth that waits for all others to end well

    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    result = elsewhere / "out" / "s2ef_predictions.npz"
    for path in pickled:
        assert not result.exists()
        job = DelayedSubmission.load(path)
        job.function(*job.args)
    report = check(result, "s2ef", Path(sample("val_new")))
    assert not report.problems, str(report)

    from fairchem.core import FAIRChemCalculator
    from fairchem.core.datasets.ase_datasets import AseDBDataset

    calculator = FAIRChemCalculator.from_model_checkpoint(
        str(escn_md), task_name="omol", device="cpu", inference_settings="batch"
    )
    with np.load(result) as arrays:
        ends = np.cumsum(arrays["natoms"])
        for i in (0, 17, 40):
            atoms = AseDBDataset({"src": sample("val_new")}).get_atoms(i)
            assert atoms.info["source"] == arrays["ids"][i]
            atoms.calc = calculator
            assert atoms.get_potential_energy() == pytest.approx(arrays["energy"][i], abs=1e-3)
            np.testing.assert_allclose(atoms.get_forces(), arrays["forces"][ends[i] - len(atoms) : ends[i]], atol=1e-4)
