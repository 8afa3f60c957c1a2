"""Which samples of a data set may run together, checked by running them both ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lowrank_onnx.data import Dataset
from lowrank_onnx.linalg import Array
from lowrank_onnx.runtime import run

_TOLERANCE = 1e-3  # relative; kernels choose other summation orders for other batch sizes


def can_batch(session: Any, dataset: Dataset, common: bool = False) -> bool:
    """True where a batch of two samples gives what the two give alone.

    The shapes alone do not tell: a recurrent state or a fixed Reshape may sit on the first axis.

    Args:
        common: Whether outputs that are the same for every sample, such as positions, may be among them.
    """
    dataset = dataset.untrimmed
    if not dataset.batchable or len(dataset) < 2:
        return False
    from lowrank_onnx.errors import ModelError

    try:
        together = run(session, dataset.batch([0, 1]))
    except ModelError:
        return False
    alone = [run(session, dataset.feeds(place)) for place in (0, 1)]
    for name, value in together.items():
        if common and all(part[name].shape == value.shape and close(part[name], value) for part in alone):
            continue
        if value.ndim == 0 or value.shape[0] != 2 or any(part[name].shape != value[:1].shape for part in alone):
            return False
        apart = np.concatenate([part[name] for part in alone])
        if not close(value, apart):
            return False
    return True


def close(a: Array, b: Array) -> bool:
    """Whether two answers are the same but for the order of their sums; b tells the scale."""
    if a.dtype.kind not in "fc":
        return bool((a == b).mean() > 0.99)
    scale = float(np.abs(b).max(initial=0.0)) or 1.0
    with np.errstate(invalid="ignore"):  # Inf - Inf is NaN, which is not close
        return bool(np.abs(a.astype(np.float64) - b).max(initial=0.0) <= _TOLERANCE * scale)


def by_length(dataset: Dataset, indices: Sequence[int]) -> list[int]:
    """Return the indices with samples of like length side by side, where padding is cut; else as they are."""
    if dataset.lengths is None:
        return list(indices)
    lengths = dataset.lengths
    return sorted(indices, key=lambda index: int(lengths[index]))


def batches(count: int, size: int) -> Iterator[range]:
    """Split ``range(count)`` into runs of at most ``size``."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
