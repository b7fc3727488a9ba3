"""The attention alone and its convolution stage: our forms against the edge-materialised PyTorch implementation.

python kernels/benchmarks/op_table.py [--atoms 1536 6144] [--output FOLDER]
"""

from __future__ import annotations

import argparse

import torch
from common import Network, System, measure, save

from e2former_fairchem.nn.axis_aligned import eaas_tables
from e2former_fairchem.so3 import path_table
from e2former_kernels.eaas import axis_aligned_contraction, dense_contraction_reference
from e2former_kernels.equivariant_attention import equivariant_attention, equivariant_attention_reference
from e2former_kernels.equivariant_attention.primitives import launch_aggregate, launch_contract
from e2former_kernels.equivariant_attention.reference import aggregate


def attention_table(atoms: int, rows: dict) -> None:
    """Forward, and forward with the gradients of query, key, value and edge vectors, weights frozen."""
    system = System(atoms, 32, "cuda")
    layer = Network(num_layers=1).cuda().requires_grad_(False).trunk.blocks[0].attention
    spec, heads = layer.spec, layer.spec.num_heads
    query, key = (torch.randn(system.atoms, heads, 8, device="cuda").requires_grad_() for _ in range(2))
    value = torch.randn(system.atoms, 9, 256, device="cuda").requires_grad_()
    vec = system.graph(system.pos).vec.detach().requires_grad_()
    radial = layer.radial(layer.target_embedding.weight, layer.source_embedding.weight)
    arguments = (spec, query, key, value, None, vec, system.source, system.target, system.row_ptr, system.numbers)
    arguments = (*arguments, radial, None, layer.coupling)
    forms = {
        "triton": lambda: equivariant_attention(*arguments, source_order=system.order, source_ptr=system.ptr),
        "dense": lambda: equivariant_attention_reference(*arguments, form="dense", recompute=False),
    }
    exact = forms["dense"]()
    error = float(((forms["triton"]() - exact).norm() / exact.norm()).detach())
    del exact
    if not error < 1e-2:
        raise SystemExit(f"attention: relative difference {error} between the forms, no timings")
    rows[f"attention/difference/{atoms}"] = error
    for name, form in forms.items():

        def forward(form=form) -> None:
            with torch.no_grad():
                form()

        def both(form=form) -> None:
            torch.autograd.grad(form().sum(), (query, key, value, vec))

        rows[f"attention/{name}/forward/{atoms}"] = measure(forward, 5)
        rows[f"attention/{name}/forward_backward/{atoms}"] = measure(both, 5)


def convolution_table(atoms: int, rows: dict) -> None:
    """Given the weights of the edges: everything up to the path rows, forward."""
    system = System(atoms, 32, "cuda")
    spec = Network(num_layers=1).trunk.blocks[0].attention.spec
    tables = eaas_tables(path_table(2))
    tables = tables._replace(coupling=tables.coupling.float().cuda())
    n, heads = system.atoms, spec.num_heads
    value = torch.randn(n, 9, 256, device="cuda")
    vec = system.graph(system.pos).vec.detach()
    distance = vec.norm(dim=-1)
    weight = torch.randn(system.edges, heads, device="cuda")
    scale = (1 / distance).unsqueeze(1).contiguous()
    direction = vec * scale
    pos = system.pos - system.pos.mean(0)
    flat = tables.coupling.flatten(1)

    def summed(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(n, s.shape[1], x[0].numel() // heads, heads)
        launch_aggregate(weight, s, x.contiguous().view(n, -1, heads), system.source, system.row_ptr, out)
        return out.view(n, -1, 256)

    def factored(contract) -> torch.Tensor:
        return contract(summed(value, scale), pos, tables) - summed(contract(value, pos, tables), scale)

    def relative() -> torch.Tensor:
        out = value.new_empty(n, flat.shape[0], 256)
        launch_contract(flat, summed(value, direction), out)
        return out

    def dense() -> torch.Tensor:
        return aggregate(spec, "dense", weight, distance, vec, value[system.source], system.target, n, tables.coupling)

    forms = {
        "dense": dense,
        "node_factored_dense": lambda: factored(dense_contraction_reference),
        "eaas": lambda: factored(axis_aligned_contraction),
        "on_the_fly": relative,
    }
    exact = relative()
    for name, form in forms.items():
        error = float((form() - exact).norm() / exact.norm())
        if not error < 1e-2:
            raise SystemExit(f"convolution {name}: relative difference {error}, no timings")
        rows[f"convolution/{name}/{atoms}"] = measure(form, 5) | {"difference": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--atoms", type=int, nargs="*", default=[1536, 6144])
    parser.add_argument("--precision", default="high")
    parser.add_argument("--output")
    args = parser.parse_args()
    torch.set_float32_matmul_precision(args.precision)
    rows: dict = {}
    for atoms in args.atoms:
        convolution_table(atoms, rows)
        attention_table(atoms, rows)
    for name, row in rows.items():
        print(name, row, flush=True)
    save("operations", rows, args.output)


if __name__ == "__main__":
    main()
