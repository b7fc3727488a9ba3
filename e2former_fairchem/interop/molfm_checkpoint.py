"""The authors' weights as a fairchem inference checkpoint."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from fairchem.core.units.mlip_unit.api.inference import UMATask
from torch import Tensor

from e2former_fairchem.data.references import NUM_ELEMENTS, read_element_references
from e2former_fairchem.interop.checkpoint_file import make_checkpoint, read_tensors, write_checkpoint
from e2former_fairchem.interop.molfm_config import MolFMConfig, parse_molfm_config, parse_release
from e2former_fairchem.interop.molfm_model import build_from_molfm, molfm_model_config
from e2former_fairchem.interop.molfm_weights import unused_keys
from e2former_fairchem.interop.references import element_references, elements_of
from e2former_fairchem.training.card import versions

__all__ = ["ConversionReport", "convert_molfm_checkpoint", "read_molfm_weights"]

HYDRA_MODEL = "e2former_fairchem.hydra_model.E2FormerV2HydraModel"
DEFAULT_RELEASE = "v1.5"
# The authors' weights of energy and force losses (docs/network.md, section 15.4, release v2), for whoever trains on.
_LOSS_WEIGHTS = {True: (10.0, 10.0), False: (4.0, 30.0)}
_UNIT = "fairchem.core.units.mlip_unit.mlip_unit"
_LOSS = "fairchem.core.modules.loss"
_NORMALIZATION = "fairchem.core.modules.normalization"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Args:
        destination: the file written.
        head: what was read.
        release: of it.
        task: name under which fairchem knows the model's task.
        conserving: forces are the energy's gradient.
        parameters: numbers in the converted network.
        unused: keys of the weights that are known and not needed.
        elements: symbols with an element reference; the energy of a structure with another element is NaN.
        unit: eV of one unit of the network's output.
    """

    destination: Path
    head: str
    release: str
    task: str
    conserving: bool
    parameters: int
    unused: tuple[str, ...]
    elements: tuple[str, ...]
    unit: float


def convert_molfm_checkpoint(
    source: str | Path,
    config: str | Path | Mapping[str, Any],
    destination: str | Path,
    *,
    head: str | None = None,
    release: str = DEFAULT_RELEASE,
    task: str | None = None,
    references: str | Path | None = None,
) -> ConversionReport:
    """Write the authors' weights as a fairchem inference checkpoint.

    The checkpoint predicts total energies: network + element references, in eV; forces in eV/Å.

    Args:
        source: a released torch file (its entry ``model`` is the state dict), read without running code from it, or the
            state dict as ``.safetensors``.
        config: the flattened MolFM YAML, a file or its content.
        destination: the file to write, a checkpoint, or the same as ``.safetensors`` where that is its suffix; complete
            or not at all.
        head: data set whose heads to use; by default ``omol25``, or the only one there is.
        release: ``v1.5`` or ``v2``, which compute different functions of the same weights (docs/network.md, section
            14).
        task: name of fairchem's task, ``omol`` by default (``oc20`` for the head of that name).
        references: element references, ``none`` or a JSON file, instead of those of the head.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: something cannot be read or is not implemented.
        StateDictError: names every missing, misshapen and unknown key.
    """
    settings = read_molfm_config(config)
    parse_release(release)
    try:
        parsed = parse_molfm_config(settings, release)
    except (TypeError, ValueError) as err:
        raise ValueError(f"config: {err}" if isinstance(config, Mapping) else f"config: {config}: {err}") from err
    head = _choose_head(head, parsed)
    task = _choose_task(task, head)
    table = _choose_references(references, head)
    state_dict = read_molfm_weights(source)
    unused = unused_keys(state_dict, head=head, datasets=parsed.datasets, conserving=parsed.conserving)
    before = torch.get_default_dtype()
    torch.set_default_dtype(_precision(tensor for key, tensor in state_dict.items() if key not in set(unused)))
    try:
        model = build_from_molfm(settings, state_dict, release=release, head=head)
    finally:
        torch.set_default_dtype(before)
    checkpoint = make_checkpoint(
        model_config={"_target_": HYDRA_MODEL, **molfm_model_config(parsed, prefix=task)},
        weights=model.state_dict(),
        tasks=_tasks(task, table, parsed),
        card={"data": f"the authors' weights (MolFM {release}), head {head}", "versions": versions()},
    )
    path = write_checkpoint(checkpoint, destination)
    return ConversionReport(
        destination=path,
        head=head,
        release=release,
        task=task,
        conserving=parsed.conserving,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        unused=tuple(unused),
        elements=tuple(elements_of(table)),
        unit=parsed.unit,
    )


