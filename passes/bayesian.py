"""Truncated SVD at its posterior mean: every component shrunk by how far it stands out of what is left out.

    W ≈ Σ_h γ̂_h u_h v_hᵀ,   γ̂_h < γ_h by the closed form of empirical variational Bayes

The noise is the level of the global optimum; ``variant=ard`` takes the hierarchical model instead, where every
component has a precision with a Gamma prior, and what variational updates of all of it end at. ``variant=gibbs``
assumes nothing independent and samples the posterior: the factors are the best of their rank for its mean.

Not in use unless asked for: shrinking takes from the fit to the weight itself. ``--rank evbmf`` takes the rank the
evidence supports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_onnx.base import Candidate, Factors, Moments, RankWish, Site
from lowrank_onnx.decompositions.ard import relevance
from lowrank_onnx.decompositions.evbmf import ROUNDING, noise_variance, shrink, threshold
from lowrank_onnx.decompositions.sampling import Drawn, operations, posterior_map
from lowrank_onnx.decompositions.svd import LowRankBasis
from lowrank_onnx.linalg import Array, Tail
from lowrank_onnx.passes.svd import SVD, Spectrum, pooled

VARIANTS = ("evbmf", "ard", "gibbs")
MOST_SAMPLES = 20_000
LARGEST = 2**22  # elements of a weight that is sampled; memory is six times as much in float64
MOST_WORK = 5e11  # multiply-accumulates to sample a layer at one rank: a few minutes of a core
_OFFERED = 4  # ranks of a layer that is sampled
_MARGIN = 1e-3


@dataclass(frozen=True, eq=False)
class Sampling(Spectrum):
    """An analysis that is sampled from, at each rank once.

    Attributes:
        gram: (K, K) the metric, centred as the analysis is; None without data.
        drawn: One result per slice, by rank.
    """

    gram: Array | None = None
    drawn: dict[int, tuple[Drawn | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bayesian(SVD):
    """A linear layer as the posterior mean of a factorization with noise.

    Options:
        multiple: Ranks are divisible by this; 0 chooses 16, less for layers narrower than 256.
        ridge: Pull towards the original weight, in units of the mean input variance.
        gain: Share of the error that a new bias has to take off.
        variant: evbmf, the closed form; ard, automatic relevance determination with Gamma hyperpriors; or gibbs,
            sampled with Normal-Wishart hyperpriors, at four ranks of layers up to four million elements.
        samples: Of gibbs, for each layer and rank.
    """

    name = "bayesian"
    reference = (
        "Nakajima, Sugiyama, Babacan & Tomioka 2013, JMLR 14 (global analytic solution); "
        "ard: Babacan, Luessi, Molina & Katsaggelos 2012, doi:10.1109/TSP.2012.2197748; "
        "gibbs: Salakhutdinov & Mnih 2008, doi:10.1145/1390156.1390267"
    )
    default = False
    variant: str = "evbmf"
    samples: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got '{self.variant}'")
        if not 8 <= self.samples <= MOST_SAMPLES:
            raise ValueError(f"samples must be from 8 to {MOST_SAMPLES}, got {self.samples}")

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if self.variant == "gibbs" and site.weight.size > LARGEST:
            return (
                f"too large to sample: {site.weight.size} elements, more than {LARGEST}; variant=evbmf needs no samples"
            )
        return super().refuse(site) or self._too_long(site, 1)

    def _too_long(self, site: Site, rank: int) -> str | None:
        """Why a rank is not sampled; None if it is."""
        work = operations((site.weight.size // site.weight.shape[-1], site.weight.shape[-1]), rank, self.samples)
        if self.variant != "gibbs" or work <= MOST_WORK:
            return None
        return (
            f"{self.samples} samples at rank {rank} take {work:.1e} multiply-accumulates, more than {MOST_WORK:.1e}; "
            "ask for fewer samples, or take variant=evbmf"
        )

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Spectrum:
        """See Pass.analyse."""
        found = super().analyse(site, moments)
        if self.variant != "gibbs":
            return found
        gram = None if moments is None else pooled(site, moments, centred=found.centred).gram
        return Sampling(found.slices, found.centred, found.means, gram)

    def ranks(self, site: Site, analysis: Spectrum) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        every = super().ranks(site, analysis)
        if self.variant != "gibbs":
            return every
        every = [ranks for ranks in every if self._too_long(site, ranks[0]) is None]
        count = min(len(every), _OFFERED)
        return [every[-(-(place + 1) * len(every) // count) - 1] for place in range(count)]

    def candidate(self, site: Site, analysis: Spectrum, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        made = super().candidate(site, self._at(analysis, site, ranks[0]), ranks)
        return dataclasses.replace(made, diagnostics=_diagnostics(analysis, ranks[0]))

    def factorize(self, site: Site, analysis: Spectrum, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return super().factorize(site, self._at(analysis, site, candidate.ranks[0]), candidate)

    def spell_rank(self, site: Site, analysis: Spectrum, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        spelled = super().spell_rank(site, analysis, wish)
        return spelled if isinstance(spelled, str) else self._too_long(site, spelled[0]) or spelled

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        return super().check_ranks(site, ranks) or self._too_long(site, ranks[0])

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets. A refit is the least-squares optimum, which would undo the shrinking."""
        return ()

    def _at(self, analysis: Spectrum, site: Site, rank: int) -> Spectrum:
        """The analysis with the posterior means at one rank in place of the components."""
        if isinstance(analysis, Sampling):
            return self._sampled(analysis, rank)
        shape = (int(site.weight.shape[-2]), int(site.weight.shape[-1]))
        slices = tuple(_shrunk(basis, shape, rank, self.variant) for basis in analysis.slices)
        return dataclasses.replace(analysis, slices=slices)

    def _sampled(self, analysis: Sampling, rank: int) -> Spectrum:
        if rank not in analysis.drawn:
            analysis.drawn[rank] = tuple(
                None if _exact(basis.sigma, rank) else posterior_map(
                    basis.weight, analysis.gram, self.ridge, rank, self.samples
                )
                for basis in analysis.slices
            )  # fmt: skip
        slices = tuple(
            basis if drawn is None else _at_drawn(basis, analysis.gram, drawn)
            for basis, drawn in zip(analysis.slices, analysis.drawn[rank], strict=True)
        )
        return Spectrum(slices, analysis.centred, analysis.means)


