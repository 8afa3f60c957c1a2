"""A layer that stays dense: the same nodes with weights of its own, to be varied or fitted anew.

    y = x W + b   becomes   y = x W' + b'

No rank is cut. Behind factorized layers it receives other inputs than it was trained for, and least squares
on those gives back some of what was lost, at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site, Use
from lowrank_onnx.chains import linear_chain, store
from lowrank_onnx.conv_chains import Link, convolution_chain
from lowrank_onnx.linalg import Array, covariances, regression
from lowrank_onnx.patches import WIDEST, as_linear, blocks_of, unseen


@dataclass(frozen=True)
class Kept(Pass):
    """The dense weight, fitted anew to the inputs that the layers before it deliver."""

    name = "kept"
    kinds = ("linear", "convolution")
    reference = "Zhang et al. 2016, arXiv:1505.06798 (asymmetric reconstruction), at full rank"
    default = False

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if len(site.uses) > 1 or site.freed < site.parameters:
            return "the weight is shared"
        (use,) = site.uses
        if use.scope:
            return "inside a subgraph"
        if use.dynamic_bias:
            return "the bias is computed"
        if site.kind == "convolution":
            plain = site.attributes["group"] == 1 and not site.attributes["transposed"]
            return unseen(site) if plain else "grouped or transposed"
        if site.weight.ndim != 2 or max(site.weight.shape) > WIDEST:
            return f"a stack of matrices, or a side beyond {WIDEST}"
        if use.bias is not None and int(np.prod(site.attributes[use.node]["bias_shape"])) != len(use.bias):
            return "outputs share one bias"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> None:
        """See Pass.analyse."""
        return None

    def ranks(self, site: Site, analysis: Any) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        return [()]

    def candidate(self, site: Site, analysis: Any, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        return Candidate(site.name, self.name, ranks, site.parameters, site.macs, 0, 0.0)

    def factorize(self, site: Site, analysis: Any, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return {"weight": site.weight}

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return [
            dense_node(site, use, f"{site.name}/dense", factors["weight"], factors.get(f"bias:{use.node}", use.bias))
            for use in site.uses
        ]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return (site,)

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        use = site.uses[0]
        weight = as_linear(site).weight.astype(np.float64)
        assert moments.target_cross is not None and moments.target_mean is not None
        if use.bias is None:
            return {"weight": self._stored(site, regression(moments.gram, moments.target_cross, weight, ridge))}
        gram, cross = covariances(moments.gram, moments.mean, moments.target_cross, moments.target_mean)
        fitted = regression(gram, cross, weight, ridge)
        bias = use.bias.astype(np.float64) + moments.target_mean - moments.mean @ fitted
        return {"weight": self._stored(site, fitted), f"bias:{use.node}": store(bias, site)}

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        weight = factors["weight"].astype(np.float64)
        matrix = weight.reshape(len(weight), -1).T if site.kind == "convolution" else weight
        return matrix, factors.get(f"bias:{site.uses[0].node}")

    def spell_rank(self, site: Site, analysis: Any, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a kept layer has no rank"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        return None

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        biases = {use.node: factors[f"bias:{use.node}"] for use in site.uses if f"bias:{use.node}" in factors}
        return {site.name: Dense(factors["weight"], biases)}

    def _stored(self, site: Site, matrix: Array) -> Array:
        return store(matrix.T.reshape(site.weight.shape) if site.kind == "convolution" else matrix, site)


def dense_node(site: Site, use: Use, name: str, weight: Array, bias: Array | None) -> Replacement:
    """Replace one use of a layer by the same layer with other constants.

    Args:
        site: A linear or convolution site.
        use: One of its uses.
        name: Of the constant, in a linear layer.
        weight: In the layout of ``site.weight``.
        bias: (N,) the whole bias; None keeps what the node has now.
    """
    if site.kind != "convolution":
        return linear_chain(site, use, [(name, weight)], bias)
    shape = blocks_of(weight, site.attributes["group"], site.attributes["transposed"]).shape
    link = Link("dense", tuple(range(weight.ndim - 2)), shape)
    return convolution_chain(site, use, [link], [weight], bias)
