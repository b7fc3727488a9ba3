"""Constants of the axis-aligned frame, from the coupling coefficients."""

from __future__ import annotations

import math

import torch
from e3nn import o3

from e2former_fairchem.so3 import Paths
from e2former_kernels.eaas import EAASConstants
from e2former_kernels.eaas.reference import lists_of


def eaas_constants(paths: Paths) -> EAASConstants:
    """Constants of :func:`e2former_kernels.eaas.axis_aligned_contraction_reference`, in float64."""
    along = paths.coupling[:, 1]  # b = y: what is left of the direction in its own frame
    if int((along.abs() > 1e-12).sum(1).max()) > 1:
        raise RuntimeError("axis-aligned frame: a path row couples to more than one row")
    index = along.abs().argmax(1)
    recursion = tuple(
        (o3.wigner_3j(1, l - 1, l, dtype=torch.float64) * math.sqrt(2 * l + 1)).reshape(-1, 2 * l + 1).T.contiguous()
        for l in range(2, paths.lmax + 1)
    )
    value = along.gather(1, index.unsqueeze(1)).squeeze(1)
    lists = lists_of(paths.coupling, recursion, paths.row_paths)
    return EAASConstants(paths.coupling, index, value, recursion, paths.row_paths, lists)
