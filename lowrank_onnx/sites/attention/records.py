"""What is noted down of an attention block while it is read, and of what has to follow when a head gets narrower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from lowrank_onnx.base import Site

PASSES_ON = frozenset(["Identity", "Cast", "Dropout"])
# What may stand between the scores and the softmax: it never sees a head's width.
POINTWISE = PASSES_ON | {"Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Clip"}
SPLIT = (0, 2, 1, 3)  # (batch, position, head, width) -> (batch, head, position, width)
SPLIT_TURNED = (0, 2, 3, 1)


@dataclass(frozen=True, eq=False)
class Resize:
    """A Reshape, or Expand, whose target names a width.

    Attributes:
        node, input, output: Its name and tensors.
        allowzero: Its attribute.
        pieces: What its target is put together from: numbers, or names of tensors.
        piece, entry: Where among them the width stands; piece -1: nowhere.
        unit: What one column of every head adds to that number: 1, or all heads.
    """

    node: str
    input: str
    output: str
    allowzero: int
    pieces: tuple[str | tuple[int, ...], ...]
    piece: int
    entry: int
    unit: int
    op: str = "Reshape"


@dataclass(frozen=True, eq=False)
class Scale:
    """A product with, or quotient by, one constant number.

    Attributes:
        node, op, input, output: Its name, ``Mul`` or ``Div``, and tensors.
        value: The constant as it is stored.
    """

    node: str
    op: str
    input: str
    output: str
    value: np.ndarray

    @property
    def factor(self) -> float:
        """What the input is multiplied by."""
        number = float(self.value.reshape(-1)[0])
        return number if self.op == "Mul" else 1 / number


@dataclass(frozen=True, eq=False)
class Table:
    """A product with the cosines or sines of rotary positions.

    Attributes:
        node, input, output: Its name, what is turned, and what comes out.
        table: The tensor with the cosines or sines, d columns.
        interleaved: Whether columns (2 i, 2 i + 1) are turned together, instead of (i, i + d / 2).
    """

    node: str
    input: str
    output: str
    table: str
    interleaved: bool


@dataclass(frozen=True, eq=False)
class Cache:
    """An input of the model with past keys or values, or the output with the longer past: axis of the width."""

    name: str
    axis: int


@dataclass(frozen=True, eq=False)
class Branch:
    """The way from a linear layer to its heads.

    ``shared``: heads of the queries that each of them serves; ``computed``: factors that are no constants.
    """

    site: Site
    heads: int
    width: int
    resizes: tuple[Resize, ...]
    scales: tuple[Scale, ...]
    between: tuple[str, ...]
    shared: int = 1
    tables: tuple[Table, ...] = ()
    caches: tuple[Cache, ...] = ()
    computed: tuple[str, ...] = ()
    axes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Swap:
    """What the sines are multiplied with: both columns of every pair in the other's place, one negated.

    Attributes:
        back, front: The Slices, of the columns that are negated and of the others.
        nodes: Every node on the way, the last first.
        interleaved: See Table.
        resizes: How the shape follows the width where the pairs are put side by side again.
    """

    back: NodeProto
    front: NodeProto
    nodes: tuple[NodeProto, ...]
    interleaved: bool
    resizes: tuple[Resize, ...]


@dataclass
class Way:
    """What was met so far on the way back from a product to a layer.

    Attributes:
        order: Where the axes have to end up.
        turned: Where they end up from here.
        axes: By tensor: its rank, and the axis of the width.
        shared: Heads that one head was repeated for.
    """

    order: tuple[int, ...]
    turned: tuple[int, ...] = (0, 1, 2, 3)
    axes: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: int = 1
    resizes: list[Resize] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)

    def place(self, axis: int) -> int:
        """Where batch, head, position or width (0 to 3) lies here."""
        final = {0: 0, 1: 1, 2: 2, 3: 3} if self.order == SPLIT else {0: 0, 1: 1, 2: 3, 3: 2}
        return self.turned[final[axis]]

    @property
    def straight(self) -> bool:
        """Whether the axes are batch, head, position, width here."""
        return all(self.place(axis) == axis for axis in range(4))
