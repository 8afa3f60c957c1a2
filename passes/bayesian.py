"""Truncated SVD at its posterior mean: every component shrunk by how far it stands out of what is left out.

    W ≈ Σ_h γ̂_h u_h v_hᵀ,   γ̂_h < γ_h by the closed form of empirical variational Bayes

The noise is the level of the global optimum; ``variant=ard`` takes the hierarchical model instead, where every
component has a precision with a Gamma prior, and what variational updates of all of it end at.

Not in use unless asked for: shrinking takes from the fit to the weight itself. ``--rank evbmf`` takes the rank the
evidence supports.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.base import Candidate, Factors, Site
from lowrank_onnx.decompositions.ard import relevance
from lowrank_onnx.decompositions.evbmf import ROUNDING, noise_variance, shrink, threshold
from lowrank_onnx.decompositions.svd import LowRankBasis
from lowrank_onnx.linalg import Array, Tail
from lowrank_onnx.passes.svd import SVD, Spectrum

VARIANTS = ("evbmf", "ard")
_MARGIN = 1e-3


@dataclass(frozen=True)
class Bayesian(SVD):
    """A linear layer as the posterior mean of a factorization with noise.

    Options:
        multiple: Ranks are divisible by this; 0 chooses 16, less for layers narrower than 256.
        ridge: Pull towards the original weight, in units of the mean input variance.
        gain: Share of the error that a new bias has to take off.
        variant: evbmf, the closed form; or ard, automatic relevance determination with Gamma hyperpriors.
    """

    name = "bayesian"
    reference = (
        "Nakajima, Sugiyama, Babacan & Tomioka 2013, JMLR 14 (global analytic solution); "
        "ard: Babacan, Luessi, Molina & Katsaggelos 2012, doi:10.1109/TSP.2012.2197748"
    )
    default = False
    variant: str = "evbmf"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got '{self.variant}'")

    def candidate(self, site: Site, analysis: Spectrum, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        return super().candidate(site, _at(analysis, site, ranks[0], self.variant), ranks)

    def factorize(self, site: Site, analysis: Spectrum, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return super().factorize(site, _at(analysis, site, candidate.ranks[0], self.variant), candidate)

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets. A refit is the least-squares optimum, which would undo the shrinking."""
        return ()


def _at(analysis: Spectrum, site: Site, rank: int, variant: str) -> Spectrum:
    """The analysis with the posterior means at one rank in place of the components."""
    shape = (int(site.weight.shape[-2]), int(site.weight.shape[-1]))
    slices = tuple(_shrunk(basis, shape, rank, variant) for basis in analysis.slices)
    return dataclasses.replace(analysis, slices=slices)


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
