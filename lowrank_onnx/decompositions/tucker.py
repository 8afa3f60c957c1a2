"""Tucker-2 of a convolution: 1 x 1 into few channels, k x k among few, 1 x 1 back.

    W[o, i, k] ≈ Σ_{p, q} output_factor[o, p] · core[p, q, k] · input_factor[q, i]

Stride, padding and dilation belong to the core, the bias to the output factor. A side of full rank has no
factor (None): the core does its work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.decompositions.output_metric import (
    checked_rank,
    checked_weight,
    gentle_solve,
    layer_output,
    ridged,
)
from lowrank_onnx.linalg import Array, psd_root, right_basis


@dataclass(frozen=True, slots=True, eq=False)
class Tucker2:
    """Three convolutions for one, two where a factor is None.

    Attributes:
        output_factor: (O, r_o); orthonormal columns, unless refitted to outputs. None: r_o = O, identity.
        core: (r_o, r_i, *kernel).
        input_factor: (r_i, I). None: r_i = I, identity.
        error: Relative error: of the weight, in the input metric where one was given, or of the output
            after a refit to it.
    """

    output_factor: Array | None
    core: Array
    input_factor: Array | None
    error: float

    def weight(self) -> Array:
        """The product (O, I, *kernel)."""
        weight = self.core
        if self.input_factor is not None:
            weight = _times(weight, self.input_factor.T, 1)
        if self.output_factor is not None:
            weight = _times(weight, self.output_factor, 0)
        return weight


def tucker2(
    weight: Array,
    ranks: tuple[int, int],
    sweeps: int = 10,
    input_metric: Array | None = None,
    tolerance: float = 1e-6,
) -> Tucker2:
    """Tucker-2 by HOSVD and then higher-order orthogonal iteration.

    Args:
        weight: (O, I, *kernel).
        ranks: (r_o, r_i), 1 ≤ r_o ≤ O, 1 ≤ r_i ≤ I.
        sweeps: Most rounds after the HOSVD; one to three do nearly all.
        input_metric: (I, I) centred covariance of the input channels, pooled over positions; None: identity.
            Singular ones get a ridge of 1e-9 of the mean variance.
        tolerance: Stop when a round raises the energy of the core by less than this share of all.

    Returns:
        Factors; with a metric their error in it is at most that of the factors found without.

    Source: De Lathauwer, De Moor & Vandewalle 2000 (HOSVD, HOOI); Kim et al. 2016, arXiv:1511.06530. With a
    metric C = L Lᵀ the iteration runs on W ×₁ Lᵀ, and the input factor is taken back through L⁻ᵀ.
    """
    weight = checked_weight(weight)
    r_o = checked_rank(ranks[0], weight.shape[0], "output rank")
    r_i = checked_rank(ranks[1], weight.shape[1], "input rank")
    plain = _hooi(weight, r_o, r_i, _leading(_unfold(weight, 1), r_i), sweeps, tolerance)
    if input_metric is None:
        return _signed(*plain, weight, None, r_o, r_i)
    root, inverse = _metric_root(input_metric, weight.shape[1])
    whitened = _times(weight, root.T, 1)
    # The span found without the metric is a second start, so that the result can only be better than it.
    spans = (_leading(_unfold(whitened, 1), r_i), scipy.linalg.qr(root.T @ plain[1], mode="economic")[0])
    found = [_hooi(whitened, r_o, r_i, span, sweeps, tolerance) for span in spans]
    energies = [float(np.linalg.norm(_project(whitened, u, v))) for u, v in found]
    best = found[int(energies[1] > energies[0])]
    return _signed(*best, whitened, (root, inverse), r_o, r_i)


def refit_output(
    features_gram: Array, cross: Array, rank: int | None = None, ridge: float = 1e-2
) -> tuple[Array, Array | None]:
    """Least squares from features to outputs, of full or of reduced rank.

    Args:
        features_gram: (F, F) centred second moment of the features z, such as patches after a 1 x 1.
        cross: (F, O) ``E[(z - z̄)(y - ȳ)ᵀ]``.
        rank: Rank of the map; None or min(F, O): no reduction.
        ridge: In units of the mean variance of the features.

    Returns:
        (first (r, F), second (O, r)) with second orthonormal, or (map (O, F), None) without reduction.

    Source: reduced-rank regression (Izenman 1975): the full solution, projected on the leading directions
    of what it predicts.
    """
    metric = ridged(features_gram, ridge)
    cross = np.asarray(cross, np.float64)
    if cross.ndim != 2 or len(cross) != len(metric):
        raise ValueError(f"expected a cross moment ({len(metric)}, O), got {cross.shape}")
    full = gentle_solve(metric, cross)  # (F, O)
    limit = min(cross.shape)
    if rank is None or checked_rank(rank, limit, "rank of the regression") == limit == cross.shape[1]:
        return np.ascontiguousarray(full.T), None
    basis = _positive_columns(right_basis(psd_root(metric), full)[1][:, :rank])
    return (full @ basis).T, basis


def refit_tucker2(
    factors: Tucker2,
    weight: Array,
    patch_gram: Array,
    ridge: float = 1e-2,
    cross: Array | None = None,
    energy: float | None = None,
) -> Tucker2:
    """Refit core and output factor to the layer's output on data; the best there is for the input factor.

    Args:
        factors: Whose input factor and ranks are kept; an output rank beyond r_i · prod(kernel) restricts
            nothing, and its output factor is dropped.
        weight: (O, I, *kernel) the original weight.
        patch_gram: (F, F) centred second moment of the patches delivered, F = I · prod(kernel).
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        cross: (O, F) with ``energy``, where the patches are not the original ones; as in ``separable_als``.
        energy: ``E|y - ȳ|²``.

    Returns:
        Factors with the relative output error, without ridge.
    """
    output = layer_output(weight, patch_gram, cross, energy)
    weight = checked_weight(weight)
    outputs, inputs, *kernel = weight.shape
    r_o, r_i = factors.core.shape[:2]
    target, metric = output.regularised(ridge)
    through = np.eye(inputs) if factors.input_factor is None else factors.input_factor
    positions = metric.shape[0] // inputs
    blocks = metric.reshape(inputs, positions, inputs * positions)
    mapped = np.einsum("qi,ikf->qkf", through, blocks, optimize=True).reshape(r_i * positions, -1)  # Z G
    gram = np.einsum("fik,qi->fqk", mapped.reshape(-1, inputs, positions), through, optimize=True)
    gram = gram.reshape(len(mapped), -1)
    first, second = refit_output(
        (gram + gram.T) / 2, mapped @ target.T, None if r_o > min(len(mapped), outputs) else r_o, ridge=0
    )
    fitted = Tucker2(second, first.reshape(-1, r_i, *kernel), factors.input_factor, 0.0)
    error = output.error(fitted.weight().reshape(outputs, -1))
    return Tucker2(fitted.output_factor, fitted.core, fitted.input_factor, error)


def _hooi(weight: Array, r_o: int, r_i: int, v: Array, sweeps: int, tolerance: float) -> tuple[Array, Array]:
    """Orthonormal U (O, r_o), V (I, r_i) from a start V; every step raises the energy of the core."""
    total = float(np.vdot(weight, weight))
    energy = -1.0
    u = _leading(_unfold(weight, 0), r_o)
    for sweep in range(sweeps):
        if sweep > 0:
            v = _leading(_unfold(_times(weight, u.T, 0), 1), r_i)
        u = _leading(_unfold(_times(weight, v.T, 1), 0), r_o)
        before, energy = energy, float(np.linalg.norm(_project(weight, u, v)) ** 2)
        if energy - before <= tolerance * total:
            break
    return u, v


def _signed(u: Array, v: Array, whitened: Array, roots: tuple[Array, Array] | None, r_o: int, r_i: int) -> Tucker2:
    """Fix signs, drop identities, measure the error, and take the input factor out of the metric."""
    outputs, inputs = whitened.shape[:2]
    # Full rank on a side spans everything: the identity is as good as any basis, and costs no layer.
    u = np.eye(outputs) if r_o == outputs else _positive_columns(u)
    v = np.eye(inputs) if r_i == inputs else _positive_columns(v)
    core = _project(whitened, u, v)
    lost = whitened - _times(_times(core, u, 0), v, 1)
    norm = float(np.linalg.norm(whitened))
    error = float(np.linalg.norm(lost)) / norm if norm > 0 else 0.0
    input_factor: Array | None = v.T
    if roots is not None:
        inverse = roots[1]
        if r_i == inputs:
            core = _times(core, inverse.T, 1)
        else:
            input_factor = v.T @ inverse
    if r_i == inputs:
        input_factor = None
    return Tucker2(None if r_o == outputs else u, core, input_factor, error)


def _metric_root(metric: Array, size: int) -> tuple[Array, Array]:
    """L and L⁻¹ with L Lᵀ the ridged metric, from its eigenvalues."""
    metric = np.asarray(metric, np.float64)
    if metric.shape != (size, size):
        raise ValueError(f"expected an input metric of shape {(size, size)}, got {metric.shape}")
    values, vectors = scipy.linalg.eigh(ridged((metric + metric.T) / 2, 1e-9))
    scale = np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    return vectors * scale, vectors.T / scale[:, None]


def _unfold(tensor: Array, mode: int) -> Array:
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1)


def _times(tensor: Array, matrix: Array, mode: int) -> Array:
    """Mode product: ``matrix`` (m, n) applied to the axis ``mode`` of length n."""
    product = matrix @ _unfold(tensor, mode)
    rest = tensor.shape[:mode] + tensor.shape[mode + 1 :]
    return np.ascontiguousarray(np.moveaxis(product.reshape(len(matrix), *rest), 0, mode))


def _project(weight: Array, u: Array, v: Array) -> Array:
    return _times(_times(weight, u.T, 0), v.T, 1)


def _leading(matrix: Array, rank: int) -> Array:
    """Leading left singular vectors (m, rank), from the Gram: all m exist, even beyond the matrix' rank."""
    size = len(matrix)
    vectors = scipy.linalg.eigh(matrix @ matrix.T, subset_by_index=(size - rank, size - 1))[1]
    return np.asarray(vectors[:, ::-1])


def _positive_columns(basis: Array) -> Array:
    """The same columns with their largest entry positive."""
    largest = basis[np.abs(basis).argmax(axis=0), np.arange(basis.shape[1])]
    return np.asarray(basis * np.where(largest < 0, -1.0, 1.0))
