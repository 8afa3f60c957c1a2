"""The inputs a model is timed and measured with: from data or made up, at the shapes asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.data import Dataset, InputSpec
from lowrank_onnx.errors import DataError
from lowrank_onnx.linalg import Array
from lowrank_onnx.shapes import synthetic_feeds


@dataclass(frozen=True, eq=False)
class Feeds:
    """One set of inputs.

    Attributes:
        values: Array by input name.
        real: True where they are a sample of the user's data.
    """

    values: dict[str, Array]
    real: bool


def texts(value: str | Sequence[str]) -> tuple[str, ...]:
    """The values of an option that may repeat; a text alone is one value, not one a letter."""
    return (value,) if isinstance(value, str) else tuple(value)


def read_shapes(given: str | Sequence[str], specs: Sequence[InputSpec]) -> dict[str, tuple[int, ...]]:
    """Read ``--shape NAME=1,128``.

    Raises:
        DataError: The input does not exist, or the shape does not fit it.
    """
    known = {spec.name: spec for spec in specs}
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts(given):
        name, _, sizes = text.rpartition("=")
        try:
            shape = tuple(int(size) for size in sizes.split(",") if size.strip())
        except ValueError as error:
            raise DataError(f"--shape must be NAME=1,128 with whole numbers, got '{text}'") from error
        if name not in known:
            raise DataError(f"--shape names '{name}', which is no input; inputs: {', '.join(known)}")
        spec = known[name]
        fits = len(shape) == len(spec.shape) and all(
            size > 0 and (not isinstance(wanted, int) or wanted == size)
            for size, wanted in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise DataError(f"--shape {name}={sizes} does not fit the input, which has shape {list(spec.shape)}")
        shapes[name] = shape
    return shapes


def choose_feeds(
    specs: Sequence[InputSpec], fixed: Mapping[str, tuple[int, ...]], dataset: Dataset | None, seed: int
) -> Feeds:
    """Return the inputs for shapes and timing.

    The first sample where there are data, repeated or cut to ``fixed`` shapes; made-up values otherwise.

    Raises:
        DataError: Without data, an axis is neither fixed by the model nor by ``fixed``.
    """
    symbols = {
        axis: size
        for spec in specs
        if spec.name in fixed
        for axis, size in zip(spec.shape, fixed[spec.name], strict=True)
        if isinstance(axis, str)
    }
    if dataset is not None:
        sample = dataset.feeds(0)
        wanted = {
            spec.name: fixed.get(spec.name)
            or tuple(
                symbols.get(axis, size) if isinstance(axis, str) else size
                for axis, size in zip(spec.shape, sample[spec.name].shape, strict=True)
            )
            for spec in specs
        }
        return Feeds({name: _fitted(sample[name], shape) for name, shape in wanted.items()}, not fixed)
    made: dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]] = {}
    for spec in specs:
        shape = fixed.get(spec.name)
        made[spec.name] = (spec.dtype, shape if shape is not None else _static(spec, symbols))
    return Feeds(synthetic_feeds(made, seed), False)


def _static(spec: InputSpec, symbols: Mapping[str, int]) -> tuple[int, ...]:
    sizes: list[int] = []
    for place, axis in enumerate(spec.shape):
        if isinstance(axis, int) and axis > 0:
            sizes.append(axis)
        elif isinstance(axis, str) and axis in symbols:
            sizes.append(symbols[axis])
        elif place == 0:
            sizes.append(1)  # the first open axis is the batch
        else:
            example = ",".join(
                str(size) if isinstance(size, int) else "1" if not p else "128" for p, size in enumerate(spec.shape)
            )
            raise DataError(
                f"input '{spec.name}' has the open axis '{axis or place}'; give --shape {spec.name}={example}, "
                "or data with --calibrate or --evaluate"
            )
    return tuple(sizes)


def _fitted(values: Array, shape: tuple[int, ...]) -> Array:
    """Repeat or cut an array along its axes until it has the shape."""
    for axis, size in enumerate(shape):
        if values.shape[axis] != size:
            values = np.take(values, np.arange(size) % values.shape[axis], axis=axis)
    return np.array(values, order="C")  # ascontiguousarray would give a scalar an axis
