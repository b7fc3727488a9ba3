"""Training on one's own structures, from files to the table of errors."""

from __future__ import annotations

import math
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from e2former_fairchem.data.make_sample import write_folder
from e2former_fairchem.data.references import dense_table, reference_energy
from e2former_fairchem.files import read_json, write_json
from e2former_fairchem.launch import launch, quietly
from e2former_fairchem.own_data import errors, run_file
from e2former_fairchem.own_data.checking import MAX_FORCE, describe, find_problems
from e2former_fairchem.own_data.reading import Frame, Keys, read_frames
from e2former_fairchem.own_data.references import fit_references, isolated_atoms, residuals, shift_references
from e2former_fairchem.own_data.splitting import split
from e2former_fairchem.training.checkpoint import check_checkpoint_path, read_checkpoint
from e2former_fairchem.training.resume import METADATA
from e2former_fairchem.validation import plain

CHECKPOINT = "inference_ckpt.pt"
SUMMARY = "data.json"
RESULTS = "table.json"
#: Smallest scale of labels, eV and eV/Å: relaxed structures have no forces to speak of.
LEAST_SCALE = 0.1
#: eV per atom, of a checkpoint's predictions: no network is so wrong where it is worth to start from.
FARTHEST = 20.0
#: Frames from which references are moved to another level of theory.
MAX_PREDICTED = 2000
#: What a resumed run's file has at the top.
_RESUMED = ("job", "runner")


@dataclass(frozen=True)
class Result:
    """A finished training: its folder, the inference checkpoint, and errors by data set."""

    folder: Path
    checkpoint: Path
    errors: dict[str, errors.Errors]


@quietly()
def train(
    *files: str | Path,
    output: str | Path | None = None,
    valid: str | Path | None = None,
    valid_fraction: float = 0.1,
    split_by: str | None = None,
    seed: int = 0,
    size: str | None = None,
    from_checkpoint: str | Path | None = None,
    keys: Keys | None = None,
    max_force: float = MAX_FORCE,
    skip_bad: bool = False,
    resume: bool = False,
    overrides: Sequence[str] = (),
) -> Result:
    """Train a conserving E2Former-V2 on structures in files that ASE reads, with fairchem's trainer.

    Writes `output`: data/train and data/val (ASE-LMDB), references.json, data.json (what was read and left out),
    train.yaml (`fairchem -c output/train.yaml` trains again), a folder of the run, inference_ckpt.pt and table.json.

    Args:
        files: with energies (eV) and forces (eV/Å), and stress (eV/Å^3) if it is to be trained.
        output: folder; by default runs/ and the first file's name.
        valid: file to validate on; else `valid_fraction` of the frames does.
        valid_fraction: share of the frames, drawn at random.
        split_by: draw groups instead: `composition`, or a key of the structures' info.
        seed: of the draw and of the network's first weights.
        size: `small` (the default), `medium` or `large`; a checkpoint has its own.
        from_checkpoint: inference checkpoint of an E2Former-V2 to fine-tune.
        keys: names of the labels, of charge and spin.
        max_force: eV/Å; frames with larger ones are bad.
        skip_bad: leave bad frames out instead of refusing them.
        resume: go on with the training in `output`, from its last checkpoint.
        overrides: `KEY=VALUE` of the run's file.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: wrong arguments, files, structures, keys; nothing stays behind.
    """
    if resume:
        if output is None and not files:
            raise ValueError("--resume: expected the training's folder, --output FOLDER, got none")
        folder = _folder(files, output)
        config = where_to_resume(folder, files)
        if fixed := [one for one in overrides if one.lstrip("+~").partition("=")[0].partition(".")[0] not in _RESUMED]:
            raise ValueError(
                f"--resume: expected no keys but those of {', '.join(_RESUMED)}, got {', '.join(fixed)}: a training "
                "goes on as it began"
            )
    else:
        folder = _folder(files, output)
        if size is not None and from_checkpoint is not None:
            raise ValueError("--size: expected none with --from, whose network has a size, got " + size)
        if size is not None and size not in run_file.SIZES:
            raise ValueError(f"--size: expected one of {', '.join(run_file.SIZES)}, got {size!r}")
        if not files:
            raise ValueError("expected at least one file with structures, got none")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"--output: {folder} is there already; --resume goes on with a training, another folder starts anew"
            )
        frames, held_out, bad = _read(files, valid, keys, max_force, skip_bad)
        training, validation = (frames, held_out) if valid else split(frames, valid_fraction, seed, split_by)
        prepared = _Prepared(folder, training, validation, bad, seed)
        config = prepared.write(size or "small", from_checkpoint, overrides, files)
        overrides = ()
    try:
        _run(config, overrides)
    except ValueError:  # a wrong key or value: nothing has been trained
        if not resume and not any(folder.glob(f"*/checkpoints/*/{METADATA}")):
            shutil.rmtree(folder)
        raise
    except SystemExit:  # a signal; fairchem's own command, which was just said, would go on without the table
        print(f"or: e2former-fairchem train --resume --output {shlex.quote(str(folder))}", flush=True)
        raise
    return _compare(folder)


