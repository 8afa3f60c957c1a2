"""Nodes that carry out a structured matrix: block-diagonal chains, Kronecker products, blocks with shared bases.

Blocks are cut with Split and multiplied one by one: on ONNX Runtime's CPU that beats one batched product, whose
constants are not packed ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Replacement, Site, Use
from lowrank_onnx.chains import store
from lowrank_onnx.decompositions.blast import Blast, cuts
from lowrank_onnx.decompositions.block_sum import BlockSum, Stage
from lowrank_onnx.decompositions.kronecker import KroneckerSum
from lowrank_onnx.linalg import Array

FIRST_OPSET = 11  # Split, Concat and Gather count axes from the end
_OPERANDS_BY_INPUT = 13  # from here on Split takes sizes as an input


@dataclass
class _Nodes:
    """Nodes in the making; constants are named after the site, so that all uses share them."""

    site: Site
    use: Use
    nodes: list[gs.Node] = field(default_factory=list)

    @property
    def left(self) -> bool:
        """Whether the weight stands on the left: the rows of x are the columns of the tensor."""
        return bool(self.site.attributes["side"] == "left")

    @property
    def axis(self) -> int:
        """The axis that holds the entries of a row."""
        return -2 if self.left else -1

    def add(self, op: str, inputs: Sequence[gs.Tensor], name: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns its output, or a list of several."""
        made = [gs.Variable(f"{self.use.node}/{name}/{place}") for place in range(outputs)]
        self.nodes.append(gs.Node(op, f"{self.use.node}/{name}", attributes, list(inputs), made))
        return made[0] if outputs == 1 else made

    def constant(self, name: str, value: Array) -> gs.Constant:
        """A constant of the site."""
        return gs.Constant(f"{self.site.name}/{name}", np.ascontiguousarray(value))

    def product(self, value: gs.Tensor, matrix: Array, name: str) -> gs.Tensor:
        """``x @ matrix`` for rows x, on whichever side the weight stood."""
        stored = self.constant(name, store(matrix.T if self.left else matrix, self.site))
        return self.add("MatMul", [stored, value] if self.left else [value, stored], name)

    def take(self, value: gs.Tensor, order: Array | None, name: str) -> gs.Tensor:
        """Entries in another order."""
        if order is None:
            return value
        indices = self.constant(name, np.asarray(order, np.int64))
        return self.add("Gather", [value, indices], name, axis=self.axis)

    def split(self, value: gs.Tensor, sizes: Sequence[int], name: str) -> list[gs.Tensor]:
        """Cut a row into pieces."""
        if len(sizes) == 1:
            return [value]
        if self.site.attributes["opset"] < _OPERANDS_BY_INPUT:
            return list(self.add("Split", [value], name, len(sizes), axis=self.axis, split=list(sizes)))
        cut = self.constant(f"{name}_sizes", np.array(sizes, np.int64))
        return list(self.add("Split", [value, cut], name, len(sizes), axis=self.axis))

    def reshape(self, value: gs.Tensor, shape: Sequence[int], name: str) -> gs.Tensor:
        """Cut or join axes."""
        return self.add("Reshape", [value, self.constant(f"{name}_shape", np.array(shape, np.int64))], name)

    def total(self, values: Sequence[gs.Tensor], name: str) -> gs.Tensor:
        """The sum."""
        made = values[0]
        for place, value in enumerate(values[1:]):
            made = self.add("Add", [made, value], f"{name}{place}")
        return made

    def stage(self, value: gs.Tensor, stage: Stage, name: str) -> gs.Tensor:
        """One block-diagonal matrix behind its order."""
        value = self.take(value, stage.order, f"{name}.order")
        pieces = self.split(value, [len(block) for block in stage.blocks], f"{name}.split")
        made = [
            self.product(piece, block, f"{name}.{place}")
            for place, (piece, block) in enumerate(zip(pieces, stage.blocks, strict=True))
        ]
        return made[0] if len(made) == 1 else self.add("Concat", made, f"{name}.concat", axis=self.axis)


