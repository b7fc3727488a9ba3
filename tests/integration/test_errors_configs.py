"""Wrong configs, data and checkpoints: one message with key or file, expected and got, before work, and no litter."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.db import connect
from omegaconf import OmegaConf
from safetensors.torch import save_file

from e2former_fairchem.data.checks import check_dataset
from e2former_fairchem.training import arguments
from e2former_fairchem.training.checkpoint import check_checkpoint_path
from e2former_fairchem.training.resolvers import element_references, sample


def litter(folder: Path) -> list[str]:
    """What a run left behind in the working folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "given" not in p.parts)


@pytest.fixture
def fails(launch: Callable, elsewhere: Path) -> Callable[..., None]:
    """Run a config, expect a message that holds all of `parts`, and nothing left behind when composing failed."""

    def run(config: Path, *overrides: str, parts: Sequence[str], composes: bool = False) -> None:
        with pytest.raises(Exception) as caught:  # whether Hydra, OmegaConf or fairchem wraps it does not matter
            launch(config, *overrides)
        message = str(caught.value)
        for part in parts:
            assert part in message, message
        left = litter(elsewhere)
        if not composes:
            assert left == []
        assert not [name for name in left if name.endswith((".pt", ".distcp", "results.json", "metrics.jsonl"))]

    return run


def test_missing_data_path_is_asked_for(fails: Callable, repo: Path, fake_omol25: Sequence[str]) -> None:
    parts = ["data_val", "expected a folder with a data set, got nothing", "data_val=FOLDER"]
    fails(repo / "configs" / "train" / "omol25_direct.yaml", fake_omol25[0], parts=parts)


def test_data_path_that_does_not_exist(fails: Callable, repo: Path, fake_omol25: Sequence[str]) -> None:
    overrides = ["data_train=/nowhere/omol", fake_omol25[1]]
    parts = ["data_train", "/nowhere/omol", "nothing there"]
    fails(repo / "configs" / "train" / "omol25_direct.yaml", *overrides, parts=parts)


