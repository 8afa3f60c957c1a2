"""Compound sites of kind ``attention``: the two halves of an attention block, whose heads can be made narrower.

    scores = (x Q + q) (x' K + k)ᵀ · scale   per head        half ``scores``: the layers query and key
    y = (softmax(scores + mask) (x' V + v)) O + o             half ``values``: the layers value and output

Both are found from their product on, by what the nodes do and never by their names. A head's width occurs in
no other place than these weights, the shapes that split and join the heads, and the scale.
The weight is that of the query (K, H · d) or of the output (H · d, N).

Attributes of a site:
    half: ``scores`` or ``values``; ``whole`` where one node wants both at one width (see ``_Look.whole``);
        ``matrix`` is what lies between them, without a layer (see ``_Look.matrix``).
    parts: The single sites, (query, key) or (value, output).
    heads: H, of the queries.
    groups: Heads of the keys, or of the values; each serves H / groups heads of the queries.
    width: d, of one head.
    resizes: Reshapes whose target holds a width that changes.
    scales: Constant factors between the projections and the softmax; of ``scores`` only.
    usual: Whether the scale is ``1 / sqrt(d)``, written down or understood.
    between: Tensors that stay and change their shape.
    region: Names of the tensors that go in, and of the one that comes out behind the last node that changes.
    tables: Products with the cosines and sines of rotary positions, or the node that holds those: columns are chosen,
        never mixed.
    caches: Inputs and outputs of the model that hold keys or values and change their width with the heads.
    refusal: Why the half has to stay as it is; empty if it need not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from onnx import NodeProto

from lowrank_onnx.base import Site, Use
from lowrank_onnx.model import Model, Scope
from lowrank_onnx.shapes import Shapes, shape_of
from lowrank_onnx.sites.attention_nodes import (
    FUSED,
    PAST_AT,
    Turned,
    fused_heads,
    key_heads,
    keys_seen,
    not_taken,
    turned_inside,
)
from lowrank_onnx.sites.shared_input import is_plain
from lowrank_onnx.sites.weights import attribute, attribute_list
from lowrank_onnx.sites.widths import Widths

_PASSES_ON = frozenset(["Identity", "Cast", "Dropout"])
# What may stand between the scores and the softmax: it never sees a head's width.
_POINTWISE = _PASSES_ON | {"Add", "Sub", "Mul", "Div", "Where", "Max", "Min", "Clip"}
_SPLIT = (0, 2, 1, 3)  # (batch, position, head, width) -> (batch, head, position, width)
_SPLIT_TURNED = (0, 2, 3, 1)
_AS_USUAL = 1e-3


@dataclass(frozen=True, eq=False)
class Resize:
    """A Reshape, or Expand, whose target names a width.

    Attributes:
        node, input, output: Its name and tensors.
        allowzero: Its attribute.
        pieces: What its target is put together from: numbers, or names of tensors.
        piece, entry: Where among them the width stands; piece -1: nowhere.
        unit: What one column of every head adds to that number: 1, or all heads.
    """

    node: str
    input: str
    output: str
    allowzero: int
    pieces: tuple[str | tuple[int, ...], ...]
    piece: int
    entry: int
    unit: int
    op: str = "Reshape"


@dataclass(frozen=True, eq=False)
class Scale:
    """A product with, or quotient by, one constant number.

    Attributes:
        node, op, input, output: Its name, ``Mul`` or ``Div``, and tensors.
        value: The constant as it is stored.
    """

    node: str
    op: str
    input: str
    output: str
    value: np.ndarray

    @property
    def factor(self) -> float:
        """What the input is multiplied by."""
        number = float(self.value.reshape(-1)[0])
        return number if self.op == "Mul" else 1 / number


@dataclass(frozen=True, eq=False)
class Table:
    """A product with the cosines or sines of rotary positions.

    Attributes:
        node, input, output: Its name, what is turned, and what comes out.
        table: The tensor with the cosines or sines, d columns.
        interleaved: Whether columns (2 i, 2 i + 1) are turned together, instead of (i, i + d / 2).
    """

    node: str
    input: str
    output: str
    table: str
    interleaved: bool


@dataclass(frozen=True, eq=False)
class Cache:
    """An input of the model with past keys or values, or the output with the longer past: axis of the width."""

    name: str
    axis: int


@dataclass(frozen=True, eq=False)
class _Branch:
    """The way from a linear layer to its heads.

    ``shared``: heads of the queries that each of them serves; ``computed``: factors that are no constants.
    """

    site: Site
    heads: int
    width: int
    resizes: tuple[Resize, ...]
    scales: tuple[Scale, ...]
    between: tuple[str, ...]
    shared: int = 1
    tables: tuple[Table, ...] = ()
    caches: tuple[Cache, ...] = ()
    computed: tuple[str, ...] = ()
    axes: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Swap:
    """What the sines are multiplied with: both columns of every pair in the other's place, one negated.

    Attributes:
        back, front: The Slices, of the columns that are negated and of the others.
        nodes: Every node on the way, the last first.
        interleaved: See Table.
        resizes: How the shape follows the width where the pairs are put side by side again.
    """

    back: NodeProto
    front: NodeProto
    nodes: tuple[NodeProto, ...]
    interleaved: bool
    resizes: tuple[Resize, ...]


@dataclass
class _Way:
    """What was met so far on the way back from a product to a layer.

    Attributes:
        order: Where the axes have to end up.
        turned: Where they end up from here.
        axes: By tensor: its rank, and the axis of the width.
        shared: Heads that one head was repeated for.
    """

    order: tuple[int, ...]
    turned: tuple[int, ...] = (0, 1, 2, 3)
    axes: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: int = 1
    resizes: list[Resize] = field(default_factory=list)
    scales: list[Scale] = field(default_factory=list)
    computed: list[str] = field(default_factory=list)
    between: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)

    def place(self, axis: int) -> int:
        """Where batch, head, position or width (0 to 3) lies here."""
        final = {0: 0, 1: 1, 2: 2, 3: 3} if self.order == _SPLIT else {0: 0, 1: 1, 2: 3, 3: 2}
        return self.turned[final[axis]]

    @property
    def straight(self) -> bool:
        """Whether the axes are batch, head, position, width here."""
        return all(self.place(axis) == axis for axis in range(4))


def find(model: Model, shapes: Shapes, singles: Sequence[Site], allow_io_change: bool = False) -> list[Site]:
    """Return the halves of every attention block that is understood.

    Args:
        allow_io_change: Whether the width of a cache, which is an input of the model, may change.
    """
    return _found(model, shapes, singles, allow_io_change)[0]


def find_matrices(model: Model, shapes: Shapes) -> list[Site]:
    """Return what lies between the heads of every block that is spelled out: half ``matrix``."""
    sites = []
    for scope in model.scopes:
        look = _Look(model, shapes, scope, {}, {}, False)
        products = [node for node in scope.graph.node if node.op_type == "MatMul" and look.is_attention(node, "values")]
        sites += [site for site in map(look.matrix, products) if site is not None]
    return sites


def left_alone(model: Model, shapes: Shapes, singles: Sequence[Site], allow_io_change: bool = False) -> list[str]:
    """Tell of every half that is left alone, and why."""
    sites, notes = _found(model, shapes, singles, allow_io_change)
    held = [f"heads of '{site.name}' are left alone: {site.attributes['refusal']}" for site in sites]
    return [
        *notes,
        *(
            note
            for note, site in zip(held, sites, strict=True)
            if site.attributes["caches"] and site.attributes["refusal"]
        ),
    ]


def _found(
    model: Model, shapes: Shapes, singles: Sequence[Site], allow_io_change: bool
) -> tuple[list[Site], list[str]]:
    made = {(site.uses[0].scope, site.uses[0].output): site for site in singles if is_plain(site)}
    read = {(site.uses[0].scope, site.uses[0].input): site for site in singles if is_plain(site)}
    sites, notes = [], []
    for scope in model.scopes:
        look = _Look(model, shapes, scope, made, read, allow_io_change)
        for node in scope.graph.node:
            if node.op_type == "MatMul" and node.domain in ("", "ai.onnx"):
                for half, found in (("queries and keys", look.scores(node)), ("values", look.values(node))):
                    if found is not None:
                        sites.append(found)
                    elif look.is_attention(node, half):
                        notes.append(f"{half} of '{node.name}' are left alone: not understood at {look.stuck}")
            elif fused_heads(node) is not None:
                found_here = look.whole(node) if node.op_type == "GroupQueryAttention" else look.fused(node)
                sites += found_here
                if not found_here:
                    notes.append(
                        f"heads of {node.op_type} '{node.name}' are left alone: the layers around it, or what "
                        "becomes of its cache, are not understood"
                    )
            elif node.op_type in FUSED:
                notes.append(f"heads of {node.op_type} '{node.name}' are left alone: {not_taken(node)}")
    return sites, notes


class _Look:
    """One graph, looked at from its products."""

    def __init__(
        self,
        model: Model,
        shapes: Shapes,
        scope: Scope,
        made: Mapping[tuple[str, str], Site],
        read: Mapping[tuple[str, str], Site],
        allow_io_change: bool,
    ) -> None:
        self.allow_io_change = allow_io_change
        self.stuck = ""  # the node that was not understood last
        self.inputs = {value.name for value in scope.graph.input} - set(scope.initializers)
        self.model, self.shapes, self.scope, self.made, self.read = model, shapes, scope, made, read
        self.outputs = {value.name for value in scope.graph.output}

    def before_softmax(self, name: str) -> bool:
        """Whether a softmax over the last axis follows, with nothing but elementwise nodes in between."""
        seen, queue = {name}, [name]
        while queue:
            for reader in self.scope.readers.get(queue.pop(), ()):
                node = reader.node
                if node.op_type == "Softmax":
                    axis = int(attribute(node, "axis", -1 if self.model.opset >= 13 else 1))
                    return axis in (-1, 3)
                if node.op_type in _POINTWISE and node.output[0] not in seen:
                    seen.add(node.output[0])
                    queue.append(node.output[0])
        return False

    def is_attention(self, product: NodeProto, half: str) -> bool:
        """Whether a product of two tensors that depend on data goes into a softmax, or reads one."""
        if any(self.model.constant(self.scope, name) is not None for name in product.input):
            return False
        if half != "values":
            return self.before_softmax(product.output[0])
        before = self.scope.producers.get(product.input[0])
        return before is not None and before.op_type == "Softmax"

    def scores(self, product: NodeProto) -> Site | None:
        """The layers query and key of ``product = queries @ keysᵀ``."""
        query, key = (
            self.branch(name, turned) for name, turned in zip(product.input, (_SPLIT, _SPLIT_TURNED), strict=True)
        )
        if query is None or key is None or query.site is key.site:
            return None
        if query.heads != key.heads * key.shared or query.width != key.width or query.caches or query.shared > 1:
            return None
        turned = [{table.interleaved for table in branch.tables} for branch in (query, key)]
        if not self.before_softmax(product.output[0]) or turned[0] != turned[1]:
            return None
        behind = self.scales_behind(product.output[0])
        computed = bool(query.computed or key.computed)
        if computed and (query.scales or key.scales or behind or not self.is_usual(query, key)):
            return None
        parts = (query.site, key.site)
        scales = (*query.scales, *key.scales, *behind)
        last = behind[-1].output if behind else product.output[0]
        return _half(
            "scores",
            parts,
            query,
            _work(parts, shape_of(self.shapes, self.scope, product.output[0]), query.width),
            resizes=(*query.resizes, *key.resizes),
            scales=scales,
            usual=computed or _is_usual(scales, query.width),
            between=(*query.between, *key.between),
            region=((query.site.uses[0].input, key.site.uses[0].input), last),
            groups=key.heads,
            tables=(*query.tables, *key.tables),
            caches=key.caches,
            refusal=self.refusal(key.caches),
        )

    def is_number(self, name: str) -> bool:
        """Whether a tensor is computed from shapes alone, as far as can be told."""
        node = self.scope.producers.get(name)
        while node is not None and node.op_type in ("Cast", "Sqrt", "Div", "Reciprocal", "Identity"):
            data = [entry for entry in node.input if self.model.constant(self.scope, entry) is None]
            node = self.scope.producers.get(data[0]) if len(data) == 1 else None
        return node is not None and node.op_type in ("Slice", "Gather")

    def is_usual(self, query: _Branch, key: _Branch) -> bool:
        """Whether the computed factors are ``1 / sqrt(width)`` together, whatever the width is."""
        widths = Widths(self.model, self.scope, {**query.axes, **key.axes})
        for tried in (query.width, query.width + 2, 2 * query.width):
            factors = [widths.at(name, tried) for name in (*query.computed, *key.computed)]
            if any(factor is None or factor.size != 1 for factor in factors):
                return False
            total = math.prod(float(factor[0]) for factor in factors if factor is not None)
            if not abs(total * math.sqrt(tried) - 1) < _AS_USUAL:
                return False
        return True

    def refusal(self, caches: Sequence[Cache]) -> str:
        """Why caches hold a half back."""
        if not caches or self.allow_io_change:
            return ""
        return f"input '{caches[0].name}' would change its width with the heads; allow it with --allow-io-change"

    def values(self, context: NodeProto) -> Site | None:
        """The layers value and output around ``context = attention @ values``, wherever the attention is from."""
        value = self.branch(context.input[1], _SPLIT)
        if value is None or value.scales or value.tables or value.computed:
            return None
        joined = self.joined(context.output[0], value)
        if joined is None:
            return None
        out, resizes, between = joined
        parts = (value.site, out)
        if value.site is out:
            return None
        return _half(
            "values",
            parts,
            value,
            _work(parts, shape_of(self.shapes, self.scope, context.input[0]), value.width),
            resizes=(*value.resizes, *resizes),
            scales=(),
            usual=False,
            between=(*value.between, *between),
            region=((value.site.uses[0].input, context.input[0]), out.uses[0].output),
            groups=value.heads,
            caches=value.caches,
            refusal=self.refusal(value.caches),
        )

    def matrix(self, context: NodeProto) -> Site | None:
        """What lies between queries, keys and values and ``context``: scores, scale and softmax, no weight."""
        before = self.scope.producers.get(context.input[0])
        nodes, factor, masked = [context.name], 1.0, ""
        name = context.input[0]
        while before is not None and before.op_type != "MatMul":
            alone = self.read_once(name)
            if not alone or before.op_type not in _POINTWISE | {"Softmax"}:
                return None
            nodes.append(before.name)
            scale = self.scale(before) if before.op_type in ("Mul", "Div") else None
            factor *= 1.0 if scale is None else scale.factor
            plain = before.op_type in _PASSES_ON or before.op_type == "Softmax" or scale is not None
            masked = masked or ("" if plain else f"{before.op_type} '{before.name}'")
            # Of a mask and the scores, the scores come from a product.
            sources = [entry for entry in before.input if entry and self.model.constant(self.scope, entry) is None]
            name = next((entry for entry in sources if self.is_scores(entry)), "")
            before = self.scope.producers.get(name)
        softmax = [entry for entry in nodes if self.op_of(entry) == "Softmax"]
        if before is None or len(softmax) != 1:
            return None
        shapes = [shape_of(self.shapes, self.scope, entry) for entry in (*before.input, context.input[1])]
        scores = shape_of(self.shapes, self.scope, before.output[0])
        if not self.read_once(before.output[0]) or scores is None or len(scores) != 4 or None in shapes:
            return None
        query, _, value = (shape for shape in shapes if shape is not None)
        if len(query) != 4 or len(value) != 4 or not self.before_softmax(before.output[0]):
            return None
        names = (*before.input, context.input[1])
        use = Use(context.name, tuple(nodes[1:]), self.scope.path, names[0], context.output[0], context.output[0])
        name = f"{before.name}~{context.name}"
        return Site(
            name=name,
            kind="attention",
            op="MatMul",
            shape=scores,
            weight=np.zeros((0, 0), np.float32),
            uses=(use,),
            parameters=0,
            freed=0,
            macs=math.prod(scores) * (query[-1] + value[-1]),
            attributes={
                "half": "matrix",
                "nodes": (*nodes, before.name),
                "scale": factor,
                "masked": masked,
                "scores": scores,
                "lengths": (scores[2], scores[3]),
                "widths": (query[-1], value[-1]),
                "region": (names, context.output[0]),
                "opset": self.model.opset,
                "dtype": np.dtype(np.float32),
                "caches": (),
                "refusal": "it has no layers; the halves beside it do",
                "parts": (),
            },
            parts=(name,),  # itself: it is no layer to list
        )

    def is_scores(self, name: str) -> bool:
        """Whether a tensor is a product of two that depend on data, with nothing but elementwise nodes behind."""
        node = self.scope.producers.get(name)
        if node is None:
            return False
        if node.op_type == "MatMul":
            return all(self.model.constant(self.scope, entry) is None for entry in node.input)
        return node.op_type in _POINTWISE and any(self.is_scores(entry) for entry in node.input if entry)

    def op_of(self, name: str) -> str:
        """The operator of a node of this graph."""
        return next(str(node.op_type) for node in self.scope.graph.node if node.name == name)

    def fused(self, node: NodeProto) -> list[Site]:
        """The halves around one node that holds the whole block but its layers."""
        heads = fused_heads(node) or 0
        groups = key_heads(node)
        query = self.source(node.input[0], heads)
        key, value = (self.source(name, groups) for name in node.input[1:3])
        caches = self.held_in(node)
        if caches is None:
            return []
        asked = shape_of(self.shapes, self.scope, node.input[0])
        keys = keys_seen(node, lambda name: shape_of(self.shapes, self.scope, name))
        scores = None if asked is None or keys is None or len(asked) < 3 else (asked[0], heads, asked[-2], keys)
        found = []
        if query is not None and key is not None and query.site is not key.site and query.width == key.width:
            parts = (query.site, key.site)
            scales = (*query.scales, *key.scales)
            given = any(entry.name == "scale" and entry.f for entry in node.attribute)
            site = _half(
                "scores",
                parts,
                query,
                _work(parts, scores, query.width),
                resizes=(*query.resizes, *key.resizes),
                scales=scales,
                usual=not given and not scales,
                between=(*query.between, *key.between),
                region=((query.site.uses[0].input, key.site.uses[0].input, node.input[2]), node.output[0]),
                groups=groups,
                caches=caches[0],
                refusal=self.refusal(caches[0]),
            )
            found.append(site)
        flat = (self.scope.path, node.input[2]) in self.made
        value = None if value is None else replace(value, shared=heads // groups)
        joined = None if value is None or value.scales else self.joined(node.output[0], value, flat)
        if value is None or joined is None or joined[0] is value.site:
            return found
        last, resizes, between = joined
        site = _half(
            "values",
            (value.site, last),
            value,
            _work((value.site, last), scores, value.width),
            resizes=(*value.resizes, *resizes),
            scales=(),
            usual=False,
            between=(*value.between, *between),
            region=((value.site.uses[0].input, *node.input[:2]), last.uses[0].output),
            groups=groups,
            caches=caches[1],
            refusal=self.refusal(caches[1]),
        )
        return [*found, site]

    def whole(self, node: NodeProto) -> list[Site]:
        """Both halves around a node that wants queries, keys and values of one width; none if one is not understood."""
        halves = self.fused(node)
        if len(halves) != 2 or halves[0].attributes["width"] != halves[1].attributes["width"]:
            return []
        tables: tuple[Turned, ...] = ()
        if attribute(node, "do_rotary", 0):
            turned = turned_inside(node)
            if self.columns(turned.cosines) != self.columns(turned.sines):
                return []
            if self.columns(turned.cosines) != halves[0].attributes["width"] // 2:  # the others stay as they are
                return []
            tables = (turned,)
            halves[0] = replace(halves[0], attributes={**halves[0].attributes, "tables": tables})
        scores, values = halves
        parts = (*scores.attributes["parts"], *values.attributes["parts"])
        caches = (*scores.attributes["caches"], *values.attributes["caches"])
        return [
            replace(
                values,
                name=f"{parts[0].name}~{parts[3].name}",
                uses=(*scores.uses, *values.uses),
                parameters=sum(part.parameters for part in parts),
                freed=sum(part.freed for part in parts),
                macs=None if scores.macs is None or values.macs is None else scores.macs + values.macs,
                attributes={
                    **values.attributes,
                    "half": "whole",
                    "halves": (scores, values),
                    "parts": parts,
                    "step": 16 if tables else 8,
                    "between": (*scores.attributes["between"], *values.attributes["between"]),
                    "region": (tuple({part.uses[0].input: None for part in parts[:3]}), parts[3].uses[0].output),
                    "tables": tables,
                    "caches": caches,
                    "refusal": self.refusal(caches),
                },
                parts=tuple(part.name for part in parts),
            )
        ]

    def held_in(self, node: NodeProto) -> tuple[tuple[Cache, ...], tuple[Cache, ...]] | None:
        """The caches of keys and of values of a fused node; None where they are no input and output of the model."""
        found: list[tuple[Cache, ...]] = []
        for slot, place in zip(PAST_AT[node.op_type], (1, 2), strict=True):
            past = node.input[slot] if slot < len(node.input) else ""
            present = node.output[place] if place < len(node.output) else ""
            if past and (past not in self.inputs or not self.only(past, {node.name}) or present not in self.outputs):
                return None
            if any(entry.node.op_type != "Shape" for entry in self.scope.readers.get(present, ()) if present):
                return None
            names = [name for name in (past, present) if name in self.inputs or name in self.outputs]
            found.append(tuple(Cache(name, 3) for name in names))
        return found[0], found[1]

    def source(self, name: str, heads: int) -> _Branch | None:
        """The layer whose output a fused node reads: as it is, or split into heads."""
        site = self.made.get((self.scope.path, name))
        if site is None:
            branch = self.branch(name, _SPLIT)
            return branch if branch is not None and branch.heads == heads else None
        width = site.weight.shape[1] // heads
        if not self.read_once(name) or site.uses[0].dynamic_bias or width * heads != site.weight.shape[1] or width < 2:
            return None
        return _Branch(site, heads, width, (), (), (name, site.uses[0].raw_output))

    def branch(self, name: str, order: tuple[int, ...]) -> _Branch | None:
        """Go back from heads to the layer that makes them, if the axes end up in ``order``."""
        way = _Way(order)
        met: set[str] = set()  # nodes that were understood
        while True:
            node = self.scope.producers.get(name)
            self.stuck = f"'{name}'" if node is None else f"{node.op_type} '{node.name}'"
            if node is None:
                return None
            way.axes[name] = (4, way.place(3))
            if node.op_type == "Concat" and self.is_cache(node, way):
                past, name = node.input
                way.caches += [Cache(past, way.place(3)), Cache(node.output[0], way.place(3))]
                way.axes[past] = (4, way.place(3))
                if not self.only(node.output[0], met, stays=True) or not self.only(past, {node.name}):
                    return None
                met = {node.name}
                way.between.append(node.output[0])
                continue
            if not self.only(name, met):
                return None
            met = {node.name}
            way.between.append(name)
            if node.op_type == "Transpose":
                permutation = attribute_list(node, "perm")
                if len(permutation) != 4:
                    return None
                way.turned = tuple(permutation[axis] for axis in way.turned)
            elif node.op_type in ("Mul", "Div"):
                scale = self.scale(node)
                if scale is not None:
                    way.scales.append(scale)
                    name = scale.input
                    continue
                if node.op_type == "Div" or not self.is_number(node.input[1]):
                    return None
                way.computed.append(node.input[1])
            elif node.op_type == "Add":
                turned = self.rotated(node, way)
                if turned is None:
                    return None
                name, met = turned
                continue
            elif node.op_type == "Reshape" and (repeated := self.repeated(node, way)) is not None:
                name, met = repeated
                continue
            elif node.op_type == "Reshape" and (flattened := self.flattened(node, way)) is not None:
                name, met = flattened
                continue
            elif node.op_type == "Reshape":
                return self.split(node, way) if way.turned == order else None
            elif node.op_type not in _PASSES_ON:
                return None
            name = node.input[0]

    def is_cache(self, node: NodeProto, way: _Way) -> bool:
        """Whether a Concat puts the past, an input of the model, in front along the positions."""
        axis = int(attribute(node, "axis", 0)) % 4
        return len(node.input) == 2 and axis == way.place(2) and node.input[0] in self.inputs

    def only(self, name: str, known: set[str], stays: bool = False) -> bool:
        """Whether nobody reads a tensor but known nodes, one at most where none is named, and those that ask its shape.

        ``stays``: it may be an output of the model.
        """
        readers = [entry for entry in self.scope.readers.get(name, ()) if not self.asks(entry.node)]
        here = all(entry.scope is self.scope for entry in readers)
        others = {entry.node.name for entry in readers} - known
        return here and (not others or (not known and len(readers) == 1)) and (stays or name not in self.outputs)

    def asks(self, node: NodeProto) -> bool:
        """Whether a node reads nothing of a tensor but its shape."""
        if node.op_type == "Shape":
            return True
        readers = self.scope.readers.get(node.output[0], [])
        turned = node.op_type == "Transpose" and node.output[0] not in self.outputs
        return turned and bool(readers) and all(entry.node.op_type == "Shape" for entry in readers)

    def repeated(self, node: NodeProto, way: _Way) -> tuple[str, set[str]] | None:
        """Read (batch, group, 1, position, width) spread over heads and joined again; where it comes from."""
        spread = self.scope.producers.get(node.input[0])
        if spread is None or spread.op_type != "Expand" or not way.straight:
            return None
        inner = self.scope.producers.get(spread.input[0])
        if inner is None or inner.op_type != "Unsqueeze" or not self.only(inner.output[0], {spread.name}):
            return None
        axes = attribute_list(inner, "axes") if self.model.opset < 13 else self.numbers(inner.input[1])
        shapes = [shape_of(self.shapes, self.scope, name) for name in (spread.output[0], node.output[0])]
        if axes != (2,) or not self.only(spread.output[0], {node.name}):
            return None
        if shapes[0] is None or shapes[1] is None or len(shapes[0]) != 5 or len(shapes[1]) != 4:
            return None
        batch, groups, shared, length, width = shapes[0]
        if shapes[1] != (batch, groups * shared, length, width):
            return None
        way.axes |= {spread.output[0]: (5, 4), inner.output[0]: (5, 4), inner.input[0]: (4, 3)}
        # Said without the width, or the batch and the positions, which may be open.
        spelled = (((1, 1, shared, 1, 1), -1, spread), ((0, groups * shared, -1, width), 0, node))
        way.resizes += [
            Resize(entry.name, entry.input[0], entry.output[0], 0, (target,), piece, 3, 1, entry.op_type)
            for target, piece, entry in spelled
        ]
        way.shared *= shared
        way.between += [spread.output[0], inner.output[0]]
        return inner.input[0], {inner.name}

    def flattened(self, node: NodeProto, way: _Way) -> tuple[str, set[str]] | None:
        """Read heads whose last axes are exchanged while batch and head are one axis; where it comes from.

        Both Reshapes have to follow the width by themselves: they ask its tensor for the shape.
        """
        turn = self.scope.producers.get(node.input[0])
        if turn is None or turn.op_type != "Transpose" or attribute_list(turn, "perm") != (0, 2, 1):
            return None
        flat = self.scope.producers.get(turn.input[0])
        if flat is None or flat.op_type != "Reshape" or not all(map(self.read_once, (turn.output[0], turn.input[0]))):
            return None
        name = flat.input[0]
        shapes = [shape_of(self.shapes, self.scope, entry) for entry in (name, flat.output[0], node.output[0])]
        if shapes[0] is None or len(shapes[0]) != 4:
            return None
        batch, heads, rows, columns = shapes[0]
        if shapes[1] != (batch * heads, rows, columns) or shapes[2] != (batch, heads, columns, rows):
            return None
        turned = tuple((0, 1, 3, 2)[axis] for axis in way.turned)
        axis = replace(way, turned=turned).place(3)
        widths = Widths(self.model, self.scope, {name: (4, axis)})
        for target, place in ((flat, axis - 1), (node, 5 - axis)):
            for tried in (shapes[0][axis], 2 * shapes[0][axis]):
                asked = widths.at(target.input[1], tried)
                if asked is None or asked[place] != tried:
                    return None
        way.turned = turned
        way.between += [turn.output[0], flat.output[0]]
        return name, {flat.name}

    def numbers(self, name: str) -> tuple[int, ...]:
        """The whole numbers of a constant; none of anything else."""
        stored = self.model.constant(self.scope, name)
        return () if stored is None else tuple(int(entry) for entry in stored.value.reshape(-1))

    def rotated(self, node: NodeProto, way: _Way) -> tuple[str, set[str]] | None:
        """Read ``x * cos + swapped(x) * sin``; where x comes from."""
        products = [self.scope.producers.get(name) for name in node.input]
        if way.tables or way.place(3) != 3 or any(entry is None or entry.op_type != "Mul" for entry in products):
            return None
        pairs = [entry for entry in products if entry is not None]
        for first, second in (pairs, reversed(pairs)):
            for place in (0, 1):
                swap = self.swapped(second.input[place])
                if swap is None or swap.front.input[0] not in first.input:
                    continue
                x = swap.front.input[0]
                if not all(self.only(entry.output[0], set()) for entry in (*swap.nodes, first, second)):
                    continue
                way.axes[x] = (4, 3)
                tables = (first.input[1 - list(first.input).index(x)], second.input[1 - place])
                width = self.columns(tables[0])
                if width is None or width != self.columns(tables[1]) or not self.halves(swap, way, width):
                    continue
                way.tables = [
                    Table(first.name, x, first.output[0], tables[0], swap.interleaved),
                    Table(second.name, second.input[place], second.output[0], tables[1], swap.interleaved),
                ]
                way.resizes += swap.resizes
                way.between += [entry.output[0] for entry in (*swap.nodes, first, second)]
                return x, {first.name, swap.back.name, swap.front.name}
        return None

    def swapped(self, name: str) -> _Swap | None:
        """Read ``concat(-x[half:], x[:half])``, or of pairs ``stack(-x[1::2], x[::2])`` with the last axes joined."""
        last = self.scope.producers.get(name)
        interleaved = last is not None and last.op_type == "Reshape"
        joined = self.scope.producers.get(last.input[0]) if interleaved and last is not None else last
        if last is None or joined is None or joined.op_type != "Concat" or len(joined.input) != 2:
            return None
        rank = 5 if interleaved else 4
        if int(attribute(joined, "axis", 0)) % rank != rank - 1:
            return None
        nodes, parts = [last, joined], [self.scope.producers.get(source) for source in joined.input]
        if interleaved:
            lifted = [part for part in parts if part is not None and self.is_lifted(part)]
            nodes, parts = nodes + lifted, [self.scope.producers.get(part.input[0]) for part in lifted]
        resizes = self.joined_pairs(last) if interleaved else ()
        if len(parts) != 2 or parts[0] is None or parts[0].op_type != "Neg" or resizes is None:
            return None
        back, front = self.scope.producers.get(parts[0].input[0]), parts[1]
        if (
            back is None
            or front is None
            or {back.op_type, front.op_type} != {"Slice"}
            or back.input[0] != front.input[0]
        ):
            return None
        return _Swap(back, front, (*nodes, parts[0], back, front), interleaved, resizes)

    def is_lifted(self, node: NodeProto) -> bool:
        """Whether an Unsqueeze puts an axis of one behind the four there are."""
        if node.op_type != "Unsqueeze":
            return False
        axes = attribute_list(node, "axes") if self.model.opset < 13 else self.numbers(node.input[1])
        return axes in ((-1,), (4,))

    def joined_pairs(self, node: NodeProto) -> tuple[Resize, ...] | None:
        """How the Reshape follows the width that makes (..., d) of (..., d / 2, 2); None for any other."""
        made = shape_of(self.shapes, self.scope, node.output[0])
        pieces = self.pieces(node.input[1])
        if made is None or len(made) != 4 or pieces is None:
            return None
        if shape_of(self.shapes, self.scope, node.input[0]) != (*made[:3], made[3] // 2, 2):
            return None
        return _resize(node, pieces, made[3], 1)

    def halves(self, swap: _Swap, way: _Way, width: int) -> bool:
        """Whether two Slices of the last axis take one half of the columns each, whatever the width is."""
        widths = Widths(self.model, self.scope, way.axes)
        for tried in (width, width - 2, 2 * width):
            parts = [[widths.at(name, tried) for name in node.input[1:]] for node in (swap.back, swap.front)]
            if any(entry is None or len(entry) != 1 for part in parts for entry in part) or len(parts[0]) < 3:
                return False
            (start, end, *axes), (first, stop, *same) = ([float(entry[0]) for entry in part if entry is not None]
                                                         for part in parts)  # fmt: skip
            step = 2 if swap.interleaved else 1
            if any(entry[0] not in (3, -1) or (entry[1:] or [1]) != [step] for entry in (axes, same)):
                return False
            if swap.interleaved:
                known = (start, first) == (1, 0) and stop >= tried - 1
            else:
                known = (start, first, stop) == (tried // 2, 0, tried // 2)
            if not known or end < tried:
                return False
        return True

    def columns(self, name: str) -> int | None:
        """The size of the last axis of a table; None where that cannot be told."""
        stored = self.model.constant(self.scope, name)
        if stored is not None:
            return int(stored.value.shape[-1]) if stored.value.ndim else 1
        shape = shape_of(self.shapes, self.scope, name)
        if shape is not None:
            return shape[-1] if shape else 1
        node = self.scope.producers.get(name)
        if node is None or not node.input:
            return None
        first = self.columns(node.input[0])
        if node.op_type == "Unsqueeze":
            axes = attribute_list(node, "axes") if self.model.opset < 13 else self.numbers(node.input[1])
            return 1 if -1 in axes else first  # a later axis than the last makes a column of 1 as well
        if node.op_type in ("Cos", "Sin", "Cast", "Identity"):
            return first
        others = [self.columns(source) for source in node.input[1:]]
        if node.op_type == "Mul" and first is not None and others[0] is not None:
            return max(first, others[0])
        if node.op_type == "Concat" and int(attribute(node, "axis", 0)) == -1 and None not in (first, *others):
            return sum(entry for entry in (first, *others) if entry is not None)
        return None

    def split(self, node: NodeProto, way: _Way) -> _Branch | None:
        """Read the Reshape that splits a layer's output into heads."""
        name, flat = node.input[0], []
        while (self.scope.path, name) not in self.made:
            before = self.scope.producers.get(name)
            if before is None or not self.only(name, set()):
                return None
            way.between.append(name)
            if self.is_flat(before):
                flat.append(before)
                name = before.input[0]
                continue
            if before.op_type not in (*_PASSES_ON, "Mul", "Div"):
                return None
            if before.op_type in _PASSES_ON:
                name = before.input[0]
                continue
            scale = self.scale(before)
            if scale is None:
                return None
            way.scales.append(scale)
            name = scale.input
        site = self.made[(self.scope.path, name)]
        pieces = self.pieces(node.input[1])
        shape = shape_of(self.shapes, self.scope, node.output[0])
        if not self.only(name, set()) or pieces is None or site.uses[0].dynamic_bias:
            return None
        total = site.weight.shape[1]
        width, heads = _known(pieces, -1), _known(pieces, -2)
        if shape is not None and len(shape) == 4:
            heads, width = shape[2:]
        elif heads and heads > 0 and width == -1:
            width = total // heads
        if not heads or not width or heads * width != total or width < 2:
            return None
        resize = _resize(node, pieces, width, 1)
        more = [self.resize(entry, total, heads) for entry in flat]
        if resize is None or None in more or any(self.columns(table.table) != width for table in way.tables):
            return None
        inner = (*way.between, name, site.uses[0].raw_output)
        return _Branch(
            site,
            heads,
            width,
            (*way.resizes, *resize, *(one for entry in more for one in entry or ())),
            tuple(way.scales),
            inner,
            way.shared,
            tuple(way.tables),
            tuple(way.caches),
            tuple(way.computed),
            way.axes,
        )

    def is_flat(self, node: NodeProto) -> bool:
        """Whether a Reshape leaves the last axis as it is: rows of a batch, or all rows."""
        if node.op_type != "Reshape":
            return False
        shapes = [shape_of(self.shapes, self.scope, name) for name in (node.input[0], node.output[0])]
        return bool(shapes[0] and shapes[1] and shapes[0][-1] == shapes[1][-1])

    def resize(self, node: NodeProto, number: int, unit: int) -> tuple[Resize, ...] | None:
        """How the target of a Reshape follows the width."""
        pieces = self.pieces(node.input[1])
        if pieces is None:
            return None
        shape = shape_of(self.shapes, self.scope, node.input[0])
        if isinstance(pieces[-1], str) and shape is not None:
            widths = Widths(self.model, self.scope, {node.input[0]: (len(shape), len(shape) - 1)})
            asked = [(tried, widths.at(pieces[-1], tried)) for tried in (number, 2 * number)]
            if all(found is not None and found[-1] == tried for tried, found in asked):
                return ()
            made = shape_of(self.shapes, self.scope, node.output[0])
            entries = sum(1 if isinstance(piece, str) else len(piece) for piece in pieces)
            if made is None or len(made) != entries or made[-1] != number:
                return None
            pieces = (*pieces[:-1], (number,))  # asked of another tensor, such as the input of the layer
        return _resize(node, pieces, number, unit)

    def joined(
        self, name: str, value: _Branch, flat: bool = False
    ) -> tuple[Site, tuple[Resize, ...], tuple[str, ...]] | None:
        """Go on from the heads to the layer that reads all of them side by side; ``flat``: they are by now."""
        turned: tuple[int, ...] = (0, 1, 2, 3)
        resizes: tuple[Resize, ...] | None = () if flat else None
        between = [name]
        while True:
            site = self.read.get((self.scope.path, name))
            if site is not None and resizes is not None:
                fits = (
                    site.weight.shape[0] == value.heads * value.shared * value.width and not site.uses[0].dynamic_bias
                )
                return (site, resizes, tuple(between)) if fits and self.only(name, set()) else None
            node = self.reader(name)
            if node is None:
                return None
            if node.op_type == "Transpose" and resizes is None:
                permutation = attribute_list(node, "perm")
                if len(permutation) != 4:
                    return None
                turned = tuple(turned[axis] for axis in permutation)
            elif node.op_type == "Reshape" and resizes is None and turned == _SPLIT and node.input[0] == name:
                heads = value.heads * value.shared
                resizes = self.resize(node, heads * value.width, heads)
                if resizes is None:
                    return None
            elif resizes is not None and self.is_flat(node) and node.input[0] == name:
                heads = value.heads * value.shared
                more = self.resize(node, heads * value.width, heads)
                if more is None:
                    return None
                resizes = (*resizes, *more)
            elif node.op_type not in _PASSES_ON:
                return None
            name = node.output[0]
            between.append(name)

    def scales_behind(self, name: str) -> tuple[Scale, ...]:
        """Constant factors right behind a product."""
        found = []
        while (node := self.reader(name)) is not None and node.op_type in ("Mul", "Div"):
            scale = self.scale(node)
            if scale is None or scale.input != name:
                break
            found.append(scale)
            name = scale.output
        return tuple(found)

    def scale(self, node: NodeProto) -> Scale | None:
        """Read a Mul or Div by one constant number."""
        constants = [self.model.constant(self.scope, name) for name in node.input]
        slots = [slot for slot, constant in enumerate(constants) if constant is not None]
        if len(slots) != 1 or (node.op_type == "Div" and slots[0] == 0):
            return None
        constant = constants[slots[0]]
        assert constant is not None
        if constant.value.size != 1 or constant.value.dtype.kind != "f" or not constant.value.reshape(-1)[0]:
            return None
        return Scale(node.name, node.op_type, node.input[1 - slots[0]], node.output[0], constant.value)

    def pieces(self, name: str) -> tuple[str | tuple[int, ...], ...] | None:
        """What the target of a Reshape is put together from."""
        whole = self.model.constant(self.scope, name)
        if whole is not None:
            return (tuple(int(entry) for entry in whole.value.reshape(-1)),)
        node = self.scope.producers.get(name)
        if node is None or node.op_type != "Concat":
            return None
        found: list[str | tuple[int, ...]] = []
        for source in node.input:
            constant = self.model.constant(self.scope, source)
            found.append(source if constant is None else tuple(int(entry) for entry in constant.value.reshape(-1)))
        return tuple(found)

    def read_once(self, name: str) -> bool:
        return len(self.scope.readers.get(name, ())) == 1 and name not in self.outputs

    def reader(self, name: str) -> NodeProto | None:
        """The only node that reads a tensor, but for those that ask its shape."""
        readers = [entry for entry in self.scope.readers.get(name, ()) if not self.asks(entry.node)]
        alone = len(readers) == 1 and readers[0].scope is self.scope and name not in self.outputs
        return readers[0].node if alone else None


