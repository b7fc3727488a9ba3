"""Make an OMol25-format data set (`.aselmdb` folders with metadata) from an extended XYZ file.

    python -m e2former_fairchem.data.make_sample wb97mv_small.xyz sample

writes `sample/{train,val_known,val_new}/{data.aselmdb,metadata.npz}` and `sample/statistics.json`. Every frame needs
`REF_energy` (eV), `REF_forces` (eV/Å) and the info keys charge, spin (multiplicity), source
(`kind/molecule/charge/multiplicity/number`, unique) and data_id. Equal input gives equal bytes for the same versions of
lmdb and zlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import ase.io
import lmdb
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase_db_backends.aselmdb import decode_bytestream, encode_object

from e2former_fairchem.data.references import fit_element_references, reference_energy

#: Molecules that training never sees, by name, in any charge, multiplicity or number.
HELD_OUT_MOLECULES = (
    "CH3CH2OH",
    "CH3COCH3",
    "C5H5N",
    "CH3CN",
    "CH3SH",
    "trans-butane",
    "HCO",
    "Formic_acid_dimer",
)
NUM_VAL_KNOWN = 60
SEED = 20250430
INFO_KEYS = ("charge", "spin", "source", "data_id")


def read_frames(path: str | Path) -> list[Atoms]:
    """Frames of an extended XYZ file as isolated molecules with a single-point calculator, in the file's order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a frame lacks a label or an info key, or two frames have the same source.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"extended XYZ file: expected a file, got {path}")
    frames = []
    for number, raw in enumerate(ase.io.iread(path, index=":", format="extxyz")):
        missing = [k for k in (*INFO_KEYS, "REF_energy") if k not in raw.info]
        missing += [] if "REF_forces" in raw.arrays else ["REF_forces"]
        if missing:
            raise ValueError(f"{path}, frame {number}: expected the keys {', '.join(missing)}, got {sorted(raw.info)}")
        atoms = Atoms(numbers=raw.numbers, positions=raw.positions)
        atoms.calc = SinglePointCalculator(
            atoms, energy=float(raw.info["REF_energy"]), forces=np.asarray(raw.arrays["REF_forces"], dtype=float)
        )
        atoms.info = {
            "charge": int(raw.info["charge"]),
            "spin": int(raw.info["spin"]),
            "source": str(raw.info["source"]),
            "data_id": str(raw.info["data_id"]),
            "num_atoms": len(atoms),
        }
        frames.append(atoms)
    repeated = [s for s, n in Counter(a.info["source"] for a in frames).items() if n > 1]
    if repeated:
        raise ValueError(f"{path}: expected every source once, got {repeated[:5]} more than once")
    return frames


def molecule_name(atoms: Atoms) -> str:
    """The molecule's name in `kind/molecule/charge/multiplicity/number`."""
    return atoms.info["source"].split("/")[1]


def species(atoms: Atoms) -> str:
    """Kind, molecule, charge and multiplicity: what is left of the source without the structure's number."""
    return atoms.info["source"].rsplit("/", 1)[0]


def split(
    frames: Sequence[Atoms],
    held_out: Sequence[str] = HELD_OUT_MOLECULES,
    num_val_known: int = NUM_VAL_KNOWN,
    seed: int = SEED,
) -> dict[str, list[Atoms]]:
    """Split into train, val_known (random structures; their species stay in train) and val_new (whole molecules).

    Raises:
        ValueError: a held-out name does not occur, or the rest is too small for `num_val_known`.
    """
    unknown = sorted(set(held_out) - {molecule_name(a) for a in frames})
    if unknown:
        raise ValueError(f"held_out: expected names of molecules in the file, got {unknown}")
    new = [a for a in frames if molecule_name(a) in held_out]
    rest = [a for a in frames if molecule_name(a) not in held_out]
    left = Counter(species(a) for a in rest)
    order = list(range(len(rest)))
    random.Random(seed).shuffle(order)
    known: set[int] = set()
    for i in order:
        if len(known) == num_val_known:
            break
        if left[species(rest[i])] > 2:  # at least two structures of each species stay in the training set
            left[species(rest[i])] -= 1
            known.add(i)
    if len(known) < num_val_known:
        raise ValueError(f"num_val_known: expected at most {len(known)} for this file, got {num_val_known}")
    return {
        "train": [a for i, a in enumerate(rest) if i not in known],
        "val_known": [a for i, a in enumerate(rest) if i in known],
        "val_new": new,
    }


