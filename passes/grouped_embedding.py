"""A table of embeddings in groups of rows by frequency, each group with a thin table of its own width.

    Gather(E, i)   becomes   [Gather(A_1, m_1[i]), Gather(A_2, m_2[i]), ...] @ [B_1; B_2; ...]

The map m_g tells where row i lies in the thin table of its group; for every other group it points to a row
of zeros. Whoever uses the model goes on with the numbers of the tokens as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Candidate, Counts, Dense, Factors, Moments, Pass, RankWish, Replacement, Site, Use
from lowrank_onnx.chains import store
from lowrank_onnx.decompositions.row_groups import RowGroups, by_frequency, grouped_rows
from lowrank_onnx.decompositions.rows import pseudo_count
from lowrank_onnx.linalg import Array
from lowrank_onnx.lookups import as_rows, as_table, gathered, lookups, pooled_counts, rearranged
from lowrank_onnx.passes.embedding import refuse_table, row_step

_OFFERED = 10  # ranks; each is a search of its own


@dataclass(frozen=True, eq=False)
class Groups:
    """The analysis of one site: the table, counts and weights of its rows, first groups, and fits by rank."""

    table: Array
    counts: Array
    weights: Array
    start: Array
    fits: dict[int, RowGroups] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupedEmbedding(Pass):
    """Groups of tokens by frequency, each with its own rank; what is read often is stored in more numbers.

    The rank is that of a single thin table which stores as many numbers.

    Options:
        groups: How many.
        rounds: How often tokens move to the group that is cheaper for them.
        multiple: Offer only ranks divisible by this; 0 chooses 8 for wide tables, less for narrow ones.
        smoothing: Lookups added to the count of every row; 0 chooses on held-out calibration data. One, as the
            likelihood of the tokens asks for less than the sentences do: a rare group is hit harder here.
    """

    name = "grouped_embedding"
    kinds = ("embedding",)
    reference = "GroupReduce, NeurIPS 2018, arXiv:1806.06950"
    default = False
    needs_data = True
    groups: int = 2
    rounds: int = 3
    multiple: int = 0
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups < 2:
            raise ValueError("groups must be 2 or more")

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        return refuse_table(site)

    def analyse(self, site: Site, moments: Mapping[str, Counts] | None) -> Groups:
        """See Pass.analyse."""
        assert moments is not None, "needs_data"
        counts = pooled_counts(site, moments)
        weights = counts.total + (self.smoothing or pseudo_count(counts.total, counts.held))
        return Groups(as_rows(site), counts.total, weights, by_frequency(weights, self.groups))

    def ranks(self, site: Site, analysis: Groups) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        if not np.ptp(analysis.weights):
            return []  # no row is read more often than another: nothing to group by
        rows, width = analysis.table.shape
        step = self.multiple or row_step(min(rows, width))
        grid = np.arange(step, (rows * width - 1) // (rows + width) + 1, step)
        some = grid[np.unique(np.linspace(0, len(grid) - 1, min(_OFFERED, len(grid))).round().astype(int))]
        offered: list[Candidate] = []
        for rank in some[::-1].tolist():  # the search may stop early: keep what is worth its numbers
            entry = self.candidate(site, analysis, (rank,))
            if not offered or _is_less(entry, offered[-1]):
                offered.append(entry)
        return [entry.ranks for entry in offered[::-1]]

    def candidate(self, site: Site, analysis: Groups, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        fit = self._fit(analysis, ranks[0])
        table = analysis.table.astype(np.float64)
        squared, lost = np.sum(table**2, axis=1), np.sum((table - fit.restored(table)) ** 2, axis=1)
        seen, count = float(analysis.counts @ squared), lookups(site)
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=fit.numbers,
            macs=None if count is None else count * sum(fit.ranks) * table.shape[1],
            nodes=len(site.uses) * (2 * sum(rank > 0 for rank in fit.ranks) + 1),
            weight_error=float(np.sqrt(lost.sum() / squared.sum())),
            output_error=float(np.sqrt(analysis.counts @ lost / seen)) if seen > 0 else 0.0,
        )

    def _fit(self, analysis: Groups, rank: int) -> RowGroups:
        rows, width = analysis.table.shape
        if rank not in analysis.fits:
            numbers = np.inf if rank == min(rows, width) else rank * (rows + width)
            analysis.fits[rank] = grouped_rows(analysis.table, analysis.weights, analysis.start, numbers, self.rounds)
        return analysis.fits[rank]

    def factorize(self, site: Site, analysis: Groups, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        fit = self._fit(analysis, candidate.ranks[0])
        used = [group for group, rank in enumerate(fit.ranks) if rank > 0]
        factors = {"basis": store(np.concatenate([fit.bases[group].T for group in used]), site)}
        for group in used:
            rows = fit.rows(analysis.table, group)
            where = np.full(len(analysis.table), len(rows), np.int32)
            where[fit.member == group] = np.arange(len(rows), dtype=np.int32)
            factors[f"map{group}"] = where
            factors[f"table{group}"] = store(np.pad(rows, [(0, 1), (0, 0)]), site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return [Replacement(use.scope, (use.node,), tuple(_nodes(site, use, factors))) for use in site.uses]

    def spell_rank(self, site: Site, analysis: Groups, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.selector is not None or wish.energy is not None:
            return f"{self.name} takes a rank or a fraction only"
        return (wish.ranks(min(analysis.table.shape)),)

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = min(as_rows(site).shape)
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return factors

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        codes = [factors[f"table{group}"][factors[f"map{group}"]].astype(np.float64) for group in _used(factors)]
        return np.concatenate(codes, axis=1) @ factors["basis"].astype(np.float64), None

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        return {site.name: Dense(as_table(site, self.effective(site, candidate, factors)[0]), {})}


def _is_less(entry: Candidate, other: Candidate) -> bool:
    """Whether a candidate costs less and loses more than another, in everything that is told."""
    cheaper = entry.parameters < other.parameters and (entry.macs or -1) < (other.macs or 0)
    return cheaper and entry.error >= other.error


def _used(factors: Factors) -> list[str]:
    """The groups that store anything, in their order."""
    return sorted(name.removeprefix("map") for name in factors if name.startswith("map"))


def _nodes(site: Site, use: Use, factors: Factors) -> list[gs.Node]:
    nodes, codes = [], []
    for group in _used(factors):
        names = [f"{site.name}/{role}{group}" for role in ("map", "table")]
        lookup, place = gathered(use, names[0], factors[f"map{group}"], gs.Variable(use.input), f"place{group}")
        read, code = gathered(use, names[1], factors[f"table{group}"], place, f"code{group}")
        nodes += [lookup, read]
        codes.append(code)
    joined = codes[0]
    if len(codes) > 1:
        joined = gs.Variable(f"{use.node}/code")
        nodes.append(gs.Node("Concat", f"{use.node}/concat", {"axis": -1}, codes, [joined]))
    basis = gs.Constant(f"{site.name}/basis", factors["basis"])
    product = gs.Node("MatMul", f"{use.node}/factor_last", {}, [joined, basis])
    return [*nodes, *rearranged(site, use, gs.Variable(f"{use.node}/rows"), product)]
