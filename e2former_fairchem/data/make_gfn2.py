"""Structures of organic molecules with GFN2-xTB energies and forces, for a general potential.

    python e2former_fairchem/data/make_gfn2.py benchmarks/gfn2/molecules.smi FOLDER --workers 16

molecules.smi: a SMILES a line (ours are of the public lists Tox21 and ESOL). Needs rdkit and tblite (extra ``data``),
numpy and ase, and nothing else of this package. Every block of molecules becomes one file ``FOLDER/NAME.npz``
(`e2former_fairchem.data.packed`); files that are there are left alone, so that a call that was stopped goes on. The
same list gives the same structures: each molecule's random numbers come from its SMILES. ``--draw 1`` adds as many
others of the same list to the folder. At the end FOLDER/references.json has energies per element, fitted.

| class | structures |
|---|---|
| relaxed | a conformer on its way to the minimum of GFN2-xTB |
| displaced | conformers with Gaussian noise, 0.01 to 0.1 Å |
| dynamics | from the minimum, every fifth step of 1 fs with xTB forces and a Langevin thermostat, 300 to 1,000 K |
| stretched | two parts moved along a bond, 0.7 to 2.5 times its length |
| torsion | parts turned about a single bond |
| dimer, trimer | with one or two other molecules, closest contact 1.5 to 6 Å |
| ion | a proton more at N, O, S or P, or one less; an electron more or less; some relaxed and moved |
| radical | a hydrogen atom less, doublets of closed shells; some relaxed and moved |
| water | clusters of 2 to 24 water molecules |
| fragment | what single bonds outside rings leave, up to six heavy atoms, alone or with a hydrogen, in three charges |
| pair, atom | every pair of the elements at 0.7 to 2.5 times their covalent distance; atoms alone |

Molecules that the bundled sample keeps for ``val_new`` are left out, in every charge.

A tenth of the molecules, by hash of the canonical SMILES, is for tests: ``test`` is 1 for all of their structures,
whose partners in dimers are of that tenth too. What has one heavy atom is for training: nothing else is like it. Left
out and counted are structures whose calculation does not converge, with a force above 40 eV/Å, or with atoms closer
than half of their covalent distance.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one calculation a process; sums in one order

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculationFailed, Calculator, all_changes
from ase.data import atomic_masses, covalent_radii
from ase.optimize import LBFGS

HARTREE, BOHR = 27.211386245988, 0.529177210903
MAX_FORCE = 40.0
CLOSEST = 0.5
#: Molecules of a file.
BLOCK = 32
ELEMENTS = (1, 5, 6, 7, 8, 9, 14, 15, 16, 17, 35, 53)
CLASSES = (
    "displaced", "dynamics", "stretched", "torsion", "dimer", "trimer", "ion", "radical", "water", "pair", "atom",
    "relaxed", "fragment",
)  # fmt: skip
#: Canonical SMILES of the molecules in `make_sample.HELD_OUT_MOLECULES`.
VAL_NEW = {"CCO", "CC(C)=O", "c1ccncc1", "CC#N", "CS", "CCCC", "[CH]=O", "O=CO"}
#: Structures of a molecule by class; of ions and radicals as many more are relaxed and moved.
NUMBER = {"displaced": 5, "dynamics": 8, "stretched": 6, "torsion": 3, "dimer": 7, "trimer": 2, "ion": 4, "radical": 2}
#: Steps of a relaxation that are kept beside the last; steps of dynamics between kept ones.
RELAXED, STRIDE = (0, 3, 8), 5
#: Files of water clusters, clusters in each; distances of a pair.
WATER_FILES, WATERS, PAIR_DISTANCES = 20, 100, 40
#: Heavy atoms of a fragment, at most; structures of its dynamics in each state; fragments of a file.
HEAVY, FRAGMENT_DYNAMICS, FRAGMENTS = 6, 4, 100
#: Unpaired electrons of atoms alone.
UNPAIRED = {1: 1, 5: 1, 6: 2, 7: 3, 8: 2, 9: 1, 14: 2, 15: 3, 16: 2, 17: 1, 35: 1, 53: 1}
KELVIN = 8.617333262e-5  # eV
#: Velocities of dynamics are in Å per ASE's unit of time, of which this is a femtosecond.
FEMTOSECOND = 0.09822694788464063


class Structure(NamedTuple):
    """numbers: [N]. positions: [N, 3], Å. charge: e. unpaired: electrons."""

    kind: str
    numbers: np.ndarray
    positions: np.ndarray
    charge: int
    unpaired: int


class Label(NamedTuple):
    """energy: eV. forces: [N, 3], eV/Å."""

    energy: float
    forces: np.ndarray


class GFN2:
    """GFN2-xTB of one molecule at changing positions; each calculation starts from the last one's wave function."""

    def __init__(self, numbers: np.ndarray, charge: int, unpaired: int) -> None:
        self.numbers, self.charge, self.unpaired = numbers, charge, unpaired
        self.calculator, self.last = None, None

    def __call__(self, positions: np.ndarray) -> Label | None:
        """None where it does not converge."""
        from tblite.interface import Calculator

        try:
            if self.calculator is None:
                self.calculator = Calculator(
                    "GFN2-xTB", self.numbers, positions / BOHR, float(self.charge), self.unpaired
                )
                self.calculator.set("verbosity", 0)
            else:
                self.calculator.update(positions / BOHR)
            self.last = self.calculator.singlepoint(self.last) if self.last else self.calculator.singlepoint()
        except (RuntimeError, ValueError):  # tblite's errors
            self.calculator = self.last = None
            return None
        found = Label(float(self.last["energy"]) * HARTREE, -np.array(self.last["gradient"]) * HARTREE / BOHR)
        return found if np.isfinite(found.energy) and np.isfinite(found.forces).all() else None


