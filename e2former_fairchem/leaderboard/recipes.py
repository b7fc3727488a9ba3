"""fairchem's recipes of the seven tasks, with a clear message where their own requirements are missing."""

from __future__ import annotations

try:
    from fairchem.core.components.benchmark import OMolReducer
    from fairchem.core.components.calculate.recipes.omol import EVAL_OPT_PARAMETERS, relax_job, single_point_job
    from fairchem.data.omol.modules import evaluator
    from pymatgen.io.ase import MSONAtoms
except ImportError as err:
    raise ImportError(
        f"the leaderboard's evaluation tasks need more packages than fairchem-core ({err}); install them with: "
        f'pip install "e2former-fairchem[leaderboard]"'
    ) from err

__all__ = ["EVAL_OPT_PARAMETERS", "MSONAtoms", "OMolReducer", "evaluator", "relax_job", "single_point_job"]
