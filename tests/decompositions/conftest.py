"""Weights and data that the tests of the decompositions share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]


@pytest.fixture(scope="session")
def make_weight() -> Callable[[str, tuple[int, ...], int], Array]:
    """Weight by kind, shape (O, I, *kernel) and seed; the kinds but "random" are degenerate."""

    def make(kind: str, shape: tuple[int, ...], seed: int) -> Array:
        rng = np.random.default_rng(seed)
        weight = rng.standard_normal(shape)
        if kind == "zeros":
            return np.zeros(shape)
        if kind == "constant":
            return np.full(shape, 0.7)
        if kind == "one channel":  # all but one input channel dead
            weight[:, 1:] = 0
        if kind == "rank one":
            column = rng.standard_normal(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
            return np.asarray(column * weight[:1])
        return weight

    return make


@pytest.fixture(scope="session")
def make_patches() -> Callable[[int, int, int], Array]:
    """Centred samples (N, F) of correlated features, from F, N and a seed; singular where N <= F."""

    def make(features: int, samples: int, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        mixing = rng.standard_normal((features, features)) * np.arange(1, features + 1) ** -0.7
        x = np.maximum(rng.standard_normal((samples, features)) @ mixing.T, 0)
        return np.asarray(x - x.mean(axis=0))

    return make