def _folder(files: Sequence[str | Path], output: str | Path | None) -> Path:
    if output is None and files:
        output = Path("runs") / Path(files[0]).name.split(".")[0]
    return Path(output).expanduser().absolute() if output is not None else Path()


def _read(
    files: Sequence[str | Path], valid: str | Path | None, keys: Keys | None, max_force: float, skip_bad: bool
) -> tuple[list[Frame], list[Frame], list[Frame]]:
    """Frames to train on (and to draw from), frames to validate on, and bad ones, which are left out."""
    if valid and Path(valid).expanduser().resolve() in [Path(file).expanduser().resolve() for file in files]:
        raise ValueError(f"--valid: expected a file that is not trained on, got {valid}")
    frames = read_frames(files, keys)
    held_out = read_frames([valid], keys) if valid else []
    everything = [*frames, *held_out]
    find_problems(everything, max_force)
    bad = [frame for frame in everything if frame.problems]
    if bad:
        lines = describe(bad)
        listed = "\n  ".join(lines)
        count = f"{len(bad):,} of {len(everything):,} frames cannot be used"
        if not skip_bad:
            raise ValueError(f"{count} (numbers from 0); --skip-bad leaves them out:\n  {listed}")
        print(f"{count} and are left out (numbers from 0):\n  {listed}", flush=True)
    kept = [[frame for frame in part if not frame.problems] for part in (frames, held_out)]
    for part, what in zip(kept, ("to train on", "to validate on"), strict=True):
        if not part and (what == "to train on" or valid):
            raise ValueError(f"expected frames {what}, got none that can be used")
    _say_what_was_read([*kept[0], *kept[1]])
    return kept[0], kept[1], bad


def _say_what_was_read(frames: Sequence[Frame]) -> None:
    for label in ("energy", "forces", "stress"):
        names = Counter(frame.found[label] for frame in frames if label in frame.found)
        if len(names) > 1 or any(name != label for name in names):
            said = ", ".join(f"{name} ({number} frames)" for name, number in names.items())
            print(f"{label}: read from {said}", flush=True)
    for what in ("charge", "spin"):
        values = Counter(frame.assumed[what] for frame in frames if what in frame.assumed)
        if values:
            name = "charge" if what == "charge" else "multiplicity"
            said = ", ".join(f"{name} {value} ({number} frames)" for value, number in sorted(values.items()))
            print(f"no {what} is given: {said}", flush=True)


