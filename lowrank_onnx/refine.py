"""Closed-form corrections once the plan is in place, layer after layer in the order of the graph.

Every factorized layer is fitted anew so that, on the inputs the compressed layers before it deliver, it
gives what the original gave on the original inputs; where a residual sum follows, also what the skip path
has lost by then. Layers behind that were kept dense are fitted in the same way. Ridge and mixing are chosen
on held-out calibration samples, and so is whether the refit is kept at all: with few samples it can be worse
than none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Factors, Moments, Site
from lowrank_onnx.batches import batches, by_length
from lowrank_onnx.building import Choice, build, factorize
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.kept import Kept
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model, Scope, reads
from lowrank_onnx.patches import as_linear
from lowrank_onnx.probes import divergence, visible_outputs
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.statistics import Progress, Rows, choose_rows, padding_mask, positions_of, row_layout
from lowrank_onnx.stream import Stream, levels
from lowrank_onnx.validation import safe_batch

HELD_OUT = 0.2
MIXES = (0.5, 1.0)
RIDGES = (0.01, 0.1)
REFITTED = "refitted"  # how the note of a layer begins that did change
_LIVE_BYTES = 512 * 2**20  # of the widest layer's inputs, in both streams
_FEWEST = 5  # samples; below that nothing can be held out


@dataclass(frozen=True, eq=False)
class Refined:
    """New factors by site, the choices with their new errors, and what became of each layer.

    Attributes:
        kept: Layers without a choice whose dense weights were fitted anew; ``notes`` has every one that was tried.
    """

    choices: tuple[Choice, ...]
    factors: Mapping[str, Factors]
    notes: Mapping[str, str]
    kept: tuple[Choice, ...] = ()


@dataclass
class _Sums:
    """Moments of a delivered input with a wanted output, in the making."""

    rows: int = 0
    mean: Array | float = 0.0
    gram: Array | float = 0.0
    cross: Array | float = 0.0
    wanted: Array | float = 0.0
    energy: float = 0.0

    def add(self, x: Array, t: Array) -> None:
        self.rows += len(x)
        self.mean = self.mean + x.sum(axis=0, dtype=np.float64)
        self.gram = self.gram + (x.T @ x).astype(np.float64)
        self.cross = self.cross + (x.T @ t).astype(np.float64)
        self.wanted = self.wanted + t.sum(axis=0, dtype=np.float64)
        self.energy += float(np.sum(np.square(t, dtype=np.float64)))

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.rows + other.rows,
            self.mean + other.mean,
            self.gram + other.gram,
            self.cross + other.cross,
            self.wanted + other.wanted,
            self.energy + other.energy,
        )

    def moments(self) -> Moments:
        n = max(self.rows, 1)
        mean, gram, cross, wanted = (np.asarray(v) / n for v in (self.mean, self.gram, self.cross, self.wanted))
        return Moments(self.rows, mean, gram, cross, wanted, self.energy / n)


def refine(
    problem: Problem,
    choices: Sequence[Choice],
    factors: Mapping[str, Factors],
    mask: str | None,
    progress: Progress | None,
    kept: Sequence[Site] = (),
) -> Refined:
    """Refit the factors of a plan on the inputs its own model delivers.

    Args:
        kept: Sites whose dense weights may change as well, where no choice covers them.

    Returns:
        The given factors where there are too few samples, or where the held-out samples say that refitting
        made the model's output worse.
    """
    unchanged = Refined(tuple(choices), factors, {})
    data = problem.training
    samples = 0 if problem.calibrate is None else len(problem.calibrate)
    given = len(choices)
    if data is not None:
        dense_choices = _behind(problem.model, choices, kept, samples)
        choices, factors = [*choices, *dense_choices], {**factors, **factorize(dense_choices)}
    places = [place for place, choice in enumerate(choices) if _is_refittable(choice)]
    if data is None or not places or samples < _fewest([choices[place] for place in places]):
        return unchanged
    train, held = (
        by_length(data, part)
        for part in _split(problem, [choices[place] for place in places], samples, len(data) // samples)
    )
    drawn = sum(place < samples for place in (*train, *held))  # the copies' positions come on top
    size = min(safe_batch(problem.session, data), 16)
    groups = [list(batch) for part in (train, held) for batch in _chunks(part, size)]
    seen = len(list(_chunks(train, size)))
    built = build(problem.model, choices, factors)
    dense = Stream(problem.model.proto, data, groups, problem.runtime, problem.model.folder)
    small = Stream(built.proto, data, groups, problem.runtime, problem.model.folder)
    masks = [padding_mask(entry, mask) for entry in dense.values]
    start = small.fork()
    made = dict(factors)
    notes: dict[str, str] = {}
    fresh = list(choices)
    staged: dict[int, list[float]] = {}  # what the stages of a choice lose
    tasks = [task for place in places for task in _tasks(problem.model, place, choices[place], factors)]
    done = 0
    for group in levels(dense, [(number, _targets(task.choice)) for number, task in enumerate(tasks)]):
        names = [members[0].uses[0].input for _, members in group]
        skips = [tasks[number].skip for number, _ in group if tasks[number].skip]
        dense.advance([*names, *skips])
        small.advance([*names, *skips])
        for number, members in group:
            task = tasks[number]
            site, technique = choices[task.place].proposal.site, task.choice.proposal.technique
            now = factorize([task.choice])[task.choice.proposal.site.name] if task.layer else made[site.name]
            train_sums, held_sums, plain_sums = _Sums(), _Sums(), _Sums()
            for batch, keep in enumerate(masks):
                rows = _rows(members, dense.values[batch], keep, batch, len(groups[batch]), drawn)
                x, source, t = _values(members, dense.values[batch], small.values[batch], rows)
                if batch < seen:
                    plain_sums.add(technique.delivered(now, source), t)
                t = t + _lost(task.skip, t, dense.values[batch], small.values[batch], rows)
                (train_sums if batch < seen else held_sums).add(x, t)
            try:
                fitted, choice, note = _refit(task.choice, now, train_sums, held_sums, plain_sums)
            except (ArithmeticError, ValueError) as error:
                raise LowRankError(
                    f"refitting '{site.name}' with {technique.name} failed: {error}; leave the layer out with "
                    f"--exclude '{site.name}', or all refits with --no-refine"
                ) from error
            if not task.layer:
                made[site.name], fresh[task.place], notes[site.name] = fitted, choice, note
            elif task.staged:
                staged.setdefault(task.place, []).append(choice.candidate.error)
                if not notes.get(site.name, "").startswith(REFITTED):
                    notes[site.name] = note
            if task.layer and note.startswith(REFITTED):
                made[site.name] = choices[task.place].proposal.technique.with_kept(
                    site, made[site.name], task.layer, fitted
                )
            small.set_initializers(_constants(choices[task.place], made[site.name]))
            done += 1
            if progress is not None:
                progress("refine", done, len(tasks))
    for place, errors in staged.items():
        candidate = dataclasses.replace(
            choices[place].candidate, output_error=float(np.sqrt(np.mean(np.square(errors))))
        )
        fresh[place] = Choice(choices[place].proposal, candidate)
    if not _helped(dense, small, start, masks, seen):
        told = dict.fromkeys(notes, "refitting did not help on held-out samples")
        return dataclasses.replace(unchanged, notes=told)
    changed = [choice for choice in fresh[given:] if notes[choice.proposal.site.name].startswith(REFITTED)]
    return Refined(tuple(fresh[:given]), made, notes, tuple(changed))


@dataclass(frozen=True)
class _Task:
    """One refit.

    Attributes:
        place: Of the choice it belongs to.
        choice: That choice; or, for a layer it keeps dense, a stand-in with that layer as its site.
        layer: Name of the layer kept dense, or of the stage; empty for the choice itself.
        skip: The tensor that is added right behind; empty where there is none.
        staged: Whether it is one stage of the choice.
    """

    place: int
    choice: Choice
    layer: str
    skip: str
    staged: bool = False


def _tasks(model: Model, place: int, choice: Choice, factors: Mapping[str, Factors]) -> list[_Task]:
    """What to refit of one choice: the layers it keeps dense, then its targets; or its stages."""
    site, technique = choice.proposal.site, choice.proposal.technique
    if stages := _stages(choice):
        return [_Task(place, stage, stage.proposal.site.name, _residual(model, stage), True) for stage in stages]
    layers = technique.kept_layers(site, factors[site.name])
    tasks = [_Task(place, _as_choice(layer), layer.name, "") for layer in layers]
    return [*tasks, _Task(place, choice, "", _residual(model, choice))]


def _as_choice(site: Site) -> Choice:
    """To keep a layer dense, with weights fitted anew."""
    candidate = Kept().candidate(site, None, ())
    return Choice(Proposal(site, Kept(), None, (candidate,)), candidate)


def _behind(model: Model, choices: Sequence[Choice], kept: Sequence[Site], samples: int) -> list[Choice]:
    """The sites without a choice that get other inputs once the choices are carried out."""
    technique = Kept()
    main: Scope = model.scopes[0]
    changed = {use.output for choice in choices for part in _all_targets(choice) for use in part.uses}
    for node in main.graph.node:  # in order
        if changed.intersection(reads(node)):
            changed.update(node.output)
    covered = {name for choice in choices for name in choice.proposal.site.covers}
    made = []
    for site in kept:
        few = samples < _FEWEST and site.kind != "convolution"
        if site.kind not in technique.kinds or site.name in covered or few or technique.refuse(site):
            continue
        if site.uses[0].input in changed:
            made.append(_as_choice(site))
    return made


def _fewest(choices: Sequence[Choice]) -> int:
    """Samples needed: of a convolution each one has thousands of positions, and one can be held out of two."""
    return 2 if all(choice.proposal.site.kind == "convolution" for choice in choices) else _FEWEST


def _is_refittable(choice: Choice) -> bool:
    site = choice.proposal.site
    return bool(_all_targets(choice)) and all(not use.scope for use in site.uses)


def _targets(choice: Choice) -> tuple[Site, ...]:
    """The layers a refit aims at, each as the matrix that rows meet."""
    return tuple(as_linear(site) for site in choice.proposal.technique.targets(choice.proposal.site))


def _all_targets(choice: Choice) -> tuple[Site, ...]:
    """The layers that any refit of a choice aims at."""
    return tuple(part for stage in _stages(choice) or [choice] for part in _targets(stage))


def _stages(choice: Choice) -> list[Choice]:
    """Stand-ins for a choice that is refitted bit by bit; none for any other."""
    entry, candidate = choice.proposal, choice.candidate
    stages = entry.technique.stages(entry.site, entry.analysis)
    return [Choice(Proposal(site, entry.technique, analysis, (candidate,)), candidate) for site, analysis in stages]


def _split(problem: Problem, choices: Sequence[Choice], samples: int, copies: int) -> tuple[list[int], list[int]]:
    """Draw the samples used, as many as memory allows, and hold some of them out.

    Args:
        samples: How many real ones there are.
        copies: How often they stand in the data; what was made of a sample stands ``samples`` behind it.
    """
    widest = max(
        4 * int(np.prod(part.uses[0].input_shape or (1,))) for choice in choices for part in _all_targets(choice)
    )
    count = int(np.clip(_LIVE_BYTES // (2 * widest * copies), min(_FEWEST, samples), samples))
    picked = np.random.default_rng(problem.seed).permutation(samples)[:count]
    held = max(int(HELD_OUT * count), 1)
    real = sorted(picked[held:].tolist())
    # Of copied text every other one: it brings less than real samples do, and costs as much memory.
    step = 1 if any(choice.proposal.site.kind == "convolution" for choice in choices) else 2
    train = [*real, *(place + copy * samples for copy in range(1, copies) for place in real[::step])]
    return train, sorted(picked[:held].tolist())


def _chunks(indices: Sequence[int], size: int) -> list[list[int]]:
    return [[indices[place] for place in chunk] for chunk in batches(len(indices), size)]


def _residual(model: Model, choice: Choice) -> str:
    """The tensor that is added right behind the layer; empty where there is none."""
    members = _targets(choice)
    if len(members) > 1 or members[0].attributes.get("side") == "left":
        return ""
    use = members[0].uses[0]
    main: Scope = model.scopes[0]
    readers = main.readers.get(use.output, [])
    if len(readers) != 1 or readers[0].node.op_type != "Add":
        return ""
    other = readers[0].node.input[1 - readers[0].slot]
    producer = main.producers.get(other)
    if other == use.output or model.constant(main, other) is not None or producer is None:
        return ""
    return str(other)


def _rows(
    members: Sequence[Site], dense: Mapping[str, Array], keep: Array | None, number: int, samples: int, total: int
) -> Rows:
    """The rows of batch ``number`` that count, of ``samples`` out of ``total`` samples."""
    shape = dense[members[0].uses[0].input].shape
    return choose_rows(row_layout(members[0]), shape, keep, positions_of(samples, total), number)


def _values(
    members: Sequence[Site], dense: Mapping[str, Array], small: Mapping[str, Array], rows: Rows
) -> tuple[Array, Array, Array]:
    """Delivered rows (n, K̂), original rows (n, K) and the original outputs (n, N) without bias, of one batch."""
    name = members[0].uses[0].input
    x = rows.of_input(small[name]).astype(np.float32, copy=False)
    source = rows.of_input(dense[name]).astype(np.float32, copy=False)
    return x, source, np.concatenate([source @ part.weight.astype(np.float32, copy=False) for part in members], axis=1)


def _lost(skip: str, t: Array, dense: Mapping[str, Array], small: Mapping[str, Array], rows: Rows) -> Array | float:
    """What the skip path lacks by now, (n, N): the layer is asked to give it back."""
    if not skip or skip not in small or small[skip].shape != dense[skip].shape or small[skip].ndim < 2:
        return 0.0
    if rows.places is not None and (len(dense[skip]), *dense[skip].shape[2:]) != rows.places.grid:
        return 0.0  # a skip path that is spread over the map
    lost = rows.of_output(dense[skip].astype(np.float32) - small[skip].astype(np.float32))
    return lost if lost.shape == t.shape else 0.0


def _refit(choice: Choice, factors: Factors, train: _Sums, held: _Sums, plain: _Sums) -> tuple[Factors, Choice, str]:
    """Choose among no refit and refits with several settings, by the held-out error.

    The present factors have seen the held-out samples; for a fair comparison they are fitted again to the
    original inputs of the others (``plain``).
    """
    site, technique = choice.proposal.site, choice.proposal.technique
    felt = technique.felt(choice.proposal.analysis)
    moments, unseen, everything, given = (
        dataclasses.replace(sums.moments(), felt=felt) for sums in (train, held, train + held, plain)
    )
    if train.rows == 0 or held.rows == 0:
        return factors, choice, "no rows to hold out"

    def error(made: Factors, on: Moments) -> float:
        return _output_error(choice, made, on)

    own_ridge = getattr(technique, "ridge", RIDGES[1])
    rival = technique.refit(site, choice.candidate, factors, given, own_ridge)
    best, setting = error(rival, unseen), None
    for mix in MIXES:
        for ridge in RIDGES:
            made = technique.refit(site, choice.candidate, factors, _mixed(choice, factors, moments, mix), ridge)
            measured = error(made, unseen)
            # Far above rounding: at full rank there is nothing to win, and the weight must stay what it was.
            if measured < 0.99 * best and best > 1e-9 * unseen.target_energy:
                best, setting = measured, (mix, ridge)
    note = "kept as it was: refitting did not help on held-out samples"
    if setting is not None:
        mix, ridge = setting
        factors = technique.refit(site, choice.candidate, factors, _mixed(choice, factors, everything, mix), ridge)
        note = f"{REFITTED}, mix {mix:g}, ridge {ridge:g}"
    wanted = everything.target_energy
    told = float(np.sqrt(max(error(factors, everything), 0.0) / wanted)) if wanted > 0 else 0.0
    told = technique.after_refit(site, choice.candidate, told)
    candidate = dataclasses.replace(
        choice.candidate, output_error=told, weight_error=_weight_error(choice, factors), felt_error=None
    )
    return factors, Choice(choice.proposal, candidate), note


def _mixed(choice: Choice, factors: Factors, moments: Moments, mix: float) -> Moments:
    """Ask partly for the original output, partly for what the original weight gives on the delivered input."""
    assert moments.target_cross is not None and moments.target_mean is not None
    if mix == 1.0:
        return moments
    joined = np.concatenate([part.weight.astype(np.float64) for part in _targets(choice)], axis=1)
    if len(joined) != len(moments.gram):
        joined, _ = choice.proposal.technique.effective(choice.proposal.site, choice.candidate, factors)
    return dataclasses.replace(
        moments,
        target_cross=mix * moments.target_cross + (1 - mix) * moments.gram @ joined,
        target_mean=mix * moments.target_mean + (1 - mix) * moments.mean @ joined,
    )


def _output_error(choice: Choice, factors: Factors, on: Moments) -> float:
    """E|t + b - (x̂ M + b̂)|² of the factors' map M and bias b̂."""
    assert on.target_cross is not None and on.target_mean is not None
    product, bias = choice.proposal.technique.effective(choice.proposal.site, choice.candidate, factors)
    error = on.target_energy - 2 * float(np.vdot(product, on.target_cross))
    error += float(np.vdot(product, on.gram @ product))
    if bias is not None:
        shift = bias.astype(np.float64) - _given_bias(_targets(choice))
        error += float(shift @ shift) - 2 * float(shift @ (on.target_mean - on.mean @ product))
    return error


