"""SIGINT (Ctrl-C) and SIGTERM in a run on this machine: a request to stop, and an exit status that is not 0.

fairchem's handlers, which it sets up for local runs only, look for an old checkpoint and end with status 0. Ours take
their place. Nothing else is replaced: under SLURM the signals stay with submitit, which queues the job again.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

import torch
from fairchem.core.common import distutils

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: Seconds. A signal that comes again sooner is the same one: torch's launcher passes on what a terminal sent already.
SAME = 1.0
_FAIRCHEM = "SlurmSPMDProgram."


def status(signum: int) -> int:
    """The exit status by convention: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + signum


def _by_fairchem(signum: int) -> bool:
    return getattr(signal.getsignal(signum), "__qualname__", "").startswith(_FAIRCHEM)


def _replace(handler: Callable[[int, FrameType | None], None]) -> bool:
    if not any(_by_fairchem(signum) for signum in SIGNALS):
        return False
    for signum in SIGNALS:
        signal.signal(signum, handler)
    return True


def _write(signum: int, what: str) -> None:
    """A line of the first rank; a handler must not print, because it may interrupt a print."""
    if distutils.is_master() and torch.utils.data.get_worker_info() is None:
        os.write(sys.__stderr__.fileno(), f"\n{signal.Signals(signum).name}: {what}\n".encode())


def _leave(signum: int, _frame: FrameType | None) -> None:
    _write(signum, "stopped")
    raise SystemExit(status(signum))


def end_on_signal() -> None:
    """Let a signal end a local run of fairchem's at once, with its status: for runs that keep their own journal, or
    are short enough to start again.
    """
    _replace(_leave)


class StopRequest:
    """A signal that is kept until the run can stop.

    The first signal is noted; the next one ends the process at once, unless a checkpoint is being written.

    Attributes:
        busy: a checkpoint is being written; signals are noted and nothing else.
        installed: signals come here.
    """

    def __init__(self) -> None:
        self.busy = False
        self._signal = 0
        self._since = 0.0
        self.installed = False
        self._group: torch.distributed.ProcessGroup | None = None

    def install(self) -> None:
        """Take the place of fairchem's handlers, if they are there; to be called by all ranks."""
        self.installed = _replace(self._note)
        if self.installed and distutils.get_world_size() > 1:
            # Of CPU tensors: to ask the ranks must not make a GPU wait.
            self._group = torch.distributed.new_group(backend="gloo")

    def remove(self) -> None:
        """Let signals end the process at once from here on."""
        if self.installed:
            self.installed = False
            for signum in SIGNALS:
                signal.signal(signum, _leave)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signal:
            if not self.busy and time.monotonic() - self._since > SAME:
                _leave(signum, frame)
            return
        self._signal, self._since = signum, time.monotonic()
        # Workers of a data loader may have got the signal, too; torch would raise in the middle of a step.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _write(signum, "stopping after this step, with a checkpoint; a second one stops at once, without one")

    def same(self, number: int) -> bool:
        """Whether all ranks have the same number; to be called by all of them."""
        if self._group is None:
            return True
        bounds = torch.tensor([number, -number])
        torch.distributed.all_reduce(bounds, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(bounds[0] == -bounds[1])

    def agreed(self) -> signal.Signals | None:
        """The signal that any rank has got; to be called by all ranks at the same place."""
        number = self._signal
        if self._group is not None:
            shared = torch.tensor(number)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self._group)
            number = int(shared)
        return signal.Signals(number) if number else None
