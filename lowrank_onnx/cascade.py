"""A cheap model first, the full one only for the samples it is unsure of, in one file.

    y = cheap(x);  rows i with confidence(y_i) < threshold:  y_i = full(x_i)

The threshold is the smallest for which the answers agree with those of the full model as often as asked. It is
chosen on samples the cheap model was not fitted to, such that two conditions hold. Of n samples
(disagreements + 1) / (n + 1) is within the wish, which makes the expected disagreement on new samples of the same kind
stay within it (conformal risk control, arXiv:2208.02814). That alone misses the wish in every third run: so, where n
allows any disagreement, there are also so few that a model which disagrees more often than wished would show as
few with a chance of ``DOUBT`` at most. Which confidence is watched is decided on the samples the cheap model was
fitted to: of two thresholds for the same samples the lower one would be the luckier one. And these have to keep the
wish as well: a cascade that misses it has to look good twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lowrank_onnx.composing import Composition, body, brought_in, instantiate
from lowrank_onnx.linalg import Array
from lowrank_onnx.metrics import class_axis, is_distribution, looks_like_scores

CONFIDENCES = ("margin", "probability")
"""The lead of the best class over the second, in the unit of the scores; the probability of the best class."""

DOUBT = 0.2
"""Chance of samples that make a cascade which misses the wish look like one that meets it."""

COUNT = "gate/count"
"""Tensor of a cascade: how many samples of a run go on."""

CASCADE_KEY = "lowrank_onnx.cascade"
"""Metadata: the file is a cascade; its value is the threshold."""

_FIRST_AXES_AS_INPUT = 18  # operator set in which ReduceMin takes its axes as an input


@dataclass(frozen=True)
class Gate:
    """What sends a sample on to the full model.

    Attributes:
        outputs: Outputs that are class scores; the least sure of them counts.
        kind: One of ``CONFIDENCES``.
        threshold: Samples less sure than this go on.
        normalized: Whether the scores are probabilities already.
    """

    outputs: tuple[str, ...]
    kind: str
    threshold: float
    normalized: bool


def score_outputs(outputs: Mapping[str, Array]) -> tuple[str, ...]:
    """The outputs that look like class scores; see ``metrics.Fidelity``."""
    return tuple(name for name, value in outputs.items() if value.dtype.kind == "f" and looks_like_scores(name, value))


def are_normalized(outputs: Mapping[str, Array], names: Sequence[str]) -> bool:
    """Whether all of these scores are probability distributions."""
    return all(is_distribution(np.moveaxis(outputs[name], class_axis(outputs[name]), -1)) for name in names)


def confidence(outputs: Mapping[str, Array], gate: Gate) -> Array:
    """(n,) how sure the model is of each sample, at the least sure position of the least sure output."""
    found = []
    for name in gate.outputs:
        scores = np.moveaxis(outputs[name], class_axis(outputs[name]), -1).astype(np.float64)  # (n, ..., classes)
        if gate.kind == "probability" and not gate.normalized:
            powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores = powers / powers.sum(axis=-1, keepdims=True)
        best = np.sort(scores, axis=-1)
        sure = best[..., -1] - best[..., -2] if gate.kind == "margin" else best[..., -1]
        found.append(sure.reshape(len(sure), -1).min(axis=1))
    return np.asarray(np.min(found, axis=0))


def disagreement(reference: Mapping[str, Array], other: Mapping[str, Array], names: Sequence[str]) -> Array:
    """(n,) share of positions of each sample at which the best class differs, of the worst output."""
    losses = []
    for name in names:
        axis = class_axis(reference[name])
        differs = reference[name].argmax(axis) != other[name].argmax(axis)
        losses.append(differs.reshape(len(differs), -1).mean(axis=1))
    return np.asarray(np.max(losses, axis=0))


def separation(sure: Array, losses: Array) -> float:
    """Chance that a sample of another answer is less sure than one of the same answer; equal ones count half.

    Args:
        sure: (n,) confidence.
        losses: (n,) disagreement, in [0, 1].

    Returns:
        From 0 to 1; .5 where all agree or none does, as nothing tells.
    """
    _, places = np.unique(sure, return_inverse=True)
    lost, same = np.bincount(places, losses), np.bincount(places, 1 - losses)
    pairs = float(lost.sum() * same.sum())
    more_sure = same.sum() - np.cumsum(same) + same / 2
    return float(lost @ more_sure) / pairs if pairs > 0 else 0.5


def most_telling(outputs: Mapping[str, Array], losses: Array, names: Sequence[str]) -> Gate:
    """The confidence that tells best which samples get another answer; no threshold yet."""
    normalized = are_normalized(outputs, names)
    gates = [Gate(tuple(names), kind, -math.inf, normalized) for kind in CONFIDENCES]
    return max(gates, key=lambda gate: separation(confidence(outputs, gate), losses))


def fewest_samples(agreement: float) -> int:
    """How many samples it takes to choose a threshold for an agreement at all."""
    return math.ceil(1 / (1 - agreement) - 1 - 1e-9)


def choose_threshold(sure: Array, losses: Array, agreement: float) -> float | None:
    """The smallest threshold that keeps the agreement; ``-inf`` where nothing has to go on.

    Args:
        sure: (n,) confidence of the cheap model.
        losses: (n,) its disagreement with the full one, in [0, 1].
        agreement: The wish, in (0, 1).

    Returns:
        None where there are fewer than ``fewest_samples``.
    """
    allowed = (1 - agreement) * (len(sure) + 1) - 1
    if allowed < -1e-9:
        return None
    # ppf is the first count that is reached with more than this chance: one less is still too few to be chance.
    allowed = min(allowed, max(float(scipy.stats.binom.ppf(DOUBT, len(sure), 1 - agreement)) - 1, 0.0))
    order = np.argsort(-sure, kind="stable")
    ranked, lost = sure[order], np.cumsum(losses[order])
    # Samples of equal confidence stay or go together: a cut is behind the last of them.
    ends = np.append(ranked[1:] < ranked[:-1], True)
    fits = np.flatnonzero(ends & (lost <= allowed + 1e-9))
    if fits.size == 0:
        return float(np.nextafter(np.float32(ranked[0]), np.float32(np.inf)))
    last = int(fits[-1])
    return -math.inf if last == len(ranked) - 1 else float((ranked[last] + ranked[last + 1]) / 2)


def common_threshold(parts: Iterable[tuple[Array, Array]], agreement: float) -> float:
    """The smallest threshold that keeps the agreement in each of several sets of samples; see ``choose_threshold``.

    Args:
        parts: Confidence and disagreement of each set; those too small for a threshold do not count.
        agreement: The wish, in (0, 1).
    """
    found = [choose_threshold(sure, losses, agreement) for sure, losses in parts]
    return max(value for value in found if value is not None)


def agrees(losses: Iterable[Array], agreement: float) -> bool:
    """Whether a model keeps the agreement with nothing that goes on, by the rule of ``common_threshold``.

    Args:
        losses: (n,) disagreement with the original, in [0, 1], for each set of samples.
        agreement: The wish, in (0, 1).
    """
    return common_threshold(((np.zeros(len(lost)), lost) for lost in losses), agreement) == -math.inf


def build_cascade(full: ModelProto, cheap: ModelProto, gate: Gate, ranks: Mapping[str, int], rows: bool) -> ModelProto:
    """Put both models into one.

    Args:
        full, cheap: Models with the same inputs and outputs.
        gate: When the full model runs.
        ranks: Number of axes of the outputs in ``gate``.
        rows: Whether samples may be divided: only the unsure ones are gathered for the full model then. Otherwise
            one unsure sample sends the whole run on.

    Raises:
        ModelError: The operator set is too old.
    """
    whole = Composition(full)
    graph = whole.proto.graph
    constants = {prefix: whole.add_constants(model, prefix) for prefix, model in (("full/", full), ("cheap/", cheap))}
    nodes, answers = instantiate(cheap, "cheap/", constants["cheap/"], {})
    nodes += _unsure(whole, gate, answers, ranks)
    branch: list[NodeProto] = []
    inputs = [value.name for value in graph.input if value.name not in constants["full/"]]
    given = {name: name for name in inputs}
    if rows:
        nodes.append(helper.make_node("Transpose", ["gate/found"], ["gate/places"], "gate/places", perm=[1, 0]))
        whole.store(numpy_helper.from_array(np.array([-1], np.int64)), "gate/flat")
        nodes.append(helper.make_node("Reshape", ["gate/found", "gate/flat"], ["gate/rows"], "gate/rows"))
        given = {name: f"full/rows/{name}" for name in inputs}
        branch = [helper.make_node("Gather", [a, "gate/rows"], [b], f"{b}/take", axis=0) for a, b in given.items()]
    weights, local = brought_in(full, constants["full/"], "full/")
    inner, exact = instantiate(full, "full/", local, given)
    branch += weights + inner
    ends = [exact[name] for name in whole.outputs]
    if rows:
        ends = [f"full/scattered/{name}" for name in whole.outputs]
        for name, end in zip(whole.outputs, ends, strict=True):
            merged = [answers[name], "gate/places", exact[name]]
            branch.append(helper.make_node("ScatterND", merged, [end], f"{end}/put"))
    kept = [answers[name] for name in whole.outputs]
    then, other = (
        body(name, part, given_back, graph.output)
        for name, part, given_back in (("cascade/full", branch, ends), ("cascade/cheap", [], kept))
    )
    nodes.append(helper.make_node("If", ["gate/any"], whole.outputs, "cascade", then_branch=then, else_branch=other))
    graph.node.extend(nodes)
    whole.proto.metadata_props.add(key=CASCADE_KEY, value=f"{gate.kind} {gate.threshold:.9g}")
    return whole.proto


def is_cascade(proto: ModelProto) -> bool:
    """Whether a file was built by ``build_cascade``."""
    return any(entry.key == CASCADE_KEY for entry in proto.metadata_props)


def _unsure(whole: Composition, gate: Gate, answers: Mapping[str, str], ranks: Mapping[str, int]) -> list[NodeProto]:
    """Nodes that find ``gate/found`` (1, k), the samples to go on, and ``gate/any``, whether there are some."""
    make = helper.make_node
    for name, value in (("gate/two", [2]), ("gate/first", 0), ("gate/second", 1)):
        whole.store(numpy_helper.from_array(np.array(value, np.int64)), name)
    types = {value.name: value.type.tensor_type.elem_type for value in whole.proto.graph.output}
    whole.store(numpy_helper.from_array(np.array(gate.threshold, np.float32)), "gate/threshold")
    nodes, sure = [], []
    for place, name in enumerate(gate.outputs):
        stem, rank = f"gate/{place}", ranks[name]
        current = answers[name]
        if types[name] != TensorProto.FLOAT:
            nodes.append(make("Cast", [current], [f"{stem}/float"], f"{stem}/float", to=TensorProto.FLOAT))
            current = f"{stem}/float"
        if rank > 3:  # (n, classes, ...) -> (n, ..., classes)
            order = [0, *range(2, rank), 1]
            nodes.append(make("Transpose", [current], [f"{stem}/last"], f"{stem}/last", perm=order))
            current = f"{stem}/last"
        if gate.kind == "probability" and not gate.normalized:
            # Of sets before 13 Softmax joins the axes from here on: the last alone is the same in all.
            nodes.append(make("Softmax", [current], [f"{stem}/p"], f"{stem}/p", axis=rank - 1))
            current = f"{stem}/p"
        nodes.append(make("TopK", [current, "gate/two"], [f"{stem}/top", f"{stem}/which"], f"{stem}/top", axis=-1))
        nodes.append(make("Gather", [f"{stem}/top", "gate/first"], [f"{stem}/best"], f"{stem}/best", axis=-1))
        current = f"{stem}/best"
        if gate.kind == "margin":
            nodes.append(make("Gather", [f"{stem}/top", "gate/second"], [f"{stem}/next"], f"{stem}/next", axis=-1))
            nodes.append(make("Sub", [current, f"{stem}/next"], [f"{stem}/margin"], f"{stem}/margin"))
            current = f"{stem}/margin"
        if rank > 2:
            nodes.append(_least(whole, current, f"{stem}/sure", list(range(1, rank - 1))))
            current = f"{stem}/sure"
        sure.append(current)
    if len(sure) > 1:
        nodes.append(make("Min", sure, ["gate/sure"], "gate/sure"))
        sure = ["gate/sure"]
    return [
        *nodes,
        make("Less", [sure[0], "gate/threshold"], ["gate/low"], "gate/low"),
        make("NonZero", ["gate/low"], ["gate/found"], "gate/found"),
        make("Size", ["gate/found"], [COUNT], COUNT),
        make("Greater", [COUNT, "gate/first"], ["gate/any"], "gate/any"),
    ]


def _least(whole: Composition, source: str, target: str, axes: list[int]) -> NodeProto:
    if whole.opset < _FIRST_AXES_AS_INPUT:
        return helper.make_node("ReduceMin", [source], [target], target, axes=axes, keepdims=0)
    whole.store(numpy_helper.from_array(np.array(axes, np.int64)), f"{target}/axes")
    return helper.make_node("ReduceMin", [source, f"{target}/axes"], [target], target, keepdims=0)
