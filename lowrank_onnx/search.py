"""Targets that only the finished model can tell: a speed-up, or the most a metric may lose.

Both walk along one frontier, the allocations of growing savings, and measure whole models on the way.
Choices see calibration data only; the evaluation data have the last word, and can only make the result
more cautious.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lowrank_onnx.allocation import Option, allocate, largest_saving
from lowrank_onnx.base import Candidate, Site
from lowrank_onnx.budget import Damage, Selection, carry_out, options_for
from lowrank_onnx.building import Choice
from lowrank_onnx.data import Dataset
from lowrank_onnx.errors import MetricError, TargetError
from lowrank_onnx.latency import total_latency_us
from lowrank_onnx.metrics import Fidelity
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.runtime import open_session
from lowrank_onnx.statistics import Progress
from lowrank_onnx.validation import Accuracy, Ratio, benchmark, compare

Value = Callable[[Site, Candidate], float]
Finish = Callable[[Selection], Selection]
"""Refinement: the last step of a candidate model before it is judged."""

_MEASURED_SAMPLES = 256
_STEPS = 5
_REFINED_STEPS = 3
_SPEED_STEPS = 8
_CONFIRMED = 5  # models held against the evaluation data
_WORTH = 1.01  # times as fast, for certain: by less a measurement is taken back by the next one
_SECONDS = 2.5


def drop_of(accuracy: Accuracy) -> float:
    """The relative loss a target speaks of: of the metric, or of the fidelity to the original.

    Of the fidelity it is the larger of 1 - cosine and 1 - agreement.
    """
    if accuracy.metric is not None:
        return accuracy.metric.relative_drop
    return fidelity_loss(accuracy.fidelity)


def fidelity_loss(fidelity: Fidelity) -> float:
    """The larger of 1 - cosine and 1 - agreement."""
    losses = [1 - value for value in (fidelity.cosine, fidelity.agreement) if value is not None]
    return max(losses, default=0.0)


def reach_speedup(
    problem: Problem,
    proposals: Sequence[Proposal],
    damage: Damage,
    value: Value,
    wish: float,
    finish: Finish,
    progress: Progress | None,
) -> Selection:
    """Find the least damage at which the finished model is measured ``wish`` times faster.

    The lower end of the interval has to reach the wish.

    Raises:
        TargetError: No allocation is that fast; the message tells the fastest.
    """
    options = options_for(proposals, value, damage)
    total = total_latency_us(problem)
    most = largest_saving(options)
    needed = min(total * (1 - 1 / wish), most * (1 - 1e-9))
    lower, best, fastest = 0.0, None, 1.0
    upper = most
    for step in range(_SPEED_STEPS):
        selection = at_saving(problem, options, needed)
        if selection is None:
            break
        ratio = _speed(problem, selection)
        fastest = max(fastest, ratio.low)
        if progress is not None:
            progress("search", step + 1, _SPEED_STEPS)
        reached = needed
        if ratio.low >= wish:
            best, upper = selection, needed
            # Close enough: the next step would move by less than the noise.
            if ratio.low <= wish * 1.03 or upper - lower < 0.01 * total:
                break
        else:
            lower = needed
            if lower >= most * (1 - 1e-6):
                break
        needed = _next(total, wish, ratio.value, reached, lower, upper, best is not None)
    if best is None:
        raise TargetError(
            f"--speedup {wish:g} cannot be met: {fastest:.2f} is the most that was measured (lower end of the 95 % "
            "interval) with the techniques in use"
        )
    return finish(best)


def _next(
    total: float, wish: float, measured: float, needed: float, lower: float, upper: float, bracketed: bool
) -> float:
    """The next saving to ask for: by the rule of three on what was measured, kept inside the bracket."""
    saved = max(total * (1 - 1 / max(measured, 1.001)), 1e-9)
    guess = needed * (total * (1 - 1 / (wish * 1.015))) / saved
    low, high = (lower + 0.1 * (upper - lower), upper - 0.1 * (upper - lower)) if bracketed else (lower * 1.02, upper)
    return float(min(max(guess, low), high))


def stay_within(
    problem: Problem,
    proposals: Sequence[Proposal],
    damage: Damage,
    value: Value,
    unit: str,
    wish: float,
    finish: Finish,
    progress: Progress | None,
) -> Selection:
    """Find the largest saving at which the metric loses at most ``wish``, relatively.

    Raises:
        TargetError: Nothing helps within the wish.
    """
    if problem.calibrate is None and problem.evaluate is None:
        raise TargetError(
            f"--max-drop {wish:g} cannot be judged without data; give --calibrate DATA, or a target that needs none, "
            "such as --keep-params 0.8"
        )
    options = options_for(proposals, value, damage)
    judge = _Judge(problem, wish)
    most = largest_saving(options)
    if most <= 0:
        raise TargetError(f"--max-drop {wish:g}: no layer gets better in {unit} by any rank on the grid; nothing helps")
    good, bad, share = 0.0, 1.0, 0.4
    best: Selection | None = None
    known: dict[float, float] = {}
    for step in range(_STEPS + _REFINED_STEPS):
        # Refining costs more than all the rest: first find the neighbourhood without it.
        refining = step >= _STEPS
        if refining:
            share = good if best is None and good > 0 else (good + bad) / 2
        selection = at_saving(problem, options, share * most)
        if selection is not None and refining:
            selection = finish(selection)
        if selection is not None:
            known[share] = judge.on_calibration(selection)
        fits = selection is not None and known[share] <= judge.allowed
        if progress is not None:
            progress("search", step + 1, _STEPS + _REFINED_STEPS)
        if fits:
            good, best = share, selection if refining else best
            if refining:
                bad = max(bad, min(1.0, 1.15 * share))
        else:
            # What fitted only without being refined may have done so by luck.
            bad, good = share, good if best is not None else min(good, 0.8 * share)
        share = (good + bad) / 2

    def retry(share: float) -> Selection | None:
        made = at_saving(problem, options, share * most)
        return None if made is None or not made.choices else finish(made)

    return _confirmed(problem, good, best, known, judge, unit, retry)


def _confirmed(
    problem: Problem,
    share: float,
    best: Selection | None,
    known: Mapping[float, float],
    judge: _Judge,
    unit: str,
    retry: Callable[[float], Selection | None],
) -> Selection:
    """Hold the result against the evaluation data and the clock; step back while it falls short.

    Args:
        share: The saving of ``best``, as a share of the largest.
        known: Drops on calibration data by saving, with which a shortfall tells how far to step back.
        retry: Makes the model of another saving.
    """
    told, least = "every rank on the grid loses more", math.inf
    for _ in range(_CONFIRMED):
        if best is None:
            break
        drop = judge.at_the_end(best)
        if drop <= judge.wish:
            if unit != "latency":
                return best
            ratio = _speed(problem, best, 2 * _SECONDS)
            if ratio.low > _WORTH:
                return best
            told = f"the best within it is {ratio.value:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})"
            share *= 0.6
        else:
            least = min(least, drop)
            told = f"{least:.4f} is the least drop measured on the evaluation data"
            share = _step_back(known, share, 0.9 * judge.wish / drop)
        best = retry(share)
    raise TargetError(f"--max-drop {judge.wish:g} leaves nothing to gain in {unit}: {told}")


def _step_back(known: Mapping[float, float], share: float, factor: float) -> float:
    """The saving at which the drop is ``factor`` times that at ``share``, by how the known drops fall.

    Evaluation data are taken to lose a constant multiple of what calibration data lose.
    """
    shares = np.log(np.array(sorted(known)))
    drops = np.log(np.maximum(np.maximum.accumulate([known[key] for key in sorted(known)]), 1e-12))
    drops += 1e-9 * np.arange(len(drops))  # rising, not only never falling
    wanted = float(np.interp(math.log(share), shares, drops)) + math.log(factor)
    found = math.exp(float(np.interp(wanted, drops, shares)))
    return min(max(found, 0.5 * share), 0.95 * share)


class _Judge:
    """Measures the drop of a model on the calibration data, and on the evaluation data at the end."""

    def __init__(self, problem: Problem, wish: float) -> None:
        self.problem, self.wish = problem, wish
        # A little less than the wish: calibration data are not the evaluation data.
        self.allowed = 0.8 * wish
        self.subset = _sample(problem.calibrate if problem.calibrate is not None else problem.evaluate, problem.seed)
        self.metric_on_calibration = self._usable()

    def _usable(self) -> bool:
        """Whether the metric can be computed on the calibration data, which may have no labels."""
        if self.problem.metric is None:
            return False
        try:
            compare(self.problem.session, self.problem.session, self.subset, self.problem.metric)
        except MetricError:
            return False
        return True

    def on_calibration(self, selection: Selection) -> float:
        """The drop on calibration samples; of the fidelity where the metric needs labels that are not there."""
        metric = self.problem.metric if self.metric_on_calibration else None
        accuracy = compare(self.problem.session, _open(self.problem, selection), self.subset, metric)
        if metric is None and self.problem.metric is not None:
            return _proxy(accuracy.fidelity)
        # A metric on few samples may rise by luck; the fidelity does not.
        return max(drop_of(accuracy), _proxy(accuracy.fidelity)) if metric else drop_of(accuracy)

    def at_the_end(self, selection: Selection) -> float:
        """The drop on the data of the last line."""
        data = self.problem.judged_on
        assert data is not None
        return drop_of(compare(self.problem.session, _open(self.problem, selection), data, self.problem.metric))


def _proxy(fidelity: Fidelity) -> float:
    """What a metric may lose, guessed from the fidelity alone."""
    return 0.1 * fidelity_loss(fidelity)


def _sample(data: Dataset | None, seed: int) -> Dataset:
    assert data is not None
    if len(data) <= _MEASURED_SAMPLES:
        return data
    return data.subset(sorted(np.random.default_rng(seed).permutation(len(data))[:_MEASURED_SAMPLES].tolist()))


def _open(problem: Problem, selection: Selection) -> Any:
    return open_session(
        selection.built.proto, problem.runtime, problem.model.folder, what="the rewritten model", timed=True
    )


def _speed(problem: Problem, selection: Selection, seconds: float = _SECONDS) -> Ratio:
    feeds = problem.require_feeds("a speed-up").values
    sessions = [problem.session, _open(problem, selection)]
    return benchmark(sessions, feeds, problem.runtime, problem.seed, seconds).ratios[1]


def at_saving(problem: Problem, options: Sequence[Option], needed: float) -> Selection | None:
    """The least damage that saves as much, carried out; None where nothing does."""
    allocation = allocate(options, needed)
    if allocation is None or not allocation.chosen:
        return None
    return carry_out(problem, [entry.key for entry in allocation.chosen if isinstance(entry.key, Choice)])
