"""What is made of frozen weights once and read at every call: small systems feel each kernel that makes it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Made = TypeVar("Made")

# weight -> {name: (addresses and versions, what was made)}; an entry goes when its weight goes
_made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def derived(name: str, weight: Tensor, make: Callable[[Tensor], Made], others: Sequence[Tensor] = ()) -> Made:
    """``make(weight)``, the one of the last call where ``weight`` needs no gradient and has not changed since.

    name: of what is made. others: what ``make`` reads beside the weight, under the same conditions. While a CUDA graph
    is captured nothing is kept, as its memory belongs to the graph; what was made before is used.
    """
    read = (weight, *others)
    if torch.compiler.is_compiling() or any(t.requires_grad or t.is_inference() for t in read):
        return make(weight)
    known = _made.get(weight)
    state = tuple((t.data_ptr(), t._version) for t in read)
    if known is not None and name in known and known[name][0] == state:
        return known[name][1]
    with torch.inference_mode(False), torch.no_grad():
        value = make(weight)
    if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        if known is None:
            known = _made[weight] = {}
        known[name] = state, value
    return value
