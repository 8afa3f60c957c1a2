"""Separable convolutions: a kernel over some axes, then one over the others (k x 1 then 1 x k).

    W[o, i, a, b] ≈ Σ_r second[o, r, b] · first[r, i, a]

Without data the optimum is the SVD of W as a matrix [(i, a), (o, b)] (Jaderberg et al. 2014, scheme 2). With
the centred second moment of the patches, alternating least squares lowers the output error itself. Stride,
padding and dilation of an axis belong to the convolution that covers it; the bias belongs to the second.
All kernel axes in the first group is the scheme "k x k into r channels, then 1 x 1"; none is its mirror.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import scipy.linalg

from lowrank_onnx.decompositions.output_metric import (
    checked_rank,
    checked_weight,
    gentle_inverse,
    gentle_solve,
    layer_output,
)
from lowrank_onnx.linalg import Array, finite_svd, psd_root, right_basis

DIRECT_UNKNOWNS = 512  # first factors up to this size are solved for directly; beyond, CG is faster


@dataclass(frozen=True, slots=True, eq=False)
class Separable:
    """Two convolutions for one.

    Attributes:
        first: (r, I, *kernel), length 1 on the axes of the second.
        second: (O, r, *kernel), length 1 on the axes of the first.
        error: Relative error: of the weight, or of the output where data were given.
        history: Relative output error at the start and after each sweep; empty without data.
    """

    first: Array
    second: Array
    error: float
    history: tuple[float, ...] = ()

    def weight(self) -> Array:
        """The product (O, I, *kernel)."""
        axes = tuple(axis for axis, length in enumerate(self.second.shape[2:]) if length == 1)
        kernel = np.maximum(self.first.shape[2:], self.second.shape[2:])
        split = Split((len(self.second), self.first.shape[1], *map(int, kernel)), axes)
        return split.unpack(*split.pack_factors(self.first, self.second))


@dataclass(frozen=True, slots=True)
class Split:
    """How a weight (O, I, *kernel) is laid out while it is factorized.

    P = I · prod(kernel[axes]) inputs of the first factor A (P, r), and Q the other kernel positions, with the
    second factor H (O, Q, r). The weight is kept as (O, Q, P), so that both steps are plain products.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape) - 2) if axis not in self.axes)

    @property
    def p(self) -> int:
        return self.shape[1] * prod(self.shape[2 + axis] for axis in self.axes)

    @property
    def q(self) -> int:
        return prod(self.shape[2 + axis] for axis in self.others)

    def pack(self, weight: Array) -> Array:
        """(O, I, *kernel) -> (O, Q, P)."""
        order = (0, *(2 + axis for axis in self.others), 1, *(2 + axis for axis in self.axes))
        return weight.transpose(order).reshape(self.shape[0], self.q, self.p)

    def patch_order(self) -> Array:
        """(Q·P,) where in the patch each entry of the packed layout is."""
        places = np.arange(prod(self.shape[1:])).reshape(1, *self.shape[1:])
        return Split((1, *self.shape[1:]), self.axes).pack(places).ravel()

    def factors(self, a: Array, h: Array) -> tuple[Array, Array]:
        """A (P, r), H (O, Q, r) -> the two convolution weights."""
        kernel = self.shape[2:]
        rank = a.shape[1]
        one = [length if axis in self.axes else 1 for axis, length in enumerate(kernel)]
        two = [1 if axis in self.axes else length for axis, length in enumerate(kernel)]
        first = np.ascontiguousarray(a.T).reshape(rank, self.shape[1], *one)
        second = np.ascontiguousarray(h.transpose(0, 2, 1)).reshape(self.shape[0], rank, *two)
        return first, second

    def pack_factors(self, first: Array, second: Array) -> tuple[Array, Array]:
        """The inverse of ``factors``."""
        rank = len(first)
        return first.reshape(rank, self.p).T, second.reshape(self.shape[0], rank, self.q).transpose(0, 2, 1)

    def unpack(self, a: Array, h: Array) -> Array:
        """A (P, r), H (O, Q, r) -> the weight (O, I, *kernel) they stand for."""
        kernel = self.shape[2:]
        product = h.reshape(-1, h.shape[2]) @ a.T  # (O·Q, P)
        lengths = (self.shape[0], *(kernel[i] for i in self.others), self.shape[1], *(kernel[i] for i in self.axes))
        order = (0, *(2 + axis for axis in self.others), 1, *(2 + axis for axis in self.axes))
        return np.ascontiguousarray(product.reshape(lengths).transpose(np.argsort(order)))


