"""A neighbour list that serves for several steps: all pairs within the cutoff and a skin."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from e2former_fairchem.neighbors import Candidates

__all__ = ["VerletList"]


class _Kept(NamedTuple):
    """What was found, and for which atoms: pos [N, 3], cell [B, 3, 3] and inverse [B, 3, 3], pbc [B, 3], natoms [B]."""

    candidates: Candidates
    pos: Tensor
    cell: Tensor
    inverse: Tensor
    pbc: Tensor
    natoms: Tensor


@dataclass
class VerletList:
    r"""Pairs within the cutoff and a skin, and whether they still have all pairs within the cutoff.

    A pair that is not among them was further apart than $r_c + s$. A cell that changes from $h$ to $h'$ maps its
    distance vector by $F = h^{-1} h'$, which shortens it to no less than $1 - |F - 1|$ of its length (Frobenius' norm
    bounds the spectral one), and atoms that moved by $\Delta$ beside that map shorten it by at most $2 \Delta$. So the
    list serves while $2 \Delta \le (r_c + s)(1 - |F - 1|) - r_c$: half of the skin in a cell that stays.

    Small systems without images, whose pairs are all measured at once, keep nothing.

    Attributes:
        skin: s, Å.
        searches: how often neighbours were searched.
    """

    skin: float
    searches: int = 0
    _kept: _Kept | None = field(default=None, repr=False)

    def look(
        self, pos: Tensor, cell: Tensor, pbc: Tensor, batch: Tensor, natoms: Tensor, cutoff: float
    ) -> tuple[Candidates, Tensor] | None:
        """The pairs, and a flag [] bool on the device that is true where they may lack some; None where there are none.

        pos: [N, 3] Å float64. cell: [B, 3, 3] Å float64. pbc: [B, 3] bool. batch: [N], natoms: [B] int64. The list is
        of one cutoff (Å): that of the calls before.
        """
        kept = self._kept
        if (
            kept is None
            or kept.pos.shape != pos.shape
            or kept.cell.shape != cell.shape
            or kept.pos.device != pos.device
        ):
            return None
        same = ((cell == kept.cell).flatten(1).all(1) | ~pbc.any(1)).view(-1, 1, 1)
        one = torch.eye(3, dtype=pos.dtype, device=pos.device)
        strain = torch.where(same, one, kept.inverse @ cell)
        reach = (cutoff + self.skin) * (1 - (strain - one).flatten(1).norm(dim=1)) - cutoff
        if cell.shape[0] == 1:
            moved = (pos - kept.pos @ strain[0]).norm(dim=1)
        else:
            moved, reach = (pos - torch.einsum("nx,nxy->ny", kept.pos, strain[batch])).norm(dim=1), reach[batch]
        good = (2 * moved <= reach).all() & (natoms == kept.natoms).all() & (pbc == kept.pbc).all()
        return kept.candidates, ~(good & (same.view(-1) | pbc.all(1)).all())

    def keep(self, candidates: Candidates, pos: Tensor, cell: Tensor, pbc: Tensor, natoms: Tensor) -> Candidates:
        """Keep the pairs within cutoff and skin, in their order, and give them back; arguments as in `look`."""
        inverse = torch.zeros_like(cell)
        whole = pbc.all(1)
        inverse[whole] = torch.linalg.inv(cell[whole])
        self.searches += 1
        # copies, because an integrator moves its atoms in place
        self._kept = _Kept(candidates, pos.clone(), cell.clone(), inverse, pbc.clone(), natoms.clone())
        return candidates
