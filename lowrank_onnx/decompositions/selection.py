"""Select hidden units, and refit the layer that reads them: ``y = h @ W`` from a subset of h."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array, with_ridge


@dataclass(frozen=True, eq=False)
class UnitOrder:
    """Hidden units in the order in which they are worth keeping.

    Attributes:
        order: (F,) indices, the most useful first.
        counts: The numbers of units for which the error is known, rising; the last is F.
        output: Squared output error at each of ``counts``, after the best refit.
        total: What the squared errors are relative to.
    """

    order: Array
    counts: tuple[int, ...]
    output: tuple[float, ...]
    total: float

    def relative(self, units: int) -> float:
        """Relative output error of the first ``units`` units; between two counts that of the smaller."""
        place = bisect.bisect_right(self.counts, units) - 1
        if place < 0 or self.total <= 0:
            return 1.0 if place < 0 else 0.0
        return float(np.sqrt(self.output[place] / self.total))


_BLOCK = 16  # units chosen per step; the scores hardly change within one


def order_units(weight: Array, gram: Array, ridge: float, step: int = 8, energy: float | None = None) -> UnitOrder:
    """Order hidden units greedily by how much output error each takes away.

    With R the part of the second moment that the chosen units do not explain, the next unit is the one with
    the largest ``|R[:, j] W|² / R[j, j]``; R is never formed, only its product with W and the columns of the
    chosen units, a block at a time.

    Args:
        weight: (F, N) of the layer that reads the units.
        gram: (F, F) second moment of the units, centred or not.
        ridge: In units of the mean diagonal.
        step: The error is told for multiples of this.
        energy: What errors are relative to; E|h W|² if None.

    Source: greedy subset selection for least squares, as a pivoted block Cholesky.
    """
    units = len(gram)
    weight = np.asarray(weight, np.float64)
    moment = with_ridge(gram, ridge)
    rest = moment @ weight  # (F, N) R W
    diagonal = np.diag(moment).copy()
    # Units that never change have no variance left; the floor keeps the corner definite.
    floor = max(1e-10 * float(diagonal.max(initial=0.0)), np.finfo(np.float64).tiny ** 0.5)
    factor = np.zeros((units, units))  # columns of the Cholesky factor, in order of choice
    chosen = np.zeros(units, bool)
    order: list[int] = []
    objective = {}
    while len(order) < units:
        score = np.where(chosen, -1.0, np.einsum("fn,fn->f", rest, rest) / np.maximum(diagonal, floor))
        done = len(order)
        size = min(_BLOCK, units - done, step - done % step)
        picked = np.sort(np.argsort(-score, kind="stable")[:size])
        columns = moment[:, picked] - factor[:, :done] @ factor[picked, :done].T  # (F, size) R[:, picked]
        root = _root(columns[picked], floor)
        part = scipy.linalg.solve_triangular(root, columns.T, lower=True).T  # (F, size)
        factor[:, done : done + size] = part
        rest -= part @ scipy.linalg.solve_triangular(root, rest[picked], lower=True)
        diagonal -= np.einsum("fs,fs->f", part, part)
        chosen[picked] = True
        order += picked.tolist()
        objective[len(order)] = float(np.einsum("fn,fn->", weight, rest))
    places = np.array(order)
    total = float(np.einsum("fn,fn->", weight, gram @ weight)) if energy is None else energy
    counts = (*range(step, units, step), units)
    penalty = ridge * float(np.trace(gram)) / units  # 0 leaves units without variance a factor of zeros
    output = [
        max(objective[count] - (penalty * _departure(factor[places], weight[places], count) if penalty else 0.0), 0.0)
        for count in counts
    ]
    falling = np.minimum.accumulate([*output[:-1], 0.0])
    return UnitOrder(places, counts, tuple(float(value) for value in falling), total)


def _root(corner: Array, floor: float) -> Array:
    """Lower Cholesky factor of what is left of a few units; lifted until rounding does not matter."""
    while True:
        try:
            return np.asarray(scipy.linalg.cholesky(corner + floor * np.eye(len(corner)), lower=True))
        except np.linalg.LinAlgError:
            floor *= 100


def _departure(factor: Array, weight: Array, count: int) -> float:
    """How far the ridge lets the refit move: ``|W - W'|²``, all in order of choice.

    With L the Cholesky factor, the refit adds ``L11⁻ᵀ L21ᵀ W_rest`` to the weights of the chosen units.
    """
    left = weight[count:]
    moved = scipy.linalg.solve_triangular(factor[:count, :count].T, factor[count:, :count].T @ left, lower=False)
    return float(np.vdot(moved, moved) + np.vdot(left, left))


def refit_selected(weight: Array, gram: Array, chosen: Array, ridge: float) -> Array:
    """Return the (k, N) weight that best gives ``h @ weight`` from ``h[chosen]``.

    Args:
        weight: (F, N).
        gram: (F, F) of h.
        chosen: (k,) indices.
        ridge: In units of the mean diagonal of gram.
    """
    penalty = ridge * float(np.trace(gram)) / len(gram)
    left = gram[np.ix_(chosen, chosen)] + penalty * np.eye(len(chosen))
    right = gram[chosen] @ weight + penalty * weight[chosen]
    try:
        return np.asarray(scipy.linalg.solve(left, right, assume_a="pos"))
    except np.linalg.LinAlgError:
        return np.asarray(scipy.linalg.lstsq(left, right)[0])
