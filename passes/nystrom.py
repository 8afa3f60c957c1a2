"""The attention matrix through landmarks, for long sequences: time grows with the length, not with its square.

    softmax(q kᵀ) v   becomes   softmax(q k̃ᵀ) · pinv(softmax(q̃ k̃ᵀ)) · (softmax(q̃ kᵀ) v)

with m landmarks q̃, k̃, the means of segments of the queries and keys. No weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from lowrank_onnx.attention_statistics import Seen, is_matrix
from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Pass, RankWish, Replacement, Site
from lowrank_onnx.decompositions.landmarks import approximate, exact
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime, open_session
from lowrank_onnx.validation import benchmark

_GRID = (16, 32, 64, 128, 256)
_ALONE = ("scores", "scaled", "weights", "delivered")  # nodes of the exact block as a model of its own


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Relative error of what the block delivers, and its speed against the exact one, by number of landmarks."""

    errors: Mapping[int, float]
    speedups: Mapping[int, float]


@dataclass(frozen=True)
class Nystrom(Pass):
    """Attend through a few landmarks instead of from every position to every other.

    Options:
        max_error: Offer only what loses less of a block's output on the calibration data, relative.
        landmarks: Offer only this number; 0 tries several.
        steps: Of the iteration for the pseudo-inverse.
        shortest: Refuse shorter sequences: there the exact matrix is as fast.
    """

    name = "nystrom"
    kinds = ("attention",)
    reference = "Xiong et al. 2021, Nyströmformer, arXiv:2102.03902"
    default = False
    needs_data = True
    max_error: float = 0.05
    landmarks: int = 0
    steps: int = 12
    shortest: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.shortest < 1:
            raise ValueError("steps and shortest must be at least 1")

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if not is_matrix(site):
            return "nystrom takes what lies between the heads, not their layers"
        if site.attributes["masked"]:
            return (
                f"the scores are masked by {site.attributes['masked']}: a landmark is a mean over positions, "
                "and would show what a mask, above all a causal one, hides"
            )
        length = min(site.attributes["lengths"])
        if length < self.shortest:
            return f"a sequence of {length} is too short for landmarks to be faster; {self.shortest} is the least"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Any] | None) -> Landmarks:
        """See Pass.analyse."""
        seen: Sequence[Seen] = [] if moments is None else moments[site.uses[0].input]
        tried = [self.landmarks] if self.landmarks else [count for count in _GRID if 4 * count <= min(_lengths(site))]
        errors = {count: self._error(site, seen, count) for count in tried}
        fitting = [count for count in tried if errors[count] <= self.max_error]
        return Landmarks(errors, {count: self._speedup(site, seen[0], count) for count in fitting})

    def _error(self, site: Site, seen: Sequence[Seen], count: int) -> float:
        scale, lost, total = site.attributes["scale"], 0.0, 0.0
        for entry in seen:
            wanted = exact(entry.query, entry.key, entry.value, scale)
            made = approximate(entry.query, entry.key, entry.value, scale, count, self.steps)
            lost += float(np.sum((wanted - made) ** 2))
            total += float(np.sum(wanted**2))
        return math.sqrt(lost / total) if total > 0 else 0.0

    def _speedup(self, site: Site, seen: Seen, count: int) -> float:
        """Of the block alone, on one thread and the data of one sample."""
        dense = _alone(site, seen)
        made = rewrite(Model(dense, None, "", "", 0), self._replacement(site, count, _ALONE))
        runtime = Runtime("cpu", 1)
        names = site.attributes["region"][0]
        feeds = dict(zip(names, (seen.query, seen.key, seen.value), strict=True))
        timing = benchmark([open_session(entry, runtime) for entry in (dense, made)], feeds, runtime, 0, 0.5, 50, 5)
        return timing.ratios[1].value

    def ranks(self, site: Site, analysis: Landmarks) -> Sequence[tuple[int, ...]]:
        """See Pass.ranks; none where nothing is both near enough and faster."""
        return [(count,) for count, speedup in sorted(analysis.speedups.items()) if speedup > 1]

    def candidate(self, site: Site, analysis: Landmarks, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        (count,) = ranks
        batch, heads, queries, _ = site.attributes["scores"]
        keys, (width, other) = site.attributes["lengths"][1], site.attributes["widths"]
        each = 2 * count * width * (queries + keys) + count * other * (queries + keys)
        each += count * count * (width + other + 1) + 4 * self.steps * count**3
        nodes = 12 + 8 * self.steps
        error = analysis.errors.get(count, 0.0)
        return Candidate(site.name, self.name, ranks, 3 * count * count, batch * heads * each, nodes, None, error)

    def factorize(self, site: Site, analysis: Landmarks, candidate: Candidate) -> Factors:
        """See Pass.factorize; there is no factor but the graph."""
        return {}

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        return self._replacement(site, candidate.ranks[0], site.attributes["nodes"])

    def _replacement(self, site: Site, count: int, removed: tuple[str, ...]) -> list[Replacement]:
        told = site.attributes
        (query, key, value), output = told["region"]
        make = _Maker(site.name, told["dtype"], told["opset"])
        few_q = make.add("MatMul", make.segments(query, 2, count), query)
        turned = make.segments(key, 3, count)
        few_k = make.add("MatMul", key, make.add("Transpose", turned, perm=[1, 0]))
        scale = make.number("scale", told["scale"])
        first = make.add("Softmax", make.add("Mul", make.add("MatMul", query, few_k), scale), axis=-1)
        small = make.add("Softmax", make.add("Mul", make.add("MatMul", few_q, few_k), scale), axis=-1)
        last = make.add("Softmax", make.add("Mul", make.add("MatMul", few_q, key), scale), axis=-1)
        sums = make.add("MatMul", make.constant("ones", np.ones((1, count))), small)  # (..., 1, m)
        z = make.add("Div", make.add("Transpose", small, perm=[0, 1, 3, 2]), make.reduced("ReduceMax", sums))
        for _ in range(self.steps):
            az = make.add("MatMul", small, z)
            inner = make.add("Sub", make.unit(7, count), az)
            inner = make.add("Sub", make.unit(15, count), make.add("MatMul", az, inner))
            inner = make.add("Sub", make.unit(13, count), make.add("MatMul", az, inner))
            z = make.add("Mul", make.add("MatMul", z, inner), make.number("quarter", 0.25))
        behind = make.add("MatMul", z, make.add("MatMul", last, value))
        make.add("MatMul", first, behind, into=output)
        return [Replacement(site.uses[0].scope, removed, tuple(make.nodes))]

    def targets(self, site: Site) -> tuple[Site, ...]:
        """See Pass.targets; there is no layer to refit."""
        return ()

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit."""
        return factors

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        raise NotImplementedError("an attention matrix depends on the data")

    def spell_rank(self, site: Site, analysis: Landmarks, wish: RankWish) -> tuple[int, ...] | str:
        """See Pass.spell_rank."""
        return "a fixed rank is carried out layer by layer"

    def check_ranks(self, site: Site, ranks: tuple[int, ...]) -> str | None:
        """See Pass.check_ranks."""
        if not is_matrix(site):
            return self.refuse(site)
        most = min(_lengths(site))
        return None if len(ranks) == 1 and 1 <= ranks[0] <= most else f"expected one number of landmarks, 1 to {most}"

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent; no layer changes."""
        return {}


def _lengths(site: Site) -> tuple[int, int]:
    queries, keys = site.attributes["lengths"]
    return queries, keys


def _alone(site: Site, seen: Seen) -> onnx.ModelProto:
    """The exact block as a model of its own."""
    names, output = site.attributes["region"]
    parts = (seen.query, seen.key, seen.value)
    element = onnx.helper.np_dtype_to_tensor_dtype(seen.query.dtype)
    values = [onnx.helper.make_tensor_value_info(n, element, p.shape) for n, p in zip(names, parts, strict=True)]
    scale = onnx.numpy_helper.from_array(np.array(site.attributes["scale"], seen.query.dtype), "alone/scale")
    steps = (("MatMul", [*names[:2]], "a"), ("Mul", ["a", "alone/scale"], "b"), ("Softmax", ["b"], "c"),
             ("MatMul", ["c", names[2]], output))  # fmt: skip
    nodes = [
        onnx.helper.make_node(op, inputs, [made], name=name)
        for (op, inputs, made), name in zip(steps, _ALONE, strict=True)
    ]
    nodes[2].attribute.append(onnx.helper.make_attribute("axis", -1))
    graph = onnx.helper.make_graph(nodes, "block", values, [onnx.helper.make_empty_tensor_value_info(output)], [scale])
    opset = onnx.helper.make_opsetid("", site.attributes["opset"])
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)


