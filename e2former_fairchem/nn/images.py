"""The node positions that the node-factored form of the convolution needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2former_fairchem.segments import Transposed, gather_rows
from e2former_kernels.common.chunks import EdgeList

if TYPE_CHECKING:
    from e2former_fairchem.graph import Graph


@dataclass(frozen=True)
class ImageNodes:
    """Positions for the node-factored form: of every atom, and of every periodic image that some atom sees.

    position: [N, 3] and image_position: [I, 3], Å, from the centre of each system.
    The atoms themselves are the first images. image_source: [I], the real atom of each image; None where images are the
    atoms and no more. by_atom: images of an atom, and edges: with images as senders; None likewise.
    """

    position: Tensor
    image_position: Tensor
    image_source: Tensor | None = None
    by_atom: Transposed | None = None
    edges: EdgeList | None = None

    def of_images(self, rows: Tensor) -> Tensor:
        """Rows of the images, from rows of the atoms that they are images of."""
        if self.image_source is None:
            return rows
        return gather_rows(rows, self.image_source, self.by_atom)


def image_nodes(pos: Tensor, batch: Tensor, num_systems: int, graph: Graph, species: Tensor) -> ImageNodes:
    """Positions relative to the mean of each system, whose choice cancels in the factored sum and is detached.

    pos: [N, 3], Å. batch: [N]. graph: edges with their lattice offsets. species: [N'], atomic numbers of its senders. A
    periodic image is a node of its own. With graph parallelism the nodes are the atoms that the worker sees; the mean
    is still that of the whole system.
    """
    with torch.no_grad():
        total = pos.new_zeros(num_systems, 3).index_add_(0, batch, pos)
        count = torch.bincount(batch, minlength=num_systems).clamp(min=1).to(pos.dtype)
        centre = (total / count.unsqueeze(-1)).index_select(0, batch)
    position = graph.present(pos - centre)
    own = position if graph.halo is None else position[: graph.num_nodes]
    if graph.offset is None:
        return ImageNodes(own, position)
    far = graph.offset.any(1).nonzero().squeeze(1)
    key = torch.cat([graph.source.unsqueeze(1), graph.offset.to(graph.source.dtype)], 1).index_select(0, far)
    unique, found = torch.unique(key, dim=0, return_inverse=True)
    edge = far.new_zeros(unique.shape[0])
    edge[found] = far  # any edge of the image: all have its shift
    atoms, source = position.shape[0], unique[:, 0]
    image = graph.source.index_copy(0, far, atoms + found)
    image_position = position.index_select(0, source) + graph.shift.index_select(0, edge).to(pos.dtype)
    source = torch.cat([torch.arange(atoms, device=pos.device), source])
    edges = EdgeList(image, graph.target, graph.row_ptr, species.index_select(0, source))
    by_atom = Transposed(source, atoms)
    return ImageNodes(own, torch.cat([position, image_position]), source, by_atom, edges)