def read_molfm_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The flattened MolFM YAML, a file or its content, as a dictionary.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    if isinstance(config, Mapping):
        return dict(config)
    path = Path(config).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"config: expected the flattened MolFM YAML, got {path}, which does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        said = " ".join(str(err).split())
        raise ValueError(
            f"config: expected the flattened MolFM YAML, got {path}, which cannot be read: {said}"
        ) from err
    if not isinstance(content, dict):
        raise ValueError(f"config: expected keys and values in {path}, got {type(content).__name__}")
    return content


def read_molfm_weights(source: str | Path) -> dict[str, Tensor]:
    """The state dict of a released file: its entry ``model``, or all of a ``.safetensors`` file, on the CPU.

    Nothing but tensors and plain containers is unpickled (``weights_only=True``).

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights: expected a file with the authors' weights, got {path}, which does not exist")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        if not zipfile.is_zipfile(path):
            raise ValueError(f"weights: expected a file written by torch.save, got {path}: {err}") from err
        raise ValueError(
            f"weights: expected nothing but tensors and plain containers in {path}, got objects that only the authors' "
            "code can restore. If you trust them, load it where that does no harm and save "
            f"{{'model': content['model']}} in a file of its own. torch says: {err}"
        ) from err
    except (EOFError, RuntimeError, OSError) as err:
        raise ValueError(f"weights: expected a file written by torch.save, got {path}: {err}") from err
    state_dict = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"weights: expected an entry 'model' with the state dict in {path}, got {keys}")
    return dict(state_dict)


def _precision(tensors: Iterable[Tensor]) -> torch.dtype:
    """Single precision where it holds every number exactly."""
    exact = all(torch.equal(t.float().to(t.dtype), t) for t in tensors if t.is_floating_point())
    return torch.float32 if exact else torch.float64


def _choose_head(head: str | None, parsed: MolFMConfig) -> str:
    if head is not None:
        return head  # build_from_molfm checks it
    if "omol25" in parsed.datasets or len(parsed.datasets) != 1:
        return "omol25"
    return parsed.datasets[0]


def _choose_task(task: str | None, head: str) -> str:
    if task is None:
        return UMATask.OC20.value if head == "oc20" else UMATask.OMOL.value
    if not task.isidentifier():
        raise ValueError(f"task: expected letters, digits and underscores, got {task!r}")
    return task


def _choose_references(references: str | Path | None, head: str) -> list[float]:
    if references is None:
        return element_references(head)
    if str(references) == "none":
        return [0.0] * (NUM_ELEMENTS + 1)
    return read_element_references(references)


def _tasks(task: str, references: list[float], parsed: MolFMConfig) -> list[dict[str, Any]]:
    """Energy and forces as fairchem's trainer describes them, with the authors' losses."""
    energy_weight, force_weight = _LOSS_WEIGHTS[parsed.conserving]
    normalizer = {"_target_": f"{_NORMALIZATION}.normalizer.Normalizer", "mean": 0.0, "rmsd": parsed.unit}
    energy = {
        "_target_": f"{_UNIT}.Task",
        "name": f"{task}_energy",
        "level": "system",
        "property": "energy",
        "loss_fn": {
            "_target_": f"{_LOSS}.DDPMTLoss",
            "loss_fn": {"_target_": f"{_LOSS}.PerAtomMAELoss"},
            "coefficient": energy_weight,
        },
        "out_spec": {"dim": [1], "dtype": "float32"},
        "normalizer": dict(normalizer),
        "element_references": {
            "_target_": "e2former_fairchem.training.references.ElementAndChargeReferences",
            "element_references": {"_target_": "torch.DoubleTensor", "_args_": [references]},
        },
        "datasets": [task],
        "metrics": ["mae", "per_atom_mae"],
    }
    forces = {
        "_target_": f"{_UNIT}.Task",
        "name": f"{task}_forces",
        "level": "atom",
        "property": "forces",
        "train_on_free_atoms": True,
        "eval_on_free_atoms": True,
        "loss_fn": {
            "_target_": f"{_LOSS}.DDPMTLoss",
            "loss_fn": {"_target_": f"{_LOSS}.L2NormLoss"},
            "reduction": "mean",
            "coefficient": force_weight,
        },
        "out_spec": {"dim": [3], "dtype": "float32"},
        "normalizer": dict(normalizer),
        "datasets": [task],
        "metrics": ["mae", "cosine_similarity", "magnitude_error"],
    }
    return [energy, forces]
