"""What the mixins share: building a model in a dtype and reading energy, forces and stress from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from ase import Atoms
from torch import Tensor, nn

from e2former_fairchem.testing.data import atomic_data


class Prediction(NamedTuple):
    """What a potential says of a batch.

    Args:
        energy: [B], eV.
        forces: [N, 3], eV/Å.
        stress: [B, 9], eV/Å^3, or None.
    """

    energy: Tensor
    forces: Tensor
    stress: Tensor | None


class PotentialTests:
    """Base of the mixins. ``build_model`` must return the same weights at every call."""

    #: relative tolerance by dtype, of the largest force and of the energy's scale
    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float64: 1e-10, torch.float32: 5e-5}
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, torch.float32)
    dataset: ClassVar[str] = "omol"

    def build_model(self) -> nn.Module:
        """A fairchem ``HydraModel`` predicting energy, forces and stress, made in torch's default dtype."""
        raise NotImplementedError("subclasses define build_model")

    def model(self, dtype: torch.dtype) -> nn.Module:
        """The model in a dtype, in eval mode; built once per class and dtype."""
        cache = self.__class__.__dict__.get("_models")
        if cache is None:
            cache = {}
            type.__setattr__(self.__class__, "_models", cache)
        if dtype not in cache:
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                cache[dtype] = self.build_model().eval()
            finally:
                torch.set_default_dtype(before)
        return cache[dtype]

    def predict(self, structures: Sequence[Atoms] | Atoms, dtype: torch.dtype = torch.float64) -> Prediction:
        """Energy, forces and (if the model gives it) stress of a batch."""
        structures = [structures] if isinstance(structures, Atoms) else list(structures)
        out = self.model(dtype)(atomic_data(structures, dtype, self.dataset))
        stress = out["stress"]["stress"] if "stress" in out else None
        return Prediction(out["energy"]["energy"].detach(), out["forces"]["forces"].detach(), stress)

    def assert_close(self, got: Tensor, expected: Tensor, dtype: torch.dtype, scale: float | None = None) -> None:
        """Largest difference within the dtype's tolerance of ``scale`` (default: the largest expected value)."""
        scale = float(expected.abs().max()) if scale is None else scale
        error = float((got.double() - expected.double()).abs().max())
        limit = self.tolerance[dtype] * scale
        assert error <= limit, f"difference {error:.3e} exceeds {limit:.3e}"
