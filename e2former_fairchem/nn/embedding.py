"""Charge, spin and element embeddings, and the edge-degree embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from e2former_fairchem.config import E2FormerV2Config
from e2former_fairchem.execution import Execution
from e2former_fairchem.nn.linear import kaiming_linear
from e2former_fairchem.nn.radial import EMBEDDING_SCALE, RadialMLP, SpeciesEmbedding
from e2former_fairchem.segments import csr_of, gather_rows, segment_sum
from e2former_kernels.edge_degree import EmbeddingSpec, edge_degree_embedding, edge_degree_embedding_reference

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph

EMBEDDING_ROWS = 30
MAX_CHARGE = 10
MAX_SPIN = 20
#: Of an atom's share, so that their sum is never zero.
LEAST_WEIGHT = 1e-6


class ChargeSpinEmbedding(nn.Module):
    r""":math:`s = \mathrm{SiLU}(W [E_q[\mathrm{clip}(q,-10,10)+10]; E_m[\mathrm{clip}(m,0,20)]] + b)`.

    q: total charge (e), m: spin multiplicity 2S+1, 0 meaning not given (docs/network.md, equation 4.1).

    Args:
        channels: C.
        max_num_elements: atoms get shares by their element and surroundings (`atoms`); None: each gets all of it.
    """

    def __init__(self, channels: int, max_num_elements: int | None = None) -> None:
        super().__init__()
        self.charge_embedding = nn.Embedding(EMBEDDING_ROWS, channels)
        self.spin_embedding = nn.Embedding(EMBEDDING_ROWS, channels)
        for embedding in (self.charge_embedding, self.spin_embedding):
            nn.init.uniform_(embedding.weight, -EMBEDDING_SCALE, EMBEDDING_SCALE)
        self.mix = kaiming_linear(2 * channels, channels)
        self.share = self.surroundings = None
        if max_num_elements is not None:
            self.share = SpeciesEmbedding(max_num_elements, channels, scale=1.0)
            self.surroundings = kaiming_linear(channels, channels, bias=False)

    def forward(self, charge: Tensor, spin: Tensor) -> Tensor:
        """charge, spin: [B], integers. Returns [B, C]."""
        charge_row = charge.long().clamp(-MAX_CHARGE, MAX_CHARGE) + MAX_CHARGE
        spin_row = spin.long().clamp(0, MAX_SPIN)
        return F.silu(self.mix(torch.cat([self.charge_embedding(charge_row), self.spin_embedding(spin_row)], -1)))

    def atoms(
        self, charge: Tensor, spin: Tensor, atomic_numbers: Tensor, batch: Tensor, scalars: Tensor, graph: Graph
    ) -> Tensor:
        """Each atom's part of s (docs/network.md, equation 4.1 or 4.4).

        Args:
            charge: [B], e.
            spin: [B], multiplicity.
            atomic_numbers: [n], of the graph's receivers.
            batch: [n], their systems, ascending.
            scalars: [n, C], the edge-degree embedding's.
            graph: the receivers of all workers together are the systems' atoms.

        Returns:
            [n, C], of the graph's receivers.
        """
        system = self(charge, spin)
        transpose = csr_of(batch, charge.numel())
        mine = gather_rows(system, batch, transpose)
        if self.share is None:
            return mine
        bias = ((self.share(atomic_numbers) + self.surroundings(scalars)) * mine).sum(-1, keepdim=True)
        weight = F.softplus(bias) + LEAST_WEIGHT
        total = graph.total(segment_sum(weight, batch, transpose))
        neutral = self(torch.zeros_like(charge[:1]), torch.ones_like(spin[:1]))
        return neutral + (mine - neutral) * (weight / gather_rows(total, batch, transpose))


class AtomEmbedding(nn.Module):
    r""":math:`t_i = W_u (E_Z[Z_i] + s_{b(i)}) + b_u`, the authors' token embedding (docs/network.md, equation 4.3).

    The authors compute it and leave it unused; here it starts the scalar channels, so that an atom without
    neighbours still knows its element.
    """

    def __init__(self, max_num_elements: int, channels: int) -> None:
        super().__init__()
        self.element_embedding = SpeciesEmbedding(max_num_elements, channels, scale=0.3)
        self.mix = kaiming_linear(channels, channels)

    def forward(self, atomic_numbers: Tensor, system: Tensor) -> Tensor:
        """atomic_numbers: [N]; system: s of each atom's system, [N, C]. Returns [N, C]."""
        return self.mix(self.element_embedding(atomic_numbers) + system)


class EdgeDegreeEmbedding(nn.Module):
    """Initial node features from the neighbours' distances, directions and elements (docs/network.md, equation 4.2)."""

    def __init__(self, config: E2FormerV2Config) -> None:
        super().__init__()
        self.spec = EmbeddingSpec(config.lmax, config.num_radial_basis, config.envelope)
        width = config.num_radial_basis
        self.source_embedding = SpeciesEmbedding(config.max_num_elements, width)
        self.target_embedding = SpeciesEmbedding(config.max_num_elements, width)
        self.radial = RadialMLP(
            config.num_radial_basis,
            width,
            config.hidden_radial_width,
            config.sphere_channels,
            groups=config.lmax + 1,
            layer_norm=config.edge_layer_norm,
        )

    def forward(self, graph: Graph, execution: Execution) -> Tensor:
        """graph: the short-range graph. Returns [N, (lmax+1)^2, C]."""
        radial = self.radial(self.target_embedding.weight, self.source_embedding.weight, execution)
        arguments = self.spec, graph.vec, execution.edges, radial
        if execution.kernels:
            splines = None
            if execution.elements is not None:
                splines = execution.frozen.splines(
                    self, execution.elements, radial, self.spec.envelope.cutoff, last=False
                )
            return edge_degree_embedding(*arguments, splines=splines, mode=execution.mode)
        return edge_degree_embedding_reference(*arguments, recompute=execution.recompute, geometry=execution.geometry)
