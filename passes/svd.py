"""Truncated SVD of a linear layer: two thin products for one wide.

    y = x W + b   becomes   y = (x A) B + b',   A (K, r), B (r, N)

With data, A B is the best rank-r map on them: W projected on the leading r eigenvectors of the output
covariance, and the mean of what is lost goes into the bias. Without data it is the Eckart-Young optimum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site, Use
from lowrank_onnx.chains import balanced, linear_chain, store
from lowrank_onnx.decompositions.svd import LowRankBasis, data_aware, plain, regressed
from lowrank_onnx.linalg import Array, covariance, covariances, energy_rank
from lowrank_onnx.selectors import Selector


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The analysis of one site.

    Attributes:
        slices: One basis per matrix of the weight; one for a plain 2-D weight.
        centred: Whether the means are split off and go into the bias.
        means: Per use (node name): mean of the input (K,), mean of the wanted output (N,).
    """

    slices: tuple[LowRankBasis, ...]
    centred: bool
    means: Mapping[str, tuple[Array, Array]]

    @property
    def sigma(self) -> Array:
        """(q,) singular values, pooled over the slices."""
        return np.asarray(np.sqrt(np.sum([basis.sigma**2 for basis in self.slices], axis=0)))


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
        super().__post_init__()
        if self.gain > 1:
            raise ValueError("gain must be in [0, 1]")

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
        whole = pooled(site, moments, centred=False)
        energy = whole.target_energy or float(np.einsum("kn,kn->", matrices[0], whole.gram @ matrices[0]))
        if not all(_bias_possible(use) for use in site.uses):
            return Spectrum((self._basis(matrices[0], whole, energy),), False, {})
        centred = self._basis(matrices[0], pooled(site, moments, centred=True), energy)
        if not all(_bias_is_free(site, use) for use in site.uses):
            raw = self._basis(matrices[0], whole, energy)
            if not self._pays(site, centred, raw):
                return Spectrum((raw,), False, {})
        means = {use.node: _means(site, moments[use.input]) for use in site.uses}
        return Spectrum((centred,), True, means)

    def _basis(self, matrix: Array, moments: Moments, energy: float) -> LowRankBasis:
        if moments.target_cross is None:
            return data_aware(matrix, moments.gram, self.ridge, energy)
        return regressed(matrix, moments.gram, moments.target_cross, moments.target_energy, self.ridge, energy)

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
            nodes=sum(
                1 + (analysis.centred and not use.also and site.attributes[use.node]["op"] == "MatMul")
                for use in site.uses
            ),
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
            delivered, wanted = analysis.means[use.node]
            bias = 0.0 if use.bias is None else use.bias.astype(np.float64)
            factors[f"bias:{use.node}"] = store(bias + wanted - (delivered @ first) @ second, site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        matrices = [(f"{site.name}/{role}", factors[role]) for role in ("first", "second")]
        return [linear_chain(site, use, matrices, factors.get(f"bias:{use.node}")) for use in site.uses]

    def spell_rank(self, site: Site, analysis: Spectrum, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.selector is not None:
            return self._evident(site, analysis, wish.selector)
        if wish.energy is not None:
            rank = energy_rank(analysis.sigma, wish.energy)
            if rank > break_even(site):
                return f"rank {rank} for energy {wish.energy:g} is past break-even {break_even(site)}"
            return (rank,)
        return (wish.ranks(min(site.weight.shape[-2:])),)

    def _evident(self, site: Site, analysis: Spectrum, selector: Selector) -> tuple[int, ...] | str:
        shape = (int(site.weight.shape[-2]), int(site.weight.shape[-1]))
        found = [selector.rank(basis.sigma, shape) for basis in analysis.slices]
        for entry in found:
            if isinstance(entry, str):
                return entry
        rank = max(entry for entry in found if isinstance(entry, int))
        if rank > break_even(site):
            return f"rank {rank} of {selector.rule} is past break-even {break_even(site)}"
        return (rank,)

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = min(site.weight.shape[-2:])
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return (site,) if len(site.uses) == 1 and site.weight.ndim == 2 else ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        again = dataclasses.replace(self, ridge=ridge)
        return again.factorize(site, again.analyse(site, {site.uses[0].input: moments}), candidate)

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return product_of(factors), factors.get(f"bias:{site.uses[0].node}")

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        biases = {use.node: factors[f"bias:{use.node}"] for use in site.uses if f"bias:{use.node}" in factors}
        return {site.name: Dense(product_of(factors), biases)}


def product_of(factors: Factors) -> Array:
    """The matrix two factors make, in float64."""
    return np.asarray(factors["first"].astype(np.float64) @ factors["second"].astype(np.float64))


def break_even(site: Site) -> int:
    """The largest rank whose factors are smaller than the weight: r (K + N) < K N."""
    rows, columns = site.weight.shape[-2:]
    return int((rows * columns - 1) // (rows + columns))


def grid_step(width: int) -> int:
    """Step of the rank grid for the narrower side: the vector width of the kernels, finer for small layers."""
    return 16 if width >= 256 else 8 if width >= 64 else 4 if width >= 32 else 2 if width >= 16 else 1


def pooled(site: Site, moments: Mapping[str, Moments], centred: bool) -> Moments:
    """Moments over all uses of a shared weight, weighted by their rows; each use centred on its own mean."""
    parts = [moments[use.input] for use in site.uses]
    rows = sum(part.rows for part in parts)
    share = [part.rows / rows for part in parts]

    def total(values: Sequence[Array]) -> Array:
        return np.asarray(sum(weight * value for weight, value in zip(share, values, strict=True)))

    mean = total([part.mean for part in parts])
    gram = total([covariance(part.gram, part.mean) if centred else part.gram for part in parts])
    if len(parts) > 1 or parts[0].target_cross is None:
        return Moments(rows, mean, gram)
    (part,) = parts
    assert part.target_cross is not None and part.target_mean is not None
    if not centred:
        return part
    gram, cross = covariances(part.gram, part.mean, part.target_cross, part.target_mean)
    energy = part.target_energy - float(part.target_mean @ part.target_mean)
    return Moments(rows, mean, gram, cross, part.target_mean, energy)


def _means(site: Site, moments: Moments) -> tuple[Array, Array]:
    if moments.target_mean is not None:
        return moments.mean, moments.target_mean
    return moments.mean, moments.mean @ site.weight.astype(np.float64)


def _bias_possible(use: Use) -> bool:
    return not use.dynamic_bias


def _bias_is_free(site: Site, use: Use) -> bool:
    return site.attributes[use.node]["op"] == "Gemm" or use.bias is not None


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
