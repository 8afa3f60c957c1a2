"""Sites of kind ``linear``: MatMul and Gemm with one constant operand.

A linear site is ``y = x @ weight + bias`` with weight (K, N), or (*batch, K, N) for batched constants,
whatever the node looked like: Gemm's ``alpha`` and transposes are folded in, and a constant on the left,
``y = W @ x``, is the same thing transposed (``side`` is ``left``; the columns of x are its rows).

Attributes of a site:
    side: Which operand is the data: ``right`` constant means data on the left, the usual case.
    data_transposed: Gemm reads the data operand transposed.
    stored: The stored weight as the node reads it is ``weight`` transposed.
    alpha: Factor that was folded into ``weight``.
    rows: Name of the initializer that holds ``weight`` transposed, (N, K); empty where there is none.
    opset: Of the model, which decides how nodes are spelled.
Attributes by use, keyed by the node's name:
    op: Operator of the node; a weight may be shared by MatMul and Gemm.
    beta: Factor of Gemm's C.
    addend: Name of Gemm's C; empty without one.
    bias_shape: Shape of the stored bias.
    add: True where the bias sits in an Add behind the node.
    scores: True where what comes out are scores of classes, for a softmax over the last axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import NodeProto

from lowrank_onnx.base import Site, Use
from lowrank_onnx.linalg import Array
from lowrank_onnx.metrics import called_scores
from lowrank_onnx.model import Constant, Model, Scope
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.weights import WEIGHT_DTYPES, attribute, attribute_list, freed_parameters, require_finite


@dataclass(frozen=True, eq=False)
class _Found:
    constant: Constant
    weight: Array
    attributes: Mapping[str, Any]
    node: NodeProto
    scope: Scope
    data: str
    weight_name: str


def find(model: Model, shapes: Shapes) -> list[Site]:
    """Return the linear sites. Nodes that read the same weight the same way are one site."""
    groups: dict[tuple[Any, ...], list[_Found]] = {}
    for scope in model.scopes:
        for node in scope.graph.node:
            if node.domain in ("", "ai.onnx") and node.op_type in ("MatMul", "Gemm"):
                found = _matmul(model, shapes, scope, node) if node.op_type == "MatMul" else _gemm(model, scope, node)
                if found is not None:
                    key = (found.constant.identity, *sorted(found.attributes.items()))
                    groups.setdefault(key, []).append(found)
    return [_site(model, shapes, group) for group in groups.values()]


def _matmul(model: Model, shapes: Shapes, scope: Scope, node: NodeProto) -> _Found | None:
    left, right = (model.constant(scope, name) for name in node.input)
    if (left is None) == (right is None):
        return None
    constant = left or right
    assert constant is not None
    if constant.value.ndim < 2 or constant.value.dtype not in WEIGHT_DTYPES:
        return None
    stored = right is None
    weight = np.swapaxes(constant.value, -1, -2) if stored else constant.value
    data, name = (node.input[1], node.input[0]) if stored else (node.input[0], node.input[1])
    shape = shape_of(shapes, scope, data)
    vector = shape is not None and len(shape) == 1  # W x = x Wᵀ, which has rows and no columns
    side = "left" if stored and not vector else "right"
    rows = _turned(scope, name) if side == "right" else ""
    attributes = {"side": side, "data_transposed": False, "stored": stored, "alpha": 1.0, "rows": rows}
    return _Found(constant, weight, attributes, node, scope, data, name)


def _gemm(model: Model, scope: Scope, node: NodeProto) -> _Found | None:
    a, b = (model.constant(scope, name) for name in node.input[:2])
    if (a is None) == (b is None):
        return None
    alpha = float(attribute(node, "alpha", 1.0))
    trans_a, trans_b = bool(attribute(node, "transA", 0)), bool(attribute(node, "transB", 0))
    if b is not None:
        constant, side, data, name, stored, data_transposed = b, "right", node.input[0], node.input[1], trans_b, trans_a
    else:
        assert a is not None
        constant, side, data, name = a, "left", node.input[1], node.input[0]
        stored, data_transposed = not trans_a, trans_b
    if constant.value.ndim != 2 or constant.value.dtype not in WEIGHT_DTYPES:
        return None
    weight = constant.value.T if stored else constant.value
    if alpha != 1.0:
        weight = (weight.astype(np.float64) * alpha).astype(weight.dtype)
    rows = name if stored and alpha == 1.0 and scope.path == "" and name in scope.initializers else ""
    attributes = {"side": side, "data_transposed": data_transposed, "stored": stored, "alpha": alpha, "rows": rows}
    return _Found(constant, weight, attributes, node, scope, data, name)


def _turned(scope: Scope, name: str) -> str:
    """The initializer of the main graph that a tensor is the plain transpose of; empty where there is none."""
    node = scope.producers.get(name)
    if scope.path or node is None or node.op_type != "Transpose" or node.input[0] not in scope.initializers:
        return ""
    return str(node.input[0]) if attribute_list(node, "perm") in ((), (1, 0)) else ""


def _site(model: Model, shapes: Shapes, group: list[_Found]) -> Site:
    first = group[0]
    require_finite(first.constant.value, first.weight_name, first.node.name)
    extra: dict[str, Any] = {}
    uses = []
    for found in group:
        use, more = _use(model, shapes, found)
        uses.append(use)
        extra[use.node] = more
    removed = frozenset(use.node for use in uses)
    macs = [_macs(found, use) for found, use in zip(group, uses, strict=True)]
    return Site(
        name=first.node.name,
        kind="linear",
        op=first.node.op_type,
        shape=tuple(first.constant.value.shape),
        weight=first.weight,
        uses=tuple(uses),
        parameters=first.weight.size,
        freed=freed_parameters(model, [first.constant], removed),
        macs=None if any(entry is None for entry in macs) else sum(entry for entry in macs if entry is not None),
        attributes={**first.attributes, "opset": model.opset, **extra},
    )


def _use(model: Model, shapes: Shapes, found: _Found) -> tuple[Use, dict[str, Any]]:
    node, scope = found.node, found.scope
    output = node.output[0]
    bias: Array | None = None
    dynamic = ""
    also: tuple[str, ...] = ()
    more: dict[str, Any] = {
        "op": node.op_type,
        "beta": 1.0,
        "addend": "",
        "bias_shape": (),
        "add": False,
        "scores": False,
    }
    width = found.weight.shape[-1]
    axis = -1 if found.attributes["side"] == "right" else -2
    if node.op_type == "Gemm":
        more["beta"] = float(attribute(node, "beta", 1.0))
        if len(node.input) > 2 and node.input[2]:
            more["addend"] = node.input[2]
            stored = model.constant(scope, node.input[2])
            vector = None if stored is None else _vector(stored.value, width, axis)
            if vector is None:
                dynamic = node.input[2]
            else:
                assert stored is not None
                bias = (vector.astype(np.float64) * float(more["beta"])).astype(vector.dtype)
                more["bias_shape"] = tuple(stored.value.shape)
    else:
        added = _bias_add(model, scope, output, width, axis)
        if added is not None:
            add, bias, shape = added
            also, output = (add.name,), add.output[0]
            more.update(bias_shape=shape, add=True)
    given = shape_of(shapes, scope, node.output[0])
    more["scores"] = found.attributes["side"] == "right" and _are_scores(model, scope, output, given)
    use = Use(
        node=node.name,
        also=also,
        scope=scope.path,
        input=found.data,
        output=output,
        raw_output=node.output[0],
        bias=bias,
        dynamic_bias=dynamic,
        input_shape=shape_of(shapes, scope, found.data),
        output_shape=given,
    )
    return use, more


def _bias_add(
    model: Model, scope: Scope, output: str, width: int, axis: int
) -> tuple[NodeProto, Array, tuple[int, ...]] | None:
    """The Add of a constant vector that alone reads ``output``."""
    readers = scope.readers.get(output, [])
    if len(readers) != 1 or any(value.name == output for value in scope.graph.output):
        return None
    add = readers[0].node
    if add.op_type != "Add" or readers[0].scope is not scope or len(add.input) != 2:
        return None
    constant = model.constant(scope, add.input[1 - readers[0].slot])
    if constant is None or constant.value.dtype not in WEIGHT_DTYPES:
        return None
    # One axis cannot raise the rank of the sum; more than the weight has might.
    if constant.value.ndim > 2 or (constant.value.ndim == 2 and axis == -1 and constant.value.shape[0] != 1):
        return None
    vector = _vector(constant.value, width, axis)
    return None if vector is None else (add, vector, tuple(constant.value.shape))


def _are_scores(model: Model, scope: Scope, output: str, shape: tuple[int, ...] | None) -> bool:
    """Whether an output of the model that is called scores, or a softmax over the last axis, takes a tensor."""
    if shape is None or len(shape) not in (2, 3):
        return False
    if scope.path == "" and any(value.name == output for value in scope.graph.output):
        return called_scores(output)
    readers = [reader.node for reader in scope.readers.get(output, [])]
    usual = -1 if model.opset >= 13 else 1
    return bool(readers) and all(
        node.op_type in ("Softmax", "LogSoftmax") and attribute(node, "axis", usual) in (-1, len(shape) - 1)
        for node in readers
    )


def _vector(values: Array, width: int, axis: int) -> Array | None:
    """A stored bias as (width,), or None where it differs along another axis than the outputs."""
    shape = values.shape if values.ndim else (1,)
    place = len(shape) + axis
    if any(size != 1 for position, size in enumerate(shape) if position != place):
        return None
    if place >= 0 and shape[place] not in (1, width):
        return None
    return np.broadcast_to(values.reshape(-1), (width,)).copy()


def _macs(found: _Found, use: Use) -> int | None:
    if use.output_shape is None:
        return None
    return int(math.prod(use.output_shape) * found.weight.shape[-2])
