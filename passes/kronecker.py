"""Sum of Kronecker products: two products with small matrices, and a new view of the row between.

    y = vec(Σ_k A_kᵀ X B_k),   X (K1, K2) the row x as a matrix

Not in use unless asked for: few weights are like that, those of convolution-like and positional maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.base import Factors, Replacement, Site, Use
from lowrank_onnx.block_chains import kronecker_chain
from lowrank_onnx.decompositions.kronecker import (
    KroneckerSum,
    Rearranged,
    factor_pairs,
    kronecker_from_arrays,
    rearrange,
)
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.structured import Structure, StructuredPass, Target

_TRIED = 4  # shapes, the ones nearest to square factors
_WIDEST = 2048  # unknowns of the last factors, fitted together


@dataclass(frozen=True)
class Kronecker(StructuredPass):
    """W ≈ Σ A_k ⊗ B_k; the A_k are fitted to the data.

    Options:
        ridge: Pull towards the original weight, in units of the mean input variance.
    """

    name = "kronecker"
    reference = "Van Loan & Pitsianis 1993, doi:10.1007/978-94-015-8196-7_17"

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        refusal = super().refuse(site)
        if refusal is None and site.attributes["side"] == "left":
            return "kronecker takes weights on the right of the data"
        if refusal is None and any(use.input_shape is None for use in site.uses):
            return "the number of axes of the input is not known"
        return refusal

    def forms(self, site: Site) -> Sequence[Any]:
        """See StructuredPass.forms."""
        shape = site.weight.shape
        every = [(k1, n1) for k1, n1 in factor_pairs(*shape) if self.cost(shape, (k1, n1), 1) < shape[0] * shape[1]]
        # Near-square factors are the ones with the most terms for the work.
        return sorted(every, key=lambda form: self.cost(shape, form, 1))[:_TRIED]

    def prepare(self, target: Target, form: Any) -> Rearranged:
        """See StructuredPass.prepare."""
        return rearrange(target.matrix, *form)

    def fit(self, target: Target, form: Any, state: Any, rank: int) -> KroneckerSum:
        """See StructuredPass.fit."""
        made: KroneckerSum = state.terms(rank)
        if target.plain is None or rank * form[0] > _WIDEST:
            return KroneckerSum(made.left, made.right)
        return made.refitted(target.matrix, target.gram)

    def full(self, shape: tuple[int, ...], form: Any) -> int:
        """See StructuredPass.full."""
        inner = form[0] * form[1]
        return int(min(inner, shape[0] * shape[1] // inner))

    def cost(self, shape: tuple[int, ...], form: Any, rank: int) -> int:
        """See StructuredPass.cost."""
        k1, n1 = form
        n2 = shape[1] // n1
        return int(rank * (shape[0] * n2 + n1 * k1 * n2))

    def structure(self, factors: Factors) -> Structure:
        """See StructuredPass.structure."""
        return kronecker_from_arrays(factors)

    def replacement(self, site: Site, use: Use, made: Structure, bias: Array | None) -> Replacement:
        """See StructuredPass.replacement."""
        assert isinstance(made, KroneckerSum)
        return kronecker_chain(site, use, made, bias)
