"""A table of embeddings as a thin table and one small product behind the lookup.

    Gather(E, i)   becomes   Gather(A, i) @ B,   A (V, r), B (r, F)

With data the rows count by how often they are looked up, smoothed so that those never seen keep a share;
without data every row counts alike. It saves parameters and costs multiply-accumulates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Candidate, Counts, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import balanced, store
from lowrank_onnx.decompositions.rows import RowBasis, pseudo_count, weighted_rows
from lowrank_onnx.linalg import Array, energy_rank
from lowrank_onnx.lookups import as_rows, as_table, gathered, is_plain, lookups, pooled_counts, rearranged
from lowrank_onnx.passes.svd import product_of

WIDEST = 16384  # features of a row; the second moment of wider ones takes more than 2 GiB


@dataclass(frozen=True)
class Embedding(Pass):
    """Gather(E, i) ≈ Gather(A, i) B, the best rank-r table for the tokens the data show, or for all alike.

    Options:
        multiple: Offer only ranks divisible by this; 0 chooses 8 for wide tables, less for narrow ones.
        smoothing: Lookups added to the count of every row; 0 chooses on held-out calibration data.
    """

    name = "embedding"
    kinds = ("embedding",)
    reference = "Eckart & Young 1936 weighted by frequency; GroupReduce, NeurIPS 2018, arXiv:1806.06950"
    multiple: int = 0
    smoothing: float = 0.0

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        return refuse_table(site)

    def analyse(self, site: Site, moments: Mapping[str, Counts] | None) -> RowBasis:
        """See Pass.analyse."""
        table = as_rows(site)
        if moments is None:
            return weighted_rows(table)
        counts = pooled_counts(site, moments)
        added = self.smoothing or pseudo_count(counts.total, counts.held)
        return weighted_rows(table, counts.total + added, counts.total.astype(np.float64))

    def ranks(self, site: Site, analysis: RowBasis) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        rows, width = analysis.table.shape
        step = self.multiple or row_step(min(rows, width))
        return [(rank,) for rank in range(step, (rows * width - 1) // (rows + width) + 1, step)]

    def candidate(self, site: Site, analysis: RowBasis, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (rank,) = ranks
        rows, width = analysis.table.shape
        count = lookups(site)
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=rank * (rows + width),
            macs=None if count is None else count * rank * width,
            nodes=len(site.uses) * (1 if is_plain(site) else 3),
            weight_error=analysis.plain.relative(rank),
            output_error=None if analysis.weighted is None else analysis.weighted.relative(rank),
        )

    def factorize(self, site: Site, analysis: RowBasis, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        first, second = analysis.factors(candidate.ranks[0])
        if site.weight.dtype == np.float16:
            first, second = balanced(first, second)
        return {"first": store(first, site), "second": store(second, site)}

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        replacements = []
        for use in site.uses:
            indices = gs.Variable(use.input)
            lookup, thin = gathered(use, f"{site.name}/first", factors["first"], indices, "rank")
            second = gs.Constant(f"{site.name}/second", factors["second"])
            product = gs.Node("MatMul", f"{use.node}/factor_last", {}, [thin, second])
            nodes = [lookup, *rearranged(site, use, gs.Variable(f"{use.node}/rows"), product)]
            replacements.append(Replacement(use.scope, (use.node,), tuple(nodes)))
        return replacements

    def spell_rank(self, site: Site, analysis: RowBasis, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.selector is not None:
            return f"{self.name} offers no selector '{wish.selector.rule}'"
        rows, width = analysis.table.shape
        if wish.energy is not None:
            rank, most = energy_rank(analysis.sigma, wish.energy), (rows * width - 1) // (rows + width)
            return (rank,) if rank <= most else f"rank {rank} for energy {wish.energy:g} is past break-even {most}"
        return (wish.ranks(min(rows, width)),)

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = min(as_rows(site).shape)
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return ()  # what goes in are indices, which the layers before do not change

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return factors

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return product_of(factors), None

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        return {site.name: Dense(as_table(site, product_of(factors)), {})}


def refuse_table(site: Site) -> str | None:
    """Why a table cannot be factorized; None if it can."""
    rows, width = as_rows(site).shape
    if min(rows, width) < 2:
        return f"the table has {rows} rows of {width}: no rank below full"
    if width > WIDEST:
        return f"a row of the table has {width} elements, more than {WIDEST}"
    if not site.weight.any():
        return "weight is all zeros"
    if not is_plain(site) and any(use.input_shape is None for use in site.uses):
        return "the number of axes of the indices is unknown, which a table of this layout needs"
    return None


def row_step(width: int) -> int:
    """Step of the rank grid: a size counts here, no kernel, so finer than that of a layer."""
    return 8 if width >= 64 else 4 if width >= 32 else 2 if width >= 16 else 1
