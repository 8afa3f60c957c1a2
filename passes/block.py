"""Block low rank, of matrices and of convolutions: see the two files named after them.

Not in use unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.block_convolution import SIDES, BlockConvolution
from lowrank_onnx.passes.block_linear import BlockLinear
from lowrank_onnx.passes.convolution import Layer


@dataclass(frozen=True)
class Block(Pass):
    """Blocks with directions of their own: of a matrix, or of the channels of a convolution, clustered if that helps.

    Options:
        ridge: Pull towards the original weight, in units of the mean input variance.
        form: rows, columns, of matrices also grid and diagonal, or auto: the one that errs least at half of the work.
        blocks: Of matrices: groups along each side that is cut.
        order: yes, no, or auto: try both.
        multiple: Of convolutions: channels of a group between are divisible by this; 0 chooses.
        groups: Of convolutions: 2, 4 or 8; 0 chooses.
    """

    name = "block"
    kinds = ("linear", "convolution")
    reference = "Amestoy et al. 2015, doi:10.1137/120903476; groups of inputs: ALDS 2021, arXiv:2107.11442"
    default = False
    ridge: float = 0.01
    form: str = "auto"
    blocks: int = 4
    order: str = "auto"
    multiple: int = 0
    groups: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        # Each checks its own options.
        self._linear()
        if self.form in SIDES:
            self._convolution()

    def _linear(self) -> BlockLinear:
        return BlockLinear(self.ridge, self.form, self.blocks, self.order)

    def _convolution(self) -> BlockConvolution:
        return BlockConvolution(self.multiple, self.ridge, form=self.form, groups=self.groups, order=self.order)

    def _of(self, site: Site) -> Pass:
        return self._convolution() if site.kind == "convolution" else self._linear()

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.kind == "convolution" and self.form not in SIDES:
            return f"form '{self.form}' is for matrices only"
        return self._of(site).refuse(site)

    def analyse(self, site: Site, moments: Mapping[str, Any] | None) -> Any:
        """See Pass.analyse."""
        return self._of(site).analyse(site, moments)

    def ranks(self, site: Site, analysis: Any) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        return self._of(site).ranks(site, analysis)

    def candidate(self, site: Site, analysis: Any, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        return self._of(site).candidate(site, analysis, ranks)

    def factorize(self, site: Site, analysis: Any, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return self._of(site).factorize(site, analysis, candidate)

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return self._of(site).emit(site, candidate, factors)

    def spell_rank(self, site: Site, analysis: Any, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return self._of(site).spell_rank(site, analysis, wish)

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        return self._of(site).check_ranks(site, ranks)

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return self._of(site).targets(site)

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return self._of(site).refit(site, candidate, factors, moments, ridge)

    def felt(self, analysis: Any) -> Array | None:
        """See Pass.felt."""
        return analysis.felt if isinstance(analysis, Layer) else None

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return self._of(site).effective(site, candidate, factors)

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        return self._of(site).dense_equivalent(site, candidate, factors)