def split_of(weight: Array, axis: int | Sequence[int]) -> Split:
    """Return the layout for kernel axes ``axis`` (0 is the first kernel axis) in the first factor."""
    dimensions = weight.ndim - 2
    axes = (axis,) if isinstance(axis, int) else tuple(sorted(axis))
    if len(set(axes)) != len(axes) or any(not 0 <= one < dimensions for one in axes):
        raise ValueError(f"axis must name kernel axes in 0..{dimensions - 1} once each, got {axis}")
    return Split(weight.shape, axes)


def full_rank(weight: Array, axis: int | Sequence[int] = 0) -> int:
    """Return the rank at which any weight of this shape is reproduced exactly."""
    split = split_of(weight, axis)
    return min(split.p, split.shape[0] * split.q)


def balanced(a: Array, h: Array) -> tuple[Array, Array]:
    """Rewrite A (P, r), H (O, Q, r) for the same product as √σ-scaled singular vectors, largest first.

    Makes the result independent of how it was reached, nested by importance, and of even scale.
    """
    rank = a.shape[1]
    qa, ra = scipy.linalg.qr(a, mode="economic")
    qh, rh = scipy.linalg.qr(h.reshape(-1, rank), mode="economic")
    u, sigma, vt = finite_svd(ra @ rh.T)
    left, right = qa @ (u * np.sqrt(sigma)), qh @ (vt.T * np.sqrt(sigma))
    # Factors wider than they are tall carry fewer than r directions; the rest is zero.
    left, right = (np.pad(side, ((0, 0), (0, rank - sigma.size))) for side in (left, right))
    signs = np.where(left[np.abs(left).argmax(axis=0), np.arange(rank)] < 0, -1.0, 1.0)
    return left * signs, (right * signs).reshape(h.shape)


def separable(weight: Array, rank: int, axis: int | Sequence[int] = 0) -> Separable:
    """Best separable weight of a rank in Frobenius norm, by SVD.

    Args:
        weight: (O, I, *kernel), one to three kernel axes.
        rank: Channels between, 1 ≤ rank ≤ ``full_rank(weight, axis)``.
        axis: Kernel axis, or axes, that the first convolution covers; the second covers the others.

    Returns:
        Factors and the relative Frobenius error of the weight.

    Source: Jaderberg, Vedaldi & Zisserman 2014, arXiv:1405.3866, scheme 2.
    """
    weight = checked_weight(weight)
    split = split_of(weight, axis)
    checked_rank(rank, full_rank(weight, axis), f"rank of a separable {weight.shape}")
    matrix = split.pack(weight).reshape(-1, split.p)  # (O·Q, P)
    u, sigma, vt = finite_svd(matrix)
    total = float(np.vdot(sigma, sigma))
    error = float(np.sqrt(np.vdot(sigma[rank:], sigma[rank:]) / total)) if total > 0 else 0.0
    a, h = balanced(vt[:rank].T, (u[:, :rank] * sigma[:rank]).reshape(len(weight), split.q, rank))
    return Separable(*split.factors(a, h), error)


