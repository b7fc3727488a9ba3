"""Resume configs that go with their folder: RUN_DIR/TIMESTAMP/checkpoints/NAME/resume.yaml may be moved as a whole.

fairchem writes absolute paths. What lies in the run's folder is named by `${job.run_dir}` here, and where that folder
and the checkpoint are is found when the file is composed: `${e2former.resume:KEY,RECORDED}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch.distributed.checkpoint import FileSystemReader

#: torch writes it last: a folder with this file is a whole checkpoint.
METADATA = ".metadata"


def _quote(text: str) -> str:
    """A string as an argument of a resolver."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _in_run_dir(node: Any, run_dir: str) -> Any:
    """The same with every path inside `run_dir` named by `${job.run_dir}`."""
    if isinstance(node, dict):
        return {key: _in_run_dir(value, run_dir) for key, value in node.items()}
    if isinstance(node, list):
        return [_in_run_dir(value, run_dir) for value in node]
    if isinstance(node, str) and (node == run_dir or node.startswith(f"{run_dir}/")):
        return "${job.run_dir}" + node[len(run_dir) :]
    return node


def _check_data(node: Any, key: str, check: str = "dataset") -> Any:
    """The same with a check of every data set's path, under the key that names it in the resumed run.

    check: the resolver for paths of the format that the nearest data set has.
    """
    if not isinstance(node, dict):
        return node
    if str(node.get("format", "")).endswith(".PackedDataset"):
        check = "folder"
    found = {}
    for name, value in node.items():
        place = f"{key}.{name}" if key else str(name)
        if name == "src" and ".splits." in key and isinstance(value, str):
            found[name] = f"${{e2former.{check}:{_quote(place)},{_quote(value)}}}"
        else:
            found[name] = _check_data(value, place, check)
    return found


def make_movable(file: Path, checkpoint: Path) -> None:
    """Rewrite the `resume.yaml` of a checkpoint that will lie at `checkpoint`."""
    config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    job = config["job"]
    run_dir = job["run_dir"]
    runner = _check_data(_in_run_dir(config["runner"], run_dir), "runner")
    unit = runner.get("train_eval_unit")
    if isinstance(unit, dict) and "job_config" in unit:
        unit["job_config"] = "${job}"  # a copy of its own would keep the old paths
    recorded = {"run_dir": run_dir, "timestamp_id": job["timestamp_id"], "runner_state_path": str(checkpoint)}
    job |= {key: f"${{e2former.resume:{key},{_quote(value)}}}" for key, value in recorded.items()}
    job["metadata"] = None  # fairchem makes it from the others
    OmegaConf.save(OmegaConf.create(config | {"runner": runner}), file)


def resume(config_folder: Path | None, key: str, recorded: str) -> str:
    """Where a resumed run finds its checkpoint and goes on: as the config's folder lies now, else as it was recorded.

    Args:
        config_folder: of the config that is composed.
        key: `run_dir`, `timestamp_id` or `runner_state_path`.
        recorded: its value when the checkpoint was written.

    Raises:
        FileNotFoundError: the checkpoint, or the run's folder, is at neither place.
        ValueError: the checkpoint is damaged.
    """
    beside = config_folder is not None and (config_folder / METADATA).is_file()
    if key == "runner_state_path":
        for folder in (config_folder if beside else None, Path(recorded)):
            if folder is not None and (folder / METADATA).is_file():
                check_state(folder)
                return str(folder)
        raise FileNotFoundError(
            f"job.{key}: expected a checkpoint beside the config in {config_folder} or in {recorded}, got none with "
            f"{METADATA}; to name its folder and the run's: job.{key}=FOLDER job.run_dir=FOLDER"
        )
    if beside and config_folder.parent.name == "checkpoints":
        run = config_folder.parents[1]
        return str(run.parent) if key == "run_dir" else run.name
    if beside and key == "run_dir" and not Path(recorded).is_dir():
        raise FileNotFoundError(
            f"job.run_dir: expected the run's folder, with the checkpoint in TIMESTAMP/checkpoints, or {recorded}, "
            f"which does not exist, got {config_folder}; to name where the run goes on: job.run_dir=FOLDER"
        )
    return recorded


def check_state(location: str | Path) -> None:
    """Check that a folder holds a whole checkpoint of a run, as far as the sizes of its files tell.

    Raises:
        FileNotFoundError: it is no checkpoint's.
        ValueError: a file of the checkpoint is missing or cut off.
    """
    folder = Path(location)
    if not (folder / METADATA).is_file():
        got = "a folder without" if folder.is_dir() else "no folder"
        raise FileNotFoundError(
            f"job.runner_state_path: expected a checkpoint's folder with {METADATA}, got {location} ({got}); where it "
            "was moved: job.runner_state_path=FOLDER"
        )
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data
    except Exception as err:  # a pickle that ends early fails in any way
        raise ValueError(
            f"job.runner_state_path: expected a checkpoint of torch's, got {folder / METADATA}, which cannot be read: "
            f"{type(err).__name__}: {err}"
        ) from err
    needed: dict[str, int] = {}
    for part in stored.values():
        needed[part.relative_path] = max(needed.get(part.relative_path, 0), part.offset + part.length)
    for name, size in needed.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found < size:
            raise ValueError(
                f"job.runner_state_path: expected {size} bytes in {folder / name}, got {found}: the checkpoint is not "
                "whole; resume from another one"
            )
