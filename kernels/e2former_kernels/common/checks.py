"""Argument checks whose messages name the tensor, what was expected and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from e2former_kernels.common.backend import triton_problem

if TYPE_CHECKING:
    from e2former_kernels.common.chunks import EdgeList
    from e2former_kernels.radial.reference import RadialWeights

#: A tensor that may be missing, its dimensions' names, its shape.
Expected = tuple[Tensor | None, str, tuple[int, ...]]


def check_device(operation: str, device: torch.device) -> None:
    """Raise ``RuntimeError`` where Triton cannot run."""
    problem = triton_problem(device)
    if problem is not None:
        raise RuntimeError(f"{operation}: {problem}; use {operation}_reference")


def check_shape(name: str, tensor: Tensor, dims: str, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor.shape == shape``; ``dims`` names the dimensions in the message."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected [{dims}] = {tuple(shape)}, got {tuple(tensor.shape)}")


def check_tensors(like_name: str, like: Tensor, dtype: bool = True, **tensors: Expected) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless tensors have their shape, and device and dtype of ``like``."""
    for name, (tensor, dims, shape) in tensors.items():
        if tensor is not None:
            check_shape(name, tensor, dims, shape)
            check_same(like_name, like, dtype, **{name: tensor})


def check_same(like_name: str, like: Tensor, dtype: bool = True, **tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless tensors are on the device of ``like``, with ``dtype`` TypeError unless of its own."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name}: expected device {like.device} as {like_name} has, got {tensor.device}")
        if dtype and tensor is not None and tensor.dtype != like.dtype:
            raise TypeError(f"{name}: expected dtype {like.dtype} as {like_name} has, got {tensor.dtype}")


def check_float(name: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless a tensor is float32 or float64."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {tensor.dtype}")


def check_edges(vec: Tensor, edges: EdgeList) -> None:
    """Raise ValueError or TypeError unless vec is [E, 3] and the edges' indices are int64, and on its device.

    They are source and target [E], row_ptr [N+1], species [N'], the receivers' rows first and then those that only
    send.
    """
    nodes = edges.row_ptr.numel() - 1
    for name in ("source", "target", "row_ptr", "species"):
        index = getattr(edges, name)
        if index.dtype != torch.int64:
            raise TypeError(f"{name}: expected dtype torch.int64, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"{name}: expected one dimension, got {tuple(index.shape)}")
        check_same("vec", vec, False, **{name: index})
    check_shape("vec", vec, "E, 3", (edges.source.numel(), 3))
    check_shape("target", edges.target, "E", (edges.source.numel(),))
    if edges.species.numel() < nodes:
        raise ValueError(f"species: expected at least [N] = ({nodes},) rows, got {tuple(edges.species.shape)}")


def check_nodes(operation: str, name: str, x: Tensor, degrees: int, **tensors: Expected) -> None:
    """Check the arguments of an operation on features ``x`` [N, degrees^2, C] that runs on Triton.

    Raises RuntimeError on a device without Triton, else ValueError or TypeError that names the argument whose shape,
    device or dtype is not what it must be.
    """
    check_device(operation, x.device)
    if x.dim() != 3 or x.shape[1] != degrees**2:
        raise ValueError(f"{name}: expected [N, (lmax+1)^2, C] with {degrees**2} rows, got {tuple(x.shape)}")
    check_float(name, x)
    check_tensors(name, x, **tensors)


def check_radial(
    name: str, weights: RadialWeights, like_name: str, like: Tensor, groups: int, basis: int, outputs: int | None = None
) -> None:
    """Raise ValueError or TypeError naming the first tensor that is not one of ``groups`` networks as ``like`` is.

    basis: n_b. outputs: K; as it is when None.
    """
    if weights.basis.dim() != 3 or weights.out.dim() != 3:
        shapes = tuple(weights.basis.shape), tuple(weights.out.shape)
        raise ValueError(f"{name}: expected basis [G, h, n_b] and out [G, K, h], got {shapes[0]} and {shapes[1]}")
    hidden, elements = weights.basis.shape[1], weights.target_embedding.shape[0]
    outputs = weights.out.shape[1] if outputs is None else outputs
    row, element = ("G, h", (groups, hidden)), ("Z, G, h", (elements, groups, hidden))
    expected = (
        ("G, h, n_b", (groups, hidden, basis)), element, element, row, row, ("G, h, h", (groups, hidden, hidden)), row,
        row, row, ("G, K, h", (groups, outputs, hidden)), ("G, K", (groups, outputs)),
    )  # fmt: skip
    named = zip(weights._fields, weights, expected, strict=True)
    check_tensors(like_name, like, **{f"{name}.{field}": (tensor, *shape) for field, tensor, shape in named})