def separable_als(
    weight: Array,
    rank: int,
    patch_gram: Array,
    axis: int | Sequence[int] = 0,
    sweeps: int = 5,
    ridge: float = 1e-2,
    cross: Array | None = None,
    energy: float | None = None,
    tolerance: float = 1e-4,
    start: Separable | None = None,
) -> Separable:
    """Separable weight that reproduces the layer's output on data, by alternating least squares.

    Args:
        weight: (O, I, *kernel).
        rank: Channels between, 1 ≤ rank ≤ ``full_rank(weight, axis)``.
        patch_gram: (F, F) centred second moment of the patches delivered, F = I · prod(kernel).
        axis: Kernel axis, or axes, that the first convolution covers.
        sweeps: Most rounds of (first factor, second factor); 0 leaves the start and its refit.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        cross: (O, F) ``E[(y - ȳ)(x̂ - mean)ᵀ]`` with y the original output, where the patches delivered are
            not the original ones; None: ``weight @ patch_gram``.
        energy: ``E|y - ȳ|²``, with ``cross``.
        tolerance: Stop when a sweep lowers the squared (ridged) error by less than this share.
        start: Factors of that rank and those axes to improve; None looks for a start.

    Returns:
        Factors, the relative output error (without ridge), and its history. The ridged error never rises
        from sweep to sweep, and without ``start`` it never exceeds that of ``separable`` at the same rank.

    The start, where none is given, is the better of two: the SVD whitened by the pooled covariance of the first
    factor's input, and the plain SVD; each with its second factor refitted. First factors of more than
    ``DIRECT_UNKNOWNS`` numbers are improved by preconditioned conjugate gradients from where they are, which
    lowers the error as well.
    """
    output = layer_output(weight, patch_gram, cross, energy)
    weight = checked_weight(weight)
    split = split_of(weight, axis)
    checked_rank(rank, full_rank(weight, axis), f"rank of a separable {weight.shape}")
    problem = _problem(split, *output.regularised(ridge))
    if start is None:
        a, h = problem.start(rank, split.pack(weight))
    else:
        a, h = split.pack_factors(start.first, start.second)
        h = problem.improve_second(a, h)
    squared = problem.squared_error(a, h)

    def output_error() -> float:
        return output.error(split.unpack(a, h).reshape(len(weight), -1))

    history = [output_error()]
    for _ in range(sweeps):
        before = squared
        a = problem.improve_first(a, h)
        h = problem.improve_second(a, h)
        squared = problem.squared_error(a, h)
        history.append(output_error())
        if before - squared <= tolerance * before:
            break
    return Separable(*split.factors(*balanced(a, h)), history[-1], tuple(history))


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    """min over A, H of ``tr (W - H A) G (W - H A)ᵀ``; target W (O, Q, P), metric G (Q·P, Q·P)."""

    target: Array
    metric: Array

    def residual(self, a: Array, h: Array) -> Array:
        """(O, Q·P)."""
        outputs, rank = len(h), h.shape[2]
        product = (h.reshape(-1, rank) @ a.T).reshape(outputs, -1)
        return np.asarray(self.target.reshape(outputs, -1) - product)

    def squared_error(self, a: Array, h: Array) -> float:
        residual = self.residual(a, h)
        return float(np.vdot(residual @ self.metric, residual))

    def start(self, rank: int, weight: Array) -> tuple[Array, Array]:
        """The better of a whitened and the plain SVD, each with its second factor refitted."""
        outputs, q, p = weight.shape
        blocks = self.metric.reshape(q, p, q, p)
        pooled = np.einsum("qpqs->ps", blocks) / q
        best: tuple[float, Array, Array] | None = None
        for root, source in ((psd_root(pooled), self.target), (np.eye(p), weight)):
            matrix = source.reshape(-1, p).T  # (P, O·Q)
            basis = right_basis(root, matrix)[1][:, :rank]
            a, h = matrix @ basis, basis.reshape(outputs, q, rank)
            h = self.improve_second(a, h)
            squared = self.squared_error(a, h)
            if best is None or squared < best[0]:
                best = squared, a, h
        assert best is not None
        return best[1], best[2]

    def improve_second(self, a: Array, h: Array) -> Array:
        """Exact minimum over H: features z_q = Aᵀ x_q, one (Q·r, Q·r) system for all outputs."""
        outputs, q, rank = h.shape
        p = len(a)
        mapped = (self.metric.reshape(-1, p) @ a).reshape(q * p, q * rank)  # G Kᵀ
        gram = np.matmul(a.T, mapped.reshape(q, p, q * rank)).reshape(q * rank, q * rank)
        step = gentle_solve((gram + gram.T) / 2, (self.residual(a, h) @ mapped).T)
        return h + step.T.reshape(outputs, q, rank)

    def improve_first(self, a: Array, h: Array) -> Array:
        """Minimum over A: exactly for small factors, else conjugate gradients from A."""
        if not h.any():
            return a  # nothing reads it
        outputs, q, rank = h.shape
        p = len(a)
        flat = h.reshape(-1, rank)  # (O·Q, r)
        gradient = (self.residual(a, h) @ self.metric).reshape(-1, p).T @ flat  # (P, r)
        pairs = np.einsum("obr,ocs->bcrs", h, h, optimize=True)
        blocks = self.metric.reshape(q, p, q, p)
        if a.size <= DIRECT_UNKNOWNS:
            normal = np.einsum("bcrs,bpct->prts", pairs, blocks, optimize=True).reshape(a.size, a.size)
            return a + gentle_solve((normal + normal.T) / 2, gradient.ravel()).reshape(p, rank)

        def apply(direction: Array) -> Array:
            image = (flat @ direction.T).reshape(outputs, q * p) @ self.metric
            return np.asarray(image.reshape(-1, p).T @ flat)

        return a + _conjugate_gradients(apply, gradient, _kronecker_inverse(pairs, blocks))


