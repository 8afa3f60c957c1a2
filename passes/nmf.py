"""One factor without negative numbers: what a component is made of can be read row by row.

    x W           becomes   (x A) B,          B (r, N) ≥ 0: every output is a sum of components
    Gather(E, i)  becomes   Gather(A, i) B,   A (V, r) ≥ 0: every row is a sum of components

Weights have both signs, so the other factor has them too (semi-NMF); where the weight itself has no negative
number, neither factor has. The constraint never lowers the error: at equal rank the SVD is at least as good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lowrank_onnx.base import Candidate, Counts, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import balanced, linear_chain, store
from lowrank_onnx.decompositions.nmf import nmf, semi_nmf, semi_nmf_output, sparser
from lowrank_onnx.decompositions.output_metric import gentle_solve
from lowrank_onnx.decompositions.rows import pseudo_count
from lowrank_onnx.linalg import Array
from lowrank_onnx.lookups import as_rows, as_table, is_plain, lookups, pooled_counts
from lowrank_onnx.passes.embedding import Embedding, refuse_table, row_step
from lowrank_onnx.passes.svd import SVD, Spectrum, break_even, grid_step, pooled, product_of

_OFFERED = 6  # ranks; each is a fit of its own


@dataclass(frozen=True, eq=False)
class Parts:
    """The analysis of one site: a matrix whose columns are to be sums of components, and fits by rank.

    Attributes:
        matrix: (m, n), n outputs of a layer or rows of a table.
        gram: (m, m) metric of a layer's input; None for a table or without data.
        counts: (n,) lookups of a table; None without data.
        weights: (n,) the same, smoothed; ones without data.
        energy: Squared size of the layer's output, which its error is relative to.
        means: As of ``Spectrum``; empty where no bias takes up the mean.
        fits: By rank: left (m, r) and right (r, n) ≥ 0.
    """

    matrix: Array
    gram: Array | None
    counts: Array | None
    weights: Array
    energy: float
    means: Mapping[str, tuple[Array, Array]]
    fits: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    @property
    def exact(self) -> int:
        """The least rank that always gives the matrix back; see ``semi_nmf``."""
        rows, columns = self.matrix.shape
        return int(min(rows, columns) if self.matrix.min() >= 0 else min(rows + 1, columns))


@dataclass(frozen=True)
class NMF(Pass):
    """Components that only add up: of the outputs of a layer, or of the rows of a table; for reading.

    Options:
        sparsity: Share of the numbers in the non-negative factor that are zero, in every component.
        iterations: Most rounds of a fit.
        ridge: Shrinkage towards the fit without data, in units of the mean input variance.
        smoothing: Lookups added to the count of every row of a table; 0 chooses on held-out calibration data.
    """

    name = "nmf"
    kinds = ("linear", "embedding")
    reference = "Ding, Li & Jordan 2010, doi:10.1109/TPAMI.2008.277; HALS: Cichocki & Phan 2009"
    default = False
    sparsity: float = 0.0
    iterations: int = 60
    ridge: float = 0.01
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity >= 1 or self.iterations < 1:
            raise ValueError("sparsity must be in [0, 1), iterations 1 or more")

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.kind == "embedding":
            return refuse_table(site)
        return "the weight is a stack of matrices" if site.weight.ndim != 2 else SVD().refuse(site)

    def analyse(self, site: Site, moments: Mapping[str, Moments | Counts] | None) -> Parts:
        """See Pass.analyse."""
        if site.kind == "embedding":
            rows = as_rows(site).astype(np.float64)
            if moments is None:
                return Parts(rows.T, None, None, np.ones(len(rows)), 0.0, {})
            counts = pooled_counts(site, moments)  # type: ignore[arg-type]
            weights = counts.total + (self.smoothing or pseudo_count(counts.total, counts.held))
            return Parts(rows.T, None, counts.total.astype(np.float64), weights, 0.0, {})
        weight = site.weight.astype(np.float64)
        ones = np.ones(weight.shape[1])
        if moments is None:
            return Parts(weight, None, None, ones, 0.0, {})
        spectrum: Spectrum = SVD(ridge=self.ridge).analyse(site, moments)  # type: ignore[arg-type]
        gram = pooled(site, moments, centred=spectrum.centred).gram  # type: ignore[arg-type]
        whole = pooled(site, moments, centred=False).gram  # type: ignore[arg-type]
        return Parts(weight, gram, None, ones, float(np.vdot(whole @ weight, weight)), spectrum.means)

    def _fit(self, analysis: Parts, rank: int) -> tuple[Array, Array]:
        if rank not in analysis.fits:
            scale = np.sqrt(analysis.weights)
            matrix = analysis.matrix * scale
            if matrix.min() >= 0:
                made = nmf(matrix, rank, self.iterations)
            elif analysis.gram is None:
                made = semi_nmf(matrix, rank, self.iterations)
            else:
                turned = semi_nmf_output(matrix.T, rank, analysis.gram, self.ridge, self.iterations)
                made = type(turned)(turned.right.T, turned.left.T, turned.error)
            left, right = made.left, made.right / scale
            if self.sparsity > 0:
                right = sparser(right, self.sparsity)
                weighted = right * analysis.weights
                if matrix.min() < 0:  # the other factor may have any sign: fitted anew
                    left = gentle_solve(weighted @ right.T, weighted @ analysis.matrix.T).T
            analysis.fits[rank] = left, right
        return analysis.fits[rank]

    def ranks(self, site: Site, analysis: Parts) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        rows, columns = analysis.matrix.shape
        narrow = min(rows, columns)
        step, most = grid_step(narrow), break_even(site) if site.kind == "linear" else narrow
        if site.kind == "embedding":
            step, most = row_step(narrow), (rows * columns - 1) // (rows + columns)
        grid = np.arange(step, min(most, analysis.exact) + 1, step)
        some = grid[np.unique(np.linspace(0, len(grid) - 1, min(_OFFERED, len(grid))).round().astype(int))]
        offered: list[Candidate] = []
        for rank in some.tolist():  # a local optimum may be worse than that of a lower rank
            entry = self.candidate(site, analysis, (rank,))
            if not offered or entry.error < offered[-1].error:
                offered.append(entry)
        return [entry.ranks for entry in offered]

    def candidate(self, site: Site, analysis: Parts, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (rank,) = ranks
        left, right = self._fit(analysis, rank)
        rows, columns = analysis.matrix.shape
        lost = analysis.matrix - left @ right
        added = sum(columns for use in site.uses if use.node in analysis.means and use.bias is None)
        count = lookups(site) if site.kind == "embedding" else None
        macs = None if count is None else count * rank * rows
        if site.kind == "linear" and site.macs is not None:
            macs = site.macs // (rows * columns) * rank * (rows + columns)
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=rank * (rows + columns) + added,
            macs=macs,
            nodes=len(site.uses) * (1 if site.kind == "linear" or is_plain(site) else 3),
            weight_error=float(np.linalg.norm(lost) / np.linalg.norm(analysis.matrix)),
            output_error=_output_error(analysis, lost),
        )

    def factorize(self, site: Site, analysis: Parts, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        left, right = balanced(*self._fit(analysis, candidate.ranks[0]))
        if site.kind == "embedding":
            return {"first": store(right.T, site), "second": store(left.T, site)}
        factors = {"first": store(left, site), "second": store(right, site)}
        for use in site.uses if analysis.means else ():
            delivered, wanted = analysis.means[use.node]
            bias = 0.0 if use.bias is None else use.bias.astype(np.float64)
            factors[f"bias:{use.node}"] = store(bias + wanted - (delivered @ left) @ right, site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        if site.kind == "embedding":
            return Embedding().emit(site, candidate, factors)
        matrices = [(f"{site.name}/{role}", factors[role]) for role in ("first", "second")]
        return [linear_chain(site, use, matrices, factors.get(f"bias:{use.node}")) for use in site.uses]

    def spell_rank(self, site: Site, analysis: Parts, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.selector is not None:
            return f"{self.name} offers no selector '{wish.selector.rule}'"
        if wish.energy is not None:
            return "components that only add up have no spectrum: give a rank or a share of it"
        return (wish.ranks(analysis.exact),)

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        matrix = as_rows(site).T if site.kind == "embedding" else site.weight
        full = min(matrix.shape) if matrix.min() >= 0 else min(matrix.shape[0] + 1, matrix.shape[1])
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def components(self, site: Site, factors: Factors) -> Array | None:
        """See Pass.components."""
        return factors["first"] if site.kind == "embedding" else factors["second"].T

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return ()  # a refit would not keep the signs

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return factors

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return product_of(factors), factors.get(f"bias:{site.uses[0].node}")

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        made = product_of(factors)
        if site.kind == "embedding":
            return {site.name: Dense(as_table(site, made), {})}
        biases = {use.node: factors[f"bias:{use.node}"] for use in site.uses if f"bias:{use.node}" in factors}
        return {site.name: Dense(made, biases)}


def _output_error(analysis: Parts, lost: Array) -> float | None:
    """Relative to the output without bias; None without data."""
    if analysis.counts is not None:
        seen = float(analysis.counts @ np.sum(analysis.matrix**2, axis=0))
        return float(np.sqrt(analysis.counts @ np.sum(lost**2, axis=0) / seen)) if seen > 0 else 0.0
    if analysis.gram is None:
        return None
    squared = max(float(np.vdot(analysis.gram @ lost, lost)), 0.0)
    return float(np.sqrt(squared / analysis.energy)) if analysis.energy > 0 else 0.0
