"""Low-rank factors of the weights of a recurrent cell: one input projection, one state projection a direction.

The pre-activations of direction d are ``a_d = W_d x + R_d h_d``; with z = (x, h_1, ..., h_D) observed and the
rows weighed, ``W_d x ≈ U_d (x first)`` and ``R_d h ≈ S_d (V_d h)``. The projections are the leading output
directions of each part by itself; U and S are then fitted together, so that x makes up for what the narrow
state has lost, and the other way round.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.decompositions.svd import LowRankBasis, data_aware, plain
from lowrank_onnx.linalg import Array, ridge_shift, with_ridge


@dataclass(frozen=True, eq=False)
class CellMoments:
    """Second moments of a cell's input and states, centred, and how much each row matters.

    Attributes:
        gram: (I + D H, I + D H) centred second moment of z.
        input_rows, state_rows: (D, N) weights of the rows of W and R, mean 1.
        coupled: (N,) rows whose two parts add up; those of a GRU's new state do not.
    """

    gram: Array
    input_rows: Array
    state_rows: Array
    coupled: Array


@dataclass(frozen=True, eq=False)
class CellFactors:
    """Factors of one cell; ``first`` and ``state_first`` are None where that weight stays dense.

    Attributes:
        first: (I, r) projection of the input.
        second: (D, N, r) what stands in the place of W.
        state_first: (D, s, H) projection of the state.
        state_second: (D, N, s) what stands in the place of R.
    """

    first: Array | None
    second: Array
    state_first: Array | None
    state_second: Array

    @property
    def input_weight(self) -> Array:
        """(D, N, I) what the factors multiply out to."""
        return self.second if self.first is None else self.second @ self.first.T

    @property
    def state_weight(self) -> Array:
        """(D, N, H) what the factors multiply out to."""
        return self.state_second if self.state_first is None else self.state_second @ self.state_first


@dataclass(frozen=True, eq=False)
class CellBasis:
    """Every rank of one cell.

    Attributes:
        w: (D, N, I).
        r: (D, N, H).
        moments: None without data.
        input_basis: Of all directions together.
        state_bases: One a direction.
        ridge: Of the joint fit, in units of the mean diagonal.
    """

    w: Array
    r: Array
    moments: CellMoments | None
    input_basis: LowRankBasis
    state_bases: tuple[LowRankBasis, ...]
    ridge: float

    @property
    def full(self) -> tuple[int, int]:
        """Full ranks of W and R."""
        directions, rows, inputs = self.w.shape
        return min(directions * rows, inputs), min(rows, self.r.shape[2])

    def factors(self, input_rank: int, state_rank: int) -> CellFactors:
        """Factors at two ranks; full rank leaves that weight dense."""
        directions, rows, _ = self.w.shape
        first, second = None, self.w
        if input_rank < self.full[0]:
            first, right = self.input_basis.factors(input_rank)
            scale = 1.0 if self.moments is None else np.sqrt(self.moments.input_rows)[..., None]
            second = right.T.reshape(directions, rows, input_rank) / scale
        state_first, state_second = None, self.r
        if state_rank < self.full[1]:
            pairs = [basis.factors(state_rank) for basis in self.state_bases]
            state_first = np.stack([pair[0].T for pair in pairs])
            scale = 1.0 if self.moments is None else np.sqrt(self.moments.state_rows)[..., None]
            state_second = np.stack([pair[1].T for pair in pairs]) / scale
        made = CellFactors(first, second, state_first, state_second)
        if self.moments is None or (first is None and state_first is None):
            return made
        return self._fitted(made, self.moments)

    def _fitted(self, made: CellFactors, moments: CellMoments) -> CellFactors:
        """Fit both outer factors together on the rows whose parts add up."""
        inputs, hidden = self.w.shape[2], self.r.shape[2]
        coupled = moments.coupled
        seconds, state_seconds = made.second.copy(), made.state_second.copy()
        into = None if made.first is None else made.first.T
        for d in range(len(self.w)):
            state = None if made.state_first is None else made.state_first[d]
            gram = direction_gram(moments.gram, inputs, hidden, d)
            projected = _on_both(into, state, gram, inputs)  # (r + s, I + H)
            inner = _on_both(into, state, projected.T, inputs)
            before = np.concatenate([made.second[d], made.state_second[d]], axis=1)[coupled]
            wanted = np.concatenate([self.w[d], self.r[d]], axis=1)[coupled] @ projected.T
            pull = ridge_shift(inner, self.ridge) * before
            fitted = scipy.linalg.solve(with_ridge(inner, self.ridge), (wanted + pull).T, assume_a="pos").T
            own = inputs if into is None else len(into)
            seconds[d][coupled] = fitted[:, :own]
            state_seconds[d][coupled] = fitted[:, own:]
        return CellFactors(made.first, seconds, made.state_first, state_seconds)

    def path(self, input_ranks: Sequence[int], state_ranks: Sequence[int]) -> list[tuple[int, int]]:
        """Pairs of ranks from small to full, without the last: each step up takes most error off per parameter.

        Args:
            input_ranks, state_ranks: The ranks on offer, rising; full rank is added.
        """
        directions, rows, inputs = self.w.shape
        hidden = self.r.shape[2]
        ladders = [
            [(rank, rank * (inputs + directions * rows)) for rank in input_ranks] + [(self.full[0], self.w.size)],
            [(rank, rank * directions * (hidden + rows)) for rank in state_ranks] + [(self.full[1], self.r.size)],
        ]
        at = [len(ladders[0]) - 1, len(ladders[1]) - 1]
        pairs: list[tuple[int, int]] = []
        while any(at):
            slopes = []
            for side in (0, 1):
                if at[side] == 0:
                    continue
                (rank, cost), (lower, less) = ladders[side][at[side]], ladders[side][at[side] - 1]
                slopes.append(((self._left(side, lower) - self._left(side, rank)) / (cost - less), side))
            at[min(slopes)[1]] -= 1
            pairs.append((ladders[0][at[0]][0], ladders[1][at[1]][0]))
        return pairs[::-1]

    def _left(self, side: int, rank: int) -> float:
        """Squared error that a rank of W (0) or R (1) leaves, by itself."""
        if rank >= self.full[side]:
            return 0.0
        bases = (self.input_basis,) if side == 0 else self.state_bases
        total = 0.0
        for basis in bases:
            tail = basis.weights if basis.output is None else basis.output
            assert tail is not None
            total += max(float(tail.left[rank]), 0.0)
        return total

    def output_error(self, made: CellFactors, moments: CellMoments | None = None) -> float | None:
        """Relative error of the pre-activations, rows weighed; None without data.

        Args:
            moments: Of other data than the basis was made from.
        """
        moments = moments or self.moments
        if moments is None:
            return None
        lost = self._energy(self.w - made.input_weight, self.r - made.state_weight, moments)
        total = self._own_energy if moments is self.moments else self._energy(self.w, self.r, moments)
        return float(np.sqrt(max(lost, 0.0) / total)) if total > 0 else 0.0

    def weight_error(self, made: CellFactors) -> float:
        """Relative Frobenius error of W and R together."""
        lost = np.linalg.norm(self.w - made.input_weight) ** 2 + np.linalg.norm(self.r - made.state_weight) ** 2
        total = np.linalg.norm(self.w) ** 2 + np.linalg.norm(self.r) ** 2
        return float(np.sqrt(lost / total)) if total > 0 else 0.0

    @functools.cached_property
    def _own_energy(self) -> float:
        assert self.moments is not None
        return self._energy(self.w, self.r, self.moments)

    def _energy(self, w: Array, r: Array, moments: CellMoments) -> float:
        inputs, hidden = w.shape[2], r.shape[2]
        total = 0.0
        for d in range(len(w)):
            gram = direction_gram(moments.gram, inputs, hidden, d)
            own, state = gram[:inputs, :inputs], gram[inputs:, inputs:]
            a, b = np.sqrt(moments.input_rows[d])[:, None] * w[d], np.sqrt(moments.state_rows[d])[:, None] * r[d]
            total += float(np.vdot(a @ own, a) + np.vdot(b @ state, b))
            mixed = (a @ gram[:inputs, inputs:])[moments.coupled]
            total += 2 * float(np.vdot(mixed, b[moments.coupled]))
        return total


def _on_both(into: Array | None, state: Array | None, values: Array, inputs: int) -> Array:
    """The first rows multiplied by ``into``, the others by ``state``; None for the identity."""
    upper, lower = values[:inputs], values[inputs:]
    return np.concatenate([upper if into is None else into @ upper, lower if state is None else state @ lower])


def direction_gram(gram: Array, inputs: int, hidden: int, direction: int) -> Array:
    """The part of the second moment of z that one direction sees, (I + H, I + H)."""
    start = inputs + direction * hidden
    places = np.r_[0:inputs, start : start + hidden]
    return np.asarray(gram[np.ix_(places, places)])


def decompose(w: Array, r: Array, moments: CellMoments | None, ridge: float) -> CellBasis:
    """Return every rank of a cell.

    Args:
        w: (D, N, I).
        r: (D, N, H).
        moments: Of its data; None truncates the weights alone.
        ridge: In units of the mean diagonal of the second moments.

    Source: output principal components with weighted rows; shared projections after Prabhavalkar et al. 2016,
    arXiv:1603.08042, without training.
    """
    w, r = np.asarray(w, np.float64), np.asarray(r, np.float64)
    inputs, hidden = w.shape[2], r.shape[2]
    stacked = w.reshape(-1, inputs).T  # (I, D N)
    if moments is None:
        return CellBasis(w, r, None, plain(stacked), tuple(plain(part.T) for part in r), ridge)
    rows = np.sqrt(moments.input_rows)
    into = data_aware(stacked * rows.reshape(-1), moments.gram[:inputs, :inputs], ridge)
    states = []
    for d, part in enumerate(r):
        gram = direction_gram(moments.gram, inputs, hidden, d)[inputs:, inputs:]
        states.append(data_aware(part.T * np.sqrt(moments.state_rows[d]), gram, ridge))
    return CellBasis(w, r, moments, into, tuple(states), ridge)
