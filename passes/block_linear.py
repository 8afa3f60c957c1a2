"""Block low rank of a matrix: a partition of the weight, every block with a rank of its own.

    rows 4      y = Σ_i (x_i A_i) B_i            inputs in 4 groups, one mix
    columns 4   y_j = (x A_j) B_j                outputs in 4 groups
    grid 4      y_j = Σ_i (x_i A_ij) B_ij        both
    diagonal 4  y_j = x_j D_j + (x A) B_j        dense blocks, low rank for the rest

Not in use unless asked for: plain low rank is the quicker one of equal work nearly everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_onnx.base import Site
from lowrank_onnx.decompositions.block import FORMS, Grid, block_diagonal, block_grid, block_low_rank
from lowrank_onnx.decompositions.block_sum import BlockSum, segments
from lowrank_onnx.decompositions.seriation import seriate
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.structured import StructuredPass, Target


@dataclass(frozen=True)
class BlockLinear(StructuredPass):
    """Blocks with ranks by what they carry on the data, rows and columns clustered first where that helps.

    Options:
        ridge: Pull towards the original weight, in units of the mean input variance.
        form: rows, columns, grid, diagonal, or auto: the one with the least error at half of the work.
        blocks: Groups along each side that is cut.
        order: yes, no, or auto: try both.
    """

    name = "block"
    reference = "Amestoy et al. 2015, doi:10.1137/120903476; groups of inputs: ALDS 2021, arXiv:2107.11442"
    form: str = "auto"
    blocks: int = 4
    order: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("auto", *FORMS):
            raise ValueError(f"form must be auto, {', '.join(FORMS)}; got '{self.form}'")
        if self.order not in ("auto", "yes", "no"):
            raise ValueError(f"order must be auto, yes or no, got '{self.order}'")
        if self.blocks < 2:
            raise ValueError("blocks must be at least 2")

    def forms(self, site: Site) -> Sequence[Any]:
        """See StructuredPass.forms."""
        shape = site.weight.shape
        if min(shape) < 2 * self.blocks:
            return []
        wanted = FORMS if self.form == "auto" else (self.form,)
        orders = {"auto": ("kept", "ordered"), "yes": ("ordered",), "no": ("kept",)}[self.order]
        every = [(form, self.blocks, order) for form in wanted for order in orders]
        return [form for form in every if self.cost(shape, form, 1) < shape[0] * shape[1]]

    def prepare(self, target: Target, form: Any) -> tuple[Grid | None, Array | None, Array | None]:
        """See StructuredPass.prepare."""
        name, blocks, order = form
        rows, columns = orders(target, blocks) if order == "ordered" else (None, None)
        if name == "diagonal":
            return None, rows, columns
        return block_grid(target.matrix, target.gram, name, blocks, rows, columns), rows, columns

    def fit(self, target: Target, form: Any, state: Any, rank: int) -> BlockSum:
        """See StructuredPass.fit."""
        grid, rows, columns = state
        if grid is None:
            return block_diagonal(target.matrix, target.gram, form[1], rank, rows, columns)
        return block_low_rank(grid, target.matrix, target.gram, rank)

    def full(self, shape: tuple[int, ...], form: Any) -> int:
        """See StructuredPass.full."""
        across, along = _cut(shape, form)
        if form[0] == "diagonal":
            return min(shape)
        return min(max(across), max(along))

    def cost(self, shape: tuple[int, ...], form: Any, rank: int) -> int:
        """See StructuredPass.cost."""
        across, along = _cut(shape, form)
        if form[0] == "diagonal":
            return sum(k * n for k, n in zip(across, along, strict=True)) + rank * sum(shape)
        return rank * len(across) * len(along) * (max(across) + max(along))


def orders(target: Target, blocks: int) -> tuple[Array, Array]:
    """Orders of inputs and outputs by what each input brings to each output on the data."""
    brought = target.matrix * np.sqrt(np.diag(target.gram))[:, None]
    return seriate(brought, max(int(np.log2(blocks)) - 1, 0))


def _cut(shape: tuple[int, ...], form: Any) -> tuple[list[int], list[int]]:
    """Widths of the groups of inputs and of outputs."""
    name, blocks, _ = form
    across = segments(shape[0], 1 if name == "columns" else blocks)
    along = segments(shape[1], 1 if name == "rows" else blocks)
    return [part.stop - part.start for part in across], [part.stop - part.start for part in along]