class _Prepared:
    """Data, references and the run's file, to be written at once."""

    def __init__(
        self, folder: Path, training: list[Frame], validation: list[Frame], bad: list[Frame], seed: int
    ) -> None:
        self.folder, self.training, self.validation, self.bad, self.seed = folder, training, validation, bad, seed
        unknown = {z for f in validation for z in f.atoms.numbers.tolist()} - {
            z for f in training for z in f.atoms.numbers.tolist()
        }
        if unknown:
            raise ValueError(
                f"{_symbols(unknown)} occur in validation frames only; expected them in training frames, too"
            )
        self.with_stress = self._has_stress()

    def _has_stress(self) -> bool:
        """Whether stress is trained: where all frames have it."""
        frames = [*self.training, *self.validation]
        number = sum(frame.stress is not None for frame in frames)
        if 0 < number < len(frames):
            print(f"stress is not trained: {len(frames) - number:,} of {len(frames):,} frames have none", flush=True)
        return number == len(frames)

    def write(
        self, size: str, checkpoint: str | Path | None, overrides: Sequence[str], files: Sequence[str | Path]
    ) -> Path:
        """Everything into the folder, or nothing; returns the run's file."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        unfinished.chmod(0o755)
        try:
            for name, frames in (("train", self.training), ("val", self.validation)):
                write_folder([_labelled(frame, self.with_stress) for frame in frames], unfinished / "data" / name)
            content, references = self._content(unfinished, size, checkpoint, overrides)
            write_json(unfinished / "references.json", references)
            summary = self._summary(files) | {"checkpoint": content["model"].get("checkpoint_location")}
            write_json(unfinished / SUMMARY, summary)
            comments = [f"fairchem -c {self.folder / run_file.FILE}", "Keys that are not here: own_data.yaml"]
            run_file.write(unfinished / run_file.FILE, content, comments)
            if self.folder.exists():
                self.folder.rmdir()  # empty
            unfinished.rename(self.folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return self.folder / run_file.FILE

    def _content(
        self, unfinished: Path, size: str, checkpoint: str | Path | None, overrides: Sequence[str]
    ) -> tuple[dict[str, Any], dict]:
        """The run's file and references.json."""
        given = run_file.parse(overrides)
        atoms = sum(len(frame.atoms) for frame in self.training)
        forces = np.concatenate([frame.forces.ravel() for frame in self.training])
        scale = max(float(np.sqrt(np.mean(forces**2))), LEAST_SCALE)
        values: dict[str, Any] = {"normalizer_rmsd": float(f"{scale:.3g}")}
        regress = {"regress_stress": True} if self.with_stress else {}
        if checkpoint is None:
            chosen = run_file.SIZES[size]
            table, undetermined = fit_references(self.training)
            defaults: list[Any] = ["own_data", {"backbone": chosen.backbone}]
            model = {"_target_": "e2former_fairchem.hydra_model.E2FormerV2HydraModel", "backbone": "${backbone}"}
            model |= {"heads": "${heads}", "pass_through_head_outputs": True, "supports_single_atoms": True}
            backbone: dict[str, Any] = regress
        else:
            start = _Start(checkpoint)
            chosen = run_file.size_of(start.channels)
            table, undetermined = start.references(self.training, unfinished), []
            values |= start.normalizer
            values["dataset"] = {"max_energy_residual": None}  # references alone are not what the energies are held to
            defaults = ["own_data"]
            model = {"_target_": "e2former_fairchem.training.checkpoint.initialize_from_checkpoint"}
            model |= {"checkpoint_location": str(start.path), "backbone": "${backbone}", "heads": "${heads}"}
            backbone = {"direct_forces": False, "regress_forces": True, "regress_stress": self.with_stress}
            backbone |= {"dataset_mapping": {"omol": "omol"}}
        left = residuals(self.training, table)
        found = {z for frame in self.training for z in frame.atoms.numbers.tolist()}
        own = {z: table[z] for z in sorted(found)} | ({0: table[0]} if table[0] else {})
        _say_references(own, undetermined, left, sorted(isolated_atoms(self.training)), checkpoint is not None)
        values |= run_file.choose(chosen, len(self.training), atoms, checkpoint is not None, given)
        values["energy_coef"], values["force_coef"] = 10, 10
        if atoms > run_file.IN_MEMORY_ATOMS:
            values["create_dataset"] = "fairchem.core.datasets.mt_concat_dataset.create_concat_dataset"
            values["num_workers"] = 4
        if self.with_stress:
            # The virial per atom then counts as the energy per atom does.
            volumes = [frame.atoms.get_volume() / len(frame.atoms) for frame in self.training]
            values["stress_coef"] = float(f"{10 * np.mean(volumes):.3g}")
            values["tasks"] = ["${task.energy}", "${task.forces}", "${task.stress}"]
        values["card"] = {"data": sorted({Path(frame.file).name for frame in self.training})}
        if checkpoint is not None:
            values["card"]["started_from"] = Path(checkpoint).name
        if not (given.get("card") or {}).get("level_of_theory"):
            print(
                "no level of theory is given: card.level_of_theory=NAME writes it on the potential's card", flush=True
            )
        content = {
            "defaults": [*defaults, {"heads": "e2former_v2_conserving"}, "_self_"],
            "job": {"run_dir": str(self.folder), "seed": self.seed},
            "data_train": str(self.folder / "data" / "train"),
            "data_val": str(self.folder / "data" / "val"),
            "element_references": str(self.folder / "references.json"),
            **values,
            "model": model,
        }
        if backbone:
            content["backbone"] = backbone
        kept = found | {z for z, v in enumerate(table) if z and v and math.isfinite(v)}
        per_z = {str(z): round(float(table[z]), 6) for z in sorted(kept)}
        references = {"element_references": per_z, "charge_reference": round(float(table[0]), 6), "unit": "eV"}
        return run_file.with_overrides(content, given), references | {"structures": len(self.training)}

    def _summary(self, files: Sequence[str | Path]) -> dict[str, Any]:
        return {
            "files": [str(Path(file).expanduser().absolute()) for file in files],
            "training": len(self.training),
            "validation": len(self.validation),
            "left_out": describe(self.bad),
            "stress": self.with_stress,
        }


