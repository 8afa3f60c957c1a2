"""Truncated SVD at its posterior mean: every component shrunk by how far it stands out of what is left out.

    W ≈ Σ_h γ̂_h u_h v_hᵀ,   γ̂_h < γ_h by the closed form of empirical variational Bayes

Not in use unless asked for: shrinking takes from the fit to the weight itself. ``--rank evbmf`` takes the rank the
evidence supports.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.base import Candidate, Factors, Site
from lowrank_onnx.decompositions.evbmf import noise_variance, shrink, threshold
from lowrank_onnx.decompositions.svd import LowRankBasis
from lowrank_onnx.linalg import Array, Tail
from lowrank_onnx.passes.svd import SVD, Spectrum


@dataclass(frozen=True)
class Bayesian(SVD):
    """A linear layer as the posterior mean of a factorization with noise.

    Options:
        multiple: Ranks are divisible by this; 0 chooses 16, less for layers narrower than 256.
        ridge: Pull towards the original weight, in units of the mean input variance.
        gain: Share of the error that a new bias has to take off.
    """

    name = "bayesian"
    reference = "Nakajima, Sugiyama, Babacan & Tomioka 2013, JMLR 14 (global analytic solution)"
    default = False

    def candidate(self, site: Site, analysis: Spectrum, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        return super().candidate(site, _at(analysis, site, ranks[0]), ranks)

    def factorize(self, site: Site, analysis: Spectrum, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return super().factorize(site, _at(analysis, site, candidate.ranks[0]), candidate)

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets. A refit is the least-squares optimum, which would undo the shrinking."""
        return ()


def _at(analysis: Spectrum, site: Site, rank: int) -> Spectrum:
    """The analysis with the posterior means at one rank in place of the components."""
    shape = (int(site.weight.shape[-2]), int(site.weight.shape[-1]))
    return dataclasses.replace(analysis, slices=tuple(_shrunk(basis, shape, rank) for basis in analysis.slices))


def _shrunk(basis: LowRankBasis, shape: tuple[int, int], rank: int) -> LowRankBasis:
    share = shares(basis.sigma, shape, rank)
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


def shares(sigma: Array, shape: tuple[int, int], rank: int) -> Array:
    """Return ``γ̂_h / γ_h`` (r,) of the first components, each in [0, 1].

    The noise is what the evidence finds; beyond the rank the evidence supports it is as much as leaves the last
    component standing, and never more than what the rank leaves out: full rank leaves nothing, and shrinks nothing.

    Args:
        sigma: (q,) singular values, falling, q = min(shape).
        shape: (K, N).
        rank: At least 1.
    """
    short, long = min(shape), max(shape)
    kept = sigma[:rank]
    left_out = float(sigma[rank:] @ sigma[rank:]) / (short * long)
    standing = float(kept[-1]) ** 2 / (long * threshold(short / long)) if len(kept) == rank else 0.0
    noise = min(noise_variance(sigma, shape), left_out, standing)
    share = np.ones(rank)
    if noise > 0:
        share[: len(kept)] = shrink(kept, shape, noise) / kept
    return share
