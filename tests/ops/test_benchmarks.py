"""The benchmarks' own parts, at sizes for a CPU: what is timed is right, and a row that fails is a row."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import a module of the benchmarks' folder, which is no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = torch.get_float32_matmul_precision()
    yield importlib.import_module
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def run(load, run_script: Callable[..., None], tmp_path: Path) -> Callable[..., dict]:
    """Run a script as the command line does and return the rows that it wrote."""

    def call(script: str, *arguments: str) -> dict:
        common = ("--tiny", "--device", "cpu", "--output", str(tmp_path))
        run_script(BENCHMARKS / f"{script}.py", *arguments, *common)
        (file,) = tmp_path.glob("*.json")
        content = json.loads(file.read_text())
        assert content["machine"]["torch"] == torch.__version__ and script in content["command"]
        return content["rows"]

    return call


@pytest.mark.parametrize("neighbours", [None, 8, 32])
def test_edges(load, neighbours: int | None) -> None:
    workload = load("workload")
    positions, numbers = workload.water_cluster(40)
    assert positions.shape == (120, 3) and (numbers[:3] == [8, 1, 1]).all()
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    expected = distance <= 6.0
    if neighbours is not None:
        expected &= distance <= np.sort(distance, 1)[:, neighbours - 1 : neighbours]
    target, source = np.nonzero(expected)
    found = workload.edges_of(positions, 6.0, neighbours)
    assert (found[0] == source).all() and (found[1] == target).all()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_gates_limits_are_three_times_what_is_recorded(load, precision: str) -> None:
    """Of every figure that the gate measures, over the networks; two digits may be rounded up."""
    limits = load("gate").LIMITS[precision]
    recorded = json.loads((BENCHMARKS / "results" / "gate.json").read_text())["rows"]
    rows = [row for name, row in recorded.items() if name.startswith(f"{precision}/")]
    assert len(rows) == len(load("gate").NETWORKS)
    assert set(limits) == {key for key in rows[0] if isinstance(rows[0][key], float)}
    for key, limit in limits.items():
        worst = max(row[key] for row in rows)
        assert worst < limit <= 1.05 * 3 * worst, (key, limit, worst)


def test_a_figure_over_its_limit_is_red(load, capsys: pytest.CaptureFixture) -> None:
    gate = load("gate")
    figures = dict.fromkeys(gate.LIMITS["highest"], 0.0) | {"same_bits": True}
    wrong = {"forces": 2.6e-5, "training_worst": float("nan"), "energy": 1e-6}
    rows = {"right": gate.judge("right", figures, "highest"), "wrong": gate.judge("wrong", figures | wrong, "highest")}
    out = capsys.readouterr().out
    assert "gate ok  right" in out and "RED (over the limits: forces, training_worst) wrong" in out
    gate.stop_at_red({"right": rows["right"]})
    with pytest.raises(SystemExit):
        gate.stop_at_red(rows)


def test_failures_are_rows(load) -> None:
    timing = load("timing")

    def fails() -> None:
        raise ValueError("no such tile\nand more")

    def exhausts() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert timing.measure(fails) == {"error": "ValueError: no such tile"}
    assert timing.measure(exhausts) == {"error": "out of memory"}
    calls = []
    row = timing.measure(lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 5 and row["repeats"] == 3 and 0 <= row["min_ms"] <= row["ms"]
    if not torch.cuda.is_available():
        assert timing.measure_graph(fails) == {"graph_error": "no GPU"}


def test_rows_are_kept_when_a_run_is_cut_off(load, tmp_path: Path, capsys) -> None:
    results = load("records").Results("cut", str(tmp_path))
    results.add("first", {"ms": 1.5, "GiB": 2.0, "repeats": 5})
    results.add("second", {"error": "out of memory"})
    assert json.loads((tmp_path / "cut.json").read_text())["rows"] == dict(results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["first", "ms", "1.5,", "GiB", "2"] and lines[1].endswith("out of memory")


def test_work_of_the_paper(load) -> None:
    """The figures that ../shared/anchors and DESIGN.md give: 5 MFLOP of radial networks an atom, 13 KB an edge."""
    floor = load("floor")
    atoms, edges = 100, 3200
    work = floor.attention_work(floor.PAPER_SHAPE, atoms, edges, "forward")
    assert work.gathered == edges * 4 * (9 * 256 + 128 * 8) == pytest.approx(13.3e3 * edges, rel=0.01)
    radial = floor.attention_work(floor.PAPER_SHAPE._replace(basis=0, hidden=0), atoms, edges, "forward").flops
    assert (work.flops - radial) / atoms == pytest.approx(5e6, rel=0.06)
    both, second = (floor.attention_work(floor.PAPER_SHAPE, atoms, edges, kind) for kind in floor.KINDS[1:])
    assert work.flops < both.flops < second.flops and work.streamed < both.streamed < second.streamed
    assert work.rates(1.0)["TFLOPs"] == pytest.approx(work.flops / 1e9)
    with pytest.raises(ValueError, match="kind: expected one of"):
        floor.attention_work(floor.PAPER_SHAPE, atoms, edges, "third")


def test_forms_of_the_convolution_agree(run) -> None:
    """All forms and e3nn's tensor product are one function, or the row is an error."""
    rows = run("op_table", "--precision", "highest", "--atoms", "--convolution", "6", "--repeats", "1")
    forms = ("on_the_fly", "eaas", "node_factored_dense", "dense", "dense_e3nn")
    for form in forms:
        row = rows[f"convolution/{form}/6"]
        assert row["ms"] > 0 and row["difference"] < 1e-5, row
    assert set(rows["convolution/speedup/6"]) == {"on_the_fly", "eaas", "node_factored_dense"}


