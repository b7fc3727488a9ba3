"""Readouts: atomic energies and direct forces from node features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2former_fairchem.nn.linear import kaiming_linear


class EnergyMLP(nn.Sequential):
    """Atomic energy W3 SiLU(W2 SiLU(W1 x_0 + b1) + b2) + b3 from the scalars (docs/network.md, equation 9.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            kaiming_linear(channels, channels),
            nn.SiLU(),
            kaiming_linear(channels, channels),
            nn.SiLU(),
            kaiming_linear(channels, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """features: [N, (lmax+1)^2, C]. Returns [N], in the unit of the training target (eV)."""
        return super().forward(features[:, 0]).squeeze(-1)


class LinearForce(nn.Module):
    """Direct force F = sum_c w_c x_{1,c}: a linear map of the degree-one rows (docs/network.md, equation 9.4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / channels)
        self.weight = nn.Parameter(torch.empty(1, channels).uniform_(-bound, bound))

    def forward(self, features: Tensor) -> Tensor:
        """features: [N, (lmax+1)^2, C]. Returns [N, 3], eV/Å."""
        return F.linear(features[:, 1:4], self.weight).squeeze(-1)


class GatedVectorBlock(nn.Module):
    """PaiNN's gated equivariant block: scalars [N, I], vectors [N, 3, I] -> scalars [N, O], vectors [N, 3, O]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.vector_norm = kaiming_linear(in_channels, in_channels, bias=False)
        self.vector_out = kaiming_linear(in_channels, out_channels, bias=False)
        self.update0 = kaiming_linear(2 * in_channels, in_channels)
        self.update1 = kaiming_linear(in_channels, 2 * out_channels)

    def forward(self, scalars: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        square = self.vector_norm(vectors).square().sum(1)
        # a zero vector has no direction to differentiate the norm in: its derivative is zero
        positive = square > 0
        norm = torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), square)
        update = self.update1(F.silu(self.update0(torch.cat([scalars, norm], -1))))
        scalars, gate = update.split(self.out_channels, -1)
        return scalars, gate.unsqueeze(1) * self.vector_out(vectors)


class PaiNNForce(nn.Module):
    """Direct force from two gated equivariant blocks, C -> C/2 -> 1 (docs/network.md, equation 9.5)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % 2:
            raise ValueError(f"sphere_channels: the PaiNN force head needs an even number, got {channels}")
        self.block0 = GatedVectorBlock(channels, channels // 2)
        self.block1 = GatedVectorBlock(channels // 2, 1)

    def forward(self, features: Tensor) -> Tensor:
        """features: [N, (lmax+1)^2, C]. Returns [N, 3], eV/Å."""
        scalars, vectors = self.block0(features[:, 0], features[:, 1:4])
        return self.block1(F.silu(scalars), vectors)[1].squeeze(-1)
