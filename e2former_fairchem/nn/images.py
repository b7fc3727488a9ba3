"""The node positions that the node-factored form of the convolution needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph


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
