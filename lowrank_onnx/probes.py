"""Damage: what one layer's factorization does to the model's output, measured at a few ranks.

The model is rewritten once so that every layer in question is a dense product with constants of its own;
a probe feeds it the dense equivalent of a candidate instead, from the layer on, without a new session for
every rank. Between the probes the curve follows the layer's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_onnx.attention_statistics import is_matrix
from lowrank_onnx.base import Candidate, Replacement, Site
from lowrank_onnx.batches import batches, by_length
from lowrank_onnx.data import Dataset
from lowrank_onnx.kept import dense_node
from lowrank_onnx.linalg import Array
from lowrank_onnx.lookups import dense_lookup
from lowrank_onnx.metrics import named_scores
from lowrank_onnx.model import Model
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.recurrent_chains import dense_cell, fused, widening
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import Runtime
from lowrank_onnx.statistics import Progress, as_rows, padding_mask
from lowrank_onnx.stream import Stream, levels
from lowrank_onnx.validation import safe_batch

SAMPLES = 40
PROBES = 3
_FEWEST_SAMPLES = 4
_MOST_SAMPLES = 256
_PROBE_MACS = 2e12  # about a minute's work


@dataclass(frozen=True)
class Curve:
    """Damage by rank of one technique at one site, measured at some of them.

    Attributes:
        ranks: The ranks probed, rising.
        errors: The layer's own relative error there, falling.
        damages: Relative squared change of the model's output, falling.
    """

    ranks: tuple[tuple[int, ...], ...]
    errors: tuple[float, ...]
    damages: tuple[float, ...]

    def at(self, error: float) -> float:
        """Damage of a candidate with that error of its own: a power law between probes, square outside."""
        points = sorted({max(e, 1e-12): d for e, d in zip(self.errors, self.damages, strict=True)}.items())
        x = np.log([point[0] for point in points])
        y = np.log([max(point[1], 1e-18) for point in points])
        at = float(np.log(max(error, 1e-12)))
        if at <= x[0]:
            return float(np.exp(y[0] + 2 * (at - x[0])))
        if at >= x[-1]:
            return float(np.exp(y[-1] + 2 * (at - x[-1])))
        return float(np.exp(np.interp(at, x, y)))


def probe(
    model: Model,
    session: Any,
    proposals: Sequence[Proposal],
    dataset: Dataset,
    runtime: Runtime,
    mask: str | None,
    seed: int,
    known: Mapping[int, Curve],
    progress: Progress | None,
) -> dict[int, Curve]:
    """Measure the damage curves of proposals.

    Args:
        session: The original model, open.
        dataset: Calibration data; a subset of at most ``SAMPLES`` is used, drawn with ``seed``.
        known: Curves that are known already, by position in ``proposals``.

    Returns:
        Curves by position in ``proposals``; a site inside a subgraph has none.
    """
    measured = [
        place
        for place, entry in enumerate(proposals)
        if place not in known and all(not use.scope for use in entry.site.uses) and not is_matrix(entry.site)
    ]
    followed = _followed(proposals, measured)
    todo = [place for place in measured if place not in followed]
    curves = dict(known)
    if not todo:
        return curves
    picked = np.sort(np.random.default_rng(seed).permutation(len(dataset))[: _samples(proposals, todo)])
    subset = dataset.subset(by_length(dataset, picked.tolist()))
    size = min(safe_batch(session, subset), 16)
    parts = {part.name: part for place in todo for part in _parts(proposals[place].site)}
    widened = {proposals[place].site.name for place in todo if proposals[place].technique.widens}
    proto, constants = _with_dense(model, list(parts.values()), widened)
    stream = Stream(proto, subset, list(batches(len(subset), size)), runtime, model.folder)
    masks = [padding_mask(entry, mask) for entry in stream.values]
    reference = [visible_outputs(entry, keep) for entry, keep in zip(stream.fork().finish(), masks, strict=True)]
    done = 0
    for group in levels(stream, [(place, _front(proposals[place].site)) for place in todo]):
        stream.advance([part.uses[0].input for _, members in group for part in members])
        for place, _ in group:
            varied = [name for part in _parts(proposals[place].site) for name in constants[part.name]]
            call = stream.suffix(varied)
            rivals = [proposals[other] for other, leader in followed.items() if leader == place]
            trials = _trials(proposals[place], rivals)
            curves[place] = _curve(trials, call, constants, reference, masks)
            done += 1
            if progress is not None:
                progress("probe", done, len(todo))
    return curves | {place: curves[other] for place, other in followed.items()}


def damage_of(proposals: Sequence[Proposal], curves: Mapping[int, Curve]) -> Callable[[Candidate], float]:
    """Return the damage of every candidate: by its curve, or by its own error where there is none.

    Rises as the rank falls, by construction: a lower rank never counts as less harmful.
    """
    table: dict[int, float] = {}
    for place, entry in enumerate(proposals):
        worst = 0.0
        for candidate in reversed(entry.candidates):
            own = candidate.error**2
            worst = max(worst, curves[place].at(candidate.error) if place in curves else own)
            table[id(candidate)] = worst
    return lambda candidate: table[id(candidate)]


def curve_owner(proposals: Sequence[Proposal], entry: Proposal) -> str:
    """What a curve is of: one technique, or all that share it."""
    if entry.site.kind != "convolution":
        return repr(entry.technique)
    return repr([other.technique for other in proposals if other.site.name == entry.site.name])


def _followed(proposals: Sequence[Proposal], places: Sequence[int]) -> dict[int, int]:
    """Proposals whose curve is that of another: what a convolution's error does hardly depends on the technique."""
    first: dict[str, int] = {}
    for place in places:
        if proposals[place].site.kind == "convolution":
            first.setdefault(proposals[place].site.name, place)
    names = {place: proposals[place].site.name for place in places}
    return {place: first[name] for place, name in names.items() if first.get(name, place) != place}


