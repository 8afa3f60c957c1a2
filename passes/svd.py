"""Truncated SVD of a linear layer: two thin products for one wide.

    y = x W + b   becomes   y = (x A) B + b',   A (K, r), B (r, N)

With data, A B is the best rank-r map on them: W projected on the leading r eigenvectors of the output
covariance, and the mean of what is lost goes into the bias. Without data it is the Eckart-Young optimum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.base import Candidate, Factors, Moments, Pass, RankWish, Replacement, Site, Use
from lowrank_onnx.chains import balanced, linear_chain, store
from lowrank_onnx.decompositions.svd import LowRankBasis, data_aware, plain, propagated
from lowrank_onnx.linalg import Array, energy_rank


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The analysis of one site.

    Attributes:
        slices: One basis per matrix of the weight; one for a plain 2-D weight.
        centred: Whether the means are split off and go into the bias.
        means: Per use (node name): mean of what is delivered (K̂,), mean of the original input (K,).
    """

    slices: tuple[LowRankBasis, ...]
    centred: bool
    means: Mapping[str, tuple[Array, Array]]

    @property
    def sigma(self) -> Array:
        """(q,) singular values, pooled over the slices."""
        return np.sqrt(np.sum([basis.sigma**2 for basis in self.slices], axis=0))


@dataclass(frozen=True)
class SVD(Pass):
    """x W ≈ (x A) B, the best rank-r map on the calibration data, or of the weight alone.

    Options:
        multiple: Offer only ranks divisible by this; 0 chooses 8 for wide layers, less for narrow ones.
        ridge: Shrinkage towards weight-only SVD, in units of the mean input variance.
        gain: A bias is added where there was none only if it takes this share off the squared error.
    """

    name = "svd"
    kinds = ("linear",)
    reference = "Eckart & Young 1936, doi:10.1007/BF02288367; data-aware: DRONE, NeurIPS 2021"
    multiple: int = 0
    ridge: float = 0.01
    gain: float = 0.02

    def __post_init__(self) -> None:
        if self.multiple < 0 or self.ridge < 0 or not 0 <= self.gain <= 1:
            raise ValueError("multiple and ridge must not be negative, gain must be in [0, 1]")

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if min(site.weight.shape[-2:]) < 2:
            return f"one side of the weight is {min(site.weight.shape[-2:])}: no rank below full"
        if not site.weight.any():
            return "weight is all zeros"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Spectrum:
        """See Pass.analyse."""
        matrices = site.weight.reshape(-1, *site.weight.shape[-2:]).astype(np.float64)
        if moments is None:
            return Spectrum(tuple(plain(matrix) for matrix in matrices), False, {})
        assert len(matrices) == 1, "batched constants have no moments"
        raw = self._basis(matrices[0], pooled(site, moments, centred=False), None)
        if not all(_bias_possible(use) for use in site.uses):
            return Spectrum((raw,), False, {})
        assert raw.output is not None
        centred = self._basis(matrices[0], pooled(site, moments, centred=True), raw.output.total)
        if not all(_bias_is_free(site, use) for use in site.uses) and not self._pays(site, centred, raw):
            return Spectrum((raw,), False, {})
        means = {use.node: _means(moments[use.input]) for use in site.uses}
        return Spectrum((centred,), True, means)

    def _basis(self, matrix: Array, moments: Moments, energy: float | None) -> LowRankBasis:
        if moments.cross is None:
            return data_aware(matrix, moments.gram, self.ridge, energy)
        assert moments.source_gram is not None
        return propagated(matrix, moments.gram, moments.cross, moments.source_gram, self.ridge, energy)

    def _pays(self, site: Site, centred: LowRankBasis, raw: LowRankBasis) -> bool:
        """Whether centring takes enough off at half of break-even to be worth a new Add."""
        assert centred.output is not None and raw.output is not None
        rank = max(break_even(site) // 2, 1)
        return bool(centred.output.left[rank] < (1 - self.gain) * raw.output.left[rank])

    def ranks(self, site: Site, analysis: Spectrum) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        step = self.multiple or grid_step(min(site.weight.shape[-2:]))
        return [(rank,) for rank in range(step, break_even(site) + 1, step)]

    def candidate(self, site: Site, analysis: Spectrum, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (rank,) = ranks
        rows, columns = site.weight.shape[-2:]
        added = sum(columns for use in site.uses if analysis.centred and use.bias is None)
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=len(analysis.slices) * rank * (rows + columns) + added,
            macs=None if site.macs is None else site.macs // (rows * columns) * rank * (rows + columns),
            nodes=sum(1 + (analysis.centred and not use.also and site.op == "MatMul") for use in site.uses),
            weight_error=_weight_error(site, analysis, rank),
            output_error=_output_error(analysis, rank),
        )

    def factorize(self, site: Site, analysis: Spectrum, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        (rank,) = candidate.ranks
        pairs = [basis.factors(rank) for basis in analysis.slices]
        if site.weight.dtype == np.float16:
            pairs = [balanced(first, second) for first, second in pairs]
        shape = site.weight.shape[:-2]
        first = np.stack([pair[0] for pair in pairs]).reshape(*shape, -1, rank)
        second = np.stack([pair[1] for pair in pairs]).reshape(*shape, rank, -1)
        factors = {"first": store(first, site), "second": store(second, site)}
        for use in site.uses if analysis.centred else ():
            delivered, original = analysis.means[use.node]
            bias = 0.0 if use.bias is None else use.bias.astype(np.float64)
            shift = original @ site.weight.astype(np.float64) - (delivered @ first) @ second
            factors[f"bias:{use.node}"] = store(bias + shift, site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        matrices = [(f"{site.name}/{role}", factors[role]) for role in ("first", "second")]
        return [linear_chain(site, use, matrices, factors.get(f"bias:{use.node}")) for use in site.uses]

    def spell_rank(self, site: Site, analysis: Spectrum, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.energy is not None:
            rank = energy_rank(analysis.sigma, wish.energy)
            if rank > break_even(site):
                return f"rank {rank} for energy {wish.energy:g} is past break-even {break_even(site)}"
            return (rank,)
        return (wish.ranks(min(site.weight.shape[-2:])),)

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = min(site.weight.shape[-2:])
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Array]:
        """See Pass.dense_equivalent."""
        dense = {"weight": factors["first"].astype(np.float64) @ factors["second"].astype(np.float64)}
        return {**dense, **{name: value for name, value in factors.items() if name.startswith("bias:")}}


def break_even(site: Site) -> int:
    """The largest rank whose factors are smaller than the weight: r (K + N) < K N."""
    rows, columns = site.weight.shape[-2:]
    return (rows * columns - 1) // (rows + columns)


def grid_step(width: int) -> int:
    """Step of the rank grid for the narrower side: the vector width of the kernels, finer for small layers."""
    return 8 if width >= 64 else 4 if width >= 32 else 2 if width >= 16 else 1


def pooled(site: Site, moments: Mapping[str, Moments], centred: bool) -> Moments:
    """Moments over all uses of a shared weight, weighted by their rows; each use centred on its own mean."""
    parts = [moments[use.input] for use in site.uses]
    rows = sum(part.rows for part in parts)
    share = [part.rows / rows for part in parts]
    propagates = any(part.cross is not None for part in parts)

    def total(values: Sequence[Array]) -> Array:
        return np.asarray(sum(weight * value for weight, value in zip(share, values, strict=True)))

    def outer(a: Array, b: Array) -> Array:
        return a[:, None] * b[None, :] if centred else np.zeros((1, 1))

    pairs = [_means(part) for part in parts]
    gram = total([p.gram - outer(d, d) for p, (d, _) in zip(parts, pairs, strict=True)])
    mean = total([delivered for delivered, _ in pairs])
    if not propagates:
        return Moments(rows, mean, gram)
    crosses = [p.gram if p.cross is None else p.cross for p in parts]
    sources = [p.gram if p.source_gram is None else p.source_gram for p in parts]
    cross = total([c - outer(d, o) for c, (d, o) in zip(crosses, pairs, strict=True)])
    source = total([s - outer(o, o) for s, (_, o) in zip(sources, pairs, strict=True)])
    return Moments(rows, mean, gram, cross, source, total([original for _, original in pairs]))


def _means(moments: Moments) -> tuple[Array, Array]:
    return moments.mean, moments.mean if moments.source_mean is None else moments.source_mean


def _bias_possible(use: Use) -> bool:
    return not use.dynamic_bias


def _bias_is_free(site: Site, use: Use) -> bool:
    return site.op == "Gemm" or use.bias is not None


def _weight_error(site: Site, analysis: Spectrum, rank: int) -> float:
    tails = [basis.weights for basis in analysis.slices]
    if any(tail is None for tail in tails):
        first, second = analysis.slices[0].factors(rank)
        weight = site.weight.astype(np.float64)
        return float(np.linalg.norm(weight - first @ second) / np.linalg.norm(weight))
    left = sum(max(tail.left[min(rank, len(tail.left) - 1)], 0.0) for tail in tails if tail is not None)
    total = sum(tail.total for tail in tails if tail is not None)
    return float(np.sqrt(left / total)) if total > 0 else 0.0


def _output_error(analysis: Spectrum, rank: int) -> float | None:
    tail = analysis.slices[0].output
    return None if tail is None else tail.relative(rank)
