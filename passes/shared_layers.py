"""One first factor for layers of one shape in neighbouring blocks: a smaller file, at the work of shared_input.

    y_l = x_l W_l + b_l   becomes   y_l = (x_l A) B_l + b_l',   A (K, r) stored once, B_l (r, N_l)

A layer here is a unit of ``sites.shared_layers``: query, key and value count as one, so that all their heads share A.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import store
from lowrank_onnx.decompositions.shared_basis import SharedBasis, shared_basis
from lowrank_onnx.linalg import Array, covariance, covariances, regression
from lowrank_onnx.passes.shared_input import behind_one_factor, bias_of, output_scales, places_of
from lowrank_onnx.passes.svd import grid_step
from lowrank_onnx.sites.shared_layers import parts_of


@dataclass(frozen=True, eq=False)
class Common:
    """The analysis of one site; per unit: ``scales`` (N,) undo the scaling of the basis, ``means`` (K,) of the input.

    A unit has no mean where no bias can take it: without data, or where a bias is computed.
    """

    basis: SharedBasis
    scales: tuple[Array, ...]
    means: tuple[Array | None, ...]
    seen: bool

    def of(self, place: int) -> Common:
        """What concerns one unit."""
        basis = SharedBasis(
            self.basis.directions, (self.basis.roots[place],), (self.basis.rows[place],), (self.basis.errors[place],)
        )
        return Common(basis, (self.scales[place],), (self.means[place],), self.seen)


@dataclass(frozen=True)
class SharedLayers(Pass):
    """x_l W_l ≈ (x_l A) B_l with one A for two neighbouring layers of a shape; for --keep-size and --keep-params.

    Options:
        multiple: Offer only ranks divisible by this; 0 chooses 8 for wide layers, less for narrow ones.
        ridge: Shrinkage towards the weights alone, in units of the mean input variance.
    """

    name = "shared_layers"
    kinds = ("shared_layers",)
    reference = "Basis Sharing, ICLR 2025, arXiv:2410.03765"
    default = False
    multiple: int = 0
    ridge: float = 0.01

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if min(_sizes(site)) < 2:
            return f"one side of the weight is {min(_sizes(site))}: no rank below full"
        empty = [part.name for part in site.attributes["parts"] if not part.weight.any()]
        return f"weight of '{empty[0]}' is all zeros" if empty else None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Common:
        """See Pass.analyse."""
        weights, grams, scales, means = [], [], [], []
        for unit in site.attributes["units"]:
            weight, gram, mean = unit.weight.astype(np.float64), np.eye(len(unit.weight)), None
            if moments is not None:
                entry = moments[unit.uses[0].input]
                mean = None if any(use.dynamic_bias for use in unit.uses) else entry.mean
                gram = entry.gram if mean is None else covariance(entry.gram, mean)
            scale = output_scales(parts_of(unit), np.einsum("kn,kn->n", weight, gram @ weight))
            weights.append(weight * scale)
            grams.append(gram)
            scales.append(scale)
            means.append(mean)
        basis = shared_basis(weights, grams, self.ridge if moments is not None else 0.0)
        return Common(basis, tuple(scales), tuple(means), moments is not None)

    def ranks(self, site: Site, analysis: Common) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks; no layer may take more work than it did."""
        rows, columns = _sizes(site)
        most = min((rows * columns - 1) // (rows + columns), analysis.basis.directions.shape[1])
        step = self.multiple or grid_step(min(rows, columns))
        return [(rank,) for rank in range(step, most + 1, step)]

    def candidate(self, site: Site, analysis: Common, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (rank,) = ranks
        rows, columns = site.shape
        new = sum(
            part.weight.shape[1]
            for unit, mean in zip(site.attributes["units"], analysis.means, strict=True)
            for part in parts_of(unit)
            if mean is not None and part.uses[0].bias is None
        )
        error = float(np.sqrt(np.mean([lost[rank] for lost in analysis.basis.errors])))
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=rank * (rows + columns) + new,
            macs=_work(site, rank),
            nodes=len(site.attributes["units"]),
            weight_error=None if analysis.seen else error,
            output_error=error if analysis.seen else None,
        )

    def factorize(self, site: Site, analysis: Common, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        (rank,) = candidate.ranks
        first = analysis.basis.first(rank)
        factors = {"first": store(first, site)}
        for place, unit in enumerate(site.attributes["units"]):
            second = analysis.basis.second(place, rank) / analysis.scales[place]
            factors[f"second{place}"] = store(second, site)
            mean = analysis.means[place]
            if mean is not None:
                lost = mean @ unit.weight.astype(np.float64) - (mean @ first) @ second
                factors[f"bias{place}"] = store(bias_of(parts_of(unit)) + lost, site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return [
            made
            for place, unit in enumerate(site.attributes["units"])
            for made in behind_one_factor(
                parts_of(unit),
                unit.name,
                (f"{site.name}/first", factors["first"]),
                factors[f"second{place}"],
                factors.get(f"bias{place}"),
            )
        ]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets; several units read different tensors, and are refitted one after another."""
        units = site.attributes["units"]
        return parts_of(units[0]) if len(units) == 1 else ()

    def stages(self, site: Site, analysis: Common) -> tuple[tuple[Site, Common], ...]:
        """See Pass.stages; one for every unit, none of which changes A."""
        units = site.attributes["units"]
        return tuple((_alone(unit), analysis.of(place)) for place, unit in enumerate(units)) if len(units) > 1 else ()

    def with_kept(self, site: Site, factors: Factors, layer: str, fitted: Factors) -> Factors:
        """See Pass.with_kept."""
        place = [unit.name for unit in site.attributes["units"]].index(layer)
        return {**factors, **{f"{name[:-1]}{place}": value for name, value in fitted.items() if name != "first"}}

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit; of one unit."""
        assert moments.target_cross is not None and moments.target_mean is not None
        first, centred = factors["first"].astype(np.float64), "bias0" in factors
        delivered, wanted = moments.mean, moments.target_mean
        if not centred:
            delivered, wanted = np.zeros_like(delivered), np.zeros_like(wanted)
        gram, cross = covariances(moments.gram, delivered, moments.target_cross, wanted)
        second = regression(first.T @ gram @ first, first.T @ cross, factors["second0"].astype(np.float64), ridge)
        bias = bias_of(self.targets(site)) + wanted - (delivered @ first) @ second
        return {**factors, "second0": store(second, site), **({"bias0": store(bias, site)} if centred else {})}

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective; of one unit."""
        product = factors["first"].astype(np.float64) @ factors["second0"].astype(np.float64)
        return product, factors.get("bias0")

    def spell_rank(self, site: Site, analysis: Common, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a fixed rank is carried out layer by layer"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = min(site.shape)
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        made = {}
        for place, unit in enumerate(site.attributes["units"]):
            product = factors["first"].astype(np.float64) @ factors[f"second{place}"].astype(np.float64)
            bias = factors.get(f"bias{place}")
            for part, columns in zip(parts_of(unit), places_of(parts_of(unit)), strict=True):
                biases = {} if bias is None else {part.uses[0].node: bias[columns]}
                made[part.name] = Dense(product[:, columns], biases)
        return made


def _alone(unit: Site) -> Site:
    """A unit as a site of the same kind."""
    attributes = {"units": (unit,), "parts": parts_of(unit)}
    return dataclasses.replace(unit, kind="shared_layers", attributes=attributes, parts=unit.covers)


def _sizes(site: Site) -> tuple[int, int]:
    """Inputs and outputs of one unit."""
    rows, columns = site.attributes["units"][0].weight.shape
    return int(rows), int(columns)


def _work(site: Site, rank: int) -> int | None:
    rows, columns = _sizes(site)
    macs = [unit.macs for unit in site.attributes["units"]]
    if site.macs is None:
        return None
    return sum((entry or 0) // (rows * columns) * rank * (rows + columns) for entry in macs)
