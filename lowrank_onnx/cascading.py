"""Find the cascade that costs least: its cheap level, its confidence and its threshold, judged by measured time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto

from lowrank_onnx.batches import can_batch
from lowrank_onnx.budget import Selection
from lowrank_onnx.building import Built
from lowrank_onnx.cascade import (
    Gate,
    build_cascade,
    common_threshold,
    confidence,
    disagreement,
    fewest_samples,
    most_telling,
    score_outputs,
)
from lowrank_onnx.cost import Cost
from lowrank_onnx.data import Dataset
from lowrank_onnx.errors import DataError, LowRankError, TargetError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import parameter_count, saved_size
from lowrank_onnx.problem import Problem, training_data
from lowrank_onnx.runtime import open_session
from lowrank_onnx.validation import Collector, Outputs, Timing, expected_timing

HELD_OUT = 0.4  # of the calibration data, for the threshold; the cheap level is fitted to the others
LEVELS = (0.93, 0.85, 0.7, 0.5, 0.3, 0.15)  # of the multiply-accumulates, where the target names no cheap level
_ATTEMPTS = 4  # of more caution, until the evaluation data agree
_MORE = 1.5  # times as many samples go on with each
_TIMED = 64  # samples of each kind

Levels = Iterable[tuple[str, Callable[[], Selection]]]
"""Cheap levels: what a report calls them, and how they are made."""


@dataclass(frozen=True, eq=False)
class Cascade:
    """A cascade that pays.

    Attributes:
        label: What the cheap level is called.
        cheap: The cheap level.
        selection: The cheap level's choices with the whole cascade built; multiply-accumulates are expected ones.
        timing: Original and cascade, at batch 1, mean over the held-out samples.
        told: For the report.
    """

    label: str
    cheap: Selection
    selection: Selection
    timing: Timing
    told: dict[str, Any]


@dataclass(frozen=True)
class Rival:
    """A level that agrees as often as asked without a cascade, and how much faster than the original it is."""

    label: str
    speedup: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"the level agrees on {self.agreement:.4f} alone and needs no cascade, at {self.speedup:.2f} times the "
            "speed of the original; ask for a smaller level, or leave --agreement out"
        )


def check_agreement(agreement: float) -> float:
    """Return the wish if it is one.

    Raises:
        LowRankError: It is not in (0, 1).
    """
    if not 0 < agreement < 1:
        raise LowRankError(
            f"--agreement must be in (0, 1), got {agreement:g}; it is the share of samples that keep their answer"
        )
    return agreement


def hold_out(problem: Problem, agreement: float, mask: str | None, augment: bool) -> tuple[Problem, Dataset]:
    """Divide the calibration data: the problem keeps what the cheap level is fitted to.

    Raises:
        DataError: There are none, or too few.
        TargetError: No output looks like class scores.
    """
    data = problem.calibrate
    if data is None:
        raise DataError("--agreement needs samples to choose its threshold on; give --calibrate DATA")
    held = round(HELD_OUT * len(data))
    fewest = fewest_samples(agreement)
    if held < fewest:
        raise DataError(
            f"--agreement {agreement:g} needs {math.ceil(fewest / HELD_OUT)} calibration samples, found {len(data)}: "
            f"{HELD_OUT:.0%} of them choose the threshold, and fewer than {fewest} cannot tell a disagreement of "
            f"{1 - agreement:.2g}"
        )
    answers = next(iter(Outputs(problem.session, data.subset(range(min(len(data), 8))))))
    if not score_outputs(answers):
        shapes = ", ".join(f"'{name}' {list(value.shape)}" for name, value in answers.items())
        raise TargetError(
            f"--agreement {agreement:g} cannot be met: no output looks like class scores, whose confidence could tell "
            f"which samples need the full model; found {shapes}"
        )
    order = np.random.default_rng(problem.seed).permutation(len(data)).tolist()
    fitted = data.subset(sorted(order[held:]))
    training = training_data(problem.session, fitted, problem.sites, mask, problem.seed, augment)
    return dataclasses.replace(problem, calibrate=fitted, training=training), data.subset(sorted(order[:held]))


def find_cascade(problem: Problem, levels: Levels, held: Dataset, agreement: float) -> Cascade:
    """Try the cheap levels, and return the cascade with the least expected cost.

    Args:
        held: Samples the levels were not fitted to.

    Raises:
        TargetError: None pays; the message tells each one's cost and share.
    """
    assert problem.calibrate is not None, "hold_out asks for samples"
    seen, reference = (_answers(problem.session, data) for data in (problem.calibrate, held))
    names = tuple(name for name in score_outputs(reference) if len(reference[name]) == len(held))
    if not names:
        raise TargetError(f"--agreement {agreement:g} cannot be met: no output has one row of class scores a sample")
    found: list[Cascade] = []
    rivals: list[Rival] = []
    refused: list[str] = []
    for label, make in levels:
        try:
            cheap = make()
        except TargetError as error:
            refused.append(f"{label}: {error}")
            continue
        trial = _try(problem, label, cheap, held, (seen, reference), names, agreement)
        if isinstance(trial, Cascade):
            found.append(trial)
        else:
            refused.append(f"{label}: {trial}")
        if isinstance(trial, Rival):
            rivals.append(trial)
    best = min(found, key=lambda entry: entry.told["expected_cost"], default=None)
    rival = max(rivals, key=lambda entry: entry.speedup, default=None)
    if (
        rival is not None
        and len(refused) + len(found) > 1
        and (best is None or rival.speedup * best.told["expected_cost"] >= 1)
    ):
        told = (
            ""
            if best is None
            else f"the best, of {best.label}, is {1 / best.told['expected_cost']:.2f} times as fast; "
        )
        raise TargetError(
            f"--agreement {agreement:g}: no cascade pays; {told}a model without one, of {rival.label}, is "
            f"{rival.speedup:.2f} times as fast as the original and agrees on {rival.agreement:.4f}: use that target "
            "without --agreement"
        )
    if best is None:
        raise TargetError(f"--agreement {agreement:g}: no cascade pays; {'; '.join(refused)}")
    return best


def _try(
    problem: Problem,
    label: str,
    cheap: Selection,
    held: Dataset,
    exact: tuple[dict[str, Array], dict[str, Array]],
    names: Sequence[str],
    agreement: float,
) -> Cascade | Rival | str:
    """The cascade of one cheap level; or that the level needs none; or why there is none.

    Args:
        exact: What the original answers to the samples the level was fitted to, and to ``held``.
    """
    assert problem.calibrate is not None
    seen, reference = exact
    session = _open(problem, cheap.built.proto)
    answers = _answers(session, held)
    losses = disagreement(reference, answers, names)
    alone = 1 - float(losses.mean())
    fitted = _answers(session, problem.calibrate)
    known = disagreement(seen, fitted, names)
    gate = most_telling(fitted, known, names)
    # The samples of the fit agree more often if anything: where even they ask for more caution, the others were lucky.
    parts = [(confidence(part, gate), lost) for part, lost in ((answers, losses), (fitted, known))]
    gate = dataclasses.replace(gate, threshold=common_threshold(parts, agreement))
    if gate.threshold == -math.inf:
        static = expected_timing([problem.session, session], [_feeds(held, range(len(held)))], [1.0], problem.seed)
        reached = alone if problem.evaluate is None else _agreement(problem, session, names)
        if reached >= agreement:
            return Rival(label, static.ratios[1].value, alone)
        gate = dataclasses.replace(gate, threshold=_quantile(answers, gate, 0.0))
    told = ""
    rows = can_batch(problem.session, held) and can_batch(session, held)
    ranks = {name: reference[name].ndim for name in names}
    for raised in range(_ATTEMPTS):
        escalated = confidence(answers, gate) < gate.threshold
        share = float(escalated.mean())
        proto = build_cascade(problem.model.proto, cheap.built.proto, gate, ranks, rows)
        cascade = _open(problem, proto)
        kinds = [_feeds(held, np.flatnonzero(escalated == flag)) for flag in (False, True)]
        timing = expected_timing([problem.session, session, cascade], kinds, [1 - share, share], problem.seed)
        times = [latency.quiet for latency in timing.latencies]
        costs = (
            f"it agrees on {alone:.4f} alone; {share:.1%} of the samples go on to the full model; expected "
            f"{times[2]:.4f} ms against {times[0]:.4f} ms of the original ({times[1]:.4f} ms the cheap level alone)"
        )
        if timing.ratios[2].low <= 1:
            ratio = timing.ratios[2]
            return f"{costs}: {ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
        evaluated: float | None = None
        if problem.evaluate is not None:
            evaluated = _agreement(problem, cascade, names)
            if evaluated < agreement:
                told = f"{costs}; agreement on the evaluation data {evaluated:.4f}"
                gate = dataclasses.replace(gate, threshold=_quantile(answers, gate, _MORE * share))
                continue
        macs = None
        if problem.cost.macs is not None and cheap.cost.macs is not None:
            macs = round(cheap.cost.macs + share * problem.cost.macs)
        built = Built(proto, cheap.built.factors, saved_size(proto))
        cost = Cost(parameter_count(proto), built.size_bytes, macs)
        row = {
            "agreement": agreement,
            "level": label,
            "confidence": gate.kind,
            "outputs": list(gate.outputs),
            "threshold": gate.threshold,
            "normalized": gate.normalized,
            "rows": rows,
            "escalated": share,
            "agreement_held_out": 1 - float(losses[~escalated].sum()) / len(losses),
            "agreement_alone": alone,
            "agreement_evaluated": evaluated,
            # Above 0 the evaluation data took part in the choice, and their agreement is no held-out figure.
            "raised_on_evaluation": raised,
            "held_out_samples": len(held),
            "original_ms": times[0],
            "cheap_ms": times[1],
            "expected_ms": times[2],
            "expected_cost": 1 / timing.ratios[2].value,
        }
        pair = Timing((timing.latencies[0], timing.latencies[2]), (timing.ratios[0], timing.ratios[2]))
        return Cascade(label, cheap, dataclasses.replace(cheap, built=built, cost=cost), pair, row)
    return told


def _quantile(answers: dict[str, Array], gate: Gate, share: float) -> float:
    """The threshold that sends a share of the samples on, one more than before at least."""
    sure = np.sort(confidence(answers, gate))
    before = int((sure < gate.threshold).sum())
    place = min(max(round(share * len(sure)), before + 1), len(sure) - 1)
    return float((sure[place - 1] + sure[place]) / 2)


def _agreement(problem: Problem, session: Any, names: Sequence[str]) -> float:
    """Agreement with the original on the evaluation data."""
    assert problem.evaluate is not None
    exact, seen = _answers(problem.session, problem.evaluate), _answers(session, problem.evaluate)
    return 1 - float(disagreement(exact, seen, names).mean())


def _feeds(data: Dataset, places: Iterable[int]) -> list[dict[str, Array]]:
    return [data.feeds(int(place)) for place, _ in zip(places, range(_TIMED), strict=False)]


def _answers(session: Any, data: Dataset) -> dict[str, Array]:
    """Outputs of all samples, joined on axis 0."""
    runs = Outputs(session, data)
    kept = Collector(len(data))
    for outputs in runs:
        kept.add(outputs, runs.size)
    return kept.take()


def _open(problem: Problem, proto: ModelProto) -> Any:
    return open_session(proto, problem.runtime, problem.model.folder, what="the rewritten model")
