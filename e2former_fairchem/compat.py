"""fairchem-core's private names that this package uses, all in one place: another version may change them unannounced.

Each stands in `PRIVATE_NAMES` with the reason and with what breaks when it is gone; a test holds them to that.
Everything else imports them from here. Torch's are in `e2former_kernels.compat`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fairchem.core.components.train.train_runner import TrainEvalRunner
from fairchem.core.datasets.mt_concat_dataset import ConcatDataset
from fairchem.core.modules.loss import DDPMTLoss
from omegaconf import DictConfig
from torch import Tensor

from e2former_kernels import compat as kernels
from e2former_kernels.compat import PrivateName

__all__ = [
    "PRIVATE_NAMES",
    "TESTED_FAIRCHEM",
    "CalculateRunner",  # noqa: F822  (see __getattr__)
    "LossWithReduction",
    "compose",
    "dataset_and_row",
    "fairchem_main",
    "fairchem_state",
    "integrator_state",
    "set_runner_callbacks",
    "slurm_timeout_hours",
]

#: The version that the tests have run with; pyproject.toml lets in its patch releases.
TESTED_FAIRCHEM = "2.24"

PRIVATE_NAMES = (
    PrivateName(
        "fairchem.core.components.train.train_runner:TrainEvalRunner._set_runner_callbacks",
        "hands a run's save and load functions to its callbacks; `TrainEvalRunner.run` calls it, and has no option for "
        "the epochs between evaluations, so that ours takes its place",
        "checkpoints of every training run (training/runner.py)",
        ("self", "callbacks"),
    ),
    PrivateName(
        "fairchem.core.components.train.train_runner:TrainEvalRunner._get_slurm_timeout_hr",
        "the job's time limit, for `stop_before_timeout_min`",
        "training runs that stop before their time limit (training/runner.py)",
        ("self",),
    ),
    PrivateName(
        "fairchem.core.launchers.slurm_launch:SlurmSPMDProgram._register_signal_handlers",
        "the handlers it sets up end a run with status 0; ours, which take their place, know them by this class's name",
        "checkpoint and exit status of a run that a signal stops (training/signals.py)",
        ("self",),
    ),
    PrivateName(
        "fairchem.core.modules.loss:DDPMTLoss._reduction",
        "overridden: the reductions are a fixed list, without the sum over a system's atoms",
        "the authors' force loss, which would be the plain sum in silence (training/losses.py)",
        ("self", "input", "mult_mask", "loss", "natoms"),
    ),
    PrivateName(
        "fairchem.core.modules.loss:DDPMTLoss._ddp_mean",
        "the mean over the samples of all ranks, with graph parallelism's factor",
        "the authors' force loss (training/losses.py)",
        ("self", "num_samples", "loss"),
    ),
    PrivateName(
        "fairchem.core.datasets.mt_concat_dataset:ConcatDataset._get_dataset_and_sample_index",
        "which data set an index of the concatenated ones belongs to; the row's place names a structure",
        "names of the worst structures in reports, which would be bare numbers (report/collect.py)",
        ("self", "idx"),
    ),
    PrivateName(
        "fairchem.core.components.calculate._calculate_runner:CalculateRunner",
        "base class of fairchem's calculating runners, which `fairchem.core.components.calculate` does not export",
        "phonons and elasticity (runners/crystals.py)",
    ),
    PrivateName(
        "fairchem.core._cli:main",
        "the `fairchem` command, run by `e2former-fairchem train` and `run`, tests and benchmarks",
        "launch.py, tests and benchmarks/quickstart",
        ("args", "override_args"),
    ),
    PrivateName(
        "fairchem.core._cli:get_hydra_config_from_yaml",
        "composes a config as the `fairchem` command does, without running it",
        "own_data/train.py and tests of configs",
        ("config_yml", "overrides_args"),
    ),
)


def fairchem_state() -> Mapping[str, Any]:
    """What is installed, whether the tests have run with it, and the private names that are missing.

    Keys: `installed` (None where it is not), `tested` (a version's first two numbers), `is_tested`, `missing` (private
    names of fairchem and torch with what breaks without them).
    """
    try:
        installed = version("fairchem-core")
    except PackageNotFoundError:
        installed = None
    gone = kernels.missing()
    for name in PRIVATE_NAMES:
        try:
            name.get()
        except ModuleNotFoundError:  # a package that fairchem itself lacks here
            continue
        except ImportError:
            gone.append(name)
    return {
        "installed": installed,
        "tested": TESTED_FAIRCHEM,
        "is_tested": installed is not None and installed.split(".")[:2] == TESTED_FAIRCHEM.split("."),
        "missing": {name.path: name.breaks for name in gone},
    }


def set_runner_callbacks(runner: TrainEvalRunner) -> None:
    """Tell a runner's callbacks how to save and load its state, as `TrainEvalRunner.run` does first of all."""
    runner._set_runner_callbacks(runner.callbacks)


def slurm_timeout_hours(runner: TrainEvalRunner) -> float:
    """The time limit of a runner's job; ValueError where the job has none."""
    return runner._get_slurm_timeout_hr()


def fairchem_main(config: str | Path, overrides: Sequence[str] = ()) -> None:
    """`fairchem -c CONFIG OVERRIDES` in this process."""
    from fairchem.core import _cli  # sets up logging

    _cli.main(argparse.Namespace(config=str(config)), list(overrides))


def compose(config: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """What `fairchem -c CONFIG OVERRIDES` would run."""
    from fairchem.core import _cli

    return _cli.get_hydra_config_from_yaml(str(config), list(overrides))


def dataset_and_row(dataset: ConcatDataset, index: int) -> tuple[int, int]:
    """Number of the part of a concatenated data set that an index belongs to, and the row in that part."""
    return dataset._get_dataset_and_sample_index(index)


class LossWithReduction(DDPMTLoss):
    """fairchem's masked loss with a reduction of one's own: `reduce`."""

    def _reduction(self, input: Tensor, mult_mask: Tensor, loss: Tensor, natoms: Tensor) -> Tensor:
        return self.reduce(loss, natoms)

    def reduce(self, loss: Tensor, natoms: Tensor) -> Tensor:
        """The loss of a batch, [].

        Args:
            loss: of each atom or system, with zeros where masked.
            natoms: [B].
        """
        raise NotImplementedError

    def mean_over_ranks(self, number: int, total: Tensor) -> Tensor:
        """The sum of `total` over ranks by that of `number`, scaled as data-parallel training needs it."""
        return self._ddp_mean(number, total)


def __getattr__(name: str) -> Any:
    if name == "CalculateRunner":  # its package imports all of fairchem's calculations
        return next(p for p in PRIVATE_NAMES if p.path.endswith(":CalculateRunner")).get()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def integrator_state(dynamics: Any, batch: Any) -> Any:
    """State of an integrator of nvalchemi-toolkit 0.2 (extra ``md``), made where there is none yet.

    Exact restarts need it (md/nvalchemi_engine.py), and the toolkit has no public name for it. Not among
    `PRIVATE_NAMES`, which are of packages that are always there; tests/integration/test_md.py breaks without it.
    """
    dynamics._ensure_state_initialized(batch)
    return dynamics._state