class ForASE(Calculator):
    """A `GFN2` as ASE's optimisers want it."""

    implemented_properties = ("energy", "forces")

    def __init__(self, method: GFN2) -> None:
        super().__init__()
        self.method = method

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        label = self.method(atoms.positions)
        if label is None:
            raise CalculationFailed("does not converge")
        self.results = label._asdict()


class Molecule:
    """A SMILES with hydrogens and a few conformers; each ``draw`` has its own random numbers.

    Raises ValueError where RDKit finds no conformer, elements are others than ELEMENTS, or it is in VAL_NEW.
    """

    def __init__(self, smiles: str, conformers: int = 3, draw: int = 0) -> None:
        from rdkit import Chem
        from rdkit.Chem import AllChem
        from rdkit.Chem.MolStandardize import rdMolStandardize

        neutral = rdMolStandardize.Uncharger().uncharge(Chem.MolFromSmiles(smiles))
        if Chem.MolToSmiles(neutral) in VAL_NEW:
            raise ValueError(f"{smiles}: kept for val_new of the bundled sample")
        self.rdkit = Chem.AddHs(Chem.MolFromSmiles(smiles))
        self.smiles = Chem.MolToSmiles(Chem.RemoveHs(self.rdkit))
        self.numbers = np.array([atom.GetAtomicNum() for atom in self.rdkit.GetAtoms()])
        if not set(self.numbers) <= set(ELEMENTS):
            raise ValueError(f"{smiles}: elements other than {ELEMENTS}")
        self.charge = Chem.GetFormalCharge(self.rdkit)
        self.unpaired = sum(atom.GetNumRadicalElectrons() for atom in self.rdkit.GetAtoms())
        seed = int.from_bytes(hashlib.sha256(self.smiles.encode()).digest()[:4], "little") >> 1
        options = AllChem.ETKDGv3()
        options.randomSeed, options.maxIterations = seed - draw, 50
        if len(AllChem.EmbedMultipleConfs(self.rdkit, conformers, options)) == 0:
            raise ValueError(f"{smiles}: no conformer")
        if AllChem.MMFFHasAllMoleculeParams(self.rdkit):
            AllChem.MMFFOptimizeMoleculeConfs(self.rdkit, maxIters=200)
        elif AllChem.UFFHasAllMoleculeParams(self.rdkit):
            AllChem.UFFOptimizeMoleculeConfs(self.rdkit, maxIters=200)
        self.conformers = [conformer.GetPositions() for conformer in self.rdkit.GetConformers()]
        self.bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in self.rdkit.GetBonds()]
        self.random = np.random.default_rng([seed, draw])  # of draw 0 as of the seed alone

    @property
    def is_test(self) -> bool:
        """Of the tenth that no training sees. Of one heavy atom none is: no other molecule would teach it."""
        return bool((self.numbers > 1).sum() > 1) and hashlib.sha256(self.smiles.encode()).digest()[-1] * 10 < 256

    def any_conformer(self) -> np.ndarray:
        """A copy of one of them."""
        return self.conformers[self.random.integers(len(self.conformers))].copy()

    def noise(self, positions: np.ndarray, most: float) -> np.ndarray:
        """Displaced by up to ``most`` Å in each direction (standard deviation)."""
        return positions + self.random.normal(0, self.random.uniform(0.01, most), positions.shape)

    def part(self, first: int, second: int) -> np.ndarray | None:
        """[N] bool: the side of the bond's second atom; None for a bond of a ring."""
        neighbors: list[list[int]] = [[] for _ in self.numbers]
        for a, b in self.bonds:
            if {a, b} != {first, second}:
                neighbors[a].append(b)
                neighbors[b].append(a)
        found, todo = {second}, [second]
        while todo:
            for other in neighbors[todo.pop()]:
                if other not in found:
                    found.add(other)
                    todo.append(other)
        return None if first in found else np.isin(np.arange(len(self.numbers)), list(found))


