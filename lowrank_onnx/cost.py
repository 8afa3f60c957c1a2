"""Exact costs of a model: parameters, bytes, multiply-accumulates at the shapes used."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnx import NodeProto

from lowrank_onnx.model import Model, Scope, parameter_count, subgraphs
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.attention.nodes import keys_seen
from lowrank_onnx.sites.weights import attribute, attribute_text


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model weighs.

    Attributes:
        parameters: Floating-point elements stored, each once.
        size_bytes: Model file and external data.
        macs: Multiply-accumulates of one run; None where a shape is unknown.
    """

    parameters: int
    size_bytes: int
    macs: int | None


def model_cost(model: Model, shapes: Shapes, size_bytes: int) -> Cost:
    """Count a model."""
    return Cost(parameter_count(model.proto), size_bytes, model_macs(model, shapes))


def model_macs(model: Model, shapes: Shapes) -> int | None:
    """Multiply-accumulates of one run.

    MatMul, Gemm, Conv, ConvTranspose, LSTM, GRU, RNN, Einsum, Attention and MultiHeadAttention count;
    elementwise work and lookups do not. Of an If the dearer branch counts, of a Scan every step; the steps of
    a Loop are not known before it runs.
    """
    scopes = {scope.path: scope for scope in model.scopes}
    return _scope_macs(scopes[""], scopes, shapes)


def _scope_macs(scope: Scope, scopes: dict[str, Scope], shapes: Shapes) -> int | None:
    total = 0
    for place, node in enumerate(scope.graph.node):
        inner = [
            _scope_macs(
                scopes[f"{scope.path + '/' if scope.path else ''}{node.name or f'{node.op_type}_{place}'}/{name}"],
                scopes,
                shapes,
            )
            for name, _ in subgraphs(node)
        ]
        own = _body_macs(scope, node, inner, shapes) if inner else node_macs(scope, node, shapes)
        if own is None:
            return None
        total += own
    return total


def _body_macs(scope: Scope, node: NodeProto, inner: list[int | None], shapes: Shapes) -> int | None:
    if all(entry == 0 for entry in inner):
        return 0
    if any(entry is None for entry in inner):
        return None
    dearest = max(entry for entry in inner if entry is not None)
    if node.op_type == "If":
        return dearest
    if node.op_type == "Scan":
        scanned = int(attribute(node, "num_scan_inputs", 1))
        shape = shape_of(shapes, scope, node.input[-scanned])
        return None if shape is None else dearest * shape[0]
    return None


def node_macs(scope: Scope, node: NodeProto, shapes: Shapes) -> int | None:
    """Multiply-accumulates of one node without subgraphs; None where a shape is unknown."""

    def shape(name: str) -> tuple[int, ...] | None:
        return shape_of(shapes, scope, name)

    if node.domain not in ("", "ai.onnx", "com.microsoft"):
        return 0
    if node.op_type == "MatMul" and all(_is_stored(scope, name) for name in node.input):
        return 0  # a weight stored as a product is multiplied once, at load
    if node.op_type in ("MatMul", "Gemm", "MatMulInteger", "FusedMatMul"):
        left, out = shape(node.input[0]), shape(node.output[0])
        if left is None or out is None:
            return None
        axis = -2 if attribute(node, "transA", 0) and len(left) > 1 else -1
        return math.prod(out) * left[axis]
    if node.op_type in ("Conv", "ConvTranspose"):
        kernel, moving = (
            shape(node.input[1]),
            shape(node.input[0] if node.op_type == "ConvTranspose" else node.output[0]),
        )
        return None if kernel is None or moving is None else math.prod(moving) * math.prod(kernel[1:])
    if node.op_type in ("LSTM", "GRU", "RNN"):
        x, w, r = shape(node.input[0]), shape(node.input[1]), shape(node.input[2])
        return None if x is None or w is None or r is None else math.prod(x[:2]) * (math.prod(w) + math.prod(r))
    if node.op_type == "Einsum":
        return _einsum_macs([shape(name) for name in node.input], attribute_text(node, "equation", ""))
    if node.op_type == "Attention" and node.domain in ("", "ai.onnx"):
        return _attention_macs(shape(node.input[0]), shape(node.input[1]), shape(node.input[2]), node)
    fused = node.op_type in ("MultiHeadAttention", "GroupQueryAttention")
    if fused and len(node.input) > 2 and all(node.input[:3]):
        query, key, value = (shape(name) for name in node.input[:3])
        keys = keys_seen(node, shape)
        if query is None or key is None or value is None or keys is None:
            return None
        if not len(query) == len(key) == len(value) == 3:
            return None
        repeated = query[2] // key[2] if node.op_type == "GroupQueryAttention" else 1
        return math.prod(query[:2]) * keys * (query[2] + repeated * value[2])
    return 0


def _is_stored(scope: Scope, name: str) -> bool:
    owner = scope.owner(name)
    return owner is not None and name in owner.initializers and name not in owner.inputs


def _einsum_macs(shapes: list[tuple[int, ...] | None], equation: str) -> int | None:
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if len(terms) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=False):
        if shape is None or "..." in term or len(term) != len(shape):
            return None
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())


def _attention_macs(
    query: tuple[int, ...] | None, key: tuple[int, ...] | None, value: tuple[int, ...] | None, node: NodeProto
) -> int | None:
    if query is None or key is None or value is None:
        return None
    if len(query) == 4:  # (batch, heads, length, width)
        scores = math.prod(query[:3]) * key[2]
        return scores * (query[3] + value[3])
    heads = int(attribute(node, "q_num_heads", 1))
    width = query[2] // heads
    value_width = value[2] // max(int(attribute(node, "kv_num_heads", heads)), 1)
    return query[0] * heads * query[1] * key[1] * (width + value_width)
