"""Which form of the convolution runs, and the node positions that the node-factored form needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2former_fairchem.config import E2FormerV2Config
from e2former_kernels.common.backend import resolve_backend
from e2former_kernels.common.geometry import EdgeGeometry, edge_geometry

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph

# Below this many numbers of edge tensors in one layer, keeping them for the backward pass is cheaper than computing
# them twice (64 MB in float32).
KEEP_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Convolution:
    """form: of ``equivariant_attention_reference``; node_factored: EAAS; recompute: keep no edge tensors.

    backend: ``reference`` or ``triton``; the dense form, the standard implementation, is PyTorch's in both.
    geometry: of the edges, computed once for all layers where edge tensors are kept.
    elements: the atomic numbers there are, where radial networks may come from tables (frozen weights, kernels).
    compute_again: of node features keep only what takes more than a norm and a matrix product to compute again.
    """

    form: str
    node_factored: bool
    recompute: bool
    backend: str = "reference"
    geometry: EdgeGeometry | None = None
    elements: tuple[int, ...] | None = None
    compute_again: bool = False


def choose_convolution(config: E2FormerV2Config, num_edges: int, like: Tensor) -> Convolution:
    """The form asked for, or for ``auto`` the fastest one; and who computes it.

    ``auto`` is the relative form. The reference recomputes only when the edge tensors of a layer would be large.
    like: a parameter, for device and dtype (on a GPU the kernels take float32, and ``auto`` gives float64 to the
    reference).
    Raises RuntimeError when ``kernel_backend: triton`` cannot run here.
    """
    backend = config.kernel_backend
    if backend == "auto" and like.dtype == torch.float64:
        backend = "reference"
    backend = resolve_backend(backend, like.device)
    if config.convolution == "dense":
        return Convolution("dense", False, False, backend)
    if config.convolution == "eaas":
        return Convolution("sum", True, True, backend)
    if backend == "triton":
        return Convolution("relative", False, True, backend)
    numbers = num_edges * 6 * (config.lmax + 1) ** 2 * config.sphere_channels
    return Convolution("relative", False, config.convolution == "on_the_fly" or numbers > KEEP_NUMBERS)


def with_geometry(convolution: Convolution, config: E2FormerV2Config, graph: Graph) -> Convolution:
    """The convolution with what its layers share of the short-range graph, unless they may not keep it."""
    if convolution.recompute or convolution.backend == "triton":
        return convolution
    geometry = edge_geometry(graph.vec, config.cutoff, config.num_radial_basis, config.envelope_exponent)
    return replace(convolution, geometry=geometry)


@dataclass(frozen=True)
class ImageNodes:
    """Positions for the node-factored form: of every atom, and of every periodic image that some atom sees.

    position: [N, 3] and image_position: [I, 3], Å, from the centre of each system. image_source: [I], the real atom
    of each image. image: [E], each edge's image.
    """

    position: Tensor
    image_position: Tensor
    image_source: Tensor
    image: Tensor


def image_nodes(pos: Tensor, batch: Tensor, num_systems: int, graph: Graph) -> ImageNodes:
    """Positions relative to the mean of each system, whose choice cancels in the factored sum and is detached.

    pos: [N, 3], Å. batch: [N]. graph: edges with their lattice offsets. A periodic image is a node of its own. With
    graph parallelism the nodes are the atoms that the worker sees; the mean is still that of the whole system.
    """
    with torch.no_grad():
        total = pos.new_zeros(num_systems, 3).index_add_(0, batch, pos)
        count = torch.bincount(batch, minlength=num_systems).clamp(min=1).to(pos.dtype)
        centre = (total / count.unsqueeze(-1)).index_select(0, batch)
    position = graph.present(pos - centre)
    own = position if graph.halo is None else position[: graph.num_nodes]
    if graph.offset is None:
        nodes = torch.arange(position.shape[0], device=pos.device)
        return ImageNodes(own, position, nodes, graph.source)
    key = torch.cat([graph.source.unsqueeze(1), graph.offset.to(graph.source.dtype)], 1)
    unique, image = torch.unique(key, dim=0, return_inverse=True)
    edge = torch.zeros(unique.shape[0], dtype=torch.long, device=pos.device)
    edge[image] = torch.arange(image.numel(), device=pos.device)  # any edge of the image: all have its shift
    source = unique[:, 0]
    image_position = position.index_select(0, source) + graph.shift.index_select(0, edge).to(pos.dtype)
    return ImageNodes(own, image_position, source, image)
