"""Sites of kind ``recurrent``: LSTM, GRU and RNN nodes with constant weights.

The weight is W and R side by side, (directions, gates * hidden, inputs + hidden), gates in the order of
ONNX (LSTM i o f c, GRU z r h). Nodes with equal weights and attributes, such as one cell in both branches
of an If, are one site.

Attributes of a site:
    gates: 4, 3 or 1 for LSTM, GRU, RNN.
    inputs, hidden, directions: Sizes.
    bias: (directions, 2 * gates * hidden) constant B; None where there is none.
    bias_known: False where B is computed from data.
    opset: Of the model, which decides how nodes are spelled.
    single_step: The model itself says that every sequence is one step long.
Attributes by use, keyed by the node's name: the node, as the graph has it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from lowrank_onnx.base import Site, Use
from lowrank_onnx.errors import ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Constant, Model, Scope
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.weights import WEIGHT_DTYPES, attribute, freed_parameters, require_finite

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True, eq=False)
class _Found:
    scope: Scope
    node: NodeProto
    w: Constant
    r: Constant
    b: Constant | None
    bias_known: bool


def operand(node: NodeProto, place: int) -> str:
    """Name of an input of a node; empty where it is left out."""
    return node.input[place] if place < len(node.input) else ""


def state_inputs(site: Site) -> list[str]:
    """Names of the initial states of a recurrent site."""
    names = [operand(site.attributes[use.node], place) for use in site.uses for place in (5, 6)]
    return [name for name in names if name]


def has_lengths(site: Site) -> bool:
    """Whether the sequences of a recurrent site have lengths of their own."""
    return any(operand(site.attributes[use.node], 4) for use in site.uses)


def find(model: Model, shapes: Shapes) -> list[Site]:
    """Return one site per recurrent cell.

    Raises:
        ModelError: A weight holds NaN or Inf, or its shape contradicts the attributes of the node.
    """
    groups: dict[tuple[Any, ...], list[_Found]] = {}
    for scope in model.scopes:
        for node in scope.graph.node:
            if node.domain in ("", "ai.onnx") and node.op_type in GATES:
                found = _look(model, scope, node)
                if found is not None:
                    groups.setdefault(_key(found), []).append(found)
    lengths = _declared_lengths(model) if groups else {}
    return [_site(model, shapes, group, lengths) for group in groups.values()]


def _look(model: Model, scope: Scope, node: NodeProto) -> _Found | None:
    w, r = (model.constant(scope, operand(node, place)) for place in (1, 2))
    if w is None or r is None or w.value.dtype not in WEIGHT_DTYPES:
        return None
    for place, constant in ((1, w), (2, r)):
        require_finite(constant.value, operand(node, place), node.name)
    _check(node, w.value, r.value)
    b = model.constant(scope, operand(node, 3))
    return _Found(scope, node, w, r, b, b is not None or not operand(node, 3))


def _check(node: NodeProto, w: Array, r: Array) -> None:
    gates = GATES[node.op_type]
    if w.ndim != 3 or r.ndim != 3:
        raise ModelError(
            f"{node.op_type} '{node.name}' needs W and R with 3 axes (directions, gates * hidden, ...), found "
            f"{list(w.shape)} and {list(r.shape)}; export the model again"
        )
    hidden = int(attribute(node, "hidden_size", r.shape[2])) or r.shape[2]
    bidirectional = any(a.name == "direction" and a.s == b"bidirectional" for a in node.attribute)
    expected = (2 if bidirectional else 1, gates * hidden)
    if w.shape[:2] != expected or r.shape != (*expected, hidden):
        raise ModelError(
            f"{node.op_type} '{node.name}' says hidden_size {hidden}, so that W must be "
            f"[{expected[0]}, {expected[1]}, inputs] and R [{expected[0]}, {expected[1]}, {hidden}]; found "
            f"{list(w.shape)} and {list(r.shape)}; export the model again"
        )


def _key(found: _Found) -> tuple[Any, ...]:
    """Equal keys, equal cells; by value, as exporters slice the same weights anew in every branch."""
    digest = hashlib.sha256()
    for constant in (found.w, found.r, found.b):
        digest.update(b"-" if constant is None else np.ascontiguousarray(constant.value).tobytes())
    roots = frozenset[tuple[str, str]]().union(found.w.roots, found.r.roots)
    stored = frozenset(root for root in roots if root[0] == "")
    attributes = sorted(entry.SerializeToString(deterministic=True) for entry in found.node.attribute)
    return (found.node.op_type, digest.hexdigest(), found.bias_known, stored, *attributes)


def _site(model: Model, shapes: Shapes, group: list[_Found], lengths: dict[str, int]) -> Site:
    first = group[0]
    w, r = first.w.value, first.r.value
    gates = GATES[first.node.op_type]
    uses = tuple(_use(shapes, found) for found in group)
    constants = [first.w, first.r] + ([] if first.b is None else [first.b])
    every = [entry for found in group for entry in (found.w, found.r, found.b) if entry is not None]
    steps = [None if use.input_shape is None else math.prod(use.input_shape[:2]) for use in uses]
    return Site(
        name=first.node.name,
        kind="recurrent",
        op=first.node.op_type,
        shape=(r.shape[0], r.shape[1], w.shape[2] + r.shape[2]),
        weight=np.concatenate([w, r], axis=2),
        uses=uses,
        parameters=sum(constant.value.size for constant in constants),
        freed=freed_parameters(model, every, frozenset(use.node for use in uses)),
        macs=None if None in steps else sum(entry for entry in steps if entry is not None) * (w.size + r.size),
        attributes={
            "gates": gates,
            "inputs": w.shape[2],
            "hidden": r.shape[2],
            "directions": r.shape[0],
            "bias": None if first.b is None else first.b.value,
            "bias_known": first.bias_known,
            "opset": model.opset,
            "single_step": all(not use.scope and lengths.get(use.input) == 1 for use in uses),
            **{found.node.name: found.node for found in group},
        },
    )


def _use(shapes: Shapes, found: _Found) -> Use:
    node = found.node
    output = next(name for name in node.output if name)
    return Use(
        node=node.name,
        also=(),
        scope=found.scope.path,
        input=node.input[0],
        output=output,
        raw_output=output,
        input_shape=shape_of(shapes, found.scope, node.input[0]),
    )


def _declared_lengths(model: Model) -> dict[str, int]:
    """First axis of the tensors of the main graph whose length the model itself fixes."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model.proto, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return {}
    graph = inferred.graph
    return {
        value.name: value.type.tensor_type.shape.dim[0].dim_value
        for value in (*graph.value_info, *graph.input)
        if len(value.type.tensor_type.shape.dim) and value.type.tensor_type.shape.dim[0].HasField("dim_value")
    }