def block_chain(site: Site, use: Use, made: BlockSum, bias: Array | None) -> Replacement:
    """Replace one use of a linear site by a sum of block-diagonal chains.

    Args:
        bias: (N,) the whole bias of this use; None keeps whatever bias the graph has now.
    """
    nodes, value = _start(site, use)
    value = nodes.take(value, made.rows, "rows")
    ends = []
    for b, chain in enumerate(made.branches):
        current = value
        for s, stage in enumerate(chain):
            current = nodes.stage(current, stage, f"{b}.{s}")
        ends.append(current)
    total = nodes.total(ends, "sum")
    order = None if made.columns is None else np.argsort(made.columns)
    return _finish(nodes, nodes.take(total, order, "columns"), bias)


def kronecker_chain(site: Site, use: Use, made: KroneckerSum, bias: Array | None) -> Replacement:
    """Replace one use of a linear site, whose input has a known number of axes, by ``Σ A_kᵀ X B_k``."""
    assert use.input_shape is not None
    nodes, value = _start(site, use)
    terms, k1, n1 = made.left.shape
    _, k2, n2 = made.right.shape
    kept = [0] * (len(use.input_shape) - 1)
    value = nodes.reshape(value, [*kept, k1, k2], "cut")
    side_by_side = np.concatenate(list(made.right), axis=1)  # (K2, R N2)
    value = nodes.add("MatMul", [value, nodes.constant("right", store(side_by_side, site))], "right")
    value = nodes.reshape(value, [*kept, k1 * terms, n2], "terms")
    stacked = made.left.transpose(2, 1, 0).reshape(n1, k1 * terms)
    value = nodes.add("MatMul", [nodes.constant("left", store(stacked, site)), value], "left")
    return _finish(nodes, nodes.reshape(value, [*kept, n1 * n2], "join"), bias)


def blast_chain(site: Site, use: Use, made: Blast, bias: Array | None) -> Replacement:
    """Replace one use of a linear site by blocks with shared bases."""
    nodes, value = _start(site, use)
    rows, columns, _ = made.scales.shape
    pieces = nodes.split(value, [end - begin for begin, end in cuts(len(made.first), rows)], "split")
    thin = [
        nodes.product(piece, made.first[begin:end], f"first.{place}")
        for place, (piece, (begin, end)) in enumerate(zip(pieces, cuts(len(made.first), rows), strict=True))
    ]
    ends = []
    for column, (begin, end) in enumerate(cuts(made.second.shape[1], columns)):
        scaled = []
        for row, part in enumerate(thin):
            numbers = made.scales[row, column]
            factor = nodes.constant(f"scale.{row}.{column}", store(numbers[:, None] if nodes.left else numbers, site))
            scaled.append(nodes.add("Mul", [part, factor], f"scale.{row}.{column}"))
        mixed = nodes.add("Sum", scaled, f"mix.{column}")
        ends.append(nodes.product(mixed, made.second[:, begin:end], f"second.{column}"))
    return _finish(nodes, nodes.add("Concat", ends, "concat", axis=nodes.axis), bias)


def _start(site: Site, use: Use) -> tuple[_Nodes, gs.Tensor]:
    nodes = _Nodes(site, use)
    value: gs.Tensor = gs.Variable(use.input)
    if site.attributes["data_transposed"]:
        value = nodes.add("Transpose", [value], "transpose", perm=[1, 0])
    return nodes, value


def _finish(nodes: _Nodes, value: gs.Tensor, bias: Array | None) -> Replacement:
    """Add the bias and give the result the name the graph knows."""
    site, use = nodes.site, nodes.use
    extra = site.attributes[use.node]
    removed: tuple[str, ...] = (use.node,)
    if bias is None and use.bias is not None and extra["beta"] != 1.0:
        bias = use.bias  # the stored one lacks the factor
    if bias is None and extra["op"] == "Gemm" and extra["addend"]:
        value = nodes.add("Add", [value, gs.Variable(extra["addend"])], "add")
        name = use.output
    elif bias is None:
        name = use.raw_output
    else:
        shaped = store(bias[:, None] if nodes.left else bias, site)
        value = nodes.add("Add", [value, gs.Constant(f"{use.node}/bias", shaped)], "add")
        removed, name = (use.node, *use.also), use.output
    last = nodes.nodes[-1]
    last.outputs[0].name = name
    return Replacement(use.scope, removed, tuple(nodes.nodes))
