"""Blocks with shared bases (BLAST): every row of blocks has one basis, every column one, each block its own scales.

    x_i C_i = z_i   ->   Σ_i z_i ∘ d_ij   ->   times B_j, side by side

Not in use unless asked for: on top of plain low rank it takes one small node for every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.base import Factors, Replacement, Site, Use
from lowrank_onnx.block_chains import blast_chain
from lowrank_onnx.decompositions.blast import Blast, blast, blast_from_arrays
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.structured import Structure, StructuredPass, Target


@dataclass(frozen=True)
class BlastPass(StructuredPass):
    """Block (i, j) of W ≈ C_i diag(d_ij) B_j.

    Options:
        ridge: Pull towards the original weight, in units of the mean input variance.
        blocks: Blocks of rows and of columns; 0 tries 2, 4 and 8.
    """

    name = "blast"
    reference = "Lee et al. 2024, arXiv:2410.21262; fitted by alternating least squares"
    blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks == 1:
            raise ValueError("blocks must be 0 or at least 2")

    def forms(self, site: Site) -> Sequence[Any]:
        """See StructuredPass.forms."""
        shape = site.weight.shape
        wanted = (self.blocks,) if self.blocks else (2, 4, 8)
        return [
            (blocks,)
            for blocks in wanted
            if min(shape) >= 2 * blocks and self.cost(shape, (blocks,), 1) < shape[0] * shape[1]
        ]

    def prepare(self, target: Target, form: Any) -> None:
        """See StructuredPass.prepare."""

    def fit(self, target: Target, form: Any, state: Any, rank: int) -> Blast:
        """See StructuredPass.fit."""
        return blast(target.matrix, target.gram, (form[0], form[0]), rank)

    def full(self, shape: tuple[int, ...], form: Any) -> int:
        """See StructuredPass.full."""
        return int(min(shape))

    def cost(self, shape: tuple[int, ...], form: Any, rank: int) -> int:
        """See StructuredPass.cost."""
        return int(rank * (sum(shape) + form[0] ** 2))

    def structure(self, factors: Factors) -> Structure:
        """See StructuredPass.structure."""
        return blast_from_arrays(factors)

    def replacement(self, site: Site, use: Use, made: Structure, bias: Array | None) -> Replacement:
        """See StructuredPass.replacement."""
        assert isinstance(made, Blast)
        return blast_chain(site, use, made, bias)
