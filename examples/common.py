"""What the examples share: the checkpoint on the command line, and a calculator."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fairchem.core.calculate.ase_calculator import FAIRChemCalculator
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit

from e2former_fairchem import pretrained
from e2former_fairchem.training.checkpoint import check_checkpoint_path


def arguments(description: str, several: bool = False, **integers: int) -> argparse.Namespace:
    """The command line: a checkpoint or its name (gfn2-small where none is given), or several, and counts."""
    logging.disable(logging.WARNING)  # fairchem tells its settings; an example's output is numbers
    parser = argparse.ArgumentParser(description=description)
    if several:
        parser.add_argument("checkpoints", nargs="+", metavar="checkpoint", help="inference checkpoint")
    else:
        parser.add_argument(
            "checkpoint", nargs="?", default=pretrained("gfn2-small"), help="inference checkpoint (default: gfn2-small)"
        )
    for name, default in integers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default: {default}")
    args = parser.parse_args()
    try:
        if several:
            args.checkpoints = [str(check_checkpoint_path(checkpoint)) for checkpoint in args.checkpoints]
        else:
            args.checkpoint = str(check_checkpoint_path(args.checkpoint))
    except (FileNotFoundError, ValueError) as err:
        parser.error(str(err))
    return args


def run(main: Callable[[], None]) -> None:
    """Call an example's function. A mistake in what it is given, or a package that is missing, ends in one line."""
    try:
        main()
    except (ImportError, OSError, ValueError) as err:
        sys.exit(f"{Path(sys.argv[0]).name}: {err}")


def new_folder(name: str) -> Path:
    """The folder of this name, or with the first number behind it that is free: results of earlier runs stay."""
    names = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
    return next(folder for folder in map(Path, names) if not folder.exists())


def predict_unit(checkpoint: str, dtype: torch.dtype = torch.float32, **settings) -> MLIPPredictUnit:
    """fairchem's predict unit on the GPU where there is one.

    dtype: float64 for Hessians and finite differences. settings: fairchem's InferenceSettings; compile=True pays off
    in long simulations on a GPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = InferenceSettings(activation_checkpointing=False, base_precision_dtype=dtype, **settings)
    return MLIPPredictUnit(checkpoint, device, inference_settings=options)


def calculator(checkpoint: str, dtype: torch.dtype = torch.float32, **settings) -> FAIRChemCalculator:
    """ASE calculator; `FAIRChemCalculator.from_model_checkpoint(path, task_name="omol")` is the short way to one."""
    return FAIRChemCalculator(predict_unit(checkpoint, dtype, **settings), task_name="omol")
