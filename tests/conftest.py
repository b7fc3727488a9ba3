"""Shared fixtures. fairchem is imported only where a fixture needs it: kernel tests run without it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.util
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # The tests' tensors are too small to share, and threads of several processes on two cores wait for each other.
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Kernels run in Triton's interpreter where there is no GPU; this must be set before triton is first imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    # The first process of a node writes fairchem's report on the environment, for which other programs are asked: three
    # seconds and more for every run. Without SLURM nothing else reads this.
    os.environ["SLURM_LOCALID"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()  # what modules hold stays: each of thousands of gc.collect() would walk it for half a second


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # C++ bindings count what is left at the end


@pytest.fixture(autouse=True)
def no_device_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairchem keeps the device that one test has chosen in the environment, where the next would find it."""
    if "fairchem.core.common.distutils" in sys.modules:
        monkeypatch.delenv(sys.modules["fairchem.core.common.distutils"].CURRENT_DEVICE_TYPE_STR, raising=False)


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    """Triton's interpreter without what it does again and again for nothing, two fifths of its time.

    It puts its functions into `triton.language` at every call of a kernel and of every function in one: once will do.
    It computes the operands of overflow checks and does not make these unless `debug` is set.
    """
    if torch.cuda.is_available() or not importlib.util.find_spec("triton"):
        return
    import triton.language as tl
    from triton.runtime import interpreter

    done = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    @functools.cache
    def patch_once(function: Callable) -> object:
        seen = any(value is tl or value is tl.core for value in function.__globals__.values())
        assert seen, f"{function.__module__}.{function.__qualname__}: Triton's interpreter wants tl among its globals"
        return type(done)()

    interpreter._patch_lang = patch_once
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The authors' reference arrays: E2FORMER_FIXTURES, or ../shared/fixtures beside the checkout."""
    folder = Path(os.environ.get("E2FORMER_FIXTURES", ROOT.parent / "shared" / "fixtures"))
    if not folder.is_dir():
        pytest.skip(f"no reference fixtures at {folder}; name their folder in E2FORMER_FIXTURES")
    return folder


@pytest.fixture
def float64_default() -> Iterator[None]:
    """Float64 as torch's default dtype for one test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: in Triton's interpreter on a machine without a GPU, and on the GPU of one that has it."""
    if request.param == "cpu":
        from e2former_kernels.common.backend import triton_installed

        if torch.cuda.is_available() or not triton_installed():
            pytest.skip("runs in Triton's interpreter, without a GPU")
    return request.param


@pytest.fixture
def matmul_precision() -> Iterator[Callable[[str], None]]:
    """Sets the precision of float32 products, `highest` or `high` (TF32 on a GPU), for one test."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str], list]:
    """`spy(owner, name)`: arguments and result of every later call of a function, which does what it did."""

    def watch(owner: object, name: str) -> list:
        calls, inner = [], getattr(owner, name)

        def run(*args: object, **options: object) -> object:
            call = [args, None]  # of a function that raises, too
            calls.append(call)
            call[1] = inner(*args, **options)
            return call[1]

        monkeypatch.setattr(owner, name, run)
        return calls

    return watch


@pytest.fixture
def run_script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`run_script(FILE, *arguments)`: what `python FILE arguments` does, within this process."""

    def run(file: Path, *arguments: str) -> None:
        monkeypatch.syspath_prepend(str(file.parent))
        monkeypatch.setattr(sys, "argv", [str(file), *arguments])
        runpy.run_path(str(file), run_name="__main__")

    return run


#: Widths of a network that takes milliseconds.
TINY = (
    "backbone.sphere_channels=8",
    "backbone.num_layers=1",
    "backbone.num_heads=4",
    "backbone.head_dim=2",
    "backbone.num_radial_basis=8",
    "job.device_type=CPU",
)


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Overrides that make a run of our configs tiny, and keep it on the CPU."""
    return TINY


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder that is no checkout."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def forks() -> BaseContext:
    """Makes processes that have everything imported, by forking one that has nothing but that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fairchem.core._cli", "e2former_fairchem.training.runner", "e2former_fairchem.runners.md"]
    )
    return context


@pytest.fixture
def launch(elsewhere: Path, forks: BaseContext, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`fairchem -c CONFIG OVERRIDES` within this process: a new one takes ten seconds of imports.

    Several ranks are forks of a process that has everything imported and nothing else: one of this process would wait
    for threads that it has not.
    """
    from fairchem.core import _cli
    from torch.distributed.launcher import api

    assert forks.get_start_method() == "forkserver"
    monkeypatch.setattr(api, "LaunchConfig", functools.partial(api.LaunchConfig, start_method="forkserver"))
    environment, level = dict(os.environ), logging.getLogger().level
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}

    def run(config: Path, *overrides: str) -> None:
        try:
            _cli.main(argparse.Namespace(config=str(config)), list(overrides))
        finally:
            from fairchem.core.common import distutils

            if distutils.initialized():
                distutils.cleanup()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)
    logging.getLogger().setLevel(level)


@pytest.fixture
def fairchem_process(elsewhere: Path) -> Callable[..., subprocess.CompletedProcess]:
    """`fairchem -c CONFIG OVERRIDES` in a process of its own; `ok` tells whether it should succeed."""

    def run(
        config: Path, *overrides: str, ok: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        own = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK")}
        result = subprocess.run(
            [sys.executable, "-c", "from fairchem.core._cli import main; main()", "-c", str(config), *overrides],
            cwd=elsewhere,
            env=own | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert (result.returncode == 0) == ok, result.stdout[-3000:] + result.stderr[-6000:]
        return result

    return run


def fake_molecules(number: int, seed: int = 0) -> list[Atoms]:
    """Random molecules with made-up labels and OMol25's info keys: heavy elements, charges and spins among them."""
    rng = np.random.default_rng(seed)
    molecules = []
    for i in range(number):
        natoms = int(rng.integers(2, 7))
        grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), -1).reshape(-1, 3)
        positions = 1.6 * rng.permutation(grid)[:natoms] + rng.normal(scale=0.1, size=(natoms, 3))
        atoms = Atoms(rng.choice(["H", "C", "O", "Fe", "I"], natoms), positions=positions)
        forces = rng.normal(size=(natoms, 3))
        atoms.calc = SinglePointCalculator(atoms, energy=float(rng.normal()), forces=forces - forces.mean(0))
        atoms.info = {
            "charge": int(rng.integers(-2, 3)),
            "spin": int(rng.integers(1, 4)),
            "source": f"fake/molecule{i}/q0/m1/0",
            "data_id": ("elytes", "metal_complexes")[i % 2],
            "num_atoms": natoms,
        }
        molecules.append(atoms)
    return molecules


@pytest.fixture(scope="session")
def fake_omol25(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """Overrides that point our training configs to a fake data set in OMol25's format."""
    from e2former_fairchem.data.make_sample import write_folder

    folder = tmp_path_factory.mktemp("omol25")
    write_folder(fake_molecules(24, seed=1), folder / "train")
    write_folder(fake_molecules(6, seed=2), folder / "val")
    return f"data_train={folder / 'train'}", f"data_val={folder / 'val'}"
