"""Measure once per device from which size on, and at which ranks, two thin products beat one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import ModelProto

from lowrank_onnx.grids import Crossover, DeviceTable
from lowrank_onnx.linalg import Array
from lowrank_onnx.runtime import Runtime, open_session
from lowrank_onnx.statistics import Progress
from lowrank_onnx.validation import Timing, benchmark

WIDTHS = ((384, 1536), (768, 3072), (1024, 1024), (1024, 4096), (2048, 2048), (4096, 4096), (4096, 11008))
ROWS = (1, 16, 128, 512, 2048)
SHARES = (0.25, 0.5, 0.75)
STEPS = (8, 16, 32, 64)
_MOST_CPU_MACS = 4 * 10**9  # of one chain; what is larger gains by its work, and would take minutes
_ELEMENTS = 48 * 10**6  # of the weights of one chain, so that small layers are timed in dozens
_MOST_LAYERS = 16
_SECONDS = 0.25
_SLACK = 0.98  # a rank has to be that much quicker than a higher one to be worth offering


def calibrate(runtime: Runtime, progress: Progress | None = None) -> DeviceTable:
    """Time chains of layers, dense and factorized.

    Args:
        runtime: The device. float16 is measured on a GPU only: on a CPU onnxruntime computes it in float32.
        progress: Told after every shape.
    """
    dtypes = ("float16", "float32") if runtime.on_gpu else ("float32",)
    cells = [
        (dtype, rows, inputs, outputs)
        for dtype in dtypes
        for inputs, outputs in WIDTHS
        for rows in ROWS
        if runtime.on_gpu or rows * inputs * outputs * _layers(inputs, outputs) <= _MOST_CPU_MACS
    ]
    steps = {dtype: _step(runtime, dtype) for dtype in dtypes}
    found = []
    for place, (dtype, rows, inputs, outputs) in enumerate(cells):
        found.append(_crossover(runtime, dtype, rows, inputs, outputs, steps[dtype]))
        if progress is not None:
            progress("calibrate", place + 1, len(cells))
    return DeviceTable(steps, tuple(found))


def _crossover(runtime: Runtime, dtype: str, rows: int, inputs: int, outputs: int, step: int) -> Crossover:
    even = inputs * outputs / (inputs + outputs)
    ranks = [max(int(share * even) // step * step, step) for share in SHARES]
    timing = _timed(runtime, dtype, rows, inputs, outputs, [0, *ranks])
    measured = zip(ranks, timing.ratios[1:], strict=True)
    ratios = [(rank / even, ratio.value, ratio.low, ratio.high) for rank, ratio in measured]
    dense = 1000 * timing.latencies[0].median / _layers(inputs, outputs)
    return Crossover(dtype, rows, inputs, outputs, dense, tuple(ratios))


def _step(runtime: Runtime, dtype: str) -> int:
    """The smallest step whose odd multiples are quicker than the next rank of a coarser grid."""
    rows = 2048 if runtime.on_gpu else 128
    base = 192
    timing = _timed(runtime, dtype, rows, 1024, 1024, [base + step for step in STEPS])
    times = [entry.median for entry in timing.latencies]
    for place, step in enumerate(STEPS[:-1]):
        if all(times[place] < _SLACK * other for other in times[place + 1 :]):
            return step
    return STEPS[-1]


def _timed(runtime: Runtime, dtype: str, rows: int, inputs: int, outputs: int, ranks: Sequence[int]) -> Timing:
    """Time a chain of layers inputs -> outputs -> inputs ... at several ranks; 0 is dense."""
    rng = np.random.default_rng(0)
    layers = _layers(inputs, outputs)
    models = [_chain(dtype, rows, (inputs, outputs), layers, rank, rng) for rank in ranks]
    sessions = [open_session(entry, runtime, what="a chain of layers", timed=True) for entry in models]
    feeds = {"x": rng.standard_normal((rows, inputs)).astype(dtype)}
    return benchmark(sessions, feeds, runtime, 0, _SECONDS, 200, 10)


def _layers(inputs: int, outputs: int) -> int:
    """Layers in a chain: an even number."""
    return int(np.clip(_ELEMENTS // (inputs * outputs) // 2 * 2, 2, _MOST_LAYERS))


def _chain(
    dtype: str, rows: int, widths: tuple[int, int], layers: int, rank: int, rng: np.random.Generator
) -> ModelProto:
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = onnx.GraphProto(name="chain")
    current = "x"
    for layer in range(layers):
        rises = layer % 2
        sides = [widths[rises], *([rank] if rank else []), widths[1 - rises]]
        for part, (before, after) in enumerate(pairwise(sides)):
            name = f"{layer}/{part}"
            graph.initializer.append(onnx.numpy_helper.from_array(_weight(before, after, dtype, rng), f"{name}/weight"))
            graph.node.append(onnx.helper.make_node("MatMul", [current, f"{name}/weight"], [name], name=name))
            current = name
    graph.input.append(onnx.helper.make_tensor_value_info("x", element, [rows, widths[0]]))
    graph.output.append(onnx.helper.make_tensor_value_info(current, element, [rows, widths[0]]))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def _weight(before: int, after: int, dtype: str, rng: np.random.Generator) -> Array:
    """Random, and of a scale that keeps half precision away from overflow and from zero."""
    return np.asarray(rng.standard_normal((before, after), np.float32) / np.sqrt(before), dtype)