def _given_bias(members: Sequence[Site]) -> Array:
    parts = []
    for part in members:
        bias = part.uses[0].bias
        parts.append(np.zeros(part.weight.shape[1]) if bias is None else bias.astype(np.float64))
    return np.concatenate(parts)


def _weight_error(choice: Choice, factors: Factors) -> float | None:
    joined = np.concatenate([part.weight.astype(np.float64) for part in _targets(choice)], axis=1)
    product, _ = choice.proposal.technique.effective(choice.proposal.site, choice.candidate, factors)
    if product.shape != joined.shape or not joined.any():
        return choice.candidate.weight_error
    return float(np.linalg.norm(joined - product) / np.linalg.norm(joined))


def _constants(choice: Choice, factors: Factors) -> dict[str, Array]:
    """The initializers a choice puts into the graph."""
    entry = choice.proposal
    return {
        tensor.name: np.asarray(tensor.values)
        for replacement in entry.technique.emit(entry.site, choice.candidate, factors)
        for node in replacement.nodes
        for tensor in node.inputs
        if isinstance(tensor, gs.Constant)
    }


def _helped(dense: Stream, small: Stream, start: Stream, masks: Sequence[Array | None], seen: int) -> bool:
    """Whether the refitted model is nearer to the original than the first one, on held-out samples."""
    for stream in (dense, small, start):
        del stream.values[:seen]
    kept = masks[seen:]
    answers = [
        [visible_outputs(entry, keep) for entry, keep in zip(stream.finish(), kept, strict=True)]
        for stream in (dense, small, start)
    ]
    return divergence(answers[0], answers[1]) <= divergence(answers[0], answers[2])