def _samples(proposals: Sequence[Proposal], todo: Sequence[int]) -> int:
    """How many samples to probe with; of convolutions as many as a minute allows, for large maps a few say much."""
    macs = sum(proposals[place].site.macs or 0 for place in todo if proposals[place].site.kind == "convolution")
    if macs == 0:
        return SAMPLES
    runs = (PROBES + 1) * len(todo) / 2  # half of the model lies behind a layer
    return int(np.clip(_PROBE_MACS / (macs * runs), _FEWEST_SAMPLES, _MOST_SAMPLES))


def _parts(site: Site) -> tuple[Site, ...]:
    """The single sites whose dense weights a probe of this site changes."""
    if site.kind == "feedforward":
        return (site.attributes["out"],)
    if site.kind == "attention" and site.attributes["half"] == "whole":
        return (site.attributes["parts"][0], site.attributes["parts"][3])
    if site.kind == "attention":  # what one layer of either half can tell of both; see Heads.dense_equivalent
        return (site.attributes["parts"][0 if site.attributes["half"] == "scores" else 1],)
    return tuple(site.attributes["parts"]) if site.kind in ("shared_input", "shared_layers", "tied") else (site,)


def _front(site: Site) -> tuple[Site, ...]:
    """The parts whose inputs do not depend on the site itself: of a tied table the lookup, not the head."""
    if site.kind == "shared_layers":
        return tuple(part for part in _parts(site) if part.uses[0].input == site.uses[0].input)
    return _parts(site)[:1] if site.kind == "tied" or site.attributes.get("half") == "whole" else _parts(site)


def _with_dense(
    model: Model, parts: Sequence[Site], widened: Collection[str] = ()
) -> tuple[Any, dict[str, dict[str, tuple[str, Array]]]]:
    """Give every part constants of its own.

    Args:
        widened: Names of recurrent cells whose states have to be varied behind them as well.

    Returns:
        The model, and by part the constants by name: role (``weight`` or the node of a bias) and value.
    """
    replacements: list[Replacement] = []
    constants: dict[str, dict[str, tuple[str, Array]]] = {}
    for part in parts:
        if part.kind == "recurrent":
            stored = dense_cell(part, part.weight, part.attributes["bias"])
            stored |= widening(part, None) if part.name in widened else {}
            replacements += [fused(part, use, stored) for use in part.uses]
            constants[part.name] = {f"{part.name}/{role}": (role, value) for role, value in stored.items()}
            continue
        name = f"{part.name}/dense"
        made = {name: ("weight", part.weight)}
        for use in part.uses:
            table = part.kind == "embedding"
            none = use.dynamic_bias or table
            bias = None if none else np.zeros(_outputs(part)) if use.bias is None else use.bias
            entry = dense_lookup(part, use, name) if table else dense_node(part, use, name, part.weight, bias)
            replacements.append(entry)
            if bias is not None:
                made[f"{use.node}/bias"] = (use.node, bias)
        constants[part.name] = made
    return rewrite(model, replacements), constants


def _outputs(part: Site) -> int:
    """Length of the bias."""
    if part.kind != "convolution":
        return int(part.weight.shape[-1])
    return int(part.shape[1] * part.attributes["group"] if part.attributes["transposed"] else part.shape[0])


