"""Learning-rate schedules for fairchem's `cosine_lr_scheduler_fn`."""

from __future__ import annotations

from fairchem.core.modules.scheduler import CosineLRLambda
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def warmup_cosine(
    n_iters_per_epoch: int,
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    steps: int | None = None,
    epochs: float | None = None,
    warmup_factor: float = 0.2,
    lr_min_factor: float = 0.01,
) -> LRScheduler:
    r"""Warm-up and cosine of the authors' release, by optimiser steps t (docs/network.md, equation 15.2).

    Factor of the learning rate, with f = `warmup_factor`, m = `lr_min_factor`, w = `warmup_steps`, T the total:

    .. math::
        f + (1 - f)\,t/w \ (t \le w); \quad m + (1 - m)\,(1 + \cos(\pi t / T))/2 \ (w < t < T); \quad m \ (t \ge T)

    The cosine is not shifted by the warm-up. fairchem's own scheduler has the same factors but takes the warm-up in
    epochs, which would change with the data set and the number of GPUs.

    Args:
        n_iters_per_epoch: steps in an epoch; fairchem gives it.
        optimizer: fairchem gives it.
        warmup_steps: w, at least 1.
        steps: T; exactly one of `steps` and `epochs`.
        epochs: T in epochs.
        warmup_factor: factor at t = 0.
        lr_min_factor: factor from T on.

    Raises:
        ValueError: both or neither of `steps` and `epochs`, or a count below 1.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"warmup_cosine: expected exactly one of steps and epochs, got {steps=} and {epochs=}")
    total = int(steps if steps is not None else epochs * n_iters_per_epoch)
    if warmup_steps < 1 or total < 1:
        raise ValueError(f"warmup_cosine: expected at least 1 warm-up step and 1 step, got {warmup_steps} and {total}")
    return LambdaLR(
        optimizer,
        CosineLRLambda(
            warmup_epochs=warmup_steps, warmup_factor=warmup_factor, epochs=total, lr_min_factor=lr_min_factor
        ),
    )
