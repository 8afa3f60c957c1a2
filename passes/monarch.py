"""Monarch: two block-diagonal matrices with a permutation between.

    x  ->  x_i A_i  ->  permuted  ->  z_j B_j  ->  outputs in strides

Not in use unless asked for: it was made for training; as a projection it seldom beats plain low rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.base import Site
from lowrank_onnx.decompositions.block_sum import BlockSum
from lowrank_onnx.decompositions.monarch import monarch
from lowrank_onnx.passes.structured import StructuredPass, Target


@dataclass(frozen=True)
class Monarch(StructuredPass):
    """W ≈ diag(A) P diag(B) P', every pair of groups of one rank.

    Options:
        ridge: Pull towards the original weight, in units of the mean input variance.
        groups: Groups of inputs and of outputs; 0 tries 4, 8 and 16.
    """

    name = "monarch"
    reference = "Dao et al. 2022, arXiv:2204.00595"
    groups: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups == 1:
            raise ValueError("groups must be 0 or at least 2")

    def forms(self, site: Site) -> Sequence[Any]:
        """See StructuredPass.forms."""
        shape = site.weight.shape
        wanted = (self.groups,) if self.groups else (4, 8, 16)
        return [
            (groups,)
            for groups in wanted
            if min(shape) >= 2 * groups and self.cost(shape, (groups,), 1) < shape[0] * shape[1]
        ]

    def prepare(self, target: Target, form: Any) -> None:
        """See StructuredPass.prepare."""

    def fit(self, target: Target, form: Any, state: Any, rank: int) -> BlockSum:
        """See StructuredPass.fit."""
        return monarch(target.matrix, target.gram, form[0], rank)

    def full(self, shape: tuple[int, ...], form: Any) -> int:
        """See StructuredPass.full."""
        return int(min(-(-side // form[0]) for side in shape))

    def cost(self, shape: tuple[int, ...], form: Any, rank: int) -> int:
        """See StructuredPass.cost."""
        return int(rank * form[0] * sum(shape))