class _Start:
    """The checkpoint that fine-tuning starts from."""

    def __init__(self, checkpoint: str | Path) -> None:
        self.path = check_checkpoint_path(checkpoint, "--from")
        content = read_checkpoint(self.path, key="--from")
        self.channels = int(content.model_config["backbone"].get("sphere_channels", 128))
        self.unit = errors.load(self.path, errors.device())
        task = next((task for task in plain(content.tasks_config) if task["property"] == "energy"), None)
        if task is None:
            raise ValueError(f"--from: expected a checkpoint with a task for energies, got {self.path} without one")
        normalizer = task.get("normalizer") or {}
        self.normalizer = {
            "normalizer_rmsd": float(normalizer.get("rmsd", 1.0)),
            "normalizer_mean": float(normalizer.get("mean", 0.0)),
        }
        self.table = _references_of(task)

    def references(self, frames: Sequence[Frame], unfinished: Path) -> np.ndarray:
        """References of the frames' level of theory for this checkpoint's network."""
        chosen = [frames[n] for n in errors.spread(len(frames), MAX_PREDICTED)]
        found = {z for frame in frames for z in frame.atoms.numbers.tolist()}
        lost = {z for z in found if not math.isfinite(self.table[z])}
        if lost:
            raise ValueError(
                f"--from: expected a checkpoint that knows {_symbols(lost)}, got {self.path}, which does not"
            )
        chosen += [f for f in frames if set(f.atoms.numbers.tolist()) - {z for c in chosen for z in c.atoms.numbers}]
        predicted = errors.predict(self.unit, [frame.atoms for frame in chosen]).energies
        table = shift_references(chosen, predicted, self.table)
        _refuse_outliers(chosen, predicted, table - self.table)
        rows = {}
        for name, part in (("training", "train"), ("validation", "val")):
            structures, number = errors.read_spread(unfinished / "data" / part)
            said = errors.predict(self.unit, structures)
            rows[f"{name}, before"] = errors.compare(structures, number, said, table - self.table)
        write_json(unfinished / RESULTS, errors.as_content(rows))
        return table


def _refuse_outliers(frames: Sequence[Frame], predicted: np.ndarray, shift: np.ndarray) -> None:
    """A trained network is near to every sound energy, up to the references."""
    off = np.array([frame.energy - reference_energy(shift, frame.atoms) for frame in frames]) - predicted
    off /= [len(frame.atoms) for frame in frames]
    worst = int(np.abs(off).argmax())
    if abs(off[worst]) > FARTHEST:
        frame = frames[worst]
        raise ValueError(
            f"{frame.file}: frame {frame.number}: the energy, {frame.energy:.6g} eV, is {off[worst]:+.3g} eV/atom "
            f"from what the checkpoint predicts with references fitted to all frames; expected at most {FARTHEST:g}"
        )


