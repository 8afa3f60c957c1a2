"""What the techniques for recurrent cells share: the analysis, the costs, the dense equivalent."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site, Use
from lowrank_onnx.chains import store
from lowrank_onnx.decompositions.recurrent import CellBasis, CellFactors, CellMoments, decompose
from lowrank_onnx.linalg import Array, energy_rank
from lowrank_onnx.passes.svd import grid_step
from lowrank_onnx.recurrent_chains import stored_elements
from lowrank_onnx.recurrent_statistics import read_cell

RIDGES = (0.001, 0.01, 0.1, 0.3)
CAUTION = 0.1  # of the gap between samples held out and samples seen


@dataclass(frozen=True, eq=False)
class CellAnalysis:
    """Every rank of a cell, and the mean of (x, h of every direction) if it goes into the bias."""

    basis: CellBasis
    mean: Array | None


@dataclass(frozen=True)
class RecurrentPass(Pass):
    """One way to run a cell whose weights are factorized. Ranks are (rank of W, rank of R); full is dense.

    Options:
        multiple: Offer only ranks divisible by this; 0 chooses 8 or 16, less for narrow cells.
        ridge: Shrinkage towards weight-only SVD, in units of the mean variance of what the cell sees; 0 takes
            the best of a few on held-out samples.
    """

    kinds = ("recurrent",)
    takes_state: ClassVar[bool] = True
    multiple: int = 0
    ridge: float = 0.0

    @abstractmethod
    def replace(self, site: Site, use: Use, factors: Factors) -> Replacement:
        """The nodes that take the place of one use."""

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if not site.weight.any():
            return "weight is all zeros"
        if site.attributes["hidden"] < 2:
            return "one hidden unit only"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> CellAnalysis:
        """See Pass.analyse."""
        inputs = site.attributes["inputs"]
        w, r = site.weight[:, :, :inputs], site.weight[:, :, inputs:]
        if moments is None:
            return CellAnalysis(decompose(w, r, None, self.ridge), None)
        entry = moments[site.uses[0].input]
        centred = site.attributes["bias"] is not None
        ridge = self.ridge or self._choose_ridge(site, w, r, entry, centred)
        told = _cell_moments(site, entry, entry, entry.mean if centred else None)
        return CellAnalysis(decompose(w, r, told, ridge), entry.mean if centred else None)

    def _choose_ridge(self, site: Site, w: Array, r: Array, entry: Moments, centred: bool) -> float:
        """The largest ridge that is about as good as the best on the samples held out, at half of the parameters."""
        if entry.folds is None:
            return RIDGES[1]
        most, held = entry.folds
        mean = most.mean if centred else None
        seen, unseen = (_cell_moments(site, entry, part, mean) for part in (most, held))
        errors = []
        for ridge in RIDGES:
            basis = decompose(w, r, seen, ridge)
            pairs = self.ranks(site, CellAnalysis(basis, mean))
            if not pairs:
                return RIDGES[1]
            made = basis.factors(*pairs[len(pairs) // 2])
            errors.append((basis.output_error(made, unseen) or 0.0, basis.output_error(made) or 0.0))
        best, alone = min(errors)
        # Where unseen samples lose far more than seen ones, others will lose more still: take the safer ridge.
        allowed = best + CAUTION * max(best - alone, 0.0)
        return max(ridge for ridge, (error, _) in zip(RIDGES, errors, strict=True) if error <= allowed)

    def ranks(self, site: Site, analysis: CellAnalysis) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        directions, rows, _ = site.weight.shape
        inputs, hidden = site.attributes["inputs"], site.attributes["hidden"]
        return analysis.basis.path(
            self._grid(inputs, directions * rows), self._grid(hidden, rows) if self.takes_state else []
        )

    def _grid(self, narrow: int, wide: int) -> list[int]:
        step = self.multiple or grid_step(min(narrow, wide))
        return list(range(step, (narrow * wide - 1) // (narrow + wide) + 1, step))

    def candidate(self, site: Site, analysis: CellAnalysis, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        made = analysis.basis.factors(*ranks)
        own, state = _elements(made.first, made.second), _elements(made.state_first, made.state_second)
        run = own + (state if self.spells_out else analysis.basis.r.size)
        steps = None if site.macs is None else site.macs // site.weight.size
        factors = self._stored(site, analysis, made)
        nodes = [node for use in site.uses for node in self.replace(site, use, factors).nodes]
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=stored_elements(nodes),
            macs=None if steps is None else steps * run,
            nodes=len(nodes) - len(site.uses),
            weight_error=analysis.basis.weight_error(made),
            output_error=analysis.basis.output_error(made),
        )

    def factorize(self, site: Site, analysis: CellAnalysis, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return self._stored(site, analysis, analysis.basis.factors(*candidate.ranks))

    def _stored(self, site: Site, analysis: CellAnalysis, made: CellFactors) -> Factors:
        factors = {"second": store(made.second, site), "state_second": store(made.state_second, site)}
        if made.first is not None:
            factors["first"] = store(made.first, site)
        if made.state_first is not None:
            factors["state_first"] = store(made.state_first, site)
        bias = site.attributes["bias"]
        if bias is not None:
            factors["bias"] = store(bias + _shift(site, analysis, made), site)
        return factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return [self.replace(site, use, factors) for use in site.uses]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return factors

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective: of (x, h) side by side, the directions one after the other."""
        weight = joint_weight(factors)
        return weight.reshape(-1, weight.shape[2]).T, None

    def spell_rank(self, site: Site, analysis: CellAnalysis, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        full = analysis.basis.full
        if wish.selector is not None:
            return f"{self.name} offers no selector '{wish.selector.rule}'"
        if wish.energy is not None:
            sigmas = (analysis.basis.input_basis.sigma, analysis.basis.state_bases[0].sigma)
            chosen = [min(energy_rank(sigma, wish.energy), most) for sigma, most in zip(sigmas, full, strict=True)]
        else:
            chosen = [wish.ranks(most) for most in full]
        return (chosen[0], chosen[1] if self.takes_state else full[1])

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        directions, rows, _ = site.weight.shape
        inputs, hidden = site.attributes["inputs"], site.attributes["hidden"]
        full = (min(inputs, directions * rows), min(hidden, rows))
        fits = len(ranks) == 2 and all(1 <= rank <= most for rank, most in zip(ranks, full, strict=False))
        if fits and not self.takes_state and ranks[1] != full[1]:
            return f"{self.name} leaves R dense: the second rank must be {full[1]}"
        return None if fits else f"expected two ranks, of W from 1 to {full[0]} and of R from 1 to {full[1]}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        biases = {use.node: factors["bias"] for use in site.uses if "bias" in factors}
        return {site.name: Dense(joint_weight(factors), biases)}


def joint_weight(factors: Factors) -> Array:
    """(D, N, I + H) what the factors multiply out to, W and R side by side, in float64."""
    made = {name: value.astype(np.float64) for name, value in factors.items()}
    cell = CellFactors(made.get("first"), made["second"], made.get("state_first"), made["state_second"])
    return np.concatenate([cell.input_weight, cell.state_weight], axis=2)


def _elements(first: Array | None, second: Array) -> int:
    return second.size + (0 if first is None else first.size)


def _cell_moments(site: Site, entry: Moments, part: Moments, mean: Array | None) -> CellMoments:
    """Moments of some samples around a mean, with the sensitivities of all."""
    gram = part.gram
    if mean is not None:
        crossed = np.outer(part.mean, mean)
        gram = gram - crossed - crossed.T + np.outer(mean, mean)
    assert entry.sensitivity is not None
    rows = [_weights(felt) for felt in entry.sensitivity]
    return CellMoments(gram, rows[0], rows[1], _coupled(site))


def _weights(felt: Array) -> Array:
    """(D, N) sensitivities of mean 1, none so small that its row is given up; ones where none is known."""
    mean = float(felt.mean())
    if mean <= 0:
        return np.ones_like(felt)
    made = np.maximum(felt / mean, 1e-3)
    return np.asarray(made / made.mean())


def _new_state(site: Site) -> slice | None:
    """The rows of a GRU's new state, whose two parts do not simply add up; None of other cells."""
    hidden = site.attributes["hidden"]
    return slice(2 * hidden, 3 * hidden) if site.op == "GRU" else None


def _coupled(site: Site) -> Array:
    coupled = np.ones(site.weight.shape[1], bool)
    rows = _new_state(site)
    if rows is not None:
        coupled[rows] = False
    return coupled


def _shift(site: Site, analysis: CellAnalysis, made: CellFactors) -> Array | float:
    """(D, 2 N) what the bias gains so that the mean comes through."""
    if analysis.mean is None:
        return 0.0
    inputs, hidden = site.attributes["inputs"], site.attributes["hidden"]
    basis, mean = analysis.basis, analysis.mean
    own = (basis.w - made.input_weight) @ mean[:inputs]
    states = mean[inputs:].reshape(-1, hidden)
    state = np.einsum("dnh,dh->dn", basis.r - made.state_weight, states)
    rows = _new_state(site)
    cell = read_cell(site, site.attributes[site.uses[0].node])
    if rows is not None and not cell.linear_before_reset:
        state[:, rows] = 0.0  # R meets the state behind the reset there, whose mean is another
    return np.concatenate([own, state], axis=1)
