"""Fewer hidden units in a recurrent cell: the fused operator stays, only smaller.

    h = cell(x, h; W, R, B)   becomes   h ≈ g M + m,   g = cell'(x, g; W[K], R[K] Mᵀ, B[K] + R[K] m)

K are the hidden units worth keeping, h ≈ h_K M + m is the least-squares map from their states to all, the
identity for those that were kept. The recurrence is folded through it; behind the cell one product makes every
state again, so that whatever reads them, or hands them on to the next call, finds them as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.chains import store
from lowrank_onnx.decompositions.selection import UnitOrder, order_units, refit_selected
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.svd import grid_step
from lowrank_onnx.recurrent_chains import fused, stored_elements, widening
from lowrank_onnx.recurrent_statistics import read_cell
from lowrank_onnx.sites.recurrent import has_lengths

RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True, eq=False)
class DirectionUnits:
    """The units of one direction: their order, the moments of their states, and the ridge of the map.

    Attributes:
        gram: (H, H) second moment of the states, not centred.
        mean: (H,) what goes into the bias; zeros where nothing may.
    """

    order: UnitOrder
    gram: Array
    mean: Array
    ridge: float


@dataclass(frozen=True)
class RecurrentUnits(Pass):
    """Keep the hidden units whose states explain what all states do, and fold the others into them.

    Options:
        multiple: Offer only numbers of units divisible by this; 0 chooses 16 for wide cells, less for narrow.
        ridge: Of the map, in units of the mean variance of the states; 0 takes the best of a few on held-out
            samples.
        outward: How much all states count against what the recurrence makes of them, when units are chosen.
    """

    name = "recurrent_units"
    kinds = ("recurrent",)
    reference = "MoDeGPT, ICLR 2025, arXiv:2408.09632 (type I), of the states of a cell, folded into its recurrence"
    default = False
    needs_data = True
    widens: ClassVar[bool] = True
    multiple: int = 0
    ridge: float = 0.0
    outward: float = 1.0

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if not site.weight.any():
            return "weight is all zeros"
        if site.attributes["hidden"] < 2:
            return "one hidden unit only"
        for use in site.uses:
            node = site.attributes[use.node]
            if read_cell(site, node).layout == 1:
                return "the batch comes first (layout 1)"
            if len(node.output) > 2 and node.output[2]:
                return "the last cell state is read, which cannot be made of fewer units"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> tuple[DirectionUnits, ...]:
        """See Pass.analyse."""
        assert moments is not None, "needs_data"
        entry = moments[site.uses[0].input]
        assert entry.sensitivity is not None
        inputs, hidden = site.attributes["inputs"], site.attributes["hidden"]
        made = []
        for d, weight in enumerate(site.weight.astype(np.float64)):
            states = slice(inputs + d * hidden, inputs + (d + 1) * hidden)
            mean = entry.mean[states] if self._centred(site) else np.zeros(hidden)
            gram, centred = entry.gram[states, states], _around(entry, states, mean)
            felt = np.sqrt(np.maximum(entry.sensitivity[1, d], 0.0))
            own = _of_unit_energy(weight[:, inputs:].T * felt, centred)
            wanted = np.concatenate([own, self.outward * _of_unit_energy(np.eye(hidden), centred)], axis=1)
            ridge = self.ridge or self._choose_ridge(site, wanted, entry, states, mean)
            made.append(DirectionUnits(order_units(wanted, centred, ridge, self._step(site)), gram, mean, ridge))
        return tuple(made)

    def _choose_ridge(self, site: Site, wanted: Array, entry: Moments, states: slice, mean: Array) -> float:
        """The ridge whose map is best on the samples held out, with half of the units."""
        if entry.folds is None:
            return RIDGES[1]
        seen, unseen = (_around(part, states, mean) for part in entry.folds)
        half = max(len(mean) // 2, 1)
        errors = []
        for ridge in RIDGES:
            chosen = np.sort(order_units(wanted, seen, ridge, self._step(site)).order[:half])
            missed = np.array(wanted)
            missed[chosen] -= refit_selected(wanted, seen, chosen, ridge)
            errors.append(float(np.einsum("fn,fn->", missed, unseen @ missed)))
        return RIDGES[int(np.argmin(errors))]

    def _centred(self, site: Site) -> bool:
        """Whether the mean goes into the bias: where there is one, and where padding does not have to stay zero."""
        return site.attributes["bias"] is not None and not has_lengths(site)

    def _step(self, site: Site) -> int:
        return self.multiple or grid_step(site.attributes["hidden"])

    def ranks(self, site: Site, analysis: Sequence[DirectionUnits]) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks."""
        sizes = site.attributes
        gates, inputs, hidden = sizes["gates"], sizes["inputs"], sizes["hidden"]
        dense = gates * hidden * (inputs + hidden)
        step = self._step(site)
        offered = range(step, hidden, step)
        return [(k,) for k in offered if k * (gates * (inputs + k) + hidden) + hidden < dense]

    def candidate(self, site: Site, analysis: Sequence[DirectionUnits], ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (units,) = ranks
        sizes = site.attributes
        factors = self._factors(site, analysis, units)
        nodes = [node for use in site.uses for node in fused(site, use, factors).nodes]
        steps = None if site.macs is None else site.macs // site.weight.size
        work = units * (sizes["gates"] * (sizes["inputs"] + units) + sizes["hidden"]) * sizes["directions"]
        total = sum(entry.order.total for entry in analysis)
        lost = sum(entry.order.total * entry.order.relative(units) ** 2 for entry in analysis)
        return Candidate(
            site=site.name,
            technique=self.name,
            ranks=ranks,
            parameters=stored_elements(nodes),
            macs=None if steps is None else steps * work,
            nodes=len(nodes) - len(site.uses),
            weight_error=None,
            output_error=float(np.sqrt(lost / total)) if total > 0 else 0.0,
        )

    def factorize(self, site: Site, analysis: Sequence[DirectionUnits], candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        return self._factors(site, analysis, candidate.ranks[0])

    def _factors(self, site: Site, analysis: Sequence[DirectionUnits], units: int) -> Factors:
        sizes = site.attributes
        inputs, hidden, gates = sizes["inputs"], sizes["hidden"], sizes["gates"]
        chosen = np.stack([np.sort(entry.order.order[:units]) for entry in analysis])
        maps = [self._map(entry, kept) for entry, kept in zip(analysis, chosen, strict=True)]
        w, r, b = [], [], []
        for d, (kept, wide) in enumerate(zip(chosen, maps, strict=True)):
            rows = np.concatenate([kept + gate * hidden for gate in range(gates)])
            state = site.weight[d, :, inputs:].astype(np.float64)
            w.append(site.weight[d, rows, :inputs])
            r.append(state[rows] @ wide[:-1].T)
            if sizes["bias"] is not None:
                shift = state @ wide[-1]
                if site.op == "GRU" and not read_cell(site, sizes[site.uses[0].node]).linear_before_reset:
                    shift[2 * hidden :] = 0.0  # R meets the state behind the reset there, whose mean is another
                own, other = np.split(sizes["bias"][d], 2)
                b.append(np.concatenate([own[rows], (other + shift)[rows]]))
        made = {"chosen": chosen, "second": store(np.stack(w), site), "state_second": store(np.stack(r), site)}
        if b:
            made["bias"] = store(np.stack(b), site)
        wider = widening(site, np.stack(maps))
        if not self._centred(site):
            del wider["widen_bias"]
        return {**made, **wider}

    def _map(self, entry: DirectionUnits, chosen: Array) -> Array:
        """(k + 1, H) from the states of the chosen units to all; the last row is added."""
        hidden = len(entry.mean)
        centred = entry.gram - np.outer(entry.mean, entry.mean)
        made = refit_selected(np.eye(hidden), centred, chosen, entry.ridge)
        made[:, chosen] = np.eye(len(chosen))  # as it is but for rounding
        return np.concatenate([made, (entry.mean - entry.mean[chosen] @ made)[None]])

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return [fused(site, use, factors) for use in site.uses]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets."""
        return ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return factors

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective: of (x, h) side by side, the directions one after the other."""
        weight = self.dense_equivalent(site, candidate, factors)[site.name].weight
        return weight.reshape(-1, weight.shape[2]).T, None

    def spell_rank(self, site: Site, analysis: Sequence[DirectionUnits], wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a number of hidden units is no rank"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        full = site.attributes["hidden"]
        return None if len(ranks) == 1 and 1 <= ranks[0] <= full else f"expected one number of units from 1 to {full}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent: every unit runs, the dropped ones on the others' states, and is made again."""
        sizes = site.attributes
        inputs, hidden, gates = sizes["inputs"], sizes["hidden"], sizes["gates"]
        weight = site.weight.astype(np.float64)
        bias = None if sizes["bias"] is None else sizes["bias"].astype(np.float64)
        weight[:, :, inputs:] = 0.0
        behind = np.zeros((sizes["directions"], hidden + 1, hidden))
        wide = factors["widen"].reshape(sizes["directions"], -1, hidden)
        for d, kept in enumerate(factors["chosen"]):
            rows = np.concatenate([kept + gate * hidden for gate in range(gates)])
            weight[d][np.ix_(rows, inputs + kept)] = factors["state_second"][d]
            behind[d, kept] = wide[d]
            if bias is not None:
                bias[d, np.concatenate([rows, rows + gates * hidden])] = factors["bias"][d]
        if "widen_bias" in factors:
            behind[:, -1] = factors["widen_bias"].reshape(sizes["directions"], hidden)
        biases = {} if bias is None else {use.node: bias for use in site.uses}
        return {site.name: Dense(weight, biases, behind)}


def _around(part: Moments, states: slice, mean: Array) -> Array:
    """(H, H) second moment of some states around a mean."""
    crossed = np.outer(part.mean[states], mean)
    return np.asarray(part.gram[states, states] - crossed - crossed.T + np.outer(mean, mean))


def _of_unit_energy(weight: Array, gram: Array) -> Array:
    """A weight scaled so that what it makes of rows of a second moment has energy 1."""
    energy = float(np.einsum("fn,fn->", weight, gram @ weight))
    return weight / np.sqrt(energy) if energy > 0 else weight
