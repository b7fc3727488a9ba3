"""Gated feed-forward network on spherical tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from e2former_fairchem.execution import Execution
from e2former_fairchem.nn.layer_norm import EquivariantRMSNorm
from e2former_fairchem.nn.linear import SO3Linear, kaiming_linear
from e2former_kernels.feedforward import gated_feedforward, gated_feedforward_reference

if TYPE_CHECKING:
    from e2former_kernels.feedforward.half import HalfWeights
    from e2former_kernels.feedforward.op import Weights


class GatedFeedForward(nn.Module):
    r"""The authors' ``s3`` feed-forward (docs/network.md, section 7).

    y = W1 x; gates G = W_g y_0 + b_g; z_0 = c_silu SiLU(G_0), z_l = c_sig sigmoid(G_l) y_l; result W2 z.
    power_spectrum: the scalars of x see the squares of the other degrees first (equation 7.3).
    """

    def __init__(self, lmax: int, channels: int, power_spectrum: bool = False) -> None:
        super().__init__()
        self.lmax, self.channels = lmax, channels
        self.linear1 = SO3Linear(lmax, channels, channels)
        self.gates = kaiming_linear(channels, (lmax + 1) * channels)
        self.linear2 = SO3Linear(lmax, channels, channels)
        self.power = kaiming_linear(lmax * channels, channels, bias=False) if power_spectrum else None

    def weights(self, norm: EquivariantRMSNorm) -> tuple[Tensor | None, ...]:
        """The parameters of the norm and the network in the order of the kernels' arguments."""
        return (
            norm.affine_weight,
            norm.affine_bias,
            self.linear1.weight,
            self.linear1.bias,
            self.gates.weight,
            self.gates.bias,
            self.linear2.weight,
            self.linear2.bias,
            None if self.power is None else self.power.weight,
        )

    def prepared(self, norm: EquivariantRMSNorm, execution: Execution) -> HalfWeights | Weights | None:
        """The frozen parameters as the kernels' products take them; None where they are not frozen."""
        if execution.frozen is None:
            return None
        from e2former_kernels.feedforward.half import half_weights
        from e2former_kernels.feedforward.op import Weights, of_rows

        def make() -> HalfWeights | Weights:
            weights = Weights(*self.weights(norm))
            return half_weights(weights, execution.mode.precision) if execution.half else of_rows(weights)

        return execution.made(self, "half" if execution.half else "rows", make)

    def of_norm(self, x: Tensor, norm: EquivariantRMSNorm, execution: Execution) -> Tensor:
        """x + this network on ``norm(x)``. x: [N, (lmax+1)^2, C]. Same shape back."""
        if execution.kernels:
            options = {"prepared": self.prepared(norm, execution), "mode": execution.mode}
            return gated_feedforward(x, *self.weights(norm), residual=True, **options)
        return gated_feedforward_reference(x, *self.weights(norm), residual=True)
