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
_LARGEST = 127
_TOLERATED = 0.02
"""Relative error of a tensor, from which it is stored as it is; of normally distributed numbers it is .007."""


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


def encode(value: Array) -> Code | None:
    """Code a tensor of at least two axes; None where it would lose more than is tolerated.

    The scale goes along the first or the last axis, whichever loses less.
    """
    if value.ndim < 2 or not np.isfinite(value).all():
        return None
    wanted = value.astype(np.float64)
    best, least = None, _TOLERATED * float(np.linalg.norm(wanted))
    for axis in (0, value.ndim - 1):
        others = tuple(place for place in range(value.ndim) if place != axis)
        scale = (np.abs(wanted).max(axis=others, keepdims=True) / _LARGEST).astype(np.float32)
        steps = np.divide(wanted, scale, out=np.zeros_like(wanted), where=scale > 0)
        code = Code(np.clip(np.rint(steps), -_LARGEST, _LARGEST).astype(np.int8), scale)
        lost = float(np.linalg.norm(code.decoded() - wanted))
        if lost <= least:
            best, least = code, lost
    return best


def decode(numbers: str, scale: str, target: str, data_type: int) -> Sequence[NodeProto]:
    """Nodes that make a tensor of its code.

    Args:
        numbers, scale: What the constants are called.
        target: What the tensor is called.
        data_type: Of the tensor, one of ``CODED``.
    """
    wide = f"{target}/wide"
    cast = helper.make_node("Cast", [numbers], [wide], wide, to=TensorProto.FLOAT)
    if data_type == TensorProto.FLOAT:
        return [cast, helper.make_node("Mul", [wide, scale], [target], f"{target}/scaled")]
    scaled = f"{target}/scaled"
    last = helper.make_node("Cast", [scaled], [target], f"{target}/narrow", to=data_type)
    return [cast, helper.make_node("Mul", [wide, scale], [scaled], scaled), last]
