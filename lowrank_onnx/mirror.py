"""More calibration images than were given: the same ones mirrored, where the model itself takes them for alike.

Small images have few positions in deep layers, and factors fitted to them follow what they happen to show. A
mirrored photo is a photo as well; a mirrored word is none. The original tells which of the two it was made for:
a classifier of things gives nearly the same scores, a filter nearly the mirrored map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowrank_onnx.base import Site
from lowrank_onnx.data import Dataset
from lowrank_onnx.linalg import Array
from lowrank_onnx.runtime import run

ALIKE = 0.2  # change of the outputs by mirroring, in units of that from one sample to another
_ENOUGH = 100  # positions for every column of a patch; data that show so many need no help
_NARROWEST = 8  # numbers of the mirrored axis; fewer are channels rather than columns of an image
_ASKED = 32  # samples


def mirror_images(session: Any, dataset: Dataset, sites: Sequence[Site]) -> Dataset | None:
    """Return the data followed by every sample mirrored from left to right.

    Args:
        session: The model, open.
        sites: Of the model, their shapes those of one sample.

    Returns:
        None where the only input is no image (N, C, H, W), where every convolution sees enough positions
        anyway, or where the model minds.
    """
    (column, *others) = dataset.inputs.values()
    image = column.starts is not None and column.array.ndim == 4 and column.array.dtype.kind == "f"
    if others or not image or column.array.shape[-1] < _NARROWEST or not _few_positions(sites, len(dataset)):
        return None
    doubled = dataset.doubled({name: column.array[..., ::-1] for name in dataset.inputs})
    return doubled if _takes_for_alike(session, doubled, len(dataset)) else None


def _few_positions(sites: Sequence[Site], samples: int) -> bool:
    """Whether a convolution sees few positions for the size of its patch."""
    for site in sites:
        shape = site.uses[0].output_shape if site.kind == "convolution" else None
        if shape is not None and samples * math.prod(shape[2:]) < _ENOUGH * math.prod(site.shape[1:]):
            return True
    return False


def _takes_for_alike(session: Any, doubled: Dataset, samples: int) -> bool:
    """Whether every output changes little, or turns around, when a sample is mirrored."""
    places = np.unique(np.linspace(0, samples - 1, min(samples, _ASKED)).round().astype(int)).tolist()
    if len(places) < 2:
        return False
    given, mirrored = ([run(session, doubled.feeds(place + start)) for place in places] for start in (0, samples))
    return all(_alike([entry[name] for entry in given], [entry[name] for entry in mirrored]) for name in given[0])


def _alike(given: Sequence[Array], mirrored: Sequence[Array]) -> bool:
    """Whether an output of several samples and that of their mirror images are much the same."""
    if given[0].dtype.kind != "f" or any(one.shape != given[0].shape for one in (*given, *mirrored)):
        return False
    first, second = (np.stack(values).astype(np.float64) for values in (given, mirrored))
    # Two independent samples differ by twice the variance.
    usual = 2 * float(first.var(axis=0, ddof=1).mean())
    turned = second[..., ::-1] if first.ndim == 5 else second  # (samples, 1, C, H, W)
    return min(float(np.mean((first - other) ** 2)) for other in (second, turned)) < ALIKE * usual
