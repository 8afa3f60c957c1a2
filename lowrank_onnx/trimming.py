"""Padding behind the last real position of a batch is not computed: most of a padded text is nothing else.

Only for what is summed up over real rows; results are validated on the data as they were given.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lowrank_onnx.batches import can_batch, close
from lowrank_onnx.data import Dataset
from lowrank_onnx.errors import ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.runtime import run
from lowrank_onnx.statistics import padding_mask

_WORTH = 0.8  # of all positions are real; above, too little is saved


def trimmed(session: Any, dataset: Dataset, mask: str | None) -> Dataset:
    """Return the samples such that a batch ends behind its last real position.

    The model has to give the same answers at real positions, which is seen on two samples.

    Args:
        session: The model, open.
        mask: As ``observe`` takes it.

    Returns:
        The data set itself where nothing tells padding, where padding lies elsewhere than at the end, where
        there is little of it, or where the model minds.
    """
    rows = {name: column.array for name, column in dataset.inputs.items() if column.starts is not None}
    keep = padding_mask(rows, mask) if mask is None or mask in rows else None
    if keep is None or len(keep) != len(dataset):
        return dataset
    lengths = keep.sum(axis=1)
    positions = keep.shape[1]
    at_the_end = np.array_equal(keep, np.arange(positions) < lengths[:, None])
    if not at_the_end or lengths.min() < 1 or lengths.mean() > _WORTH * positions:
        return dataset
    cut = tuple(name for name, array in rows.items() if array.ndim > 1 and array.shape[1] == positions)
    order = np.argsort(lengths, kind="stable")
    shorter = dataclasses.replace(dataset, lengths=lengths, cut=cut)
    return shorter if _same(session, shorter, keep, [int(order[0]), int(order[len(order) // 2])]) else dataset


def _same(session: Any, dataset: Dataset, keep: Array, places: list[int]) -> bool:
    """Whether the model answers the same at real positions of these samples, cut and not."""
    for indices in [places] if can_batch(session, dataset) else [[place] for place in places]:
        try:
            short = run(session, dataset.batch(indices))
        except ModelError:
            return False
        whole = run(session, dataset.untrimmed.batch(indices))
        real = keep[indices]
        for name, value in whole.items():
            other = short[name]
            if value.shape != other.shape:
                end = other.shape[1] if other.ndim > 1 else 0
                if value.shape[:2] != real.shape or other.shape != (len(value), end, *value.shape[2:]):
                    return False
                value, other = value[real], other[real[:, :end]]
            if not close(other, value):
                return False
    return True