def statistics(splits: Mapping[str, Sequence[Atoms]]) -> dict:
    """Element references and baselines of a split data set, all from its training part but for the counts.

    `force_rms`: root mean square of the force components; `energy_residual_rms`: of the total energy less the element
    references; `zero_force_mae`: the mean absolute force component of each part (eV/Å), what predicting zero would get.
    """
    train = splits["train"]
    charges = [a.info["charge"] for a in train]
    fitted = fit_element_references([a.numbers for a in train], [a.get_potential_energy() for a in train], charges)
    references = np.nan_to_num(fitted.table)  # zero for elements that do not occur
    residual = [a.get_potential_energy() - reference_energy(references, a) for a in train]
    forces = np.concatenate([a.get_forces().ravel() for a in train])
    return {
        "element_references": [round(float(x), 6) for x in references],
        "force_rms": round(float(np.sqrt(np.mean(forces**2))), 6),
        "energy_residual_rms": round(float(np.sqrt(np.mean(np.square(residual)))), 6),
        "num_structures": {k: len(v) for k, v in splits.items()},
        "num_atoms": {k: int(sum(len(a) for a in v)) for k, v in splits.items()},
        "zero_force_mae": {
            k: round(float(np.abs(np.concatenate([a.get_forces() for a in v])).mean()), 6) for k, v in splits.items()
        },
    }


def write_folder(frames: Sequence[Atoms], folder: str | Path) -> None:
    """Write one OMol25-format folder: `data.aselmdb` and `metadata.npz` (natoms, data_ids).

    ASE writes the rows; they are then copied, without the times and random ids that ASE adds, into a compact file.

    Args:
        frames: with energies, forces, charge and spin.
        folder: made where it is not there.

    Raises:
        FileExistsError: the folder already holds a data set.
        ValueError: there is nothing to write.
    """
    if not frames:
        raise ValueError(f"{folder}: expected at least one structure, got none")
    folder = Path(folder)
    target = folder / "data.aselmdb"
    if target.exists():
        raise FileExistsError(f"{target}: expected no such file, got an existing one; remove it first")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        with connect(str(Path(tmp) / "rows.aselmdb"), use_lock_file=False) as db:
            for atoms in frames:
                db.write(atoms, data=atoms.info)
        rows = lmdb.open(str(Path(tmp) / "rows.aselmdb"), subdir=False, readonly=True, lock=False)
        clean = lmdb.open(str(Path(tmp) / "clean.aselmdb"), subdir=False, map_size=2**34, meminit=True)
        with rows.begin() as source, clean.begin(write=True) as sink:
            for key, value in source.cursor():
                row = decode_bytestream(value, decompress=True, json_decode=True)
                if isinstance(row, dict) and "data" in row:
                    row["mtime"] = row["ctime"] = 0.0
                    row["user"] = ""
                    row["unique_id"] = hashlib.md5(row["data"]["source"].encode(), usedforsecurity=False).hexdigest()
                sink.put(key, encode_object(row, compress=True, json_encode=True))
        clean.sync(True)
        copied = Path(tmp) / "data.aselmdb"
        with copied.open("wb") as handle:
            clean.copyfd(handle.fileno(), compact=True)
        rows.close()
        clean.close()
        target.write_bytes(copied.read_bytes())
    np.savez(
        folder / "metadata.npz",
        natoms=np.array([len(a) for a in frames], dtype=np.int64),
        data_ids=np.array([a.info["data_id"] for a in frames]),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: source file, destination folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="extended XYZ file")
    parser.add_argument("destination", type=Path, help="folder to make")
    parser.add_argument("--held-out", nargs="*", default=list(HELD_OUT_MOLECULES), help="molecules of val_new, by name")
    parser.add_argument("--val-known", type=int, default=NUM_VAL_KNOWN, help="number of structures of val_known")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    splits = split(read_frames(args.source), args.held_out, args.val_known, args.seed)
    for name, frames in splits.items():
        write_folder(frames, args.destination / name)
        print(f"{args.destination / name}: {len(frames)} structures")
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in statistics(splits).items())
    (args.destination / "statistics.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
