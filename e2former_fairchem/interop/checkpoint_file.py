"""Inference checkpoints as files: fairchem's pickle, and the same content as safetensors.

fairchem reads pickles, which may run any code. A safetensors file holds the weights and, as JSON, the configuration;
importing one accepts this package's and fairchem's own classes and nothing else.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from e2former_fairchem.files import replacing
from e2former_fairchem.training.card import read_card, set_card
from e2former_fairchem.training.checkpoint import read_checkpoint

__all__ = ["export_safetensors", "import_safetensors", "make_checkpoint", "read_tensors", "write_checkpoint"]

FORMAT = "e2former-fairchem inference checkpoint"
VERSION = 1
SUFFIX = ".safetensors"
# What a configuration may name. Whole names: a dotted path reaches whatever a module has imported.
_ALLOWED = re.compile(
    r"""e2former_v2(_\w+)?                                      # registered short names
    |e2former_fairchem\.(hydra_model|backbone|heads|training\.(losses|references))\.[A-Z]\w*
    |fairchem\.core\.models\.base\.HydraModel(V2)?
    |fairchem\.core\.models\.uma\.escn_md\.\w+_Head
    |fairchem\.core\.modules\.loss\.\w+Loss
    |fairchem\.core\.modules\.normalization\.(normalizer\.Normalizer|element_references\.(Element|Linear)References)
    |fairchem\.core\.units\.mlip_unit\.mlip_unit\.(Task|OutputSpec)
    |torch\.(Double|Float)?Tensor|torch\.tensor""",
    re.VERBOSE,
)
_NAMES = ("_target_", "model", "module")


def make_checkpoint(
    model_config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tasks: Sequence[Any],
    n_averaged: int = 1,
    card: Mapping[str, Any] | None = None,
) -> MLIPInferenceCheckpoint:
    """An inference checkpoint as fairchem's trainer writes it; the averaged (EMA) weights are the weights.

    Args:
        model_config: what ``hydra.utils.instantiate`` builds the model from.
        weights: its state dict.
        tasks: configurations of fairchem's tasks.
        n_averaged: fairchem cannot load a checkpoint without this counter.
        card: see `e2former_fairchem.training.card`.
    """
    made = MLIPInferenceCheckpoint(
        model_config=dict(model_config),
        model_state_dict=dict(weights),
        ema_state_dict={"n_averaged": torch.tensor(n_averaged), **{f"module.{k}": v for k, v in weights.items()}},
        tasks_config=OmegaConf.create(list(tasks)),
    )
    set_card(made, card or {})
    return made


def write_checkpoint(checkpoint: MLIPInferenceCheckpoint, destination: str | Path) -> Path:
    """Write a checkpoint, as safetensors where the destination ends in ``.safetensors``; complete or not at all.

    Returns:
        The absolute path.

    Raises:
        ValueError: the destination is a folder.
    """
    path = Path(destination).expanduser().absolute()
    if path.is_dir():
        raise ValueError(f"destination: expected the name of a file to write, got the folder {path}")
    if path.suffix != SUFFIX:
        with replacing(path) as handle:
            torch.save(checkpoint, handle)
        return path
    weights = {k.removeprefix("module."): v for k, v in checkpoint.ema_state_dict.items() if k != "n_averaged"}
    content = {
        "model_config": _plain(checkpoint.model_config),
        "tasks_config": _plain(checkpoint.tasks_config),
        "n_averaged": int(checkpoint.ema_state_dict["n_averaged"]),
        "card": read_card(checkpoint),
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "content": json.dumps(content)}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    with replacing(path) as handle:
        save_file(tensors, handle.name, metadata)
    return path


def export_safetensors(source: str | Path, destination: str | Path) -> Path:
    """Write the averaged weights, configuration and tasks of an inference checkpoint as safetensors.

    Args:
        source: a checkpoint of an E2Former-V2. It is unpickled, as fairchem does it: whoever exports trusts the file,
            whoever imports need not.
        destination: the file to write.

    Returns:
        Its absolute path.

    Raises:
        FileNotFoundError: there is no source.
        ValueError: it is something else.
    """
    path = Path(destination)
    if path.suffix != SUFFIX:
        raise ValueError(f"destination: expected a name that ends in {SUFFIX}, got {path}")
    return write_checkpoint(read_checkpoint(source, key="source"), path)


def import_safetensors(source: str | Path, destination: str | Path) -> Path:
    """Write a fairchem inference checkpoint from a safetensors file of :func:`export_safetensors`; no code is run.

    Args:
        source: the safetensors file.
        destination: the checkpoint to write.

    Returns:
        Its absolute path.

    Raises:
        FileNotFoundError: there is no source.
        ValueError: not such a file, a later version, or a configuration that names classes of other packages, or of
            ours that read files.
    """
    path = Path(source).expanduser()
    if Path(destination).suffix == SUFFIX:
        raise ValueError(f"destination: expected the name of a checkpoint to write, got {destination}")
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"source: expected the format {FORMAT!r} in {path}'s metadata, got {metadata.get('format')!r}")
    if int(metadata.get("version", 0)) > VERSION:
        raise ValueError(f"source: expected version {VERSION} or earlier in {path}, got {metadata['version']}")
    content = json.loads(metadata["content"])
    for key, name in _named((content["model_config"], content["tasks_config"])):
        if not _ALLOWED.fullmatch(name):
            raise ValueError(
                f"source: expected classes of e2former_fairchem and fairchem's models in {path}, got {key}: {name}"
            )
    checkpoint = make_checkpoint(
        content["model_config"],
        tensors,
        content["tasks_config"],
        n_averaged=int(content["n_averaged"]),
        card=content.get("card"),
    )
    written = write_checkpoint(checkpoint, destination)
    logging.info("wrote %s from %s", written, path)
    return written


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a safetensors file, got {path}, which does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as err:
        raise ValueError(f"expected a safetensors file, got {path}: {err}") from err


def _plain(config: Any) -> Any:
    """Without OmegaConf, interpolations resolved."""
    return OmegaConf.to_container(OmegaConf.create(config), resolve=True)


def _named(config: Any) -> Iterator[tuple[str, str]]:
    """Everything that a configuration names to be imported: (key, name)."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key in _NAMES and isinstance(value, str):
                yield key, value
            yield from _named(value)
    elif isinstance(config, str):
        if "${" in config:
            yield "an interpolation, which may read files", config
    elif isinstance(config, Sequence):
        for value in config:
            yield from _named(value)
