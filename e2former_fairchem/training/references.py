"""References of energies: what elements and the total charge account for, which the network does not learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fairchem.core.modules.normalization.element_references import ElementReferences

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData
    from torch import Tensor


class ElementAndChargeReferences(ElementReferences):
    r"""fairchem's element references, and an energy that is linear in the total charge.

    .. math:: E^{\rm ref} = \sum_i \varepsilon_{Z_i} + Q \varepsilon_0

    docs/network.md, equation 9.2. :math:`\varepsilon_0` is what an electron less costs on average; two levels of theory
    differ in it by some eV, much the same for all molecules. Zero leaves fairchem's own.

    Args:
        element_references: [119], eV by atomic number; entry 0 is :math:`\varepsilon_0`, eV per unit of charge.
    """

    def apply_refs(self, batch: AtomicData, tensor: Tensor) -> Tensor:
        """Energies [B], eV, less the references."""
        return super().apply_refs(batch, tensor) - self._of_charges(batch, tensor)

    def undo_refs(self, batch: AtomicData, tensor: Tensor) -> Tensor:
        """Energies [B], eV, and the references."""
        return super().undo_refs(batch, tensor) + self._of_charges(batch, tensor)

    def _of_charges(self, batch: AtomicData, tensor: Tensor) -> Tensor:
        return batch.charge.to(tensor.device).view_as(tensor) * self.element_references[0]
