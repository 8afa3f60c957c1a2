"""Fewer hidden units around an activation: no added node, every product smaller.

    y = s(x U + u) W + b   becomes   y = s(x U[:, S] + u[S]) W' + b',   S of size k

S are the units that explain the output best, W' is the layer out refitted on them by least squares.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import linear_chain, store
from lowrank_onnx.decompositions.selection import UnitOrder, order_units, refit_selected
from lowrank_onnx.kept import Kept
from lowrank_onnx.linalg import Array, covariance, covariances, regression
from lowrank_onnx.passes.svd import grid_step


@dataclass(frozen=True, eq=False)
class Units:
    """The analysis of one site: the order of its units, and the moments they came from."""

    order: UnitOrder
    gram: Array
    mean: Array


@dataclass(frozen=True)
class Feedforward(Pass):
    """Keep the hidden units that explain the output best, and refit the layer that reads them.

    Options:
        multiple: Offer only numbers of units divisible by this; 0 chooses 8 for wide layers, less for narrow.
        ridge: Of the refit, in units of the mean variance of the units.
    """

    name = "feedforward"
    kinds = ("feedforward",)
    reference = "MoDeGPT, ICLR 2025, arXiv:2408.09632 (type I), with greedy selection by output error"
    needs_data = True
    multiple: int = 0
    ridge: float = 0.001

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.weight.shape[0] < 2:
            return "one hidden unit only"
        if site.attributes["out"].uses[0].dynamic_bias:
            return "the bias of the layer out is not constant"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Units:
        """See Pass.analyse."""
        assert moments is not None, "needs_data"
        entry = moments[site.uses[0].input]
        weight = site.weight.astype(np.float64)
        energy = float(np.einsum("fn,fn->", weight, entry.gram @ weight))
        centred = covariance(entry.gram, entry.mean)
        return Units(order_units(weight, centred, self.ridge, self._step(site), energy), entry.gram, entry.mean)

    def _step(self, site: Site) -> int:
        width = site.weight.shape[0]
        return self.multiple or (64 if width >= 1024 else 32 if width >= 512 else grid_step(width))

    def ranks(self, site: Site, analysis: Units) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        step = self._step(site)
        return [(units,) for units in range(step, site.weight.shape[0], step)]

    def candidate(self, site: Site, analysis: Units, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (units,) = ranks
        width = site.weight.shape[0]
        kept = site.parameters // width * units
        into = site.attributes["into"]
        # Stored biases of the layers in shrink too, if nobody else reads them; counted when it is finished.
        new = 0 if site.uses[0].bias is not None else site.weight.shape[1]
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=kept + new - sum(width - units for part in into if part.uses[0].bias is not None),
            macs=None if site.macs is None else site.macs // width * units,
            nodes=0,
            weight_error=None,
            output_error=analysis.order.relative(units),
        )

    def factorize(self, site: Site, analysis: Units, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        chosen = np.sort(analysis.order.order[: candidate.ranks[0]])
        weight = site.weight.astype(np.float64)
        mean = analysis.mean
        out = refit_selected(weight, covariance(analysis.gram, mean), chosen, self.ridge)
        bias = _bias(site) + mean @ weight - mean[chosen] @ out
        return {"chosen": chosen, "out": store(out, site), "bias": store(bias, site)}

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        replacements = []
        for part in site.attributes["into"]:
            made = _cut(part, factors)
            (use,) = made.uses
            replacements.append(linear_chain(part, use, [(f"{part.name}/units", made.weight)], use.bias))
        last = site.attributes["out"]
        end = linear_chain(last, last.uses[0], [(f"{last.name}/units", factors["out"])], factors["bias"])
        between = tuple(site.attributes["between"]) + tuple(part.uses[0].raw_output for part in site.attributes["into"])
        return [*replacements, dataclasses.replace(end, reshaped=between)]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return (site.attributes["out"],)

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        assert moments.target_cross is not None and moments.target_mean is not None
        gram, cross = covariances(moments.gram, moments.mean, moments.target_cross, moments.target_mean)
        out = regression(gram, cross, factors["out"].astype(np.float64), ridge)
        bias = _bias(site) + moments.target_mean - moments.mean @ out
        return {**factors, "out": store(out, site), "bias": store(bias, site)}

    def kept_layers(self, site: Site, factors: Factors) -> tuple[Site, ...]:
        """See Pass.kept_layers."""
        return tuple(_cut(part, factors) for part in site.attributes["into"] if Kept().refuse(part) is None)

    def with_kept(self, site: Site, factors: Factors, layer: str, fitted: Factors) -> Factors:
        """See Pass.with_kept."""
        biases = {f"bias:{layer}": value for role, value in fitted.items() if role.startswith("bias:")}
        return {**factors, f"weight:{layer}": fitted["weight"], **biases}

    def delivered(self, factors: Factors, rows: Array) -> Array:
        """See Pass.delivered."""
        return np.asarray(rows[:, factors["chosen"]])

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return factors["out"].astype(np.float64), factors["bias"]

    def spell_rank(self, site: Site, analysis: Units, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a fixed rank is carried out layer by layer"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = site.weight.shape[0]
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one number of units from 1 to {full}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        weight = np.zeros(site.weight.shape)
        weight[factors["chosen"]] = factors["out"]
        out = site.attributes["out"]
        return {out.name: Dense(weight, {out.uses[0].node: factors["bias"]})}


def _cut(part: Site, factors: Factors) -> Site:
    """A layer in with the chosen units only, as it stands in the factors."""
    chosen = factors["chosen"]
    use = part.uses[0]
    bias = factors.get(f"bias:{part.name}", None if use.bias is None else use.bias[chosen])
    weight = factors.get(f"weight:{part.name}", part.weight[:, chosen])
    return dataclasses.replace(part, weight=weight, uses=(dataclasses.replace(use, bias=bias),))


def _bias(site: Site) -> Array:
    bias = site.attributes["out"].uses[0].bias
    return np.zeros(site.weight.shape[1]) if bias is None else np.asarray(bias, np.float64)