def test_empty_data_set(fails: Callable, repo: Path, fake_omol25: Sequence[str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with connect(str(empty / "data.aselmdb"), use_lock_file=False):
        pass
    overrides = [f"data_train={empty}", fake_omol25[1]]
    parts = ["data_train", "expected a data set with at least one structure, got none", str(empty)]
    fails(repo / "configs" / "train" / "omol25_direct.yaml", *overrides, parts=parts)
    np.savez(empty / "metadata.npz", natoms=np.zeros(0, dtype=int))
    with pytest.raises(ValueError, match=r"at least one structure, got none in .*metadata.npz"):
        check_dataset("data_train", str(empty))


def test_folder_without_a_database(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("no data")
    with pytest.raises(FileNotFoundError, match=r"data_val: expected a folder with at least one .aselmdb file, got"):
        check_dataset("data_val", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="a pattern that matches"):
        check_dataset("data_val", str(tmp_path / "*.aselmdb"))


def test_metadata_without_natoms(tmp_path: Path) -> None:
    (tmp_path / "data.aselmdb").touch()
    np.savez(tmp_path / "metadata.npz", energies=np.zeros(3))
    with pytest.raises(ValueError, match=r"data_val: expected the field 'natoms' in .*metadata.npz, got none"):
        check_dataset("data_val", str(tmp_path))


SAMPLE = Path(sample("train")) / "data.aselmdb"
XYZ = b"3\n\nO 0 0 0\nH 0 0 1\nH 0 1 0\n"


@pytest.mark.parametrize(
    ("name", "content", "got"),
    [
        ("data.aselmdb", b"", "the file is empty"),
        ("data.aselmdb", SAMPLE.read_bytes()[:100_000], "the file is torn: 100,000 of at least 413,696 bytes"),
        ("data.aselmdb", SAMPLE.read_bytes()[:500], "not an LMDB file"),
        ("data.aselmdb", 300 * XYZ, "not an LMDB file"),
        ("data.db", b"", "the file is empty"),
        ("data.db", 300 * XYZ, "file is not a database"),
        ("data.json", b'{"element_references": [0.0, -13.6]}', "Does not resemble ASE JSON database"),
        ("data.json", SAMPLE.read_bytes()[:500], "codec can't decode"),
        ("water.xyz", XYZ, "write_folder makes one of ASE structures"),
    ],
)
@pytest.mark.parametrize("metadata", [True, False])
def test_a_torn_or_foreign_file_is_no_data_set(
    tmp_path: Path, name: str, content: bytes, got: str, metadata: bool
) -> None:
    """A torn LMDB file would end the process with SIGBUS at the first row beyond its end."""
    path = tmp_path / name
    path.write_bytes(content)
    if metadata:
        np.savez(tmp_path / "metadata.npz", natoms=np.ones(601, dtype=int))
    message = rf"data_val: expected an ASE database .* in {path}, got something else"
    for given in [path] if name.endswith("xyz") else [path, tmp_path]:
        with pytest.raises(ValueError, match=message) as caught:
            check_dataset("data_val", str(given))
        assert got in str(caught.value)
    assert path.read_bytes() == content


def test_metadata_that_is_torn_or_of_other_data(tmp_path: Path) -> None:
    (tmp_path / "data.aselmdb").write_bytes(SAMPLE.read_bytes())
    metadata = tmp_path / "metadata.npz"
    metadata.write_bytes((SAMPLE.parent / "metadata.npz").read_bytes())
    assert check_dataset("data_val", str(tmp_path)) == str(tmp_path)
    metadata.write_bytes(metadata.read_bytes()[:300])
    with pytest.raises(ValueError, match=rf"data_val: expected NumPy's .npz format in {metadata}, got something else"):
        check_dataset("data_val", str(tmp_path))
    np.savez(metadata, natoms=np.ones(600, dtype=int))
    with pytest.raises(ValueError, match=r"data_val: expected one entry per structure in .*, got 600 for the 601 of"):
        check_dataset("data_val", str(tmp_path))
    assert check_dataset("data_val", f"{tmp_path}/*.aselmdb")  # fairchem reads no metadata beside a pattern


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "expected JSON in"),
        (b"\xde\xad\xbe\xef", "expected JSON in"),
        (b"[0.0, -13.6", "expected JSON in"),
        (XYZ, "expected JSON in"),
        (b"-13.6", "a list of energies in eV by atomic number"),
        (b"[]", "a list of energies in eV by atomic number"),
        (b'{"H": -13.6}', "a list of energies in eV by atomic number"),
        (b'{"element_references": {"0": 0.0, "1": "-13.6"}}', "got '-13.6' for 1"),
        (b"[0.0, true]", "got True for 1"),
        (b'{"1": -13.6, "200": -1.0}', "got -1.0 for 200"),
    ],
)
def test_element_references_of_another_shape(tmp_path: Path, content: bytes, got: str) -> None:
    path = tmp_path / "references.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"element_references: expected .*{path}") as caught:
        element_references(str(path))
    assert got in str(caught.value)


def test_element_references_that_are_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"element_references: expected a JSON file, got .*absent.json"):
        element_references(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="expected one of sample, omol25, spice, svp, tzvpd or a .json file, got None"):
        element_references(None)


def test_data_is_found_as_file_folder_and_pattern(fake_omol25: Sequence[str]) -> None:
    folder = fake_omol25[0].split("=")[1]
    for path in (folder, f"{folder}/data.aselmdb", f"{folder}/*.aselmdb"):
        assert check_dataset("data_train", path) == path


def evaluate(repo: Path) -> Path:
    return repo / "configs" / "evaluate" / "omol25.yaml"


def test_checkpoint_that_does_not_exist(fails: Callable, repo: Path, elsewhere: Path) -> None:
    missing = str(elsewhere / "runs" / "quickstart" / "inference_ckpt.pt")
    fails(evaluate(repo), parts=["checkpoint: expected an inference checkpoint's file", missing, "does not exist"])


def test_checkpoint_that_is_a_folder(fails: Callable, repo: Path, tmp_path: Path) -> None:
    (tmp_path / "inference_ckpt.pt").touch()
    parts = ["got the folder", f"did you mean {tmp_path / 'inference_ckpt.pt'}?"]
    fails(evaluate(repo), f"checkpoint={tmp_path}", parts=parts)


