"""Hierarchical off-diagonal low rank (HODLR), carried out level by level.

    y_j = x_j D_j + Σ_level (x_i A_i) B_j,   i the neighbour of j at that level

Not in use unless asked for: every level is a cut, a product a block and a sum, and a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.base import Site
from lowrank_onnx.decompositions.block_sum import BlockSum
from lowrank_onnx.decompositions.hierarchical import hodlr, hodlr_parameters
from lowrank_onnx.passes.block_linear import orders
from lowrank_onnx.passes.structured import StructuredPass, Target


@dataclass(frozen=True)
class Hierarchical(StructuredPass):
    """Dense leaves on the diagonal, low rank off it at every level, rows and columns ordered first.

    Options:
        ridge: Pull towards the original weight, in units of the mean input variance.
        depth: Levels; 0 tries 1 to 3.
        leaf: Leaves are at least this wide on both sides.
    """

    name = "hierarchical"
    reference = "Ambikasaran & Darve 2013, doi:10.1007/s10915-013-9714-z (HODLR)"
    depth: int = 0
    leaf: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leaf < 1:
            raise ValueError("leaf must be at least 1")

    def forms(self, site: Site) -> Sequence[Any]:
        """See StructuredPass.forms."""
        shape = site.weight.shape
        depths = (self.depth,) if self.depth else (1, 2, 3)
        return [
            (depth, order)
            for depth in depths
            for order in ("kept", "ordered")
            if min(shape) // 2**depth >= self.leaf and self.cost(shape, (depth, order), 1) < shape[0] * shape[1]
        ]

    def prepare(self, target: Target, form: Any) -> Any:
        """See StructuredPass.prepare."""
        return orders(target, 2 ** form[0]) if form[1] == "ordered" else (None, None)

    def fit(self, target: Target, form: Any, state: Any, rank: int) -> BlockSum:
        """See StructuredPass.fit."""
        return hodlr(target.matrix, target.gram, form[0], rank, *state)

    def full(self, shape: tuple[int, ...], form: Any) -> int:
        """See StructuredPass.full."""
        return min(-(-side // 2) for side in shape)

    def cost(self, shape: tuple[int, ...], form: Any, rank: int) -> int:
        """See StructuredPass.cost."""
        return hodlr_parameters(shape[0], shape[1], form[0], rank)
