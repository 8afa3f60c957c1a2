"""Whether a gate on the residual energy of a layer is faster than the static rank that errs as little.

    python benchmarks/residual_gate.py MODEL.onnx CALIBRATE EVALUATE --include "*fc2*" --threads 1
    python benchmarks/residual_gate.py --made-up 768x3072 --threads 1

    z = x Q,  y = z B;  where |x - x Q Qᵀ| is large:  y += (x - mean) Q₂ B₂

One row x at a time; Q and Q₂ are orthonormal, so that the residual takes two sums and no product; one ``If``. Basis,
biases and thresholds are of the calibration rows; errors are shares of the variance of the layer's output on the
evaluation rows, and times are of these rows, each kind weighted by how often it comes. The threshold is on the residual
or on its share of |x|, whichever tells the gain better on the calibration rows. Made-up layers: rows of one spectrum;
the same, of widely different lengths; and a mixture made for a gate, a tenth of whose rows need all directions, the
others an eighth.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from lowrank_onnx.problem import pose
from lowrank_onnx.runtime import Runtime, open_session, run
from lowrank_onnx.statistics import as_rows, expose, padding_mask
from lowrank_onnx.validation import expected_timing

Numbers = NDArray[np.float64]

_ROWS = 4000  # of each set
_SETTINGS = ((1 / 8, 1 / 2), (1 / 4, 1 / 2), (1 / 4, 3 / 4), (1 / 2, 3 / 4))  # r and R, of the break-even rank
_SHARES = (0.1, 0.3)  # that go on

_STATIC = "{ z = MatMul(x, q) y = Gemm(z, b, c) }"
_GATED = """{ z = MatMul(x, q) y1 = Gemm(z, b, c)
  xx = ReduceSumSquare <keepdims = 0> (x) zz = ReduceSumSquare <keepdims = 0> (z)
  part = Mul(xx, k) rest = Sub(part, zz) on = Greater(rest, t)
  y = If (on) <
    then_branch = more () => (float[1,N] more) { z2 = Gemm(x, q2, c2) more = Gemm(z2, b2, y1) },
    else_branch = less () => (float[1,N] less) { less = Identity(y1) }
  > }"""
"""|x - x Q Qᵀ|² = |x|² - |z|²: above t; or its share of |x|² above 1 - k, where t is 0."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight (K, N) and rows (n, K) that meet it."""

    name: str
    weight: Numbers
    fitted: Numbers
    seen: Numbers


class Basis:
    """Orthonormal Q (K, full) with Q B = W, its leading columns best for the output of the calibration rows."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.mean = layer, layer.fitted.mean(0)
        outputs = (layer.fitted - self.mean) @ layer.weight
        directions = np.linalg.eigh(outputs.T @ outputs)[1][:, ::-1][:, : min(layer.weight.shape)]
        self.q, triangle = np.linalg.qr(layer.weight @ directions)
        self.b = triangle @ directions.T

    def lost(self, rows: Numbers, rank: int) -> Numbers:
        """(n,) squared error of each row's output at a rank; the bias gives the mean back."""
        return np.asarray(np.sum((((rows - self.mean) @ self.q[:, rank:]) @ self.b[rank:]) ** 2, axis=1))

    def residual(self, rows: Numbers, rank: int, k: float) -> Numbers:
        """(n,) k |x|² - |x Q|²."""
        return np.asarray(k * np.sum(rows**2, axis=1) - np.sum((rows @ self.q[:, :rank]) ** 2, axis=1))

    def bias(self, rank: int) -> Numbers:
        """What the columns left out give on average."""
        return np.asarray((self.mean @ self.q[:, rank:]) @ self.b[rank:])


