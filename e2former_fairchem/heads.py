"""Heads on E2Former-V2's node features: energy, direct forces, and derivatives of the energy by autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import conditional_grad
from fairchem.core.models.base import HeadInterface
from fairchem.core.models.uma.outputs import compute_hessian_loop
from torch import Tensor, nn

from e2former_fairchem.inference_mode import outside_inference_mode
from e2former_fairchem.nn.readouts import EnergyMLP, LinearForce, PaiNNForce
from e2former_fairchem.parallel import OWN_ATOMS, all_atoms, sum_over_workers
from e2former_fairchem.segments import segment_sum
from e2former_fairchem.validation import check_keys

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings

    from e2former_fairchem.backbone import E2FormerV2Backbone

__all__ = ["E2FormerV2DirectForceHead", "E2FormerV2EnergyHead", "E2FormerV2GradientHead"]

_FORCE_HEADS = {"linear": LinearForce, "painn": PaiNNForce}


class _Head(nn.Module, HeadInterface):
    """What the heads share: names of outputs and their wrapping, as fairchem's heads have them.

    capturable: ``forward`` of a training step looks at no value, so that the step may be captured in a CUDA graph
    (`e2former_fairchem.training.replay`); a head without it trains eagerly.
    """

    capturable: ClassVar[bool] = False

    def __init__(self, backbone: E2FormerV2Backbone, prefix: str | None, wrap_property: bool) -> None:
        super().__init__()
        self.prefix = prefix
        self.wrap_property = wrap_property
        self.regress_config = backbone.regress_config

    def _key(self, name: str) -> str:
        return f"{self.prefix}_{name}" if self.prefix else name

    def _wrap(self, **values: Tensor) -> dict[str, Any]:
        """One entry per property; per-atom energies ride with the energy where properties are wrapped."""
        atom_energy = values.pop("atom_energy", None)
        if not self.wrap_property:
            return {self._key(name): value for name, value in values.items()}
        outputs = {self._key(name): {name: value} for name, value in values.items()}
        if atom_energy is not None:
            outputs[self._key("energy")]["atom_energy"] = atom_energy
        return outputs


@registry.register_model("e2former_v2_energy_head")
class E2FormerV2EnergyHead(_Head):
    """Energy of each structure as a sum of atomic energies (docs/network.md, section 9.1); no derivatives.

    ``forward`` returns ``{"energy": {"energy": [B] float64, "atom_energy": [N]}}`` (eV, in the units of the training
    target), or ``{"energy": [B]}`` unwrapped. The sum over atoms is taken in float64, in the order of the atoms.

    Args:
        prefix: outputs are called ``{prefix}_energy`` instead of ``energy``.
        wrap_property: wrap the tensors as fairchem's trainer expects them.
    """

    capturable: ClassVar[bool] = True

    def __init__(
        self, backbone: E2FormerV2Backbone, prefix: str | None = None, wrap_property: bool = True, **unknown: Any
    ) -> None:
        check_keys("e2former_v2_energy_head", unknown, E2FormerV2EnergyHead.__init__)
        super().__init__(backbone, prefix, wrap_property)
        self.energy = EnergyMLP(backbone.sphere_channels)

    def forward(self, data: AtomicData, emb: dict[str, Tensor]) -> dict[str, Any]:
        """Energies of a batch; see the class."""
        atom_energy, energy = _energies(self.energy, data, emb)
        return self._wrap(energy=energy, atom_energy=atom_energy)

    def prepare_for_inference(self, data: AtomicData, settings: InferenceSettings) -> E2FormerV2EnergyHead:
        """Refuse derivatives that this head does not compute.

        Raises:
            ValueError: the settings ask for some.
        """
        for kind in ("forces", "stress", "hessian"):
            wanted = getattr(settings, f"predict_untrained_{kind}")
            if wanted:
                raise ValueError(
                    f"predict_untrained_{kind}: expected an empty set, because e2former_v2_energy_head computes no "
                    f"derivatives, got {sorted(wanted)}; use e2former_v2_gradient_head"
                )
        return self


@registry.register_model("e2former_v2_direct_force_head")
class E2FormerV2DirectForceHead(_Head):
    """Forces read off the vector features, not derived from an energy (docs/network.md, section 9.3).

    ``forward`` returns ``{"forces": {"forces": [N, 3]}}``, eV/Å.

    Args:
        kind: ``linear`` or ``painn`` (two gated equivariant blocks).
        prefix: as for the energy head.
        wrap_property: as for the energy head.

    Raises:
        ValueError: the backbone is set up for conserving forces.
    """

    capturable: ClassVar[bool] = True

    def __init__(
        self,
        backbone: E2FormerV2Backbone,
        kind: str = "linear",
        prefix: str | None = None,
        wrap_property: bool = True,
        **unknown: Any,
    ) -> None:
        check_keys("e2former_v2_direct_force_head", unknown, E2FormerV2DirectForceHead.__init__)
        if kind not in _FORCE_HEADS:
            raise ValueError(f"kind: expected one of {sorted(_FORCE_HEADS)}, got {kind!r}")
        if not backbone.regress_config.direct_forces:
            raise ValueError(
                "direct_forces: expected true in the backbone of e2former_v2_direct_force_head, got false; use "
                "e2former_v2_gradient_head for conserving forces"
            )
        super().__init__(backbone, prefix, wrap_property)
        self.force = _FORCE_HEADS[kind](backbone.sphere_channels)

    def forward(self, data: AtomicData, emb: dict[str, Tensor]) -> dict[str, Any]:
        """Forces of a batch; see the class."""
        forces = self.force(_features(self.force, emb))
        return self._wrap(forces=all_atoms(forces, emb, data) if OWN_ATOMS in emb else forces)


@registry.register_model("e2former_v2_gradient_head")
class E2FormerV2GradientHead(_Head):
    """Energy and its derivatives by autograd: conserving forces, stress and Hessian.

    What is returned follows the backbone's ``regress_config``, which fairchem extends when it is asked for untrained
    properties: ``energy`` [B] float64 (with ``atom_energy`` [N]), ``forces`` [N, 3] = -dE/dr in eV/Å, ``stress`` [B, 9]
    = dE/dstrain / volume in eV/Å^3 (fairchem's convention: symmetric strain of positions and cell; structures without
    a periodic direction have no volume and zero stress), ``hessian`` [1, 3N, 3N] = d2E/dr2 in eV/Å^2 of a batch of one.

    Args:
        prefix: as for the energy head.
        wrap_property: as for the energy head.

    Raises:
        ValueError: the backbone is set up for direct forces; a Hessian of several structures at once, or a vmapped one.
    """

    capturable: ClassVar[bool] = True

    def __init__(
        self, backbone: E2FormerV2Backbone, prefix: str | None = None, wrap_property: bool = True, **unknown: Any
    ) -> None:
        check_keys("e2former_v2_gradient_head", unknown, E2FormerV2GradientHead.__init__)
        if backbone.regress_config.direct_forces:
            raise ValueError(
                "direct_forces: expected false in the backbone of e2former_v2_gradient_head, got true; use "
                "e2former_v2_energy_head and e2former_v2_direct_force_head"
            )
        super().__init__(backbone, prefix, wrap_property)
        self.energy = EnergyMLP(backbone.sphere_channels)

    @outside_inference_mode
    @conditional_grad(torch.enable_grad())
    def forward(self, data: AtomicData, emb: dict[str, Tensor]) -> dict[str, Any]:
        """Energies and derivatives of a batch; see the class."""
        regress = self.regress_config
        if regress.hessian:
            self._check_hessian(data)
        atom_energy, energy = _energies(self.energy, data, emb)
        outputs = {"energy": energy, "atom_energy": atom_energy}
        if regress.forces or regress.stress:
            create_graph = self.training or regress.hessian
            outputs |= _forces_and_stress(data, energy, create_graph, regress.stress, OWN_ATOMS in emb)
        if regress.hessian:
            hessian = compute_hessian_loop(outputs["forces"].flatten(), data["pos"], create_graph=self.training)
            outputs["hessian"] = (sum_over_workers(hessian) if OWN_ATOMS in emb else hessian).unsqueeze(0)
        return self._wrap(**outputs)

    def _check_hessian(self, data: AtomicData) -> None:
        if self.regress_config.hessian_vmap:
            raise ValueError(
                "hessian_vmap: expected false, because the attention's derivatives have no vmap rule, got true"
            )
        if not self.regress_config.forces:
            raise ValueError("regress_forces: expected true for a Hessian, got false")
        if data["natoms"].numel() != 1:
            raise ValueError(f"hessian: expected a batch of 1 structure, got {data['natoms'].numel()}")


def _features(module: nn.Module, emb: dict[str, Tensor]) -> Tensor:
    """Node features in the module's dtype: under autocast the trunk may hand over bfloat16."""
    return emb["node_embedding"].to(next(module.parameters()).dtype)


