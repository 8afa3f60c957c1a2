"""Parts of a graph that predict how far a compressed model is from its original; added behind a finished model.

    v_j(x) = s_j² (c + Σ_l w_l q_l + u_l max(q_l - t_l, 0)) + (b + Σ_l x_l R_l B)_j²,   q_l = |(x_l - μ_l) F_l|²

x_l is a tensor of the compressed model: at the position the output speaks of where both have the same positions,
else its mean over the positions, or what the last steps of a recurrent cell read; the standard deviation is the root
of v. The first sum grows where x_l is unlike the calibration data, in the metric of a Bayesian linear model's
predictive variance. The second is what the weights left out, R_l = W_l - Ŵ_l, would have added, carried to the output
by a linear map.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lowrank_onnx.errors import ModelError
from lowrank_onnx.linalg import Array

SUFFIX = "_stddev"
STDDEV_KEY = "lowrank_onnx.stddev"
"""Metadata: the outputs that were added, one a line."""

THROUGH = ("Softmax", "Sigmoid")
"""Operators behind which a variance is told from that of their input; Softmax along the elements j."""

FIRST_OPSET = 8  # of Expand
_FIRST_SLICE_BY_INPUTS, _FIRST_SUM_BY_INPUTS = 10, 13
_FIRST_AXES_AS_INPUT = 18  # operator set in which ReduceMean takes its axes as an input


@dataclass(frozen=True)
class Tap:
    """A tensor of the compressed model, as an output sees it.

    Attributes:
        name: Of the tensor.
        rank: Number of its axes.
        channels: The axis that a weight would meet.
        samples: The axis of samples; None where a run holds one.
        aligned: Whether the other axes are those of the output; otherwise they are averaged.
        half: Whether it has to be cast to float32.
        picked: Axes of which one place counts, with that place: not averaged, and zero where it does not exist.
    """

    name: str
    rank: int
    channels: int
    samples: int | None
    aligned: bool
    half: bool = False
    picked: tuple[tuple[int, int], ...] = ()

    @property
    def averaged(self) -> list[int]:
        """The axes that go."""
        kept = (self.channels, self.samples)
        return [] if self.aligned else [axis for axis in range(self.rank) if axis not in kept]

    @property
    def kept(self) -> int:
        """Number of axes of the rows."""
        return self.rank - len(self.averaged)

    @property
    def flat(self) -> bool:
        """Whether the rows are a matrix."""
        return self.kept == 2

    def rows(self, value: Array) -> Array:
        """(..., K) as the graph makes it: channels last, positions averaged."""
        value = np.asarray(value, np.float32)
        for axis, place in self.picked:
            value = value[(slice(None),) * axis + (slice(place, place + 1 or None),)].sum(axis=axis, keepdims=True)
        if not self.averaged:
            return np.moveaxis(value, self.channels, -1)
        made = value.mean(axis=tuple(self.averaged))
        return np.asarray(made.T if self.samples is not None and self.samples > self.channels else made)


@dataclass(frozen=True, eq=False)
class Reach:
    """How far a tensor is from the calibration data: ``q = |(x - mean) root|²``.

    Attributes:
        mean: (K,).
        root: (K, p).
        weight: Of q in the sum.
        beyond: Of what q is above ``limit``, where few samples of the calibration data are.
    """

    tap: Tap
    mean: Array
    root: Array
    weight: float = 1.0
    beyond: float = 0.0
    limit: float = 0.0


@dataclass(frozen=True, eq=False)
class Loss:
    """What a weight that was left out would have given, seen in p directions.

    Attributes:
        tap: Its input; of a convolution with all axes of the map.
        kernel: (K, p) of a linear layer, (p, C, *kernel) of a convolution.
        attributes: Of the Conv node; empty for a linear layer.
        positions: Axes of the map that are averaged behind a convolution.
    """

    tap: Tap
    kernel: Array
    attributes: Mapping[str, Any]
    positions: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """p."""
        return int(self.kernel.shape[0 if self.attributes else -1])


@dataclass(frozen=True, eq=False)
class Spread:
    """What predicts the deviation of one output.

    Attributes:
        output: Its name.
        rank: Number of its axes, 2 at least: numbers without elements count as one element each.
        channels: The axis of its elements j.
        flat: Whether the output has one axis in truth.
        constant: c.
        scale: (J,) s_j².
        reaches: The tensors watched.
        losses: Sum up to (..., p).
        carry: (p, J) and ``shift`` (J,): from the losses to the output.
        through: The operator whose input all this is about, one of ``THROUGH``: the variance is carried through it.
        floor: Variance that is added behind it.
    """

    output: str
    rank: int
    channels: int
    flat: bool
    constant: float
    scale: Array
    reaches: tuple[Reach, ...]
    losses: tuple[Loss, ...]
    carry: Array
    shift: Array
    through: str = ""
    floor: float = 0.0


def stddev_outputs(session: Any) -> set[str]:
    """The outputs of an open model that ``add_stddev`` added; they belong to no original."""
    return set(session.get_modelmeta().custom_metadata_map.get(STDDEV_KEY, "").splitlines())


def add_stddev(proto: ModelProto, spreads: Sequence[Spread]) -> ModelProto:
    """Return the model with one more output for every spread, ``NAME_stddev``: float32, in the shape of the output.

    Raises:
        ModelError: The operator set is too old, or the name is taken.
    """
    check_room(proto, [spread.output for spread in spreads])
    grown = Growth(proto)
    for spread in spreads:
        name = f"{spread.output}{SUFFIX}"
        grown.add_output(name, spread)
    grown.proto.metadata_props.add(key=STDDEV_KEY, value="\n".join(f"{s.output}{SUFFIX}" for s in spreads))
    return grown.proto


def check_room(proto: ModelProto, outputs: Sequence[str]) -> None:
    """Find out that the outputs cannot be added before the work, not after it.

    Raises:
        ModelError: The operator set is too old, or a name is taken.
    """
    opset = _opset(proto)
    if opset < FIRST_OPSET:
        raise ModelError(
            f"--emit-uncertainty needs operator set {FIRST_OPSET} or newer, the model has {opset}; convert it with "
            "onnx.version_converter"
        )
    graph = proto.graph
    taken = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    taken |= {made for node in graph.node for made in node.output}
    for name in outputs:
        if f"{name}{SUFFIX}" in taken:
            raise ModelError(f"the model has a tensor '{name}{SUFFIX}' already; rename it, or name other outputs")


def _opset(proto: ModelProto) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)


class Growth:
    """A copy of a model that gets further nodes."""

    def __init__(self, proto: ModelProto) -> None:
        self.opset = _opset(proto)
        self.proto = ModelProto()
        self.proto.CopyFrom(proto)
        self.proto.ir_version = max(proto.ir_version, 4)  # constants are no inputs here
        self._made: dict[Tap, str] = {}
        self._count = 0

    def reach(self, entry: Reach) -> str:
        """(..., 1) q."""
        root, shift = self._constant(entry.root), self._constant(-(entry.mean @ entry.root))
        rows = self._rows(entry.tap)
        if entry.tap.flat:
            turned = self._node("Gemm", [rows, root, shift])
        else:
            turned = self._node("Add", [self._node("MatMul", [rows, root]), shift])
        if self.opset < _FIRST_AXES_AS_INPUT:
            return self._node("ReduceSumSquare", [turned], axes=[-1] if self.opset >= 11 else [entry.tap.kept - 1])
        return self._node("ReduceSumSquare", [turned, self._constant(np.array([-1], np.int64))])

    def weighed(self, entry: Reach) -> str:
        """(..., 1) what q counts."""
        if not entry.beyond:
            return self.reach(dataclasses.replace(entry, root=math.sqrt(entry.weight) * entry.root))
        distance = self.reach(entry)
        above = self._node("Relu", [self._node("Sub", [distance, self._constant(np.array(entry.limit))])])
        counted = self._node("Mul", [above, self._constant(np.array(entry.beyond))])
        if not entry.weight:
            return counted
        return self._node("Add", [self._node("Mul", [distance, self._constant(np.array(entry.weight))]), counted])

    def loss(self, entry: Loss) -> str:
        """(..., p) what was left out."""
        if not entry.attributes:
            return self._node("MatMul", [self._rows(entry.tap), self._constant(entry.kernel)])
        source = [self._float(entry.tap), self._constant(entry.kernel)]
        seen = self._node("Conv", source, **entry.attributes)
        if entry.positions:
            return self._mean(seen, list(entry.positions))
        return self._node("Transpose", [seen], perm=[0, *range(2, entry.tap.rank), 1])

    def shaped(self, name: str, width: int, rank: int, aligned: bool) -> str:
        """Give averaged rows (samples, width) the axes of an output."""
        if aligned or rank == 2:
            return name
        shape = np.array([-1, *(1,) * (rank - 2), width], np.int64)
        return self._node("Reshape", [name, self._constant(shape)])

    def carried(self, spread: Spread) -> str:
        """(..., J) where the losses end up in the output."""
        parts = [
            self.shaped(self.loss(entry), spread.carry.shape[0], spread.rank, entry.tap.aligned)
            for entry in spread.losses
        ]
        whole = self._node("MatMul", [self._sum(parts), self._constant(spread.carry)])
        return self._node("Add", [whole, self._constant(spread.shift)])

    def add_output(self, name: str, spread: Spread) -> None:
        """Add ``stddev`` of one output to the outputs."""
        graph = self.proto.graph
        parts = [self.shaped(self.weighed(entry), 1, spread.rank, entry.tap.aligned) for entry in spread.reaches]
        constant = self._constant(np.array(spread.constant).reshape((1,) * spread.rank))
        variance = self._node("Mul", [self._sum([constant, *parts]), self._constant(spread.scale)])
        if spread.losses:
            far = self.carried(spread)
            variance = self._node("Add", [variance, self._node("Mul", [far, far])])
        if spread.through:
            variance = self._pushed(spread, variance)
        deviation = self._node("Sqrt", [variance])
        if spread.channels != spread.rank - 1:
            order = list(range(spread.rank - 1))
            order.insert(spread.channels, spread.rank - 1)
            deviation = self._node("Transpose", [deviation], perm=order)
        if spread.flat:
            deviation = self._node("Reshape", [deviation, self._constant(np.array([-1], np.int64))])
        taps = [*(entry.tap for entry in spread.reaches), *(entry.tap for entry in spread.losses)]
        if any(tap.aligned if spread.rank > 2 else tap.samples is not None for tap in taps):
            graph.node.append(helper.make_node("Identity", [deviation], [name], f"{name}/give"))
        else:
            shape = self._node("Shape", [spread.output])
            graph.node.append(helper.make_node("Expand", [deviation, shape], [name], f"{name}/expand"))
        declared = next(value for value in graph.output if value.name == spread.output)
        copy = graph.output.add()
        copy.CopyFrom(declared)
        copy.name = name
        copy.type.tensor_type.elem_type = TensorProto.FLOAT

    def _pushed(self, spread: Spread, variance: str) -> str:
        """Sigmoid: v (p - p²)². Softmax: p_j² ((1 - 2 p_j) v_j + Σ p_i² v_i). Both from their derivative."""
        declared = next(value for value in self.proto.graph.output if value.name == spread.output)
        half = declared.type.tensor_type.elem_type == TensorProto.FLOAT16
        p = self._rows(Tap(spread.output, spread.rank, spread.channels, 0, True, half))
        square = self._node("Mul", [p, p])
        if spread.through == "Sigmoid":
            slope = self._node("Sub", [p, square])
            whole = self._node("Mul", [self._node("Mul", [slope, slope]), variance])
        else:
            ahead = self._node("Mul", [square, variance])
            total = self._node("MatMul", [ahead, self._constant(np.ones((len(spread.scale), 1)))])
            twice = self._node("Mul", [p, self._constant(np.array(2.0))])
            own = self._node("Mul", [self._node("Sub", [self._constant(np.array(1.0)), twice]), ahead])
            whole = self._node("Add", [own, self._node("Mul", [square, total])])
        return self._node("Add", [whole, self._constant(np.array(spread.floor))])

    def _float(self, tap: Tap) -> str:
        return self._node("Cast", [tap.name], to=TensorProto.FLOAT) if tap.half else tap.name

    def _rows(self, tap: Tap) -> str:
        """See Tap.rows."""
        if tap in self._made:
            return self._made[tap]
        current = self._float(tap)
        if tap.picked:
            current = self._places(current, tap.picked)
        if tap.averaged:
            gone = [axis for axis, _ in tap.picked]
            left = [axis - sum(other < axis for other in gone) for axis in tap.averaged if axis not in gone]
            current = self._mean(current, left) if left else current
            if tap.samples is not None and tap.samples > tap.channels:
                current = self._node("Transpose", [current], perm=[1, 0])
        elif tap.channels != tap.rank - 1:
            order = [axis for axis in range(tap.rank) if axis != tap.channels]
            current = self._node("Transpose", [current], perm=[*order, tap.channels])
        self._made[tap] = current
        return current

    def _places(self, source: str, picked: Sequence[tuple[int, int]]) -> str:
        """One place of each of these axes, which go; zeros where an axis is too short, the sum over nothing."""
        axes = [axis for axis, _ in picked]
        starts = [place for _, place in picked]
        ends = [place + 1 or np.iinfo(np.int64).max for place in starts]
        if self.opset < _FIRST_SLICE_BY_INPUTS:
            cut = self._node("Slice", [source], starts=starts, ends=ends, axes=axes)
        else:
            given = [self._constant(np.array(values, np.int64)) for values in (starts, ends, axes)]
            cut = self._node("Slice", [source, *given])
        if self.opset < _FIRST_SUM_BY_INPUTS:
            return self._node("ReduceSum", [cut], axes=axes, keepdims=0)
        return self._node("ReduceSum", [cut, self._constant(np.array(axes, np.int64))], keepdims=0)

    def _mean(self, source: str, axes: list[int]) -> str:
        if self.opset < _FIRST_AXES_AS_INPUT:
            return self._node("ReduceMean", [source], axes=axes, keepdims=0)
        return self._node("ReduceMean", [source, self._constant(np.array(axes, np.int64))], keepdims=0)

    def _sum(self, names: Sequence[str]) -> str:
        current = names[0]
        for name in names[1:]:
            current = self._node("Add", [current, name])
        return current

    def _constant(self, value: Array) -> str:
        array = value if value.dtype == np.int64 else np.asarray(value, np.float32)
        name = self._name()
        self.proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = self._name()
        self.proto.graph.node.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def _name(self) -> str:
        self._count += 1
        return f"stddev/{self._count}"
