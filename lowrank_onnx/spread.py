"""Fit what predicts the deviation that compression causes; see ``stddev`` for the form it has.

The metric of every tensor, and the map from what the weights left out to the output, come from the samples the
factors were fitted to. What each of them counts is chosen on samples held out from all of that, where the
deviations are as large as they will be: on its own samples a compressed model is nearer to the original than it
will be elsewhere. A last factor for every output puts ``COVERED`` of them within two predicted deviations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.stats
from onnx import ModelProto

from lowrank_onnx.augment import exchange_tokens
from lowrank_onnx.base import Moments, Site
from lowrank_onnx.batches import batches, can_batch
from lowrank_onnx.budget import Selection
from lowrank_onnx.data import Dataset
from lowrank_onnx.decompositions.posterior import fit_posterior
from lowrank_onnx.errors import DataError, LowRankError
from lowrank_onnx.linalg import Array, covariance
from lowrank_onnx.metrics import class_axis
from lowrank_onnx.patches import Window, window
from lowrank_onnx.problem import Problem, training_data
from lowrank_onnx.recurrent_statistics import read_cell
from lowrank_onnx.runtime import open_session, run
from lowrank_onnx.sites.recurrent import has_lengths, operand
from lowrank_onnx.statistics import Lookup, MomentSums, Progress, as_rows, expose, padding_mask, row_layout
from lowrank_onnx.stddev import THROUGH, Growth, Loss, Reach, Spread, Tap, add_stddev, check_room
from lowrank_onnx.weighing import LEAST, Rows, Seen, best_columns

HELD_OUT = 0.25  # of the calibration data
FEWEST = 32  # calibration samples; a quarter of them tells little enough
COVERED = 0.95
_WATCHED = 3  # tensors in the finished model
_TRIED = 32
_WIDEST = 2048  # channels of a tensor that is watched
_SKETCH = 32  # directions of a tensor that is wider
_RIDGE = 0.01
_LEAST_FACTOR = 0.1
_DIRECTIONS = 1024  # of everything left out, together
_CARRIED = 16
_STEPS = 2  # the last ones of a recurrent cell; those before tell little more for what they cost
_POSITIONS = 40_000  # of an output, over all samples
_ELEMENTS = 1_000_000  # of it, where they are all held at once
_BATCH = 16


@dataclass(frozen=True, eq=False)
class _Output:
    """How the rows of an output lie.

    Attributes:
        inner: The tensor whose deviation is told first: the output, or what goes into the operator behind it.
        through: That operator, one of ``THROUGH``; empty where there is none.
    """

    name: str
    rank: int
    channels: int
    flat: bool
    inner: str
    through: str = ""

    def rows(self, value: Array) -> Array:
        """(..., J)."""
        value = np.asarray(value, np.float32)
        return value.reshape(-1, 1) if self.flat else np.moveaxis(value, self.channels, -1)


def check_outputs(problem: Problem, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the outputs that get a standard deviation: those named, or every floating-point one.

    Raises:
        LowRankError: An output does not exist or holds no floating-point numbers, or there is none that does.
        ModelError: See ``check_room``.
    """
    types = {value.name: value.type for value in problem.session.get_outputs()}
    floats = tuple(name for name, kind in types.items() if kind in ("tensor(float)", "tensor(float16)"))
    listed = ", ".join(f"'{name}' {kind}" for name, kind in types.items())
    for name in wanted:
        if name not in types:
            raise LowRankError(f"--emit-uncertainty names '{name}', which is no output of the model; outputs: {listed}")
        if name not in floats:
            raise LowRankError(f"--emit-uncertainty: output '{name}' is {types[name]}, not float or float16")
    check_room(problem.model.proto, tuple(dict.fromkeys(wanted)) or floats)
    if not floats:
        raise LowRankError(f"--emit-uncertainty needs an output of type float or float16, found {listed}")
    return tuple(dict.fromkeys(wanted)) or floats