def test_passes_of_the_eaas_layer(run) -> None:
    """Every pass, at the origin and on the polar axis too, is held to float64 before it is timed."""
    rows = run("eaas_table", "--precision", "highest", "--atoms", "6", "--lmax", "1", "--repeats", "1")
    names = set(rows) - {"ceilings"}
    assert names == {"forward/6", "transposed/6", "slope/6", "backward/6"}
    for name in names:
        assert rows[name]["ms"] > 0 and rows[name]["difference"] < 5e-7 and rows[name]["GBs"] > 0, (name, rows[name])


def test_eaas_tiles_and_work(run, load) -> None:
    table = load("eaas_table")
    before = table.layer.TILE, table.layer.HELD
    arguments = ["--precision", "highest", "--atoms", "6", "--lmax", "1", "--passes", "forward", "--repeats", "1"]
    rows = run("eaas_table", *arguments, "--tiles", "256,160", "64,80")
    assert rows["forward/6@256,160"]["ms"] > 0 and rows["forward/6@64,80"]["ms"] > 0
    assert before == (table.layer.TILE, table.layer.HELD)
    work = table.EAASCase(6, 2, 256, "cpu").work("forward")
    assert work.streamed == 6 * (29 * 1024 + 12) and work.flops == 6 * 2 * 50 * 256


def test_attention_rows(run) -> None:
    rows = run(*"op_table --precision highest --atoms 6 --convolution --scores qk --passes forward --repeats 1".split())
    gate = rows["gate/qk"]
    assert gate["ok"] and gate["second"] < 1e-5 and gate["forward_spline"] < 1e-5
    for form in ("triton", "triton_network", "dense"):
        row = rows[f"attention/qk/{form}/forward/6"]
        assert row["ms"] > 0 and row["TFLOPs"] > 0, row
    assert rows["attention/qk/speedup/forward/6"]["speedup"] > 0


@pytest.mark.parametrize("score", ["qk_dot", "qk_dot_scalar"])
def test_inputs_of_directional_scores(score: str, load) -> None:
    """One layer's own weights, in float64 too; the timed rows of these scores take the way of ``qk``'s."""
    case = load("attention_rows").AttentionCase(6, score, "cpu", tiny=True)
    once = case.forward("dense")
    exact = case.to_double().forward("dense")
    torch.testing.assert_close(once.double(), exact, rtol=1e-4, atol=1e-5)