def _work(parts: Sequence[Site], scores: Sequence[int] | None, width: int) -> int | None:
    """Multiply-accumulates of two layers and of the product that gives, or takes, scores of that shape."""
    macs = [site.macs for site in parts]
    if scores is None or any(entry is None for entry in macs):
        return None
    return sum(entry for entry in macs if entry is not None) + math.prod(scores) * width


def _is_usual(scales: Sequence[Scale], width: int) -> bool:
    total = math.prod(scale.factor for scale in scales)
    return bool(scales) and abs(total * math.sqrt(width) - 1) < _AS_USUAL


def _known(pieces: Sequence[str | tuple[int, ...]], place: int) -> int | None:
    """An entry of a target, counted from behind; None where it is computed."""
    flat: list[int | None] = []
    for piece in reversed(pieces):
        if isinstance(piece, str):
            flat.append(None)  # one entry at least
            break
        flat += reversed(piece)
    return flat[-place - 1] if len(flat) >= -place else None


def _resize(
    node: NodeProto, pieces: tuple[str | tuple[int, ...], ...], number: int, unit: int
) -> tuple[Resize, ...] | None:
    """How the last entry of a target follows the width: not at all if it is -1; None where it is computed."""
    last = pieces[-1]
    if isinstance(last, str) or not last or last[-1] not in (-1, number):
        return None
    if last[-1] == -1:
        return ()
    allowzero = int(attribute(node, "allowzero", 0))
    piece, entry = len(pieces) - 1, len(last) - 1
    return (Resize(node.name, node.input[0], node.output[0], allowzero, pieces, piece, entry, unit),)