def _readable(smiles: Iterable[str], conformers: int, draw: int) -> Iterator[Molecule]:
    """Those that RDKit and GFN2-xTB's elements allow; the others are said."""
    for text in smiles:
        try:
            yield Molecule(text, conformers, draw)
        except Exception as error:  # RDKit's own errors have no common class
            print(f"{text} is left out: {error}", flush=True)


def molecules(smiles: Iterable[str], draw: int = 0) -> Iterator[tuple[Structure, Label | None, int]]:
    """Structures of molecules with their labels and whether they are for tests."""
    known = [*_readable(smiles, 3, draw)]
    for molecule in known:
        partners = [other for other in known if other.is_test == molecule.is_test and len(other.numbers) <= 24]
        for structure, label in _of_molecule(molecule, partners):
            yield structure, label, int(molecule.is_test)


def pieces(smiles: list[str]) -> list[str]:
    """SMILES of what single bonds outside rings leave of the molecules, as radicals and with a hydrogen, by length."""
    from rdkit import Chem

    found = set()
    for text in smiles:
        whole = Chem.AddHs(Chem.MolFromSmiles(text))
        for bond in whole.GetBonds():
            ends = bond.GetBeginAtom(), bond.GetEndAtom()
            heavy = all(atom.GetAtomicNum() > 1 for atom in ends)
            if not heavy or bond.IsInRing() or bond.GetBondType() != Chem.BondType.SINGLE:
                continue
            cut = Chem.RWMol(whole)
            cut.RemoveBond(*(atom.GetIdx() for atom in ends))
            for atom in ends:
                radical = cut.GetAtomWithIdx(atom.GetIdx())
                radical.SetNumRadicalElectrons(atom.GetNumRadicalElectrons() + 1)
                radical.SetNoImplicit(True)
            for part in Chem.GetMolFrags(cut, asMols=True):
                if part.GetNumHeavyAtoms() > HEAVY:
                    continue
                radical = Chem.RemoveHs(part)
                found.add(Chem.MolToSmiles(radical))
                for atom in radical.GetAtoms():
                    atom.SetNumRadicalElectrons(0)
                    atom.SetNoImplicit(False)
                radical.UpdatePropertyCache()
                found.add(Chem.MolToSmiles(radical))
    return sorted(found, key=lambda text: (len(text), text))


def fragments(smiles: Iterable[str], draw: int = 0) -> Iterator[tuple[Structure, Label | None, int]]:
    """Fragments with their labels and whether they are for tests: on the way to their minima, and moving."""
    for piece in _readable(smiles, 1, draw):
        for charge in (0, 1, -1):
            unpaired = piece.unpaired if charge == 0 else 1 - piece.unpaired % 2
            start = Structure("fragment", piece.numbers, piece.conformers[0], piece.charge + charge, unpaired)
            for structure, label in _moving(start, 20, FRAGMENT_DYNAMICS, piece.random):
                yield structure, label, int(piece.is_test)


