"""Graph parallelism: one batch spread over the workers of fairchem's graph-parallel group.

Every worker is given the whole batch. It owns a part of the atoms, keeps the edges whose receiver it owns, computes its
own atoms' features, and in every layer fetches keys and values of the foreign atoms that send to its own (the halo).
Sums over atoms, and derivatives by positions and cells, are partial on every worker and are added up by the heads.

The fetch is a linear map and its adjoint is the way back, so each is the other's derivative and any order works:

    fetch:  y[halo] = x[send]                        rows of the owners -> rows of those who need them
    back:   x[send] = sum over workers of y[halo]

One fetch for each layer, and one sum over each system's atoms where charges are divided: the layers depend on each
other, so every worker meets the collectives of the forward pass, of the backward pass and of the backward pass's own
derivative in the same order, whatever else it has to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from fairchem.core.common import gp_utils
from fairchem.core.common.parallelism.graph_partition import partition_atoms_spatial
from torch import Tensor

from e2former_fairchem.segments import gather_rows

if TYPE_CHECKING:
    from fairchem.core.datasets.atomic_data import AtomicData

__all__ = ["OWN_ATOMS", "Halo", "Partition", "active", "agree", "all_atoms", "partition_atoms", "sum_over_workers"]

#: Key of the backbone's output that holds the atoms a worker owns; absent without graph parallelism.
OWN_ATOMS = "own_atoms"


def active() -> bool:
    """Whether this process belongs to a graph-parallel group of more than one worker."""
    return gp_utils.initialized() and gp_utils.get_gp_world_size() > 1


@dataclass(frozen=True)
class Partition:
    """Who owns which atom.

    Args:
        owner: [N], the worker.
        own: [n] int64, ascending, atoms of this worker.
        rank: of this worker.
        workers: how many there are.
        group: fairchem's, for communication.
    """

    owner: Tensor
    own: Tensor
    rank: int
    workers: int
    group: Any

    def halo(self, source: Tensor, target: Tensor) -> Halo:
        """The halo of this worker for the graph of the whole batch.

        Every worker finds by itself what the others need of it, so nothing is exchanged here.

        Args:
            source: [E], of every edge of every worker.
            target: [E].
        """
        atoms, receiver, sender = self.owner.numel(), self.owner[target], self.owner[source]
        foreign = torch.unique(source[(receiver == self.rank) & (sender != self.rank)])
        foreign = foreign[torch.argsort(self.owner[foreign], stable=True)]
        asked = (sender == self.rank) & (receiver != self.rank)
        pair = torch.unique(receiver[asked] * atoms + source[asked])
        row = torch.empty_like(self.owner)
        present = torch.cat([self.own, foreign])
        row[present] = torch.arange(present.numel(), device=row.device)
        counts = [pair // atoms, self.owner[foreign]]
        sent, received = torch.stack([torch.bincount(c, minlength=self.workers) for c in counts]).tolist()
        return Halo(self.own, present, row, row[pair % atoms], sent, received, self.group)


@dataclass(frozen=True)
class Halo:
    """Atoms that one graph sees on this worker: its own, then the foreign ones in order of their owner and index.

    Args:
        own: [n], indices of the batch.
        present: [m], indices of the batch.
        row: [N], the row of each present atom (others: undefined).
        send: [s], rows of own atoms that others need, by the worker that needs them.
        sent: rows to each worker.
        received: rows from each worker.
        group: fairchem's, for communication.
    """

    own: Tensor
    present: Tensor
    row: Tensor
    send: Tensor
    sent: list[int]
    received: list[int]
    group: Any
    _transposed: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    def _by_row(self) -> tuple[Tensor, Tensor]:
        """Transposed CSR of ``send``, as `e2former_fairchem.segments` takes it."""
        if not self._transposed:
            order = torch.argsort(self.send, stable=True)
            rows = torch.arange(self.own.numel() + 1, device=order.device)
            self._transposed.append((order, torch.searchsorted(self.send[order], rows)))
        return self._transposed[0]

    @torch.compiler.disable
    def fetch(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Own rows [n, ...] of each tensor completed by the foreign ones, [m, ...], in a single exchange."""
        flat = [t.reshape(t.shape[0], t.shape[1:].numel()) for t in tensors]
        rows = gather_rows(torch.cat(flat, 1), self.send, self._by_row)
        foreign = _Exchange.apply(rows, self.sent, self.received, self.group)
        parts = foreign.split([f.shape[1] for f in flat], 1)
        return tuple(
            torch.cat([t, part.reshape(part.shape[0], *t.shape[1:]).to(t.dtype)])
            for t, part in zip(tensors, parts, strict=True)
        )

    @torch.compiler.disable
    def total(self, values: Tensor) -> Tensor:
        """Sum over the workers. Each makes of it what its own atoms need, so the adjoint is the same sum."""
        return _Total.apply(values, self.group)


