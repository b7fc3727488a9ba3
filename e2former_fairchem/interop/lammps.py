"""LAMMPS with forces from any fairchem model: fairchem-lammps, which stops where the model refuses.

fairchem-lammps answers LAMMPS in a callback, and an exception in a callback is printed and forgotten: the simulation
goes on with the forces of the step before, and ends with status 0. Nor does it look at the units. `run_lammps` is its
`run_lammps_with_fairchem` without these two.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit

if TYPE_CHECKING:
    from lammps import lammps

UNITS = "metal"
#: Commands that ask for forces.
_RUNS = ("run", "minimize", "rerun")


class _Guarded:
    """A callback whose first exception stops LAMMPS; the forces of that step are not-a-number."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.failure: BaseException | None = None

    def __call__(self, lmp: lammps, step: int, nlocal: int, tag: np.ndarray, x: np.ndarray, f: np.ndarray) -> None:
        if self.failure is None:
            try:
                self.callback(lmp, step, nlocal, tag, x, f)
                return
            except BaseException as err:  # Ctrl-C, too: it arrives in here
                err.add_note(f"LAMMPS was stopped at step {step}")
                self.failure = err
        f[:] = np.nan
        lmp.force_timeout()


def _load_mpi() -> None:
    """LAMMPS' wheel needs MPICH's library: the system's, or that of the wheel `mpich`."""
    library = Path(sys.prefix, "lib", "libmpi.so.12")
    if library.is_file():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def run_lammps(
    predictor: MLIPPredictUnit, lammps_input_path: str | Path, task_name: str, charge: int = 0, spin: int = 0
) -> lammps:
    """Run a LAMMPS script with the forces of a model.

    Args:
        predictor: fairchem's predict unit.
        lammps_input_path: the script, with `units metal`, atoms, masses and no force field. Before its first `run` or
            `minimize` the model is put in, as the fix `ext_fc`.
        task_name: data set of the checkpoint whose tasks are predicted.
        charge: total charge.
        spin: multiplicity 2S+1; 0 is fairchem's "not given".

    Returns:
        LAMMPS after the run; `del lmp._predictor` lets the model go.

    Raises:
        ValueError: other units, several MPI processes, or a script that never asks for forces.
        BaseException: whatever the model raised; LAMMPS has stopped at that step.
    """
    from fairchem.lammps.lammps_fc import FIX_EXT_ID, FIX_EXTERNAL_CMD, FixExternalCallback, check_input_script
    from lammps import lammps

    text = Path(lammps_input_path).read_text()
    check_input_script(text)
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.split()[:1] and line.split()[0] in _RUNS), None)
    if first is None:
        raise ValueError(f"{lammps_input_path}: expected a line with one of {', '.join(_RUNS)}, got none")
    _load_mpi()
    lmp = lammps(name=os.environ.get("LAMMPS_MACHINE_NAME"), cmdargs=["-nocite", "-log", "none", "-echo", "screen"])
    try:
        if (processes := lmp.extract_setting("world_size")) != 1:
            raise ValueError(f"expected one MPI process, got {processes}: the model would see the atoms of each alone")
        lmp._predictor, lmp._task_name = predictor, task_name
        lmp.commands_list(lines[:first])
        if (units := lmp.extract_global("units")) != UNITS:
            raise ValueError(f"{lammps_input_path}: expected units {UNITS} (eV, Å, ps), got units {units}")
        guarded = _Guarded(FixExternalCallback(charge=charge, spin=spin))
        lmp.command(FIX_EXTERNAL_CMD)
        lmp.set_fix_external_callback(FIX_EXT_ID, guarded, lmp)
        try:
            lmp.commands_list(lines[first:])
        finally:
            if guarded.failure is not None:
                raise guarded.failure
    except BaseException:
        lmp.close()
        raise
    return lmp
