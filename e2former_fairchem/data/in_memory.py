"""Data sets that are decoded once and then kept in memory."""

from __future__ import annotations

from typing import Any

from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.datasets.base_dataset import Subset
from fairchem.core.datasets.mt_concat_dataset import ConcatDataset, create_concat_dataset
from omegaconf import DictConfig


class InMemorySubset(Subset):
    """A fairchem subset whose structures are read and decoded at first use only.

    fairchem's `keep_in_memory` sets the cache on the instance, where `dataset[i]` never looks. Structures are handed
    out without a copy: a batch is made of copies.
    """

    def __init__(self, subset: Subset) -> None:
        super().__init__(subset.dataset, subset.indices, subset.metadata)
        self._items: dict[int, AtomicData] = {}

    def __getitem__(self, idx: int) -> AtomicData:
        """Structure `idx` of the subset."""
        if idx not in self._items:
            self._items[idx] = super().__getitem__(idx)
        return self._items[idx]

    def __getitems__(self, indices: list[int]) -> list[AtomicData]:
        """Several structures; torch asks for this method beside `__getitem__`."""
        return [self[i] for i in indices]


def create_in_memory_dataset(
    dataset_configs: DictConfig, combined_dataset_config: dict[str, Any]
) -> ConcatDataset[AtomicData]:
    """fairchem's `create_concat_dataset`, for data sets small enough to be kept decoded in every process."""
    combined = create_concat_dataset(dataset_configs, combined_dataset_config)
    combined.datasets = [InMemorySubset(subset) for subset in combined.datasets]
    return combined