def _references_of(task: dict[str, Any]) -> np.ndarray:
    """References of a checkpoint's energy task, eV by atomic number and charge (0); zero where it has none."""
    node = (task.get("element_references") or {}).get("element_references")
    if isinstance(node, dict):
        node = node.get("_args_", [None])[0]
    table = np.array(dense_table({}, 0.0))
    if node is not None:
        given = np.asarray(node, dtype=float).ravel()[: len(table)]
        table[: len(given)] = given
        table[len(given) :] = math.nan
    return table


def _labelled(frame: Frame, with_stress: bool) -> Any:
    """The structure as it is written."""
    atoms = frame.atoms
    labels: dict[str, Any] = {"energy": frame.energy, "forces": frame.forces}
    if with_stress:
        labels["stress"] = full_3x3_to_voigt_6_stress(frame.stress)
    atoms.calc = SinglePointCalculator(atoms, **labels)
    atoms.info |= {
        "source": f"{frame.file}@{frame.number}",
        "data_id": Path(frame.file).name.split(".")[0],
        "num_atoms": len(atoms),
    }
    return atoms


def _symbols(numbers: set[int] | Sequence[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in sorted(numbers))


def _say_references(
    table: Mapping[int, float], undetermined: Sequence[str], left: np.ndarray, isolated: Sequence[int], moved: bool
) -> None:
    listed = ", ".join(f"{chemical_symbols[z] if z else 'a charge of +1'} {v:.3f}" for z, v in table.items())
    how = "fitted"
    if moved:
        how = "the checkpoint's, moved to these energies"
    elif isolated:
        how = f"of isolated atoms for {_symbols(isolated)}" + (
            "" if len(isolated) == len(table) else ", fitted for the others"
        )
    print(f"element references ({how}): {listed} eV", flush=True)
    if undetermined:
        said = ", ".join(undetermined)
        print(f"  only sums of the references of {said} are fixed: they always come in the same ratios", flush=True)
    print(f"  they leave {1000 * np.abs(left).mean():.0f} meV/atom (mean size) to the network", flush=True)


def where_to_resume(folder: Path, files: Sequence[str | Path]) -> Path:
    """The newest complete checkpoint's config, or the run's file where there is none."""
    if not (folder / run_file.FILE).is_file():
        raise FileNotFoundError(f"--resume: expected the folder of a training with {run_file.FILE}, got {folder}")
    recorded = read_json(folder / SUMMARY)["files"]
    given = [str(Path(file).expanduser().absolute()) for file in files]
    if given and given != recorded:
        raise ValueError(f"--resume: expected no files or those of the training, {recorded}, got {given}")
    found = sorted(folder.glob(f"*/checkpoints/*/{METADATA}"), key=lambda path: path.stat().st_mtime)
    complete = [path.parent for path in found]
    if not complete:
        print(f"no checkpoint in {folder}: starting from the beginning", flush=True)
        return folder / run_file.FILE
    if complete[-1].name == "final":
        raise ValueError(f"--resume: the training in {folder} is finished: {folder / CHECKPOINT}")
    print(f"resuming from {complete[-1]}", flush=True)
    return complete[-1] / "resume.yaml"


def _run(config: Path, overrides: Sequence[str] = ()) -> None:
    print(f"training: fairchem -c {config}", flush=True)
    launch(config, overrides)


def _compare(folder: Path) -> Result:
    """Print and write the table of the finished training."""
    checkpoint = folder / CHECKPOINT
    rows: dict[str, errors.Errors] = {}
    results = folder / RESULTS
    if results.is_file():
        before = read_json(results)
        rows = {name: errors.Errors(**row) for name, row in before.items() if name.endswith("before")}
    after = ", after" if rows else ""
    unit = errors.load(checkpoint, errors.device())
    for name, part in (("training", "train"), ("validation", "val")):
        structures, number = errors.read_spread(folder / "data" / part)
        rows[name + after] = errors.compare(structures, number, errors.predict(unit, structures))
    rows = dict(sorted(rows.items(), key=lambda row: row[0].split(",")[0]))
    print(errors.as_table(rows), flush=True)
    write_json(results, errors.as_content(rows))
    print(f"potential: {checkpoint}", flush=True)
    return Result(folder, checkpoint, rows)
