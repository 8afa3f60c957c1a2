"""What a graph computes from the shapes of tensors, as a function of one width in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from onnx import NodeProto

from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model, Scope
from lowrank_onnx.sites.weights import attribute

_POINTWISE: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
}
_SAME = frozenset(["Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape"])


class Widths:
    """Numbers that follow from the width of heads, of which some axis of some tensors tells.

    Args:
        axes: By tensor: its rank, and which of its axes is the width.
    """

    def __init__(self, model: Model, scope: Scope, axes: Mapping[str, tuple[int, int]]) -> None:
        self.model, self.scope, self.axes = model, scope, axes

    def at(self, name: str, width: int) -> Array | None:
        """The numbers (n,) of a tensor at that width; NaN where they depend on something else, None if unknown."""
        stored = self.model.constant(self.scope, name)
        if stored is not None:
            return stored.value.reshape(-1).astype(np.float64) if stored.value.dtype.kind in "iuf" else None
        node = self.scope.producers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Shape" and node.input[0] in self.axes and not _of_some_axes(node):
            rank, axis = self.axes[node.input[0]]
            shape = np.full(rank, np.nan)
            shape[axis] = width
            return shape
        inputs = [self.at(source, width) for source in node.input if source]
        known = [entry for entry in inputs if entry is not None]
        return self._computed(node, known) if known and len(known) == len(inputs) else None

    def _computed(self, node: NodeProto, values: list[Array]) -> Array | None:
        first = values[0]
        if node.op_type in _SAME:
            cut = node.op_type == "Cast" and int(attribute(node, "to", 0)) in (6, 7)  # to a whole number
            return np.trunc(first) if cut else first
        if node.op_type == "Gather":
            return first[values[1].astype(np.int64)]
        if node.op_type == "Slice" and len(values) > 2:
            end = min(int(values[2][0]), np.iinfo(np.int32).max)
            step = int(values[4][0]) if len(values) > 4 else 1
            return first[int(values[1][0]) : end : step]
        if node.op_type == "Concat":
            return np.concatenate(values)
        if node.op_type in _POINTWISE:
            return np.asarray(_POINTWISE[node.op_type](first, values[1]))
        if node.op_type == "Div":
            return np.asarray(first / values[1])  # whole numbers are cut by the Cast behind
        if node.op_type == "Sqrt":
            return np.sqrt(first)
        return 1 / first if node.op_type == "Reciprocal" else None


def _of_some_axes(node: NodeProto) -> bool:
    """Whether a Shape leaves axes out."""
    return any(entry.name == "end" or entry.i != 0 for entry in node.attribute)
