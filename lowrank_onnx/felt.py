"""What is felt of an error: how much the model's outputs change with the output of one convolution.

    H[o, p] = E[(∂out/∂y_o) · (∂out/∂y_p)]     so that an error e of the layer's output costs about eᵀ H e

Measured, as there are no gradients: one channel at a time is shaken by random signs over all positions, and what
comes out is compared. With the same signs for every channel the products of two answers give the entries between
them (Hutchinson's estimate); signs of different positions cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lowrank_onnx.base import Site
from lowrank_onnx.batches import batches, by_length
from lowrank_onnx.linalg import Array
from lowrank_onnx.probes import visible_outputs
from lowrank_onnx.problem import Problem
from lowrank_onnx.statistics import Progress, padding_mask
from lowrank_onnx.stream import Stream, levels
from lowrank_onnx.validation import safe_batch

STEP = 0.2  # of the channel's deviation: about what a rank takes away, so that kinks count as they will
SAMPLES = 256  # for one layer, at most
_FEWEST = 4  # samples; fewer say more about themselves than about the layer
_MACS = 1e12  # for all layers, about half a minute's work
_LIVE_BYTES = 256 * 2**20  # of the widest output
_ELEMENTS = 65_536  # of the outputs of one batch, a random sample
_BATCH = 16
_SHOWN = 3  # names of layers in a message


def felt_of(
    problem: Problem, sites: Sequence[Site], mask: str | None, progress: Progress | None = None
) -> dict[str, Array]:
    """Measure H (O, O) by name of the site, on a few calibration samples; only its proportions mean something.

    Sites with several uses, inside a subgraph or at the end of the model are left out, and so are those where a
    few samples would take too long: the work grows with channels times what lies behind them.
    """
    data = problem.genuine
    samples = {} if data is None else _samples(sites, len(data))
    if data is None or not samples:
        return {}
    picked = np.random.default_rng(problem.seed).permutation(len(data))[: max(samples.values())]
    subset = data.subset(by_length(data, picked.tolist()))
    size = min(safe_batch(problem.session, subset), _BATCH, math.ceil(len(subset) / 2))
    parts = list(batches(len(subset), size))
    stream = Stream(problem.model.proto, subset, parts, problem.runtime, problem.model.folder)
    masks = [padding_mask(entry, mask) for entry in stream.values]
    chosen = [site for site in sites if site.name in samples]
    found = {}
    done = 0
    for group in levels(stream, [(place, (site,)) for place, site in enumerate(chosen)]):
        stream.advance([chosen[place].uses[0].output for place, _ in group])
        for place, _ in group:
            site = chosen[place]
            count = math.ceil(samples[site.name] / size)
            # Spread over all: samples of like length stand side by side.
            used = np.unique(np.linspace(0, len(parts) - 1, max(count, 2)).round().astype(int)).tolist()
            felt = _felt(stream, site.uses[0].output, used, masks, (problem.seed, place))
            if felt is not None:
                found[site.name] = felt
            done += 1
            if progress is not None:
                progress("feel", done, len(chosen))
    return found


def left_out(problem: Problem, sites: Sequence[Site]) -> str:
    """Tell in a clause which of the layers given to ``felt_of`` it leaves out, and why; empty where it takes all."""
    data = problem.genuine
    samples = {} if data is None else _samples(sites, len(data))
    names = [site.name for site in sites if site.name not in samples]
    if data is None or not names:
        return ""
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    if len(data) < _FEWEST:
        why = f"what the model feels of them takes {_FEWEST} calibration samples at least, and there are {len(data)}"
    else:
        why = "measuring what the model feels of them would take too long, or is not possible where they stand"
    return f"errors of all output channels count alike in {shown}: {why}"


def _samples(sites: Sequence[Site], most: int) -> dict[str, int]:
    """How many samples to shake a layer on, by name: all get the same time, and a channel costs what lies behind it."""
    chosen = [site for site in sites if len(site.uses) == 1 and not site.uses[0].scope and site.uses[0].output_shape]
    widest = max((4 * math.prod(site.uses[0].output_shape or ()) for site in chosen), default=1)
    most = min(most, SAMPLES, _LIVE_BYTES // widest)
    behind, found = 0, {}
    for site in reversed(chosen):  # in the order of the model
        shape = site.uses[0].output_shape
        assert shape is not None
        one = max(behind, site.macs or 1) * shape[1]
        found[site.name] = int(min(_MACS / len(chosen) / one, most))
        behind += site.macs or 0
    return {name: count for name, count in found.items() if count >= _FEWEST}


def _felt(
    stream: Stream, name: str, used: Sequence[int], masks: Sequence[Array | None], seed: tuple[int, int]
) -> Array | None:
    """H of one tensor (batch, O, *spatial), on some of the batches; None where no output depends on it."""
    call = stream.behind(name)
    if call is None:
        return None
    given = [np.moveaxis(stream.values[batch][name], 1, 0) for batch in used]
    deviation = np.concatenate([value.reshape(len(value), -1) for value in given], axis=1).std(axis=1, dtype=np.float64)
    if not deviation.max() > 0:
        return None
    # A channel that never moves is shaken all the same: what replaces it may move.
    steps = STEP * np.maximum(deviation, 1e-2 * deviation.max())
    halves = np.zeros((2, len(steps), len(steps)))
    for turn, batch in enumerate(used):
        rng = np.random.default_rng([*seed, batch])
        changes = _shaken(call, batch, stream.values[batch][name], masks[batch], steps, rng)
        halves[turn % 2] += changes @ changes.T
    return agreed(halves)


def _shaken(
    call: Callable[[int, Array], Mapping[str, Array]],
    batch: int,
    given: Array,
    keep: Array | None,
    steps: Array,
    rng: np.random.Generator,
) -> Array:
    """(O, n) what becomes of n numbers of the outputs when one channel after the other is shaken, by unit of step."""
    signs = rng.choice(np.array([-1, 1], given.dtype), (len(given), *given.shape[2:]))
    reference = visible_outputs(call(batch, given), keep)
    scales = {key: 1 / max(float(np.linalg.norm(value)), 1e-30) for key, value in reference.items()}
    picks = {
        key: rng.choice(value.size, _ELEMENTS, replace=False) if value.size > _ELEMENTS else slice(None)
        for key, value in reference.items()
    }
    answers = []
    for channel, step in enumerate(steps):
        moved = given.copy()
        moved[:, channel] += signs * given.dtype.type(step)
        made = visible_outputs(call(batch, moved), keep)
        parts = [(made[key] - reference[key]).ravel()[picks[key]] * (scales[key] / step) for key in reference]
        answers.append(np.concatenate(parts))
    return np.stack(answers)


def agreed(halves: Array) -> Array | None:
    """The sum of two estimates (2, O, O), with what stands off the diagonal cut to the share both agree on.

    Noise raises the energy of the sum, and not the product of the two (as Schäfer & Strimmer 2005 shrink
    correlations, their variance taken from the halves).
    """
    total = halves[0] + halves[1]
    diagonal = np.diag(np.diag(total))
    if not np.isfinite(total).all() or not np.trace(total) > 0:
        return None
    scale = np.sqrt(np.maximum(np.diag(total), 1e-12 * np.trace(total)))
    first, second = (half / np.outer(scale, scale) * (1 - np.eye(len(scale))) for half in halves)
    energy = float(np.sum((first + second) ** 2))
    share = min(max(4 * float(np.vdot(first, second)) / energy, 0.0), 1.0) if energy > 0 else 0.0
    return np.asarray(diagonal + share * (total - diagonal))
