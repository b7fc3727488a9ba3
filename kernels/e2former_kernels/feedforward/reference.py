"""Gated feed-forward network in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from e2former_kernels.layer_norm.reference import equivariant_rms_norm_reference
from e2former_kernels.linear.reference import degree_of_row, so3_linear_reference

# e3nn's ``normalize2mom`` estimates these constants, of squares, from a fixed random sample. The authors' weights
# were trained with the estimates, so the estimates, not the integrals, are the function.
SILU_SCALE = 1.6791767923989418
SIGMOID_SCALE = 1.8467055342154763


class Weights(NamedTuple):
    """In the order of the operation's arguments."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight1: Tensor
    bias1: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    weight2: Tensor
    bias2: Tensor
    power_weight: Tensor | None = None


def power_spectrum(h: Tensor) -> Tensor:
    r"""p_{lc} = 1/(2l+1) sum_m h_{lmc}^2 of the degrees l > 0 (docs/network.md, equation 7.3).

    Args:
        h: [N, (L+1)^2, C].

    Returns:
        [N, L C].
    """
    degrees = round(h.shape[1] ** 0.5)
    return torch.cat([h[:, l * l : (l + 1) ** 2].square().mean(1) for l in range(1, degrees)], -1)


def gated_feedforward_reference(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    power_weight: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    r"""The authors' ``s3`` feed-forward on the norm of its input (docs/network.md, sections 5.1 and 7).

    h = norm(x), plus W_p p in the scalar row with ``power_weight`` (:func:`power_spectrum`); y = W1 h + b1;
    G = W_g y_0 + b_g; z_0 = c_silu SiLU(G_0), z_l = c_sig sigmoid(G_l) y_l; then W2 z + b2, and x as well with
    ``residual``.

    Args:
        x: [N, (L+1)^2, C].
        norm_weight: [L+1, C].
        norm_bias: [C].
        weight1: W1, [L+1, C, C].
        bias1: b1, [C].
        gate_weight: W_g, [(L+1) C, C].
        gate_bias: b_g, [(L+1) C].
        weight2: W2, [L+1, C, C].
        bias2: b2, [C].
        power_weight: W_p, [C, L C], or None.
        residual: add x.

    Returns:
        Of the shape of x.
    """
    degrees, channels, _ = weight1.shape
    h = equivariant_rms_norm_reference(x, norm_weight, norm_bias)
    if power_weight is not None:
        h = torch.cat([h[:, :1] + F.linear(power_spectrum(h), power_weight).unsqueeze(1), h[:, 1:]], 1)
    scalar, rest = so3_linear_reference(h, weight1, bias1).split([1, degrees**2 - 1], 1)
    gates = F.linear(scalar, gate_weight, gate_bias).view(-1, degrees, channels)
    first, gate = gates.split([1, degrees - 1], 1)
    gate = (SIGMOID_SCALE * torch.sigmoid(gate)).index_select(1, degree_of_row(degrees, x.device)[1:] - 1)
    z = torch.cat([SILU_SCALE * F.silu(first), gate * rest], 1)
    out = so3_linear_reference(z, weight2, bias2)
    return x + out if residual else out
