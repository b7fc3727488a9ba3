"""Splines of the attention's radial networks, kept as long as weights and elements stay the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from e2former_kernels.common.radial import RadialWeights
from e2former_kernels.common.radial_table import RadialTable, build_radial_table

__all__ = ["TableCache"]

logger = logging.getLogger("e2former_fairchem")


class TableCache:
    """The table of one radial network for the elements at hand. A copy of the network starts with none.

    A table is made when the same elements come a second time in a row (dynamics and relaxations; a sweep over single
    molecules with ever new elements would make tables for nothing), for them and those it held before when it stays
    within the size limit. Where no table fits, the network is evaluated, and the log says so.
    """

    def __init__(self) -> None:
        self.table: RadialTable | None = None
        self._elements: frozenset[int] = frozenset()
        self._weights: tuple | None = None
        self._pending: frozenset[int] | None = None
        self._refused: set[frozenset[int]] = set()

    def __deepcopy__(self, memo: dict) -> TableCache:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()

    @torch.compiler.disable
    def get(
        self,
        elements: Sequence[int] | None,
        parameters: Sequence[Tensor],
        weights: Callable[[], RadialWeights],
        cutoff: float,
        last: bool = True,
    ) -> RadialTable | None:
        """A table for all pairs of ``elements``, or None where the network is to be evaluated.

        elements: atomic numbers, None where the weights are trained. parameters: what ``weights()`` is made of; a
        table is dropped when one of them changes. cutoff: Å. last: with the networks' last linear layer.
        """
        if elements is None:
            return None
        state = tuple((p.data_ptr(), p._version) for p in parameters)
        if state != self._weights:
            self.__init__()
            self._weights = state
        wanted = frozenset(elements)
        if self.table is not None and wanted <= self._elements:
            return self.table
        if wanted in self._refused:
            return None
        if self._pending != wanted:
            self._pending = wanted
            return None
        exact = weights()
        for candidate in dict.fromkeys((self._elements | wanted, wanted)):
            table = build_radial_table(exact, cutoff, sorted(candidate), last)
            if table is not None:
                self.table, self._elements = table, candidate
                return table
        self._refused.add(wanted)
        logger.info("radial networks of %d elements do not fit a table: they are evaluated", len(wanted))
        return None
