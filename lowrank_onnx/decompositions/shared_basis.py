"""One first factor for layers that read different tensors: ``y_l = x_l W_l`` becomes ``y_l = (x_l A) B_l``.

A is stored once, so that a model gets smaller by more than its layers do one by one; each B_l is the best one
behind A on the data of its own layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array, psd_root, right_basis, with_ridge

_FLOOR = 1e-10  # of the mean variance, so that a dead input leaves the roots regular


@dataclass(frozen=True, eq=False)
class SharedBasis:
    """Factors of every rank, nested: rank r uses the first r directions.

    Attributes:
        directions: (K, q) orthonormal, the most important first.
        roots: Per layer (q, q), lower: of the directions in the metric of its (ridged) data.
        rows: Per layer (q, N): what the directions, orthonormal in that metric, have in common with the weight.
        errors: Per layer (q + 1,) squared error of the output by rank, relative.
    """

    directions: Array
    roots: tuple[Array, ...]
    rows: tuple[Array, ...]
    errors: tuple[Array, ...]

    def first(self, rank: int) -> Array:
        """A (K, r)."""
        return self.directions[:, :rank]

    def second(self, layer: int, rank: int) -> Array:
        """B (r, N) of one layer."""
        root = self.roots[layer][:rank, :rank]
        return np.asarray(scipy.linalg.solve_triangular(root, self.rows[layer][:rank], lower=True, trans="T"))


def shared_basis(weights: Sequence[Array], grams: Sequence[Array], ridge: float) -> SharedBasis:
    """Return the common directions of layers, and what each layer makes of them.

    Args:
        weights: Per layer (K, N), scaled so that equal errors count alike.
        grams: Per layer (K, K), second moment of its input, centred or not; the identity without data.
        ridge: Shrinkage towards the weights alone, in units of the mean diagonal of each gram.

    The directions are those of all weights side by side in the mean metric: the optimum where the inputs of all
    layers have one second moment. Given them, every B_l is exact least squares.

    Source: Basis Sharing, ICLR 2025, arXiv:2410.03765; B_l in the metric of its own layer is ours.
    """
    metrics = [with_ridge(gram, max(ridge, _FLOOR)) for gram in grams]
    mean = sum(metric / float(np.trace(metric)) for metric in metrics)
    side_by_side = np.concatenate(weights, axis=1)
    _, right = right_basis(psd_root(np.asarray(mean)), side_by_side)
    directions, _ = np.linalg.qr(side_by_side @ right)
    roots, rows, errors = [], [], []
    for weight, gram, metric in zip(weights, grams, metrics, strict=True):
        root = scipy.linalg.cholesky(directions.T @ metric @ directions, lower=True)
        basis = scipy.linalg.solve_triangular(root, directions.T, lower=True)  # (q, K), orthonormal in the metric
        row = basis @ metric @ weight
        roots.append(root)
        rows.append(row)
        errors.append(_errors(weight, gram, basis, row))
    return SharedBasis(directions, tuple(roots), tuple(rows), tuple(errors))


def _errors(weight: Array, gram: Array, basis: Array, rows: Array) -> Array:
    """(q + 1,) of ``weight - basis[:r].T @ rows[:r]`` for every r, in the metric of gram."""
    total = float(np.vdot(weight, gram @ weight))
    common = np.cumsum(np.einsum("qn,qn->q", rows, basis @ gram @ weight))
    own = (basis @ gram @ basis.T) * (rows @ rows.T)
    left = total - 2 * common + np.diagonal(own.cumsum(axis=0).cumsum(axis=1))
    return np.asarray(np.maximum(np.concatenate([[total], left]), 0.0) / (total or 1.0))
