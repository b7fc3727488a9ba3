"""E2Former-V2 on plain tensors: atoms and a graph in, node features out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e2former_fairchem.captured import Atoms, Replays
from e2former_fairchem.config import E2FormerV2Config, LongRange
from e2former_fairchem.execution import Execution, choose_execution
from e2former_fairchem.frozen import Frozen
from e2former_fairchem.nn.block import TransformerBlock
from e2former_fairchem.nn.embedding import AtomEmbedding, ChargeSpinEmbedding, EdgeDegreeEmbedding
from e2former_fairchem.nn.images import image_nodes
from e2former_fairchem.nn.layer_norm import EquivariantRMSNorm
from e2former_fairchem.nn.linear import SO3Linear
from e2former_fairchem.nn.radial import SpeciesEmbedding
from e2former_fairchem.spatial_order import SpatialOrder, spatial_order

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph

logger = logging.getLogger("e2former_fairchem")


class LongRangeBlocks(nn.Module):
    """Order-0 blocks over distant heavy atoms, mixed into the trunk's output (docs/network.md, section 8)."""

    def __init__(self, config: E2FormerV2Config, long_range: LongRange) -> None:
        super().__init__()
        lmax, channels = config.lmax, config.sphere_channels
        self.norm_in = EquivariantRMSNorm(lmax, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, 0, config.long_range_envelope) for _ in range(long_range.layers)
        )
        self.norm_out = EquivariantRMSNorm(lmax, channels)
        self.mix = SO3Linear(lmax, 2 * channels, channels)


