"""E2Former-V2 on plain tensors: atoms and a graph in, node features out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e2former_fairchem.captured import Atoms, CapturedTrunk, parameters_of
from e2former_fairchem.config import E2FormerV2Config, LongRange
from e2former_fairchem.nn.block import TransformerBlock
from e2former_fairchem.nn.convolution import choose_convolution, image_nodes, with_geometry
from e2former_fairchem.nn.embedding import AtomEmbedding, ChargeSpinEmbedding, EdgeDegreeEmbedding
from e2former_fairchem.nn.linear import SO3Linear
from e2former_fairchem.nn.norm import EquivariantRMSNorm
from e2former_fairchem.nn.radial import SpeciesEmbedding
from e2former_fairchem.segments import gather_rows
from e2former_fairchem.spatial_order import SpatialOrder, spatial_order

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph


def _pointer(index: Tensor, rows: int) -> Tensor:
    """CSR pointer [rows + 1] of an ascending index."""
    return torch.searchsorted(index, torch.arange(rows + 1, device=index.device))


class LongRangeBlocks(nn.Module):
    """Order-0 blocks over distant heavy atoms, mixed into the trunk's output (docs/network.md, section 8)."""

    def __init__(self, config: E2FormerV2Config, long_range: LongRange) -> None:
        super().__init__()
        lmax, channels = config.lmax, config.sphere_channels
        bell = (long_range.lower, long_range.upper) if long_range.envelope == "bell" else None
        self.norm_in = EquivariantRMSNorm(lmax, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, 0, long_range.upper, bell) for _ in range(long_range.layers)
        )
        self.norm_out = EquivariantRMSNorm(lmax, channels)
        self.mix = SO3Linear(lmax, 2 * channels, channels)