def hold_out(problem: Problem, option: str, mask: str | None, augment: bool) -> tuple[Problem, Dataset]:
    """Divide the calibration data: the problem keeps what the factors are fitted to.

    Raises:
        DataError: There are none, or too few.
    """
    data = problem.calibrate
    if data is None:
        raise DataError(f"{option} needs samples to measure the deviation on; give --calibrate DATA")
    if len(data) < FEWEST:
        raise DataError(
            f"{option} needs {FEWEST} calibration samples, found {len(data)}: {HELD_OUT:.0%} of them are held out to "
            "measure the deviation on"
        )
    held = round(HELD_OUT * len(data))
    order = np.random.default_rng(problem.seed).permutation(len(data)).tolist()
    fitted = data.subset(sorted(order[held:]))
    training = training_data(problem.session, fitted, problem.sites, mask, problem.seed, augment)
    return dataclasses.replace(problem, calibrate=fitted, training=training), data.subset(sorted(order[:held]))


def emit_stddev(
    problem: Problem,
    selection: Selection,
    held: Dataset,
    names: Sequence[str],
    mask: str | None,
    progress: Progress | None = None,
) -> tuple[ModelProto, list[Spread]]:
    """Return the compressed model with a predicted standard deviation for each of the outputs.

    Args:
        problem: Its calibration data are what the factors were fitted to.
        held: Samples they were not fitted to.
        names: Floating-point outputs; see ``check_outputs``.
        mask: As ``observe`` takes it.

    Raises:
        ModelError: See ``add_stddev``.
    """
    assert problem.calibrate is not None
    work = _Work(problem, selection, mask)
    spreads = []
    for place, name in enumerate(names):
        spreads.append(work.fit(name, problem.calibrate, held))
        if progress is not None:
            progress("uncertainty", place + 1, len(names))
    return add_stddev(selection.built.proto, spreads), spreads