def waters(seed: int) -> Iterator[tuple[Structure, Label | None, int]]:
    """Water clusters; a tenth of them is for tests."""
    random = np.random.default_rng(seed)
    for n in range(WATERS):
        structure = water_cluster(random, int(random.integers(2, 25)))
        yield structure, _label(structure), int(n % 10 == 0)


def pairs() -> Iterator[tuple[Structure, Label | None, int]]:
    """Atoms alone and every pair of the elements."""
    for n, a in enumerate(ELEMENTS):
        structure = Structure("atom", np.array([a]), np.zeros((1, 3)), 0, UNPAIRED[a])
        yield structure, _label(structure), 0
        for b in ELEMENTS[n:]:
            length = covalent_radii[a] + covalent_radii[b]
            for factor in np.linspace(0.7, 2.5, PAIR_DISTANCES):
                positions = np.array([[0, 0, 0], [0, 0, factor * length]])
                structure = Structure("pair", np.array([a, b]), positions, 0, (a + b) % 2)
                yield structure, _label(structure), 0


def _label(structure: Structure) -> Label | None:
    return GFN2(structure.numbers, structure.charge, structure.unpaired)(structure.positions)


def _of_molecule(molecule: Molecule, partners: list[Molecule]) -> Iterator[tuple[Structure, Label | None]]:
    numbers, charge, unpaired = molecule.numbers, molecule.charge, molecule.unpaired
    method = GFN2(numbers, charge, unpaired)
    start = Structure("relaxed", numbers, molecule.any_conformer(), charge, unpaired)
    minimum = yield from _relaxed(start, method, 20)
    yield from _dynamics(minimum._replace(kind="dynamics"), method, NUMBER["dynamics"], molecule.random)
    molecule.conformers.append(minimum.positions)
    for kind, positions in _deformed(molecule):
        yield Structure(kind, numbers, positions, charge, unpaired), method(positions)
    for kind in ("ion", "radical"):
        made = (_ions if kind == "ion" else _radicals)(molecule, minimum.positions)
        if (first := next(made, None)) is not None:
            yield from _moving(first, 10, NUMBER[kind], molecule.random)
    others = [*_clusters(molecule, partners), *_ions(molecule), *_charged(molecule), *_radicals(molecule)]
    for structure in others:
        yield structure, _label(structure)


def _deformed(molecule: Molecule) -> Iterator[tuple[str, np.ndarray]]:
    random = molecule.random
    for _ in range(NUMBER["displaced"]):
        yield "displaced", molecule.noise(molecule.any_conformer(), 0.1)
    open_bonds = [(a, b, part) for a, b in molecule.bonds if (part := molecule.part(a, b)) is not None]
    if not open_bonds:
        return
    for _ in range(NUMBER["stretched"]):
        a, b, part = open_bonds[random.integers(len(open_bonds))]
        positions = molecule.noise(molecule.any_conformer(), 0.05)
        factor = random.uniform(0.7, 1.3) if random.random() < 0.5 else random.uniform(1.3, 2.5)
        positions[part] += (positions[b] - positions[a]) * (factor - 1)
        yield "stretched", positions
    single = [(a, b, part) for a, b, part in open_bonds if 1 < part.sum() < len(part) - 1]
    for _ in range(NUMBER["torsion"] if single else 0):
        a, b, part = single[random.integers(len(single))]
        positions = molecule.noise(molecule.any_conformer(), 0.05)
        axis = positions[b] - positions[a]
        turn = _rotation(axis / np.linalg.norm(axis), random.uniform(0, 2 * np.pi))
        positions[part] = (positions[part] - positions[b]) @ turn.T + positions[b]
        yield "torsion", positions


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rodrigues' formula."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def _any_rotation(random: np.random.Generator) -> np.ndarray:
    axis = random.normal(size=3)
    return _rotation(axis / np.linalg.norm(axis), random.uniform(0, 2 * np.pi))


Labelled = tuple[Structure, Label | None]


