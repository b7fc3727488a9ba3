"""The Hydra plugin: our groups and short names in other people's fairchem YAMLs, and nothing in other applications."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fairchem.core._cli import get_hydra_config_from_yaml
from torch import nn

from e2former_fairchem.backbone import E2FormerV2Backbone
from e2former_fairchem.training import resolvers

HOST = Path(__file__).parent / "host" / "uma_sm_direct.yaml"

#: The host's keys that only its own backbone reads. fairchem refuses keys that nobody reads.
DELETIONS = ("~moe_layer_type", "~num_moe_experts", "~otf_graph", "~direct_forces", "~dataset_list")

#: Keeps our published network small enough for a test.
SMALL = ("backbone.sphere_channels=8", "backbone.num_layers=1", "backbone.num_heads=4", "backbone.num_radial_basis=8")


@pytest.fixture
def data(fake_omol25: Sequence[str]) -> str:
    """Where the host's cluster keeps its data."""
    return f"cluster.data_root_dir={Path(fake_omol25[0].split('=')[1]).parent}"


@pytest.fixture
def train(launch: Callable, data: str, elsewhere: Path, caplog: pytest.LogCaptureFixture) -> Callable:
    """`train(OVERRIDES)`: the host's two steps; the model of the checkpoint at their end."""
    from fairchem.core.units.mlip_unit.utils import load_inference_model

    def run(*overrides: str) -> nn.Module:
        launch(HOST, data, *overrides)
        assert "Training Completed 2 steps" in caplog.text
        (checkpoint,) = elsewhere.glob("host_runs/*/checkpoints/final/inference_ckpt.pt")
        return load_inference_model(str(checkpoint))[0]

    return run


def test_host_runs_without_us(train: Callable) -> None:
    """The host is a fairchem YAML in its own right: with its own backbone it trains."""
    model = train("backbone.max_neighbors=30", "+backbone.radius_pbc_version=1")
    assert type(model.backbone).__name__ == "eSCNMDMoeBackbone"


def test_host_trains_our_backbone_from_the_command_line(train: Callable) -> None:
    """backbone=e2former_v2_omol25 under fairchem's own energy and force heads."""
    model = train("backbone=e2former_v2_omol25", *SMALL, *DELETIONS)
    assert isinstance(model.backbone, E2FormerV2Backbone)
    assert type(model.output_heads["omol_forces"]).__module__.startswith("fairchem.")


def test_host_trains_our_heads_too(train: Callable) -> None:
    """heads= for a host whose heads stand in the file itself: added last, they replace heads of the same name."""
    model = train("backbone=e2former_v2_omol25", "+heads=e2former_v2_direct_by_task", *SMALL, *DELETIONS)
    assert {type(h).__module__ for h in model.output_heads.values()} == {"e2former_fairchem.heads"}


def test_short_names_resolve_after_composing(train: Callable) -> None:
    model = train("backbone=e2former_v2_omol25", "backbone.model=e2former_v2", *SMALL, *DELETIONS)
    assert isinstance(model.backbone, E2FormerV2Backbone)


def test_the_hosts_own_options_stay(data: str) -> None:
    config = get_hydra_config_from_yaml(str(HOST), [data])
    assert config.runner.train_eval_unit.model.backbone.model.endswith("eSCNMDMoeBackbone")


def test_only_our_backbone_and_head_groups_are_visible(repo: Path) -> None:
    groups = {p.name for p in (repo / "e2former_fairchem" / "configs").iterdir() if p.is_dir() and p.name[0] != "_"}
    assert groups == {"backbone", "heads"}


UNRELATED = """
import sys, time
import hydra
from hydra.core.plugins import Plugins
with hydra.initialize_config_dir({folder!r}, version_base="1.3"):
    config = hydra.compose("app", overrides=[])
assert config.a == 1
stats = Plugins.instance().stats
ours = [name for name in stats.modules_import_time if "e2former" in name]
assert ours == ["hydra_plugins.e2former_fairchem_plugin"], ours
assert stats.modules_import_time[ours[0]] < 0.5, stats.modules_import_time
heavy = [m for m in ("torch", "fairchem", "e2former_fairchem", "e2former_kernels") if m in sys.modules]
assert not heavy, heavy
from hydra.core.global_hydra import GlobalHydra
with hydra.initialize_config_dir({folder!r}, version_base="1.3"):
    path = GlobalHydra.instance().config_loader().get_search_path().get_path()
assert not [e for e in path if "e2former" in str(e.provider)], path
print("untouched")
"""


def test_other_hydra_applications_are_left_alone(tmp_path: Path) -> None:
    """Hydra imports every plugin in every application: ours must cost nothing there, and change nothing."""
    (tmp_path / "app.yaml").write_text("a: 1\n")
    result = subprocess.run(
        [sys.executable, "-c", UNRELATED.format(folder=str(tmp_path))], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.strip() == "untouched", result.stderr


BROKEN = """
import sys, warnings
sys.modules["e2former_fairchem"] = None  # importing it raises ImportError
import fairchem.core._cli as cli
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    config = cli.get_hydra_config_from_yaml(sys.argv[1], [sys.argv[2]])
assert config.runner.max_steps == 2
assert any("e2former-fairchem is installed but cannot be imported" in str(w.message) for w in caught)
print("composed")
"""


def test_a_broken_installation_does_not_stop_other_fairchem_runs(data: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BROKEN, str(HOST), data], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.stdout.strip().endswith("composed"), result.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: resolvers.sample("test"), "expected one of train, val_known, val_new, got 'test'"),
        (lambda: resolvers.element_references("omol26"), "expected one of sample, omol25, spice, svp, tzvpd or a"),
        (lambda: resolvers.element_references("/nowhere.json"), "which does not exist"),
        (lambda: resolvers.dataset("data_train", None), "data_train: expected a folder with a data set, got nothing"),
        (lambda: resolvers.checkpoint("checkpoint", None), "checkpoint: expected an inference checkpoint, got nothing"),
    ],
)
def test_resolvers_say_what_they_expected(call: Callable, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call()


def test_element_references_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "refs.json"
    path.write_text("[0.0, -15.5, -79.0]")
    found = list(resolvers.element_references(str(path)))
    assert (found[:3], len(found)) == ([0.0, -15.5, -79.0], 119)
    assert all(map(math.isnan, found[3:]))
    path.write_text('{"element_references": {"1": -15.5, "8": null}, "unit": "eV"}')
    found = list(resolvers.element_references(str(path)))
    assert (found[0], found[1]) == (0.0, -15.5)
    assert all(map(math.isnan, found[2:]))
    path = tmp_path / "bad.json"
    path.write_text('{"H": -15.5}')
    with pytest.raises(ValueError, match="a list of energies in eV"):
        resolvers.element_references(str(path))
