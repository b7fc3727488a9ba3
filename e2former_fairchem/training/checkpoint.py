"""Reading inference checkpoints: checked, for evaluation, and as a start for fine-tuning or a second stage."""

from __future__ import annotations

import copy
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from fairchem.core.units.mlip_unit.mlip_unit import UNIT_INFERENCE_CHECKPOINT, MLIPTrainEvalUnit
from fairchem.core.units.mlip_unit.utils import load_inference_model
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader

from e2former_fairchem import weights
from e2former_fairchem.backbone import E2FormerV2Backbone
from e2former_fairchem.training.card import trainings

BACKBONE = "e2former_fairchem.backbone.E2FormerV2Backbone"
BACKBONE_NAMES = (BACKBONE, "e2former_v2")
_HEADS = "output_heads."
# Checkpoints of earlier versions have none, and load as such; of states a model's own state has none.
_RECORD, _STATES = "backbone.elements_seen", "backbone.states_seen"


def _kind_of(path: Path) -> str:
    """What a file is that is no archive of torch's, by its first bytes."""
    with path.open("rb") as handle:
        head = handle.read(24)
    if not head:
        return "which is empty"
    if head.startswith(b"PK"):
        return "which is cut off: the file of an interrupted copy or download"
    if len(head) > 8 and head[8:9] == b"{":
        return f"a safetensors file; convert it: e2former-fairchem safetensors {path} -o OUT.pt"
    if head[16:20] in (b"\xde\xc0\xef\xbe", b"\xbe\xef\xc0\xde"):
        return "an LMDB database, which belongs to a data set"
    return f"which starts with {head[:8]!r}"


def check_checkpoint_path(location: str | Path, key: str = "checkpoint") -> Path:
    """Check that `location` is a file that torch wrote, without reading it.

    Args:
        location: path of an inference checkpoint, or the name of a potential that comes with the package.
        key: config key that holds it, for the message.

    Returns:
        The path, absolute.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder, or a file of another kind.
    """
    path = Path(location).expanduser().absolute()
    if not path.exists() and str(location) in weights.names():
        path = Path(weights.pretrained(str(location)))
    if path.is_dir():
        inner = path / UNIT_INFERENCE_CHECKPOINT
        hint = f"; did you mean {inner}?" if inner.is_file() else ""
        raise ValueError(f"{key}: expected the file of an inference checkpoint, got the folder {path}{hint}")
    if not path.is_file():
        raise FileNotFoundError(
            f"{key}: expected an inference checkpoint's file or one of {', '.join(weights.names())}, got {path}, which "
            "does not exist"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{key}: expected an inference checkpoint (a file written by torch.save), got {path}, {_kind_of(path)}"
        )
    return path


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = [str(k) for k in content]
        listed = ", ".join(keys[:6]) + (", ..." if len(keys) > 6 else "")
        inner = content.get("model")
        if isinstance(inner, Mapping) and any(str(k).startswith("decoder.") for k in inner):
            return f"a MolFM checkpoint (keys {listed}), which e2former_fairchem.interop.molfm reads"
        return f"a dictionary with the keys {listed}"
    return f"an object of type {type(content).__module__}.{type(content).__qualname__}"


def read_checkpoint(
    location: str | Path, *, key: str = "checkpoint", any_backbone: bool = False
) -> MLIPInferenceCheckpoint:
    """Read a fairchem inference checkpoint and check that it holds an E2Former-V2.

    The file is unpickled, as fairchem does it: open only files that you trust.

    Args:
        location: path of the checkpoint.
        key: config key that holds it, for the messages.
        any_backbone: accept checkpoints of other fairchem models, for comparisons.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not a fairchem inference checkpoint, or one of another backbone.
    """
    path = check_checkpoint_path(location, key)
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as err:  # pickles of foreign code fail in any way
        raise ValueError(
            f"{key}: expected a fairchem inference checkpoint, got {path}, which cannot be unpickled here: "
            f"{type(err).__name__}: {err}"
        ) from err
    if not isinstance(content, MLIPInferenceCheckpoint):
        raise ValueError(f"{key}: expected a fairchem inference checkpoint, got {path} with {_describe(content)}")
    backbone = (content.model_config.get("backbone") or {}).get("model")
    if not any_backbone and backbone not in BACKBONE_NAMES:
        raise ValueError(f"{key}: expected a checkpoint with the backbone {BACKBONE}, got {backbone} in {path}")
    return content


def load_for_evaluation(
    checkpoint_location: str, overrides: dict | None = None, any_backbone: bool = False
) -> nn.Module:
    """The model of a checkpoint with its averaged (EMA) weights, for `MLIPEvalUnit`.

    Args:
        checkpoint_location: path of an inference checkpoint.
        overrides: changes of the model's config, e.g. `{backbone: {kernel_backend: reference}}`.
        any_backbone: see `read_checkpoint`.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`.
    """
    checkpoint = read_checkpoint(checkpoint_location, any_backbone=any_backbone)
    if overrides is not None:
        overrides = OmegaConf.to_container(OmegaConf.create(overrides), resolve=True)
    return load_inference_model(
        checkpoint_location,
        overrides=overrides,
        use_ema=True,
        return_checkpoint=False,
        preloaded_checkpoint=checkpoint,
    )