def test_memory_rows(run) -> None:
    """Memory itself is a GPU's. Every atom has as many neighbours as are asked for, however far."""
    arguments = ["--precision", "highest", "--atoms", "6", "--neighbours", "1", "3", "--repeats", "1"]
    rows = run("memory_table", *arguments, "--operations", "edge_degree", "--passes", "second")
    gate = rows.pop("gate/edge_degree")
    assert gate["ok"] and gate["second"] < 1e-5
    assert set(rows) == {"edge_degree/second/6/1", "edge_degree/second/6/3"}
    more = run("memory_table", *arguments, "--operations", "attention", "--passes", "forward", "--no-gate")
    assert set(more) == {f"{form}/forward/6/{k}" for form in ("attention", "dense") for k in (1, 3)}
    for name, row in (rows | more).items():
        assert row["ms"] > 0 and row["edges"] == 6 * int(name[-1]), row


def test_growth_of_memory(load) -> None:
    memory_table, gib = load("memory_table"), 1 << 30
    edges = {16: 1600, 32: 3200, 64: 6400, 96: 9600}
    rows = {f"a/second/100/{k}": {"GiB": 1 + 100 * min(e, 6400) / gib, "edges": e} for k, e in edges.items()}
    rows |= {f"dense/forward/100/{k}": {"GiB": 1024 * e / gib, "edges": e} for k, e in edges.items() if k < 96}
    rows |= {"dense/forward/100/96": {"error": "out of memory", "edges": 9600}, "gate/a": {"ok": True}}
    rows |= {f"cpu/forward/100/{k}": {"ms": 1.0, "edges": e} for k, e in edges.items()}
    found = memory_table.growth_rows(rows, list(edges), 128, 256)
    tensors = {"edges_x_heads": 512, "edges_x_channels": 1024}
    assert found == {"growth/a/second/100": {"bytes_per_edge": pytest.approx(50), "last": pytest.approx(0)} | tensors}
    del rows["dense/forward/100/96"]
    found = memory_table.growth_rows(rows, [16, 32, 64], 128, 256)
    assert found["growth/dense/forward/100"]["bytes_per_edge"] == pytest.approx(1024)


def test_a_wrong_form_is_not_timed(load, tmp_path: Path) -> None:
    class Wrong(load("convolution_rows").ConvolutionCase):
        def eaas(self) -> torch.Tensor:
            return 2 * self.on_the_fly()

    torch.set_float32_matmul_precision("highest")
    args, results = SimpleNamespace(repeats=1, tiny=True, no_graphs=True), load("records").Results("x", str(tmp_path))
    load("op_table").convolution_table(Wrong(6, "cpu", tiny=True), 6, args, results)
    assert results["convolution/eaas/6"] == {"error": "relative difference 1.00e+00, not timed"}
    assert results["convolution/on_the_fly/6"]["ms"] > 0


def test_network_rows_and_picture(run, load, tmp_path: Path) -> None:
    """The baseline's rows alone: Triton's interpreter takes seconds for a network."""
    rows = run(*"model_table --no-gate --no-ours --baseline --atoms 12 24 --train 12 --repeats 1".split())
    for name in ("train_direct/12", "train_conserving/12", "energy_forces/12", "energy_forces/24"):
        assert rows[f"dense/{name}"]["ms"] > 0
    assert rows["dense/energy_forces/12"]["edges"] == 132
    file = tmp_path / "run.json"
    machine = {"gpu": "NVIDIA H200", "commit": "0123456789"}
    rows = {f"{form}/energy_forces/192": {"ms": 5.0, "GiB": 0.1} for form in ("triton", "escn_all")}
    file.write_text(json.dumps({"machine": machine, "command": "x --neighbours 0", "rows": rows | {"gate": {}}}))
    plot = load("plot")
    series, elsewhere, _ = plot.collect([file])
    assert set(series) - elsewhere == {"triton_all", "escn_all"} and {"authors", "escn_32", "mace"} == elsewhere
    plot.draw(series, elsewhere, "footer", "H200", 139.0, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_next_size(load) -> None:
    next_size = load("largest").next_size
    fits = {399_999: {"total_GiB": 85.0}}
    assert next_size(fits, [999_999], 139.0) == pytest.approx(634_000, rel=0.01), "where the memory fills the card"
    fits[633_000] = {"total_GiB": 134.6}
    assert next_size(fits, [999_999], 139.0) == pytest.approx(816_500, rel=0.01), "half way"
    assert next_size({990_000: {"total_GiB": 130.0}}, [999_999], 139.0) is None
    assert next_size({}, [192], 139.0) is None
