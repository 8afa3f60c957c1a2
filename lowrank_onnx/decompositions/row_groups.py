"""Groups of rows, each with its own subspace and rank: often read rows get many numbers, rare ones few.

    minimise  Σ_i f_i |e_i - ê_i|² + λ · numbers stored,   ê_i = e_i B_g B_gᵀ for row i of group g

The groups start as ranges of frequency; then rows move to the group that is cheaper for them, price of the
numbers included, and every group is fitted again. Arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from lowrank_onnx.decompositions.rows import gram_of
from lowrank_onnx.linalg import Array

_LOWEST, _HIGHEST = 1e-18, 1e3  # prices tried, in units of the weighted energy of the table a number


@dataclass(frozen=True, eq=False)
class RowGroups:
    """A table (V, F) in groups.

    Attributes:
        member: (V,) group of every row.
        bases: (F, r_g) orthonormal columns of every group.
    """

    member: Array
    bases: tuple[Array, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank by group."""
        return tuple(basis.shape[1] for basis in self.bases)

    @property
    def numbers(self) -> int:
        """Elements of all bases and thin tables, each with a row of zeros for whoever is no member."""
        sizes = np.bincount(self.member, minlength=len(self.bases))
        return int(sum(rank * (size + 1 + len(self.bases[0])) for rank, size in zip(self.ranks, sizes, strict=True)))

    def rows(self, table: Array, group: int) -> Array:
        """(n_g, r_g) thin table of one group, its rows in the order of ``table``."""
        return np.asarray(table[self.member == group].astype(np.float64) @ self.bases[group])

    def restored(self, table: Array) -> Array:
        """(V, F) what the groups make of the table."""
        made = np.zeros(table.shape)
        for group, basis in enumerate(self.bases):
            made[self.member == group] = self.rows(table, group) @ basis.T
        return made


def by_frequency(weights: Array, count: int) -> Array:
    """(V,) first groups: 0 holds the rows read most; the others share the rest, each four times the one before.

    Rows of one weight stay together, as nothing tells them apart; there may be fewer groups than asked for.
    """
    order = np.argsort(-weights, kind="stable")
    shares = np.cumsum(4.0 ** np.arange(1 - count, 1))  # the last is 1: of many groups the first vanish
    cuts = (shares[:-1] / shares[-1] * len(weights)).astype(int)
    limits = np.unique(-weights[order[cuts]])
    return np.asarray(np.searchsorted(limits, -weights, side="right"))  # a row at a limit is of the rarer group


def grouped_rows(table: Array, weights: Array, start: Array, numbers: float, rounds: int) -> RowGroups:
    """Fit groups that store at most a number of elements.

    Args:
        table: (V, F).
        weights: (V,) f, above zero.
        start: (V,) first groups, numbered from 0.
        numbers: Most elements of all thin tables and bases.
        rounds: How often rows move; the best fit met on the way is returned.

    Source: GroupReduce, Chen et al. 2018, arXiv:1806.06950, with a price instead of fixed sizes.
    """
    squared = np.einsum("vf,vf->v", table, table, dtype=np.float64)
    member, best, least = start, None, np.inf
    for _ in range(rounds + 1):
        spectra = [_spectrum(table, weights, member == group) for group in range(int(start.max()) + 1)]
        price = _price(spectra, numbers)
        bases = tuple(spectrum.basis(price) for spectrum in spectra)
        if not any(basis.size for basis in bases):  # a budget below any rank: the one that pays most
            richest = int(np.argmax([spectrum.values[:1].sum() / spectrum.cost for spectrum in spectra]))
            bases = tuple(s.vectors[:, : int(place == richest)] for place, s in enumerate(spectra))
        errors = np.stack([squared - np.sum((table @ basis) ** 2, axis=1) for basis in bases], axis=1)
        loss = float(weights @ errors[np.arange(len(table)), member])
        if loss < least:
            best, least = RowGroups(member, bases), loss
        ranks = np.array([basis.shape[1] for basis in bases])
        member = np.argmin(weights[:, None] * errors + price * ranks, axis=1)
    assert best is not None
    return best


@dataclass(frozen=True, eq=False)
class _Spectrum:
    """Of one group: squared singular values, directions, and elements that one rank costs."""

    values: Array
    vectors: Array
    cost: int

    def rank(self, price: float) -> int:
        return int((self.values > price * self.cost).sum())

    def basis(self, price: float) -> Array:
        return self.vectors[:, : self.rank(price)]


def _spectrum(table: Array, weights: Array, chosen: Array) -> _Spectrum:
    values, vectors = scipy.linalg.eigh(gram_of(table[chosen], weights[chosen]))
    size = int(chosen.sum())
    kept = min(size, len(values))
    return _Spectrum(np.maximum(values[::-1], 0)[:kept], vectors[:, ::-1][:, :kept], size + 1 + table.shape[1])


def _price(spectra: Sequence[_Spectrum], numbers: float) -> float:
    """The least price of a number at which all groups together fit."""
    energy = float(sum(spectrum.values.sum() for spectrum in spectra))
    low, high = _LOWEST * energy, _HIGHEST * energy
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        if sum(spectrum.rank(middle) * spectrum.cost for spectrum in spectra) > numbers:
            low = middle
        else:
            high = middle
    return high
