"""Sums over runs of nodes, as gradients by weights are."""

from __future__ import annotations

from torch import Tensor

from e2former_kernels.common.column_sums import column_sums


class RunSums(dict[str, Tensor]):
    """Named sums, added up in the order of the runs: the same bits every time.

    The first term of a name becomes its sum, so it must not be a view of something that changes later.
    """

    def add(self, name: str, term: Tensor) -> None:
        """Add a term."""
        if name in self:
            self[name] += term
        else:
            self[name] = term

    def add_columns(self, **matrices: Tensor) -> None:
        """Add the sum over the rows of each matrix, of up to five at once."""
        for name, term in zip(matrices, column_sums(*matrices.values()), strict=True):
            self.add(name, term)

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        """Add a @ b, of two matrices or two batches of matrices, without a copy of the product."""
        if name not in self:
            self[name] = a @ b
        elif a.dim() == 3:
            self[name].baddbmm_(a, b)
        else:
            self[name].addmm_(a, b)
