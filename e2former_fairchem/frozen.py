"""Everything that is made of a model's weights and kept: its one home, made by ``freeze()``, gone with ``unfreeze()``.

Splines of the radial networks, merged maps, float16 rows and CUDA graphs all stand for weights that do not change. A
model that nobody froze keeps none of them. A frozen model notices at every evaluation when its weights have changed, by
whatever way, and makes everything anew: who may write to them is not asked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from e2former_kernels.radial.reference import RadialWeights
from e2former_kernels.radial.splines import RadialSplines, build_splines

if TYPE_CHECKING:
    from e2former_fairchem.captured import Replays
    from e2former_kernels.common.seal import Seal

__all__ = ["Frozen"]

logger = logging.getLogger("e2former_fairchem")

Made = TypeVar("Made")


class Frozen:
    """What is made of the weights of one model. A copy, pickled or deep, starts empty.

    The first evaluation seals the weights: a digest of every block of their memory (`e2former_kernels.common.seal`),
    which every later evaluation checks in one launch, whose verdict it reads together with the elements.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[nn.Module, str], object] = {}
        self._splines: dict[nn.Module, _Splines] = {}
        self._seal: Seal | None = None
        self.replays: Replays | None = None

    def __deepcopy__(self, memo: dict) -> Frozen:
        return type(self)()

    def __reduce__(self) -> tuple:
        return type(self), ()

    def made(self, owner: nn.Module, name: str, make: Callable[[], Made]) -> Made:
        """``make()``, the first time; later what it returned. owner: the module whose weights ``make`` reads."""
        key = owner, name
        if key not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[key] = make()
        return self._made[key]

    def splines(
        self, owner: nn.Module, elements: Sequence[int], weights: RadialWeights, cutoff: float, last: bool = True
    ) -> RadialSplines | None:
        """Splines of the radial networks of ``owner`` for all pairs of ``elements``; None: evaluate the networks.

        Args:
            owner: the module that the networks belong to.
            elements: atomic numbers at hand.
            weights: of the networks.
            cutoff: Å.
            last: with the networks' last linear layer.
        """
        return self._splines.setdefault(owner, _Splines()).get(elements, weights, cutoff, last)

    def all_splines(self) -> list[RadialSplines]:
        """The splines there are."""
        return [one.made for one in self._splines.values() if one.made is not None]

    def check(self, parameters: Sequence[nn.Parameter], broken: Tensor) -> bool:
        """Whether the weights are the sealed ones as far as the host can tell; seals them the first time.

        Args:
            parameters: of the model.
            broken: [1], integers on the weights' device, set to 1 where a number has changed.
        """
        if self._seal is None:
            from e2former_kernels.common.seal import Seal

            with torch.inference_mode(False):
                self._seal = Seal(parameters)
            return True
        if not self._seal.same_memory(parameters):
            return False
        self._seal.check(broken)
        return True


class _Splines:
    """Splines of one module's radial networks, for the elements at hand.

    They are made when the same elements come twice in a row (dynamics and relaxations; a sweep over single
    molecules with ever new elements would make them for nothing), for them and those there were before where both stay
    within the size limit. Where none fit, the networks are evaluated, and the log says so.
    """

    def __init__(self) -> None:
        self.made: RadialSplines | None = None
        self._elements: frozenset[int] = frozenset()
        self._pending: frozenset[int] | None = None
        self._refused: set[frozenset[int]] = set()

    def get(self, elements: Sequence[int], weights: RadialWeights, cutoff: float, last: bool) -> RadialSplines | None:
        wanted = frozenset(elements)
        if self.made is not None and wanted <= self._elements:
            return self.made
        if wanted in self._refused:
            return None
        if self._pending != wanted:
            self._pending = wanted
            return None
        for candidate in dict.fromkeys((self._elements | wanted, wanted)):
            with torch.inference_mode(False):
                made = build_splines(weights, cutoff, sorted(candidate), last)
            if made is not None:
                self.made, self._elements = made, candidate
                return made
        self._refused.add(wanted)
        logger.info("radial networks of %d elements have too large splines: they are evaluated", len(wanted))
        return None
