"""fairchem's training unit whose steps are replayed from CUDA graphs where that is possible."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fairchem.core.datasets.atomic_data import AtomicData
from fairchem.core.units.mlip_unit.mlip_unit import MLIPTrainEvalUnit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchtnt.framework import State

from e2former_fairchem.training.arguments import integer
from e2former_fairchem.training.card import check_given
from e2former_fairchem.training.padding import PaddedBatch, PaddingCollater, states
from e2former_fairchem.training.replay import Captures, Replays, Update, why_eager, why_no_graphs

__all__ = ["TrainEvalUnit"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model of one worker."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class TrainEvalUnit(MLIPTrainEvalUnit):
    """fairchem's `MLIPTrainEvalUnit`: the same losses, gradients and updates, with fewer launches.

    Forward, losses and gradients of a step come from one CUDA graph, clipping, optimiser and average from another
    (`e2former_fairchem.training.replay`). The loader's workers pad the batches and find their neighbours
    (`e2former_fairchem.training.padding`). What is written and resumed from is the same. Where steps cannot be captured
    they run as fairchem's; the log says why, once.

    Args:
        replay: ``off``: every step is fairchem's own. ``auto``: replayed on a GPU, where the network, the losses and
            the way of training allow it.
        max_graphs: sizes of batches that are kept captured.
        card: what only the user knows of data and weights (`card.GIVEN`), for the card in each inference checkpoint.
        kwargs: of `MLIPTrainEvalUnit`.

    Raises:
        ValueError: another value of ``replay``, a number of graphs below 1, or an unknown entry of the card.
    """

    def __init__(
        self,
        *args: Any,
        replay: str = "off",
        max_graphs: int = 64,
        card: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if replay not in ("auto", "off"):
            raise ValueError(f"replay: expected auto or off, got {replay!r}")
        self.replay = replay
        self.max_graphs = integer("max_graphs", max_graphs, 1)
        self.card = check_given(card)
        super().__init__(*args, **kwargs)
        #: Called after every replayed step with the losses by task and the numbers of structures and atoms.
        self.replayed_step_listeners: list[Callable[[dict[str, Tensor], int, int], None]] = []
        self._replays: Replays | None = None
        self._update: Update | None = None
        #: What the weights were trained on before, for the checkpoint's card.
        self.trained_before: list[dict[str, Any]] = getattr(unwrapped(self.model), "trained_before", [])
        #: Charge and multiplicity of the structures in this worker's batches, for the checkpoint's card.
        self.states_seen: set[tuple[int, int]] = set()

    def on_train_start(self, state: State) -> None:
        """As fairchem's; then choose how steps run."""
        super().on_train_start(state)
        model = unwrapped(self.model)
        loader = state.train_state.dataloader
        reason = "replay is off" if self.replay == "off" else why_eager(self, model) or why_no_graphs(model)
        if reason is None and not isinstance(loader, DataLoader):
            reason = f"the loader is a {type(loader).__name__}"
        if reason is None:
            self._pad(loader, model, capture=True)
        logging.info("training steps: replayed" if reason is None else f"training steps: eager ({reason})")

    def _pad(self, loader: DataLoader, model: nn.Module, capture: bool) -> None:
        """Take padded steps, captured or not, of batches that the loader's workers pad."""
        self._collate = loader.collate_fn
        loader.collate_fn = PaddingCollater(self._collate, model.backbone, self.tasks)
        self._replays = Replays(self, model, self.max_graphs, Captures() if capture else None)
        self._update = Update(self, capture)

    def on_train_end(self, state: State) -> None:
        """As fairchem's; the loader is as it was, and the graphs are gone."""
        super().on_train_end(state)
        if self._replays is not None:
            state.train_state.dataloader.collate_fn = self._collate
            self._replays = self._update = None

    def train_step(self, state: State, data: AtomicData | PaddedBatch) -> None:
        """One step; fairchem's where it is not replayed."""
        if not isinstance(data, PaddedBatch):
            self.states_seen |= states(data.charge, data.spin)  # still on the host
            super().train_step(state, data)
            return
        self.states_seen |= data.states
        try:
            losses = self._replays(data)
        except Exception:
            logging.error(f"Exception during training! On step {self.train_progress.num_steps_completed}: {data.sid}")
            raise
        for listener in self.replayed_step_listeners:
            listener(losses, data.structures, data.atoms)
        self.last_loss = sum(losses.values())
        self._update()
        self._report(state, data.structures, data.atoms)
        self.scheduler.step()

    def _report(self, state: State, structures: int, atoms: int) -> None:
        """fairchem's report of a step, in the steps that have one; only these wait for the device."""
        now = time.time()
        spent, self.previous_wall_time = now - self.previous_wall_time, now
        progress = self.train_progress
        step, printed = progress.num_steps_completed, progress.num_steps_completed % self.print_every == 0
        if self.logger is None and not printed:
            return
        values = [self.last_loss] if self.last_grad_norm is None else [self.last_loss, self.last_grad_norm]
        values = torch.stack([value.double() for value in values]).tolist()
        self.last_loss = values[0]
        epoch_steps = float(len(state.train_state.dataloader))
        record = {
            "train/loss": self.last_loss,
            "train/lr": self.scheduler.get_lr()[0],
            "train/step": step,
            "train/epoch": progress.num_epochs_completed + progress.num_steps_completed_in_epoch / epoch_steps,
            "train/samples_per_second(approx)": structures * self.dp_world_size / spent,
            "train/atoms_per_second(approx)": atoms * self.dp_world_size / spent,
            "train/num_atoms_on_rank": atoms,
            "train/num_samples_on_rank": structures,
        }
        if self.last_grad_norm is not None:
            record["train/grad_norm"] = self.last_grad_norm = values[1]
        if self.logger:
            self.logger.log(record, step=step, commit=True)
        if printed:
            logging.info(record)
