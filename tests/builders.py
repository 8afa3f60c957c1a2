"""Small models as text, data with a mean and a falling spectrum, and a second way to run a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from lowrank_onnx.base import Pass, Site
from lowrank_onnx.problem import Data, Problem, pose
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime
from lowrank_onnx.statistics import observe

Array = NDArray[Any]

RUNTIME = Runtime("cpu", 1)

# The newest IR for each operator set that matters here; older sets want the form of their time.
_IR = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7}


def build(
    text: str,
    constants: Mapping[str, Array] | None = None,
    opset: int = 17,
    ir: int | None = None,
    imports: str = "",
) -> ModelProto:
    """Read a graph in the text form of ONNX and store the constants in it as initializers.

    Args:
        text: ``g (float[n,8] x) => (float[n,4] y) { y = MatMul(x, w) }``, functions behind it.
        constants: Initializers of the main graph. Of IR 3 they become inputs too, as that format wants.
        opset: Of the default domain.
        ir: IR version; one that fits the operator set if None.
        imports: More operator sets: ``, "com.microsoft": 1``.
    """
    version = ir if ir is not None else _IR.get(opset, 8)
    proto = onnx.parser.parse_model(f'<ir_version: {version}, opset_import: ["": {opset}{imports}]> {text}')
    for name, value in (constants or {}).items():
        tensor = onnx.numpy_helper.from_array(np.array(value, order="C"), name)
        proto.graph.initializer.append(tensor)
        if version < 4:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    return proto


def answers(proto: ModelProto, feeds: Mapping[str, Array], extra: Sequence[str] = ()) -> dict[str, Array]:
    """Run a model in onnxruntime and return its outputs, and tensors named in ``extra``, by name."""
    if extra:
        copy = ModelProto()
        copy.CopyFrom(proto)
        known = {value.name for value in copy.graph.output}
        copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in extra if name not in known)
        proto = copy
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def difference(measured: Array, expected: Array) -> float:
    """``|measured - expected| / |expected|``; of two zeros 0."""
    apart = float(np.linalg.norm(measured.astype(np.float64) - expected.astype(np.float64)))
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return apart / norm if norm else apart


def furthest(measured: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest ``difference`` over outputs of equal names and shapes."""
    assert list(measured) == list(expected)
    assert {n: (v.shape, v.dtype) for n, v in measured.items()} == {n: (v.shape, v.dtype) for n, v in expected.items()}
    return max(difference(measured[name], expected[name]) for name in expected)


def falling(rows: int, columns: int, dtype: type = np.float32, seed: int = 0) -> Array:
    """A weight (rows, columns) of full rank whose singular values fall as 1/k."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    rank = min(rows, columns)
    return np.asarray((u[:, :rank] / np.arange(1, rank + 1)) @ v[:rank], dtype)


def correlated(shape: tuple[int, ...], dtype: type = np.float32, axis: int = -1, seed: int = 1) -> Array:
    """Data whose features along ``axis`` are correlated and have a mean."""
    rng = np.random.default_rng(seed)
    width = shape[axis]
    mixing = rng.standard_normal((width, width)) * np.arange(1, width + 1) ** -0.7
    moved = rng.standard_normal((*np.delete(shape, axis), width)) @ mixing.T + rng.standard_normal(width)
    return np.asarray(np.moveaxis(moved, -1, axis), dtype)


def problem(proto: ModelProto, data: Data | None = None) -> Problem:
    """Pose a model, with calibration data or without."""
    return pose(proto, RUNTIME, calibrate=data)


def moments(posed: Problem) -> dict[str, dict[str, Any]]:
    """What the sites see on the calibration data; nothing without data."""
    if posed.calibrate is None:
        return {}
    return observe(posed.model, posed.sites, posed.calibrate, posed.runtime)


def factorized(posed: Problem, technique: Pass, site: Site, ranks: tuple[int, ...]) -> ModelProto:
    """The model with one site rewritten."""
    analysis = technique.analyse(site, moments(posed).get(site.name))
    candidate = technique.candidate(site, analysis, ranks)
    factors = technique.factorize(site, analysis, candidate)
    return rewrite(posed.model, technique.emit(site, candidate, factors))


def root_probabilities(scores: Array) -> Array:
    """√p (..., classes) behind a softmax; the squared distance of two such rows is half of KL where they are near."""
    scores = scores.astype(np.float64)
    raised = np.exp((scores - scores.max(axis=-1, keepdims=True)) / 2)
    return np.asarray(raised / np.linalg.norm(raised, axis=-1, keepdims=True))
