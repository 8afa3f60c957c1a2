"""Find the cascade that costs least: its cheap level, its confidence and its threshold, judged by measured time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
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
from lowrank_onnx.rivals import Exam, Frontier, Static, advice, answers, feeds_of, find_static, judge
from lowrank_onnx.runtime import open_session
from lowrank_onnx.validation import Outputs, Timing, expected_timing, time_kinds

HELD_OUT = 0.4  # of the calibration data, for the threshold; the cheap level is fitted to the others
LEVELS = (0.93, 0.85, 0.7, 0.5, 0.3, 0.15)  # of the multiply-accumulates, where the target names no cheap level
_ATTEMPTS = 4  # of more caution, until the evaluation data agree
_MORE = 1.5  # times as many samples go on with each

Levels = Iterable[tuple[str, Callable[[], Selection]]]
"""Cheap levels: what a report calls them, and how they are made."""

Frontiers = Callable[[], Iterable[tuple[str, Frontier]]]
"""Where static models may lie, by the unit of their savings."""


@dataclass(frozen=True, eq=False)
class Cascade:
    """A cascade that pays.

    Attributes:
        label: What the cheap level is called.
        cheap: The cheap level.
        selection: The cheap level's choices with the whole cascade built; multiply-accumulates are expected ones.
        sessions: Original, cheap level and cascade.
        escalated: (held-out samples,) which of them go on.
        timing: Original and cascade, at batch 1, mean over the held-out samples.
        told: For the report.
    """

    label: str
    cheap: Selection
    selection: Selection
    sessions: tuple[Any, Any, Any]
    escalated: Array
    timing: Timing
    told: dict[str, Any]


@dataclass(frozen=True)
class Rival:
    """A level that agrees as often as asked without a cascade, and how much faster than the original it is."""

    label: str
    speedup: float
    static: Static

    def __str__(self) -> str:
        return (
            f"the level agrees on {self.static.agreement:.4f} alone and needs no cascade, at {self.speedup:.2f} times "
            "the speed of the original; ask for a smaller level, or leave --agreement out"
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


def find_cascade(problem: Problem, levels: Levels, held: Dataset, agreement: float, frontiers: Frontiers) -> Cascade:
    """Try the cheap levels, and return the cascade with the least expected cost, if no static model is as fast.

    Args:
        held: Samples the levels were not fitted to.
        frontiers: Asked for once there is a cascade.

    Raises:
        TargetError: None pays; the message tells each one's cost and share. Or a model without one that agrees as
            often is as fast; the message tells both times.
    """
    assert problem.calibrate is not None, "hold_out asks for samples"
    seen, reference = (answers(problem.session, data) for data in (problem.calibrate, held))
    names = tuple(name for name in score_outputs(reference) if len(reference[name]) == len(held))
    if not names:
        raise TargetError(f"--agreement {agreement:g} cannot be met: no output has one row of class scores a sample")
    exam = Exam(problem, held, names, agreement, seen, reference)
    found: list[Cascade] = []
    rivals: list[Rival] = []
    refused: list[str] = []
    for label, make in levels:
        try:
            cheap = make()
        except TargetError as error:
            refused.append(f"{label}: {error}")
            continue
        trial = _try(exam, label, cheap)
        if isinstance(trial, Cascade):
            found.append(trial)
        else:
            refused.append(f"{label}: {trial}")
        if isinstance(trial, Rival):
            rivals.append(trial)
    best = min(found, key=lambda entry: entry.told["expected_cost"], default=None)
    if best is not None:
        static, tried = find_static(exam, frontiers(), [rival.static for rival in rivals])
        return _raced(exam, best, static, tried)
    rival = max(rivals, key=lambda entry: entry.speedup, default=None)
    if rival is not None and len(refused) > 1:
        raise TargetError(
            f"--agreement {agreement:g}: no cascade pays; a model without one, of {rival.label}, is "
            f"{rival.speedup:.2f} times as fast as the original and agrees on {rival.static.agreement:.4f}: use that "
            "target without --agreement"
        )
    raise TargetError(f"--agreement {agreement:g}: no cascade pays; {'; '.join(refused)}")


def _raced(exam: Exam, best: Cascade, static: Static | None, tried: int) -> Cascade:
    """Time the cascade beside the original and the static model that agrees as often, and tell of both.

    The times it was chosen by are left behind: of several the least is the luckiest as well.

    Args:
        static: None where no model agrees.
        tried: How many were tried.

    Raises:
        TargetError: It is not faster than both for certain.
    """
    share = best.told["escalated"]
    kinds = [feeds_of(exam.held, np.flatnonzero(best.escalated == flag)) for flag in (False, True)]
    sessions = best.sessions if static is None else (*best.sessions, static.session)
    paces = time_kinds(sessions, kinds, [1 - share, share], exam.problem.seed)
    timing = paces.against(0)
    times = [latency.quiet for latency in timing.latencies]
    ratio = timing.ratios[2]
    costs = (
        f"--agreement {exam.agreement:g}: the best cascade, of {best.label}, takes {times[2]:.4f} ms expected "
        f"({share:.1%} of the samples go on) against {times[0]:.4f} ms of the original, "
        f"{ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
    )
    told = best.told | {
        "original_ms": times[0],
        "cheap_ms": times[1],
        "expected_ms": times[2],
        "expected_cost": 1 / ratio.value,
        "static_tried": tried,
        "static": None,
    }
    if static is not None:
        race = paces.against(3).ratios[2]
        cost, before = static.selection.cost, exam.problem.cost
        told["static"] = {
            "made_by": static.made_by,
            "option": advice(static, exam.problem, timing.ratios[3].value),
            "parameters": cost.parameters,
            "macs": cost.macs,
            "size_bytes": cost.size_bytes,
            "agreement_held_out": static.agreement,
            "agreement_evaluated": static.evaluated,
            "ms": times[3],
            "speedup": timing.ratios[3].value,
            "cascade_speedup": race.value,
            "cascade_speedup_low": race.low,
            "cascade_speedup_high": race.high,
        }
        if race.low <= 1:
            macs = (
                f" with {cost.macs / before.macs:.1%} of the multiply-accumulates" if cost.macs and before.macs else ""
            )
            raise TargetError(
                f"{costs}; but a model without one{macs} agrees on {static.agreement:.4f} of the same samples, by the "
                f"same rule, and takes {times[3]:.4f} ms: the cascade is {race.value:.2f} times as fast as that "
                f"({race.low:.2f} to {race.high:.2f}); use {told['static']['option']} without --agreement"
            )
    if ratio.low <= 1:
        raise TargetError(f"{costs}: timed once more, no cascade pays")
    pair = Timing((timing.latencies[0], timing.latencies[2]), (timing.ratios[0], ratio))
    return dataclasses.replace(best, timing=pair, told=told)


def _try(exam: Exam, label: str, cheap: Selection) -> Cascade | Rival | str:
    """The cascade of one cheap level; or that the level needs none; or why there is none."""
    problem, held, names, agreement = exam.problem, exam.held, exam.names, exam.agreement
    assert problem.calibrate is not None
    session = _open(problem, cheap.built.proto)
    found = answers(session, held)
    losses = disagreement(exam.reference, found, names)
    alone = 1 - float(losses.mean())
    fitted = answers(session, problem.calibrate)
    known = disagreement(exam.seen, fitted, names)
    gate = most_telling(fitted, known, names)
    # The samples of the fit agree more often if anything: where even they ask for more caution, the others were lucky.
    parts = [(confidence(part, gate), lost) for part, lost in ((found, losses), (fitted, known))]
    gate = dataclasses.replace(gate, threshold=common_threshold(parts, agreement))
    if gate.threshold == -math.inf:
        static = judge(exam, label, cheap)
        if static is not None:
            timing = expected_timing(
                [problem.session, session], [feeds_of(held, range(len(held)))], [1.0], problem.seed
            )
            return Rival(label, timing.ratios[1].value, static)
        gate = dataclasses.replace(gate, threshold=_quantile(found, gate, 0.0))
    told = ""
    rows = can_batch(problem.session, held) and can_batch(session, held)
    ranks = {name: exam.reference[name].ndim for name in names}
    for raised in range(_ATTEMPTS):
        escalated = confidence(found, gate) < gate.threshold
        share = float(escalated.mean())
        proto = build_cascade(problem.model.proto, cheap.built.proto, gate, ranks, rows)
        cascade = _open(problem, proto)
        kinds = [feeds_of(held, np.flatnonzero(escalated == flag)) for flag in (False, True)]
        timing = expected_timing([problem.session, session, cascade], kinds, [1 - share, share], problem.seed)
        times = [latency.quiet for latency in timing.latencies]
        costs = (
            f"it agrees on {alone:.4f} alone; {share:.1%} of the samples go on to the full model; expected "
            f"{times[2]:.4f} ms against {times[0]:.4f} ms of the original ({times[1]:.4f} ms the cheap level alone)"
        )
        if timing.ratios[2].low <= 1:
            ratio = timing.ratios[2]
            return f"{costs}: {ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
        evaluated = exam.evaluated(cascade)
        if evaluated is not None and evaluated < agreement:
            told = f"{costs}; agreement on the evaluation data {evaluated:.4f}"
            gate = dataclasses.replace(gate, threshold=_quantile(found, gate, _MORE * share))
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
        selection = dataclasses.replace(cheap, built=built, cost=cost)
        return Cascade(label, cheap, selection, (problem.session, session, cascade), escalated, pair, row)
    return told


def _quantile(found: dict[str, Array], gate: Gate, share: float) -> float:
    """The threshold that sends a share of the samples on, one more than before at least."""
    sure = np.sort(confidence(found, gate))
    before = int((sure < gate.threshold).sum())
    place = min(max(round(share * len(sure)), before + 1), len(sure) - 1)
    return float((sure[place - 1] + sure[place]) / 2)


def _open(problem: Problem, proto: ModelProto) -> Any:
    return open_session(proto, problem.runtime, problem.model.folder, what="the rewritten model")