class E2FormerV2(nn.Module):
    """The trunk of E2Former-V2 (arXiv:2601.16622; docs/network.md, sections 2 to 8).

    Constants are computed in float64 and stored in the default dtype of the moment of construction. ``execution`` is
    the name of the way in which the last evaluation ran (`e2former_fairchem.execution`), None before the first.
    """

    def __init__(self, config: E2FormerV2Config) -> None:
        super().__init__()
        self.config = config
        channels = config.sphere_channels
        self.charge_spin = ChargeSpinEmbedding(channels, config.max_num_elements if config.divide_charge else None)
        self.atom_embedding = AtomEmbedding(config.max_num_elements, channels) if config.atom_embedding else None
        self.edge_degree = EdgeDegreeEmbedding(config)
        self.blocks = nn.ModuleList(TransformerBlock(config, order) for order in config.message_orders)
        self.long_range = None if config.long_range is None else LongRangeBlocks(config, config.long_range)
        self.norm = EquivariantRMSNorm(config.lmax, channels) if self.long_range is None else None
        self.execution: str | None = None
        self._frozen: Frozen | None = None
        self._trained: list[str] = []  # parameters that had gradients before freeze()

    def freeze(self) -> E2FormerV2:
        """Keep from now on what is made of the weights (`e2former_fairchem.frozen`), which get no gradients any more.

        For repeated evaluations with kernels; fairchem's inference calls it. Numbers that are written to the weights
        afterwards are noticed at the next evaluation, which makes everything anew.
        """
        if self._frozen is None:
            self._trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
            self.requires_grad_(False)
            self._frozen = Frozen()
        return self

    def unfreeze(self) -> E2FormerV2:
        """Forget what was made of the weights; they have the gradients that they had before :meth:`freeze`."""
        if self._frozen is not None:
            self._frozen = None
            parameters = dict(self.named_parameters())
            for name in self._trained:
                parameters[name].requires_grad_(True)
        return self

    def train(self, mode: bool = True) -> E2FormerV2:
        """As torch's; training unfreezes."""
        if mode:
            self.unfreeze()
        return super().train(mode)

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
        execution = self._choose(graph, atomic_numbers)
        order = self._order(pos, batch, graph, execution)
        if order is not None:
            atoms = atoms._replace(atomic_numbers=order.atoms(atomic_numbers), batch=order.atoms(batch))
            graph = order.graph(graph)
        x, name = None, execution.name
        if execution.replays:
            x = self._replay(atoms, graph, execution)
            name = name if x is None else "replayed"
        if x is None:
            x = self.evaluate(atoms, graph, long_graph, pos, execution)
        self.execution = name
        return x if order is None else order.back(x)

    def _choose(self, graph: Graph, atomic_numbers: Tensor) -> Execution:
        def frozen_weights(parameters: Sequence[nn.Parameter]) -> tuple[Frozen, tuple[int, ...]]:
            return self._frozen_weights(parameters, graph.present(atomic_numbers))

        frozen = None if self._frozen is None else frozen_weights
        return choose_execution(self.config, graph, self.charge_spin.mix.weight, self, frozen)

    @torch.compiler.disable
    def _frozen_weights(
        self, parameters: Sequence[nn.Parameter], atomic_numbers: Tensor
    ) -> tuple[Frozen, tuple[int, ...]]:
        """What is made of the weights, with the atomic numbers there are."""
        # element 0, which does not exist, says whether weights have changed: both are read at once
        present = torch.zeros(self.config.max_num_elements + 1, dtype=torch.uint8, device=atomic_numbers.device)
        present.index_fill_(0, atomic_numbers, 1)
        same = self._frozen.check(parameters, present[:1])
        changed, *there = present.tolist()
        if changed or not same:
            logger.info("weights have changed since freeze(): what was made of them is made anew")
            self._frozen = Frozen()
            self._frozen.check(parameters, present[:1])
        return self._frozen, tuple(number for number, is_there in enumerate(there, 1) if is_there)

    @torch.compiler.disable
    def _replay(self, atoms: Atoms, graph: Graph, execution: Execution) -> Tensor | None:
        if self._frozen.replays is None:
            self._frozen.replays = Replays()
        return self._frozen.replays(self, atoms, graph, execution)

    @torch.compiler.disable
    def _order(self, pos: Tensor | None, batch: Tensor, graph: Graph, execution: Execution) -> SpatialOrder | None:
        """Another order of the atoms, where the kernels are faster in it; edges carry all that they read."""
        edges_only = self.long_range is None and execution.form == "relative" and execution.kernels
        return spatial_order(pos, batch, graph) if edges_only and not graph.one_chunk else None

    def evaluate(
        self,
        atoms: Atoms,
        graph: Graph,
        long_graph: Graph | None = None,
        pos: Tensor | None = None,
        execution: Execution | None = None,
    ) -> Tensor:
        """Node features as :meth:`forward`, never from a CUDA graph. execution: chosen here when None."""
        atomic_numbers, charge, spin, batch = atoms
        execution = self._choose(graph, atomic_numbers) if execution is None else execution
        species, numbers = graph.present(atomic_numbers), graph.own(atomic_numbers)
        execution = execution.on(self.config, graph, graph.edge_list(species))
        images = image_nodes(pos, batch, charge.numel(), graph, species) if execution.node_factored else None
        x = self.edge_degree(graph, execution)
        system = self.charge_spin.atoms(charge, spin, numbers, graph.own(batch), x[:, 0], graph)
        if self.atom_embedding is not None:
            token = self.atom_embedding(numbers, system)
            x = torch.cat([x[:, :1] + token.unsqueeze(1), x[:, 1:]], 1)
        checkpointed = self.config.activation_checkpointing and torch.is_grad_enabled()
        given = system, graph, execution, images
        for block in self.blocks:
            x = checkpoint(block, x, *given, use_reentrant=False) if checkpointed else block(x, *given)
        if self.long_range is None:
            return self.norm(x, execution=execution)
        y = self.long_range.norm_in(x)
        execution = execution.on_long_range(long_graph.edge_list(long_graph.present(atomic_numbers)))
        given = system, long_graph, execution, None
        for block in self.long_range.blocks:
            y = checkpoint(block, y, *given, use_reentrant=False) if checkpointed else block(y, *given)
        return self.long_range.mix(torch.cat([x, self.long_range.norm_out(y)], -1))

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