class _Work:
    """What all outputs share: the sessions, and which tensors there are to watch."""

    def __init__(self, problem: Problem, selection: Selection, mask: str | None) -> None:
        self.problem, self.mask = problem, mask
        self.proto = selection.built.proto
        self.outputs = [value.name for value in self.proto.graph.output]
        self.layouts = {name: -1 for name in self.outputs}
        made = {name for node in self.proto.graph.node for name in node.output}
        made |= {value.name for value in self.proto.graph.input} - {t.name for t in self.proto.graph.initializer}
        for site in problem.sites:
            for use in site.uses if not site.parts else ():
                layout = None if site.kind == "recurrent" else row_layout(site)
                if use.scope or use.input not in made or isinstance(layout, Lookup):
                    continue
                self.layouts[use.input] = 1 if isinstance(layout, Window) else -2 if layout == "first" else -1
        self.cells = [cell for cell in _cells(problem, selection) if {cell.inputs, cell.states} <= made]
        states = [cell.states for cell in self.cells]
        session = self._open(expose(self.proto, [*self.layouts, *states]))
        data = problem.calibrate
        assert data is not None
        self.together = can_batch(problem.session, data)
        self.single = _with_inputs(session, data.feeds(0))
        self.pair = _with_inputs(session, data.batch([0, 1])) if self.together else None
        self.lost = {site.name: (site, lost) for site, lost in _left_out(problem, selection)}

    def fit(self, name: str, fitted: Dataset, held: Dataset) -> Spread:
        """What predicts the deviation of one output."""
        output = self._output(name)
        taps = self._taps(output)
        moments = self._moments(taps, fitted)
        reaches = tuple(
            _reach(tap, entry, self.problem.seed) for tap, entry in zip(taps, moments, strict=True) if entry.rows > 1
        )
        width = output.rows(self.single[name]).shape[-1]
        empty = Spread(
            name, output.rank, output.channels, output.flat, 0.0, np.ones(width), reaches, (), np.zeros((0, width)),
            np.zeros(width), output.through,
        )  # fmt: skip
        spread = self._carry(output, empty, dict(zip(taps, moments, strict=True)), fitted)
        return self._weigh(output, spread, held)

    # --- the pieces -----------------------------------------------------------------------------------

    def _output(self, name: str) -> _Output:
        value = self.single[name]
        if value.ndim < 2:
            return _Output(name, 2, 1, True, name)
        channels = class_axis(value)
        node = next((node for node in self.proto.graph.node if name in node.output), None)
        known = {made for entry in self.problem.model.proto.graph.node for made in entry.output}
        if node is not None and node.op_type in THROUGH and node.input[0] in known:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), -1)
            # Of sets before 13 the axes from the given one on are joined, and 1 is what they take for granted.
            along = node.op_type == "Sigmoid" or value.ndim == 2 or axis % value.ndim == channels == value.ndim - 1
            if along and (node.attribute or node.op_type == "Sigmoid" or value.ndim == 2):
                return _Output(name, value.ndim, channels, False, node.input[0], node.op_type)
        return _Output(name, value.ndim, channels, False, name)

    def _taps(self, output: _Output) -> list[Tap]:
        found = []
        for name in self.layouts:
            tap = self._tap(output, name)
            if tap is not None:
                found.append(tap)
        if len(found) > _TRIED:
            kept = np.unique(np.linspace(0, len(found) - 1, _TRIED).round().astype(int))
            found = [found[place] for place in kept]
        return found

    def _tap(self, output: _Output, name: str) -> Tap | None:
        """A tensor as the output sees it; None where its axes cannot be told apart or it is no vector of numbers."""
        one = self.single[name]
        if one.dtype not in (np.float16, np.float32) or one.ndim < 2:
            return None
        channels = (class_axis(one) if name in self.outputs else self.layouts[name]) % one.ndim
        if one.shape[channels] > _WIDEST:
            return None
        samples = None
        if self.pair is not None:
            two = self.pair[name]
            grown = [axis for axis in range(one.ndim) if two.shape[axis] != one.shape[axis]]
            if len(grown) != 1 or grown[0] == channels or (one.shape[grown[0]], two.shape[grown[0]]) != (1, 2):
                return None
            samples = grown[0]
        lead = one.shape[:channels] + one.shape[channels + 1 :]
        wanted = output.rows(self.single[output.name]).shape[:-1]
        # Of a map, or of a sequence; a tensor of one row a sample is the same averaged or not.
        aligned = one.ndim == output.rank and one.ndim > 2 and lead == wanted and (samples or 0) == 0
        aligned = aligned or (one.ndim == output.rank == 2 and samples == 0 and not output.flat)
        return Tap(name, one.ndim, channels, samples, aligned, one.dtype == np.float16)

    def _moments(self, taps: Sequence[Tap], data: Dataset) -> list[Moments]:
        """Mean and second moment of every tensor, at real positions."""
        sums = [MomentSums(self.single[tap.name].shape[tap.channels]) for tap in taps]
        session = self._open(expose(self.proto, [tap.name for tap in taps]))
        for _, feeds in self._feeds(data):
            got = _with_inputs(session, feeds)
            keep = padding_mask(feeds, self.mask)
            for tap, entry in zip(taps, sums, strict=True):
                rows = np.atleast_2d(tap.rows(got[tap.name]))
                entry.add(as_rows(rows, "last", keep if tap.aligned else None))
        return [entry.moments() for entry in sums]

    def _carry(self, output: _Output, spread: Spread, moments: Mapping[Tap, Moments], data: Dataset) -> Spread:
        """Find the map from what was left out to the output."""
        losses = [*self._losses(output, moments), *self._faded(output, data)]
        if not losses:
            return spread
        grown = Growth(self.proto)
        names = [grown.shaped(grown.loss(e), e.width, output.rank, e.tap.aligned) for e in losses]
        session = self._open(expose(grown.proto, [*names, output.inner]))
        sums = _Sums()
        for rows in self._rows(session, output, names, data, _POSITIONS):
            sums.add(np.concatenate(rows.parts, axis=1), rows.inner)
        ends = np.cumsum([entry.width for entry in losses])
        places = [np.arange(end - entry.width, end) for end, entry in zip(ends, losses, strict=True)]
        carried = sums.fitted(places)
        # What a layer adds to the squares; each one costs time in every run.
        gram = sums.centred()[0]
        added = [float(np.vdot(carried[place], gram[np.ix_(place, place)] @ carried[place])) for place in places]
        kept = [number for number, part in enumerate(added) if part > LEAST * sum(added)]
        if not kept:
            return spread
        carried = sums.fitted([places[number] for number in kept])
        u, sigma, vt = scipy.linalg.svd(carried, full_matrices=False)
        count = min(_CARRIED, len(sigma))
        inner = u[:, :count] * sigma[:count]
        final = []
        for number in kept:
            entry, ahead = losses[number], inner[places[number]]
            kernel = np.tensordot(ahead, entry.kernel, (0, 0)) if entry.attributes else entry.kernel @ ahead
            final.append(dataclasses.replace(entry, kernel=kernel))
        shift = sums.target / sums.rows - (sums.mean / sums.rows) @ inner @ vt[:count]
        return dataclasses.replace(spread, losses=tuple(final), carry=vt[:count], shift=shift)

    def _losses(self, output: _Output, moments: Mapping[Tap, Moments]) -> list[Loss]:
        """What each factorized layer left out, in its strongest directions."""
        found = []
        taps = {tap.name: tap for tap in moments}
        usable = [
            (site, lost, taps[site.uses[0].input])
            for site, lost in self.lost.values()
            if site.uses[0].input in taps
            and self.single[site.uses[0].input].shape[taps[site.uses[0].input].channels]
            == lost.shape[0 if site.kind == "linear" else 1]
        ]
        most = max(_DIRECTIONS // max(len(usable), 1), 8)
        for site, lost, tap in usable:
            if site.kind == "linear":
                spent = lost.T @ moments[tap].gram @ lost
                found.append(Loss(tap, lost @ _leading(spent, most), {}))
                continue
            flat = lost.reshape(len(lost), -1)
            kernel = np.tensordot(_leading(flat @ flat.T, most), lost, (0, 0))
            spatial = self.single[tap.name].shape[2:]
            aligned = tap.aligned and window(site).outputs(spatial) == spatial
            seen = dataclasses.replace(tap, aligned=aligned)
            positions = () if aligned else tuple(range(2, tap.rank))
            found.append(Loss(seen, kernel, _convolution(site), positions))
        return found

    def _faded(self, output: _Output, data: Dataset) -> list[Loss]:
        """What cells left out in their last steps, of an output that has no positions itself."""
        steps = [step for cell in self.cells for step in self._steps(cell)] if output.rank == 2 else []
        if not steps:
            return []
        most = max(_DIRECTIONS // len(steps), 8)
        found = []
        for (tap, lost), entry in zip(steps, self._moments([tap for tap, _ in steps], data), strict=True):
            if entry.gram.any() and lost.any():
                spent = lost.T @ entry.gram @ lost
                found.append(Loss(tap, lost @ _leading(spent, most), {}))
        return found

    def _steps(self, cell: _Cell) -> Iterator[tuple[Tap, Array]]:
        """The last inputs of a cell and the states they met, each with what the weight of it lost (K, N)."""
        own, before = self.single[cell.inputs], self.single[cell.states]
        if own.dtype not in (np.float16, np.float32):
            return
        half = own.dtype == np.float16
        time, samples, behind = (1, 0, 0) if cell.batch_first else (0, 1, 2)
        where: list[int | None] = [samples, behind]
        if self.pair is None:
            where = [None, None]
        elif any(
            self.pair[name].shape != tuple(2 if axis == place else size for axis, size in enumerate(one.shape))
            for name, one, place in ((cell.inputs, own, samples), (cell.states, before, behind))
        ):
            return
        for d, reverse in enumerate(cell.reverse):
            for back in range(_STEPS):
                at, ahead = (back, back + 1) if reverse else (-1 - back, -2 - back)
                yield Tap(cell.inputs, 3, 2, where[0], False, half, ((time, at),)), cell.lost[d, :, : own.shape[2]].T
                picked = ((time, ahead), (2 if cell.batch_first else 1, d))
                yield Tap(cell.states, 4, 3, where[1], False, half, picked), cell.lost[d, :, own.shape[2] :].T

    def _weigh(self, output: _Output, spread: Spread, held: Dataset) -> Spread:
        """Choose what counts how much, on the samples held out."""
        grown = Growth(self.proto)
        names = [grown.shaped(grown.reach(e), 1, output.rank, e.tap.aligned) for e in spread.reaches]
        names += [grown.carried(spread)] if spread.losses else []
        session = self._open(expose(grown.proto, [*names, output.inner]))
        most = min(_POSITIONS, _ELEMENTS // len(spread.scale))

        def seen_on(data: Dataset) -> Seen:
            return Seen.of(self._rows(session, output, names, data, most), bool(spread.losses), output.through)

        near = seen_on(held)
        if not near.squares.any():
            return dataclasses.replace(spread, reaches=(), losses=(), through="")
        # Of few samples an output's own spread is uncertain: eight rows of the mean are added.
        whole = near.inner.mean()
        scale = (near.inner.sum(axis=0) + 8 * whole) / (len(near.inner) + 8) / whole
        watched, counts = best_columns(near.watched, scale, near, np.zeros_like(near.squares), _WATCHED)
        constant, carried = max(counts[0], 1e-3 * whole), counts[-2]
        floor = max(counts[-1], 1e-6 * near.squares.mean()) if output.through else 0.0
        weights = dict(zip(watched, counts[1:-2], strict=True))

        def variance(seen: Seen) -> Array:
            rows = constant + sum((w * seen.watched[:, place] for place, w in weights.items()), np.zeros(len(seen.far)))
            return seen.pushed(np.outer(rows, scale) + carried * seen.far**2) + floor

        limits = np.quantile(near.watched, COVERED, axis=0) if near.watched.size else np.zeros(0)
        beyond: dict[int, float] = {}
        shifted = self._shifted(held)
        if shifted is not None and near.watched.size:
            off = seen_on(shifted)
            excess = np.maximum(off.watched - limits, 0.0)
            places, more = best_columns(
                excess, scale, dataclasses.replace(off, far=np.zeros_like(off.far)), variance(off), 1
            )
            beyond = dict(zip(places, more[1:-2], strict=True))
        told = variance(near)
        for place, count in beyond.items():
            told += near.pushed(count * np.outer(np.maximum(near.watched[:, place] - limits[place], 0.0), scale))
        # Where nearly all deviations are nothing and a few are large, nearly all would be covered by nothing.
        factor = max(float(np.quantile(np.sqrt(near.squares / told), COVERED)) / 2, _LEAST_FACTOR)
        by = factor * math.sqrt(carried)
        reaches = [
            dataclasses.replace(
                entry,
                weight=factor**2 * weights.get(place, 0.0),
                beyond=factor**2 * beyond.get(place, 0.0),
                limit=float(limits[place]),
            )
            for place, entry in enumerate(spread.reaches)
            if weights.get(place, 0.0) + beyond.get(place, 0.0) > 0
        ]
        return dataclasses.replace(
            spread,
            constant=float(factor**2 * constant),
            scale=scale,
            reaches=tuple(reaches),
            losses=spread.losses if carried > 0 else (),
            carry=by * spread.carry,
            shift=by * spread.shift,
            floor=float(factor**2 * floor),
        )

    def _shifted(self, data: Dataset) -> Dataset | None:
        """The samples with tokens exchanged, or with their numbers in another order; None where neither is possible.

        The original tells the deviation of any input, so that what the predictor does off the calibration data
        need not be left to chance.
        """
        both = exchange_tokens(data, self.problem.sites, self.mask, self.problem.seed)
        if both is None:
            rng = np.random.default_rng(self.problem.seed)
            columns = {name: column.array for name, column in data.inputs.items() if column.starts is not None}
            changed = {
                name: rng.permuted(array.reshape(len(array), -1), axis=1).reshape(array.shape)
                for name, array in columns.items()
                if array.dtype.kind == "f" and array.size and not np.isin(array, (0, 1)).all()
            }
            both = data.doubled(changed) if changed else None
        return None if both is None else both.subset(range(len(data), len(both)))

    def _rows(self, session: Any, output: _Output, names: Sequence[str], data: Dataset, most: int) -> Iterator[Rows]:
        """Rows of every batch at real positions, about ``most`` in all."""
        original = self.problem.session
        if output.through:
            original = open_session(
                expose(self.problem.model.proto, [output.inner]), self.problem.runtime, self.problem.model.folder
            )
        wanted = list(dict.fromkeys([output.inner, output.name]))
        each = max(most // len(data), 1)
        for indices, feeds in self._feeds(data):
            got, exact = run(session, feeds, [*wanted, *names]), run(original, feeds, wanted)
            own = [output.rows(exact[name]) - output.rows(got[name]) for name in (output.inner, output.name)]
            own.append(output.rows(got[output.name]))
            keep = padding_mask(feeds, self.mask)
            values = [np.broadcast_to(got[name], (*own[0].shape[:-1], got[name].shape[-1])) for name in names]
            rows = [as_rows(value, "last", keep) for value in (*values, *own)]
            if len(rows[-1]) > each * len(indices):
                rng = np.random.default_rng([self.problem.seed, indices[0]])
                chosen = np.sort(rng.choice(len(rows[-1]), each * len(indices), replace=False))
                rows = [value[chosen] for value in rows]
            yield Rows(rows[:-3], *rows[-3:])

    def _feeds(self, data: Dataset) -> Iterator[tuple[Sequence[int], dict[str, Array]]]:
        for indices in batches(len(data), _BATCH if self.together else 1):
            yield indices, data.batch(indices) if self.together else data.feeds(indices[0])

    def _open(self, proto: ModelProto) -> Any:
        return open_session(proto, self.problem.runtime, self.problem.model.folder, what="the rewritten model")


@dataclass(frozen=True, eq=False)
class _Cell:
    """A factorized cell: the tensors with its inputs and its states of every step, and what (D, N, I + H) lost."""

    inputs: str
    states: str
    reverse: tuple[bool, ...]
    batch_first: bool
    lost: Array


@dataclass
class _Sums:
    """Second moments of rows with what they should tell."""

    rows: int = 0
    mean: Array | float = 0.0
    gram: Array | float = 0.0
    cross: Array | float = 0.0
    target: Array | float = 0.0
    energy: Array | float = 0.0

    def add(self, z: Array, t: Array) -> None:
        z, t = z.astype(np.float64), t.astype(np.float64)
        self.rows += len(z)
        self.mean = self.mean + z.sum(axis=0)
        self.gram = self.gram + z.T @ z
        self.cross = self.cross + z.T @ t
        self.target = self.target + t.sum(axis=0)
        self.energy = self.energy + np.sum(t**2, axis=0)

    def centred(self) -> tuple[Array, Array, Array]:
        mean, target = np.asarray(self.mean), np.asarray(self.target)
        gram = np.asarray(self.gram) - np.outer(mean, mean) / self.rows
        cross = np.asarray(self.cross) - np.outer(mean, target) / self.rows
        return gram, cross, np.maximum(np.asarray(self.energy) - target**2 / self.rows, 0.0)

    def fitted(self, blocks: Sequence[Array]) -> Array:
        """(D, J) the posterior mean of the map from z to t; 0 outside the blocks, each of which has one prior scale."""
        gram, cross, energy = self.centred()
        weight = np.zeros(len(gram))
        for places in blocks:
            trace = float(gram[places, places].sum())
            weight[places] = 1 / math.sqrt(trace) if trace > 0 else 0.0
        if not energy.any() or not weight.any():
            return np.zeros_like(cross)
        made = fit_posterior(gram * np.outer(weight, weight), weight[:, None] * cross, energy, self.rows)
        return np.asarray(weight[:, None] * made.mean)


def _with_inputs(session: Any, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs, and what went in: a tensor to be watched may be either."""
    return {**feeds, **run(session, feeds)}


def _reach(tap: Tap, moments: Moments, seed: int) -> Reach:
    """The metric of a tensor: its inverse covariance, in ``_SKETCH`` random directions where it is wide."""
    metric = covariance(moments.gram, moments.mean)
    if not metric.any():
        return Reach(tap, moments.mean, np.zeros((len(metric), 1)))
    values, vectors = scipy.linalg.eigh(metric)
    width = len(values)
    root = vectors / np.sqrt(np.maximum(values, 0.0) + _RIDGE * values.mean())
    if width > _SKETCH:
        drawn = np.random.default_rng([seed, width]).standard_normal((width, _SKETCH))
        root = root @ scipy.linalg.qr(drawn, mode="economic")[0]
    return Reach(tap, moments.mean, root / math.sqrt(root.shape[1]))


def _left_out(problem: Problem, selection: Selection) -> Iterator[tuple[Site, Array]]:
    """The layers whose input and weight the compressed model still tells of, and what their weights lost."""
    singles = {site.name: site for site in problem.sites if not site.parts}
    for choice in (*selection.choices, *selection.kept):
        entry = choice.proposal
        made = entry.technique.dense_equivalent(entry.site, choice.candidate, selection.built.factors[entry.site.name])
        for name, dense in made.items():
            site = singles[name]
            plain = site.kind == "linear" and site.weight.ndim == 2 and row_layout(site) == "last"
            attributes = site.attributes
            plain |= site.kind == "convolution" and attributes["group"] == 1 and not attributes["transposed"]
            if plain and len(site.uses) == 1 and not site.uses[0].scope:
                lost = site.weight.astype(np.float64) - np.asarray(dense.weight, np.float64)
                if lost.any():
                    yield site, lost


def _cells(problem: Problem, selection: Selection) -> Iterator[_Cell]:
    """The cells that keep their states, where sequences end together."""
    for choice in selection.choices:
        entry = choice.proposal
        site = entry.site
        if site.kind != "recurrent" or len(site.uses) > 1 or site.uses[0].scope or has_lengths(site):
            continue
        factors = selection.built.factors[site.name]
        dense = entry.technique.dense_equivalent(site, choice.candidate, factors)[site.name]
        node = site.attributes[site.uses[0].node]
        if dense.behind is None and node.output[0]:
            cell = read_cell(site, node)
            lost = site.weight.astype(np.float64) - np.asarray(dense.weight, np.float64)
            yield _Cell(operand(node, 0), node.output[0], cell.reverse, cell.layout == 1, lost)


def _convolution(site: Site) -> dict[str, Any]:
    entry = site.attributes
    pads = {"pads": list(entry["pads"])} if entry["auto_pad"] == "NOTSET" else {"auto_pad": entry["auto_pad"]}
    moved = {"strides": list(entry["strides"]), "dilations": list(entry["dilations"])}
    return {"kernel_shape": list(site.shape[2:]), **moved, **pads}


def _leading(gram: Array, most: int) -> Array:
    """(N, p) the leading eigenvectors."""
    width = len(gram)
    return np.asarray(scipy.linalg.eigh(gram, subset_by_index=[max(width - most, 0), width - 1])[1])
