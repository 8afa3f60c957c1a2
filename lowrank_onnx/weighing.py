"""Choose what tells the squares of deviations, and weigh it; arrays only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.optimize

from lowrank_onnx.linalg import Array

LEAST = 0.02  # of the mean square that anything has to tell to be worth its time in every run


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows: of the tensors asked for, the deviations of the inner tensor and of the output, and the output."""

    parts: list[Array]
    inner: Array
    apart: Array
    value: Array


@dataclass(frozen=True, eq=False)
class Seen:
    """Rows of a data set.

    Attributes:
        watched: (n, L) squared distances.
        far: (n, J) where what was left out would have carried the inner tensor.
        inner: (n, J) squared deviations of the inner tensor.
        squares: (n, J) squared deviations of the output.
        value: (n, J) the output.
        through: One of ``stddev.THROUGH``, or empty.
    """

    watched: Array
    far: Array
    inner: Array
    squares: Array
    value: Array
    through: str

    @classmethod
    def of(cls, rows: Iterable[Rows], carried: bool, through: str) -> Seen:
        """Join the batches of ``Rows``."""
        every = list(rows)
        inner, apart, value = (
            np.concatenate([getattr(entry, name) for entry in every]).astype(np.float64)
            for name in ("inner", "apart", "value")
        )
        columns = [
            np.concatenate(column).astype(np.float64)
            for column in zip(*(entry.parts for entry in every), strict=True)
        ]  # fmt: skip
        far = columns.pop() if carried else np.zeros_like(apart)
        watched = np.concatenate(columns, axis=1) if columns else np.zeros((len(apart), 0))
        return cls(watched, far, inner**2, apart**2, value, through)

    def pushed(self, variance: Array) -> Array:
        """What a variance (n, J) of the inner tensor is behind the operator, to first order."""
        p = self.value
        if self.through == "Sigmoid":
            return np.asarray(variance * (p - p**2) ** 2)
        if self.through == "Softmax":
            ahead = p**2 * variance
            return np.asarray((1 - 2 * p) * ahead + p**2 * ahead.sum(axis=1, keepdims=True))
        return variance


def best_columns(watched: Array, scale: Array, seen: Seen, base: Array, most: int) -> tuple[list[int], Array]:
    """Choose the columns that tell most of the squares, and weigh them anew.

    Args:
        watched: (n, L) of which at most ``most`` are taken.
        scale: (J,).
        seen: What is to be told, and by what else.
        base: (n, J) what is told already.

    Returns:
        The places of the columns, and the weights: of a constant, of them, of ``seen.far`` squared, and of a
        constant behind the operator.
    """
    matrix = _columns(watched, scale, seen)
    counts = _counts(matrix, seen.squares.ravel(), base.ravel())
    told = (counts * matrix.mean(axis=0))[1:-2]
    least = LEAST * float(seen.squares.mean())
    places = [int(place) for place in np.argsort(-told)[:most] if told[place] > least]
    kept = [0, *(place + 1 for place in places), -2, -1]
    return places, _counts(matrix[:, kept], seen.squares.ravel(), base.ravel())


def _columns(watched: Array, scale: Array, seen: Seen) -> Array:
    """(n J, L + 3) what each thing that may count adds to the square of every element."""
    columns = [seen.pushed(np.outer(column, scale)) for column in (np.ones(len(watched)), *watched.T)]
    columns += [seen.pushed(seen.far**2), np.full_like(seen.far, 1.0 if seen.through else 0.0)]
    return np.stack([column.ravel() for column in columns], axis=1)


def _counts(matrix: Array, wanted: Array, known: Array) -> Array:
    """Weights ≥ 0 of the columns of ``matrix`` (n, L) in the expected value of ``wanted - known`` (n,).

    Squares of normal numbers spread with their own expectation: least squares in units of it, a few times over.
    """
    units = matrix.mean(axis=0)
    units[units == 0] = 1.0
    matrix = matrix / units
    mean = float(wanted.mean()) or 1.0
    expected = np.full(wanted.size, mean)
    counts = np.zeros(matrix.shape[1])
    for _ in range(20):
        weighted = matrix / expected[:, None]
        root = np.linalg.cholesky(weighted.T @ weighted + 1e-9 * wanted.size / mean**2 * np.eye(len(counts)))
        left = weighted.T @ ((wanted - known) / expected)
        counts = scipy.optimize.nnls(root.T, np.linalg.solve(root, left))[0]
        expected = np.maximum(known + matrix @ counts, 0.05 * mean)
    return np.asarray(counts / units)
