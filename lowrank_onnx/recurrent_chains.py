"""Nodes that carry out a recurrent cell with thin weights: the fused operator, or the cell spelled out.

Roles of the factors: ``first`` (I, r) projects the input, ``second`` (D, N, r) stands in the place of W;
``state_first`` (D, s, H) projects the state, ``state_second`` (D, N, s) stands in the place of R; without a
first factor the second is the dense weight. ``bias`` (D, 2 N) is the whole B. N = gates * hidden.
``chosen`` (D, k) are the hidden units of a cell that keeps only some, ``widen`` (D, k, H) makes all states of
those again behind the cell, and ``widen_bias`` (D, 1, H) is added; with one direction they lack their first axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Factors, Replacement, Site, Use
from lowrank_onnx.chains import store
from lowrank_onnx.linalg import Array
from lowrank_onnx.recurrent_statistics import Cell, read_cell
from lowrank_onnx.sites.recurrent import operand

FIRST_OPSET = 9  # of Scan as it is now
SPELLED = {"sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu"}
_OPERANDS_BY_INPUT = 13  # from here on Split, Squeeze and Unsqueeze take sizes and axes as inputs


def fused(site: Site, use: Use, factors: Factors) -> Replacement:
    """Keep the fused operator; its input projected in front, R stored as a product that is folded at load."""
    node = site.attributes[use.node]
    nodes: list[gs.Node] = []
    data = gs.Variable(use.input)
    if "first" in factors:
        data = gs.Variable(f"{use.node}/projected")
        first = gs.Constant(f"{site.name}/first", factors["first"])
        nodes.append(gs.Node("MatMul", f"{use.node}/factor0", {}, [gs.Variable(use.input), first], [data]))
    state = gs.Constant(f"{site.name}/state_second", factors["state_second"])
    if "state_first" in factors:
        made = gs.Variable(f"{use.node}/state_weight")
        inner = gs.Constant(f"{site.name}/state_first", factors["state_first"])
        nodes.append(gs.Node("MatMul", f"{use.node}/state_product", {}, [state, inner], [made]))
        state = made
    inputs = [_tensor(name) for name in node.input]
    inputs[:3] = [data, gs.Constant(f"{site.name}/second", factors["second"]), state]
    if "bias" in factors:
        inputs[3:4] = [gs.Constant(f"{site.name}/bias", factors["bias"])]
    outputs = [_tensor(name) for name in node.output]
    attributes = _attributes(node)
    if "chosen" in factors:
        attributes["hidden_size"] = factors["chosen"].shape[1]
        for place in (5, 6, 7):
            if operand(node, place):
                inputs[place] = _narrowed(site, use, nodes, place, factors["chosen"])
    if "widen" in factors:
        nodes += _widening(site, use, outputs, factors)
    nodes.append(gs.Node(site.op, f"{use.node}/cell", attributes, inputs, outputs))
    return Replacement(use.scope, (use.node,), tuple(nodes))


def _narrowed(site: Site, use: Use, nodes: list[gs.Node], place: int, chosen: Array) -> gs.Variable:
    """Of an initial state (D, B, H), or of the peepholes (D, 3 H), what belongs to the chosen units."""
    at = _Nodes(use.node, site.attributes["opset"], nodes)
    given = gs.Variable(operand(site.attributes[use.node], place))
    hidden = site.attributes["hidden"]
    parts = []
    for d, units in enumerate(chosen):
        wanted = np.concatenate([units + hidden * gate for gate in range(3)]) if place == 7 else units
        part = given
        if len(chosen) > 1:
            own = at.constant(f"direction_{d}", np.array([d], np.int64))
            part = at.add("Gather", [given, own], f"input{place}_{d}", axis=0)
        units_of = at.constant(f"{'gates' if place == 7 else 'units'}_{d}", wanted.astype(np.int64))
        parts.append(at.add("Gather", [part, units_of], f"kept{place}_{d}", axis=-1))
    made: gs.Variable = parts[0] if len(parts) == 1 else at.add("Concat", parts, f"kept{place}", axis=0)
    return made


def _widening(site: Site, use: Use, outputs: list[gs.Tensor], factors: Factors) -> list[gs.Node]:
    """Make every state of the first outputs again; the cell then writes others, put into ``outputs``."""
    nodes = []
    names = {role: f"{site.name}/{role}" for role in ("widen", "widen_bias")}
    for place, wanted in enumerate(outputs[:2]):
        if not wanted.name:
            continue
        inner, product = (gs.Variable(f"{use.node}/{name}{place}") for name in ("narrow", "wide"))
        biased = "widen_bias" in factors
        constant = gs.Constant(names["widen"], factors["widen"])
        nodes.append(
            gs.Node(
                "MatMul", f"{use.node}/widen{place}", {}, [inner, constant], [product if biased else outputs[place]]
            )
        )
        if biased:
            added = gs.Constant(names["widen_bias"], factors["widen_bias"])
            nodes.append(gs.Node("Add", f"{use.node}/widen_add{place}", {}, [product, added], [outputs[place]]))
        outputs[place] = inner
    return nodes


def widening(site: Site, behind: Array | None) -> dict[str, Array]:
    """The factors that widen the states of a cell.

    Args:
        behind: (D, k + 1, H), the last row is added; None changes nothing.
    """
    hidden, directions = site.attributes["hidden"], site.attributes["directions"]
    if behind is None:
        behind = np.concatenate([np.eye(hidden), np.zeros((1, hidden))])[None].repeat(directions, axis=0)
    made, bias = behind[:, :-1], behind[:, -1:]
    # Without the axis of the directions onnxruntime takes all steps in one product.
    if directions == 1:
        made, bias = made[0], bias[0, 0]
    return {"widen": store(made, site), "widen_bias": store(bias, site)}


def dense_cell(site: Site, weight: Array, bias: Array | None) -> dict[str, Array]:
    """The factors of a cell that is not factorized.

    Args:
        weight: (D, N, I + H) W and R side by side.
        bias: (D, 2 N) the whole B; None without one.
    """
    inputs = site.attributes["inputs"]
    made = {"second": store(weight[:, :, :inputs], site), "state_second": store(weight[:, :, inputs:], site)}
    return made if bias is None else {**made, "bias": store(bias, site)}


def stored_elements(nodes: Sequence[gs.Node]) -> int:
    """Floating-point elements the nodes store, bodies included; a constant that several of them read once."""
    total = 0
    seen: set[str] = set()
    for node in nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in seen and tensor.values.dtype.kind == "f":
                seen.add(tensor.name)
                total += tensor.values.size
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                total += stored_elements(value.nodes)
            elif isinstance(value, onnx.TensorProto):
                total += math.prod(value.dims)
    return total


def unspoken(site: Site) -> str | None:
    """Return why the cell of a site cannot be spelled out in plain operators; None if it can."""
    for use in site.uses:
        node = site.attributes[use.node]
        cell = read_cell(site, node)
        odd = {name for entry in cell.activations for name in entry} - set(SPELLED)
        scaled = [entry.name for entry in node.attribute if entry.name in ("activation_alpha", "activation_beta")]
        reasons = {
            f"the cell uses {', '.join(sorted(odd))}, which is not spelled out": bool(odd),
            "its activations have parameters": bool(scaled),
            "the cell clips its gates": cell.clip > 0,
            "the input and forget gates are coupled": cell.input_forget,
            "the batch comes first (layout 1)": cell.layout == 1,
            "sequences have lengths of their own": bool(operand(node, 4)),
            "the cell has peepholes": bool(operand(node, 7)),
            "the bias is computed from data": not site.attributes["bias_known"],
            f"a Scan needs operator set {FIRST_OPSET}": site.attributes["opset"] < FIRST_OPSET,
        }
        for reason, holds in reasons.items():
            if holds:
                return reason
    return None


def spelled(site: Site, use: Use, factors: Factors) -> Replacement:
    """The cell in plain operators: once where every sequence is one step long, else as the body of a Scan."""
    return _Spelling(site, use, factors).replacement()


def _tensor(name: str) -> gs.Variable:
    return gs.Variable(name) if name else gs.Variable.empty()


def _attributes(node: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode()
        return [plain(entry) for entry in value] if isinstance(value, list) else value

    return {entry.name: plain(onnx.helper.get_attribute_value(entry)) for entry in node.attribute}


@dataclass
class _Nodes:
    """Nodes in the making, named after one place in the graph."""

    prefix: str
    opset: int
    nodes: list[gs.Node] = field(default_factory=list)

    def add(self, op: str, inputs: Sequence[gs.Tensor], name: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns its output, or all of several."""
        made = [gs.Variable(f"{self.prefix}/{name}{place or ''}") for place in range(outputs)]
        self.nodes.append(gs.Node(op, f"{self.prefix}/{name}", attributes, list(inputs), made))
        return made[0] if outputs == 1 else made

    def constant(self, name: str, value: Array) -> gs.Constant:
        """A constant of this place."""
        return gs.Constant(f"{self.prefix}/{name}", np.asarray(value, order="C"))

    def split(self, value: gs.Tensor, sizes: Sequence[int], name: str) -> list[gs.Variable]:
        """Cut the last axis."""
        if self.opset < _OPERANDS_BY_INPUT:
            made = self.add("Split", [value], name, len(sizes), axis=-1, split=list(sizes))
        else:
            cut = self.constant(f"{name}_sizes", np.array(sizes, np.int64))
            made = self.add("Split", [value, cut], name, len(sizes), axis=-1)
        return list(made)

    def unsqueeze(self, value: gs.Tensor, axis: int, name: str) -> gs.Variable:
        """Add an axis."""
        if self.opset < _OPERANDS_BY_INPUT:
            return self.add("Unsqueeze", [value], name, axes=[axis])
        return self.add("Unsqueeze", [value, self.constant(f"{name}_axis", np.array([axis], np.int64))], name)

    def pick(self, value: gs.Tensor, place: int, axis: int, name: str) -> gs.Variable:
        """One slice of an axis, which goes away."""
        return self.add("Gather", [value, self.constant(f"{name}_place", np.array(place, np.int64))], name, axis=axis)


