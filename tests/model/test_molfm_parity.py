"""The authors' networks are reproduced: every file of reference arrays, every system in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from e2former_fairchem.interop.molfm import build_from_molfm

sys.path.insert(0, str(Path(__file__).parent))
from molfm_fixtures import Fixture, atomic_data, load_fixture

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
FOLDER = Path(os.environ.get("E2FORMER_FIXTURES", DEFAULT))
FILES = sorted(FOLDER.glob("*.npz"))
PATHS = FILES or [FOLDER]  # a test without parameters is an error; without files these are skipped

needs_files = pytest.mark.skipif(
    not FILES, reason=f"no reference arrays in {FOLDER}; name their folder in E2FORMER_FIXTURES"
)
pytestmark = needs_files
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def build(fixture: Fixture, conserving: bool, convolution: str = "auto"):
    model = build_from_molfm(fixture.config(conserving), fixture.state_dict, release=fixture.release)
    object.__setattr__(model.backbone.model.config, "convolution", convolution)
    return model.eval()


def assert_close(name: str, got: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Largest difference relative to the largest reference value of the array."""
    scale = np.abs(expected).max(initial=0.0) or 1.0
    error = np.abs(got.detach().double().numpy() - expected).max(initial=0.0) / scale
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_reference_arrays(path: Path, dtype: torch.dtype) -> None:
    fixture = load_fixture(path)
    tolerance = TOLERANCE[dtype]
    conserving, direct = build(fixture, True), build(fixture, False)
    for name, system in fixture.systems.items():
        out = {k.split("/", 1)[1]: v for k, v in system.items() if k.startswith(fixture.outputs + "/")}
        result = conserving(atomic_data(system, dtype))
        where = f"{fixture.name}/{name}"
        assert_close(f"{where} energy", result["energy"]["energy"], out["energy"], tolerance)
        assert_close(f"{where} atom energy", result["energy"]["atom_energy"], out["atom_energy"], tolerance)
        assert_close(f"{where} forces", result["forces"]["forces"], out["forces"], tolerance)
        data = atomic_data(system, dtype)
        result = direct(data)
        assert_close(f"{where} direct energy", result["energy"]["energy"], out["energy"], tolerance)
        assert_close(f"{where} direct forces", result["forces"]["forces"], out["direct_forces"], tolerance)
        features = direct.backbone(data)["node_embedding"]
        assert_close(f"{where} features", features, out["node_irreps"], tolerance)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
@pytest.mark.parametrize("convolution", ["dense", "eaas", "on_the_fly"])
def test_every_convolution(path: Path, convolution: str, float64_default: None) -> None:
    """All three forms, given the file's own edges."""
    fixture = load_fixture(path)
    model = build(fixture, True, convolution)
    model.backbone.otf_graph = False
    for name, system in fixture.systems.items():
        result = model(atomic_data(system, torch.float64, with_edges=True))
        for key, value in (("energy", result["energy"]["energy"]), ("forces", result["forces"]["forces"])):
            assert_close(f"{fixture.name}/{name} {key}", value, system[f"{fixture.outputs}/{key}"], 1e-10)


def changed(fixture: Fixture, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = dict(fixture.state_dict)
    for key, value in changes.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


def test_keys_are_strict() -> None:
    fixture = load_fixture(FILES[0])
    config = fixture.config(True)
    for changes, message in (
        ({"decoder__embedding_charge__weight": None}, r"missing keys: decoder\.embedding_charge\.weight"),
        ({"decoder__mix_cm__0__bias": torch.zeros(3)}, r"misshapen keys: decoder\.mix_cm\.0\.bias: expected \[16\]"),
        ({"decoder__surprise": torch.zeros(3)}, r"unknown keys: decoder\.surprise"),
        ({"head__energy_heads__spice__mlp__0__bias": torch.zeros(3)}, r"unknown keys: head\.energy_heads\.spice"),
    ):
        with pytest.raises(ValueError, match=message):
            build_from_molfm(config, changed(fixture, **changes), release=fixture.release)


def test_direct_forces_need_their_weights() -> None:
    fixture = load_fixture(FILES[0])
    state = {k: v for k, v in fixture.state_dict.items() if not k.startswith("head.force_heads")}
    build_from_molfm(fixture.config(True), state, release=fixture.release)
    with pytest.raises(ValueError, match="missing keys: head.force_heads.omol25"):
        build_from_molfm(fixture.config(False), state, release=fixture.release)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attn_type", "first-order", "attn_type: expected"),
        ("irreps_node_embedding", "16x0e+8x1e", "irreps_node_embedding: expected one multiplicity"),
        ("with_moe", "escn", "with_moe: expected None or 'painn', got 'escn'"),
        ("with_cluster", "mixcluster", "with_cluster: expected"),
        ("ffn_type", "spectral", "ffn_type: only 's3' is implemented"),
        ("AutoGradForce", "perhaps", "AutoGradForce: expected true or false"),
        ("dataset_name_list", "spice", "head: expected one of spice"),
    ],
)
def test_configurations_that_are_refused(key: str, value: object, message: str) -> None:
    fixture = load_fixture(FILES[0])
    with pytest.raises(ValueError, match=message):
        build_from_molfm({**fixture.config(True), key: value}, fixture.state_dict, release=fixture.release)


def test_unknown_release() -> None:
    with pytest.raises(ValueError, match="release: expected 'v2' or 'v1.5', got 'v3'"):
        build_from_molfm({}, {}, release="v3")
