"""nvalchemi-toolkit's integrators, with atoms and noise on the GPU (`pip install "e2former-fairchem[md]"`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ase import Atoms
from nvalchemi.data import AtomicData, Batch
from nvalchemi.dynamics.base import BaseDynamics
from nvalchemi.dynamics.integrators.npt import NPT
from nvalchemi.dynamics.integrators.nve import NVE
from nvalchemi.dynamics.integrators.nvt_langevin import NVTLangevin
from nvalchemi.models.base import BaseModelMixin, ModelConfig
from torch import Tensor, nn

from e2former_fairchem.compat import integrator_state
from e2former_fairchem.leaderboard.predictor import Predictor
from e2former_fairchem.md.engine import LARGEST_MOVE, BlownUp, blown_up, with_results
from e2former_fairchem.md.settings import BAR, Settings

__all__ = ["FairchemModel", "NvalchemiEngine"]


class FairchemModel(nn.Module, BaseModelMixin):
    """Any fairchem checkpoint as a model of nvalchemi's: energy, forces and, where there is one, stress.

    Neighbours are the backbone's own affair. Batches have positions, atomic numbers, charge and spin, and for
    crystals cell and pbc. Results come in float64.

    Args:
        predictor: a loaded checkpoint.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self._predictor = predictor
        outputs = {"energy", "forces", "stress"} & set(predictor.calculator.implemented_properties)
        # Derivatives are taken within: nothing of the batch needs a gradient.
        self.model_config = ModelConfig(
            outputs=frozenset(outputs), optional_inputs=frozenset({"charge", "spin", "cell", "pbc"}), supports_pbc=True
        )
        self._data: Any = None

    @property
    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """None are given out."""
        return {}

    def compute_embeddings(self, data: AtomicData | Batch, **_: Any) -> AtomicData | Batch:
        """None are given out."""
        raise NotImplementedError("embeddings: expected to be asked of fairchem's model itself")

    def adapt_input(self, data: AtomicData | Batch, **_: Any) -> Any:
        """fairchem's batch of the same tensors.

        One is kept and filled at every call: its constructor waits for the device three times.
        """
        if isinstance(data, AtomicData):
            data = Batch.from_data_list([data])
        systems, pos = data.num_graphs, data.positions.detach()
        if self._data is None or (self._data.pos.shape[0], self._data.natoms.shape[0]) != (pos.shape[0], systems):
            self._data = self._first(data)
        dtype = self._predictor.unit.inference_settings.base_precision_dtype
        found = self._data
        found["pos"] = pos.to(dtype)
        found["atomic_numbers"] = data.atomic_numbers.long()
        found["batch"] = data.batch_idx.long()
        found["natoms"] = data.num_nodes_per_graph.long()
        for key, shape, kind in (
            ("cell", (3, 3), dtype),
            ("pbc", (3,), torch.bool),
            ("charge", (), torch.long),
            ("spin", (), torch.long),
        ):
            value = getattr(data, key, None)
            if value is None and key in ("charge", "spin"):
                raise ValueError(f"{key}: expected one number for each structure of the batch, got none")
            value = pos.new_zeros(systems, *shape) if value is None else value.reshape(systems, *shape)
            found[key] = value.to(kind)
        return found

    def _first(self, data: Batch) -> Any:
        """fairchem's batch of as many atoms and systems, whose contents do not matter."""
        from fairchem.core.datasets.atomic_data import atomicdata_list_to_batch

        sizes = data.num_nodes_per_graph.tolist()
        atoms = [Atoms("H" * n, np.arange(3 * n).reshape(n, 3), info={"charge": 0, "spin": 1}) for n in sizes]
        found = atomicdata_list_to_batch([self._predictor.calculator.a2g(one) for one in atoms])
        return found.to(data.positions.device)

    def forward(self, data: AtomicData | Batch, **_: Any) -> dict[str, Tensor]:
        """Energy [B, 1] eV, forces [N, 3] eV/Å and stress [B, 3, 3] eV/Å³, whose trace is positive under tension."""
        unit, batch = self._predictor.unit, self.adapt_input(data)
        # fairchem merges experts and compiles on the host, at the first call.
        output = unit.predict(batch if unit.lazy_model_intialized else batch.clone().cpu())
        shapes = {"energy": (-1, 1), "forces": (-1, 3), "stress": (-1, 3, 3)}
        return {key: output[key].detach().double().reshape(shapes[key]) for key in sorted(self.output_data())}


def _nve(model: FairchemModel, settings: Settings, seed: int) -> BaseDynamics:
    return NVE(model, dt=settings.timestep)


def _nvt(model: FairchemModel, settings: Settings, seed: int) -> BaseDynamics:
    return NVTLangevin(
        model,
        dt=settings.timestep,
        temperature=settings.temperature,
        friction=1 / settings.thermostat_time,
        random_seed=seed,
    )


def _npt(model: FairchemModel, settings: Settings, seed: int) -> BaseDynamics:
    return NPT(
        model,
        dt=settings.timestep,
        temperature=settings.temperature,
        pressure=settings.pressure * BAR,
        barostat_time=settings.barostat_time,
        thermostat_time=settings.thermostat_time,
    )


_INTEGRATORS: dict[str, Callable[[FairchemModel, Settings, int], BaseDynamics]] = {
    "nve": _nve,
    "nvt": _nvt,
    "npt": _npt,
}
#: What a step changes; the rest of a batch is that of the structure.
_MOVING = ("positions", "velocities", "cell", "energy", "forces", "stress")


