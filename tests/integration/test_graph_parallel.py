"""Graph parallelism: refused before anything is computed, never the energy times the number of workers."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from fairchem.core.common import gp_utils
from fairchem.core.units.mlip_unit.api.inference import InferenceSettings
from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit

MESSAGE = "does not support graph parallelism: expected a group of 1 worker, got 2"


@pytest.fixture
def two_workers(monkeypatch):
    """What fairchem reports inside a graph-parallel group of two."""

    def start() -> None:
        monkeypatch.setattr(gp_utils, "initialized", lambda: True)
        monkeypatch.setattr(gp_utils, "get_gp_world_size", lambda: 2)

    return start


def test_building_a_model_is_refused(two_workers, build) -> None:
    two_workers()
    with pytest.raises(RuntimeError, match=MESSAGE):
        build()


def test_a_model_built_before_is_refused(two_workers, build, batch_of, structures) -> None:
    model = build()
    two_workers()
    with pytest.raises(RuntimeError, match=MESSAGE):
        model(batch_of(structures["water"]))


def test_a_predict_unit_is_refused(two_workers, write_checkpoint, tmp_path, batch_of, structures) -> None:
    unit = MLIPPredictUnit(str(write_checkpoint(tmp_path / "c.pt")), "cpu", inference_settings=InferenceSettings())
    data = batch_of(structures["water"], dtype=torch.float32)
    unit.predict(data.clone())
    two_workers()
    with pytest.raises(RuntimeError, match=MESSAGE):
        unit.predict(data)


def test_a_group_of_one_is_no_partition(build, batch_of, structures, tmp_path) -> None:
    model = build()
    data = batch_of(structures["ethanol"])
    expected = model(data.clone())["energy"]["energy"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        gp_utils.setup_graph_parallel_groups(1, "gloo")
        assert gp_utils.initialized()
        assert torch.equal(model(data)["energy"]["energy"], expected)
    finally:
        gp_utils.cleanup_gp()
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_real_processes_are_refused(write_checkpoint, tmp_path) -> None:
    """Two ranks of one graph-parallel group, as fairchem's workers set them up; both stop, neither hangs."""
    checkpoint = write_checkpoint(tmp_path / "c.pt")
    script = textwrap.dedent(
        """
        import sys
        import torch
        from fairchem.core.common import gp_utils
        from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit

        rank, store, checkpoint = int(sys.argv[1]), sys.argv[2], sys.argv[3]
        torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
        gp_utils.setup_graph_parallel_groups(2, "gloo")
        try:
            MLIPPredictUnit(checkpoint, "cpu")
        except Exception as error:
            while error is not None:
                print(error)
                error = error.__cause__ or error.__context__
        """
    )
    command = [sys.executable, "-c", script]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(checkpoint)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        assert MESSAGE in process.communicate(timeout=120)[0]
