"""Tensor train of a table of embeddings: a core for every digit of the row number.

    Gather(E, i)   becomes   G1[p_1] @ G2[p_2] ...,   p = map[i],  p = p_1 m_2 m_3 ... + p_2 m_3 ... + ...

The map tells where row i lies in the sorted table; its digits are computed in the graph. Whoever uses the
model goes on with the numbers of the tokens as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Candidate, Counts, Dense, Factors, Moments, Pass, RankWish, Replacement, Site, Use
from lowrank_onnx.chains import balanced, store
from lowrank_onnx.decompositions.rows import pseudo_count
from lowrank_onnx.decompositions.table_train import TableTrain, full_ranks, split_table, table_train
from lowrank_onnx.decompositions.tensor_train import tt_matrix_to_dense
from lowrank_onnx.linalg import Array
from lowrank_onnx.lookups import as_rows, as_table, gathered, lookups, pooled_counts, rearranged
from lowrank_onnx.passes.embedding import refuse_table, row_step

_OFFERED = 10  # ranks; the error of each is that of a whole table made anew


@dataclass(frozen=True, eq=False)
class Sorted:
    """The analysis of one site: the table, counts of its rows, its trains, and their errors by rank.

    ``counts`` is None without data.
    """

    table: Array
    counts: Array | None
    train: TableTrain
    lost: dict[tuple[int, ...], Array] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorTrainEmbedding(Pass):
    """Rows as products of cores by digits; rows that are read often share cores with each other only.

    Options:
        multiple: Offer only ranks divisible by this; 0 chooses 8 for wide tables, less for narrow ones.
        cores: Into how many digits rows and features are split.
        smoothing: Lookups added to the count of every row; 0 chooses on held-out calibration data.
    """

    name = "tensor_train"
    kinds = ("embedding",)
    reference = "Oseledets 2011, doi:10.1137/090752286; of tables: TT-Rec 2021, arXiv:2101.11714"
    default = False
    multiple: int = 0
    cores: int = 2
    smoothing: float = 1.0

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        rows, width = as_rows(site).shape
        if min(rows, width) >= 2 and rows < 2**self.cores:
            return f"the table has {rows} rows, too few for {self.cores} digits"
        return refuse_table(site)

    def analyse(self, site: Site, moments: Mapping[str, Counts] | None) -> Sorted:
        """See Pass.analyse."""
        table = as_rows(site)
        if moments is None:
            return Sorted(table, None, table_train(table, np.ones(len(table)), self.cores))
        counts = pooled_counts(site, moments)
        weights = counts.total + (self.smoothing or pseudo_count(counts.total, counts.held))
        return Sorted(table, counts.total.astype(np.float64), table_train(table, weights, self.cores))

    def ranks(self, site: Site, analysis: Sorted) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        full = analysis.train.full()
        step = self.multiple or row_step(min(full))
        grid = dict.fromkeys(
            tuple(max(round(most * share / step) * step, min(step, most)) for most in full)
            for share in np.arange(1, 4 * _OFFERED + 1) / (4 * _OFFERED)
        )
        below = [ranks for ranks in grid if self._numbers(analysis, ranks) < analysis.table.size]
        offered: list[Candidate] = []
        for place in np.unique(np.linspace(0, len(below) - 1, min(_OFFERED, len(below))).round().astype(int)):
            entry = self.candidate(site, analysis, below[place])
            if not offered or entry.error < offered[-1].error:  # the cut is the best for weights, not for counts
                offered.append(entry)
        return [entry.ranks for entry in offered]

    def candidate(self, site: Site, analysis: Sorted, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        if ranks not in analysis.lost:
            made = analysis.train.restored(analysis.train.cores(ranks))
            analysis.lost[ranks] = np.sum((analysis.table - made) ** 2, axis=1)
        squared, lost = np.sum(analysis.table.astype(np.float64) ** 2, axis=1), analysis.lost[ranks]
        output_error, count = None, lookups(site)
        if analysis.counts is not None:
            seen = float(analysis.counts @ squared)
            output_error = float(np.sqrt(analysis.counts @ lost / seen)) if seen > 0 else 0.0
        digits = len(analysis.train.rows)
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=self._numbers(analysis, ranks),
            macs=None if count is None else count * _products(analysis.train.columns, ranks),
            nodes=len(site.uses) * (1 + 5 * (digits - 1) + digits + 3),
            weight_error=float(np.sqrt(lost.sum() / squared.sum())),
            output_error=output_error,
        )

    def factorize(self, site: Site, analysis: Sorted, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        cores = analysis.train.cores(candidate.ranks)
        if site.weight.dtype == np.float16:
            cores = _balanced(cores)
        factors: dict[str, Array] = {"map": analysis.train.place}
        for place, core in enumerate(cores):  # the digit of the row first: what a lookup finds is a matrix
            turned = core.transpose(1, 2, 0, 3) if place == 0 else core.transpose(1, 0, 2, 3)
            shape = (core.shape[1], core.shape[2], -1) if place == 0 else (core.shape[1], core.shape[0], -1)
            factors[f"core{place}"] = store(turned.reshape(shape), site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return [Replacement(use.scope, (use.node,), tuple(_nodes(site, use, candidate, factors))) for use in site.uses]

    def spell_rank(self, site: Site, analysis: Sorted, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        if wish.selector is not None or wish.energy is not None:
            return f"{self.name} takes a rank or a fraction only"
        return tuple(wish.ranks(most) for most in analysis.train.full())

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        rows, width = as_rows(site).shape
        full = full_ranks(*split_table(rows, width, self.cores))
        if len(ranks) == len(full) and all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True)):
            return None
        return f"expected {len(full)} rank(s) from 1 to {list(full)}"

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return factors

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        bonds = (1, *candidate.ranks, 1)
        cores = []
        for place, (before, after) in enumerate(pairwise(bonds)):
            stored = factors[f"core{place}"].astype(np.float64)
            cores.append(stored.reshape(len(stored), before, -1, after).transpose(1, 0, 2, 3))
        return tt_matrix_to_dense(cores)[factors["map"]], None

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        return {site.name: Dense(as_table(site, self.effective(site, candidate, factors)[0]), {})}

    def _numbers(self, analysis: Sorted, ranks: tuple[int, ...]) -> int:
        """Elements of all cores, rows of padding included."""
        bonds = (1, *ranks, 1)
        sizes = [m * n for m, n in zip(analysis.train.rows, analysis.train.columns, strict=True)]
        return sum(low * size * high for low, size, high in zip(bonds, sizes, bonds[1:], strict=False))


def _products(columns: Sequence[int], ranks: tuple[int, ...]) -> int:
    """Multiply-accumulates of one lookup, from the first core on."""
    bonds = (*ranks, 1)
    return sum(prod(columns[: k + 1]) * bonds[k] * columns[k + 1] * bonds[k + 1] for k in range(len(ranks)))


def _balanced(cores: Sequence[Array]) -> list[Array]:
    """Cores of about equal scale, so that half precision does not overflow."""
    made = list(cores)
    for place in range(len(made) - 1):
        first, second = made[place], made[place + 1]
        left, right = balanced(first.reshape(-1, first.shape[-1]), second.reshape(len(second), -1))
        made[place], made[place + 1] = left.reshape(first.shape), right.reshape(second.shape)
    return made


def _nodes(site: Site, use: Use, candidate: Candidate, factors: Factors) -> list[gs.Node]:
    """Place, digits, one lookup in every core, and their products as rows."""
    cores = [factors[f"core{place}"] for place in range(len(candidate.ranks) + 1)]
    lookup, rest = gathered(use, f"{site.name}/map", factors["map"], gs.Variable(use.input), "place")
    nodes, found = [lookup], []

    def step(op: str, name: str, inputs: Sequence[gs.Tensor], **attributes: object) -> gs.Variable:
        made = gs.Variable(f"{use.node}/{name}")
        nodes.append(gs.Node(op, f"{use.node}/{op.lower()}_{name}", attributes, list(inputs), [made]))
        return made

    for place, core in enumerate(cores):
        digit = rest
        if place + 1 < len(cores):  # the quotient is the digit, the remainder the place among those behind
            behind = gs.Constant(f"{use.node}/behind{place}", np.array(prod(map(len, cores[place + 1 :])), np.int32))
            digit = step("Div", f"digit{place}", [rest, behind])
            rest = step("Sub", f"rest{place}", [rest, step("Mul", f"whole{place}", [digit, behind])])
        lookup, core_rows = gathered(use, f"{site.name}/core{place}", core, digit, f"core{place}")
        nodes.append(lookup)
        found.append(core_rows)
    lead = step("Shape", "lead", [gs.Variable(use.input)])
    current, width = found[0], cores[0].shape[1]
    for place, core_rows in enumerate(found[1:], start=1):
        current = step("MatMul", f"product{place}", [current, core_rows])
        if place + 1 < len(found):  # (*indices, n, n' r) -> (*indices, n n', r)
            # Told in full: -1 is not defined where there are no indices.
            width *= cores[place].shape[2] // candidate.ranks[place]
            columns = gs.Constant(f"{use.node}/columns{place}", np.array([width, candidate.ranks[place]], np.int64))
            target = step("Concat", f"target{place}", [lead, columns], axis=0)
            current = step("Reshape", f"columns_of{place}", [current, target])
    features = gs.Constant(f"{use.node}/features", np.array([as_rows(site).shape[1]], np.int64))
    target = step("Concat", "target", [lead, features], axis=0)
    last = gs.Node("Reshape", f"{use.node}/reshape_rows", {}, [current, target])
    return [*nodes, *rearranged(site, use, gs.Variable(f"{use.node}/rows"), last)]