def _exact(sigma: Array, rank: int) -> bool:
    """Whether a rank leaves out nothing but rounding, so that there is no noise to sample."""
    return float(sigma[rank:] @ sigma[rank:]) <= ROUNDING * float(sigma @ sigma)


def _at_drawn(basis: LowRankBasis, gram: Array | None, drawn: Drawn) -> LowRankBasis:
    """The basis at one rank, with the errors measured: the mean is no projection of the weight."""
    lost = basis.weight - drawn.first @ drawn.second

    def tail(old: Tail | None, squared: float) -> Tail | None:
        return None if old is None else Tail(np.full(len(old.left), squared), old.total)

    output = 0.0 if gram is None else float(np.vdot(lost, gram @ lost))
    return LowRankBasis(
        drawn.first @ drawn.second, drawn.second.T, basis.sigma,
        tail(basis.output, output), tail(basis.weights, float(np.vdot(lost, lost))),
    )  # fmt: skip


def _diagnostics(analysis: Spectrum, rank: int) -> Mapping[str, Any]:
    """What the chains of all slices tell of themselves; nothing where none ran."""
    found = [entry for entry in analysis.drawn.get(rank, ()) if entry] if isinstance(analysis, Sampling) else []
    if not found:
        return {}
    return {
        "samples": found[0].samples,
        "r_hat": max(entry.r_hat for entry in found),
        "effective_samples": min(entry.effective for entry in found),
    }


def _shrunk(basis: LowRankBasis, shape: tuple[int, int], rank: int, variant: str) -> LowRankBasis:
    share = shares(basis.sigma, shape, rank, variant)
    kept = basis.right[:, :rank]
    return LowRankBasis(
        (basis.weight @ kept * share) @ kept.T, kept, basis.sigma, *(_tail(tail, share) for tail in _tails(basis))
    )


def _tails(basis: LowRankBasis) -> tuple[Tail | None, Tail | None]:
    return basis.output, basis.weights


def _tail(tail: Tail | None, share: Array) -> Tail | None:
    """Squared errors with what shrinking takes: ``(1 - s_h)²`` of each component that is kept."""
    if tail is None:
        return None
    rank = min(len(share), len(tail.left) - 1)
    taken = (1 - share[:rank]) ** 2 @ -np.diff(tail.left[: rank + 1])
    return Tail(np.full(len(tail.left), tail.left[rank] + taken), tail.total)


def shares(sigma: Array, shape: tuple[int, int], rank: int, variant: str = "evbmf") -> Array:
    """Return ``γ̂_h / γ_h`` (r,) of the first components, each in [0, 1].

    The noise is what the model finds; beyond the rank the evidence supports it is as much as leaves the last
    component standing, and never more than what the rank leaves out: full rank leaves nothing, and shrinks nothing.

    Args:
        sigma: (q,) singular values, falling, q = min(shape).
        shape: (K, N).
        rank: At least 1.
        variant: Of ``VARIANTS``.
    """
    short, long = min(shape), max(shape)
    kept = sigma[:rank]
    left_out = float(sigma[rank:] @ sigma[rank:]) / (short * long)
    standing = float(kept[-1]) ** 2 / (long * threshold(short / long)) if len(kept) == rank else 0.0
    hierarchical = variant == "ard"
    found = relevance(sigma, shape).noise if hierarchical else noise_variance(sigma, shape)
    noise = min(found, left_out, standing)
    share = np.ones(rank)
    if noise <= ROUNDING * float(sigma @ sigma) / (short * long):
        return share  # a weight of exactly this rank leaves nothing but rounding
    if not hierarchical:
        share[: len(kept)] = shrink(kept, shape, noise) / kept
        return share
    # At the very level where a component stands it is worth nothing, and the updates may drop it.
    shrunk = relevance(sigma, shape, noise * (1 - _MARGIN)).shrunk[:rank]
    assert len(shrunk) == len(kept), "a component below the level of the noise was asked for"
    share[: len(kept)] = shrunk / kept
    return share