def _relaxed(start: Structure, method: GFN2, steps: int) -> Generator[Labelled, None, Structure]:
    """Some steps of a relaxation, and its end, which is returned; where a calculation fails, the last one before."""
    atoms = Atoms(start.numbers, start.positions)
    atoms.calc = ForASE(method)
    found = start
    try:
        for step, _ in enumerate(LBFGS(atoms, logfile=None, maxstep=0.1).irun(fmax=0.01, steps=steps)):
            found = start._replace(positions=atoms.positions.copy())
            if step in RELAXED:
                yield found, Label(atoms.get_potential_energy(), atoms.get_forces())
        if step not in RELAXED:
            yield found, Label(atoms.get_potential_energy(), atoms.get_forces())
    except CalculationFailed:
        yield start._replace(positions=atoms.positions.copy()), None
    return found


def _dynamics(start: Structure, method: GFN2, kept: int, random: np.random.Generator) -> Iterator[Labelled]:
    """Langevin dynamics by velocity Verlet; ends where a calculation fails."""
    thermal = KELVIN * random.uniform(300, 1000)
    mass = atomic_masses[start.numbers][:, None]
    positions = start.positions
    # from a minimum half of the kinetic energy goes into the bonds
    velocities = random.normal(size=positions.shape) * np.sqrt(1.5 * thermal / mass)
    step, keep = FEMTOSECOND, np.exp(-0.02)  # the thermostat forgets within fifty steps
    label = method(positions)
    for n in range(1, STRIDE * kept + 1):
        if label is None or np.abs(label.forces).max() > 2 * MAX_FORCE:
            return
        velocities = velocities + 0.5 * step * label.forces / mass
        positions = positions + step * velocities
        label = method(positions)
        if label is None:
            yield start._replace(positions=positions), None
            return
        velocities = velocities + 0.5 * step * label.forces / mass
        velocities = keep * velocities + np.sqrt((1 - keep**2) * thermal / mass) * random.normal(size=velocities.shape)
        if n % STRIDE == 0:
            yield start._replace(positions=positions), label


def _moving(start: Structure, steps: int, kept: int, random: np.random.Generator) -> Iterator[Labelled]:
    """On the way to the minimum, and dynamics from there; an atom alone as it is."""
    method = GFN2(start.numbers, start.charge, start.unpaired)
    if len(start.numbers) == 1:
        yield start, method(start.positions)
        return
    relaxed = yield from _relaxed(start, method, steps)
    yield from _dynamics(relaxed, method, kept, random)


def _clusters(molecule: Molecule, partners: list[Molecule]) -> Iterator[Structure]:
    if not partners or len(molecule.numbers) > 40:
        return
    random = molecule.random
    for kind, more in [("dimer", 1)] * NUMBER["dimer"] + [("trimer", 2)] * NUMBER["trimer"]:
        numbers, positions = molecule.numbers, molecule.noise(molecule.any_conformer(), 0.06)
        charge, unpaired = molecule.charge, molecule.unpaired
        for _ in range(more):
            other = partners[random.integers(len(partners))]
            shape = other.conformers[random.integers(len(other.conformers))]
            shape = (shape - shape.mean(0)) @ _any_rotation(random).T + random.normal(0, 0.03, shape.shape)
            positions = np.concatenate([positions, _beside(positions, shape, random.uniform(1.5, 6.0), random)])
            numbers = np.concatenate([numbers, other.numbers])
            charge, unpaired = charge + other.charge, unpaired + other.unpaired
        yield Structure(kind, numbers, positions, charge, unpaired)


def _beside(first: np.ndarray, second: np.ndarray, contact: float, random: np.random.Generator) -> np.ndarray:
    """The second cloud moved along a random direction until its closest atom is ``contact`` Å from the first one's."""
    direction = random.normal(size=3)
    direction /= np.linalg.norm(direction)
    start = first.mean(0)
    near, far = 0.0, 100.0
    for _ in range(40):
        middle = 0.5 * (near + far)
        apart = np.linalg.norm(first[:, None] - (second + start + middle * direction)[None], axis=-1).min()
        near, far = (middle, far) if apart < contact else (near, middle)
    return second + start + far * direction


