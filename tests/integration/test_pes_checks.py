"""What the checks of a potential-energy surface find on surfaces with known defects, and their parts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.morse import MorsePotential
from ase.io import write
from ase.neighborlist import natural_cutoffs, neighbor_list

from e2former_fairchem.pes import bond_scan, extensivity
from e2former_fairchem.pes.curves import extrema, find_jumps, integrate
from e2former_fairchem.pes.result import Metric, Outcome, worst
from e2former_fairchem.pes.rounding import energy_rounding
from e2former_fairchem.pes.run import CHECKS, run_checks, select_checks, summarize
from e2former_fairchem.pes.settings import build_settings
from e2former_fairchem.pes.systems import load_systems
from e2former_fairchem.pes.table import render, rows


class Surface(Calculator):
    """Morse pairs (smooth to the cutoff) and a defect: a function of the structure that returns energy and forces."""

    implemented_properties = ("energy", "forces")

    def __init__(self, defect: Callable[[Atoms], tuple[float, np.ndarray | float]] | None = None) -> None:
        super().__init__()
        self.defect = defect

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        plain.calc = MorsePotential(epsilon=1.0, r0=1.1, rho0=3.0, rcut1=2.5, rcut2=4.0)
        energy, force = plain.get_potential_energy(), plain.get_forces()
        if self.defect is not None:
            extra = self.defect(atoms)
            energy, force = energy + extra[0], force + extra[1]
        self.results = {"energy": energy, "forces": force}


class Fake:
    """What the checks need of a `Potential`."""

    precision = "float64"
    cutoff = 4.0
    direct_forces = mirror_images_differ = False
    elements: tuple[str, ...] | None = None

    def __init__(self, defect=None) -> None:
        self.calculator = Surface(defect)

    def evaluate(self, structures):
        found = []
        for atoms in structures:
            one = atoms.copy()
            one.calc = self.calculator
            found.append((one.get_potential_energy(), one.get_forces()))
        return np.array([e for e, _ in found]), [f for _, f in found]

    def resolution(self, atoms: Atoms) -> float:
        return energy_rounding(lambda structures: self.evaluate(structures)[0], atoms, float(np.finfo(float).eps))


def outcome(check: str, system: str, defect=None, **settings) -> Outcome:
    kind, function = CHECKS[check]
    ((name, atoms),) = load_systems([system], "systems")
    return function(Fake(defect), name, atoms, kind(**settings), np.random.default_rng(0))


def verdicts(found: Outcome) -> dict[str, str]:
    return {metric.name: metric.verdict for metric in found.metrics}


def pair_defect(energy: Callable[[float], float], slope: Callable[[float], float]):
    """An energy of the distance between the first two atoms, with its forces."""

    def defect(atoms: Atoms) -> tuple[float, np.ndarray]:
        bond = atoms.positions[1] - atoms.positions[0]
        distance = float(np.linalg.norm(bond))
        force = np.zeros((len(atoms), 3))
        force[1] = -slope(distance) * bond / distance
        force[0] = -force[1]
        return energy(distance), force

    return defect


@pytest.mark.parametrize(
    ("check", "system", "settings"),
    [
        ("nve", "H2O", {"steps": 60}),
        ("bond_scan", "N2", {}),
        ("forces", "H2O", {"components": 4}),
        ("extensivity", "H2O", {}),
        ("reflection", "H2O2", {}),
        ("cutoff", "H2O", {}),
    ],
)
def test_a_good_surface_passes(check: str, system: str, settings: dict) -> None:
    found = outcome(check, system, **settings)
    assert found.verdict == "pass", verdicts(found)


def test_a_leak_of_energy_shows_as_drift() -> None:
    """A force 0.2 eV/Å along x on every atom of an energy that does not know it: power f v."""

    def wind(atoms: Atoms) -> tuple[float, np.ndarray]:
        return 0.0, 0.2 * np.tile([1.0, 0, 0], (len(atoms), 1))

    found = outcome("nve", "H2O", wind, steps=200, relax_steps=1)
    assert found.metrics[0].value > 10
    assert verdicts(found)["drift of the total energy"] == "fail"


def test_drift_is_the_slope_in_its_unit() -> None:
    found = outcome("nve", "H2O", steps=100, equilibration=0.2)
    time, energy = np.array(found.curves["time"]), np.array(found.curves["energy"])
    assert time[-1] == pytest.approx(100 * 0.5e-3)
    slope = np.polyfit(time[20:], energy[20:], 1)[0]
    assert found.metrics[0].value == pytest.approx(abs(slope))


def test_a_dent_in_the_bond_is_found() -> None:
    dent = pair_defect(
        lambda r: -0.5 * np.exp(-((r - 2.0) ** 2) / 0.02),
        lambda r: 50 * (r - 2.0) * np.exp(-((r - 2.0) ** 2) / 0.02) * 0.5 * 2,
    )
    found = outcome("bond_scan", "N2", dent)
    assert verdicts(found)["extra minima and maxima"] == "fail"
    assert verdicts(found)["energy jump, at most"] == "pass"
    assert verdicts(found)["energy - work of the forces, max"] == "pass"
    assert any(abs(place - 2.0) < 0.1 for place in found.curves["extrema"])


def test_a_jump_of_energy_is_found_with_its_size() -> None:
    step = pair_defect(lambda r: 1e-3 * (r > 1.777), lambda r: 0.0)
    values = {m.name: m.value for m in outcome("bond_scan", "N2", step).metrics}
    assert values["energy jump, at most"] == pytest.approx(1.0, rel=1e-3), "meV"
    assert values["energy - work of the forces, max"] == pytest.approx(1.0, rel=0.1)
    assert values["force jump, at most"] < 1e-3


def test_a_kink_is_a_jump_of_the_force() -> None:
    kink = pair_defect(lambda r: 0.05 * max(r - 4.0, 0.0), lambda r: 0.05 * (r > 4.0))
    found = outcome("cutoff", "HF", kink)
    values = {m.name: m.value for m in found.metrics}
    assert values["force jump, at most"] == pytest.approx(0.05, rel=1e-3)
    assert verdicts(found)["force jump, at most"] == "fail"
    assert verdicts(found)["energy jump, at most"] == "pass"
    assert "force jumps at -0.00" in found.notes[0] or "force jumps at +0.00" in found.notes[0]
    assert values["pairs that crossed the cutoff"] == 1


def test_a_cliff_at_the_cutoff_is_found() -> None:
    """Smooth, but the force lasts until just before the cutoff: a smooth step over 0.2 Å."""
    depth, width, end = 0.05, 0.2, 3.95

    def energy(r: float) -> float:
        x = min(max((end - r) / width, 0.0), 1.0)
        return -depth * x**4 * (35 - 84 * x + 70 * x**2 - 20 * x**3)

    def slope(r: float) -> float:
        x = min(max((end - r) / width, 0.0), 1.0)
        return depth * 140 * x**3 * (1 - x) ** 3 / width

    found = outcome("cutoff", "HF", pair_defect(energy, slope))
    tail = next(m for m in found.metrics if m.name.startswith("force in the last 0.5"))
    assert tail.value == pytest.approx(depth * 140 / 64 / width, rel=0.02) and tail.verdict == "fail"
    assert verdicts(found)["energy jump, at most"] == "pass"


def test_forces_that_are_no_gradient_are_found() -> None:
    twist = outcome("forces", "H2O", lambda atoms: (0.0, np.cross(atoms.positions, [0, 0, 0.01])), components=9)
    assert set(verdicts(twist).values()) == {"fail"}


class Rounded(Fake):
    """Energies that are what is left of numbers two hundred times their size, in single precision."""

    precision = "float32"

    def evaluate(self, structures):
        energies, forces = super().evaluate([_in_single_precision(atoms) for atoms in structures])
        return (energies + 200).astype(np.float32).astype(float) - 200, forces

    def resolution(self, atoms: Atoms) -> float:
        return energy_rounding(lambda structures: self.evaluate(structures)[0], atoms, float(np.finfo(np.float32).eps))


def _in_single_precision(atoms: Atoms) -> Atoms:
    rounded = atoms.copy()
    rounded.positions = atoms.positions.astype(np.float32)
    return rounded


@pytest.mark.parametrize("seed", range(6))
def test_rounding_is_measured_and_told_from_errors(seed: int) -> None:
    """Energies are off by up to 8e-6 eV, forty units in the last place of their size: no failure, and no excuse."""
    settings, function = CHECKS["forces"]
    ((name, atoms),) = load_systems(["H2O"], "x")
    size = Rounded().resolution(atoms)
    assert 7.6e-6 <= size <= 4e-5
    for defect, verdict in ((None, "unresolved"), (lambda atoms: (0.0, np.tile([0.02, 0, 0], (3, 1))), "fail")):
        found = function(Rounded(defect), name, atoms, settings(), np.random.default_rng(seed))
        difference = found.metrics[0]
        assert difference.verdict == verdict and difference.resolution < 0.01, difference
    assert Fake().resolution(atoms) < 1e-13


def test_what_is_not_extensive_is_found() -> None:
    found = outcome("extensivity", "H2O", lambda atoms: (1e-3 * len(atoms) ** 1.5, 0.0), copies=(2, 4))
    expected = [1e3 * 1e-3 * 3**1.5 * (n**0.5 - 1) for n in (2, 4)]
    assert [m.value for m in found.metrics[:2]] == pytest.approx(expected)
    assert verdicts(found) == {
        "E_2 / 2 - E_1, copies": "fail",
        "E_n / n - E_1, n up to 4, max": "fail",
        "forces in copies - forces in one, max": "pass",
    }


def test_handedness_and_orientation_are_told_apart() -> None:
    def handed(atoms: Atoms) -> tuple[float, float]:
        first, second, third = (atoms.positions[k] - atoms.positions[0] for k in (1, 2, 3))
        return 0.01 * float(first @ np.cross(second, third)), 0.0

    def oriented(atoms: Atoms) -> tuple[float, float]:
        return 0.01 * float((atoms.positions[1] - atoms.positions[0])[0]) ** 2, 0.0

    mirror, rotated = "energy of the mirror image", "energy of rotated copies, max"
    for system in ("methyloxirane", "CHFClBr"):
        found = verdicts(outcome("reflection", system, handed))
        assert (found[mirror], found[rotated]) == ("fail", "pass")
        found = verdicts(outcome("reflection", system, oriented))
        assert (found[mirror], found[rotated]) == ("pass", "fail")


# ---------------------------------------------------------------- parts
def test_smooth_curves_have_no_jump_and_steps_have_theirs() -> None:
    grid = np.linspace(0, 1, 101)
    (smooth, *_) = find_jumps(np.exp, grid, np.exp(grid), 1e-9, 2)
    assert smooth.size < 1e-13
    wall = lambda x: np.exp(30 * x) + 1e-3 * (x > 0.3)  # noqa: E731
    (found, *_) = find_jumps(wall, grid, wall(grid), 1e-4, 3, candidates=12)
    assert found.size > 1e-3, "a wall hides it at this resolution, and the bound says so"
    gentle = lambda x: np.exp(3 * x) + 1e-3 * (x > 0.3)  # noqa: E731
    (found, *_) = find_jumps(gentle, grid, gentle(grid), 1e-4, 2)
    assert found.size == pytest.approx(1e-3, rel=1e-3) and found.place == pytest.approx(0.3, abs=1e-3)
    assert found.step == pytest.approx(0.01 / 36)
    with pytest.raises(ValueError, match="expected more than 8 points, got 8"):
        find_jumps(np.exp, grid[:8], grid[:8], None, 1)


def test_extrema_and_integrals() -> None:
    x = np.linspace(0, 4 * np.pi, 401)
    minima, maxima = extrema(np.sin(x), 0.1)
    assert x[minima] == pytest.approx([1.5 * np.pi, 3.5 * np.pi], abs=0.02)
    assert x[maxima] == pytest.approx([0.5 * np.pi, 2.5 * np.pi], abs=0.02)
    assert integrate(np.cos(x), x[1]) == pytest.approx(np.sin(x[::2]), abs=1e-7)


def test_splitting_bonds() -> None:
    found = {name: bond_scan.splitting_bond(atoms) for name, atoms in load_systems(["H2", "CH3OH", "C6H6"], "x")}
    assert found["H2"][:2] == (0, 1)
    methanol = load_systems(["CH3OH"], "x")[0][1]
    assert {methanol.symbols[k] for k in found["CH3OH"][:2]} == {"C", "O"}
    assert found["CH3OH"][2].sum() in (2, 4)
    benzene = load_systems(["C6H6"], "x")[0][1]
    assert "H" in {benzene.symbols[k] for k in found["C6H6"][:2]}, "rings are not opened"
    assert outcome("bond_scan", "water_dimer").skipped and outcome("bond_scan", "ammonia_crystal").skipped


def test_copies() -> None:
    (_, ion), (_, crystal) = load_systems(["OH", "ammonia_crystal"], "x")
    ion.info.update(charge=-1, spin=3)
    large = extensivity.copies_of(ion, 3, 20.0)
    assert len(large) == 6 and large.info["charge"] == -3 and large.info["spin"] == 7
    between = [large.get_distances(k, range(k + 2 - k % 2, 6)) for k in range(4)]
    assert min(d.min() for d in between) >= 20.0
    assert large[2:4].get_distance(0, 1) == pytest.approx(ion.get_distance(0, 1))
    eight = extensivity.copies_of(crystal, 8, 20.0)
    assert eight.cell.lengths() == pytest.approx(2 * crystal.cell.lengths())
    assert (eight.numbers[8:16] == crystal.numbers).all()


def test_verdicts() -> None:
    assert Metric("x", 1.0, "eV", 2.0).verdict == "pass"
    assert Metric("x", 3.0, "eV", 2.0).verdict == "fail"
    assert Metric("x", 3.0, "eV", 2.0, resolution=4.0).verdict == "unresolved"
    assert Metric("x", 3.0, "eV").verdict == "info"
    assert Metric("x", float("nan"), "eV", 2.0, 4.0).verdict == "fail"
    assert Metric("x", float("nan"), "eV").as_json()["value"] is None
    assert worst(["info", "pass", "unresolved"]) == "unresolved" and worst([]) == "skipped"


def test_systems(tmp_path: Path) -> None:
    (_, oxygen), (_, water) = load_systems(["O2", "H2O"], "x")
    assert (oxygen.info["spin"], water.info["spin"], water.info["charge"]) == (3, 1, 0)
    assert abs(np.linalg.norm(load_systems(["water_dimer"], "x")[0][1].positions[3]) - 2.91) < 1e-9
    ((_, oxirane),) = load_systems(["methyloxirane"], "x")
    assert oxirane.get_chemical_formula() == "C3H6O"
    first, second = neighbor_list("ij", oxirane, natural_cutoffs(oxirane, mult=1.2))
    assert sorted(np.bincount(first)) == [1] * 6 + [2, 4, 4, 4] and not set(first[first == second])
    water.info["charge"] = 1
    write(tmp_path / "own.xyz", [water, oxygen, water])
    found = load_systems([f"{tmp_path / 'own.xyz'}@1:3"], "structures")
    assert [name for name, _ in found] == ["own[0]", "own[1]"]
    assert found[1][1].info["charge"] == 1 and found[0][1].info["spin"] == 3
    (tmp_path / "broken.xyz").write_text("3\n\nH 0 0\n")
    write(tmp_path / "atom.xyz", Atoms("He"))
    for spec, error, message in (
        ("nothing", FileNotFoundError, "structures: expected a molecule of ASE's g2 collection, one of water_dimer"),
        (str(tmp_path / "broken.xyz"), ValueError, "structures: expected a file of structures that ASE reads"),
        (str(tmp_path / "atom.xyz"), ValueError, "structures: expected structures with 2 atoms or more, got 1"),
    ):
        with pytest.raises(error, match=message):
            load_systems([spec], "structures")
    with pytest.raises(ValueError, match="each system once, got H2O"):
        load_systems(["H2O", "H2O"], "structures")


@pytest.mark.parametrize("defaults", [kind() for kind, _ in CHECKS.values()], ids=list(CHECKS))
def test_default_systems_consist_of_the_samples_elements(defaults, repo: Path) -> None:
    references = json.loads((repo / "e2former_fairchem/data/sample/statistics.json").read_text())["element_references"]
    for name, atoms in load_systems(defaults.systems, "systems"):
        assert set(atoms.numbers) <= set(np.flatnonzero(references)), name


def test_systems_with_elements_never_seen_are_left_out_and_named() -> None:
    potential, lines = Fake(), []
    potential.elements = ("H", "C", "F", "O")
    chosen = select_checks(["reflection"], {"reflection": {"systems": ["H2O2", "CHFClBr"]}}, None)
    found = run_checks(potential, chosen, 0, lines.append)["reflection"]
    assert found["H2O2"].verdict == "pass" and found["CHFClBr"].verdict == "skipped"
    assert "reflection CHFClBr: skipped (training never saw Br, Cl)" in lines[1]
    assert "training never saw Br, Cl" in render(rows({"reflection": found}))


def test_other_spellings_of_charge_and_spin(tmp_path: Path) -> None:
    """Read where they say one thing, refused by file, structure and key where they do not."""
    ion = load_systems(["OH"], "x")[0][1]
    path = tmp_path / "ions.xyz"

    def load(*infos: dict) -> list[tuple[int, int]]:
        structures = [ion.copy() for _ in infos]
        for atoms, info in zip(structures, infos, strict=True):
            atoms.info = info
        write(path, structures)
        return [(atoms.info["charge"], atoms.info["spin"]) for _, atoms in load_systems([str(path)], "structures")]

    found = load({"total_charge": -1, "multiplicity": 1}, {"charge": -1.0, "spin_multiplicity": 3}, {}, {"spin": 2})
    assert found == [(-1, 1), (-1, 3), (0, 1), (0, 2)]
    assert load({"charge": 1, "total_charge": 1, "spin": 3, "multiplicity": 3}) == [(1, 3)]
    for info, message in (
        ({"charge": 0, "total_charge": -1}, "charge: expected one value .*, got total_charge=-1, charge=0"),
        ({"spin": 1, "multiplicity": 2}, "spin: expected one value .*, got multiplicity=2, spin=1"),
        ({"total_charge": -0.5}, "total_charge: expected an integer .*, got .*-0.5"),
        ({"charge": "minus"}, "charge: expected an integer, got 'minus'"),
        ({"multiplicity": 101}, "spin: expected 0 to 100, got 101"),
        ({"spin": True}, "spin: expected an integer, got .*True"),
    ):
        with pytest.raises(ValueError, match=f"structures: structure 1 of .*ions.xyz: {message}"):
            load({}, info)


@pytest.mark.parametrize(
    ("check", "given", "message"),
    [
        ("nve", {"stepz": 3}, "nve: expected keys among systems, temperature, .*, got stepz"),
        ("nve", {"steps": 0}, "nve.steps: expected a positive integer, got 0"),
        ("nve", {"steps": 5}, "nve.steps: expected at least 10 after equilibration, got 5"),
        ("nve", {"equilibration": 1.0}, "nve.equilibration: expected a share below 1"),
        ("nve", {"max_drift": "low"}, "nve.max_drift: expected a positive number or null, got 'low'"),
        ("bond_scan", {"points": 60}, "bond_scan.points: expected an odd number above 16, got 60"),
        ("bond_scan", {"shortest": 1.5}, "expected 0 < shortest < 1 < longest, got shortest 1.5"),
        ("nve", {"steps": 10.5}, "nve.steps: expected a positive integer, got 10.5"),
        ("nve", {"temperature": None}, "nve.temperature: expected a positive number, got None"),
        ("nve", {"time_step": math.nan}, "nve.time_step: expected a positive number, got nan"),
        (
            "extensivity",
            {"copies": [2, "two"]},
            "extensivity.copies: expected a list of positive integers, got .*'two'",
        ),
        ("forces", {"systems": "CH4"}, "forces.systems: expected a list of names or files, got 'CH4'"),
        ("extensivity", {"copies": [1, 2]}, r"extensivity.copies: expected numbers from 2, got \[1, 2\]"),
        ("cutoff", {"systems": []}, r"cutoff.systems: expected a list of names or files, got \[\]"),
        ("cutoff", {"displacement": 0.1}, "cutoff.displacement: expected more than 16 steps of 0.01"),
    ],
)
def test_wrong_settings(check: str, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_settings(CHECKS[check][0], check, given)


def test_an_exception_ends_its_own_check_only() -> None:
    def sulks(atoms: Atoms) -> tuple[float, float]:
        if len(atoms) == 6:
            raise RuntimeError("no | dimers\nplease")
        return 0.0, 0.0

    lines: list[str] = []
    chosen = select_checks(
        ["forces", "extensivity"], {"forces": {"systems": ["H2O", "N2"]}, "extensivity": {"systems": ["H2O"]}}, None
    )
    found = run_checks(Fake(sulks), chosen, 0, lines.append)
    assert summarize(found) == {"forces": "pass", "extensivity": "error"}
    broken = found["extensivity"]["H2O"]
    assert broken.error == "RuntimeError: no | dimers\nplease" and "sulks" in broken.traceback
    assert len(lines) == 3 and lines[2].startswith("pes 3/3") and "extensivity H2O: error (RuntimeError" in lines[2]
    table = render(rows(found))
    assert "RuntimeError: no \\| dimers please" in table and "| error" in table
    assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1
