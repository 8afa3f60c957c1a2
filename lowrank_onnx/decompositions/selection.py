"""Select hidden units, and refit the layer that reads them: ``y = h @ W`` from a subset of h."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array, ridge_shift, with_ridge


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


_BLOCK = 16  # most units chosen per step, the first ones one by one: scores hardly change within a few of many
_SHARE = 96  # where that many steps of the block are done, steps grow with what is chosen


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
    lengths = np.einsum("fn,fn->f", rest, rest)
    left = float(np.einsum("fn,fn->", weight, rest))  # tr WᵀRW
    diagonal = np.diag(moment).copy()
    # Units that never change have no variance left; the floor keeps the corner definite.
    floor = max(1e-10 * float(diagonal.max(initial=0.0)), np.finfo(np.float64).tiny ** 0.5)
    factor = np.zeros((units, units))  # columns of the Cholesky factor, in order of choice
    chosen = np.zeros(units, bool)
    order: list[int] = []
    objective = {}
    while len(order) < units:
        score = np.where(chosen, -1.0, lengths / np.maximum(diagonal, floor))
        done = len(order)
        size = min(max(1, min(_BLOCK, done // 8), done // _SHARE), units - done, step - done % step)
        picked = np.sort(np.argsort(-score, kind="stable")[:size])
        columns = moment[:, picked] - factor[:, :done] @ factor[picked, :done].T  # (F, size) R[:, picked]
        root = _root(columns[picked], floor)
        part = scipy.linalg.solve_triangular(root, columns.T, lower=True).T  # (F, size)
        explained = scipy.linalg.solve_triangular(root, rest[picked], lower=True)  # (size, N) partᵀ W
        factor[:, done : done + size] = part
        # |R W|² row by row follows the change of R W, which is read and written once: large layers wait for memory.
        lengths -= np.einsum("fs,fs->f", part, 2 * (rest @ explained.T) - part @ (explained @ explained.T))
        rest = _subtract(rest, part, explained)
        left -= float(np.vdot(explained, explained))
        diagonal -= np.einsum("fs,fs->f", part, part)
        chosen[picked] = True
        order += picked.tolist()
        objective[len(order)] = left
    places = np.array(order)
    total = float(np.einsum("fn,fn->", weight, gram @ weight)) if energy is None else energy
    counts = (*range(step, units, step), units)
    penalty = ridge_shift(gram, ridge)  # 0 leaves units without variance a factor of zeros
    departures = _departures(factor[places], weight[places], counts) if penalty else [0.0] * len(counts)
    output = [
        max(objective[count] - penalty * departure, 0.0) for count, departure in zip(counts, departures, strict=True)
    ]
    falling = np.minimum.accumulate([*output[:-1], 0.0])
    return UnitOrder(places, counts, tuple(float(value) for value in falling), total)


def _subtract(rest: Array, left: Array, right: Array) -> Array:
    """``rest - left @ right``, in the place of rest."""
    return np.asarray(scipy.linalg.blas.dgemm(-1.0, right.T, left.T, 1.0, rest.T, overwrite_c=True).T)


def _root(corner: Array, floor: float) -> Array:
    """Lower Cholesky factor of what is left of a few units; lifted until rounding does not matter."""
    while True:
        try:
            return np.asarray(scipy.linalg.cholesky(corner + floor * np.eye(len(corner)), lower=True))
        except np.linalg.LinAlgError:
            floor *= 100


def _departures(factor: Array, weight: Array, counts: Sequence[int]) -> list[float]:
    """How far the ridge lets each refit move: ``|W - W'|²`` (C,), all in order of choice.

    With L the Cholesky factor of the units and L11 that of the chosen ones, the refit is ``L11⁻ᵀ (Lᵀ W)1``; what more
    units change of it is one product, so that all counts together take as long as the last would alone.
    """
    fitted = np.zeros_like(weight)
    target = factor.T @ weight
    left = np.append(np.cumsum(np.einsum("fn,fn->f", weight, weight)[::-1])[::-1], 0.0)  # of the units from here on
    departures, done = [], 0
    for count in counts:
        new = slice(done, count)
        fitted[new] = _solved(factor[new, new], target[new])
        fitted[:done] -= _solved(factor[:done, :done], factor[new, :done].T) @ fitted[new]
        moved = fitted[:count] - weight[:count]
        departures.append(float(np.vdot(moved, moved) + left[count]))
        done = count
    return departures


def _solved(root: Array, right: Array) -> Array:
    """``L⁻ᵀ right`` of a lower triangular L."""
    return np.asarray(scipy.linalg.solve_triangular(root, right, lower=True, trans="T", check_finite=False))


def refit_selected(weight: Array, gram: Array, chosen: Array, ridge: float) -> Array:
    """Return the (k, N) weight that best gives ``h @ weight`` from ``h[chosen]``.

    Args:
        weight: (F, N).
        gram: (F, F) of h.
        chosen: (k,) indices.
        ridge: In units of the mean diagonal of gram.
    """
    penalty = ridge_shift(gram, ridge)
    left = gram[np.ix_(chosen, chosen)] + penalty * np.eye(len(chosen))
    right = gram[chosen] @ weight + penalty * weight[chosen]
    try:
        return np.asarray(scipy.linalg.solve(left, right, assume_a="pos"))
    except np.linalg.LinAlgError:
        return np.asarray(scipy.linalg.lstsq(left, right)[0])