def test_checkpoint_that_torch_did_not_write(fails: Callable, repo: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_text("not a checkpoint")
    fails(evaluate(repo), f"checkpoint={path}", parts=["expected an inference checkpoint", str(path)])


def test_torn_and_foreign_files_are_named(tmp_path: Path) -> None:
    """What people have handed to loaders by mistake, told from its first bytes."""
    whole = tmp_path / "whole.pt"
    torch.save({"weight": torch.zeros(1000)}, whole)
    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    given = {
        "empty.pt": (b"", "which is empty"),
        "torn.pt": (whole.read_bytes()[:2000], "which is cut off"),
        "model.safetensors": (None, "a safetensors file; convert it: e2former-fairchem safetensors"),
        "page.pt": (b"<!DOCTYPE html>", r"which starts with b'<!DOCTYP'"),
    }
    for name, (content, got) in given.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"first: expected an inference checkpoint .* got {path}, {got}"):
            check_checkpoint_path(path, key="first")
    database = Path(sample("val_new")) / "data.aselmdb"
    with pytest.raises(ValueError, match=f"first: .* got {database}, an LMDB database"):
        check_checkpoint_path(database, key="first")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({"epoch": 3, "state_dict": {}}, "a dictionary with the keys epoch, state_dict"),
        ({"model": {"decoder.embedding.weight": torch.zeros(2)}}, "MolFM checkpoint"),
        (torch.nn.Linear(2, 2), "an object of type torch.nn.modules.linear.Linear"),
    ],
)
def test_foreign_checkpoint(fails: Callable, repo: Path, tmp_path: Path, content: object, got: str) -> None:
    path = tmp_path / "foreign.pt"
    torch.save(content, path)
    parts = ["checkpoint: expected a fairchem inference checkpoint", str(path), got]
    fails(evaluate(repo), f"checkpoint={path}", "job.device_type=CPU", parts=parts, composes=True)


def test_checkpoint_of_another_fairchem_model(fails: Callable, repo: Path, tmp_path: Path) -> None:
    from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint

    other = "fairchem.core.models.uma.escn_md.eSCNMDBackbone"
    path = tmp_path / "uma.pt"
    torch.save(MLIPInferenceCheckpoint({"backbone": {"model": other}}, {}, {}, {}), path)
    parts = ["expected a checkpoint with the backbone e2former_fairchem.backbone.E2FormerV2Backbone", other, str(path)]
    fails(evaluate(repo), f"checkpoint={path}", "job.device_type=CPU", parts=parts, composes=True)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("backbone.score=dot", ["score: expected one of qk, qk_dot, qk_dot_scalar, got 'dot'"]),
        ("backbone.num_heads=7", ["sphere_channels: expected a multiple of num_heads = 7"]),
        ("+backbone.mmax=2", ["mmax"]),
        ("backbone.direct_forces=true", ["direct_forces: expected false in the backbone of e2former_v2_gradient_head"]),
        ("+heads.efs.dropout=0.1", ["dropout"]),
        ("runner.max_epochs=-3", ["max_epochs: expected an integer of at least 1, got -3"]),
    ],
)
def test_wrong_value_in_the_config(
    fails: Callable, repo: Path, tiny: Sequence[str], override: str, parts: list[str]
) -> None:
    fails(repo / "configs" / "quickstart.yaml", *tiny, override, parts=parts, composes=True)


def counts(config: Path) -> dict[str, int | float | bool]:
    """The numbers and switches at the top of a config, as the command line gives them."""
    values_at_top = OmegaConf.to_container(OmegaConf.load(config))  # its reader takes 8e-4 for a number
    return {key: value for key, value in values_at_top.items() if isinstance(value, int | float)}


CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = ("quickstart.yaml", "train/*.yaml", "baselines/*.yaml", "evaluate/omol25.yaml")


