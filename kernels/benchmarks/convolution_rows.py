"""The convolution stage in its forms: given the weights of the edges, everything up to the path rows, forward.

The attention's own kernel makes the weights in the pass that sums (``attend_kernel``); the one here is given them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from workload import PAPER, TINY, System

from e2former_fairchem.nn.axis_aligned import eaas_constants
from e2former_fairchem.so3 import make_paths
from e2former_kernels.common.backend import Mode
from e2former_kernels.common.envelope import Envelope
from e2former_kernels.common.tiles import row_tiles
from e2former_kernels.eaas import axis_aligned_contraction, dense_contraction_reference
from e2former_kernels.equivariant_attention import AttentionSpec
from e2former_kernels.equivariant_attention.kernels_value import launch_contract
from e2former_kernels.equivariant_attention.message import aggregate

LMAX = 2


@triton.jit
def aggregate_kernel(
    weight, scale, value, source, row_ptr, out, R, H,
    B: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[i, b, r, h] = sum over edges e of i of w[e, h] s[e, b] v[source(e), r, h]."""
    i = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    in_h = h < H
    ra = tl.arange(0, RA)
    at_a = ra[:, None] * H + h[None, :]
    mask_a = (ra[:, None] < R) & in_h[None, :]
    dtype = out.dtype.element_ty
    a0 = tl.zeros([RA, BH], dtype=dtype)
    if B == 3:
        a1 = tl.zeros([RA, BH], dtype=dtype)
        a2 = tl.zeros([RA, BH], dtype=dtype)
    if RB > 0:
        rb = RA + tl.arange(0, RB)
        at_b = rb[:, None] * H + h[None, :]
        mask_b = (rb[:, None] < R) & in_h[None, :]
        b0 = tl.zeros([RB, BH], dtype=dtype)
        if B == 3:
            b1 = tl.zeros([RB, BH], dtype=dtype)
            b2 = tl.zeros([RB, BH], dtype=dtype)
    for e in range(tl.load(row_ptr + i), tl.load(row_ptr + i + 1)):
        j = tl.load(source + e).to(tl.int64)
        w = tl.load(weight + e * H + h, mask=in_h, other=0.0)
        s0 = tl.load(scale + e * B)
        x = tl.load(value + j * R * H + at_a, mask=mask_a, other=0.0) * w[None, :]
        a0 += s0 * x
        if B == 3:
            s1 = tl.load(scale + e * B + 1)
            s2 = tl.load(scale + e * B + 2)
            a1 += s1 * x
            a2 += s2 * x
        if RB > 0:
            y = tl.load(value + j * R * H + at_b, mask=mask_b, other=0.0) * w[None, :]
            b0 += s0 * y
            if B == 3:
                b1 += s1 * y
                b2 += s2 * y
    base = out + i * B * R * H
    tl.store(base + at_a, a0, mask=mask_a)
    if B == 3:
        tl.store(base + R * H + at_a, a1, mask=mask_a)
        tl.store(base + 2 * R * H + at_a, a2, mask=mask_a)
    if RB > 0:
        tl.store(base + at_b, b0, mask=mask_b)
        if B == 3:
            tl.store(base + R * H + at_b, b1, mask=mask_b)
            tl.store(base + 2 * R * H + at_b, b2, mask=mask_b)


def launch_aggregate(
    weight: Tensor, scale: Tensor, value: Tensor, source: Tensor, row_ptr: Tensor, out: Tensor
) -> None:
    """out: [N, B, R, H]; weight: [E, H], scale: [E, B], value: [senders, R, H], contiguous."""
    nodes, directions, rows, heads = out.shape
    tiles = row_tiles(rows, heads, directions)
    aggregate_kernel[nodes, triton.cdiv(heads, tiles["BH"])](
        weight, scale, value, source, row_ptr, out, rows, heads, B=directions, **tiles
    )


class ConvolutionCase:
    """One layer's convolution at the paper's width: weights [E, H], value [N, 9, C], edge vectors [E, 3]."""

    def __init__(self, atoms: int, device: str, tiny: bool = False) -> None:
        config = PAPER | (TINY if tiny else {})
        self.heads, self.channels = config["num_heads"], config["sphere_channels"]
        self.system = system = System(atoms, 32, device)
        self.atoms = system.atoms
        self.spec = AttentionSpec(LMAX, self.heads, config["num_radial_basis"], Envelope(config["cutoff"]))
        self.paths = make_paths(LMAX)
        constants = eaas_constants(self.paths)
        self.constants = type(constants)(
            constants.coupling.float().to(device),
            constants.aligned_index.to(device),
            constants.aligned_value.float().to(device),
            tuple(m.float().to(device) for m in constants.recursion),
            constants.row_paths,
            constants.lists,
        )
        torch.manual_seed(1)
        self.value = torch.randn(self.atoms, 9, self.channels, device=device)
        self.vec = system.graph(system.pos).vec.detach()
        self.distance = self.vec.norm(dim=-1)
        self.weight = torch.randn(system.edges, self.heads, device=device)
        self.scale = (1 / self.distance).unsqueeze(1).contiguous()
        self.direction = self.vec * self.scale
        self.pos = system.pos - system.pos.mean(0)
        self.flat = self.constants.coupling.flatten(1)

    def _summed(self, x: Tensor, scale: Tensor) -> Tensor:
        """sum_j w_ij scale_ij x_j: [N, B * rows, C]."""
        channels = x.shape[-1]
        out = x.new_empty(self.atoms, scale.shape[1], x[0].numel() // self.heads, self.heads)
        value = x.contiguous().view(self.atoms, -1, self.heads)
        launch_aggregate(self.weight, scale, value, self.system.source, self.system.row_ptr, out)
        return out.view(self.atoms, -1, channels)

    def _factored(self, contract: Callable) -> Tensor:
        """CG with the receiver's position, minus the sum of CG with the senders' positions (the paper's form)."""
        own = contract(self._summed(self.value, self.scale), self.pos, self.constants)
        return own - self._summed(contract(self.value, self.pos, self.constants), self.scale)

    def on_the_fly(self) -> Tensor:
        """Outer product of direction and value accumulated per atom, contracted once per atom."""
        out = self.value.new_empty(self.atoms, self.flat.shape[0], self.channels)
        precision = Mode(precision=torch.get_float32_matmul_precision()).dot(out.dtype)
        launch_contract(self.flat, self._summed(self.value, self.direction), out, precision)
        return out

    def dense(self) -> Tensor:
        """Clebsch-Gordan contraction on every edge: tensors of size E x rows x C."""
        s, c = self.system, self.constants.coupling
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
        for l3, paths in enumerate(self.paths.paths):
            for l1, _ in paths:
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
                for l3, paths in enumerate(self.paths.paths)
                for m in range(2 * l3 + 1)
                for l1, _ in paths
            ]
            return torch.stack(rows, 1)

        return run, path_rows

    def forms(self) -> dict[str, Callable[[], Tensor]]:
        """All forms but e3nn's, by name; the first is what the others are held to."""
        names = ("on_the_fly", "eaas", "node_factored_dense", "dense")
        return {name: getattr(self, name) for name in names}
