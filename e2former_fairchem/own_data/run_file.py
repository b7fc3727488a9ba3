"""The run's file: sizes of networks, and all that follows from the number of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from e2former_fairchem.training.arguments import integer

FILE = "train.yaml"
GROUPS = ("backbone", "heads")


@dataclass(frozen=True)
class Size:
    """A network and how it is trained.

    backbone: its config group. channels: up to which a checkpoint's network is trained like this one. lr: peak learning
    rate. atoms, structures: in a batch, about and at most. steps: aimed at; epochs are between `EPOCHS`.
    """

    backbone: str
    channels: int
    lr: float
    atoms: int
    structures: int
    steps: int


SIZES: Mapping[str, Size] = {
    "small": Size("e2former_v2_small", 64, 2.5e-3, 100, 16, 2000),
    "medium": Size("e2former_v2_medium", 192, 1e-3, 1024, 32, 30_000),
    "large": Size("e2former_v2_omol25_conserving", 10**9, 4e-4, 1024, 32, 100_000),
}
#: Fewest and most epochs, whatever the number of steps.
EPOCHS = (20, 200)
#: Training batches an epoch has at least: a dozen frames are not one batch.
BATCHES = 8
EVALUATIONS = 20
CHECKPOINTS = 20
#: Steps between checkpoints, at least: one takes as long as some steps.
APART = 50
#: Structures that are kept decoded in memory, in atoms.
IN_MEMORY_ATOMS = 2_000_000
#: Fine-tuning: factors of the learning rate and of the number of steps.
GENTLER = 0.2
SHORTER = 0.5


def size_of(channels: int) -> Size:
    """The size whose training suits a checkpoint's network of so many channels."""
    return next(size for size in SIZES.values() if channels <= size.channels)


def choose(size: Size, structures: int, atoms: int, fine_tune: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the run's keys for a training set of so many structures and atoms. given: keys that are chosen."""
    batch = max(1, min(size.structures, round(size.atoms * structures / atoms), structures // BATCHES))
    batch = integer("batch_size", given.get("batch_size", batch), 1)
    per_epoch = -(-structures // batch)
    wanted = size.steps * (SHORTER if fine_tune else 1)
    epochs = min(max(round(wanted / per_epoch), EPOCHS[0]), EPOCHS[1])
    every = max(1, epochs // EVALUATIONS)
    epochs -= epochs % every  # the last epoch is evaluated, and others at the same distance
    epochs = integer("epochs", given.get("epochs", epochs), 1)
    every = max(1, epochs // EVALUATIONS)
    steps = epochs * per_epoch
    metrics = 10 if steps >= 200 else 1
    return {
        "epochs": epochs,
        "batch_size": batch,
        "lr": size.lr * (GENTLER if fine_tune else 1),
        "warmup_steps": min(max(steps // 20, 1), 1000),
        "ema_decay": ema_decay(steps),
        "evaluate_every": every,
        "checkpoint_every": max(steps // CHECKPOINTS // metrics * metrics, APART),
        "metrics_every": metrics,
    }


def ema_decay(steps: int) -> float:
    """Decay of the averaged weights: they look back over a fifteenth of the training, where the rate is near its end.

    60 steps: 0.75; 1,500: 0.99; from 15,000 on 0.999. A longer memory keeps weights of the beginning.
    """
    return round(1 - max(min(15 / steps, 0.5), 1e-3), 6)


def parse(overrides: Sequence[str]) -> dict[str, Any]:
    """Values of `KEY=VALUE` by key, nested where a key has dots; numbers and lists as YAML writes them.

    Raises:
        ValueError: not so.
    """
    values = OmegaConf.create()
    for override in overrides:
        key, separator, _ = override.partition("=")
        try:
            if not separator or not key or key[0] in "+~-":
                raise ValueError("that is something else")
            values.merge_with_dotlist([override])
        except (OmegaConfBaseException, ValueError) as err:
            raise ValueError(
                f"expected KEY=VALUE, as in lr=1e-3 or backbone.cutoff=5, got {override!r} ({err})"
            ) from err
    return OmegaConf.to_container(values, resolve=False)


def with_overrides(content: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The run's file with these values in it; names of a backbone or of heads choose those config groups."""
    groups = {key: given[key] for key in GROUPS if isinstance(given.get(key), str)}
    defaults = [
        next(({key: groups[key]} for key in groups if isinstance(entry, dict) and key in entry), entry)
        for entry in content["defaults"]
    ]
    rest = {key: value for key, value in given.items() if key not in groups}
    merged = OmegaConf.merge({key: value for key, value in content.items() if key != "defaults"}, rest)
    return {"defaults": defaults} | OmegaConf.to_container(merged, resolve=False)


def write(path: Path, content: Mapping[str, Any], comments: Sequence[str]) -> None:
    """Write the run's file, comments first."""
    text = "".join(f"# {line}\n" for line in comments)
    path.write_text(text + "\n" + OmegaConf.to_yaml(OmegaConf.create(dict(content))))
