"""Argument checks whose messages name the tensor, what was expected and what came."""

from __future__ import annotations

from torch import Tensor


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