def made_up(inputs: int, outputs: int) -> Iterator[Layer]:
    """Three layers of the same weight; the rows are plain ones, such that differ in length, and a mixture."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)
    turn = np.linalg.qr(rng.standard_normal((inputs, inputs)))[0]
    spectrum = np.arange(1, inputs + 1) ** -0.5
    rows = rng.standard_normal((2, _ROWS, inputs))
    plain = rows * spectrum @ turn
    yield Layer(f"{inputs} x {outputs}, plain", weight, *plain)
    yield Layer(f"{inputs} x {outputs}, lengths", weight, *(plain * np.exp(rng.standard_normal((2, _ROWS, 1)))))
    narrow = np.arange(inputs) < inputs // 8
    wide = rng.random((2, _ROWS, 1)) < 0.1
    yield Layer(f"{inputs} x {outputs}, mixture", weight, *(np.where(wide | narrow, rows, 0.03 * rows) @ turn))


def of_model(options: argparse.Namespace, runtime: Runtime) -> Iterator[Layer]:
    """The linear layers of a model that match a pattern, with the rows of both sets of data."""
    problem = pose(options.model, runtime, options.calibrate, options.evaluate, None, (), 0)
    assert problem.calibrate is not None and problem.evaluate is not None
    sites = [site for site in problem.sites if site.kind == "linear" and fnmatch(site.name, options.include)]
    tensors = sorted({site.uses[0].input for site in sites})
    session = open_session(expose(problem.model.proto, tensors), runtime, problem.model.folder)
    made = [entry.name for entry in session.get_outputs() if entry.name in tensors]
    rows: list[dict[str, list[Numbers]]] = [{name: [] for name in tensors} for _ in range(2)]
    for kept, data in zip(rows, (problem.calibrate, problem.evaluate), strict=True):
        for place in range(len(data)):
            feeds = data.feeds(place)
            mask = padding_mask(feeds, None)
            for name, value in {**feeds, **run(session, feeds, made)}.items():
                if name in kept:
                    kept[name].append(as_rows(value, "last", mask).astype(np.float64))
    rng = np.random.default_rng(0)
    for site in sites:
        fitted, seen = (np.concatenate(kept[site.uses[0].input]) for kept in rows)
        drawn = (part[rng.permutation(len(part))[:_ROWS]] for part in (fitted, seen))
        yield Layer(site.name, site.weight.astype(np.float64), *drawn)


def model(body: str, weight: Numbers, runtime: Runtime, **constants: Numbers) -> Any:
    """A session of a graph from x (1, K) to y (1, N)."""
    rows, columns = weight.shape
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[1,{rows}] x) => (float[1,{columns}] y) {body}'
    proto = parser.parse_model(text.replace("N]", f"{columns}]"))
    stored = {name: np.ascontiguousarray(value, np.float32) for name, value in constants.items()}
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    return open_session(helper.make_model(proto.graph, opset_imports=proto.opset_import, ir_version=8), runtime)


def threshold(basis: Basis, rank: int, gains: Numbers, share: float) -> tuple[str, float, float, float]:
    """What tells the gain best on the calibration rows, its rank correlation with it, and k and t of the gate."""
    rows = basis.layer.fitted
    rest = basis.residual(rows, rank, 1.0)
    signals = {"residual": rest, "its share": rest / np.maximum(np.sum(rows**2, axis=1), 1e-12)}
    tells = {name: float(scipy.stats.spearmanr(signal, gains).statistic) for name, signal in signals.items()}
    best = max(tells, key=lambda name: tells[name])
    cut = float(np.quantile(signals[best], 1 - share))
    return best, tells[best], *((1.0, cut) if best == "residual" else (1.0 - cut, 0.0))


def compare(layer: Layer, runtime: Runtime, seconds: float) -> list[float]:
    """Print a line a setting; return how many times as fast the gate is as the static rank in each."""
    basis = Basis(layer)
    q, b, seen = basis.q, basis.b, layer.seen
    most, even = len(b), layer.weight.size // sum(layer.weight.shape)
    outputs = seen @ layer.weight
    total = float(np.sum((outputs - outputs.mean(0)) ** 2))
    errors = {rank: float(np.sum(basis.lost(seen, rank))) / total for rank in (*range(8, most, 8), most)}
    dense = model("{ y = Gemm(x, w, c) }", layer.weight, runtime, w=layer.weight, c=basis.bias(most))
    ranks = dict.fromkeys(tuple(max(8, int(even * part) // 8 * 8) for part in pair) for pair in _SETTINGS)
    found = []
    for (low, high), share in ((pair, share) for pair in ranks for share in _SHARES if pair[0] < pair[1]):
        gains = basis.lost(layer.fitted, low) - basis.lost(layer.fitted, high)
        signal, told, k, t = threshold(basis, low, gains, share)
        on = basis.residual(seen, low, k) > t
        error = float(np.sum(np.where(on, basis.lost(seen, high), basis.lost(seen, low)))) / total
        same = next((rank for rank, value in errors.items() if value <= error), most)
        static = model(_STATIC, layer.weight, runtime, q=q[:, :same], b=b[:same], c=basis.bias(same))
        more = {"q2": q[:, low:high], "b2": b[low:high], "c2": -basis.mean @ q[:, low:high]}
        numbers = {"k": np.array(k), "t": np.array(t)}
        parts = {"q": q[:, :low], "b": b[:low], "c": basis.bias(low), **more, **numbers}
        gated = model(_GATED, layer.weight, runtime, **parts)
        _check(gated, layer, basis, (low, high), on)
        kinds = [[{"x": row[None].astype(np.float32)} for row in seen[on == flag][:64]] for flag in (False, True)]
        timing = expected_timing([static, gated, dense], kinds, [1 - on.mean(), on.mean()], 0, seconds)
        times = " | ".join(f"{1000 * entry.quiet:.1f}" for entry in timing.latencies)
        ratio = timing.ratios[1]
        found.append(ratio.value)
        print(
            f"| {layer.name} | {low}, {high} | {on.mean():.2f} | {signal} {told:.2f} | {error:.4f} | {same} | {times} "
            f"| {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) |",
            flush=True,
        )
    return found


def _check(session: Any, layer: Layer, basis: Basis, ranks: Sequence[int], on: NDArray[np.bool_]) -> None:
    """The graph does what the errors are of, on a row of each kind."""
    for flag in np.unique(on):
        row = layer.seen[on == flag][:1]
        rank = ranks[int(flag)]
        wanted = row @ basis.q[:, :rank] @ basis.b[:rank] + basis.bias(rank)
        answer = session.run(None, {"x": row.astype(np.float32)})[0]
        assert np.linalg.norm(answer - wanted) <= 1e-3 * np.linalg.norm(wanted), "the gate answers something else"


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?")
    arguments.add_argument("calibrate", nargs="?")
    arguments.add_argument("evaluate", nargs="?")
    arguments.add_argument("--include", default="*", help="names of layers")
    arguments.add_argument("--made-up", help="INPUTSxOUTPUTS instead of a model")
    arguments.add_argument("--threads", type=int, default=0)
    arguments.add_argument("--seconds", type=float, default=2.0, help="for each setting")
    options = arguments.parse_args()
    if (options.made_up is None) == (options.evaluate is None):
        arguments.error("give a model with calibration and evaluation data, or --made-up")
    runtime = Runtime("cpu", options.threads)
    layers = made_up(*map(int, options.made_up.split("x"))) if options.made_up else of_model(options, runtime)
    print(
        "| layer | r, R | share on | signal, correlation with the gain | error | static | us | gate | dense | speed |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    ratios = [ratio for layer in layers for ratio in compare(layer, runtime, options.seconds)]
    if ratios:
        print(f"\nThe gate is {min(ratios):.2f} to {max(ratios):.2f} times as fast, in {len(ratios)} settings.")


if __name__ == "__main__":
    main()