class _Spelling:
    """One use of a cell, spelled out."""

    def __init__(self, site: Site, use: Use, factors: Factors) -> None:
        self.site, self.use, self.factors = site, use, factors
        self.sizes: Mapping[str, Any] = site.attributes
        self.node = site.attributes[use.node]
        self.cell: Cell = read_cell(site, self.node)
        self.outer = _Nodes(use.node, self.sizes["opset"])
        self.hidden = int(self.sizes["hidden"])
        self.stepwise = bool(self.sizes["single_step"])

    def replacement(self) -> Replacement:
        """Everything, from the input to the three outputs."""
        data = gs.Variable(self.use.input)
        if self.stepwise:
            data = self.outer.pick(data, 0, 0, "step")  # (B, I)
        if "first" in self.factors:
            shared = gs.Constant(f"{self.site.name}/first", self.factors["first"])
            data = self.outer.add("MatMul", [data, shared], "projected")
        parts = [self._direction(d, data) for d in range(len(self.cell.reverse))]
        for place, wanted in enumerate(self.node.output):
            if wanted:
                self._join([part[place] for part in parts], 1 if place == 0 else 0, wanted)
        return Replacement(self.use.scope, (self.use.node,), tuple(self.outer.nodes))

    def _join(self, parts: Sequence[gs.Variable], axis: int, wanted: str) -> None:
        """Put the directions side by side on a new axis, under the name the model knows."""
        name = f"output_{wanted}"
        made = [self.outer.unsqueeze(part, axis, f"{name}_{d}") for d, part in enumerate(parts)]
        if len(made) > 1:
            self.outer.add("Concat", made, name, axis=axis)
        self.outer.nodes[-1].outputs[0] = gs.Variable(wanted)

    def _direction(self, d: int, data: gs.Tensor) -> list[gs.Variable]:
        """Y (T, B, H), the last state (B, H) and, of an LSTM, the last cell state of one direction."""
        outer = self.outer
        second = store(self.factors["second"][d].T, self.site)  # (r, N)
        gates = outer.add("MatMul", [data, outer.constant(f"second_{d}", second)], f"gates_{d}")
        outside, inside = self._biases(d)
        if outside is not None:
            gates = outer.add("Add", [gates, outer.constant(f"bias_{d}", outside)], f"biased_{d}")
        states = [self._start(d, place) for place in ((5, 6) if self.site.op == "LSTM" else (5,))]
        if self.stepwise:
            after = self._step(outer, d, gates, states, inside)
            return [outer.unsqueeze(after[0], 0, f"sequence_{d}"), *after]
        body = _Nodes(f"{self.use.node}/body_{d}", self.sizes["opset"])
        dtype = self.site.weight.dtype
        # With the shapes in the body: inside a branch of an If onnxruntime infers none.
        wide, rows = [None, self.hidden], [None, self.site.weight.shape[1]]
        seen = [gs.Variable(f"{body.prefix}/before{place}", dtype, wide) for place in range(len(states))]
        gate = gs.Variable(f"{body.prefix}/gates", dtype, rows)
        after = self._step(body, d, gate, seen, inside)
        shown = body.add("Identity", [after[0]], "shown")
        for tensor in (*after, shown):
            tensor.dtype, tensor.shape = dtype, wide
        graph = gs.Graph(body.nodes, [*seen, gate], [*after, shown], name=body.prefix, opset=self.sizes["opset"])
        turned = [int(self.cell.reverse[d])]
        *last, every = outer.add(
            "Scan",
            [*states, gates],
            f"scan_{d}",
            len(states) + 1,
            body=graph,
            num_scan_inputs=1,
            scan_input_directions=turned,
            scan_output_directions=turned,
        )
        return [every, *last]

    def _start(self, d: int, place: int) -> gs.Variable:
        """(B, H) a state before the first step."""
        given = operand(self.node, place)
        if given:
            return self.outer.pick(gs.Variable(given), d, 0, f"start{place}_{d}")
        shape = self.outer.add("Shape", [gs.Variable(self.use.input)], f"shape{place}_{d}")
        batch = self.outer.add(
            "Gather", [shape, self.outer.constant(f"batch{place}_{d}_place", np.array([1], np.int64))], f"b{place}_{d}"
        )
        width = self.outer.constant(f"width{place}_{d}", np.array([self.hidden], np.int64))
        whole = self.outer.add("Concat", [batch, width], f"zeros{place}_{d}_shape", axis=0)
        zero = onnx.numpy_helper.from_array(np.zeros(1, self.site.weight.dtype))
        made: gs.Variable = self.outer.add("ConstantOfShape", [whole], f"zeros{place}_{d}", value=zero)
        return made

    def _biases(self, d: int) -> tuple[Array | None, Array | None]:
        """What is added to the gates for all steps at once, and what a GRU adds behind R, inside its reset."""
        if "bias" not in self.factors:
            return None, None
        own, state = np.split(self.factors["bias"][d], 2)
        if self.site.op == "GRU" and self.cell.linear_before_reset:
            kept = 2 * self.hidden
            return np.concatenate([own[:kept] + state[:kept], own[kept:]]), state[kept:]
        return own + state, None

    def _recur(self, at: _Nodes, d: int, state: gs.Tensor, rows: slice, name: str) -> gs.Variable:
        """R h of some rows."""
        second = store(self.factors["state_second"][d][rows].T, self.site)  # (s, rows)
        if "state_first" in self.factors:
            first = store(self.factors["state_first"][d].T, self.site)  # (H, s)
            state = at.add("MatMul", [state, at.constant(f"{name}_first_{d}", first)], f"{name}_thin_{d}")
        made: gs.Variable = at.add("MatMul", [state, at.constant(f"{name}_second_{d}", second)], f"{name}_{d}")
        return made

    def _step(
        self, at: _Nodes, d: int, gates: gs.Tensor, states: Sequence[gs.Tensor], inside: Array | None
    ) -> list[gs.Variable]:
        """One step: the states after it."""
        act = [SPELLED[name] for name in self.cell.activations[d]]
        if self.site.op == "LSTM":
            return self._lstm(at, d, gates, states, act)
        if self.site.op == "GRU":
            return [self._gru(at, d, gates, states[0], inside, act)]
        total = at.add("Add", [gates, self._recur(at, d, states[0], slice(None), "state")], f"total_{d}")
        return [at.add(act[0], [total], f"after_{d}")]

    def _lstm(
        self, at: _Nodes, d: int, gates: gs.Tensor, states: Sequence[gs.Tensor], act: Sequence[str]
    ) -> list[gs.Variable]:
        h = self.hidden
        total = at.add("Add", [gates, self._recur(at, d, states[0], slice(None), "state")], f"total_{d}")
        three, value = at.split(total, [3 * h, h], f"parts_{d}")
        i, o, f = at.split(at.add(act[0], [three], f"open_{d}"), [h, h, h], f"gate_{d}")
        new = at.add("Mul", [i, at.add(act[1], [value], f"value_{d}")], f"new_{d}")
        cell = at.add("Add", [at.add("Mul", [f, states[1]], f"kept_{d}"), new], f"cell_{d}")
        return [at.add("Mul", [o, at.add(act[2], [cell], f"shown_{d}")], f"after_{d}"), cell]

    def _gru(
        self, at: _Nodes, d: int, gates: gs.Tensor, state: gs.Tensor, inside: Array | None, act: Sequence[str]
    ) -> gs.Variable:
        h = self.hidden
        two, value = at.split(gates, [2 * h, h], f"parts_{d}")
        if self.cell.linear_before_reset:
            both, recurred = at.split(self._recur(at, d, state, slice(None), "state"), [2 * h, h], f"states_{d}")
            if inside is not None:
                recurred = at.add("Add", [recurred, at.constant(f"inside_{d}", inside)], f"inside_biased_{d}")
        else:
            both = self._recur(at, d, state, slice(0, 2 * h), "state")
        z, r = at.split(at.add(act[0], [at.add("Add", [two, both], f"total_{d}")], f"open_{d}"), [h, h], f"gate_{d}")
        if self.cell.linear_before_reset:
            recurred = at.add("Mul", [r, recurred], f"reset_{d}")
        else:
            recurred = self._recur(at, d, at.add("Mul", [r, state], f"reset_{d}"), slice(2 * h, None), "inner")
        new = at.add(act[1], [at.add("Add", [value, recurred], f"sum_{d}")], f"new_{d}")
        moved = at.add("Mul", [z, at.add("Sub", [state, new], f"apart_{d}")], f"kept_{d}")
        made: gs.Variable = at.add("Add", [new, moved], f"after_{d}")
        return made
