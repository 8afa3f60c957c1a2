"""Monarch: block-diagonal, permutation, block-diagonal.

    W = diag(A_1 ... A_g) · P · diag(B_1 ... B_g) · P'

Inputs lie in g neighbouring groups, outputs in g strided ones (o, o + g, ...); every pair of groups is of rank k.
"""

from __future__ import annotations

import numpy as np

from lowrank_onnx.decompositions.block_sum import BlockSum, Stage, ordered, segments
from lowrank_onnx.decompositions.svd import data_aware
from lowrank_onnx.linalg import Array


def monarch(matrix: Array, gram: Array, groups: int, rank: int) -> BlockSum:
    """Project on the structure: every pair of groups is truncated on its own, which is the optimum without data.

    Args:
        matrix: (K, N).
        gram: (K, K) second moment of the input with its ridge.
        groups: g, ≥ 2.
        rank: k of every pair, ≥ 1; narrower pairs are kept whole.

    Source: Dao et al. 2022, arXiv:2204.00595, algorithm 1, for any rank and any shape. With data every slice is
    whitened by its own inputs, and the second factors are fitted together.
    """
    columns = strided(matrix.shape[1], groups)
    weight = ordered(matrix, None, columns)
    across, along = segments(len(weight), groups), segments(weight.shape[1], groups)
    first, labels = [], []
    for high in across:
        pairs = [data_aware(weight[high, wide], gram[high, high], 0.0) for wide in along]
        parts = [pair.factors(min(rank, pair.right.shape[1]))[0] for pair in pairs]
        norms = [np.linalg.norm(part, axis=0) for part in parts]
        first.append(np.concatenate([p / np.where(n > 0, n, 1.0) for p, n in zip(parts, norms, strict=True)], axis=1))
        labels += [np.full(part.shape[1], place) for place, part in enumerate(parts)]
    outputs = np.concatenate(labels)
    order = np.argsort(outputs, kind="stable")  # what belongs to the first outputs comes first
    second = tuple(np.zeros((int(np.sum(outputs == j)), wide.stop - wide.start)) for j, wide in enumerate(along))
    return BlockSum(((Stage(tuple(first)), Stage(second, order)),), None, columns).refitted(matrix, gram)


def strided(width: int, groups: int) -> Array:
    """(width,) the order 0, g, 2g, ..., 1, g + 1, ... ."""
    return np.argsort(np.arange(width) % groups, kind="stable")