def _ions(molecule: Molecule, at: np.ndarray | None = None) -> Iterator[Structure]:
    """With a proton more, where there is most room, or one less. at: positions; noisy conformers without."""
    random, numbers = molecule.random, molecule.numbers
    basic = np.flatnonzero(np.isin(numbers, (7, 8, 15, 16)))
    acidic = _hydrogens(molecule)
    first = random.integers(2)
    for n in range(first, first + NUMBER["ion"] // 2):
        positions = molecule.noise(molecule.any_conformer(), 0.05) if at is None else at
        if n % 2 == 0 and len(basic):
            place = positions[random.choice(basic)]
            directions = random.normal(size=(30, 3))
            directions /= np.linalg.norm(directions, axis=1, keepdims=True)
            room = np.linalg.norm(place + directions[:, None] - positions[None], axis=-1).min(1)
            proton = place + random.uniform(0.95, 1.1) * directions[room.argmax()]
            more = np.concatenate([positions, proton[None]])
            yield Structure("ion", np.append(numbers, 1), more, molecule.charge + 1, molecule.unpaired)
        elif len(acidic):
            kept = np.arange(len(numbers)) != random.choice(acidic)
            yield Structure("ion", numbers[kept], positions[kept], molecule.charge - 1, molecule.unpaired)


def _charged(molecule: Molecule) -> Iterator[Structure]:
    """With an electron less, and one more."""
    unpaired = 1 - molecule.unpaired % 2
    for charge in (molecule.charge + 1, molecule.charge - 1):
        yield Structure("ion", molecule.numbers, molecule.noise(molecule.any_conformer(), 0.05), charge, unpaired)


def _radicals(molecule: Molecule, at: np.ndarray | None = None) -> Iterator[Structure]:
    hydrogens = _hydrogens(molecule)
    if molecule.smiles == "C=O":
        return  # HCO is in `VAL_NEW`
    for _ in range(NUMBER["radical"] if len(hydrogens) else 0):
        kept = np.arange(len(molecule.numbers)) != molecule.random.choice(hydrogens)
        positions = molecule.noise(molecule.any_conformer(), 0.05) if at is None else at
        unpaired = molecule.unpaired + 1 if molecule.unpaired == 0 else molecule.unpaired - 1
        yield Structure("radical", molecule.numbers[kept], positions[kept], molecule.charge, unpaired)


def _hydrogens(molecule: Molecule) -> np.ndarray:
    return np.flatnonzero(molecule.numbers == 1) if len(molecule.numbers) > 2 else np.array([], int)


def water_cluster(random: np.random.Generator, count: int) -> Structure:
    """Water molecules turned at random, each against those before it."""
    one = np.array([[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]])
    positions = one + random.normal(0, 0.03, one.shape)
    for _ in range(count - 1):
        another = one @ _any_rotation(random).T + random.normal(0, 0.03, one.shape)
        positions = np.concatenate([positions, _beside(positions, another, random.uniform(1.6, 3.0), random)])
    return Structure("water", np.tile([8, 1, 1], count), positions, 0, 0)


def why_not(structure: Structure, label: Label | None) -> str | None:
    """Why a structure is left out."""
    if label is None:
        return "does not converge"
    if np.abs(label.forces).max() > MAX_FORCE:
        return f"force above {MAX_FORCE:g} eV/Å"
    apart = np.linalg.norm(structure.positions[:, None] - structure.positions[None], axis=-1)
    radii = covalent_radii[structure.numbers]
    close = apart < CLOSEST * (radii[:, None] + radii[None])
    return "atoms too close" if close.sum() > len(apart) else None


class Job(NamedTuple):
    """A file to make: of these SMILES, of fragments, of water clusters by their seed, or of pairs."""

    name: str
    smiles: tuple[str, ...] = ()
    water: int | None = None
    fragments: tuple[str, ...] = ()
    draw: int = 0

    def structures(self) -> Iterator[tuple[Structure, Label | None, int]]:
        """With labels and whether they are for tests."""
        if self.smiles:
            return molecules(self.smiles, self.draw)
        if self.fragments:
            return fragments(self.fragments, self.draw)
        return pairs() if self.water is None else waters(self.water + WATER_FILES * self.draw)


def write(folder: Path, job: Job) -> dict[str, Counter]:
    """Compute one file; returns how many structures of each class were kept and left out, and why."""
    counts: dict[str, Counter] = {name: Counter() for name in CLASSES}
    kept, file = [], folder / f"{job.name}.npz"
    for structure, label, test in job.structures():
        reason = why_not(structure, label)
        counts[structure.kind][reason or "kept"] += 1
        if reason is None:
            kept.append((structure, label, test))
    if not kept:
        return counts
    arrays = {
        "natoms": np.array([len(s.numbers) for s, _, _ in kept], np.int16),
        "numbers": np.concatenate([s.numbers for s, _, _ in kept]).astype(np.uint8),
        "positions": np.concatenate([s.positions - s.positions.mean(0) for s, _, _ in kept]).astype(np.float32),
        "forces": np.concatenate([label.forces for _, label, _ in kept]).astype(np.float32),
        "energy": np.array([label.energy for _, label, _ in kept], np.float64),
        "charge": np.array([s.charge for s, _, _ in kept], np.int8),
        "spin": np.array([s.unpaired + 1 for s, _, _ in kept], np.int8),
        "kind": np.array([CLASSES.index(s.kind) for s, _, _ in kept], np.uint8),
        "test": np.array([test for _, _, test in kept], np.uint8),
    }
    partial_file = folder / f".{file.name}"
    with partial_file.open("wb") as handle:
        np.savez_compressed(handle, **arrays)
    partial_file.replace(file)
    return counts


def fit_references(folder: Path) -> dict[str, float]:
    """Energies per element, eV by atomic number: least squares over neutral structures that are not for tests."""
    rows, energies = [], []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as content:
            natoms = content["natoms"].astype(int)
            counts = np.zeros((len(natoms), max(ELEMENTS) + 1))
            np.add.at(counts, (np.repeat(np.arange(len(natoms)), natoms), content["numbers"].astype(int)), 1)
            chosen = (content["test"] == 0) & (content["charge"] == 0)
            rows.append(counts[chosen])
            energies.append(content["energy"][chosen])
    counts, energy = np.concatenate(rows), np.concatenate(energies)
    there = np.flatnonzero(counts.sum(0))
    fitted = np.linalg.lstsq(counts[:, there], energy, rcond=None)[0]
    return {str(z): round(float(value), 6) for z, value in zip(there, fitted, strict=True)}


def _jobs(smiles: list[str], draw: int) -> list[Job]:
    # neighbours in the list are of one size: a block has molecules from all over it
    blocks = -(-len(smiles) // BLOCK)
    found = [Job(f"molecules_{n:04d}", tuple(smiles[n::blocks])) for n in range(blocks)]
    parts = pieces(smiles)
    files = -(-len(parts) // FRAGMENTS)
    found += [Job(f"fragments_{n:04d}", fragments=tuple(parts[n::files])) for n in range(files)]
    found += [Job(f"water_{n:04d}", water=n) for n in range(WATER_FILES)]
    if draw == 0:
        return [*found, Job("pairs")]  # nothing of theirs is random
    return [job._replace(name=f"{job.name}_draw_{draw}", draw=draw) for job in found]


def main(argv: list[str] | None = None) -> None:
    """Compute all files that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("molecules", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: none but this one")
    parser.add_argument("--draw", type=int, default=0, help="0: the first; others add to it")
    parser.add_argument("--limit", type=int, help="of the molecules, evenly spread")
    options = parser.parse_args(argv)
    smiles = options.molecules.read_text().split()
    if options.limit:
        smiles = smiles[:: max(len(smiles) // options.limit, 1)][: options.limit]
    options.folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for job in _jobs(smiles, options.draw) if not (options.folder / f"{job.name}.npz").is_file()]
    total: dict[str, Counter] = {name: Counter() for name in CLASSES}
    with contextlib.ExitStack() as stack:
        if options.workers:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=8))
            done = pool.imap_unordered(partial(write, options.folder), jobs)
        else:
            done = map(partial(write, options.folder), jobs)
        for n, counts in enumerate(done, 1):
            for name, counter in counts.items():
                total[name].update(counter)
            print(f"{n} of {len(jobs)} files, {sum(c['kept'] for c in total.values()):,} structures", flush=True)
    references = {"element_references": fit_references(options.folder), "unit": "eV"}
    (options.folder / "references.json").write_text(json.dumps(references, indent=1) + "\n")
    print(json.dumps(total, indent=1))


if __name__ == "__main__":
    main()
