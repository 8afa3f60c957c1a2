"""Sum of Kronecker products: W ≈ Σ_k A_k ⊗ B_k, A_k (K1, N1), B_k (K2, N2).

With x as a matrix X (K1, K2) the layer is ``Y = Σ_k A_kᵀ X B_k`` (N1, N2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.decompositions.block_sum import least_squares
from lowrank_onnx.linalg import Array, finite_svd


@dataclass(frozen=True, eq=False)
class KroneckerSum:
    """A (R, K1, N1) and B (R, K2, N2)."""

    left: Array
    right: Array

    @property
    def parameters(self) -> int:
        """Elements stored."""
        return self.left.size + self.right.size

    @property
    def products(self) -> int:
        """Multiply-accumulates for one row of x: B first, then A."""
        terms, k1, n1 = self.left.shape
        _, k2, n2 = self.right.shape
        return int(terms * (k1 * k2 * n2 + n1 * k1 * n2))

    def dense(self) -> Array:
        """The matrix W (K, N) it stands for, float64."""
        left, right = self.left.astype(np.float64), self.right.astype(np.float64)
        terms, k1, n1 = left.shape
        _, k2, n2 = right.shape
        flat = left.reshape(terms, -1).T @ right.reshape(terms, -1)
        return flat.reshape(k1, n1, k2, n2).transpose(0, 2, 1, 3).reshape(k1 * k2, n1 * n2)

    def refitted(self, matrix: Array, gram: Array) -> KroneckerSum:
        """Fit all A_k to the data for the B_k at hand.

        Args:
            matrix: (K, N) what is wanted.
            gram: (K, K) second moment of x with its ridge.

        Source: normal equations; the unknowns of one n1 are (k, k1), with ``H = <B_k, G[k1, k1'] B_k'>``, the same
        for every n1.
        """
        terms, k1, n1 = self.left.shape
        _, k2, n2 = self.right.shape
        right = self.right.astype(np.float64)
        flat = right.reshape(terms, k2 * n2)
        spread = right.transpose(1, 0, 2).reshape(k2, terms * n2)
        normal = np.empty((terms, k1, terms, k1))
        for row, rows in enumerate(gram.reshape(k1, k2, k1, k2)):  # one at a time: together they would fill memory
            brought = rows.transpose(1, 0, 2).reshape(k1 * k2, k2) @ spread
            brought = brought.reshape(k1, k2, terms, n2).transpose(0, 2, 1, 3).reshape(k1 * terms, k2 * n2)
            normal[:, row] = (flat @ brought.T).reshape(terms, k1, terms).transpose(0, 2, 1)
        weighted = (gram @ matrix).reshape(k1, k2, n1, n2).transpose(0, 2, 1, 3).reshape(k1 * n1, k2 * n2)
        wanted = (weighted @ flat.T).reshape(k1, n1, terms).transpose(2, 0, 1).reshape(terms * k1, n1)
        return KroneckerSum(least_squares(normal.reshape(terms * k1, -1), wanted).reshape(terms, k1, n1), right)

    def arrays(self) -> dict[str, Array]:
        """The constants by role."""
        return {"left": self.left, "right": self.right}


def kronecker_from_arrays(arrays: Mapping[str, Array]) -> KroneckerSum:
    """Read a sum back from ``KroneckerSum.arrays``."""
    return KroneckerSum(arrays["left"], arrays["right"])


@dataclass(frozen=True, eq=False)
class Rearranged:
    """The best sums of one shape for every number of terms; ``shape`` is (K1, N1, K2, N2)."""

    u: Array
    sigma: Array
    vt: Array
    shape: tuple[int, int, int, int]

    def terms(self, count: int) -> KroneckerSum:
        """The first ``count`` terms, scale shared between both factors."""
        k1, n1, k2, n2 = self.shape
        root = np.sqrt(self.sigma[:count])[:, None]
        return KroneckerSum(
            (root * self.u[:, :count].T).reshape(-1, k1, n1), (root * self.vt[:count]).reshape(-1, k2, n2)
        )


def rearrange(matrix: Array, k1: int, n1: int) -> Rearranged:
    """Decompose W (K, N) for K1 = k1, N1 = n1, which must divide its sides.

    Source: Van Loan & Pitsianis 1993, doi:10.1007/978-94-015-8196-7_17: the SVD of the rearranged matrix
    (K1 N1, K2 N2) gives the best sum in Frobenius norm.
    """
    rows, columns = matrix.shape
    k2, n2 = rows // k1, columns // n1
    turned = np.asarray(matrix, np.float64).reshape(k1, k2, n1, n2).transpose(0, 2, 1, 3).reshape(k1 * n1, k2 * n2)
    return Rearranged(*finite_svd(turned), (k1, n1, k2, n2))


def factor_pairs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Every (K1, N1) but where one factor is a single number, or both are vectors: that is plain low rank."""
    for k1 in _divisors(rows):
        for n1 in _divisors(columns):
            if (k1, n1) not in ((1, 1), (rows, columns), (rows, 1), (1, columns)):
                yield k1, n1


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]
