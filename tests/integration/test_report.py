"""Reports: what they add up, how they are gathered and rebuilt, and that they never cost a run its results."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray

from e2former_fairchem import cli
from e2former_fairchem.report.errors import WORST, Predictions, SetErrors
from e2former_fairchem.report.folder import build, find_report, load_numbers, save_numbers
from e2former_fairchem.report.sample import EDGES, Sample, histogram, quantile
from e2former_fairchem.report.tables import overall, summary

FIGURES = {"error_distribution", "error_by_element", "error_by_charge_and_spin", "error_by_size"}
CURVES = {"learning_curves", "training_details"}


def structures(number: int, seed: int = 0, first: int = 0) -> Predictions:
    """Random structures of 1 to 9 atoms with errors; every tenth has no energy label, every tenth no forces."""
    rng = np.random.default_rng(seed)
    natoms = rng.integers(1, 10, number)
    atoms = natoms.sum()
    energy = rng.normal(scale=3.0, size=number)
    forces = rng.normal(size=(atoms, 3))
    pairs = np.stack([forces, forces + rng.normal(scale=0.1, size=(atoms, 3))], 1)
    energies = np.stack([energy, energy + rng.normal(scale=0.05, size=number)], 1)
    energies[::10, 0] = np.nan
    pairs[np.repeat(np.arange(number) % 10 == 5, natoms), 0] = np.nan
    return Predictions(
        index=first + np.arange(number),
        numbers=rng.choice([1, 6, 8, 26], atoms),
        natoms=natoms,
        charge=rng.integers(-2, 3, number),
        spin=rng.integers(1, 4, number),
        energy=energies,
        forces=pairs,
        stress=np.where(np.arange(number)[:, None, None] % 10 == 3, np.nan, rng.normal(size=(number, 2, 9))),
    )


def part(batch: Predictions, rows: slice) -> Predictions:
    """Some of the structures."""
    owner = np.repeat(np.arange(len(batch.natoms)), batch.natoms)
    atoms = np.isin(owner, np.arange(len(batch.natoms))[rows])
    cut = {name: getattr(batch, name)[rows] for name in ("index", "natoms", "charge", "spin", "energy", "stress")}
    return Predictions(**cut, numbers=batch.numbers[atoms], forces=batch.forces[atoms])


@pytest.fixture(scope="module")
def added() -> tuple[Predictions, SetErrors]:
    batch = structures(200)
    errors = SetErrors("omol.val")
    for start in range(0, 200, 32):
        errors.add(part(batch, slice(start, start + 32)))
    return batch, errors


def test_errors_are_those_of_the_definition(added: tuple) -> None:
    batch, errors = added
    got = overall(errors)
    per_atom = 1000 * (batch.energy[:, 1] - batch.energy[:, 0]) / batch.natoms
    forces = 1000 * (batch.forces[:, 1] - batch.forces[:, 0])
    assert got["energy_mae_per_atom"] == pytest.approx(np.nanmean(np.abs(per_atom)))
    assert got["energy_rmse_per_atom"] == pytest.approx(np.sqrt(np.nanmean(per_atom**2)))
    assert got["energy_bias_per_atom"] == pytest.approx(np.nanmean(per_atom))
    assert got["energy_mae"] == pytest.approx(np.nanmean(np.abs(per_atom * batch.natoms)))
    assert got["force_mae"] == pytest.approx(np.nanmean(np.abs(forces)))
    assert got["force_rmse"] == pytest.approx(np.sqrt(np.nanmean(forces**2)))
    assert got["zero_force_mae"] == pytest.approx(1000 * np.nanmean(np.abs(batch.forces[:, 0])))
    stress = 1000 * (batch.stress[:, 1] - batch.stress[:, 0])
    assert got["stress_mae"] == pytest.approx(np.nanmean(np.abs(stress)))
    assert got["stress_rmse"] == pytest.approx(np.sqrt(np.nanmean(stress**2)))
    labelled = ~np.isnan(batch.forces[:, 0, 0])
    reference, predicted = batch.forces[labelled, 0], batch.forces[labelled, 1]
    cosine = (reference * predicted).sum(1) / np.linalg.norm(reference, axis=1) / np.linalg.norm(predicted, axis=1)
    assert got["force_cosine"] == pytest.approx(cosine.mean())
    assert got["force_95_percent"] == pytest.approx(np.nanquantile(np.abs(forces), 0.95), rel=0.1)


def test_groups_are_those_of_the_definition(added: tuple) -> None:
    batch, errors = added
    got = summary([errors])["omol.val"]
    owner = np.repeat(np.arange(200), batch.natoms)
    force = np.abs(batch.forces[:, 1] - batch.forces[:, 0])
    energy = np.abs(batch.energy[:, 1] - batch.energy[:, 0]) / batch.natoms

    def check(entry: dict, rows: NDArray) -> None:
        assert entry["structures"] == rows.sum()
        for key, values in (("energy_mae_per_atom", energy[rows]), ("force_mae", force[rows[owner]])):
            wanted = 1000 * np.nanmean(values) if np.isfinite(values).any() else None
            assert entry[key] == (None if wanted is None else pytest.approx(wanted)), (entry, key)

    assert len(got["by_charge_and_spin"]) == 15
    for entry in got["by_charge_and_spin"]:
        check(entry, (batch.charge == entry["charge"]) & (batch.spin == entry["spin"]))
    for entry in got["by_number_of_atoms"]:
        check(entry, batch.natoms == entry["atoms"])
    for z, name in ((1, "H"), (6, "C"), (8, "O"), (26, "Fe")):
        rows = (batch.numbers == z) & ~np.isnan(batch.forces[:, 0, 0])
        assert got["by_element"][name]["atoms"] == rows.sum()
        assert got["by_element"][name]["force_mae"] == pytest.approx(1000 * force[rows].mean())


def test_worst_structures(added: tuple) -> None:
    batch, errors = added
    per_atom = (batch.energy[:, 1] - batch.energy[:, 0]) / batch.natoms
    order = np.argsort(-np.abs(np.nan_to_num(per_atom)))[:WORST]
    numbers, formulas = errors.worst_energy
    assert numbers[:, 0].astype(int).tolist() == order.tolist()
    np.testing.assert_allclose(numbers[:, 4], per_atom[order])
    assert all(re.fullmatch(r"([A-Z][a-z]?\d*)+", formula) for formula in formulas)


def test_ranks_together_are_one_run(added: tuple) -> None:
    """Each of three ranks has its share; the structure that a sampler repeats is listed once among the worst."""
    batch, whole = added
    ranks = [SetErrors("omol.val", (0, rank)) for rank in range(3)]
    for rank, errors in enumerate(ranks):
        errors.add(part(batch, slice(rank, None, 3)))
    total, *others = [SetErrors.from_arrays("omol.val", errors.to_arrays()) for errors in ranks]
    for other in others:
        total.merge(other)
    ours, wanted = summary([total])["omol.val"], summary([whole])["omol.val"]
    assert json.dumps(_rounded(ours)) == json.dumps(_rounded(wanted))
    np.testing.assert_array_equal(total.force_histogram, whole.force_histogram)
    np.testing.assert_array_equal(np.sort(total.force_sample.rows, 0), np.sort(whole.force_sample.rows, 0))
    np.testing.assert_allclose(total.worst_forces[0], whole.worst_forces[0])
    again = SetErrors("omol.val")
    again.add(batch)
    again.merge(whole)
    np.testing.assert_allclose(again.worst_energy[0], whole.worst_energy[0])


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def test_predictions_that_are_not_finite_are_counted_apart(added: tuple) -> None:
    batch, whole = added
    broken = structures(3, seed=4)
    broken.energy[1] = 1.0, np.nan
    broken.forces[0, 1, 2] = np.inf
    broken.energy[2] = np.nan  # no label and no prediction: nothing is wrong with it
    broken.forces[broken.natoms[:2].sum() :] = np.nan
    errors = SetErrors("omol.val")
    errors.add(batch)
    errors.add(broken)
    got, wanted = overall(errors), overall(whole)
    assert got["structures_without_finite_prediction"] == 2
    assert got["structures"] == 203
    for key in ("energy_mae_per_atom", "force_mae", "force_cosine"):
        assert got[key] == pytest.approx(wanted[key])


def test_sample_is_uniform_and_bounded() -> None:
    """Of 0..9999 in pieces on two ranks of different sizes, 500 stay, from everywhere alike, and always the same."""

    def draw() -> Sample:
        samples = [Sample(500, 1, (7, rank)) for rank in range(2)]
        stream = np.arange(10_000.0)[:, None]
        for piece in np.split(stream[:8000], 40):
            samples[0].add(piece)
        samples[1].add(stream[8000:])
        samples[0].merge(samples[1])
        return samples[0]

    kept = draw().rows[:, 0]
    assert len(kept) == 500 == len(set(kept))
    counts = np.histogram(kept, 10, (0, 10_000))[0]
    assert np.all(np.abs(counts - 50) < 5 * np.sqrt(50))  # five standard deviations
    np.testing.assert_array_equal(kept, draw().rows[:, 0])


def test_quantiles_from_a_histogram() -> None:
    errors = np.abs(np.random.default_rng(0).normal(scale=0.02, size=20_000))
    for share in (0.05, 0.5, 0.95):
        assert quantile(histogram(errors), share) == pytest.approx(np.quantile(errors, share), rel=0.03)
    assert histogram(np.array([0.0, 1e-30, 1e9])).sum() == 3
    assert np.isnan(quantile(np.zeros(len(EDGES) - 1), 0.5))


class Page(HTMLParser):
    """Checks that tags close, and keeps what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tables = 0
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tables += tag == "table"
        self.links += [value for key, value in attrs if key in ("src", "href", "srcset", "data")]
        assert tag not in ("script", "link", "iframe", "object")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read_page(path: Path, figures: set[str]) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert {p.stem for p in path.parent.glob("*.png")} == figures
    assert len(page.links) == len(figures)
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]  # nothing half-written
    return page


