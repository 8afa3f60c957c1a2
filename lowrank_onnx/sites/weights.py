"""What every kind of site asks of a constant: is it finite, who shares it, does it leave the file."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from onnx import NodeProto

from lowrank_onnx.errors import ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import FLOAT_TYPES, TRANSPARENT, Constant, Model, Scope

WEIGHT_DTYPES = (np.float16, np.float32, np.float64)


def attribute(node: NodeProto, name: str, default: int | float) -> int | float:
    """An int or float attribute of a node."""
    for entry in node.attribute:
        if entry.name == name:
            return float(entry.f) if isinstance(default, float) else int(entry.i)
    return default


def attribute_list(node: NodeProto, name: str) -> tuple[int, ...]:
    """An attribute of a node that is a list of ints; empty where it is missing."""
    for entry in node.attribute:
        if entry.name == name:
            return tuple(entry.ints)
    return ()


def attribute_text(node: NodeProto, name: str, default: str) -> str:
    """An attribute of a node that is text."""
    for entry in node.attribute:
        if entry.name == name:
            return str(entry.s.decode("utf-8", "replace"))
    return default


def require_finite(values: Array, name: str, node: str) -> None:
    """Refuse to go on with a broken weight.

    Raises:
        ModelError: It holds NaN or Inf.
    """
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    bad = int(values.size - np.isfinite(values).sum())
    raise ModelError(
        f"weight '{name}' of node '{node}' holds {bad} NaN or Inf values; expected finite numbers; "
        "export the model again"
    )


def freed_parameters(model: Model, constants: Iterable[Constant], removed: frozenset[str]) -> int:
    """Floating-point elements that nobody reads once the nodes named in ``removed`` are gone."""
    scopes = {scope.path: scope for scope in model.scopes}
    roots = {root for constant in constants for root in constant.roots}
    return sum(
        _stored_elements(scopes[path], name) for path, name in roots if _is_released(scopes[path], name, removed)
    )


def _is_released(scope: Scope, name: str, removed: frozenset[str]) -> bool:
    if any(output.name == name for output in scope.graph.output):
        return False
    for reader in scope.readers.get(name, ()):
        if reader.node.name in removed:
            continue
        if reader.node.op_type not in TRANSPARENT:
            return False
        if not all(_is_released(reader.scope, output, removed) for output in reader.node.output if output):
            return False
    return True


def _stored_elements(scope: Scope, name: str) -> int:
    """Elements of a tensor that the file stores itself; 0 for one that is computed from another."""
    if name in scope.initializers:
        tensor = scope.initializers[name]
        return math.prod(tensor.dims) if tensor.data_type in FLOAT_TYPES else 0
    node = scope.producers.get(name)
    if node is not None and node.op_type == "Constant":
        return sum(
            math.prod(entry.t.dims)
            for entry in node.attribute
            if entry.name == "value" and entry.t.data_type in FLOAT_TYPES
        )
    return 0
