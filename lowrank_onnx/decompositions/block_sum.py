"""Sums of products of block-diagonal matrices and permutations: the common form of the block structures.

    W ≈ Σ_branch  P_in · diag(M_1, ...) · P · diag(M_1', ...) · P_out

Rows of x are samples, ``y = x @ W`` with W (K, N). ``P`` takes entries: behind an order ``p`` place i holds
what was at ``p[i]``. The last stages of all branches are linear in what is delivered to them, so that for given
first stages the best last ones on the data are a least-squares problem for every group of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array


@dataclass(frozen=True, eq=False)
class Stage:
    """A block-diagonal matrix behind an order.

    Attributes:
        blocks: Matrices (k_i, n_i); their rows lie one behind the other.
        order: (Σ k_i,) which entry each row reads; None where they come in order.
    """

    blocks: tuple[Array, ...]
    order: Array | None = None

    def dense(self) -> Array:
        """(K, N) what the stage multiplies by."""
        matrix = scipy.linalg.block_diag(*self.blocks)
        if self.order is None:
            return np.asarray(matrix)
        out = np.empty_like(matrix)
        out[self.order] = matrix
        return np.asarray(out)


@dataclass(frozen=True, eq=False)
class BlockSum:
    """A sum of chains of block-diagonal matrices.

    Attributes:
        branches: Chains of one or two stages; all end in blocks over the same outputs, or finer ones.
        rows: (K,) order of the inputs ahead of everything; None as they are.
        columns: (N,) ``columns[i]`` is the output that place i of the sum holds; None as they are.
    """

    branches: tuple[tuple[Stage, ...], ...]
    rows: Array | None = None
    columns: Array | None = None
    parameters: int = field(init=False)

    def __post_init__(self) -> None:
        count = sum(block.size for chain in self.branches for stage in chain for block in stage.blocks)
        object.__setattr__(self, "parameters", count)

    @property
    def products(self) -> int:
        """Multiply-accumulates for one row of x: every element of a block is used once."""
        return self.parameters

    def dense(self) -> Array:
        """The matrix W (K, N) it stands for, float64."""
        total: Array | float = 0.0
        for chain in self.branches:
            matrix = chain[0].dense()
            for stage in chain[1:]:
                matrix = matrix @ stage.dense()
            total = total + matrix
        return unordered(np.asarray(total, np.float64), self.rows, self.columns)

    def refitted(self, matrix: Array, gram: Array) -> BlockSum:
        """Fit the last stages of all branches to the data at once; first stages and orders stay.

        Args:
            matrix: (K, N) what is wanted.
            gram: (K, K) second moment of x with its ridge; the identity without data.

        Source: normal equations ``(Φᵀ G Φ) C = Φᵀ G W`` of every group of outputs, Φ what is delivered to it.
        """
        matrix, gram = ordered(matrix, self.rows, self.columns), ordered(gram, self.rows, self.rows)
        delivered = [_delivered(chain) for chain in self.branches]
        widths = [len(gram) if part is None else part.shape[1] for part in delivered]
        starts = np.cumsum([0, *widths])
        # A branch of one stage reads the input itself: nothing to multiply.
        weighted = np.concatenate([gram if part is None else gram @ part for part in delivered], axis=1)
        brought = gram @ matrix
        normal = np.concatenate([weighted if part is None else part.T @ weighted for part in delivered])
        wanted = np.concatenate([brought if part is None else part.T @ brought for part in delivered])
        ends = [np.cumsum([0, *(b.shape[1] for b in chain[-1].blocks)]) for chain in self.branches]
        fitted = [[block.astype(np.float64) for block in chain[-1].blocks] for chain in self.branches]
        inputs = [np.cumsum([0, *(len(b) for b in chain[-1].blocks)]) for chain in self.branches]
        cuts = np.unique(np.concatenate(ends))
        for low, high in pairwise(cuts):
            owners = [int(np.searchsorted(edges, low, side="right")) - 1 for edges in ends]
            places = np.concatenate(
                [s + np.arange(i[o], i[o + 1]) for s, i, o in zip(starts, inputs, owners, strict=False)]
            )
            made = least_squares(normal[np.ix_(places, places)], wanted[places, low:high])
            done = 0
            for branch, owner in enumerate(owners):
                block = fitted[branch][owner]
                block[:, low - ends[branch][owner] : high - ends[branch][owner]] = made[done : done + len(block)]
                done += len(block)
        chains = tuple(
            (*chain[:-1], Stage(tuple(blocks), chain[-1].order))
            for chain, blocks in zip(self.branches, fitted, strict=True)
        )
        return BlockSum(chains, self.rows, self.columns)

    def arrays(self) -> dict[str, Array]:
        """All constants by role; ``from_arrays`` reads them back."""
        made: dict[str, Array] = {}
        for b, chain in enumerate(self.branches):
            for s, stage in enumerate(chain):
                made |= {f"{b}.{s}.{place}": block for place, block in enumerate(stage.blocks)}
                if stage.order is not None:
                    made[f"{b}.{s}.order"] = stage.order
        if self.rows is not None:
            made["rows"] = self.rows
        if self.columns is not None:
            made["columns"] = self.columns
        return made


def from_arrays(arrays: Mapping[str, Array]) -> BlockSum:
    """Read a sum back from ``BlockSum.arrays``; other entries are passed over."""
    found: dict[int, dict[int, dict[int, Array]]] = {}
    orders: dict[tuple[int, int], Array] = {}
    for name, value in arrays.items():
        parts = name.split(".")
        if len(parts) != 3:
            continue
        branch, stage = int(parts[0]), int(parts[1])
        if parts[2] == "order":
            orders[branch, stage] = value
        else:
            found.setdefault(branch, {}).setdefault(stage, {})[int(parts[2])] = value
    chains = tuple(
        tuple(
            Stage(tuple(found[b][s][place] for place in sorted(found[b][s])), orders.get((b, s)))
            for s in sorted(found[b])
        )
        for b in sorted(found)
    )
    return BlockSum(chains, arrays.get("rows"), arrays.get("columns"))


def segments(width: int, count: int) -> list[slice]:
    """Cut ``width`` places into ``count`` neighbouring groups as equal as can be."""
    edges = np.linspace(0, width, count + 1).round().astype(int)
    return [slice(int(low), int(high)) for low, high in pairwise(edges)]


def ordered(matrix: Array, rows: Array | None, columns: Array | None) -> Array:
    """Take rows and columns in an order; None leaves them."""
    matrix = np.asarray(matrix, np.float64)
    matrix = matrix if rows is None else matrix[rows]
    return matrix if columns is None else matrix[:, columns]


def unordered(matrix: Array, rows: Array | None, columns: Array | None) -> Array:
    """Undo ``ordered``."""
    back = [None if order is None else np.argsort(order) for order in (rows, columns)]
    return ordered(matrix, *back)


def _delivered(chain: Sequence[Stage]) -> Array | None:
    """(K, f) what reaches the last blocks, in the order in which they read it; None for the input as it is."""
    if len(chain) == 1 and chain[0].order is None:
        return None
    matrix = chain[0].dense() if len(chain) > 1 else np.eye(sum(len(block) for block in chain[0].blocks))
    for stage in chain[1:-1]:
        matrix = matrix @ stage.dense()
    return matrix if chain[-1].order is None else matrix[:, chain[-1].order]


def least_squares(normal: Array, wanted: Array) -> Array:
    """Least squares by the normal equations; directions without energy get zero."""
    scale = np.sqrt(np.maximum(np.diag(normal), 0.0))
    scale = np.where(scale > 0, scale, 1.0)
    made = scipy.linalg.lstsq(normal / np.outer(scale, scale), wanted / scale[:, None], cond=1e-13)[0]
    return np.asarray(made / scale[:, None])