def _energies(module: EnergyMLP, data: AtomicData, emb: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Energies of all atoms, and their sums.

    With graph parallelism they are gathered first, so that the order, and with it the rounding, is that of one worker.
    """
    atom_energy = module(_features(module, emb))
    if OWN_ATOMS in emb:
        atom_energy = all_atoms(atom_energy, emb, data)
    return atom_energy, _per_structure(atom_energy, data["batch_full"], data["natoms"])


# fairchem found float64 sums miscompiled; the sum is a few microseconds of work and stays outside.
@torch.compiler.disable
def _per_structure(values: Tensor, batch: Tensor, natoms: Tensor) -> Tensor:
    """Sum over the atoms of each structure in float64, in order: [N, ...] -> [B, ...]."""
    if natoms.shape[0] == 1:
        return values.double().sum(0, keepdim=True)  # what segment_sum comes down to
    pointer = torch.cat([natoms.new_zeros(1), natoms.cumsum(0)])
    return segment_sum(values.double(), batch, lambda: (None, pointer))


@torch.compiler.disable
def _forces_and_stress(
    data: AtomicData, energy: Tensor, create_graph: bool, with_stress: bool, parallel: bool
) -> dict[str, Tensor]:
    r"""Forces, and the stress :math:`\sigma = \frac{1}{2V} (W + W^T)` of each structure.

    :math:`W = \sum_i g_i \otimes r_i + h^T \partial E/\partial h` with :math:`g_i = \partial E/\partial r_i` and the
    cell's rows in h: the derivative by a symmetric strain of positions and cell together (docs/network.md, equation
    9.3).

    Args:
        data: the batch.
        energy: [B], eV.
        create_graph: they are differentiated once more.
        with_stress: the stress is wanted, too.
        parallel: the gradients are this worker's part.

    Returns:
        ``forces`` [N, 3], eV/Å, and ``stress`` [B, 9], eV/Å^3.
    """
    pos, cell = data["pos"], data["cell"]
    inputs = [pos, cell] if with_stress else [pos]
    # A structure without edges depends on neither.
    gradients = torch.autograd.grad(
        energy.sum(), inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    if parallel:
        gradients = [sum_over_workers(gradient) for gradient in gradients]
    outputs = {"forces": -gradients[0]}
    if with_stress:
        outer = gradients[0].unsqueeze(2) * pos.unsqueeze(1)
        virial = _per_structure(outer, data["batch_full"], data["natoms"]) + (cell.mT @ gradients[1]).double()
        a, b, c = cell.double().unbind(1)
        volume = (torch.linalg.cross(a, b) * c).sum(-1).abs()  # torch's determinant cannot be captured in a CUDA graph
        periodic = data["pbc"].any(dim=1) & (volume > 0)
        inverse = torch.where(periodic, 1.0 / torch.where(periodic, volume, 1.0), 0.0)
        stress = 0.5 * (virial + virial.mT) * inverse.view(-1, 1, 1)
        outputs["stress"] = stress.view(-1, 9).to(pos.dtype)
    return outputs