@pytest.mark.parametrize(
    "config", sorted(path for pattern in RUNS for path in CONFIGS.glob(pattern)), ids=lambda path: path.stem
)
def test_every_number_of_a_config_is_checked_where_it_is_used(config: Path) -> None:
    """A bare `${key}` would take any value; `${e2former.integer:key,${key},1}` names the key."""
    text = config.read_text() + "".join(p.read_text() for p in (CONFIGS / "tasks").glob("omol_*.yaml"))
    assert counts(config)
    for key in counts(config):
        used = re.findall(rf"(\S+,)?\$\{{{key}\}}", text)
        assert used, key
        assert all(re.fullmatch(rf"\$\{{e2former\.(integer|number|positive|boolean):{key},", use) for use in used), key


WRONG = {
    "epochs=three": "epochs: expected an integer of at least 1, got 'three'",
    "epochs=-3": "epochs: expected an integer of at least 1, got -3",
    "batch_size=null": "batch_size: expected an integer of at least 1, got nothing",
    "batch_size=2.5": "batch_size: expected an integer of at least 1, got 2.5",
    "batch_size=true": "batch_size: expected an integer of at least 1, got True",
    "num_workers=-1": "num_workers: expected an integer of at least 0, got -1",
    "lr=fast": "lr: expected a number of at least 0, got 'fast'",
    "lr=nan": "lr: expected a number of at least 0, got nan",
    "normalizer_rmsd=0": "normalizer_rmsd: expected a number above 0, got 0",
    "element_references=7": (
        "e2former.element_references: expected one of sample, omol25, spice, svp, tzvpd or a .json file, got 7"
    ),
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_type_is_refused_before_anything_is_written(fails: Callable, repo: Path, override: str) -> None:
    fails(repo / "configs" / "quickstart.yaml", override, parts=[WRONG[override]])


def test_wrong_type_in_the_other_configs(fails: Callable, repo: Path, fake_omol25: Sequence[str]) -> None:
    for name in ("omol25_direct", "omol25_conserving", "spice_direct"):
        config = repo / "configs" / "train" / f"{name}.yaml"
        fails(config, *fake_omol25, "steps=1e6.5", parts=["steps: expected an integer of at least 1, got '1e6.5'"])
    fails(config, *fake_omol25, "tf32=maybe", parts=["tf32: expected true or false, got 'maybe'"])
    fails(config, *fake_omol25, "num_val=few", parts=["num_val: expected an integer of at least 1, got 'few'"])
    s2ef = repo / "configs" / "leaderboard" / "s2ef.yaml"
    fails(s2ef, "num_workers=two", parts=["num_workers: expected an integer of at least 0, got 'two'"])
    spingap = repo / "configs" / "leaderboard" / "spingap.yaml"
    fails(spingap, "retry_failed=maybe", parts=["retry_failed: expected true or false, got 'maybe'"])
    baseline = repo / "configs" / "baselines" / "escn_md_quickstart.yaml"
    fails(baseline, "warmup_steps=0", parts=["warmup_steps: expected an integer of at least 1, got 0"])


def test_values_that_are_right_in_another_form() -> None:
    assert arguments.integer("steps", 1e6, 1) == 1_000_000
    assert isinstance(arguments.integer("steps", 1e6, 1), int)
    assert arguments.number("lr", 0) == 0.0
    for wrong in (float("inf"), float("nan"), True, "1", None, [1], -1e-9):
        for check in (arguments.number, arguments.positive):
            with pytest.raises(ValueError, match="lr: expected a number"):
                check("lr", wrong)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("+wdith=3", ["unused keys", "wdith"]),
        ("epcohs=3", ["epcohs"]),
        ("backbone=e2former_v3", ["backbone/e2former_v3", "e2former_v2_small"]),
        ("job.device=CPU", ["device"]),
        ("job.device_type=TPU", ["TPU"]),
        ("element_references=omol26", ["e2former.element_references: expected one of sample, omol25, spice", "omol26"]),
    ],
)
def test_unknown_key_or_option_is_refused_before_anything_is_written(
    fails: Callable, repo: Path, override: str, parts: list[str]
) -> None:
    fails(repo / "configs" / "quickstart.yaml", override, parts=parts)
