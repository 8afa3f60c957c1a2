"""What the techniques share that write a linear layer as products of sparse, regular matrices.

A technique tells which forms a shape allows and fits one at one rank; the rest, the means, the errors, the nodes
and the refit of the last factors, is the same for all and is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site, Use
from lowrank_onnx.block_chains import FIRST_OPSET, block_chain
from lowrank_onnx.chains import store
from lowrank_onnx.decompositions.blast import Blast
from lowrank_onnx.decompositions.block_sum import BlockSum, from_arrays
from lowrank_onnx.decompositions.kronecker import KroneckerSum
from lowrank_onnx.linalg import Array, regression, with_ridge
from lowrank_onnx.passes.svd import pooled

Structure = BlockSum | KroneckerSum | Blast
_OFFERED = 8  # ranks at most; each one is a fit of its own


@dataclass(frozen=True, eq=False)
class Target:
    """What is approximated.

    Attributes:
        matrix: (K, N) the weight, or its regression on what is delivered.
        gram: (K, K) the metric with its ridge; the identity without data.
        plain: The same without the ridge; None without data.
        cross: (K, N) E[xᵀ t]; None where the weight's own output is wanted.
        energy: Squared norm that output errors are relative to.
        means: By use, mean of the input and of the wanted output; empty where the bias stays.
    """

    matrix: Array
    gram: Array
    plain: Array | None
    cross: Array | None
    energy: float
    means: Mapping[str, tuple[Array, Array]]


@dataclass(frozen=True, eq=False)
class Fitted:
    """The analysis of one site: the target, the form chosen for it, and the fits made so far by rank."""

    target: Target
    form: Any
    state: Any
    made: dict[int, Structure] = field(default_factory=dict)


@dataclass(frozen=True)
class StructuredPass(Pass):
    """A linear layer as a structure with one rank; see the subclasses.

    Options:
        ridge: Pull towards the original weight, in units of the mean input variance.
    """

    kinds = ("linear",)
    default = False
    ridge: float = 0.01

    @abstractmethod
    def forms(self, site: Site) -> Sequence[Any]:
        """The forms a site allows; empty if none can be smaller than the weight."""

    @abstractmethod
    def prepare(self, target: Target, form: Any) -> Any:
        """What one form needs whatever the rank, such as the spectra of its blocks."""

    @abstractmethod
    def fit(self, target: Target, form: Any, state: Any, rank: int) -> Structure:
        """The structure at one rank."""

    @abstractmethod
    def full(self, shape: tuple[int, ...], form: Any) -> int:
        """The least rank that gives any weight back."""

    @abstractmethod
    def cost(self, shape: tuple[int, ...], form: Any, rank: int) -> int:
        """Multiply-accumulates of one row; at least as many as parameters."""

    def structure(self, factors: Factors) -> Structure:
        """Read the structure back from its factors."""
        return from_arrays(factors)

    def replacement(self, site: Site, use: Use, made: Structure, bias: Array | None) -> Replacement:
        """The nodes of one use."""
        assert isinstance(made, BlockSum)
        return block_chain(site, use, made, bias)

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.weight.ndim > 2:
            return f"{self.name} takes one matrix, not a stack of them"
        if min(site.weight.shape) < 4:
            return f"one side of the weight is {min(site.weight.shape)}: too few for blocks"
        if not site.weight.any():
            return "weight is all zeros"
        if site.attributes["opset"] < FIRST_OPSET:
            return f"{self.name} needs operator set {FIRST_OPSET}, the model has {site.attributes['opset']}"
        if any(use.dynamic_bias and site.attributes[use.node]["beta"] != 1.0 for use in site.uses):
            return "Gemm scales a tensor it adds"
        if not self.forms(site):
            rows, columns = site.weight.shape
            return f"no form of {self.name} of a {rows} x {columns} weight is smaller than the weight"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> Fitted:
        """See Pass.analyse. Of several forms the one with the least error at half of the dense cost is taken."""
        target = _target(site, moments, self.ridge)
        best: tuple[float, Fitted] | None = None
        for form in self.forms(site):
            entry = Fitted(target, form, self.prepare(target, form))
            rank = self.rank_within(site, form, site.weight.size // 2)
            error = _error(site, target, self._at(entry, rank).dense())
            if best is None or error < best[0]:
                best = (error, entry)
        assert best is not None
        return best[1]

    def rank_within(self, site: Site, form: Any, budget: int) -> int:
        """The largest rank within a budget of multiply-accumulates of one row; at least 1."""
        low, high = 1, max(self.full(site.weight.shape, form), 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost(site.weight.shape, form, middle) <= budget else (low, middle - 1)
        return low

    def _at(self, analysis: Fitted, rank: int) -> Structure:
        if rank not in analysis.made:
            analysis.made[rank] = self.fit(analysis.target, analysis.form, analysis.state, rank)
        return analysis.made[rank]

    def ranks(self, site: Site, analysis: Fitted) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        most = self.rank_within(site, analysis.form, site.weight.size - 1)
        step = max(1, most // _OFFERED)
        below = [rank for rank in range(step, most + 1, step)]
        return [(rank,) for rank in below if self.cost(site.weight.shape, analysis.form, rank) < site.weight.size]

    def candidate(self, site: Site, analysis: Fitted, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        made = self._at(analysis, ranks[0])
        dense = made.dense()
        target = analysis.target
        rows, columns = site.weight.shape
        weight = site.weight.astype(np.float64)
        added = sum(columns for use in site.uses if use.node in target.means and use.bias is None)
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=made.parameters + added,
            macs=None if site.macs is None else site.macs // (rows * columns) * made.products,
            nodes=len(made.arrays()) - 1,
            weight_error=float(np.linalg.norm(weight - dense) / np.linalg.norm(weight)),
            output_error=None if target.plain is None else _error(site, target, dense),
            options={"form": self.describe(analysis.form)},
        )

    def describe(self, form: Any) -> str:
        """A form in a word or two, for the plan."""
        return " ".join(map(str, form))

    def factorize(self, site: Site, analysis: Fitted, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return _stored(site, self._at(analysis, candidate.ranks[0]), analysis.target)

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        made = self.structure(factors)
        return [self.replacement(site, use, made, factors.get(f"bias:{use.node}")) for use in site.uses]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return (site,) if len(site.uses) == 1 else ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit. The last factors of every chain are fitted anew; form, orders and first factors stay."""
        target = _target(site, {site.uses[0].input: moments}, ridge)
        return _stored(site, self.structure(factors).refitted(target.matrix, target.gram), target)

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return self.structure(factors).dense(), factors.get(f"bias:{site.uses[0].node}")

    def spell_rank(self, site: Site, analysis: Fitted, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.selector is not None:
            return f"{self.name} offers no selector '{wish.selector.rule}'"
        full = self.full(site.weight.shape, analysis.form)
        if wish.energy is None:
            return (wish.ranks(full),)
        most = self.rank_within(site, analysis.form, site.weight.size - 1)
        for rank in range(1, most + 1):
            if self.candidate(site, analysis, (rank,)).error ** 2 <= 1 - wish.energy:
                return (rank,)
        return f"no rank of {self.name} below break-even keeps the energy {wish.energy:g}"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = max((self.full(site.weight.shape, form) for form in self.forms(site)), default=0)
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        biases = {use.node: factors[f"bias:{use.node}"] for use in site.uses if f"bias:{use.node}" in factors}
        return {site.name: Dense(self.structure(factors).dense(), biases)}


def _target(site: Site, moments: Mapping[str, Moments] | None, ridge: float) -> Target:
    weight = site.weight.astype(np.float64)
    if moments is None:
        return Target(weight, np.eye(len(weight)), None, None, float(np.vdot(weight, weight)), {})
    # A bias that is there already takes the mean of what is lost; a new one would cost a node.
    centred = all(use.bias is not None and not use.dynamic_bias for use in site.uses)
    whole, entry = pooled(site, moments, centred=False), pooled(site, moments, centred=centred)
    energy = whole.target_energy or float(np.einsum("kn,kn->", weight, whole.gram @ weight))
    gram = with_ridge(entry.gram, ridge)
    means = {
        use.node: (
            moments[use.input].mean,
            moments[use.input].mean @ weight
            if moments[use.input].target_mean is None
            else np.asarray(moments[use.input].target_mean),
        )
        for use in (site.uses if centred else ())
    }
    if entry.target_cross is None:
        return Target(weight, gram, entry.gram, None, energy, means)
    matrix = regression(entry.gram, entry.target_cross, weight, ridge)
    return Target(matrix, gram, entry.gram, entry.target_cross, energy, means)


def _error(site: Site, target: Target, dense: Array) -> float:
    """Relative error of a structure on the target it was fitted to: of the output with data, else of the weight."""
    if target.cross is not None:
        raise AssertionError("errors of a refit are measured where it is made")
    lost = target.matrix - dense
    metric = target.gram if target.plain is None else target.plain
    squared = float(np.einsum("kn,kn->", lost, metric @ lost))
    return float(np.sqrt(max(squared, 0.0) / target.energy)) if target.energy > 0 else 0.0


def _stored(site: Site, made: Structure, target: Target) -> Factors:
    factors: dict[str, Any] = {
        name: value if value.dtype.kind in "iu" else store(value, site) for name, value in made.arrays().items()
    }
    dense = made.dense()
    for use in site.uses if target.means else ():
        delivered, wanted = target.means[use.node]
        assert use.bias is not None
        factors[f"bias:{use.node}"] = store(use.bias.astype(np.float64) + wanted - delivered @ dense, site)
    return factors
