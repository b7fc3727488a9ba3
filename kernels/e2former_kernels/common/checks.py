"""Argument checks whose messages name the tensor, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_problem


def check_shape(name: str, tensor: Tensor, dims: str, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor.shape == shape``; ``dims`` names the dimensions in the message."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected [{dims}] = {tuple(shape)}, got {tuple(tensor.shape)}")


def check_senders(species: Tensor, nodes: int) -> None:
    """Raise ``ValueError`` unless ``species`` is [N'], the receivers' rows first and then those that only send."""
    if species.dim() != 1 or species.numel() < nodes:
        raise ValueError(f"species: expected at least [N] = ({nodes},) rows, got {tuple(species.shape)}")


def check_same_dtype(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """Raise ``TypeError`` unless every tensor given has the dtype of ``reference``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != reference.dtype:
            raise TypeError(f"{name}: expected dtype {reference.dtype} as {reference_name} has, got {tensor.dtype}")


def check_same_device(reference_name: str, reference: Tensor, **tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless every tensor given is on the device of ``reference``."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(f"{name}: expected device {reference.device} as {reference_name} has, got {tensor.device}")


def check_edge_list(vec: Tensor, source: Tensor, target: Tensor, row_ptr: Tensor, species: Tensor) -> None:
    """Raise ValueError or TypeError unless they are [E, 3], [E], [E], [N+1] and at least [N], the indices int64."""
    for name, index in (("source", source), ("target", target), ("row_ptr", row_ptr), ("species", species)):
        if index.dtype != torch.int64:
            raise TypeError(f"{name}: expected dtype torch.int64, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got {tuple(index.shape)}")
    check_shape("vec", vec, "E, 3", (source.numel(), 3))
    check_shape("target", target, "E", (source.numel(),))
    check_senders(species, row_ptr.numel() - 1)


def check_node_operation(
    operation: str, name: str, x: Tensor, degrees: int, **tensors: tuple[Tensor | None, str, tuple[int, ...]]
) -> None:
    """Check the arguments of an operation on features ``x`` [N, degrees^2, C] that runs on Triton.

    tensors: name = (tensor, its dimensions' names, its shape). Raises RuntimeError on a device without Triton, else
    ValueError or TypeError that names the argument whose shape, device or dtype is not what it must be.
    """
    problem = triton_problem(x.device)
    if problem is not None:
        raise RuntimeError(f"{operation}: {problem}; use {operation}_reference")
    if x.dim() != 3 or x.shape[1] != degrees**2:
        raise ValueError(f"{name}: expected [N, (lmax+1)^2, C] with {degrees**2} rows, got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")
    for n, (tensor, dims, shape) in tensors.items():
        if tensor is not None:
            check_shape(n, tensor, dims, shape)
            check_same_device(name, x, **{n: tensor})
            check_same_dtype(name, x, **{n: tensor})