class _Maker:
    """Nodes with running names."""

    def __init__(self, stem: str, dtype: np.dtype[Any], opset: int) -> None:
        self.stem, self.dtype, self.opset = stem, dtype, opset
        self.nodes: list[gs.Node] = []

    def add(self, op: str, *inputs: gs.Tensor | str, into: str = "", **attributes: Any) -> gs.Variable:
        """A node, and the tensor it makes."""
        name = f"{self.stem}/landmark{len(self.nodes)}"
        read = [gs.Variable(entry) if isinstance(entry, str) else entry for entry in inputs]
        made = gs.Variable(into or name)
        self.nodes.append(gs.Node(op, name, attributes, read, [made]))
        return made

    def constant(self, role: str, value: Array, dtype: Any = None) -> gs.Constant:
        return gs.Constant(f"{self.stem}/{role}", np.asarray(value, dtype or self.dtype))

    def number(self, role: str, value: float) -> gs.Constant:
        return self.constant(role, np.array(value))

    def unit(self, factor: int, count: int) -> gs.Constant:
        return self.constant(f"unit{factor}", factor * np.eye(count))

    def reduced(self, op: str, tensor: gs.Variable) -> gs.Variable:
        """Over the last axis, which stays with one element; the axes moved from an attribute to an input."""
        if self.opset < {"ReduceSum": 13, "ReduceMax": 18}[op]:
            return self.add(op, tensor, axes=[-1], keepdims=1)
        return self.add(op, tensor, self.constant("last", np.array([-1]), np.int64), keepdims=1)

    def segments(self, tensor: str, axis: int, count: int) -> gs.Variable:
        """(m, S) means of segments of the positions, however many there are; see ``landmarks.segments``."""
        zero, one, whole = (
            self.constant(role, np.array(value), np.int64)
            for role, value in (("zero", 0), ("one", 1), ("count", count))
        )
        place = self.constant(f"axis{axis}", np.array(axis), np.int64)
        length = self.add("Gather", self.add("Shape", tensor), place)
        positions = self.add("Mul", self.add("Range", zero, length, one), whole)
        rows = self.constant("rows", np.arange(count)[:, None], np.int64)
        same = self.add("Equal", rows, self.add("Div", positions, length))
        chosen = self.add("Cast", same, to=onnx.helper.np_dtype_to_tensor_dtype(self.dtype))
        total = self.add("Max", self.reduced("ReduceSum", chosen), self.number("least", 1.0))
        return self.add("Div", chosen, total)
