"""The convolution stage in its forms: given the weights of the edges, everything up to the path rows, forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from workload import PAPER, TINY, System

from e2former_fairchem.nn.axis_aligned import eaas_tables
from e2former_fairchem.so3 import path_table
from e2former_kernels.common.backend import Mode
from e2former_kernels.eaas import axis_aligned_contraction, dense_contraction_reference
from e2former_kernels.equivariant_attention import AttentionSpec
from e2former_kernels.equivariant_attention.primitives import launch_aggregate, launch_contract
from e2former_kernels.equivariant_attention.reference import aggregate

LMAX = 2


class ConvolutionCase:
    """One layer's convolution at the paper's width: weights [E, H], value [N, 9, C], edge vectors [E, 3]."""

    def __init__(self, atoms: int, device: str, tiny: bool = False) -> None:
        config = PAPER | (TINY if tiny else {})
        self.heads, self.channels = config["num_heads"], config["sphere_channels"]
        self.system = system = System(atoms, 32, device)
        self.atoms = system.atoms
        self.spec = AttentionSpec(LMAX, self.heads, config["num_radial_basis"], config["cutoff"])
        self.paths = path_table(LMAX)
        tables = eaas_tables(self.paths)
        self.tables = type(tables)(
            tables.coupling.float().to(device),
            tables.aligned_index.to(device),
            tables.aligned_value.float().to(device),
            tuple(m.float().to(device) for m in tables.recursion),
            tables.row_paths,
        )
        torch.manual_seed(1)
        self.value = torch.randn(self.atoms, 9, self.channels, device=device)
        self.vec = system.graph(system.pos).vec.detach()
        self.distance = self.vec.norm(dim=-1)
        self.weight = torch.randn(system.edges, self.heads, device=device)
        self.scale = (1 / self.distance).unsqueeze(1).contiguous()
        self.direction = self.vec * self.scale
        self.pos = system.pos - system.pos.mean(0)
        self.flat = self.tables.coupling.flatten(1)

    def _summed(self, x: Tensor, scale: Tensor) -> Tensor:
        """sum_j w_ij scale_ij x_j: [N, B * rows, C]."""
        channels = x.shape[-1]
        out = x.new_empty(self.atoms, scale.shape[1], x[0].numel() // self.heads, self.heads)
        value = x.contiguous().view(self.atoms, -1, self.heads)
        launch_aggregate(self.weight, scale, value, self.system.source, self.system.row_ptr, out)
        return out.view(self.atoms, -1, channels)

    def _factored(self, contract: Callable) -> Tensor:
        """CG with the receiver's position, minus the sum of CG with the senders' positions (the paper's form)."""
        own = contract(self._summed(self.value, self.scale), self.pos, self.tables)
        return own - self._summed(contract(self.value, self.pos, self.tables), self.scale)

    def on_the_fly(self) -> Tensor:
        """Outer product of direction and value accumulated per atom, contracted once per atom."""
        out = self.value.new_empty(self.atoms, self.flat.shape[0], self.channels)
        precision = Mode(precision=torch.get_float32_matmul_precision()).dot(out.dtype)
        launch_contract(self.flat, self._summed(self.value, self.direction), out, precision)
        return out

    def dense(self) -> Tensor:
        """Clebsch-Gordan contraction on every edge: tensors of size E x rows x C."""
        s, c = self.system, self.tables.coupling
        gathered = self.value[s.source]
        return aggregate(self.spec, "dense", self.weight, self.distance, self.vec, gathered, s.target, self.atoms, c)

    def node_factored_dense(self) -> Tensor:
        """The paper's factorisation with the dense coefficients at the nodes."""
        return self._factored(dense_contraction_reference)

    def eaas(self) -> Tensor:
        """The paper's factorisation with the EAAS layer."""
        return self._factored(axis_aligned_contraction)

    def e3nn(self) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
        """e3nn's TensorProduct on every edge, in e3nn's own layout, and the map from its result to path rows."""
        from e3nn import o3

        c, heads = self.channels, self.heads
        instructions, sizes, out = [], [], []
        for l3, sources in enumerate(self.paths.paths):
            for l1 in sources:
                instructions.append((l1, 0, len(out), "uvu", False))
                out.append((c, (l3, 1)))
                sizes.append((l1, l3))
        inputs = o3.Irreps([(c, (l, 1)) for l in range(LMAX + 1)])
        product = o3.TensorProduct(
            inputs, o3.Irreps("1x1e"), o3.Irreps(out), instructions, internal_weights=False, shared_weights=True
        ).to(self.value.device)
        widths = [2 * l + 1 for l in range(LMAX + 1)]
        own_layout = [b.transpose(1, 2).flatten(1) for b in self.value.split(widths, 1)]
        value = torch.cat(own_layout, 1)
        source, target = self.system.source, self.system.target

        def run() -> Tensor:
            spread = self.weight.repeat(1, c // heads)
            blocks = value[source].split([c * w for w in widths], 1)
            weighted = [
                (b.view(-1, c, w) * spread.unsqueeze(-1)).flatten(1) for b, w in zip(blocks, widths, strict=True)
            ]
            messages = product(torch.cat(weighted, 1), self.direction)
            return messages.new_zeros(self.atoms, messages.shape[1]).index_add_(0, target, messages)

        def path_rows(x: Tensor) -> Tensor:
            blocks = x.split([c * (2 * l3 + 1) for _, l3 in sizes], 1)
            by_path = {s: b.view(-1, c, 2 * s[1] + 1) for s, b in zip(sizes, blocks, strict=True)}
            rows = [
                by_path[l1, l3][:, :, m]
                for l3, sources in enumerate(self.paths.paths)
                for m in range(2 * l3 + 1)
                for l1 in sources
            ]
            return torch.stack(rows, 1)

        return run, path_rows

    def forms(self) -> dict[str, Callable[[], Tensor]]:
        """All forms but e3nn's, by name; the first is what the others are held to."""
        names = ("on_the_fly", "eaas", "node_factored_dense", "dense")
        return {name: getattr(self, name) for name in names}
