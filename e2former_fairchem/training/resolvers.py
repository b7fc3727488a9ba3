"""OmegaConf resolvers `${e2former.*}` of our configs. They run while the config is composed, before any heavy work.

| resolver | value |
|---|---|
| `${e2former.device:}` | `CUDA` where torch finds a GPU, else `CPU` |
| `${e2former.workers:}` | number of GPUs that torch finds, at least 1 |
| `${e2former.loaders:8}` | processes that load data: so many where torch finds a GPU, else 0 |
| `${e2former.sample:train}` | folder of a part of the bundled sample: `train`, `val_known` or `val_new` |
| `${e2former.element_references:NAME}` | energies per element, eV by Z: `sample`, `omol25`, `spice` or a JSON file |
| `${e2former.integer:KEY,VALUE,LEAST}` | VALUE, after a check that it is such an integer; KEY is named in the message |
| `${e2former.number:KEY,VALUE}` | VALUE, after a check that it is a number of at least 0 |
| `${e2former.positive:KEY,VALUE}` | VALUE, after a check that it is a number above 0 |
| `${e2former.boolean:KEY,VALUE}` | VALUE, after a check that it is true or false |
| `${e2former.dataset:KEY,PATH}` | PATH, absolute, after a check that it is a data set |
| `${e2former.folder:KEY,PATH}` | PATH, absolute, after a check that it is a folder with .npz files |
| `${e2former.at_most:KEY,NUMBER,DATA_KEY,PATH}` | NUMBER, or with a word the size of the data set, if smaller |
| `${e2former.checkpoint:KEY,PATH}` | PATH, absolute, after a check that it is an inference checkpoint |
| `${e2former.resume:KEY,RECORDED}` | `job.KEY` of a resumed run, as the composed config's folder lies now |
| `${e2former.tasks:PATH,ANY}` | configs of the tasks in the inference checkpoint PATH; ANY: also of other backbones |
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import ListConfig, OmegaConf

from e2former_fairchem.training.arguments import boolean, integer, number, positive
from e2former_fairchem.training.resume import resume

DATA = Path(__file__).resolve().parents[1] / "data"
SAMPLE_PARTS = ("train", "val_known", "val_new")


def device() -> str:
    """`CUDA` where torch finds a GPU in this process, else `CPU`."""
    import torch

    return "CUDA" if torch.cuda.is_available() else "CPU"


def workers() -> int:
    """Number of processes that use this machine: one for each GPU, or one on the CPU."""
    import torch

    return max(1, torch.cuda.device_count())


def loaders(number: int) -> int:
    """``number`` where torch finds a GPU, which workers of the loader keep busy; 0 on a CPU, whose cores train."""
    import torch

    return number if torch.cuda.is_available() else 0


def sample(part: str) -> str:
    """Folder of a part of the bundled sample.

    Raises:
        ValueError: no such part.
    """
    if part not in SAMPLE_PARTS:
        raise ValueError(f"e2former.sample: expected one of {', '.join(SAMPLE_PARTS)}, got {part!r}")
    return str(DATA / "sample" / part)


def element_references(name: str) -> ListConfig:
    """Energies per element, eV, [119] by atomic number (0: per unit of charge), of a bundled table or a JSON file.

    Elements without one are NaN: training and evaluation refuse structures with them. `e2former-fairchem
    fit-references` makes such a file.

    Raises:
        FileNotFoundError: neither a bundled name nor a file.
        ValueError: the file holds something else.
    """
    from e2former_fairchem.data.references import BUNDLED, read_element_references

    if name not in BUNDLED and not str(name).endswith(".json"):
        raise ValueError(
            f"e2former.element_references: expected one of {', '.join(BUNDLED)} or a .json file, got {name!r}"
        )
    table = read_element_references(BUNDLED.get(name, Path(name).absolute()), key="element_references")
    # A plain list would not survive OmegaConf.resolve where one interpolation leads to another.
    return OmegaConf.create(table)


@functools.cache  # fairchem resolves a config about twenty times
def _check_dataset(key: str, path: Path) -> str:
    from e2former_fairchem.data.checks import check_dataset

    return check_dataset(key, str(path))


def dataset(key: str, path: str | Sequence[str] | None) -> str | ListConfig:
    """A data set's path or paths, absolute, after `data.checks.check_dataset`; `key` is the config key to name.

    Raises:
        ValueError: no path was given, or the data set is empty.
        FileNotFoundError: there is no data set.
    """
    if path is None:
        raise ValueError(f"{key}: expected a folder with a data set, got nothing; add {key}=FOLDER to the command line")
    if isinstance(path, list | tuple | ListConfig):
        return OmegaConf.create([_check_dataset(key, _absolute(p)) for p in path])
    return _check_dataset(key, _absolute(path))


def _absolute(path: str) -> Path:
    return Path(str(path)).expanduser().absolute()  # a folder named 2024 arrives as an integer


def folder(key: str, path: str | None) -> str:
    """The path of a folder of packed structures (`data.packed`), absolute.

    Raises:
        ValueError: no path was given.
        FileNotFoundError: there are no such files.
    """
    if path is None:
        raise ValueError(f"{key}: expected a folder with .npz files, got nothing; add {key}=FOLDER to the command line")
    found = _absolute(path)
    if not any(found.glob("*.npz")):
        raise FileNotFoundError(f"{key}: expected a folder with .npz files, got {found}")
    return str(found)


@functools.cache
def _at_most(key: str, wanted: int, data_key: str, paths: tuple[str, ...]) -> int:
    from e2former_fairchem.data.checks import count_structures

    size = sum(map(count_structures, paths))
    if wanted > size:
        logging.warning("%s: %d structures asked for, %s has %d; all of them are used", key, wanted, data_key, size)
    return min(wanted, size)


def at_most(key: str, wanted: int | None, data_key: str, path: str | Sequence[str] | None) -> int | None:
    """So many structures of a data set as are wanted and there; None (all) stays None.

    Raises:
        ValueError, FileNotFoundError: not a positive integer, or see `dataset`.
    """
    if wanted is None:
        return None
    wanted = integer(key, wanted, 1)
    checked = dataset(data_key, path)
    return _at_most(key, wanted, data_key, (checked,) if isinstance(checked, str) else tuple(checked))


def checkpoint(key: str, path: str | None) -> str:
    """A checkpoint's path, absolute, after `training.checkpoint.check_checkpoint_path`.

    Raises:
        ValueError: no path was given, or no checkpoint is there but something else.
        FileNotFoundError: nothing is there.
    """
    if path is None:
        raise ValueError(f"{key}: expected an inference checkpoint, got nothing; add {key}=FILE to the command line")
    from e2former_fairchem.training.checkpoint import check_checkpoint_path

    return str(check_checkpoint_path(path, key=key))


@functools.cache
def _read_tasks(path: str, any_backbone: bool) -> list:
    from e2former_fairchem.training.checkpoint import read_tasks

    return read_tasks(path, any_backbone)


def tasks(path: str | None, any_backbone: bool = False) -> ListConfig:
    """The tasks of a checkpoint, written out, so that what a run saves does not depend on that file any more.

    Raises:
        ValueError: no path was given, or what is there is not an inference checkpoint.
        FileNotFoundError: nothing is there.
    """
    return OmegaConf.create(_read_tasks(checkpoint("checkpoint", path), any_backbone))


def register_resolvers(config_folder: Path | None = None) -> None:
    """Register all of the above with OmegaConf, for a config of this folder."""
    OmegaConf.register_new_resolver("e2former.resume", functools.partial(resume, config_folder), replace=True)
    values = (integer, number, positive, boolean)
    for function in (
        device,
        workers,
        loaders,
        sample,
        folder,
        element_references,
        *values,
        dataset,
        at_most,
        checkpoint,
        tasks,
    ):
        OmegaConf.register_new_resolver(f"e2former.{function.__name__}", function, replace=True)
