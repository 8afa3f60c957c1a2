"""Select hidden units, and refit the layer that reads them: ``y = h @ W`` from a subset of h."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array, Tail, regression, with_ridge


@dataclass(frozen=True, eq=False)
class UnitOrder:
    """Hidden units in the order in which they are worth keeping.

    Attributes:
        order: (F,) indices, the most useful first.
        output: Squared output error after the first k units and the best refit, for every multiple of the
            block; in between the value of the next smaller multiple.
    """

    order: Array
    output: Tail


def order_units(weight: Array, gram: Array, ridge: float, block: int = 8, energy: float | None = None) -> UnitOrder:
    """Order hidden units greedily by how much output error each takes away.

    With R the part of the second moment that the chosen units do not explain, the next unit is the one with
    the largest ``|R[:, j] W|² / R[j, j]``; R is never formed, only its product with W and the columns of the
    chosen units, ``block`` at a time.

    Args:
        weight: (F, N) of the layer that reads the units.
        gram: (F, F) second moment of the units, centred or not.
        ridge: In units of the mean diagonal.
        block: Units chosen per step.
        energy: What errors are relative to; E|h W|² if None.

    Source: greedy subset selection for least squares, as a pivoted block Cholesky.
    """
    units = len(gram)
    weight = np.asarray(weight, np.float64)
    moment = with_ridge(gram, ridge)
    rest = moment @ weight  # (F, N) R W
    diagonal = np.diag(moment).copy()
    floor = 1e-10 * float(diagonal.max(initial=0.0))
    factor = np.zeros((units, units))  # columns of the Cholesky factor, in order of choice
    chosen = np.zeros(units, bool)
    order: list[int] = []
    total = float(np.einsum("fn,fn->", weight, gram @ weight))
    left = np.empty(units + 1)
    error = float(np.einsum("fn,fn->", weight, rest))
    while len(order) < units:
        left[len(order) : len(order) + block] = error
        score = np.where(chosen, -1.0, np.einsum("fn,fn->f", rest, rest) / np.maximum(diagonal, floor))
        size = min(block, units - len(order))
        picked = np.sort(np.argsort(-score, kind="stable")[:size])
        done = len(order)
        columns = moment[:, picked] - factor[:, :done] @ factor[picked, :done].T  # (F, size) R[:, picked]
        corner = columns[picked] + floor * np.eye(size)
        root = scipy.linalg.cholesky(corner, lower=True)
        part = scipy.linalg.solve_triangular(root, columns.T, lower=True).T  # (F, size)
        factor[:, done : done + size] = part
        rest -= part @ scipy.linalg.solve_triangular(root, rest[picked], lower=True)
        diagonal -= np.einsum("fs,fs->f", part, part)
        chosen[picked] = True
        order += picked.tolist()
        error = max(float(np.einsum("fn,fn->", weight, rest)), 0.0)
    left[units] = 0.0
    return UnitOrder(np.array(order), Tail(np.minimum.accumulate(left), total if energy is None else energy))


def refit_selected(weight: Array, gram: Array, chosen: Array, ridge: float) -> Array:
    """Return the (k, N) weight that best gives ``h @ weight`` from ``h[chosen]``.

    Args:
        weight: (F, N).
        gram: (F, F) of h.
        chosen: (k,) indices.
        ridge: In units of the mean diagonal of the chosen part.
    """
    inner = gram[np.ix_(chosen, chosen)]
    return regression(inner, gram[chosen] @ weight, weight[chosen], ridge)
