"""S2EF: from the journals to the file for the upload, and scores where the data set has labels."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fairchem.core.components.reducer import Reducer

from e2former_fairchem.files import replacing, write_json
from e2former_fairchem.leaderboard.provenance import write_provenance
from e2former_fairchem.leaderboard.runner import Collected, collect, refuse_incomplete
from e2former_fairchem.leaderboard.s2ef import S2EFRunner

#: The leaderboard's parts of OMol25 by `data_id`.
SPLITS = {
    "biomolecules": ("biomolecules",),
    "electrolytes": ("elytes",),
    "metal_complexes": ("metal_complexes",),
    "neutral_organics": ("ani2x", "orbnet_denali", "geom_orca6", "trans1x", "rgd"),
}


class DuplicateIdError(ValueError):
    """Two structures of a data set with the same id: the leaderboard takes each id once."""


def merge_arrays(collected: Collected) -> dict[str, np.ndarray]:
    """All records as one set of arrays in the data set's order.

    Returns:
        `ids` (N, str), `data_ids` (N, str), `natoms` (N, int64), `energy` and `label_energy` (N, float64, eV), `forces`
        (sum natoms, 3, float64, eV/Å), `force_errors` (N, 2), see `s2ef.force_errors`.

    Raises:
        DuplicateIdError: names the ids.
    """
    total = collected.fingerprint["structures"]
    parts: dict[str, list[np.ndarray]] = {}
    seen = np.zeros(total, bool)
    for record in collected.results:
        with np.load(io.BytesIO(record.payload), allow_pickle=False) as arrays:
            keep = ~seen[arrays["index"]]
            seen[arrays["index"]] = True
            for name in arrays.files:
                rows = np.repeat(keep, arrays["natoms"]) if name == "forces" else keep
                parts.setdefault(name, []).append(arrays[name][rows])
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    order = np.argsort(joined.pop("index"), kind="stable")
    natoms, forces = joined["natoms"], joined.pop("forces")
    starts = np.concatenate([[0], np.cumsum(natoms)[:-1]])
    merged = {name: values[order] for name, values in joined.items()}
    # Row k of the ordered forces comes from its structure's first row plus the position within the structure.
    ends = np.cumsum(merged["natoms"])
    rows = np.arange(ends[-1]) + np.repeat(starts[order] - (ends - merged["natoms"]), merged["natoms"])
    merged["forces"] = forces[rows]

    ids, counts = np.unique(merged["ids"], return_counts=True)
    if len(ids) != total:
        twice = ids[counts > 1]
        raise DuplicateIdError(
            f"ids: expected {total} different ids (atoms.info['source']), got {len(twice)} that occur more than once, "
            f"first {', '.join(twice[:3].tolist())}"
        )
    return merged


def scores(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Errors of all structures and of the leaderboard's parts; only those with labels count, {} without any.

    Each part: `energy_mae` (eV), `energy_per_atom_mae` (eV/atom), `forces_mae` (eV/Å, over components),
    `forces_cosine_similarity` (mean over atoms) and `structures`.
    """
    labelled = np.isfinite(arrays["label_energy"]) & np.isfinite(arrays["force_errors"]).all(axis=1)
    parts = {"all": labelled} | {
        name: labelled & np.isin(arrays["data_ids"], members) for name, members in SPLITS.items()
    }
    found = {}
    for name, chosen in parts.items():
        if not chosen.any():
            continue
        natoms = arrays["natoms"][chosen]
        energy = np.abs(arrays["energy"][chosen] - arrays["label_energy"][chosen])
        absolute, cosine = arrays["force_errors"][chosen].sum(axis=0)
        found[name] = {
            "structures": int(chosen.sum()),
            "energy_mae": float(energy.mean()),
            "energy_per_atom_mae": float((energy / natoms).mean()),
            "forces_mae": float(absolute / (3 * natoms.sum())),
            "forces_cosine_similarity": float(cosine / natoms.sum()),
        }
    return found


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """The scores as lines of text."""
    lines = [f"{'':18}{'structures':>12}{'energy eV':>12}{'eV/atom':>12}{'forces eV/Å':>14}{'cosine':>9}"]
    lines += [
        f"{name:18}{s['structures']:12d}{s['energy_mae']:12.5f}{s['energy_per_atom_mae']:12.6f}"
        f"{s['forces_mae']:14.6f}{s['forces_cosine_similarity']:9.4f}"
        for name, s in found.items()
    ]
    return "\n".join(lines)


class S2EFReducer(Reducer):
    """Writes `s2ef_predictions.npz`, its provenance and `scores.json`.

    Args:
        output_dir: the runner's.
    """

    def __init__(self, output_dir: str) -> None:
        self.output_dir = Path(output_dir).absolute()

    @property
    def runner_type(self) -> type[S2EFRunner]:
        """The runner whose journals are read."""
        return S2EFRunner

    def reduce(self) -> Path:
        """Merge; returns the file for the upload.

        Raises:
            IncompleteError: structures are missing; what is there stays in the journals.
            DuplicateIdError: the data set has an id twice.
        """
        target = self.output_dir / "s2ef_predictions.npz"
        collected = collect(self.output_dir)
        refuse_incomplete(self.output_dir, collected, target)
        arrays = merge_arrays(collected)
        with replacing(target) as handle:
            np.savez_compressed(handle, **{name: arrays[name] for name in ("ids", "energy", "forces", "natoms")})
        found = scores(arrays)
        facts: dict[str, Any] = {
            "atoms": int(arrays["natoms"].sum()),
            "computed_more_than_once": collected.repeated,
            "data_ids": dict(Counter(arrays["data_ids"].tolist()).most_common()),
            "scores": found,
        }
        provenance = write_provenance(target, collected.fingerprint, collected.workers, **facts)
        if found:
            write_json(self.output_dir / "scores.json", found)
            labelled = f"{found['all']['structures']} of {len(arrays['ids'])}"
            print(
                f"errors against the data set's labels, which {labelled} structures have:\n{table(found)}", flush=True
            )
        else:
            print("the data set has no labels: no scores", flush=True)
        print(f"S2EF submission: {target} (provenance: {provenance.name})", flush=True)
        return target

    def save_state(self, checkpoint_location: str, is_preemption: bool = False) -> bool:
        """Nothing to save: merging starts again."""
        return True

    def load_state(self, checkpoint_location: str | None) -> None:
        """Nothing to load."""
