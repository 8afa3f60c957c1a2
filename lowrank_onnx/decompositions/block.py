"""Block low-rank form of a linear layer: a grid of blocks, each with a rank of its own.

rows      K in g groups       y = Σ_i (x_i A_i) B_i            one mix of what all groups give
columns   N in g groups       y_j = (x A_j) B_j
grid      both                y_j = Σ_i (x_i A_ij) B_ij
diagonal  both, and a whole   y_j = x_j D_j + (x A) B_j        dense blocks, low rank for the rest
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_onnx.decompositions.block_sum import BlockSum, Stage, ordered, segments
from lowrank_onnx.decompositions.svd import data_aware
from lowrank_onnx.linalg import Array

FORMS = ("rows", "columns", "grid", "diagonal")
_ROUNDS = 3  # of the alternation between dense blocks and the low-rank rest; it falls little after that


@dataclass(frozen=True, eq=False)
class Grid:
    """The best approximations of every block in the metric of its own inputs, nested by rank.

    Attributes:
        first: ``first[i][j]`` (K_i, q) the directions of block (i, j), most important first.
        energies: ``energies[i][j]`` (q,) squared output energy of each direction.
        rows, columns: Orders; see BlockSum.
    """

    first: tuple[tuple[Array, ...], ...]
    energies: tuple[tuple[Array, ...], ...]
    widths: tuple[int, ...]
    rows: Array | None
    columns: Array | None


def block_grid(
    matrix: Array, gram: Array, form: str, blocks: int, rows: Array | None = None, columns: Array | None = None
) -> Grid:
    """Decompose every block of a partition once, for all ranks.

    Args:
        matrix: (K, N).
        gram: (K, K) second moment of the input with its ridge.
        form: ``rows``, ``columns`` or ``grid``.
        blocks: Groups along each axis that is cut, ≥ 1.
        rows, columns: Orders of inputs and outputs.

    Source: block low rank, Amestoy et al. 2015, doi:10.1137/120903476; groups of inputs: ALDS, Liebenwein et al.
    2021, arXiv:2107.11442. The metric of a block is that of its own inputs; see BlockSum.refitted for the rest.
    """
    columns = None if form == "rows" else columns  # the mix takes any order of the outputs
    rows = None if form == "columns" else rows
    matrix, gram = ordered(matrix, rows, columns), ordered(gram, rows, rows)
    across = segments(len(matrix), 1 if form == "columns" else blocks)
    along = segments(matrix.shape[1], 1 if form == "rows" else blocks)
    first, energies = [], []
    for high in across:
        bases = [data_aware(matrix[high, wide], gram[high, high], 0.0) for wide in along]
        first.append(tuple(basis.weight @ basis.right for basis in bases))
        energies.append(tuple(basis.sigma**2 for basis in bases))
    return Grid(tuple(first), tuple(energies), tuple(wide.stop - wide.start for wide in along), rows, columns)


def block_low_rank(grid: Grid, matrix: Array, gram: Array, rank: int) -> BlockSum:
    """Give the blocks ranks whose mean is ``rank``, the directions with the most energy first.

    Every group of inputs and of outputs keeps at least one direction; the second factors are fitted together.
    """
    counts = _shares(grid, rank)
    high, wide = counts.shape
    first = tuple(
        np.concatenate([_unit(grid.first[i][j][:, : counts[i, j]]) for j in range(wide)], axis=1) for i in range(high)
    )
    labels = np.concatenate([np.repeat(np.arange(wide), counts[i]) for i in range(high)])
    order = np.argsort(labels, kind="stable") if min(high, wide) > 1 else None
    second = tuple(np.zeros((int(counts[:, j].sum()), width)) for j, width in enumerate(grid.widths))
    made = BlockSum(((Stage(first), Stage(second, order)),), grid.rows, grid.columns)
    return made.refitted(matrix, gram)


def block_diagonal(
    matrix: Array, gram: Array, blocks: int, rank: int, rows: Array | None = None, columns: Array | None = None
) -> BlockSum:
    """Dense diagonal blocks and one low-rank map for the rest, by turns.

    Args:
        rank: Of the map; 0 gives the blocks alone.

    Source: alternating least squares; both steps are exact in the metric of the data.
    """
    weight, metric = ordered(matrix, rows, columns), ordered(gram, rows, rows)
    pairs = list(zip(segments(len(weight), blocks), segments(weight.shape[1], blocks), strict=True))
    if rank == 0:
        alone = BlockSum(((Stage(tuple(weight[h, w] for h, w in pairs)),),), rows, columns)
        return alone.refitted(matrix, gram)
    rest = np.array(weight)
    for high, wide in pairs:
        rest[high, wide] = 0.0
    made = None
    for _ in range(_ROUNDS):
        first, second = data_aware(rest, metric, 0.0).factors(rank)
        diagonal = Stage(tuple(weight[h, w] for h, w in pairs))
        chain = (Stage((_unit(first),)), Stage((second,)))
        made = BlockSum(((diagonal,), chain), rows, columns).refitted(matrix, gram)
        rest = np.array(weight)
        for (high, wide), block in zip(pairs, made.branches[0][0].blocks, strict=True):
            rest[high, wide] -= block
    assert made is not None
    return made


def _shares(grid: Grid, rank: int) -> Array:
    """(p, q) ranks of the blocks."""
    high, wide = len(grid.first), len(grid.widths)
    entries = [
        (-energy, place, i, j)
        for i in range(high)
        for j in range(wide)
        for place, energy in enumerate(grid.energies[i][j])
    ]
    counts = np.zeros((high, wide), int)
    strength = np.array([[grid.energies[i][j].sum() for j in range(wide)] for i in range(high)])
    for i in range(high):
        counts[i, int(strength[i].argmax())] = 1
    for j in range(wide):
        if not counts[:, j].any():
            counts[int(strength[:, j].argmax()), j] = 1
    left = max(rank * high * wide - int(counts.sum()), 0)
    for _, place, i, j in sorted(entries):
        if left == 0:
            break
        if place >= counts[i, j]:
            counts[i, j] += 1
            left -= 1
    return counts


def _unit(directions: Array) -> Array:
    """Columns of unit length, so that half precision holds them."""
    norms = np.linalg.norm(directions, axis=0)
    return np.asarray(directions / np.where(norms > 0, norms, 1.0))
