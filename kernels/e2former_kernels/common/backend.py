"""How operations with kernels are evaluated, and where Triton runs. Refused loudly, never swapped in silence."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


class Mode(NamedTuple):
    """How an operation with kernels is evaluated. Its caller decides (`e2former_fairchem.execution`): none asks.

    Args:
        trained: gradients by the weights will be asked for: what is made of weights serves all passes of a step
            of training.
        compiled: inside torch.compile, where the operation is one of torch.library.
        precision: of products of float32 matrices inside kernels, as ``torch.set_float32_matmul_precision`` has it.
        autocast: dtype in which linear maps compute; None: in their input's.
    """

    trained: bool = False
    compiled: bool = False
    precision: str = "highest"
    autocast: torch.dtype | None = None

    @functools.lru_cache(maxsize=16)  # noqa: B019  a mode is a few words
    def dot(self, dtype: torch.dtype) -> str:
        """``input_precision`` of ``tl.dot`` for matrices of a dtype: TF32 where products may be rounded to it."""
        if dtype != torch.float32:
            return "ieee"
        return "tf32x3" if self.precision == "highest" else "tf32"


EXACT = Mode()


def triton_installed() -> bool:
    """Whether the ``triton`` package can be imported."""
    return importlib.util.find_spec("triton") is not None


def operation(module: str, name: str) -> Callable:
    """The operation ``name`` of ``module``; where the triton package is missing, what says so when it is called."""
    if triton_installed():
        return getattr(importlib.import_module(module), name)

    def missing(*args, **kwargs):
        raise RuntimeError(f"{name}: the triton package is not installed")

    return missing


def interpreting() -> bool:
    """Whether Triton runs in its CPU interpreter (``TRITON_INTERPRET=1``, read when triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def triton_problem(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``; None when they can."""
    if not triton_installed():
        return "the triton package is not installed"
    if device.type == "cuda":
        if interpreting():
            return "TRITON_INTERPRET=1 runs kernels on the CPU only"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return f"Triton needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
        return None
    if device.type == "cpu" and interpreting():
        return None
    return f"Triton needs a CUDA device (or TRITON_INTERPRET=1 on the CPU), got {device}"


@contextlib.contextmanager
def float32_products(around: str) -> Iterator[None]:
    """Products inside are not rounded to TF32. around: the precision outside, which returns; ``highest``: no change."""
    if around == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(around)