def resume_without_record(unit: MLIPTrainEvalUnit) -> None:
    """Let a run of an earlier version, whose checkpoints hold no record of the elements seen, go on without one.

    Args:
        unit: after `load_state`, which only notes where the state lies.
    """
    models = [model for model in (unit.model, unit.ema_model) if model is not None]
    backbones = [m for model in models for m in model.modules() if isinstance(m, E2FormerV2Backbone)]
    if not backbones or unit.lazy_state_location is None:
        return
    stored = FileSystemReader(unit.lazy_state_location).read_metadata().state_dict_metadata
    if not any(name.endswith(_RECORD) for name in stored):
        for backbone in backbones:
            backbone.forget_elements()


def read_tasks(location: str | Path, any_backbone: bool = False) -> list[dict[str, Any]]:
    """Configs of the tasks that a checkpoint was trained with: its own normalisers and element references.

    Raises:
        FileNotFoundError, ValueError: see `read_checkpoint`; also when the file holds no list of tasks.
    """
    checkpoint = read_checkpoint(location, any_backbone=any_backbone)
    tasks = OmegaConf.to_container(OmegaConf.create(checkpoint.tasks_config), resolve=True)
    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"checkpoint: expected {location} to hold a list of tasks, got {type(tasks).__name__}")
    return tasks


def _averaged_weights(checkpoint: MLIPInferenceCheckpoint) -> dict[str, Tensor]:
    """The EMA weights, or the plain ones where there are none; prefixes of the wrappers removed."""
    averaged = checkpoint.ema_state_dict or checkpoint.model_state_dict
    return {k.replace("module.", ""): v for k, v in averaged.items() if k != "n_averaged"}


def _match_heads(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for heads that may have other names: of the given tensors the one with the same inner name and shape."""
    found = {}
    for name, tensor in wanted.items():
        if name in given and given[name].shape == tensor.shape:
            found[name] = given[name]
            continue
        inner = name.split(".", 2)[2]
        same = [k for k in given if k.split(".", 2)[2] == inner and given[k].shape == tensor.shape]
        if len(same) == 1:
            found[name] = given[same[0]]
    return found


def initialize_from_checkpoint(
    checkpoint_location: str,
    backbone: dict | None = None,
    heads: dict | None = None,
) -> nn.Module:
    """A model to train on, started from a checkpoint's averaged weights.

    Unlike fairchem's `initialize_finetuning_model` it takes the EMA weights, and new heads keep every weight that fits:
    from the first stage (energy and direct force head) to the second (conserving forces) the energy head is carried
    over, so that the energy does not jump. The model's attribute ``trained_before`` has what the checkpoint's card
    says, for the card of the next one.

    Args:
        checkpoint_location: path of an inference checkpoint of an E2Former-V2.
        backbone: keys that replace the checkpoint's, e.g. `{direct_forces: false}`; the weights must still fit.
        heads: heads of the new model by name, with `module`; None keeps those of the checkpoint.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a foreign checkpoint, or weights that do not fit the backbone.
    """
    key = "checkpoint"
    checkpoint = read_checkpoint(checkpoint_location, key=key)
    config = OmegaConf.to_container(OmegaConf.create(copy.deepcopy(checkpoint.model_config)), resolve=True)
    if backbone is not None:
        config["backbone"] |= OmegaConf.to_container(OmegaConf.create(backbone), resolve=True)
    if heads is not None:
        config["heads"] = OmegaConf.to_container(OmegaConf.create(heads), resolve=True)

    model = hydra.utils.instantiate(config)
    target, source = model.state_dict(), _averaged_weights(checkpoint)
    own = {k: v for k, v in target.items() if not k.startswith(_HEADS)}
    theirs = {k: v for k, v in source.items() if not k.startswith(_HEADS)}
    misfits = [f"{k} is missing" for k in own.keys() - theirs.keys() - {_RECORD}]
    misfits += [f"{k} is unknown" for k in theirs.keys() - own.keys() - {_STATES}]
    misfits += [
        f"{k} has the shape {tuple(theirs[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own.keys() & theirs.keys()
        if own[k].shape != theirs[k].shape
    ]
    if misfits:
        raise ValueError(
            f"{key}: expected {checkpoint_location} to fit the backbone's configuration, got "
            f"{len(misfits)} tensors that do not: {'; '.join(sorted(misfits)[:5])}"
        )
    head_weights = _match_heads(
        {k: v for k, v in target.items() if k.startswith(_HEADS)},
        {k: v for k, v in source.items() if k.startswith(_HEADS)},
    )
    model.load_state_dict(theirs | head_weights, strict=False)
    model.trained_before = trainings(checkpoint, Path(checkpoint_location).stem)
    model.backbone.begin_anew()
    fresh = sorted(k for k in target if k.startswith(_HEADS) and k not in head_weights)
    logging.info("started from %s; new weights: %s", checkpoint_location, ", ".join(fresh) or "none")
    # fairchem's unit writes this into resume.yaml, so that resuming does not need the first checkpoint any more.
    model.finetune_model_full_config = OmegaConf.create(config)
    return model
