"""A table as a train of cores over the digits of its row numbers, rows sorted so that neighbours are alike.

    e_i ≈ G1[i_1] · G2[i_2] ⋯ Gd[i_d],   G_k[j] of (n_k r_{k-1}, r_k),   i_1 ... i_d the digits of the place of row i

A trained table has no order of rows that a train could use: its rows are sorted first, by how much they count
and then by likeness, and what they count is a weight for every first digit. Arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import scipy.linalg

from lowrank_onnx.decompositions.tensor_train import tensor_train, tt_matrix_to_dense
from lowrank_onnx.linalg import Array, finite_svd

_NARROW = 3.0  # how much shorter the first side of a cut is than the other: less to decompose, and no worse


@dataclass(frozen=True, eq=False)
class TableTrain:
    """The train of a table (V, F) at every rank of its first bond.

    Attributes:
        place: (V,) where every row lies in the sorted table.
        rows: m_1 ... m_d, product V or a little more.
        columns: n_1 ... n_d, product F.
        left: (m_1 n_1, q) the first core of every rank: its first columns.
        rest: (q, ...) what the first rows of it leave to the other cores.
    """

    place: Array
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    left: Array
    rest: Array

    def full(self) -> tuple[int, ...]:
        """Bond ranks at which any table is reproduced."""
        return full_ranks(self.rows, self.columns)

    def cores(self, ranks: Sequence[int]) -> list[Array]:
        """Cores (r_{k-1}, m_k, n_k, r_k) with bond ranks of at most ``ranks``, padded with zeros to them."""
        first = self.left[:, : ranks[0]].reshape(1, self.rows[0], self.columns[0], -1)
        rest = self.rest[: first.shape[-1]]
        if len(self.rows) == 2:
            return _padded([first, rest.reshape(len(rest), self.rows[1], self.columns[1], 1)], ranks)
        sizes = [m * n for m, n in zip(self.rows[1:], self.columns[1:], strict=True)]
        train = tensor_train(rest.reshape(len(rest) * sizes[0], *sizes[1:]), ranks[1:])
        shapes = [(len(rest), -1), *((len(core), -1) for core in train[1:])]
        others = [
            core.reshape(shape[0], m, n, core.shape[-1])
            for core, shape, m, n in zip(train, shapes, self.rows[1:], self.columns[1:], strict=True)
        ]
        return _padded([first, *others], ranks)

    def restored(self, cores: Sequence[Array]) -> Array:
        """(V, F) what cores make of the table."""
        return np.asarray(tt_matrix_to_dense(cores)[self.place])


def table_train(table: Array, weights: Array, count: int = 2) -> TableTrain:
    """Return the trains of a table, the error of every row counted by its weight.

    Args:
        table: (V, F).
        weights: (V,) above zero.
        count: Cores, 2 or more.

    The cut of the first bond is the best there is for weights that are equal within a first digit.
    Source: Oseledets 2011, doi:10.1137/090752286; of tables: TT-Rec, MLSys 2021, arXiv:2101.11714.
    """
    height, width = table.shape
    rows, columns = split_table(height, width, count)
    order = sorted_rows(table, weights, rows[0])
    padded = np.zeros((prod(rows), width))
    padded[: len(table)] = table[order]
    counted = np.zeros(len(padded))
    counted[: len(table)] = weights[order]
    shares = counted.reshape(rows[0], -1)
    used = np.maximum((shares > 0).sum(axis=1), 1)
    scale = np.sqrt(shares.sum(axis=1) / used)
    scale = np.repeat(np.where(scale > 0, scale, 1.0), columns[0])  # a digit of padding alone is zero anyway
    axes = [axis for k in range(count) for axis in (k, count + k)]
    matrix = padded.reshape(*rows, *columns).transpose(axes).reshape(rows[0] * columns[0], -1)
    u, sigma, vt = finite_svd(scale[:, None] * matrix)
    place = np.empty(len(table), np.int32)
    place[order] = np.arange(len(table), dtype=np.int32)
    root = np.sqrt(np.where(sigma > 0, sigma, 1.0))
    return TableTrain(place, rows, columns, u / scale[:, None] * root, (sigma / root)[:, None] * vt)


def split_table(rows: int, columns: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Digits of rows (product ``rows`` or a little more) and of columns (product ``columns``), ``count`` of each.

    Columns are split as evenly as their divisors allow, the short digits first; rows so that all m_k n_k are
    about equal, the first one smaller.
    """
    widths: list[int] = []
    left = columns
    for k in range(count, 1, -1):
        target = left ** (1 / k)
        divisors = [d for d in range(1, left + 1) if left % d == 0]
        widths.append(min(divisors, key=lambda d: (abs(np.log(d / target)), d)))
        left //= widths[-1]
    widths = sorted([*widths, left])
    heights: list[int] = []
    rest = rows
    for place in range(count - 1):
        even = float(rest * prod(widths[place:])) ** (1 / (count - place))
        side = even / np.sqrt(_NARROW) if place == 0 else even
        height = min(max(round(side / widths[place]), 2), rest)
        near = range(min(max(2, round(0.8 * height)), height), min(round(1.25 * height), rest) + 1)
        heights.append(min(near, key=lambda h: (h * -(-rest // h), abs(h - height))))  # the least padding
        rest = -(-rest // heights[-1])
    return (*heights, rest), tuple(widths)


def full_ranks(rows: Sequence[int], columns: Sequence[int]) -> tuple[int, ...]:
    """Bond ranks at which any table of these digits is reproduced."""
    sizes = [m * n for m, n in zip(rows, columns, strict=True)]
    return tuple(min(prod(sizes[:k]), prod(sizes[k:])) for k in range(1, len(sizes)))


def sorted_rows(table: Array, weights: Array, digits: int) -> Array:
    """(V,) the rows in the order of a train: heavy ones first, in steps of two, and alike ones side by side.

    Args:
        digits: How many blocks of neighbours there will be; finer than that nothing has to be sorted.
    """
    steps = np.floor(np.log2(weights / weights.min()) + 1e-9)
    smallest = -(-len(table) // digits)
    order = []
    for step in np.unique(steps)[::-1]:
        order += _halved(table, np.flatnonzero(steps == step), smallest)
    return np.concatenate(order)


def _halved(table: Array, members: Array, smallest: int) -> list[Array]:
    """Halve a set of rows at the median of its leading direction until the parts are small."""
    if len(members) <= smallest:
        return [members]
    part = table[members].astype(np.float64)
    part -= part.mean(axis=0)
    last = part.shape[1] - 1
    _, vector = scipy.linalg.eigh(part.T @ part, subset_by_index=(last, last))
    along = part @ vector[:, 0]
    along *= np.sign(along[np.argmax(np.abs(along))]) or 1.0
    order = np.argsort(along, kind="stable")
    half = max(smallest * (len(members) // (2 * smallest)), smallest)  # whole blocks, as far as there are
    return [
        *_halved(table, members[np.sort(order[:half])], smallest),
        *_halved(table, members[np.sort(order[half:])], smallest),
    ]


def _padded(cores: Sequence[Array], ranks: Sequence[int]) -> list[Array]:
    """Cores with their bonds filled up to ``ranks`` with zeros, where a bond needs less."""
    low, high = [1, *ranks], [*ranks, 1]
    return [
        np.pad(core, [(0, before - core.shape[0]), (0, 0), (0, 0), (0, after - core.shape[-1])])
        for core, before, after in zip(cores, low, high, strict=True)
    ]
