"""The shapes tensors have in one run, measured by running the model, inferred inside subgraphs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, TensorProto

from lowrank_onnx.errors import ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model, Scope, reads, subgraphs
from lowrank_onnx.runtime import Runtime, open_session, run

Shapes = Mapping[tuple[str, str], tuple[int, ...]]
"""(scope path, tensor name) to shape."""

# The operators whose cost or whose weight we care about, or whose shapes tell how heads are made.
# Not Loop: what it carries may be no tensors.
COSTLY_OPS = frozenset(
    {
        "MatMul",
        "Gemm",
        "MatMulInteger",
        "FusedMatMul",
        "Conv",
        "ConvTranspose",
        "LSTM",
        "GRU",
        "RNN",
        "Einsum",
        "Gather",
    }
    | {"Attention", "MultiHeadAttention", "GroupQueryAttention", "Scan", "Expand", "Reshape", "Cos", "Sin"}
)


def shape_of(shapes: Shapes, scope: Scope, name: str) -> tuple[int, ...] | None:
    """Shape of a tensor as seen from a scope; None where it is unknown."""
    owner = scope.owner(name)
    return None if owner is None else shapes.get((owner.path, name))


def measure_shapes(
    model: Model, feeds: Mapping[str, Array], runtime: Runtime
) -> dict[tuple[str, str], tuple[int, ...]]:
    """Run the model once and note the shapes around every costly node.

    Shapes inside subgraphs come from shape inference, helped by those measured outside; what stays unknown
    is missing from the answer.

    Raises:
        ModelError: onnxruntime cannot run the model on these inputs.
    """
    main = model.scopes[0]
    wanted = {name for node in main.graph.node if node.op_type in COSTLY_OPS for name in (*node.input, *node.output)}
    if len(model.scopes) > 1:
        wanted |= _tensors(model) & {name for node in main.graph.node for _ in subgraphs(node) for name in reads(node)}
    wanted = {name for name in wanted if name and main.owner(name) is main}
    shapes = {("", name): tuple(tensor.dims) for name, tensor in main.initializers.items()}
    shapes.update({("", name): tuple(value.shape) for name, value in feeds.items()})
    wanted -= {name for _, name in shapes}
    shapes.update({("", name): shape for name, shape in _run_for_shapes(model, sorted(wanted), feeds, runtime).items()})
    if len(model.scopes) > 1:
        _infer_inner(model, shapes)
    return shapes


def _run_for_shapes(
    model: Model, names: list[str], feeds: Mapping[str, Array], runtime: Runtime
) -> dict[str, tuple[int, ...]]:
    """One run of a copy with a Shape node behind every tensor: only the shapes come back."""
    probe = ModelProto()
    probe.CopyFrom(model.proto)
    for place, name in enumerate(names):
        output = f"shape/{place}"
        probe.graph.node.append(onnx.helper.make_node("Shape", [name], [output], name=f"shape_of/{place}"))
        probe.graph.output.append(onnx.helper.make_tensor_value_info(output, TensorProto.INT64, None))
    outputs = [f"shape/{place}" for place in range(len(names))]
    values = run(open_session(probe, runtime, model.folder), feeds, outputs or None)
    return {name: tuple(int(size) for size in values[output]) for name, output in zip(names, outputs, strict=True)}


def _tensors(model: Model) -> set[str]:
    """What is known to be a tensor of the main graph, and no sequence or map."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model.proto)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return set()
    return {value.name for value in inferred.graph.value_info if value.type.HasField("tensor_type")}


def _infer_inner(model: Model, shapes: dict[tuple[str, str], tuple[int, ...]]) -> None:
    copy = ModelProto()
    copy.CopyFrom(model.proto)
    for value in copy.graph.input:
        measured = shapes.get(("", value.name))
        if measured is not None and value.type.HasField("tensor_type"):
            _write_shape(value, measured)
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
        # A shape that is computed is not followed: what bodies read of such tensors is told as it was measured.
        for value in inferred.graph.value_info:
            measured = shapes.get(("", value.name))
            if measured is not None and value.type.HasField("tensor_type"):
                _write_shape(value, measured)
        inferred = onnx.shape_inference.infer_shapes(inferred, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return  # the shapes inside stay unknown, and the report says so
    paired = Model(inferred, None, "", "", 0).scopes
    for scope in paired:
        for value in (*scope.graph.value_info, *scope.graph.output, *scope.graph.input):
            dims = value.type.tensor_type.shape.dim
            known = value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
            if known and (scope.path, value.name) not in shapes:
                shapes[(scope.path, value.name)] = tuple(dim.dim_value for dim in dims)
        for name, tensor in scope.initializers.items():
            shapes.setdefault((scope.path, name), tuple(tensor.dims))


def _write_shape(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    del value.type.tensor_type.shape.dim[:]
    for size in shape:
        value.type.tensor_type.shape.dim.add().dim_value = size


def static_shapes(model: Model) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shapes that can be told without running the model."""
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    _infer_inner(model, shapes)
    return shapes


def synthetic_feeds(specs: Mapping[str, tuple[np.dtype[np.generic], tuple[int, ...]]], seed: int) -> dict[str, Array]:
    """Inputs for timing and for shapes when no data are given.

    Floats are standard normal. Integers must be valid indices of unknown tables: masks are ones, lengths
    are the longest second axis, everything else is zero.
    """
    rng = np.random.default_rng(seed)
    longest = max((shape[1] for _, shape in specs.values() if len(shape) > 1), default=1)
    feeds: dict[str, Array] = {}
    for name, (dtype, shape) in specs.items():
        if dtype.kind == "f":
            feeds[name] = rng.standard_normal(shape).astype(dtype)
        elif "mask" in name.lower() or dtype.kind == "b":
            feeds[name] = np.ones(shape, dtype)
        elif "len" in name.lower():
            feeds[name] = np.full(shape, longest, dtype)
        elif dtype.kind in "iu":
            feeds[name] = np.zeros(shape, dtype)
        else:
            held = "text" if dtype.kind in "OSU" else dtype
            raise ModelError(f"input '{name}' holds {held}; give real inputs with --calibrate or --evaluate")
    return feeds
