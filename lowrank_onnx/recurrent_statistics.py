"""What a recurrent cell sees: sums over its inputs and states, step by step, while the model runs on data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from lowrank_onnx.base import Moments, Site
from lowrank_onnx.data import Dataset
from lowrank_onnx.decompositions.gates import Preactivations, sensitivity
from lowrank_onnx.errors import DataError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model
from lowrank_onnx.runtime import Runtime, open_session, run
from lowrank_onnx.sites.recurrent import operand

HELD_OUT_EVERY = 5  # samples; ridges are chosen on the fifth part
DEFAULT_ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}


@dataclass(frozen=True)
class Cell:
    """The attributes of a recurrent node, with their defaults.

    Attributes:
        reverse: By direction: whether it reads the sequence from its end.
        activations: Lower case, one tuple a direction.
        default: True where every activation is the default, without parameters and clipping.
    """

    reverse: tuple[bool, ...]
    activations: tuple[tuple[str, ...], ...]
    default: bool
    clip: float
    layout: int
    linear_before_reset: bool
    input_forget: bool


def read_cell(site: Site, node: Any) -> Cell:
    """Read the attributes of a node of a recurrent site."""
    given = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    direction = given.get("direction", b"forward").decode()
    reverse = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
    usual = DEFAULT_ACTIVATIONS[site.op]
    named = tuple(entry.decode().lower() for entry in given.get("activations", ())) or usual * len(reverse)
    count = len(named) // len(reverse)
    activations = tuple(named[place * count : (place + 1) * count] for place in range(len(reverse)))
    clip = float(given.get("clip", 0.0))
    return Cell(
        reverse=reverse,
        activations=activations,
        default=all(entry == usual for entry in activations) and not clip,
        clip=clip,
        layout=int(given.get("layout", 0)),
        linear_before_reset=bool(given.get("linear_before_reset", 0)),
        input_forget=bool(given.get("input_forget", 0)),
    )


@dataclass(frozen=True, eq=False)
class Walk:
    """One run of a cell, time first.

    Attributes:
        inputs: (T, B, I).
        before: By direction (T, B, H), the states ahead of every step.
        valid: (T, B) False at padding.
    """

    cell: Cell
    inputs: Array
    before: tuple[Array, ...]
    valid: Array


def walked(site: Site, node: Any, values: Mapping[str, Array], output: str, keep: Array | None) -> Walk:
    """Lay out what a node reads and its Y, ``output``, as its steps meet them."""
    cell, sizes = read_cell(site, node), site.attributes
    x, y = values[operand(node, 0)], values[output]
    if cell.layout == 1:
        x, y = np.swapaxes(x, 0, 1), np.moveaxis(y, 0, 2)  # (T, B, I), (T, D, B, H)
    steps, batch = x.shape[:2]
    start = _initial(values, operand(node, 5), cell, sizes, batch)
    lengths = values.get(operand(node, 4), np.full(batch, steps))
    valid = np.arange(steps)[:, None] < lengths  # (T, B)
    if keep is not None and keep.shape == (batch, steps):
        valid &= keep.T
    before = [_before(y[:, d], start[d], lengths, reverse) for d, reverse in enumerate(cell.reverse)]
    return Walk(cell, x.astype(np.float32), tuple(entry.astype(np.float32) for entry in before), valid)


class _Sums:
    """Running sums of one cell."""

    def __init__(self, site: Site) -> None:
        sizes = site.attributes
        self.site = site
        width = sizes["inputs"] + sizes["directions"] * sizes["hidden"]
        self.rows = np.zeros(2, np.int64)  # of most samples, and of those held out
        self.total, self.products = np.zeros((2, width)), np.zeros((2, width, width))
        self.felt = np.zeros((2, sizes["directions"], sizes["gates"] * sizes["hidden"]))

    def add(self, node: Any, values: Mapping[str, Array], output: str, keep: Array | None, held: bool) -> None:
        """Add one run: ``values`` holds what the node reads, and Y as ``output``."""
        fold = int(held)
        walk = walked(self.site, node, values, output, keep)
        cell, valid, sizes = walk.cell, walk.valid, self.site.attributes
        weight, bias = self.site.weight.astype(np.float32), sizes["bias"]
        inputs, rows = sizes["inputs"], weight.shape[1]
        cells = _initial(values, operand(node, 6), cell, sizes, valid.shape[1])
        for d, (reverse, before) in enumerate(zip(cell.reverse, walk.before, strict=True)):
            into = walk.inputs @ weight[d, :, :inputs].T
            state = before @ weight[d, :, inputs:].T
            if bias is not None:
                into, state = into + bias[d, :rows], state + bias[d, rows:]
            if cell.default:
                turn = slice(None, None, -1 if reverse else 1)
                pre = Preactivations(into[turn], state[turn], before[turn], cells[d])
                for side, felt in enumerate(sensitivity(self.site.op, pre, cell.linear_before_reset)):
                    self.felt[side, d] += felt[turn][valid].sum(axis=0, dtype=np.float64)
        z = np.concatenate([walk.inputs, *walk.before], axis=2)[valid]
        self.rows[fold] += len(z)
        self.total[fold] += z.sum(axis=0, dtype=np.float64)
        self.products[fold] += z.T @ z

    def moments(self) -> Moments:
        """The sums divided by the number of steps."""
        rows = int(self.rows.sum())
        total, products = self.total.sum(axis=0) / rows, self.products.sum(axis=0) / rows
        folds = None
        if self.rows.all():
            most, held = (
                Moments(int(n), t / n, p / n) for n, t, p in zip(self.rows, self.total, self.products, strict=True)
            )
            folds = (most, held)
        return Moments(rows, total, products, sensitivity=self.felt / rows, folds=folds)


def _initial(values: Mapping[str, Array], name: str, cell: Cell, sizes: Mapping[str, Any], batch: int) -> Array:
    """(D, B, H) a state before the first step."""
    if not name:
        return np.zeros((sizes["directions"], batch, sizes["hidden"]), np.float32)
    return np.swapaxes(values[name], 0, 1) if cell.layout == 1 else values[name]


def _before(y: Array, start: Array, lengths: Array, reverse: bool) -> Array:
    """(T, B, H) the state before every step, from the states behind them."""
    if not reverse:
        return np.concatenate([start[None], y[:-1]])
    before = np.concatenate([y[1:], start[None]])
    last = np.maximum(np.asarray(lengths, np.int64) - 1, 0)
    before[last, np.arange(len(last))] = start  # each sequence is read from its own end
    return before


def observable_cell(site: Site) -> bool:
    """Whether the moments of a recurrent site can be had: not inside a subgraph, and with a bias known."""
    return site.kind == "recurrent" and site.attributes["bias_known"] and all(not use.scope for use in site.uses)


def observe_cells(
    model: Model,
    sites: Sequence[Site],
    dataset: Dataset,
    runtime: Runtime,
    padding: Callable[[Mapping[str, Array]], Array | None],
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, dict[str, Moments]]:
    """Return, by site and name of its input, the moments of (x, h of every direction).

    Args:
        padding: Tells (batch, positions) of real rows from the inputs of a run; None where nothing tells.

    Raises:
        DataError: No step is left, or the values overflow.
    """
    chosen = [site for site in sites if observable_cell(site)]
    if not chosen:
        return {}
    proto, outputs = _watched(model.proto, chosen)
    names = {operand(site.attributes[u.node], p) for site in chosen for u in site.uses for p in (0, 4, 5, 6)}
    constants = {name: found.value for name in names if (found := model.constant(model.scopes[0], name)) is not None}
    fetch = [value.name for value in proto.graph.output]
    session = open_session(proto, runtime, model.folder)
    sums = {site.name: _Sums(site) for site in chosen}
    for place in range(len(dataset)):
        feeds = dataset.feeds(place)
        held = place % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        values = {**constants, **feeds, **run(session, feeds, fetch)}
        for site in chosen:
            for use in site.uses:
                sums[site.name].add(site.attributes[use.node], values, outputs[use.node], padding(feeds), held)
        if progress is not None:
            progress("observe cells", place + 1, len(dataset))
    for name, entry in sums.items():
        if not entry.rows.any():
            raise DataError(f"no step of any sequence of '{name}' is left behind the mask; is the mask all zeros?")
        if not np.isfinite(entry.products).all():
            raise DataError(
                f"the calibration data make '{name}' overflow or hold NaN; are they scaled as the model expects?"
            )
    return {site.name: {use.input: sums[site.name].moments() for use in site.uses} for site in chosen}


def _watched(proto: ModelProto, sites: Sequence[Site]) -> tuple[ModelProto, dict[str, str]]:
    """A copy that tells what the cells read and their Y, and the name of Y by node."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    wanted = {use.node for site in sites for use in site.uses}
    outputs: dict[str, str] = {}
    names: list[str] = []
    made = {name for node in copy.graph.node for name in node.output if name}
    for node in copy.graph.node:
        if node.name in wanted:
            if not node.output[0]:
                node.output[0] = f"{node.name}/every_state"
            outputs[node.name] = node.output[0]
            names += [node.output[0], *(operand(node, place) for place in (0, 4, 5, 6) if operand(node, place) in made)]
    known = {value.name for value in copy.graph.output}
    for name in dict.fromkeys(names):
        if name not in known:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy, outputs
