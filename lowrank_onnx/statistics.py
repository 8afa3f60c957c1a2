"""observe(): run the model on data and keep sums of what goes into every site. Never the data themselves."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import ModelProto

from lowrank_onnx.attention_statistics import is_matrix, observe_matrices
from lowrank_onnx.base import Counts, Moments, Site, Use
from lowrank_onnx.batches import batches, by_length, can_batch
from lowrank_onnx.data import Dataset
from lowrank_onnx.errors import DataError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model
from lowrank_onnx.patches import POSITIONS, Places, Window, as_linear, unseen, window
from lowrank_onnx.recurrent_statistics import observe_cells
from lowrank_onnx.runtime import Runtime, open_session, run
from lowrank_onnx.softmax_statistics import rows_of, spread_sums

WIDEST = 16384  # a second moment of this width takes 2 GiB; wider layers go without data
_LIVE_BYTES = 128 * 2**20  # of observed tensors at one time
_GRAM_BYTES = 2 * 2**30  # of second moments in one pass over the data
_HELD_OUT = 0.2  # of the lookups in a table

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


@dataclass
class MomentSums:
    """Running sums of one tensor's rows; float64, so that a million rows lose nothing."""

    width: int
    rows: int = 0
    total: Array = field(init=False)
    products: Array = field(init=False)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.width)
        self.products = np.zeros((self.width, self.width))

    def add(self, rows: Array) -> None:
        """Add rows (n, K)."""
        rows = rows.astype(np.float32, copy=False)
        self.rows += len(rows)
        self.total += rows.sum(axis=0, dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # told once, at the end, by the tensor's name
            self.products += rows.T @ rows

    def moments(self) -> Moments:
        """The sums divided by the number of rows."""
        return Moments(self.rows, self.total / self.rows, self.products / self.rows)

    @property
    def finite(self) -> bool:
        """Whether nothing overflowed."""
        return bool(np.isfinite(self.products).all())


@dataclass
class CountSums:
    """Running counts of the rows of a table of ``size`` rows."""

    size: int
    rows: int = 0
    total: Array = field(init=False)
    held: Array = field(init=False)
    finite: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.total = np.zeros(self.size, np.int64)
        self.held = np.zeros(self.size, np.int64)

    def add(self, rows: Array) -> None:
        """Add indices (n,); the last fifth of them, samples of their own in a batch, is held out."""
        found = np.where(rows < 0, rows.astype(np.int64) + self.size, rows)
        self.rows += len(found)
        self.total += np.bincount(found, minlength=self.size)
        self.held += np.bincount(found[math.ceil((1 - _HELD_OUT) * len(found)) :], minlength=self.size)

    def moments(self) -> Counts:
        """The counts so far."""
        return Counts(self.rows, self.total, self.held)


def unobserved(site: Site) -> str | None:
    """Return why ``observe`` cannot see what goes into a site; None if it can."""
    if any(use.scope for use in site.uses):
        return "inside a subgraph"
    if is_matrix(site):
        return "queries, keys and values are looked at as they are"
    if site.kind == "convolution":
        return unseen(site)
    if site.kind == "embedding":
        return None
    if site.kind == "tied":
        return next(filter(None, map(unobserved, site.attributes["parts"])), None)
    if site.kind not in ("linear", "shared_input", "shared_layers", "feedforward", "attention"):
        return f"inputs of kind {site.kind} are not looked at"
    if site.weight.ndim != 2:
        return "a stack of matrices"
    if site.weight.shape[0] > WIDEST:
        return f"inputs of {site.weight.shape[0]} numbers are wider than {WIDEST}"
    return None


def observe(
    model: Model,
    sites: Sequence[Site],
    dataset: Dataset,
    runtime: Runtime,
    mask: str | None = None,
    progress: Progress | None = None,
    copies: int = 0,
) -> dict[str, dict[str, Any]]:
    """Return the moments of every observable site on the calibration data, of an embedding the counts.

    Of a convolution the rows are the patches at a random sample of about ``POSITIONS`` output positions.

    Args:
        model: The original model.
        sites: Sites; those of which nothing can be observed are missing from the answer.
        dataset: Calibration data.
        runtime: Where to run.
        mask: Name of the input that marks real rows with non-zero values; None looks for one.
        progress: Told after every batch.
        copies: How many samples at the end were made of the others; words are not counted in them.

    Raises:
        DataError: ``mask`` names no input, or nothing is left behind the mask.
        ModelError: onnxruntime cannot run the model on the data.
    """
    # The parts of a tied table are sites of their own, and tell of it.
    chosen = [site for site in sites if site.kind != "tied" and unobserved(site) is None]
    layouts = {(use.input, row_layout(site)): _width(site, use) for site in chosen for use in site.uses}
    sums = {key: (CountSums if isinstance(key[1], Lookup) else MomentSums)(width) for key, width in layouts.items()}
    spreads = spread_sums(chosen)
    shapes = {use.input: use.input_shape for site in chosen for use in site.uses}
    for group in _groups(layouts):
        names = sorted({name for name, _ in group})
        session = open_session(expose(model.proto, names), runtime, model.folder)
        size = _batch_size(session, dataset, [shapes[name] for name in names])
        genuine = len(dataset) - copies
        given = by_length(dataset, range(genuine))
        made = by_length(dataset, range(genuine, len(dataset)))
        parts = [[part[place] for place in batch] for part in (given, made) for batch in batches(len(part), size)]
        told = 0
        for indices in parts:
            feeds = dataset.batch(indices) if size > 1 else dataset.feeds(indices[0])
            values = run(session, feeds, [name for name in names if name not in feeds])
            keep = padding_mask(feeds, mask)
            for key in group:
                name, layout = key
                if indices[0] >= genuine and isinstance(layout, Lookup):
                    continue
                value = feeds[name] if name in feeds else values[name]
                count = positions_of(len(indices), genuine)  # those of copies come on top
                met = choose_rows(layout, value.shape, keep, count, indices[0]).of_input(value)
                sums[key].add(met)
                if layout == "last":
                    for (_, source), spread in spreads.items():
                        if source == name:
                            spread.add(met, rows_of(len(indices), len(dataset)))
            told += len(indices)
            if progress is not None:
                progress("observe", told, len(dataset))
    for (name, _), entry in sums.items():
        if entry.rows == 0:
            raise DataError(f"no row of tensor '{name}' is left behind the mask; is '{mask or 'the mask'}' all zeros?")
        if not entry.finite:
            raise DataError(
                f"the calibration data make tensor '{name}' overflow or hold NaN; are they scaled as the model expects?"
            )
    done = {key: entry.moments() for key, entry in sums.items()}
    cells = observe_cells(model, sites, dataset, runtime, lambda feeds: padding_mask(feeds, mask), progress)
    rows = {site.name: {use.input: done[(use.input, row_layout(site))] for use in site.uses} for site in chosen}
    for (owner, source), spread in spreads.items():
        seen = rows[owner][source]
        assert isinstance(seen, Moments)
        rows[owner][source] = dataclasses.replace(seen, spread=spread.spread())
    for site in sites:
        if site.kind == "tied" and all(name in rows for name in site.parts):
            rows[site.name] = {name: seen for part in site.parts for name, seen in rows[part].items()}
    between = observe_matrices(model, sites, dataset, runtime)
    return {**rows, **{name: dict(entry) for name, entry in cells.items()}, **between}


def expose(proto: ModelProto, names: Sequence[str]) -> ModelProto:
    """Return a copy of the model in which these tensors are outputs as well."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    known = {value.name for value in (*copy.graph.output, *copy.graph.input)}
    for name in names:
        if name not in known:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy


def _width(site: Site, use: Use) -> int:
    """Length of the rows that meet a weight; the parts of an attention block may read tensors of two widths."""
    if site.kind == "embedding":
        return int(site.weight.shape[site.attributes["axis"]])
    if site.kind == "attention":
        return int(next(part for part in site.attributes["parts"] if part.uses[0] is use).weight.shape[0])
    return int(as_linear(site).weight.shape[0])


@dataclass(frozen=True)
class Lookup:
    """Every element of the input is the number of a row, of a table with ``size`` rows."""

    size: int


Layout = str | Window | Lookup
"""How the rows of a site lie in its input; see ``row_layout``."""


def row_layout(site: Site) -> Layout:
    """How the rows lie in the input: ``last`` axis, ``first`` of the two last ones, under a window, or as indices."""
    if site.kind == "convolution":
        return window(site)
    if site.kind == "embedding":
        return Lookup(_width(site, site.uses[0]))
    columns = (site.attributes.get("side") == "left") != bool(site.attributes.get("data_transposed"))
    return "first" if columns else "last"


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of one batch count; the same ones of its input and of its output."""

    layout: Layout
    keep: Array | None
    places: Places | None

    def of_input(self, value: Array) -> Array:
        """Rows (n, K) that meet the weight."""
        if isinstance(self.layout, Window):
            assert self.places is not None
            return self.layout.patches(value, self.places)
        if isinstance(self.layout, Lookup):
            return as_rows(value[..., None], "last", self.keep)[:, 0]
        return as_rows(value, self.layout, self.keep)

    def of_output(self, value: Array) -> Array:
        """Rows (n, N) that come out; of a linear site those of the last axis."""
        return as_rows(value, "last", self.keep) if self.places is None else self.places.rows(value)


def choose_rows(layout: Layout, shape: Sequence[int], keep: Array | None, count: int, seed: int) -> Rows:
    """Choose the rows of a batch: all of a linear site, at most ``count`` of a convolution.

    Args:
        layout: See ``row_layout``.
        shape: Of the input of the site in this batch.
        keep: (batch, positions) bool, False at padding; None keeps everything.
        count: Most output positions of a convolution.
        seed: Same seed and shape, same rows.
    """
    places = layout.draw(shape, count, (seed,), keep) if isinstance(layout, Window) else None
    return Rows(layout, keep, places)


def positions_of(samples: int, total: int) -> int:
    """Output positions to look at in a batch of that many samples out of all."""
    return math.ceil(POSITIONS * samples / total)


def as_rows(value: Array, layout: str, keep: Array | None) -> Array:
    """Return the rows (n, K) of an input tensor, without padding.

    Args:
        value: (..., K) for layout ``last``, (..., K, n) for ``first``.
        layout: See ``row_layout``.
        keep: (batch, positions) bool, False at padding; None keeps everything.
    """
    if layout == "first":
        value = np.swapaxes(value, -1, -2)
    if keep is not None:
        batch, length = keep.shape
        lead = value.shape[:-1]
        if lead[:2] == (batch, length):
            return value[keep].reshape(-1, value.shape[-1])
        if lead[:2] == (length, batch):  # time first, as recurrent layers like it
            return value[keep.T].reshape(-1, value.shape[-1])
        if lead == (batch * length,):
            return value[keep.reshape(-1)]
        if len(lead) == 3 and (lead[0], lead[2]) == (batch, length):  # (batch, heads, positions, K)
            return np.swapaxes(value, 1, 2)[keep].reshape(-1, value.shape[-1])
    return value.reshape(-1, value.shape[-1])


def padding_mask(feeds: Mapping[str, Array], name: str | None) -> Array | None:
    """Return (batch, positions) bool, False at padding, or None where no input tells.

    An input called like a mask that holds only 0 and 1, or one called like a length, one number a sample.

    Raises:
        DataError: ``name`` is no input, or no mask of two axes or lengths of one.
    """
    if name is not None:
        if name not in feeds:
            raise DataError(f"--mask '{name}' is no input of the model; inputs: {', '.join(feeds)}")
        made = _as_mask(feeds[name], feeds)
        if made is None:
            raise DataError(
                f"--mask '{name}' has shape {list(feeds[name].shape)}; expected a mask (batch, positions) or "
                "lengths (batch)"
            )
        return made
    for key, value in feeds.items():
        if re.search(r"mask", key, re.IGNORECASE) and value.ndim == 2 and np.isin(value, (0, 1)).all():
            return value.astype(bool)
    for key, value in feeds.items():
        if re.search(r"len(gth)?s?$|_len", key, re.IGNORECASE) and value.ndim == 1 and value.dtype.kind in "iu":
            return _as_mask(value, feeds)
    return None


def _as_mask(value: Array, feeds: Mapping[str, Array]) -> Array | None:
    if value.ndim == 2:
        return np.asarray(value != 0)
    if value.ndim == 1:
        longest = max((entry.shape[1] for entry in feeds.values() if entry.ndim > 1), default=0)
        return np.asarray(np.arange(longest)[None, :] < value[:, None])
    return None


def _groups(layouts: Mapping[tuple[str, Layout], int]) -> list[list[tuple[str, Layout]]]:
    """Split the tensors so that the sums of one pass over the data fit into memory."""
    groups: list[list[tuple[str, Layout]]] = [[]]
    used = 0
    for key, width in layouts.items():
        size = 16 * width if isinstance(key[1], Lookup) else 8 * width * width
        if groups[-1] and used + size > _GRAM_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += size
    return [group for group in groups if group]


def _batch_size(session: Any, dataset: Dataset, shapes: Sequence[tuple[int, ...] | None]) -> int:
    if not can_batch(session, dataset, common=True):
        return 1
    live = 4 * sum(int(np.prod(shape)) for shape in shapes if shape is not None)
    return int(np.clip(_LIVE_BYTES // max(live, 1), 1, 32))
