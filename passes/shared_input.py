"""One first factor for several linear layers that read the same tensor.

    y_i = x W_i + b_i   becomes   y_i = (x A) B_i + b_i',   A (K, r), B_i (r, N_i)

The layers are decomposed side by side, each scaled to unit output variance so that none drowns the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import balanced, linear_chain, store
from lowrank_onnx.decompositions.svd import LowRankBasis, data_aware, plain, regressed
from lowrank_onnx.linalg import Array, covariance, covariances
from lowrank_onnx.passes.svd import grid_step


@dataclass(frozen=True, eq=False)
class Joint:
    """The analysis of one site: the basis of all layers, scaled; ``scale`` (N,) undoes that."""

    basis: LowRankBasis
    scale: Array
    means: tuple[Array, Array] | None

    @property
    def sigma(self) -> Array:
        """(q,) singular values of the scaled layers."""
        return self.basis.sigma


@dataclass(frozen=True)
class SharedInput(Pass):
    """x W_i ≈ (x A) B_i with one A for all layers that read x, such as query, key and value.

    Options:
        multiple: Offer only ranks divisible by this; 0 chooses 8 for wide layers, less for narrow ones.
        ridge: Shrinkage towards weight-only SVD, in units of the mean input variance.
    """

    name = "shared_input"
    kinds = ("shared_input",)
    reference = "LatentLLM 2025, arXiv:2505.18413; Palu, ICLR 2025 (joint projections)"
    multiple: int = 0
    ridge: float = 0.01

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if min(site.weight.shape) < 2:
            return f"one side of the weight is {min(site.weight.shape)}: no rank below full"
        if not site.weight.any():
            return "weight is all zeros"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Joint:
        """See Pass.analyse."""
        weight, parts = site.weight.astype(np.float64), site.attributes["parts"]
        if moments is None:
            scale = output_scales(parts, np.einsum("kn,kn->n", weight, weight))
            return Joint(plain(weight * scale), scale, None)
        entry = moments[site.uses[0].input]
        centred = not any(use.dynamic_bias for use in site.uses)
        delivered = entry.mean if centred else np.zeros_like(entry.mean)
        gram = covariance(entry.gram, delivered)
        scale = output_scales(parts, np.einsum("kn,kn->n", weight, gram @ weight))
        if entry.target_cross is None:
            basis = data_aware(weight * scale, gram, self.ridge)
            return Joint(basis, scale, (entry.mean, entry.mean @ weight) if centred else None)
        assert entry.target_mean is not None
        wanted = entry.target_mean if centred else np.zeros_like(entry.target_mean)
        gram, cross = covariances(entry.gram, delivered, entry.target_cross, wanted)
        # Scaling changes what the energy is of; the refit needs the factors, not the error.
        basis = regressed(weight * scale, gram, cross * scale, 0.0, self.ridge, 1.0)
        return Joint(basis, scale, (delivered, wanted) if centred else None)

    def ranks(self, site: Site, analysis: Joint) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        rows, columns = site.weight.shape
        step = self.multiple or grid_step(min(rows, columns))
        return [(rank,) for rank in range(step, (rows * columns - 1) // (rows + columns) + 1, step)]

    def candidate(self, site: Site, analysis: Joint, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (rank,) = ranks
        rows, columns = site.weight.shape
        new = sum(
            part.weight.shape[1]
            for part in site.attributes["parts"]
            if analysis.means is not None and part.uses[0].bias is None
        )
        tail = analysis.basis.output
        weights = analysis.basis.weights
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=rank * (rows + columns) + new,
            macs=None if site.macs is None else site.macs // (rows * columns) * rank * (rows + columns),
            nodes=1,
            weight_error=None if weights is None else weights.relative(rank),
            output_error=None if tail is None else tail.relative(rank),
        )

    def factorize(self, site: Site, analysis: Joint, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        first, second = analysis.basis.factors(candidate.ranks[0])
        second = second / analysis.scale
        if site.weight.dtype == np.float16:
            first, second = balanced(first, second)
        factors = {"first": store(first, site), "second": store(second, site)}
        if analysis.means is not None:
            delivered, wanted = analysis.means
            factors["bias"] = store(bias_of(site.attributes["parts"]) + wanted - (delivered @ first) @ second, site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        first = (f"{site.name}/first", factors["first"])
        return behind_one_factor(site.attributes["parts"], site.name, first, factors["second"], factors.get("bias"))

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return tuple(site.attributes["parts"])

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        again = dataclasses.replace(self, ridge=ridge)
        return again.factorize(site, again.analyse(site, {site.uses[0].input: moments}), candidate)

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        product = factors["first"].astype(np.float64) @ factors["second"].astype(np.float64)
        return product, factors.get("bias")

    def spell_rank(self, site: Site, analysis: Joint, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a fixed rank is carried out layer by layer"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = min(site.weight.shape)
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        product, bias = self.effective(site, candidate, factors)
        return {
            part.name: Dense(product[:, place], {} if bias is None else {part.uses[0].node: bias[place]})
            for part, place in zip(site.attributes["parts"], places_of(site.attributes["parts"]), strict=True)
        }


def behind_one_factor(
    parts: Sequence[Site], stem: str, first: tuple[str, Array], second: Array, bias: Array | None
) -> list[Replacement]:
    """Replace layers that read one tensor by one product with a common factor, and one product each.

    Args:
        parts: The layers.
        stem: What the names of the new nodes begin with.
        first: Name and value (K, r) of the common factor; whoever else names it stores it together with this.
        second: (r, N) of all layers side by side.
        bias: (N,) whole biases; None keeps what there is.
    """
    shared = gs.Variable(f"{stem}/shared")
    inputs = [gs.Variable(parts[0].uses[0].input), gs.Constant(*first)]
    node = gs.Node("MatMul", f"{stem}/factor0", {}, inputs, [shared])
    replacements: list[Replacement] = []
    for part, place in zip(parts, places_of(parts), strict=True):
        use = dataclasses.replace(part.uses[0], input=shared.name)
        chain = [(f"{part.name}/second", second[:, place])]
        made = linear_chain(part, use, chain, None if bias is None else bias[place])
        replacements.append(dataclasses.replace(made, nodes=(*((node,) if not replacements else ()), *made.nodes)))
    return replacements


def places_of(parts: Sequence[Site]) -> list[slice]:
    """Where the outputs of each part lie in the joint weight."""
    widths = [part.weight.shape[1] for part in parts]
    ends = np.cumsum(widths)
    return [slice(int(end) - width, int(end)) for end, width in zip(ends, widths, strict=True)]


def output_scales(parts: Sequence[Site], energy: Array) -> Array:
    """(N,) one over the root of the mean output variance of the part each output belongs to."""
    scale = np.ones(len(energy))
    for place in places_of(parts):
        mean = float(energy[place].mean())
        scale[place] = 1 / np.sqrt(mean) if mean > 0 else 1.0
    return scale


def bias_of(parts: Sequence[Site]) -> Array:
    """(N,) stored biases side by side, zero where there is none."""
    given = [(part.uses[0].bias, part.weight.shape[1]) for part in parts]
    return np.concatenate([np.zeros(width) if bias is None else bias.astype(np.float64) for bias, width in given])