def test_page_of_many_points_and_strange_names(tmp_path: Path) -> None:
    """Densities instead of points, forty elements, two sets, one without energies; names are no HTML."""
    rng = np.random.default_rng(0)
    batch = structures(5000, seed=1)
    batch.numbers[:] = rng.integers(1, 41, len(batch.numbers))
    first, second = SetErrors("omol.val"), SetErrors("spice.<b>other</b>")
    first.add(batch)
    batch.energy = None
    second.add(part(structures(40), slice(0, 40)))
    second.energy[:] = 0
    folder = tmp_path / "report"
    facts = {
        "title": "a <script>",
        "facts": [["network", "x < y"]],
        "structures": {"3": "<img src=x>"},
        "config": "a: <b>",
    }
    save_numbers(folder, [first, second], facts)
    names = {"parity_omol.val", "parity_spice._b_other_b_"}
    page = read_page(build(folder), FIGURES | names)
    assert "a <script>" in page.words
    assert "spice.<b>other</b>" in page.words


def test_page_of_a_run_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = [
        {"kind": "train", "step": 10 * i, "epoch": i / 4, "seconds": float(i), "steps": 10, "loss": 3.0 / i}
        | {"losses": {"e": 1.0 / i, "f": 2.0 / i}, "lr": 1e-3, "atoms_per_second": 9.0}
        for i in range(1, 60)
    ]
    lines[30]["loss"] = None
    run = tmp_path / "runs" / "202611"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    assert f"report: {run / 'report' / 'index.html'}" in capsys.readouterr().out
    read_page(run / "report" / "index.html", CURVES)


