"""The GPU: grids of ranks, tables of a device, captured graphs. What needs a GPU is skipped without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx.parser
import pytest

from lowrank_onnx import accelerator
from lowrank_onnx.base import Candidate, Site
from lowrank_onnx.cache import Cache
from lowrank_onnx.crossovers import _chain
from lowrank_onnx.decompositions.svd import data_aware, plain
from lowrank_onnx.grids import Crossover, DeviceTable, device_table, large_enough, on_grid, remember
from lowrank_onnx.model import from_proto
from lowrank_onnx.passes.svd import SVD
from lowrank_onnx.pipeline import calibrate_device, compress
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.runtime import Runtime, gpu_libraries, left_on_cpu, onnxruntime, open_session, run
from lowrank_onnx.sites import find_sites
from lowrank_onnx.validation import benchmark
from lowrank_onnx.waves import unbeaten

CPU = Runtime()
MODEL = """
<ir_version: 8, opset_import: ["": 17]>
mlp (float[16, 256] x) => (float[16, 256] y) {
    a = MatMul(x, w1)
    b = Relu(a)
    y = MatMul(b, w2)
}
"""


def mlp(dtype: str = "float32") -> onnx.ModelProto:
    text = MODEL.replace("float[", "float16[") if dtype == "float16" else MODEL
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name in ("w1", "w2"):
        weight = (rng.standard_normal((256, 256)) / 16).astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    for place, node in enumerate(model.graph.node):
        node.name = f"node{place}"
    return model


def site() -> Site:
    found = find_sites(from_proto(mlp()), {("", "x"): (16, 256), ("", "a"): (16, 256), ("", "y"): (16, 256)})
    return next(entry for entry in found if entry.kind == "linear")


def offered(ranks: range, technique: SVD | None = None) -> Proposal:
    where = site()
    candidates = tuple(Candidate(where.name, "svd", (rank,), rank, rank, 1, 0.5, None) for rank in ranks)
    return Proposal(where, technique or SVD(), None, candidates)


def ranks_of(proposals: list[Proposal]) -> list[int]:
    return [candidate.ranks[0] for entry in proposals for candidate in entry.candidates]


def test_ranks_lie_on_the_grid_of_the_device() -> None:
    table = DeviceTable({"float32": 64})
    assert ranks_of(on_grid([offered(range(16, 513, 16))], table)) == list(range(64, 513, 64))
    assert ranks_of(on_grid([offered(range(16, 129, 16))], table)) == [32, 64, 96, 128]  # narrow: a finer grid
    assert ranks_of(on_grid([offered(range(3, 10, 3))], table)) == [3, 6, 9]


def test_a_grid_set_by_hand_and_an_unknown_dtype_are_left_alone() -> None:
    assert ranks_of(on_grid([offered(range(16, 65, 16), SVD(multiple=16))], DeviceTable({"float32": 64})))[0] == 16
    assert ranks_of(on_grid([offered(range(16, 513, 16))], DeviceTable({"float16": 64})))[0] == 16


def crossover(width: int, *speeds: float) -> Crossover:
    rows = tuple(
        (share, value, 0.95 * value, 1.05 * value) for share, value in zip((0.25, 0.5, 0.75), speeds, strict=True)
    )
    return Crossover("float32", 1, width, width, 1.0, rows)


def test_the_crossover_lies_between_what_gains_and_what_loses() -> None:
    assert crossover(8, 2.0, 1.0, 0.5).share == pytest.approx(0.5)
    assert crossover(8, 2.0, 0.5, 0.25).share == pytest.approx(0.375)
    assert crossover(8, 0.9, 0.8, 0.7).share is None
    assert crossover(8, 3.0, 2.0, 1.5).share == 1.0


def test_layers_below_the_smallest_that_gains_are_not_tried() -> None:
    lost, won = crossover(64, 0.9, 0.8, 0.7), crossover(512, 2.0, 1.5, 1.1)
    table = DeviceTable({}, (won, lost))
    assert table.least_macs("float32") == 64 * 64
    assert table.least_macs("float16") == 0
    layer = site()
    assert layer.macs == 16 * 256 * 256
    assert large_enough([layer], table) == ([layer], {})
    left, reasons = large_enough([layer], DeviceTable({}, (crossover(2048, 0.9, 0.8, 0.7),)))
    assert not left and "slower factorized on this device" in reasons[layer.name]


def test_what_was_measured_is_found_again_by_the_same_device_only(tmp_path: Path) -> None:
    table = DeviceTable({"float32": 8}, (crossover(64, 2.0, 1.0, 0.5),))
    remember(CPU, table, Cache(tmp_path / "measured.sqlite"))
    again = Cache(tmp_path / "measured.sqlite")
    assert device_table(CPU, again) == table
    assert device_table(Runtime(threads=1 + CPU.used_threads), again) == DeviceTable({})


def test_a_gpu_that_was_not_calibrated_starts_with_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_table(Runtime("cuda"), Cache(None)).steps == {"float16": 64, "float32": 32}


def test_a_session_of_the_cpu_has_nothing_to_tell_of_nodes_left_to_it() -> None:
    assert left_on_cpu(open_session(mlp(), CPU)) is None
    assert gpu_libraries() == {}


def stand_in() -> SimpleNamespace:
    """NumPy in the place of CuPy: the same calls, on the CPU."""

    class Array(np.ndarray):
        def get(self) -> np.ndarray:
            return np.asarray(self)

    def asarray(array: np.ndarray) -> np.ndarray:
        return array.view(Array)

    return SimpleNamespace(__name__="cupy", asarray=asarray, linalg=np.linalg)


@pytest.mark.parametrize("shape", [(600, 600), (540, 700), (700, 540)])
def test_the_algebra_of_the_gpu_is_that_of_the_cpu(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "library", stand_in)
    check_algebra(shape)


def check_algebra(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    q = min(shape)
    left, right = (np.linalg.qr(rng.standard_normal((size, q)))[0] for size in shape)
    weight = (left * np.arange(1, q + 1) ** -1.5) @ right.T
    root = rng.standard_normal((shape[0], shape[0])) / 20
    for make in (plain, lambda w: data_aware(w, root @ root.T, 0.01)):
        expected = make(weight)
        with accelerator.gpu_algebra(True):
            assert accelerator.suits(weight)
            found = make(weight)
            first, second = found.factors(64)
        assert np.abs(found.sigma - expected.sigma).max() < 1e-9 * expected.sigma[0]
        assert np.abs(found.right.T @ found.right - np.eye(q)).max() < 1e-10
        product = np.matmul(*expected.factors(64))
        assert np.linalg.norm(first @ second - product) < 1e-8 * np.linalg.norm(product)


def test_small_matrices_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "library", stand_in)
    with accelerator.gpu_algebra(True):
        assert not accelerator.suits(np.ones((100, 4000)))
    assert not accelerator.suits(np.ones((4000, 4000)))


@pytest.fixture
def gpu() -> None:
    """Skips where onnxruntime has no CUDA provider, or it does not load."""
    if "CUDAExecutionProvider" not in onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    try:
        open_session(mlp(), Runtime("cuda"))
    except Exception as error:
        pytest.skip(f"the CUDA provider does not load: {error}")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("provider", ["cuda", "cuda-graph"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_outputs_on_the_gpu_are_those_of_the_cpu(provider: str, dtype: str) -> None:
    feeds = {"x": np.random.default_rng(1).standard_normal((16, 256)).astype(dtype)}
    expected = run(open_session(mlp(), CPU), {"x": feeds["x"].astype(np.float32)})["y"]
    session = open_session(mlp(dtype), Runtime(provider), timed=True)
    timing = benchmark([session, session], feeds, Runtime(provider), seconds=0.1)
    assert timing.latencies[0].median > 0
    found = run(session, feeds)["y"].astype(np.float32)
    assert np.linalg.norm(found - expected) < 3e-3 * np.linalg.norm(expected)  # TF32 and float16 have 11 bits
    told = left_on_cpu(session)
    assert told is None or told[0] == []


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_other_shapes_run_beside_a_captured_graph() -> None:
    model = _chain("float32", 4, (64, 128), 2, 0, np.random.default_rng(0))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"
    session = open_session(model, Runtime("cuda-graph"), timed=True)
    benchmark([session], {"x": np.ones((4, 64), np.float32)}, Runtime("cuda-graph"), seconds=0.1)
    more = run(session, {"x": np.ones((7, 64), np.float32)})
    assert next(iter(more.values())).shape == (7, 64)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_libraries_of_the_gpu_are_told() -> None:
    open_session(mlp(), Runtime("cuda"))
    assert {"cublasLt", "cudnn"} <= set(gpu_libraries())


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_model_is_compressed_on_the_gpu() -> None:
    report = compress(mlp(), keep_macs=0.6, provider="cuda", cache=False).report
    assert report["ratio"]["macs"] <= 0.6
    assert "tf32" in report["environment"]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(600, 600), (540, 700), (700, 540)])
def test_the_algebra_of_a_real_gpu_is_that_of_the_cpu(shape: tuple[int, int]) -> None:
    if accelerator.library() is None:
        pytest.skip("neither CuPy nor PyTorch sees a GPU")
    check_algebra(shape)


def test_calibration_of_a_device_ends_in_the_local_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_ONNX_CACHE", str(tmp_path))
    for name, value in {"WIDTHS": ((32, 64),), "ROWS": (4,), "_SECONDS": 0.01}.items():
        monkeypatch.setattr(f"lowrank_onnx.crossovers.{name}", value)
    told = calibrate_device(provider="cpu", threads=1)
    (row,) = told["crossovers"]
    assert (row["inputs"], row["outputs"], row["rows"]) == (32, 64, 4)
    table = device_table(Runtime(threads=1), Cache(tmp_path / "measured.sqlite"))
    assert table.as_dict()["steps"] == told["steps"]
    assert table.crossovers[0].dense_us == row["dense_us"]


def test_a_rank_that_a_higher_one_beats_is_not_offered() -> None:
    entry = offered(range(64, 385, 64))
    times = dict(zip(map(id, entry.candidates), (10.0, 12.0, 20.0, 19.0, 25.0, 31.0), strict=True))
    assert [candidate.ranks[0] for candidate in unbeaten(entry.candidates, times)] == [64, 128, 256, 320, 384]
    falling = dict(zip(map(id, entry.candidates), (30.0, 28.0, 26.0, 24.0, 22.0, 20.0), strict=True))
    assert [candidate.ranks[0] for candidate in unbeaten(entry.candidates, falling)] == [64, 384]


def test_a_layer_that_waits_for_launches_keeps_its_ranks() -> None:
    entry = offered(range(64, 385, 64))
    times = dict(zip(map(id, entry.candidates), (10.0, 11.0, 10.5, 10.2, 11.0, 10.1), strict=True))
    assert unbeaten(entry.candidates, times) == entry.candidates


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_ranks_on_the_gpu_are_few_and_rise_in_time() -> None:
    model = _chain("float16", 2048, (2048, 2048), 2, 0, np.random.default_rng(0))
    report = compress(model, keep_macs=0.6, technique=["svd"], provider="cuda", cache=False).report
    assert report["ratio"]["macs"] <= 0.6
    assert all(row["ranks"][0] % 64 == 0 for row in report["sites"] if row["decision"] == "factorized")
