"""How much a change of a weight's input direction matters to the probabilities behind the layer.

With scores z = x W + b and p = softmax(z), a small error δz costs KL ≈ ½ δz (diag p - pᵀp) δzᵀ. An error of
rows, δz = x D W, so costs ½ x D C(x) Dᵀ xᵀ with C(x) = W (diag p - pᵀp) Wᵀ: the covariance of the columns of W
when they are drawn with p. Its mean over the rows is what this module sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lowrank_onnx.base import Site, Use
from lowrank_onnx.linalg import Array

_ROWS = 2048  # looked at over all samples; the covariance of a few hundred directions asks for no more
_SCORES = 2**23  # live at one time


@dataclass
class SpreadSums:
    """Running sum of the covariance of a weight's columns under the probabilities it predicts.

    Attributes:
        weight: (K, N).
        bias: (N,) or a number.
    """

    weight: Array
    bias: Array | float
    rows: int = 0
    mixed: Array = field(init=False)
    apart: Array = field(init=False)

    def __post_init__(self) -> None:
        self.mixed = np.zeros(self.weight.shape[1])
        self.apart = np.zeros((len(self.weight),) * 2)

    @np.errstate(over="ignore", invalid="ignore")  # spread() looks whether all is finite
    def add(self, rows: Array, most: int) -> None:
        """Add at most ``most`` of the rows (n, K), evenly spread."""
        places = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int))
        step = max(_SCORES // self.weight.shape[1], 1)
        for start in range(0, len(places), step):
            p = rows[places[start : start + step]].astype(np.float32) @ self.weight + self.bias
            p = np.exp(p - p.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            expected = (p @ self.weight.T).astype(np.float64)
            self.rows += len(p)
            self.mixed += p.sum(axis=0, dtype=np.float64)
            self.apart += expected.T @ expected

    def spread(self) -> Array | None:
        """(K, K) the mean covariance; None where nothing was seen, or nothing finite."""
        if self.rows == 0:
            return None
        weight = self.weight.astype(np.float64)
        made = np.asarray(((weight * self.mixed) @ weight.T - self.apart) / self.rows)
        return made if np.isfinite(made).all() else None


def spread_sums(sites: Sequence[Site]) -> dict[tuple[str, str], SpreadSums]:
    """Empty sums for every use of a linear layer in front of a softmax, by site and input tensor."""
    return {
        (site.name, use.input): SpreadSums(
            site.weight.astype(np.float32), 0.0 if use.bias is None else use.bias.astype(np.float32)
        )
        for site in sites
        if site.kind == "linear" and site.weight.ndim == 2
        for use in site.uses
        if is_scores(site, use)
    }


def is_scores(site: Site, use: Use) -> bool:
    """Whether what a use of a linear site gives are scores of classes, for a softmax."""
    return bool(site.attributes[use.node]["scores"]) and not use.dynamic_bias


def rows_of(samples: int, total: int) -> int:
    """Rows to look at in a batch of that many samples out of all."""
    return max(_ROWS * samples // total, 1)
