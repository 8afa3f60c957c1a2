"""A table of embeddings that is the output head as well: two thin factors, stored once, for both uses.

Gather(E, i)  becomes  Gather(A, i) @ B          A (V, r), B (r, D)
h Eᵀ          becomes  (h @ Bᵀ) @ Aᵀ
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Candidate, Counts, Dense, Factors, Moments, Pass, RankWish, Replacement, Site, Use
from lowrank_onnx.chains import balanced, store
from lowrank_onnx.decompositions.rows import gram_of, pseudo_count
from lowrank_onnx.decompositions.tied_rows import TiedBasis, tied_basis
from lowrank_onnx.linalg import Array
from lowrank_onnx.lookups import as_table, gathered, lookups, pooled_counts, rearranged
from lowrank_onnx.passes.embedding import refuse_table, row_step
from lowrank_onnx.passes.svd import pooled, product_of


@dataclass(frozen=True, eq=False)
class Analysis:
    """Projections of every rank, and whether data tell of both uses."""

    basis: TiedBasis
    seen: bool


@dataclass(frozen=True)
class Tied(Pass):
    """One thin table for the lookup and for the head that reads it transposed.

    Options:
        multiple: Offer only ranks divisible by this; 0 chooses 8 for wide tables, less for narrow ones.
        smoothing: Lookups added to the count of every row; 0 chooses on held-out calibration data.
    """

    name = "tied"
    kinds = ("tied",)
    reference = "GroupReduce, NeurIPS 2018, arXiv:1806.06950, with what the head reads and predicts as a second metric"
    multiple: int = 0
    smoothing: float = 0.0

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        table, head = site.attributes["parts"]
        if head.attributes["side"] != "right" or head.attributes["data_transposed"]:
            return "the head reads its data transposed"
        if any(use.dynamic_bias for use in head.uses):
            return "the bias of the head is not constant"
        return refuse_table(table)

    def analyse(self, site: Site, moments: Mapping[str, Moments | Counts] | None) -> Analysis:
        """See Pass.analyse."""
        table, head = site.attributes["parts"]
        rows, width = site.weight.shape
        gram = gram_of(site.weight, np.ones(rows))
        middle = max(rows * width // (rows + width) // 2, 1)
        if moments is None:
            return Analysis(tied_basis(gram, gram, np.eye(width), middle), False)
        counts = pooled_counts(table, {use.input: _counts(moments[use.input]) for use in table.uses})
        weights = counts.total + (self.smoothing or pseudo_count(counts.total, counts.held))
        hidden = pooled(head, {use.input: _moments(moments[use.input]) for use in head.uses}, centred=False)
        asked = gram_of(site.weight, counts.total.astype(np.float64))
        spread = _moments(moments[head.uses[0].input]).spread if len(head.uses) == 1 else None
        return Analysis(tied_basis(gram_of(site.weight, weights), gram, hidden.gram, middle, asked, spread), True)

    def ranks(self, site: Site, analysis: Analysis) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        rows, width = site.weight.shape
        step = self.multiple or row_step(min(rows, width))
        most = min((rows * width - 1) // (rows + width), width)
        return [(rank,) for rank in range(step, most + 1, step)]

    def candidate(self, site: Site, analysis: Analysis, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (rank,) = ranks
        table, head = site.attributes["parts"]
        rows, width = site.weight.shape
        count = lookups(table)
        macs = None
        if count is not None and head.macs is not None:
            macs = count * rank * width + head.macs // width * rank + head.macs // rows * rank
        lost = np.eye(width) - analysis.basis.into[:, :rank] @ analysis.basis.back[:rank]
        squared = float(np.vdot(lost, analysis.basis.table_gram @ lost) / np.trace(analysis.basis.table_gram))
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=rank * (rows + width),
            macs=macs,
            nodes=len(table.uses) + 3 * len(head.uses),
            weight_error=float(np.sqrt(max(squared, 0.0))),
            output_error=analysis.basis.error(rank) if analysis.seen else None,
        )

    def factorize(self, site: Site, analysis: Analysis, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        (rank,) = candidate.ranks
        first, second = balanced(
            site.weight.astype(np.float64) @ analysis.basis.into[:, :rank], analysis.basis.back[:rank]
        )
        return {"first": store(first, site), "second": store(second, site)}

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        table, head = site.attributes["parts"]
        made = []
        for use in table.uses:
            lookup, thin = gathered(use, f"{site.name}/first", factors["first"], gs.Variable(use.input), "rank")
            second = gs.Constant(f"{site.name}/second", factors["second"])
            product = gs.Node("MatMul", f"{use.node}/factor_last", {}, [thin, second])
            nodes = [lookup, *rearranged(table, use, gs.Variable(f"{use.node}/rows"), product)]
            made.append(Replacement(use.scope, (use.node,), tuple(nodes)))
        return [*made, *(_head(site, head, use, factors) for use in head.uses)]

    def spell_rank(self, site: Site, analysis: Analysis, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a fixed rank is carried out use by use"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = site.weight.shape[1]
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one rank from 1 to {full}"

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return ()  # a refit of the head would untie the table

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return factors

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        return product_of(factors), None

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        table, head = site.attributes["parts"]
        rows = product_of(factors)
        return {table.name: Dense(as_table(table, rows), {}), head.name: Dense(rows.T, {})}


def _head(site: Site, head: Site, use: Use, factors: Factors) -> Replacement:
    """``x @ Bᵀ @ Aᵀ``, from the constants the lookup reads; a bias stays where it is."""
    extra = head.attributes[use.node]
    first, second = (gs.Constant(f"{site.name}/{role}", factors[role]) for role in ("first", "second"))
    source, thin = gs.Variable(use.input), gs.Variable(f"{use.node}/rank")
    name = f"{use.node}/factor"
    if extra["op"] == "Gemm":
        addend = [gs.Variable(extra["addend"])] if extra["addend"] else []
        nodes = [
            gs.Node("Gemm", f"{name}0", {"transB": 1}, [source, second], [thin]),
            gs.Node("Gemm", f"{name}_last", {"transB": 1, "beta": extra["beta"]}, [thin, first, *addend],
                    [gs.Variable(use.raw_output)]),
        ]  # fmt: skip
        return Replacement(use.scope, (use.node,), tuple(nodes))
    nodes = []
    turned = []
    for constant, role in ((second, "second"), (first, "first")):
        turned.append(gs.Variable(f"{use.node}/{role}_turned"))
        nodes.append(gs.Node("Transpose", f"{use.node}/turn_{role}", {"perm": [1, 0]}, [constant], [turned[-1]]))
    nodes.append(gs.Node("MatMul", f"{name}0", {}, [source, turned[0]], [thin]))
    nodes.append(gs.Node("MatMul", f"{name}_last", {}, [thin, turned[1]], [gs.Variable(use.raw_output)]))
    return Replacement(use.scope, (use.node,), tuple(nodes))


def _counts(seen: Moments | Counts) -> Counts:
    assert isinstance(seen, Counts)
    return seen


def _moments(seen: Moments | Counts) -> Moments:
    assert isinstance(seen, Moments)
    return seen
