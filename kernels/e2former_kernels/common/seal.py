"""Whether tensors still hold the numbers that something was made of: one launch, on their device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers of one program


@triton.jit
def _seal_kernel(address, numbers, digest, broken, NARROW: tl.constexpr, CHECK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i, number = tl.arange(0, BLOCK), tl.load(numbers + program)
    start, inside = tl.load(address + program), i < number
    if NARROW:
        bits = tl.load(start.to(tl.pointer_type(tl.int16)) + i, mask=inside, other=0).to(tl.uint32)
    else:
        bits = tl.load(start.to(tl.pointer_type(tl.int32)) + i, mask=inside, other=0).to(tl.uint32, bitcast=True)
    # a different bijection of the bits at every place, so that numbers which change places are seen too
    x = (bits ^ (i.to(tl.uint32) * 0x9E3779B1)) * 0x85EBCA6B
    x = (x ^ (x >> 15)) * 0xC2B2AE35
    x = x ^ (x >> 13)
    found = tl.sum(tl.where(inside, x, 0).to(tl.int64), axis=0)
    if CHECK:
        if found != tl.load(digest + program):
            tl.store(broken, 1)
    else:
        tl.store(digest + program, found)


class Seal:
    """A digest of every block of the memory in which some tensors lie, taken when the seal is made.

    Args:
        tensors: all on one device, numbers of two or more bytes. Their memory is kept alive.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        # addresses to read and to compare; the memory is kept, so that they are nobody else's
        self._places = [(t.data_ptr(), t.stride()) for t in self.tensors]
        self._memory = {m.data_ptr(): m for m in (t.untyped_storage() for t in self.tensors)}
        device = self.tensors[0].device
        self._narrow = any(t.element_size() < 4 for t in self.tensors)
        size = 2 if self._narrow else 4
        blocks = [
            (start + at * size, min(BLOCK, memory.nbytes() // size - at))
            for start, memory in self._memory.items()
            for at in range(0, memory.nbytes() // size, BLOCK)
        ]
        self._address, self._numbers = torch.tensor(blocks, dtype=torch.int64).to(device).t().contiguous()
        self._digest = torch.empty_like(self._address)
        self._launch(self._digest, False)

    def same_memory(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the sealed tensors, objects and memory; a check on the host."""
        return len(tensors) == len(self.tensors) and all(
            t is known and (t.data_ptr(), t.stride()) == place
            for t, known, place in zip(tensors, self.tensors, self._places, strict=True)
        )

    def check(self, broken: Tensor) -> None:
        """Set ``broken`` [1], integers, to 1 where a number has changed, without waiting for the device."""
        self._launch(broken, True)

    def _launch(self, broken: Tensor, check: bool) -> None:
        _seal_kernel[(self._address.numel(),)](
            self._address, self._numbers, self._digest, broken, NARROW=self._narrow, CHECK=check, BLOCK=BLOCK,
            num_warps=8,
        )  # fmt: skip