class NvalchemiEngine:
    """nvalchemi's integrators and a checkpoint; see `engine.Engine`.

    Positions and velocities are float64, whatever the model computes in. `nvt` takes the motion of the centre of mass,
    which the noise brings, away after each step. Once for each call of `advance` the host reads whether an atom left.

    Args:
        atoms: with momenta.
        predictor: the checkpoint.
        settings: what is simulated.
    """

    name = "nvalchemi"

    def __init__(self, atoms: Atoms, predictor: Predictor, settings: Settings) -> None:
        self.settings = settings
        self.steps = 0
        self._atoms = atoms.copy()
        self._symbols = atoms.get_chemical_symbols()
        device = torch.device(predictor.unit.device)
        model = FairchemModel(predictor)
        self._stress = "stress" in model.model_config.outputs and bool(atoms.pbc.all())
        # The integrator adds the number of the step to its seed: those of two runs must be far apart.
        seed = int(np.random.default_rng([settings.seed, 1]).integers(2**30))
        self._dynamics = _INTEGRATORS[settings.ensemble](model, settings, seed)
        self._batch = Batch.from_data_list([_data(atoms)], device=device)
        integrator_state(self._dynamics, self._batch)
        self._fresh = False
        #: Of the first step that threw atoms out: step, atom that moved most, its move and force, number of atoms.
        self._lost = torch.zeros(5, dtype=torch.float64, device=device)

    def _begin(self) -> None:
        """Forces where there are none yet."""
        if not self._fresh:
            self._dynamics.compute(self._batch)
            self._fresh = True

    def advance(self, steps: int) -> None:
        """Do some steps; see `engine.Engine`."""
        self._begin()
        batch = self._batch
        for _ in range(steps):
            before = batch.positions.clone()
            self._dynamics.step_count = self.steps
            try:
                self._dynamics.step(batch)
            except Exception as err:
                self._watch(before, None)
                self._check()
                err.add_note(f"in step {self.steps + 1} ({(self.steps + 1) * self.settings.timestep / 1000:g} ps)")
                raise
            self._watch(before, batch.forces)
            if self.settings.ensemble == "nvt":
                masses = batch.atomic_masses[:, None]
                batch.velocities.sub_((masses * batch.velocities).sum(0) / masses.sum())
            self.steps += 1
        self._check()

    def _watch(self, before: Tensor, forces: Tensor | None) -> None:
        """Note on the device the first step after which an atom is too far away or has a force that is not finite."""
        move = (self._batch.positions.detach() - before).norm(dim=1)
        force = torch.zeros_like(move) if forces is None else forces.norm(dim=1)
        wrong = ~((move <= LARGEST_MOVE) & force.isfinite())
        atom = torch.where(wrong, move.nan_to_num(torch.inf), -1.0).argmax()
        now = torch.stack(
            [wrong.new_full((), self.steps + 1, dtype=move.dtype), atom, move[atom], force[atom], wrong.sum()]
        )
        self._lost = torch.where((self._lost[4] == 0) & wrong.any(), now, self._lost)

    def _check(self) -> None:
        step, atom, move, force, number = self._lost.tolist()
        if number:
            time = step * self.settings.timestep / 1000
            raise BlownUp(blown_up(int(step), time, int(atom), self._symbols[int(atom)], move, force, int(number)))

    def frame(self) -> Atoms:
        """The atoms now; see `engine.Engine`."""
        self._begin()
        now = {key: getattr(self._batch, key).detach().cpu().numpy() for key in _MOVING}
        atoms = self._atoms
        atoms.set_cell(now["cell"][0])
        atoms.set_positions(now["positions"])
        atoms.set_velocities(now["velocities"])
        stress = now["stress"][0][(0, 1, 2, 1, 0, 0), (0, 1, 2, 2, 2, 1)] if self._stress else None
        return with_results(atoms, float(now["energy"][0, 0]), now["forces"], stress)

    def _memory(self) -> dict[str, Tensor]:
        """The tensors that the next step depends on, by name."""
        found = {key: getattr(self._batch, key) for key in _MOVING}
        return found | {f"integrator.{key}": value for key, value in integrator_state(self._dynamics, self._batch)}

    def state(self) -> dict[str, np.ndarray]:
        """All that the next step depends on; the noise depends on the seed and the number of the step."""
        self._begin()
        return {key: value.detach().cpu().numpy() for key, value in self._memory().items()}

    def restore(self, steps: int, state: dict[str, np.ndarray]) -> None:
        """Go on where `state` was taken; see `engine.Engine`."""
        self.steps = steps
        for key, value in self._memory().items():
            value.copy_(torch.from_numpy(state[key]))
        self._fresh = True


def _data(atoms: Atoms) -> AtomicData:
    """A structure with room for results, in float64."""
    count = len(atoms)
    real = {
        "positions": atoms.positions,
        "atomic_masses": atoms.get_masses(),
        "velocities": atoms.get_velocities(),
        "forces": np.zeros((count, 3)),
        "energy": np.zeros((1, 1)),
        "stress": np.zeros((1, 3, 3)),
        "cell": np.array(atoms.cell)[None],
        "charge": np.full((1, 1), atoms.info["charge"]),
        "spin": np.full((1, 1), atoms.info["spin"]),
    }
    return AtomicData(
        atomic_numbers=torch.tensor(atoms.numbers, dtype=torch.long),
        pbc=torch.tensor(atoms.pbc)[None],
        **{key: torch.tensor(value, dtype=torch.float64) for key, value in real.items()},
    )