def _problem(split: Split, target: Array, metric: Array) -> _Problem:
    order = split.patch_order()
    packed = target[:, order].reshape(split.shape[0], split.q, split.p)
    return _Problem(packed, np.ascontiguousarray(metric[np.ix_(order, order)]))


def _kronecker_inverse(pairs: Array, blocks: Array) -> Callable[[Array], Array]:
    """Invert the Kronecker product nearest to ``Σ_bc pairs[b, c] ⊗ blocks[:, b, :, c]``.

    That product is positive definite as the sum is (Van Loan & Pitsianis 1993); its factors come from the
    leading eigenvector of a (Q², Q²) matrix.
    """
    q, rank, p = len(pairs), pairs.shape[2], blocks.shape[1]
    small = pairs.reshape(q * q, rank * rank)
    large = blocks.transpose(0, 2, 1, 3).reshape(q * q, p * p)
    small_gram = small @ small.T
    root = psd_root(small_gram + 1e-14 * np.trace(small_gram) * np.eye(q * q))
    leading = scipy.linalg.eigh(root.T @ (large @ large.T) @ root)[1][:, -1]
    weights = root @ leading
    right = (weights @ large).reshape(p, p)
    left = (np.linalg.solve(root.T, leading) @ small).reshape(rank, rank)
    # The leading pair is definite up to a common sign.
    if np.trace(left) < 0:
        left, right = -left, -right

    from_left, from_right = gentle_inverse(left), gentle_inverse(right)
    return lambda residual: from_left(from_right(residual).T).T


def _conjugate_gradients(
    apply: Callable[[Array], Array],
    gradient: Array,
    precondition: Callable[[Array], Array],
    steps: int = 12,
    tolerance: float = 1e-2,
) -> Array:
    """Return x with ``apply(x) ≈ gradient``; from 0, so every step lowers the quadratic."""
    x = np.zeros_like(gradient)
    residual = gradient
    conditioned = precondition(residual)
    direction = conditioned
    size = first = float(np.vdot(residual, conditioned))
    for _ in range(steps):
        if size <= tolerance**2 * first or size <= 0:
            break
        image = apply(direction)
        curvature = float(np.vdot(direction, image))
        if curvature <= 0:
            break
        length = size / curvature
        x = x + length * direction
        residual = residual - length * image
        conditioned = precondition(residual)
        size, before = float(np.vdot(residual, conditioned)), size
        direction = conditioned + (size / before) * direction
    return x
