"""Batch samplers beside fairchem's sampler by atoms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from fairchem.core.datasets.base_dataset import BaseDataset
from torch.utils.data import Sampler

from e2former_fairchem.training.arguments import integer


class StructureBatchSampler(Sampler[list[int]]):
    """Batches of a fixed number of structures, drawn anew in every epoch.

    fairchem's `MaxAtomDistributedBatchSampler` makes its batches once and only shuffles their order. On a small data
    set every epoch should mix anew, and the authors' SPICE run counts a batch in structures.

    Args:
        dataset: what to sample from.
        num_structures: structures in a batch of one rank.
        num_replicas: ranks.
        rank: this rank.
        seed: of the shuffling, with the epoch's number.
        shuffle: draw in random order.

    Raises:
        ValueError: an empty data set, fewer structures than ranks, or `num_structures` below 1.
    """

    def __init__(
        self,
        dataset: BaseDataset,
        num_structures: int,
        num_replicas: int,
        rank: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        integer("num_structures", num_structures, 1)
        if len(dataset) < num_replicas:
            raise ValueError(f"dataset: expected at least one structure per rank ({num_replicas}), got {len(dataset)}")
        self.size = len(dataset)
        self.num_structures = num_structures
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.start_iter = 0

    def __len__(self) -> int:
        return math.ceil(self.size / (self.num_structures * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches of the current epoch, from `start_iter` on; all ranks get equally many."""
        order = np.arange(self.size)
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        # Each rank needs the same number of batches and none may be empty: the order is repeated from its start.
        total = max(self.size, ((len(self) - 1) * self.num_structures + 1) * self.num_replicas)
        total = math.ceil(total / self.num_replicas) * self.num_replicas
        own = np.resize(order, total)[self.rank :: self.num_replicas]
        for start in range(self.start_iter * self.num_structures, len(own), self.num_structures):
            yield own[start : start + self.num_structures].tolist()

    def set_epoch_and_start_iteration(self, epoch: int, start_iter: int) -> None:
        """Called by fairchem's unit at the start of an epoch and when a run is resumed."""
        self.epoch = epoch
        self.start_iter = start_iter
