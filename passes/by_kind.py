"""One technique for several kinds of layers, where each kind has a pass of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.convolution import Layer


@dataclass(frozen=True)
class ByKind(Pass):
    """Every promise is kept by the pass that ``of`` names for the site."""

    @abstractmethod
    def of(self, site: Site) -> Pass:
        """The pass for the kind of this site, with the options given here."""

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        return self.of(site).refuse(site)

    def analyse(self, site: Site, moments: Mapping[str, Any] | None) -> Any:
        """See Pass.analyse."""
        return self.of(site).analyse(site, moments)

    def ranks(self, site: Site, analysis: Any) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        return self.of(site).ranks(site, analysis)

    def candidate(self, site: Site, analysis: Any, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        return self.of(site).candidate(site, analysis, ranks)

    def factorize(self, site: Site, analysis: Any, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return self.of(site).factorize(site, analysis, candidate)

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return self.of(site).emit(site, candidate, factors)

    def spell_rank(self, site: Site, analysis: Any, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return self.of(site).spell_rank(site, analysis, wish)

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        return self.of(site).check_ranks(site, ranks)

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return self.of(site).targets(site)

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return self.of(site).refit(site, candidate, factors, moments, ridge)

    def felt(self, analysis: Any) -> Array | None:
        """See Pass.felt."""
        return analysis.felt if isinstance(analysis, Layer) else None

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return self.of(site).effective(site, candidate, factors)

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        return self.of(site).dense_equivalent(site, candidate, factors)