def _trials(proposal: Proposal, rivals: Sequence[Proposal]) -> list[tuple[Proposal, Candidate]]:
    """What to probe, falling in error: a few ranks of one technique, or of all that share the curve."""
    if proposal.site.kind != "convolution":
        return [(proposal, candidate) for candidate in _spread(proposal.candidates)]
    offered = [(entry, candidate) for entry in (proposal, *rivals) for candidate in entry.candidates]
    offered.sort(key=lambda pair: -pair[1].error)
    errors = np.log([max(candidate.error, 1e-6) for _, candidate in offered])
    wanted = np.linspace(errors[0], errors[-1], PROBES + 1)
    return [offered[place] for place in sorted({int(np.argmin(np.abs(errors - at))) for at in wanted})]


def _curve(
    trials: Sequence[tuple[Proposal, Candidate]],
    call: Callable[[Mapping[str, Array]], Any],
    constants: Mapping[str, Mapping[str, tuple[str, Array]]],
    reference: Sequence[Mapping[str, Array]],
    masks: Sequence[Array | None],
) -> Curve:
    ranks, errors, damages = [], [], []
    for proposal, candidate in trials:
        factors = proposal.technique.factorize(proposal.site, proposal.analysis, candidate)
        dense = proposal.technique.dense_equivalent(proposal.site, candidate, factors)
        feeds = {
            name: _stored(proposal.site, part, role, value, dense)
            for part in _parts(proposal.site)
            for name, (role, value) in constants[part.name].items()
        }
        changed = [visible_outputs(entry, keep) for entry, keep in zip(call(feeds), masks, strict=True)]
        ranks.append(candidate.ranks)
        errors.append(candidate.error)
        damages.append(divergence(reference, changed))
    falling = np.maximum.accumulate(np.array(damages)[::-1])[::-1]  # more rank never hurts
    return Curve(tuple(ranks), tuple(errors), tuple(float(value) for value in falling))


def _stored(site: Site, part: Site, role: str, value: Array, dense: Mapping[str, Any]) -> Array:
    """A constant as the rewritten graph stores it: transposed where the weight stands on the left."""
    entry = dense.get(part.name)
    if part.kind == "recurrent":
        bias = None if entry is None else next(iter(entry.biases.values()), None)
        if entry is None:
            return value
        return {**dense_cell(part, entry.weight, bias), **widening(part, entry.behind)}[role]
    if part.kind in ("convolution", "embedding"):
        changed = entry is not None and (role == "weight" or role in entry.biases)
        made = (entry.weight if role == "weight" else entry.biases[role]) if entry is not None and changed else value
        return np.ascontiguousarray(made, dtype=part.weight.dtype)
    left = part.attributes["side"] == "left"
    if role == "weight":
        weight = value if entry is None else entry.weight
        made = np.swapaxes(weight, -1, -2) if left else weight
    else:
        use = next(use for use in part.uses if use.node == role)
        bias = value if entry is None or role not in entry.biases else entry.biases[role]
        extra = part.attributes[role]
        vector = (len(bias), 1) if left else (len(bias),)
        shape = extra["bias_shape"] if use.also and int(np.prod(extra["bias_shape"])) == len(bias) else vector
        made = bias.reshape(shape)
    return np.ascontiguousarray(made, dtype=part.weight.dtype)


def _spread(candidates: Sequence[Candidate]) -> list[Candidate]:
    """A few candidates, evenly over the ranks, the smallest and largest among them."""
    if len(candidates) <= PROBES:
        return list(candidates)
    shares = np.linspace(0, 1, PROBES + 1)[1:]  # the very smallest rank teaches little
    return [candidates[place] for place in sorted({round(share * (len(candidates) - 1)) for share in shares})]


def visible_outputs(values: Mapping[str, Array], keep: Array | None) -> dict[str, Array]:
    """The floating-point outputs, without padding rows, in float64; of class scores, what differs by class."""
    chosen = {}
    for name, given in values.items():
        if given.dtype.kind == "f":
            axis = named_scores(name, given)
            # What is added to the scores of all classes alike changes no decision and no probability.
            value = given if axis is None else given - given.mean(axis=axis, keepdims=True)
            rows = as_rows(value, "last", keep) if keep is not None and value.ndim > 1 else value
            chosen[name] = rows.astype(np.float64)
    return chosen


def divergence(reference: Sequence[Mapping[str, Array]], changed: Sequence[Mapping[str, Array]]) -> float:
    """Squared change over squared size, of the worst floating-point output."""
    worst = 0.0
    for name in reference[0]:
        size = sum(float(np.vdot(entry[name], entry[name])) for entry in reference)
        change = sum(
            float(np.sum((entry[name] - other[name]) ** 2))
            for entry, other in zip(reference, changed, strict=True)
            # An output that lies before the layer does not change; a cache of another width cannot be compared.
            if name in other and other[name].shape == entry[name].shape
        )
        worst = max(worst, change / size if size > 0 else 0.0)
    return worst
