"""Narrower heads around a node that wants queries, keys and values of one width, as GroupQueryAttention does.

Both halves of the block are narrowed as ``heads`` narrows each, to the same width. What is in the file stays one node:
where it turns positions into queries and keys, it reads the columns of its tables that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.heads import Heads, Scores, Values

_OF_SCORES = ("query", "key")


@dataclass(frozen=True)
class WholeHeads(Pass):
    """Keep equally many columns of queries, keys and values, where one node holds them all.

    Options:
        multiple: Offer only head widths divisible by this; 0 takes what the node wants, 8 or 16.
        ridge: Shrinkage towards the weights alone, in units of the mean variance of the input.
    """

    name = "whole_heads"
    kinds = ("attention",)
    reference = "MoDeGPT, ICLR 2025, arXiv:2408.09632 (types II and III), joint over both weights"
    multiple: int = 0
    ridge: float = 0.001

    @property
    def _heads(self) -> Heads:
        return Heads(ridge=self.ridge)

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.attributes["half"] != "whole":
            return "its halves may have widths of their own, which heads changes"
        if site.attributes["refusal"]:
            return str(site.attributes["refusal"])
        width, step = site.attributes["width"], site.attributes["step"]
        if width <= step:
            return f"heads of {width} cannot get narrower: the node wants a multiple of {step}"
        return next(filter(None, map(self._heads.refuse, site.attributes["halves"])), None)

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> tuple[Scores | Values, ...]:
        """See Pass.analyse."""
        return tuple(self._heads.analyse(half, moments) for half in site.attributes["halves"])

    def ranks(self, site: Site, analysis: tuple[Scores | Values, ...]) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        step = math.lcm(self.multiple or 1, site.attributes["step"])
        return [(rank,) for rank in range(step, site.attributes["width"], step)]

    def candidate(self, site: Site, analysis: tuple[Scores | Values, ...], ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate; the error is that of the scores and of the values, each for itself."""
        scores, values = (
            self._heads.candidate(half, seen, ranks)
            for half, seen in zip(site.attributes["halves"], analysis, strict=True)
        )
        error = math.hypot(scores.error, values.error)
        seen = scores.output_error is not None
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=scores.parameters + values.parameters,
            macs=None if scores.macs is None or values.macs is None else scores.macs + values.macs,
            nodes=2 * len(site.attributes["tables"]),
            weight_error=None if seen else error,
            output_error=error if seen else None,
            options={"scores": scores.error},
        )

    def factorize(self, site: Site, analysis: tuple[Scores | Values, ...], candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        factors: dict[str, Array] = {}
        for half, seen in zip(site.attributes["halves"], analysis, strict=True):
            factors.update(self._heads.factorize(half, seen, candidate))
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        scores, values = site.attributes["halves"]
        return [
            *self._heads.emit(scores, candidate, _of_scores(factors)),
            *self._heads.emit(values, candidate, _of_values(factors)),
        ]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets; the output layer."""
        return self._heads.targets(site.attributes["halves"][1])

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        values = self._heads.refit(site.attributes["halves"][1], candidate, _of_values(factors), moments, ridge)
        return {**factors, **values}

    def kept_layers(self, site: Site, factors: Factors) -> tuple[Site, ...]:
        """See Pass.kept_layers; the values, before their columns are mixed."""
        return self._heads.kept_layers(site.attributes["halves"][1], _of_values(factors))

    def with_kept(self, site: Site, factors: Factors, layer: str, fitted: Factors) -> Factors:
        """See Pass.with_kept."""
        return self._heads.with_kept(site.attributes["halves"][1], factors, layer, fitted)

    def delivered(self, factors: Factors, rows: Array) -> Array:
        """See Pass.delivered."""
        return self._heads.delivered(_of_values(factors), rows)

    def after_refit(self, site: Site, candidate: Candidate, error: float) -> float:
        """See Pass.after_refit; what the narrower scores lose comes on top."""
        return float(np.hypot(error, candidate.options["scores"]))

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return self._heads.effective(site.attributes["halves"][1], candidate, _of_values(factors))

    def spell_rank(self, site: Site, analysis: tuple[Scores | Values, ...], wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a fixed rank is carried out layer by layer"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        if (refused := self.refuse(site)) is not None:
            return refused
        full, step = site.attributes["width"], site.attributes["step"]
        fits = len(ranks) == 1 and 1 <= ranks[0] <= full and ranks[0] % step == 0
        return None if fits else f"expected one width of a head up to {full}, a multiple of {step}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent; the queries and the output layer tell of all four."""
        scores, values = site.attributes["halves"]
        return {
            **self._heads.dense_equivalent(scores, candidate, _of_scores(factors)),
            **self._heads.dense_equivalent(values, candidate, _of_values(factors)),
        }


def _of_scores(factors: Factors) -> Factors:
    return {name: value for name, value in factors.items() if name in _OF_SCORES}


def _of_values(factors: Factors) -> Factors:
    return {name: value for name, value in factors.items() if name not in _OF_SCORES}
