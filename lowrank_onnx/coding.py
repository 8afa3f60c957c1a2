"""Weights in a byte a number, for what a smaller level stores beside the weights of the highest one.

    v ≈ s q,   q integers from -127 to 127, one scale s for every index of one axis

The nodes that multiply them out have constants alone as inputs: a runtime folds them when it loads the model, and
runs what it would run with v. A level that needs factors of its own has lost far more to its ranks than to this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, helper

from lowrank_onnx.linalg import Array

CODED = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})
LARGEST = 127
_TOLERATED = 2.5
"""Relative error of a tensor in units of 1 / largest integer, from which it is stored as it is; of normally
distributed numbers it is about .9."""


@dataclass(frozen=True, eq=False)
class Code:
    """A tensor in a byte a number.

    Attributes:
        numbers: int8, in the shape of the tensor.
        scale: float32, of as many axes, 1 long along all but one.
    """

    numbers: Array
    scale: Array

    def decoded(self) -> Array:
        """The tensor as the nodes of ``decode`` make it, in float32."""
        return np.asarray(self.numbers.astype(np.float32) * self.scale)


def encode(value: Array, largest: int = LARGEST) -> Code | None:
    """Code a tensor of at least two axes; None where it would lose more than is tolerated.

    The scale goes along the first or the last axis, whichever loses less.

    Args:
        largest: Absolute value of the integers, 127 at most.
    """
    if value.ndim < 2 or not np.isfinite(value).all():
        return None
    wanted = value.astype(np.float64)
    best, least = None, _TOLERATED / largest * float(np.linalg.norm(wanted))
    for axis in (0, value.ndim - 1):
        others = tuple(place for place in range(value.ndim) if place != axis)
        scale = (np.abs(wanted).max(axis=others, keepdims=True) / largest).astype(np.float32)
        steps = np.divide(wanted, scale, out=np.zeros_like(wanted), where=scale > 0)
        code = Code(np.clip(np.rint(steps), -largest, largest).astype(np.int8), scale)
        lost = float(np.linalg.norm(code.decoded() - wanted))
        if lost <= least:
            best, least = code, lost
    return best


def decode(numbers: str, scale: str, target: str, data_type: int, wide: bool = False) -> Sequence[NodeProto]:
    """Nodes that make a tensor of its code.

    Args:
        numbers, scale: What the constants are called.
        target: What the tensor is called.
        data_type: Of the tensor, one of ``CODED``.
        wide: Whether the numbers are in float32 already.
    """
    nodes = []
    if not wide:
        nodes.append(helper.make_node("Cast", [numbers], [f"{target}/wide"], f"{target}/wide", to=TensorProto.FLOAT))
        numbers = f"{target}/wide"
    if data_type == TensorProto.FLOAT:
        return [*nodes, helper.make_node("Mul", [numbers, scale], [target], f"{target}/scaled")]
    scaled = f"{target}/scaled"
    nodes.append(helper.make_node("Mul", [numbers, scale], [scaled], scaled))
    return [*nodes, helper.make_node("Cast", [scaled], [target], f"{target}/narrow", to=data_type)]