@pytest.mark.parametrize("content", [None, b"not a zip"])
def test_command_names_what_is_missing(content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if content is not None:
        (tmp_path / "errors.npz").write_bytes(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.fixture
def quick(repo: Path, tiny: Sequence[str]) -> tuple:
    return (repo / "configs" / "quickstart.yaml", *tiny, "epochs=2", "evaluate_every=1", "batch_size=100")


def test_report_of_training_and_of_evaluation(
    launch: Callable, quick: tuple, repo: Path, elsewhere: Path, capsys: pytest.CaptureFixture
) -> None:
    """Both have the errors of the same weights, which are fairchem's metrics, and name their worst structures."""
    launch(*quick)
    said = capsys.readouterr().out
    (path,) = re.findall(r"^report: (\S+)$", said, re.MULTILINE)
    trained = Path(path)
    assert trained == next((elsewhere / "runs" / "quickstart").glob("*/report/index.html"))
    parity = {"parity_val_known", "parity_val_new"}
    page = read_page(trained, FIGURES | CURVES | parity)
    assert "quickstart: training report" in page.words
    assert "sphere_channels: 8" in page.words  # the configuration
    worst = json.loads((trained.parent / "run.json").read_text())["structures"].values()
    assert all(re.fullmatch(r".+/q-?\d/m\d/\d+", name) for name in worst), worst  # OMol25's `source`
    assert all(name in page.words for name in worst)

    launch(repo / "configs" / "evaluate" / "omol25.yaml", "job.device_type=CPU")
    (path,) = re.findall(r"^report: (\S+)$", capsys.readouterr().out, re.MULTILINE)
    page = read_page(Path(path), FIGURES | parity)
    assert str(elsewhere / "runs" / "quickstart" / "inference_ckpt.pt") in page.words
    results = json.loads((elsewhere / "runs" / "evaluate" / "results.json").read_text())
    for folder in (trained.parent, Path(path).parent):
        errors = json.loads((folder / "summary.json").read_text())
        for name, metrics in results["metrics"].items():
            for ours, theirs in (
                ("energy_mae_per_atom", "omol_energy,per_atom_mae"),
                ("energy_mae", "omol_energy,mae"),
                ("force_mae", "omol_forces,mae"),
            ):
                assert errors[name][ours] == pytest.approx(1000 * metrics[theirs], rel=1e-3), (name, ours)
            assert errors[name]["zero_force_mae"] == pytest.approx(1000 * results["zero_force_mae"][name], rel=1e-5)
    assert find_report(elsewhere / "runs" / "quickstart") == trained.parent


def test_a_report_that_fails_costs_nothing(
    launch: Callable, quick: tuple, elsewhere: Path, capsys: pytest.CaptureFixture
) -> None:
    """Figures fail: checkpoint and numbers are there, the error is said, and the page can be made later.

    Training stops between two evaluations, so that the final weights are evaluated for the report.
    """
    with matplotlib.rc_context({"path.effects": ["no ink"]}):  # a style of the user's that nothing can be drawn with
        launch(*quick, "runner.max_epochs=null", "runner.max_steps=9", "evaluate_every=3")
    said = capsys.readouterr().out
    assert "evaluating the final weights for the report" in said
    assert "report: NOT written, AttributeError: 'str' object" in said
    assert (elsewhere / "runs" / "quickstart" / "inference_ckpt.pt").is_file()
    folder = next((elsewhere / "runs" / "quickstart").glob("*/report"))
    assert not (folder / "index.html").exists()
    sets, _ = load_numbers(folder)
    assert [s.structures for s in sets] == [60, 75]
    assert cli.main(["report", str(folder)]) == 0
    assert "Learning curves" in (folder / "index.html").read_text()


def test_without_matplotlib_the_numbers_are_written(
    added: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nothing that a run imports needs it; only the page does, and the command says what to install."""
    import e2former_fairchem
    import e2former_fairchem.training

    for package, name in ((e2former_fairchem, "report"), (e2former_fairchem.training, "report_callback")):
        monkeypatch.setattr(package, name, getattr(package, name, None), raising=False)
    ours = ("e2former_fairchem.report", "e2former_fairchem.training.report_callback", "matplotlib")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fresh = importlib.import_module("e2former_fairchem.training.report_callback")
    fresh.save_numbers(tmp_path, [added[1]], {})
    assert {p.name for p in tmp_path.iterdir()} == {"errors.npz", "run.json", "summary.json"}
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
