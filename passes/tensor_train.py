"""Tensor trains, of convolutions and of tables of embeddings: see the two files named after them.

Not in use unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.convolution import Layer
from lowrank_onnx.passes.tensor_train_convolution import TensorTrainConvolution
from lowrank_onnx.passes.tensor_train_embedding import TensorTrainEmbedding


@dataclass(frozen=True)
class TensorTrain(Pass):
    """A chain of cores cut at every bond by a truncated SVD: of a kernel over its axes, of a table over digits.

    Options:
        multiple: Ranks are divisible by this; 0 chooses.
        ridge: Of convolutions: pull towards the original weight, in units of the mean variance of the patch.
        cores: Of tables: into how many digits rows and features are split.
        smoothing: Of tables: lookups added to the count of every row; 0 chooses on held-out calibration data.
    """

    name = "tensor_train"
    kinds = ("convolution", "embedding")
    reference = (
        "Oseledets 2011, doi:10.1137/090752286; Garipov et al. 2016, arXiv:1611.03214; TT-Rec 2021, arXiv:2101.11714"
    )
    default = False
    multiple: int = 0
    ridge: float = 0.001
    cores: int = 2
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cores < 2:
            raise ValueError("cores must be 2 or more")

    def _of(self, site: Site) -> Pass:
        if site.kind == "embedding":
            return TensorTrainEmbedding(self.multiple, self.cores, self.smoothing)
        return TensorTrainConvolution(self.multiple, self.ridge)

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
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
