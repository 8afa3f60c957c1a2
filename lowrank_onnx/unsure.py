"""Results that tell how sure they are: posteriors of the layers, and outputs with a predicted deviation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from lowrank_onnx.budget import Selection, amount, weigh
from lowrank_onnx.building import Built
from lowrank_onnx.data import Dataset
from lowrank_onnx.deciding import Planned, decide
from lowrank_onnx.errors import TargetError
from lowrank_onnx.finishing import Result, finish
from lowrank_onnx.judging import stddev_report
from lowrank_onnx.model import saved_size
from lowrank_onnx.posteriors import arrays_of, layer_posteriors
from lowrank_onnx.run import Run
from lowrank_onnx.spread import check_outputs, emit_stddev, hold_out
from lowrank_onnx.stddev import Spread
from lowrank_onnx.target import BUDGETS, Target

_ATTEMPTS = 4  # to leave room for added outputs in a budget


def compress_unsure(
    run: Run,
    target: Target,
    option: str,
    layers: bool,
    outputs: Sequence[str] | None,
    labels: Sequence[str] | None,
) -> Result:
    """Compress with samples held out, and tell by them how sure layers and outputs are.

    Args:
        run: The run.
        target: The target.
        option: What asked for it, as the command line spells it.
        layers: Whether to tell of every layer.
        outputs: Outputs that get a standard deviation, all of floating-point numbers if empty; None adds none.
        labels: Names of rows of non-negative factors.

    Raises:
        TargetError: The target cannot be met, or not with the added outputs.
    """
    mask = run.settings.mask
    emitted = () if outputs is None else check_outputs(run.problem, outputs)
    fitted, held = hold_out(run.problem, option, mask, run.settings.augment)
    # What is left of errors behind such a fit is what no layer tells of: the deviation would be predicted worse.
    run = dataclasses.replace(run, problem=fitted, settings=dataclasses.replace(run.settings, felt=False))
    planned = decide(run, target)
    plain, spreads = planned.selection, list[Spread]()
    if emitted:
        planned, plain, spreads = _with_stddev(run, target, planned, held, emitted)
    result = finish(run, target, planned, labels)
    section: dict[str, Any] = {"held_out_samples": len(held)}
    if emitted:
        reached = result.report["ratio"]["speedup"]
        if target.kind == "speedup" and reached is not None and reached < target.value:
            raise TargetError(
                f"--speedup {target.value:g} cannot be met with --emit-uncertainty: {reached:.2f} is what the model "
                "with the added outputs reaches; ask for a higher speed-up, or name fewer outputs"
            )
        with run.clock.step("uncertainty"):
            section |= stddev_report(fitted, plain, planned.selection, spreads, held, mask)
    if layers:
        with run.clock.step("uncertainty"):
            found, reasons = layer_posteriors(fitted, plain, held, mask)
        section |= {"layers": [layer.as_dict() for layer in found], "without": reasons}
        result = dataclasses.replace(result, posteriors=arrays_of(found))
    result.plan["setting"]["held_out"] = "--emit-uncertainty" if emitted else "--uncertainty"
    result.report["uncertainty"] = section
    result.report["seconds"] |= run.clock.total()
    return result


def _with_stddev(
    run: Run, target: Target, planned: Planned, held: Dataset, outputs: tuple[str, ...]
) -> tuple[Planned, Selection, list[Spread]]:
    """Add the outputs; what they cost is part of a budget, so that the rest gets less of it.

    Raises:
        TargetError: Nothing is left for the rest.
    """
    problem, asked = run.problem, target
    added, refused = 0.0, ""
    for _ in range(_ATTEMPTS):
        plain = planned.selection
        with run.clock.step("uncertainty"):
            proto, spreads = emit_stddev(problem, plain, held, outputs, run.settings.mask, run.progress)
            built = Built(proto, plain.built.factors, saved_size(proto))
            whole = dataclasses.replace(plain, built=built, cost=weigh(problem, built))
        made = Planned(whole, planned.refusals)
        if target.kind not in BUDGETS:
            return made, plain, spreads
        before, kind = amount(problem.cost, target.kind), target.kind
        added = (amount(whole.cost, kind) - amount(plain.cost, kind)) / before
        if amount(whole.cost, kind) <= target.value * before:
            return made, plain, spreads
        if added >= target.value:
            break
        asked = dataclasses.replace(asked, value=min(target.value - added, 0.98 * asked.value))
        try:
            planned = decide(run, asked)
        except TargetError as error:
            refused = f" ({error})"
            break
    raise TargetError(
        f"{target.option} cannot be met with --emit-uncertainty: the added outputs take {added:.3f} of the original, "
        f"and what is left is too little for the rest{refused}; name fewer outputs, or leave the option out"
    )
