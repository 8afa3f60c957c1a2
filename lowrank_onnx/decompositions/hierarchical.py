"""Hierarchical off-diagonal low rank (HODLR) of a linear layer.

    W = [ W_11  W_12 ]      W_12, W_21 of rank r;  W_11, W_22 the same again, dense at the leaves
        [ W_21  W_22 ]

Carried out level by level: at level l the input is cut into 2^l groups, each is multiplied by its first factor,
neighbours change places, and each is multiplied by its second factor; the levels and the leaves are summed.
"""

from __future__ import annotations

import numpy as np

from lowrank_onnx.decompositions.block_sum import BlockSum, Stage, ordered, segments
from lowrank_onnx.decompositions.svd import data_aware
from lowrank_onnx.linalg import Array


def hodlr(
    matrix: Array, gram: Array, depth: int, rank: int, rows: Array | None = None, columns: Array | None = None
) -> BlockSum:
    """Decompose at one rank for all off-diagonal blocks (full rank for those that are narrower).

    Args:
        matrix: (K, N).
        gram: (K, K) second moment of the input with its ridge.
        depth: Levels, ≥ 1; 2^depth dense leaves.
        rank: ≥ 1.
        rows, columns: Orders of inputs and outputs; see ``seriate``.

    Source: Ambikasaran & Darve 2013, doi:10.1007/s10915-013-9714-z. Each block is truncated in the metric of its
    own inputs; second factors and leaves are then fitted together in the metric of all.
    """
    weight, metric = ordered(matrix, rows, columns), ordered(gram, rows, rows)
    chains: list[tuple[Stage, ...]] = []
    for level in range(1, depth + 1):
        across, along = segments(len(weight), 2**level), segments(weight.shape[1], 2**level)
        first, second = [], []
        for place, high in enumerate(across):
            block = weight[high, along[place ^ 1]]
            directions = data_aware(block, metric[high, high], 0.0)
            count = min(rank, *block.shape)
            first.append(directions.factors(count)[0])
            second.append(directions.factors(count)[1])
        swapped = [place ^ 1 for place in range(2**level)]
        edges = np.cumsum([0, *(part.shape[1] for part in first)])
        order = np.concatenate([np.arange(edges[place], edges[place + 1]) for place in swapped])
        norms = [np.linalg.norm(part, axis=0) for part in first]
        unit = tuple(part / np.where(n > 0, n, 1.0) for part, n in zip(first, norms, strict=True))
        chains.append((Stage(unit), Stage(tuple(second[place] for place in swapped), order)))
    leaves = zip(segments(len(weight), 2**depth), segments(weight.shape[1], 2**depth), strict=True)
    chains.append((Stage(tuple(weight[high, wide] for high, wide in leaves)),))
    return BlockSum(tuple(chains), rows, columns).refitted(matrix, gram)


def hodlr_parameters(rows: int, columns: int, depth: int, rank: int) -> int:
    """Elements that ``hodlr`` stores."""
    total = 0
    for level in range(1, depth + 1):
        sides = list(zip(segments(rows, 2**level), segments(columns, 2**level), strict=True))
        for place, (high, _) in enumerate(sides):
            k, n = high.stop - high.start, sides[place ^ 1][1].stop - sides[place ^ 1][1].start
            total += min(rank, k, n) * (k + n)
    leaves = zip(segments(rows, 2**depth), segments(columns, 2**depth), strict=True)
    return int(total + sum((high.stop - high.start) * (wide.stop - wide.start) for high, wide in leaves))
