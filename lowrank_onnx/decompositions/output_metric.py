"""The output of a convolution as moments of its patches: what factors are fitted to and scored with.

A convolution is ``y = W x``: x (F,) the patch under the kernel, F = I · prod(kernel) in the order of
``weight.reshape(O, -1)``, and y (O,). All moments here are centred, since the mean goes into the bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array

RIDGE_FLOOR = 1e-12  # keeps every metric positive definite in float64; far below any calibration noise


def checked_weight(weight: Array) -> Array:
    """Return a convolution weight (O, I, *kernel) in float64; ValueError if it is none or not finite."""
    weight = np.asarray(weight, np.float64)
    if weight.ndim < 2 or weight.size == 0:
        raise ValueError(f"expected a weight (O, I, *kernel) with no empty axis, got shape {weight.shape}")
    if not np.isfinite(weight).all():
        count = int(np.count_nonzero(~np.isfinite(weight)))
        raise ValueError(f"weight of shape {weight.shape} holds {count} values that are not finite")
    return weight


def checked_rank(rank: int, full: int, what: str) -> int:
    """Return ``rank`` if it is in 1..full, else raise ValueError naming ``what``."""
    if not 1 <= rank <= full:
        raise ValueError(f"{what} must be in 1..{full}, got {rank}")
    return int(rank)


def ridged(gram: Array, ridge: float) -> Array:
    """Return gram + λ I, λ = ridge · mean(diag), at least a hair, and of scale 1 for a zero gram."""
    gram = np.array(gram, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"expected a square second moment, got shape {gram.shape}")
    if ridge < 0:
        raise ValueError(f"ridge must be >= 0, got {ridge}; it is in units of the mean variance")
    scale = float(np.trace(gram)) / len(gram)
    shift = max(ridge, RIDGE_FLOOR) * (scale if scale > 0 else 1.0)
    gram[np.diag_indices_from(gram)] += shift
    return gram


def gentle_solve(gram: Array, right: Array) -> Array:
    """Return x with ``gram x ≈ right`` for a positive semi-definite gram, never farther than needed.

    A shift of 1e-13 · max(diag) or the next that lets Cholesky through; with ``right`` a gradient, x is
    then a proximal step, which lowers a quadratic however singular the gram is.
    """
    return gentle_inverse(gram)(right)


def gentle_inverse(gram: Array) -> Callable[[Array], Array]:
    """``gentle_solve`` for many right sides: the gram is factored once."""
    root = gentle_root(gram)
    return lambda right: np.asarray(scipy.linalg.cho_solve((root, True), right, check_finite=False))


def gentle_root(gram: Array) -> Array:
    """The lower Cholesky factor that ``gentle_solve`` uses."""
    shift = 1e-13 * (float(gram.diagonal().max()) or 1.0)
    while True:
        shifted = gram.copy()
        shifted[np.diag_indices_from(shifted)] += shift
        try:
            return np.asarray(scipy.linalg.cholesky(shifted, lower=True, overwrite_a=True, check_finite=False))
        except np.linalg.LinAlgError:
            shift *= 100


@dataclass(frozen=True, slots=True, eq=False)
class Felt:
    """How much errors of the outputs matter, as a change of basis: plain least squares there is weighted here.

    Attributes:
        root: (O, O) upper triangular, ``|root e|² = eᵀ H e``.
        inverse: Of root.
    """

    root: Array
    inverse: Array

    @classmethod
    def of(cls, matrix: Array, share: float = 0.1) -> Felt:
        """Read an estimate H (O, O), positive semi-definite, of any scale.

        Args:
            share: Of the mean diagonal, is put in for every channel alike: the estimate is noisy, and what is not
                felt to first order may be felt later.
        """
        scale = float(np.trace(matrix)) / len(matrix)
        even = np.eye(len(matrix))
        metric = (1 - share) * matrix / scale + share * even if scale > 0 else even
        root = scipy.linalg.cholesky((metric + metric.T) / 2)
        return cls(root, scipy.linalg.solve_triangular(root, even))

    def turn(self, weight: Array) -> Array:
        """A weight (O, ...), or anything of its outputs, where errors count alike."""
        return np.tensordot(self.root, weight, axes=1)

    def back(self, weight: Array) -> Array:
        """The inverse of ``turn``."""
        return np.tensordot(self.inverse, weight, axes=1)


@dataclass(frozen=True, slots=True, eq=False)
class LayerOutput:
    """What a layer's factors should give from the patches they are delivered.

    Attributes:
        weight: (O, F) the original weight.
        gram: (F, F) centred second moment of the delivered patches x̂.
        cross: (O, F) ``E[(y - ȳ)(x̂ - mean)ᵀ]``; None where x̂ = x, so that it is ``weight @ gram``.
        energy: ``E|y - ȳ|²``, which errors are relative to.
    """

    weight: Array
    gram: Array
    cross: Array | None
    energy: float

    def error(self, approximation: Array) -> float:
        """Relative output error ``sqrt(E|y - Ŵ x̂|² / E|y|²)`` of Ŵ (O, F), both centred, without ridge."""
        if self.cross is None:
            lost = self.weight - approximation
            squared = float(np.vdot(lost @ self.gram, lost))
        else:
            squared = self.energy - 2 * float(np.vdot(approximation, self.cross))
            squared += float(np.vdot(approximation @ self.gram, approximation))
        return float(np.sqrt(max(squared, 0.0) / self.energy)) if self.energy > 0 else 0.0

    def regularised(self, ridge: float) -> tuple[Array, Array]:
        """Return W* (O, F) and G* (F, F): minimising ``tr (W* - Ŵ) G* (W* - Ŵ)ᵀ`` is the ridged problem.

        G* = gram + λI and W* = (cross + λW) G*⁻¹ (W itself without cross), so that Ŵ is pulled towards W
        where the data say little. λ is ``ridge`` in units of the mean variance of the patch.
        """
        metric = ridged(self.gram, ridge)
        if self.cross is None:
            return self.weight, metric
        lost = self.cross - self.weight @ self.gram  # (O, F), so that W* = W where the streams agree
        return self.weight + gentle_solve(metric, lost.T).T, metric


def layer_output(
    weight: Array, patch_gram: Array, cross: Array | None = None, energy: float | None = None
) -> LayerOutput:
    """Check and gather the moments of a layer; see LayerOutput.

    Args:
        weight: (O, I, *kernel).
        patch_gram: (F, F) centred.
        cross: (O, F), with ``energy``; both or neither.
        energy: ``E|y - ȳ|²``.
    """
    weight = checked_weight(weight)
    matrix = weight.reshape(len(weight), -1)
    gram = np.asarray(patch_gram, np.float64)
    if gram.shape != (matrix.shape[1],) * 2:
        raise ValueError(
            f"weight {weight.shape} needs a patch gram {(matrix.shape[1],) * 2}, got {gram.shape}; "
            "the patch is ordered as weight.reshape(O, -1)"
        )
    if (cross is None) != (energy is None):
        raise ValueError("cross and energy belong together: give both (propagated inputs) or neither")
    if cross is None or energy is None:
        return LayerOutput(matrix, gram, None, max(float(np.vdot(matrix @ gram, matrix)), 0.0))
    cross = np.asarray(cross, np.float64)
    if cross.shape != matrix.shape:
        raise ValueError(f"weight {weight.shape} needs a cross moment {matrix.shape}, got {cross.shape}")
    return LayerOutput(matrix, gram, cross, float(energy))
