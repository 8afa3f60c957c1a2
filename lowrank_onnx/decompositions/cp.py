"""Canonical polyadic decomposition (CP) of any tensor, and of a convolution: a sum of rank-one terms.

    T[i, j, ..., l] ≈ Σ_r A[i, r] · B[j, r] · ... · D[l, r]

For a convolution (O, I, K): 1 x 1 to R channels, a depthwise k x k, 1 x 1 back; with the kernel axes apart,
the depthwise becomes one per axis. Terms of a CP can grow without bound and cancel each other; a correction
after the fit takes their norms down at the error that was reached (Phan et al. 2020, CPD-EPC).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import scipy.linalg
import scipy.optimize

from lowrank_onnx.decompositions.output_metric import checked_weight, gentle_solve
from lowrank_onnx.linalg import Array

EXACT = 1e-7  # relative errors below are rounding of the Gram form: no slack there to spend on smaller norms


@dataclass(frozen=True, slots=True, eq=False)
class CP:
    """Factors of a CP.

    Attributes:
        factors: One (n, R) per axis of the tensor; the columns of a term have one norm, largest term first.
        error: Relative Frobenius error.
        max_component_norm: Norm of the largest rank-one term, relative to the tensor. Far above 1 means terms
            that cancel: trouble in half precision and in int8.
    """

    factors: tuple[Array, ...]
    error: float
    max_component_norm: float

    @property
    def output(self) -> Array:
        """(O, R) of a convolution weight."""
        return self.factors[0]

    @property
    def input(self) -> Array:
        """(I, R) of a convolution weight."""
        return self.factors[1]

    @property
    def spatial(self) -> tuple[Array, ...]:
        """One (K, R), or one (k, R) per kernel axis where they were kept apart."""
        return self.factors[2:]

    def tensor(self) -> Array:
        """The sum of the terms, one axis per factor."""
        shape = tuple(len(factor) for factor in self.factors)
        return (self.factors[0] @ khatri_rao(self.factors[1:]).T).reshape(shape)


def cp(
    weight: Array,
    rank: int,
    split_kernel: bool = False,
    rng: np.random.Generator | int = 0,
    restarts: int = 3,
    iterations: int = 200,
    tolerance: float = 1e-5,
    slack: float = 1.002,
) -> CP:
    """CP of a convolution weight (O, I, *kernel).

    Args:
        weight: (O, I, *kernel).
        rank: R ≥ 1; more than I · K is never needed for a kernel of K positions.
        split_kernel: One factor per kernel axis instead of one over all of them. The error is larger.
        rng, restarts, iterations, tolerance, slack: as in ``cp_tensor``.

    Returns:
        Factors (O, R), (I, R) and spatial ones. Bad terms are never an exception: read ``max_component_norm``.

    Source: Lebedev et al. 2015, arXiv:1412.6553 (kernel axes apart); Astrid & Lee 2017, arXiv:1701.07148.
    """
    weight = checked_weight(weight)
    tensor = weight if split_kernel else weight.reshape(*weight.shape[:2], -1)
    return cp_tensor(tensor, rank, rng, restarts, iterations, tolerance, slack)


def cp_tensor(
    tensor: Array,
    rank: int,
    rng: np.random.Generator | int = 0,
    restarts: int = 3,
    iterations: int = 200,
    tolerance: float = 1e-5,
    slack: float = 1.002,
) -> CP:
    """CP of a tensor of two or more axes by alternating least squares, then norm correction.

    Args:
        tensor: Any shape, finite.
        rank: R ≥ 1.
        rng: Source of the random starts; the same seed gives the same factors.
        restarts: Random starts tried beside singular vectors; the best after a tenth of the iterations goes on.
        iterations: Most rounds over all factors.
        tolerance: Stop when a round lowers the squared error by less than this share of itself.
        slack: Factor on the error that the correction of the norms may spend, ≥ 1; 1: no correction.
    """
    if rank < 1:
        raise ValueError(f"rank of a CP must be >= 1, got {rank}")
    if slack < 1:
        raise ValueError(f"slack must be >= 1, got {slack}; it multiplies the error")
    tensor = checked_weight(tensor)
    norm = float(np.linalg.norm(tensor))
    if norm == 0:
        return CP(tuple(np.zeros((length, rank)) for length in tensor.shape), 0.0, 0.0)
    problem = _Problem(tensor / norm)
    rng = np.random.default_rng(rng)
    starts = [problem.singular_start(rank, rng)] + [problem.random_start(rank, rng) for _ in range(restarts)]
    short = max(1, iterations // 10)
    tried = [problem.alternate(start, short, tolerance) for start in starts]
    factors = min(tried, key=problem.squared_error)
    factors = problem.alternate(factors, iterations - short, tolerance)
    error = float(np.sqrt(problem.squared_error(factors)))
    if slack > 1 and error > EXACT:
        factors = problem.lower_norms(factors, slack * error)
    factors = _ordered(factors)
    largest = float(component_norms(factors).max())
    scale = norm ** (1 / tensor.ndim)
    result = CP(tuple(factor * scale for factor in factors), 0.0, largest)
    error = float(np.linalg.norm(result.tensor() - tensor)) / norm
    return CP(result.factors, error, largest)


def khatri_rao(factors: Sequence[Array]) -> Array:
    """Column-wise Kronecker product: (a, R), (b, R), ... -> (a·b·..., R), the first index slowest."""
    return reduce(lambda left, right: (left[:, None] * right[None]).reshape(-1, right.shape[1]), factors)


def component_norms(factors: Sequence[Array]) -> Array:
    """(R,) norms of the rank-one terms."""
    return np.asarray(np.prod([np.linalg.norm(factor, axis=0) for factor in factors], axis=0))


def sensitivity(factors: Sequence[Array]) -> float:
    """Expected squared change of the tensor under unit noise on every factor entry (Phan et al. 2020)."""
    squares = [np.square(factor).sum(axis=0) for factor in factors]
    return float(
        sum(
            len(factor) * np.prod([s for other, s in enumerate(squares) if other != mode], axis=0).sum()
            for mode, factor in enumerate(factors)
        )
    )


class _Problem:
    """A tensor of norm 1, with what its contractions share.

    All factors but the first see the tensor through its product with the first, which a sweep computes once.
    """

    def __init__(self, tensor: Array) -> None:
        self.tensor = tensor
        self.shape = tensor.shape
        self._contracted: tuple[Array, Array] | None = None

    def singular_start(self, rank: int, rng: np.random.Generator) -> list[Array]:
        """Leading singular vectors of every unfolding, topped up with random columns."""
        start = []
        for mode, length in enumerate(self.shape):
            matrix = np.moveaxis(self.tensor, mode, 0).reshape(length, -1)
            vectors = scipy.linalg.eigh(matrix @ matrix.T)[1][:, ::-1][:, :rank]
            more = rng.standard_normal((len(matrix), rank - vectors.shape[1])) / np.sqrt(len(matrix))
            start.append(np.concatenate([vectors, more], axis=1))
        return start

    def random_start(self, rank: int, rng: np.random.Generator) -> list[Array]:
        return [rng.standard_normal((length, rank)) for length in self.shape]

    def normal_equations(self, factors: Sequence[Array], mode: int) -> tuple[Array, Array]:
        """Right side (n, R) and Gram (R, R) of the least-squares problem for one factor."""
        others = [factor for other, factor in enumerate(factors) if other != mode]
        gram = np.asarray(np.prod([factor.T @ factor for factor in others], axis=0))
        if mode == 0:
            return self.tensor.reshape(self.shape[0], -1) @ khatri_rao(others), gram
        through = self._through_first(factors[0])  # (R, *shape[1:])
        rank = len(through)
        if mode > 1:
            flat = through.reshape(rank, self.shape[1], -1)
            through = np.matmul(factors[1].T[:, None, :], flat).reshape(rank, 1, *self.shape[2:])
            others = others[1:]  # the first two are in; their axis of length 1 does no harm
        rest = khatri_rao([np.ones((1, rank)), *others[1:]])  # (all axes but this, R)
        moved = np.moveaxis(through, mode, 1).reshape(rank, self.shape[mode], -1)
        return np.matmul(moved, rest.T[:, :, None])[:, :, 0].T, gram

    def _through_first(self, first: Array) -> Array:
        if self._contracted is None or self._contracted[0] is not first:
            product = first.T @ self.tensor.reshape(self.shape[0], -1)
            self._contracted = first, product.reshape(-1, *self.shape[1:])
        return self._contracted[1]

    def squared_error(self, factors: Sequence[Array]) -> float:
        """|T - factors|², relative; never below rounding of the Gram form."""
        right, gram = self.normal_equations(factors, 0)
        squared = 1 - 2 * float(np.vdot(right, factors[0])) + float(np.vdot(factors[0] @ gram, factors[0]))
        return max(squared, 0.0)

    def alternate(self, factors: Sequence[Array], iterations: int, tolerance: float) -> list[Array]:
        """Alternating least squares; the squared error never rises."""
        factors = list(factors)
        last = len(factors) - 1
        before = 2.0  # above any squared error after a least-squares step: the tensor has norm 1
        for _ in range(iterations):
            for mode in range(len(factors)):
                right, gram = self.normal_equations(factors, mode)
                # A step from where we are: harmless where two terms have become the same.
                step = gentle_solve(gram, (right - factors[mode] @ gram).T).T
                factors[mode] = factors[mode] + step
            squared = 1 - 2 * float(np.vdot(right, factors[last]))
            squared += float(np.vdot(factors[last] @ gram, factors[last]))
            factors = _even(factors)
            if squared < EXACT**2 or before - squared <= tolerance * before:
                break
            before = squared
        return factors

    def lower_norms(self, factors: Sequence[Array], bound: float, rounds: int = 30) -> list[Array]:
        """Lower the sensitivity at an error of at most ``bound``, one factor at a time.

        With the others fixed, the sensitivity is Σ_r w_r |f_r|², so the minimum is a ridge solution with
        weights w and the ridge μ at which the error meets the bound: the root of a falling function.
        """
        factors = list(factors)
        before = sensitivity(factors)
        for _ in range(rounds):
            for mode in range(len(factors)):
                factors[mode] = self._least_sensitive(factors, mode, bound**2)
            factors = _even(factors)
            now = sensitivity(factors)
            if before - now <= 1e-3 * before:
                break
            before = now
        return factors

    def _least_sensitive(self, factors: list[Array], mode: int, bound: float) -> Array:
        right, gram = self.normal_equations(factors, mode)
        root = np.sqrt(_sensitivity_weights(factors, mode))
        root = np.where(root > 0, root, 1.0)  # a term that is zero stays zero under any weight
        values, vectors = scipy.linalg.eigh(gram / np.outer(root, root))
        values = np.maximum(values, 0.0)
        turned = (right / root) @ vectors  # (n, R)
        energies = np.square(turned).sum(axis=0)

        def excess(log_ridge: float) -> float:
            shrunk = values + np.exp(log_ridge)
            squared = 1 + float(np.sum(energies * (values / shrunk - 2) / shrunk))
            return squared - bound

        low, high = float(np.log(1e-14 * values[-1])), float(np.log(1e3 * values[-1]))
        if excess(low) >= 0:
            return factors[mode]  # rounding has used up the slack: keep what is known to be feasible
        if excess(high) <= 0:
            ridge = high
        else:
            ridge = scipy.optimize.brentq(excess, low, high, xtol=1e-6)
            while excess(ridge) > 0:  # the root may be met from the far side
                ridge -= 1e-6
        return np.asarray((turned / (values + np.exp(ridge))) @ vectors.T / root)


def _sensitivity_weights(factors: Sequence[Array], mode: int) -> Array:
    """(R,) weight of the squared norm of each column of a factor in ``sensitivity``."""
    squares = [np.square(factor).sum(axis=0) for factor in factors]
    others = [other for other in range(len(factors)) if other != mode]
    return np.asarray(
        sum(
            len(factors[one]) * np.prod([squares[k] for k in others if k != one] or [np.ones_like(squares[0])], axis=0)
            for one in others
        )
    )


def _even(factors: Sequence[Array]) -> list[Array]:
    """The same terms with equal column norms in all factors; a term that is zero is zero in all."""
    norms = np.array([np.linalg.norm(factor, axis=0) for factor in factors])  # (axes, R)
    shared = np.prod(norms, axis=0) ** (1 / len(factors))
    return [
        factor * np.divide(shared, norm, out=np.zeros_like(norm), where=norm > 0)
        for factor, norm in zip(factors, norms, strict=True)
    ]


def _ordered(factors: Sequence[Array]) -> list[Array]:
    """Largest term first; the largest entry of every column but the first factor's positive."""
    order = np.argsort(-component_norms(factors), kind="stable")
    factors = [factor[:, order] for factor in factors]
    flips = np.ones(len(order))
    for index, factor in enumerate(factors[1:], start=1):
        largest = factor[np.abs(factor).argmax(axis=0), np.arange(len(order))]
        signs = np.where(largest < 0, -1.0, 1.0)
        factors[index] = factor * signs
        flips *= signs
    return [factors[0] * flips, *factors[1:]]
