"""A convolution as a linear layer: rows are the patches under the kernel at a sample of output positions.

    y = patch @ W,   patch (n, I · prod(kernel)),   W the kernel reshaped (I · prod(kernel), O)

so that whatever fits a linear layer to data fits a convolution as well. Of groups the patch holds all channels
and W is block diagonal. A transposed convolution is one whose patch meets the input at every stride-th position
of the kernel and zeros between.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from lowrank_onnx.base import Site
from lowrank_onnx.linalg import Array

POSITIONS = 20_000  # of all samples together, copies apart; 35 for every column of a 3 x 3 patch of 64 channels
WIDEST = 4608  # 512 channels under 3 x 3; wider patches need more positions and hours of algebra


@dataclass(frozen=True, slots=True)
class Places:
    """Output positions: sample (n,), and coordinate (n,) on every axis of the map, in a (batch, *spatial) grid."""

    grid: tuple[int, ...]
    sample: Array
    coordinates: tuple[Array, ...]

    def rows(self, value: Array) -> Array:
        """(n, C) entries of a map (batch, C, *spatial)."""
        index: tuple[Any, ...] = (self.sample, slice(None), *self.coordinates)
        return np.asarray(value[index])


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel moves over a map; hashable, so that sites that see the same patches share their sums.

    Attributes:
        transposed: The map is spread by the strides, not thinned.
        extra: What a transposed convolution adds at the end of every axis (``output_padding``).
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    transposed: bool = False
    extra: tuple[int, ...] = ()

    def begins(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Padding before the first element of every axis, for a map of this size."""
        return tuple(begin for begin, _ in self._padding(spatial))

    def outputs(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Size of the output map."""
        if self.transposed:
            axes = zip(spatial, self._reach(), self.strides, self._padding(spatial), self.extra, strict=True)
            return tuple((size - 1) * step + reach + more - sum(pads) for size, reach, step, pads, more in axes)
        sizes = zip(spatial, self._reach(), self.strides, self._padding(spatial), strict=True)
        return tuple((size + sum(padding) - reach) // stride + 1 for size, reach, stride, padding in sizes)

    def draw(self, shape: Sequence[int], count: int, seed: Sequence[int], keep: Array | None = None) -> Places:
        """Choose output positions of a batch: all if there are no more than ``count``, else a random sample.

        Args:
            shape: (batch, C, *spatial) of the input.
            count: At most that many.
            seed: Same seed and shape, same positions.
            keep: (batch, positions) bool, False at padding; used where the output is a sequence of that shape.
        """
        grid = (shape[0], *self.outputs(shape[2:]))
        counted = keep if keep is not None and keep.shape == grid else np.ones(grid, bool)
        chosen = np.flatnonzero(counted)
        if len(chosen) > count:
            chosen = np.sort(np.random.default_rng(list(seed)).choice(chosen, count, replace=False))
        sample, *coordinates = np.unravel_index(chosen, grid)
        return Places(grid, sample, tuple(coordinates))

    def patches(self, value: Array, places: Places) -> Array:
        """Rows (n, C · prod(kernel)) of a map (batch, C, *spatial), ordered as a kernel is; zeros beyond the edge."""
        spatial = value.shape[2:]
        begins = self.begins(spatial)
        rows = np.zeros((len(places.sample), value.shape[1], *self.kernel), value.dtype)
        for offset in np.ndindex(*self.kernel):
            axes = zip(places.coordinates, self.strides, offset, self.dilations, begins, strict=True)
            if self.transposed:  # output = input · stride + step · dilation - begin
                met_at = [divmod(x + begin - step * dilation, stride) for x, stride, step, dilation, begin in axes]
                at = [np.where(rest == 0, x, -1) for x, rest in met_at]
            else:
                at = [x * stride + step * dilation - begin for x, stride, step, dilation, begin in axes]
            inside = np.logical_and.reduce([(x >= 0) & (x < size) for x, size in zip(at, spatial, strict=True)])
            met = Places(places.grid, places.sample[inside], tuple(x[inside] for x in at))
            rows[(inside, slice(None), *offset)] = met.rows(value)
        return rows.reshape(len(rows), -1)

    def _reach(self) -> list[int]:
        return [(length - 1) * dilation + 1 for length, dilation in zip(self.kernel, self.dilations, strict=True)]

    def _padding(self, spatial: Sequence[int]) -> list[tuple[int, int]]:
        dims = len(self.kernel)
        if self.auto_pad == "NOTSET":
            return list(zip(self.pads[:dims], self.pads[dims:], strict=True))
        if self.auto_pad == "VALID":
            return [(0, 0)] * dims
        padding = []
        for size, reach, stride in zip(spatial, self._reach(), self.strides, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
            less, more = total // 2, total - total // 2
            padding.append((less, more) if self.auto_pad == "SAME_UPPER" else (more, less))
        return padding


def window(site: Site) -> Window:
    """The window of a convolution site."""
    entry = site.attributes
    moves = Window(site.shape[2:], entry["strides"], entry["dilations"], entry["pads"], entry["auto_pad"])
    if not entry["transposed"]:
        return moves
    return dataclasses.replace(moves, transposed=True, extra=entry["output_padding"])


def as_linear(site: Site) -> Site:
    """The same site with its weight as the matrix (K, N) that rows meet; a linear site as it is."""
    if site.kind != "convolution":
        return site
    blocks = blocks_of(site.weight, site.attributes["group"], site.attributes["transposed"])
    return dataclasses.replace(site, weight=as_matrix(blocks))


def as_matrix(blocks: Array) -> Array:
    """(groups, outputs, inputs, *kernel) -> (K, N), block diagonal."""
    flat = [block.reshape(len(block), -1).T for block in blocks]
    return flat[0] if len(flat) == 1 else np.asarray(scipy.linalg.block_diag(*flat))


def blocks_of(weight: Array, group: int, transposed: bool) -> Array:
    """Split a stored weight into (groups, outputs, inputs, *kernel)."""
    parts = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    return np.swapaxes(parts, 1, 2) if transposed else parts


def unseen(site: Site) -> str | None:
    """Return why the patches of a convolution are not looked at; None if they are."""
    group, transposed = site.attributes["group"], site.attributes["transposed"]
    _, outputs, inputs, *kernel = blocks_of(site.weight, group, transposed).shape
    if group > 1 and min(outputs, inputs) == 1:
        return "depthwise"
    if site.attributes["output_shape"] or (transposed and site.attributes["auto_pad"].startswith("SAME")):
        return "a transposed convolution whose padding depends on the size of the map"
    width = group * inputs * math.prod(kernel)
    if width > WIDEST:
        return f"patches of {width} numbers are wider than {WIDEST}"
    return None