class _Exchange(torch.autograd.Function):
    """Rows to every worker for rows from every worker; the derivative is the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_reduce(values: Tensor, group: Any) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Total(torch.autograd.Function):
    """Sum over workers; so is the derivative. torch's own (distributed.nn) is deprecated for a private one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_reduce(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """Sum over workers with the identity as derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        return _all_reduce(values, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def partition_atoms(pos: Tensor) -> Partition:
    """Equal parts of the atoms for the workers of fairchem's group: by index, or as its configuration says, by space.

    The first N mod W workers own one atom more, as fairchem's own heads expect; with fewer atoms than workers some own
    none. By space, atoms close on a space-filling curve stay together, which makes the halos of large systems thin.

    Args:
        pos: [N, 3] Å, the same on every worker.

    Raises:
        ValueError: ``partition: spatial`` with ``mode: allgather``, whose heads need atoms in order.
    """
    config, workers = gp_utils.get_gp_config(), gp_utils.get_gp_world_size()
    order = torch.arange(pos.shape[0], device=pos.device)
    if config is not None and config.partition == gp_utils.GPPartition.SPATIAL:
        if config.mode != gp_utils.GPMode.ALL_TO_ALL:
            raise ValueError(f"gp_config.mode: expected all_to_all with partition spatial, got {config.mode}")
        order = torch.argsort(partition_atoms_spatial(pos.detach(), workers), stable=True)
    owner = torch.empty_like(order)
    for worker, part in enumerate(torch.tensor_split(order, workers)):
        owner[part] = worker
    rank = gp_utils.get_gp_rank()
    own = (owner == rank).nonzero().squeeze(1)
    return Partition(owner, own, rank, workers, gp_utils.get_gp_group())


def sum_over_workers(values: Tensor) -> Tensor:
    """Sum over the workers, on every worker; the gradient goes to each worker's part as it is.

    Every worker computes the same function of the sum, so an adjoint that also added up their gradients would count
    them once for each worker. This is what fairchem's heads and losses rely on, whose own sum returns a tensor of
    another class, still on its way.
    """
    return _Sum.apply(values, gp_utils.get_gp_group())


@torch.compiler.disable
def all_atoms(values: Tensor, emb: Mapping[str, Tensor], data: AtomicData) -> Tensor:
    """Rows of the own atoms [n, ...] to rows of all atoms [N, ...], in the batch's order, the same on every worker."""
    whole = values.new_zeros((data["pos"].shape[0], *values.shape[1:])).index_copy(0, emb[OWN_ATOMS], values)
    return sum_over_workers(whole)


def agree(data: AtomicData, refusal: str | None = None) -> None:
    """Make sure that all workers hold the same batch and none refuses.

    Without this, workers with different batches would return a wrong number, and one that stops alone would leave the
    others waiting.

    Args:
        data: the batch.
        refusal: why this worker cannot go on, or None.

    Raises:
        RuntimeError: it is not so; on every worker.
    """
    device = data["pos"].device
    names = [name for name in ("atomic_numbers", "natoms", "charge", "spin", "pos", "cell", "pbc") if name in data]
    digests = [torch.tensor(refusal is not None, device=device).long(), *(_digest(data[name]) for name in names)]
    mine = torch.stack(digests)
    found = [torch.empty_like(mine) for _ in range(gp_utils.get_gp_world_size())]
    dist.all_gather(found, mine, group=gp_utils.get_gp_group())
    refused, *columns = torch.stack(found, 1).tolist()
    if refusal is not None:
        raise RuntimeError(refusal)
    if any(refused):
        raise RuntimeError(f"graph parallelism: worker {refused.index(1)} refused this batch; its own error says why")
    different = [name for name, column in zip(names, columns, strict=True) if len(set(column)) > 1]
    if different:
        raise RuntimeError(
            f"graph parallelism: expected the same batch on all {len(refused)} workers of a group, but they differ in "
            f"{', '.join(different)}"
        )


def _digest(tensor: Tensor) -> Tensor:
    """An integer that changes with any bit of the tensor's values, and with their order: a scalar, int64."""
    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    weights = 2 * torch.arange(flat.numel(), device=flat.device) + 1  # odd, so that no bit is lost modulo 2^64
    return (flat.long() * weights).sum() + flat.numel()
