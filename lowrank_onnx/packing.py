"""Ten small integers in one of 64 bits, for levels that would take too much room in a byte a number.

    p = Σ (q_k + 38) 77^k,   k = 0 … 9,   q_k integers from -38 to 38

6.4 bits a number. The nodes that take them apart have constants alone as inputs, as those of ``coding``: a runtime
folds them when it loads the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lowrank_onnx.linalg import Array

LARGEST = 38
_BASE = 2 * LARGEST + 1
_DIGITS = 10
_POWERS = _BASE ** np.arange(_DIGITS, dtype=np.int64)  # 77^10 is the largest such power that 63 bits hold
_FIRST_SPLIT = 13  # operator set in which Split takes the sizes as an input


def pack(numbers: Sequence[Array]) -> Array:
    """Join integers of absolute value ``LARGEST`` at most.

    Args:
        numbers: Arrays of any shapes, taken in the order of their elements.

    Returns:
        (p, 1) int64; the last one is filled up with zeros.
    """
    flat = np.concatenate([entry.ravel() for entry in numbers]).astype(np.int64) + LARGEST
    digits = np.pad(flat, (0, -len(flat) % _DIGITS)).reshape(-1, _DIGITS)  # (p, 10)
    return np.asarray((digits @ _POWERS)[:, None])


def constants(prefix: str) -> list[TensorProto]:
    """What all nodes of ``unpack`` with this prefix share."""
    values = {"powers": _POWERS, "base": np.int64(_BASE), "flat": np.array([-1], np.int64), "half": np.float32(LARGEST)}
    return [numpy_helper.from_array(np.asarray(value), f"{prefix}{name}") for name, value in values.items()]


def unpack(packed: str, sizes: Sequence[int], prefix: str, opset: int) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes that take integers apart, as float32 in one axis.

    Args:
        packed: Name of what ``pack`` made of arrays of these sizes; part k of it is called ``part(packed, k)``.
        sizes: Elements of each array.
        prefix: See ``constants``.
        opset: Of the default domain.
    """
    make = helper.make_node
    lengths = [*sizes, *([filled] if (filled := -sum(sizes) % _DIGITS) else [])]
    parts = [part(packed, place) for place in range(len(lengths))]
    steps = [f"{packed}{letter}" for letter in "defgh"]
    nodes = [
        make("Div", [packed, f"{prefix}powers"], [steps[0]]),  # (p, 10)
        make("Mod", [steps[0], f"{prefix}base"], [steps[1]]),
        make("Reshape", [steps[1], f"{prefix}flat"], [steps[2]]),
        make("Cast", [steps[2]], [steps[3]], to=TensorProto.FLOAT),
        make("Sub", [steps[3], f"{prefix}half"], [steps[4]]),
    ]
    if opset < _FIRST_SPLIT:
        return [*nodes, make("Split", [steps[4]], parts, axis=0, split=lengths)], []
    told = numpy_helper.from_array(np.array(lengths, np.int64), f"{packed}s")
    return [*nodes, make("Split", [steps[4], told.name], parts, axis=0)], [told]


def part(packed: str, place: int) -> str:
    """What one of the arrays is called."""
    return f"{packed}.{place}"