def _half(
    half: str,
    parts: tuple[Site, Site],
    branch: _Branch,
    macs: int | None,
    *,
    resizes: tuple[Resize, ...],
    scales: tuple[Scale, ...],
    usual: bool,
    between: tuple[str, ...],
    region: tuple[tuple[str, ...], str],
    groups: int = 0,
    tables: tuple[Table | Turned, ...] = (),
    caches: tuple[Cache, ...] = (),
    refusal: str = "",
) -> Site:
    main = parts[0] if half == "scores" else parts[1]
    return Site(
        name=f"{parts[0].name}~{parts[1].name}",
        kind="attention",
        op=main.op,
        shape=main.weight.shape,
        weight=main.weight,
        uses=tuple(part.uses[0] for part in parts) if half == "scores" else main.uses,
        parameters=sum(part.parameters for part in parts),
        freed=sum(part.freed for part in parts),
        macs=macs,
        attributes={
            "half": half,
            "parts": parts,
            "heads": branch.heads * branch.shared,
            "groups": groups or branch.heads,
            "width": branch.width,
            "resizes": resizes,
            "scales": scales,
            "usual": usual,
            "between": between,
            "region": region,
            "tables": tables,
            "caches": caches,
            "refusal": refusal,
        },
        parts=tuple(part.name for part in parts),
    )