class E2FormerV2(nn.Module):
    """The trunk of E2Former-V2 (arXiv:2601.16622; docs/network.md, sections 2 to 8).

    Constants are computed in float64 and stored in the default dtype of the moment of construction.
    """

    def __init__(self, config: E2FormerV2Config) -> None:
        super().__init__()
        self.config = config
        channels = config.sphere_channels
        self.charge_spin = ChargeSpinEmbedding(channels)
        self.atom_embedding = AtomEmbedding(config.max_num_elements, channels) if config.atom_embedding else None
        self.edge_degree = EdgeDegreeEmbedding(config)
        self.blocks = nn.ModuleList(TransformerBlock(config, order) for order in config.message_orders)
        self.long_range = None if config.long_range is None else LongRangeBlocks(config, config.long_range)
        self.norm = EquivariantRMSNorm(config.lmax, channels) if self.long_range is None else None
        self._captured = CapturedTrunk()

    def forward(
        self,
        atomic_numbers: Tensor,
        charge: Tensor,
        spin: Tensor,
        batch: Tensor,
        pos: Tensor,
        graph: Graph,
        long_graph: Graph | None = None,
    ) -> Tensor:
        """Node features.

        atomic_numbers: [N]. charge: [B], e. spin: [B], multiplicity 2S+1 (0: not given). batch: [N], ascending.
        pos: [N, 3], Å (for the node-factored convolution and the order of work; all else is in the graph). graph:
        neighbours within the cutoff. long_graph: with ``long_range`` only.
        Returns [N, (lmax+1)^2, C] in e3nn's row order, of the graph's receivers: with graph parallelism, of this
        worker's atoms. Raises ValueError when long_graph is missing or not asked for.
        """
        if (long_graph is None) != (self.long_range is None):
            expected = "no long-range graph" if self.long_range is None else "a long-range graph"
            raise ValueError(f"long_graph: expected {expected} (long_range = {self.config.long_range})")
        atoms = Atoms(atomic_numbers, charge, spin, batch)
        elements = self._elements(graph.present(atomic_numbers))
        order = self._order(pos, batch, graph)
        if order is not None:
            atoms = atoms._replace(atomic_numbers=order.atoms(atomic_numbers), batch=order.atoms(batch))
            graph = order.graph(graph)
        x = None
        if elements is not None and graph.vec.is_cuda and self._captured.serves(self, graph):
            x = self._captured(self, atoms, graph, elements)
        if x is None:
            x = self.evaluate(atoms, graph, long_graph, pos, elements)
        return x if order is None else order.back(x)

    def _runs_kernels(self, device: torch.device) -> bool:
        backend = self.config.kernel_backend
        return backend == "triton" or (backend == "auto" and device.type == "cuda")

    @torch.compiler.disable
    def _order(self, pos: Tensor | None, batch: Tensor, graph: Graph) -> SpatialOrder | None:
        """Another order of the atoms, where the kernels are faster in it; edges carry all that they read."""
        edges_only = self.long_range is None and self.config.convolution in ("auto", "on_the_fly")
        return spatial_order(pos, batch, graph) if edges_only and self._runs_kernels(batch.device) else None

    @torch.compiler.disable
    def _elements(self, atomic_numbers: Tensor) -> tuple[int, ...] | None:
        """The atomic numbers there are, where kernels may take radial networks with frozen weights from tables."""
        if not self._runs_kernels(atomic_numbers.device):
            return None
        if any(p.requires_grad for p in parameters_of(self)):
            return None
        present = torch.zeros(self.config.max_num_elements + 1, dtype=torch.bool, device=atomic_numbers.device)
        present.index_fill_(0, atomic_numbers, True)
        return tuple(number for number, there in enumerate(present.tolist()) if there)  # one read

    def evaluate(
        self,
        atoms: Atoms,
        graph: Graph,
        long_graph: Graph | None = None,
        pos: Tensor | None = None,
        elements: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Node features as :meth:`forward`, never from a CUDA graph.

        elements: the atomic numbers there are, where radial networks may come from tables.
        """
        atomic_numbers, charge, spin, batch = atoms
        convolution = choose_convolution(self.config, graph.source.numel(), self.charge_spin.mix.weight)
        # a checkpointed block keeps nothing anyway, and with weight gradients the features are needed once more
        again = elements is not None and not self.config.activation_checkpointing and graph.halo is None
        convolution = with_geometry(convolution, self.config, graph)
        convolution = replace(convolution, elements=elements, compute_again=again)
        images = image_nodes(pos, batch, charge.numel(), graph) if convolution.node_factored else None
        own = graph.own(batch)
        system = gather_rows(self.charge_spin(charge, spin), own, lambda: (None, _pointer(own, charge.numel())))
        species = graph.present(atomic_numbers)
        x = self.edge_degree(species, graph, convolution)
        if self.atom_embedding is not None:
            token = self.atom_embedding(graph.own(atomic_numbers), system)
            x = torch.cat([x[:, :1] + token.unsqueeze(1), x[:, 1:]], 1)
        for block in self.blocks:
            x = self._run(block, x, system, species, graph, convolution, images)
        if self.long_range is None:
            return self.norm(x, backend=convolution.backend)
        y = self.long_range.norm_in(x)
        convolution = choose_convolution(self.config, long_graph.source.numel(), y)
        species = long_graph.present(atomic_numbers)
        for block in self.long_range.blocks:
            y = self._run(block, y, system, species, long_graph, convolution, None)
        return self.long_range.mix(torch.cat([x, self.long_range.norm_out(y)], -1))

    def _run(self, block: TransformerBlock, *args) -> Tensor:
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the authors train without weight decay (docs/network.md, section 15.2).

        One-dimensional ones, everything in a norm, and every bias and embedding.
        """
        names = set()
        for module_name, module in self.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                exempt = parameter.ndim == 1 or isinstance(module, (EquivariantRMSNorm, SpeciesEmbedding, nn.Embedding))
                if exempt or "bias" in name or "norm" in name:
                    names.add(f"{module_name}.{name}" if module_name else name)
        return names
