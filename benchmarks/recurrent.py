"""Recurrent cells in the fused operator and spelled out, by size: when the explicit low-rank cell is faster.

    python benchmarks/recurrent.py [--quick]

An LSTM and a GRU with as many inputs as hidden units, both weights at a quarter of break-even rank; median
milliseconds, and the speed-up over the dense fused operator. What the tool keeps is the quickest column.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx
from onnx import ModelProto

from lowrank_onnx.problem import pose
from lowrank_onnx.recurrent_chains import fused, spelled
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime, open_session
from lowrank_onnx.sites.recurrent import GATES
from lowrank_onnx.validation import benchmark

RUNTIME = Runtime("cpu", 1)


def cell(op: str, hidden: int, batch: int, steps: int) -> ModelProto:
    """One cell with states as inputs and outputs."""
    rng = np.random.default_rng(0)
    rows = GATES[op] * hidden
    states = ["h", "c"][: 1 + (op == "LSTM")]
    value = onnx.helper.make_tensor_value_info
    shapes = {"w": (1, rows, hidden), "r": (1, rows, hidden), "b": (1, 2 * rows)}
    extra = {"linear_before_reset": 1} if op == "GRU" else {}
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node(
                op, ["x", "w", "r", "b", "", *states], ["y", *(f"{s}_out" for s in states)], hidden_size=hidden, **extra
            )
        ],
        "cell",
        [value("x", 1, [steps, batch, hidden]), *(value(s, 1, [1, batch, hidden]) for s in states)],
        [value("y", 1, [steps, 1, batch, hidden]), *(value(f"{s}_out", 1, [1, batch, hidden]) for s in states)],
        [
            onnx.numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(hidden)).astype(np.float32), name)
            for name, shape in shapes.items()
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def measure(op: str, hidden: int, batch: int, steps: int, seconds: float) -> list[float]:
    """Median milliseconds of the dense operator, the projected and stored one, and the explicit cell."""
    problem = pose(cell(op, hidden, batch, steps), RUNTIME)
    (site,) = problem.sites
    rank = max(GATES[op] * hidden // (GATES[op] + 1) // 4 // 8 * 8, 8)
    rng = np.random.default_rng(1)
    factors = {
        "first": rng.standard_normal((hidden, rank)) / np.sqrt(hidden),
        "second": rng.standard_normal((1, GATES[op] * hidden, rank)) / np.sqrt(rank),
        "state_first": rng.standard_normal((1, rank, hidden)) / np.sqrt(hidden),
        "state_second": rng.standard_normal((1, GATES[op] * hidden, rank)) / np.sqrt(rank),
        "bias": site.attributes["bias"],
    }
    stored = {name: value.astype(np.float32) for name, value in factors.items()}
    models = [problem.model.proto]
    models += [rewrite(problem.model, [form(site, site.uses[0], stored)]) for form in (fused, spelled)]
    feeds = problem.require_feeds("timing").values
    timing = benchmark([open_session(model, RUNTIME) for model in models], feeds, RUNTIME, 0, seconds)
    return [latency.median for latency in timing.latencies]


def main() -> None:
    """Print the table."""
    quick = "--quick" in sys.argv[1:]
    print("| cell | hidden | batch | steps | dense ms | fused, W thin ms | explicit ms | fused | explicit |")
    print("|---|---|---|---|---|---|---|---|---|")
    for op in ("LSTM", "GRU"):
        for hidden in (128, 256, 512, 1024):
            for batch in (1, 16):
                for steps in (1, 200):
                    times = measure(op, hidden, batch, steps, 1.0 if quick else 4.0)
                    cells = [f"{time:.3f}" for time in times] + [f"{times[0] / time:.2f}×" for time in times[1:]]
                    print(f"| {op} | {hidden} | {batch} | {steps} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
