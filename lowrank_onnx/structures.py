"""How near each structure comes to a linear layer when all may store equally many numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from lowrank_onnx.decompositions.blast import Blast, blast
from lowrank_onnx.decompositions.block import block_diagonal, block_grid, block_low_rank
from lowrank_onnx.decompositions.block_sum import BlockSum
from lowrank_onnx.decompositions.hierarchical import hodlr, hodlr_parameters
from lowrank_onnx.decompositions.kronecker import KroneckerSum, factor_pairs, rearrange
from lowrank_onnx.decompositions.monarch import monarch
from lowrank_onnx.decompositions.seriation import seriate
from lowrank_onnx.decompositions.svd import data_aware
from lowrank_onnx.linalg import Array, with_ridge

SHARE = 0.5  # of the dense parameters, what an inspection allows
_RIDGE = 1e-2
_GROUPS = (4, 8)
_MOST_SHAPES = 4  # of Kronecker factors, those nearest to square
WIDEST = 4096  # layers wider than this would take minutes
_UNKNOWNS = 2048  # of the Kronecker factors that are fitted together

Orders = tuple[Array | None, Array | None]
Made = BlockSum | KroneckerSum | Blast


def errors_at(weight: Array, gram: Array, budget: int) -> dict[str, float | None]:
    """Return by structure the least relative output error within a budget; None where nothing fits in.

    Args:
        weight: (K, N).
        gram: (K, K) second moment of the input; the identity gives weight errors.
        budget: Most parameters.
    """
    weight = np.asarray(weight, np.float64)
    metric = with_ridge(gram, 0.0 if np.array_equal(gram, np.eye(len(gram))) else _RIDGE)
    total = float(np.vdot(weight, gram @ weight))

    def error(dense: Array) -> float:
        lost = weight - dense
        return float(np.sqrt(max(float(np.vdot(lost, gram @ lost)), 0.0) / total)) if total > 0 else 0.0

    return {
        name: min((error(dense) for dense in offers(weight, metric, budget)), default=None)
        for name, offers in STRUCTURES.items()
    }


def _svd(weight: Array, metric: Array, budget: int) -> Iterator[Array]:
    rank = min(budget // sum(weight.shape), *weight.shape)
    if rank:
        first, second = data_aware(weight, metric, 0.0).factors(rank)
        yield first @ second


def _block(weight: Array, metric: Array, budget: int) -> Iterator[Array]:
    for groups, (rows, columns) in _ordered(weight, metric):
        for form in ("rows", "columns", "grid"):
            grid = block_grid(weight, metric, form, groups, rows, columns)
            fits = _largest(partial(block_low_rank, grid, weight, metric), budget)
            if fits is not None:
                yield fits.dense()
        rank = (budget - block_diagonal_parameters(weight.shape[0], weight.shape[1], groups)) // sum(weight.shape)
        if rank >= 0:
            yield block_diagonal(weight, metric, groups, min(rank, *weight.shape), rows, columns).dense()


def _monarch(weight: Array, metric: Array, budget: int) -> Iterator[Array]:
    for groups in _GROUPS:
        if groups <= min(weight.shape):
            made = _largest(partial(monarch, weight, metric, groups), budget)
            if made is not None:
                yield made.dense()


def _kronecker(weight: Array, metric: Array, budget: int) -> Iterator[Array]:
    size = weight.size
    shapes = sorted(factor_pairs(*weight.shape), key=lambda form: abs(form[0] * form[1] - size**0.5))
    for k1, n1 in shapes[:_MOST_SHAPES]:
        terms = budget // (k1 * n1 + size // (k1 * n1))
        if terms:
            made = rearrange(weight, k1, n1).terms(min(terms, k1 * n1, size // (k1 * n1)))
            fitted = len(made.left) * k1 <= _UNKNOWNS
            yield (made.refitted(weight, metric) if fitted else made).dense()


def _blast(weight: Array, metric: Array, budget: int) -> Iterator[Array]:
    for blocks in _GROUPS:
        rank = min(budget // (sum(weight.shape) + blocks * blocks), *weight.shape)
        if rank and blocks <= min(weight.shape):
            yield blast(weight, metric, (blocks, blocks), rank).dense()


def _hierarchical(weight: Array, metric: Array, budget: int) -> Iterator[Array]:
    for groups, (rows, columns) in _ordered(weight, metric):
        depth = int(np.log2(groups))
        ranks = range(1, min(weight.shape) // 2 + 1)
        fits = [rank for rank in ranks if hodlr_parameters(weight.shape[0], weight.shape[1], depth, rank) <= budget]
        if fits:
            yield hodlr(weight, metric, depth, fits[-1], rows, columns).dense()


STRUCTURES: dict[str, Callable[[Array, Array, int], Iterator[Array]]] = {
    "svd": _svd,
    "block": _block,
    "monarch": _monarch,
    "kronecker": _kronecker,
    "hierarchical": _hierarchical,
    "blast": _blast,
}


def _ordered(weight: Array, metric: Array) -> Iterator[tuple[int, Orders]]:
    brought = weight * np.sqrt(np.diag(metric))[:, None]
    for groups in _GROUPS:
        if 2 * groups <= min(weight.shape):
            yield groups, (None, None)
            yield groups, seriate(brought, int(np.log2(groups)) - 1)


def block_diagonal_parameters(rows: int, columns: int, groups: int) -> int:
    """Elements of the dense blocks."""
    return -(-rows // groups) * -(-columns // groups) * groups


def _largest(make: Callable[[int], BlockSum], budget: int) -> BlockSum | None:
    """The structure of the largest rank within the budget; its parameters rise with the rank, about evenly."""
    one = make(1)
    if one.parameters > budget:
        return None
    rank = max(budget // one.parameters, 1)
    made = make(rank)
    while rank > 1 and made.parameters > budget:
        rank -= 1
        made = make(rank)
    return made
