"""What is felt of an error: how much the model's outputs change with the output of one convolution.

    H[o, p] = E[(∂out/∂y_o) · (∂out/∂y_p)]     so that an error e of the layer's output costs about eᵀ H e

Measured, as there are no gradients: one channel at a time is shaken by random signs over all positions, and what
comes out is compared. With the same signs for every channel the products of two answers give the entries between
them (Hutchinson's estimate); signs of different positions cancel.
"""

from __future__ import annotations

from collections.abc import Sequence

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
SAMPLES = 32
_FEWEST = 4  # samples; fewer say more about themselves than about the layer
_MACS = 1e12  # about half a minute's work
_ELEMENTS = 65_536  # of the outputs of one batch, a random sample


def felt_of(
    problem: Problem, sites: Sequence[Site], mask: str | None, progress: Progress | None = None
) -> dict[str, Array]:
    """Measure H (O, O) by name of the site, on a few calibration samples; only its proportions mean something.

    Sites with several uses, inside a subgraph or at the end of the model are left out. So are all where the
    measurement would take too long, which grows with channels times multiply-accumulates.
    """
    data = problem.genuine
    chosen = [site for site in sites if len(site.uses) == 1 and not site.uses[0].scope]
    samples = 0 if data is None else min(_affordable(chosen), SAMPLES, len(data))
    if data is None or samples < _FEWEST:
        return {}
    picked = np.sort(np.random.default_rng(problem.seed).permutation(len(data))[:samples])
    subset = data.subset(by_length(data, picked.tolist()))
    parts = list(batches(len(subset), min(safe_batch(problem.session, subset), 16)))
    stream = Stream(problem.model.proto, subset, parts, problem.runtime, problem.model.folder)
    masks = [padding_mask(entry, mask) for entry in stream.values]
    found = {}
    done = 0
    for group in levels(stream, [(place, (site,)) for place, site in enumerate(chosen)]):
        stream.advance([chosen[place].uses[0].output for place, _ in group])
        for place, _ in group:
            felt = _felt(stream, chosen[place].uses[0].output, masks, (problem.seed, place))
            if felt is not None:
                found[chosen[place].name] = felt
            done += 1
            if progress is not None:
                progress("feel", done, len(chosen))
    return found


def _affordable(sites: Sequence[Site]) -> int:
    """How many samples may be looked at: every channel costs what lies behind its layer."""
    behind, runs = 0.0, 0.0
    for site in reversed(sites):  # in the order of the model
        runs += behind * (site.uses[0].output_shape or (0, 0))[1]
        behind += site.macs or 0
    return int(_MACS / runs) if runs > 0 else 0


def _felt(stream: Stream, name: str, masks: Sequence[Array | None], seed: tuple[int, int]) -> Array | None:
    """H of one tensor (batch, O, *spatial); None where nothing of the outputs depends on it."""
    call = stream.behind(name)
    if call is None:
        return None
    joined = np.concatenate(
        [np.moveaxis(entry[name], 1, 0).reshape(entry[name].shape[1], -1) for entry in stream.values], axis=1
    )
    deviation = joined.std(axis=1, dtype=np.float64)
    if not deviation.max() > 0:
        return None
    # A channel that never moves is shaken all the same: what replaces it may move.
    steps = STEP * np.maximum(deviation, 1e-2 * deviation.max())
    total = np.zeros((len(steps), len(steps)))
    for batch, (entry, keep) in enumerate(zip(stream.values, masks, strict=True)):
        given = entry[name]
        rng = np.random.default_rng([*seed, batch])
        signs = rng.choice(np.array([-1, 1], given.dtype), (len(given), *given.shape[2:]))
        reference = visible_outputs(call(batch, given), keep)
        scales = {key: 1 / max(float(np.linalg.norm(value)), 1e-30) for key, value in reference.items()}
        picks = {
            key: np.sort(rng.choice(value.size, min(value.size, _ELEMENTS), replace=False))
            for key, value in reference.items()
        }
        answers = []
        for channel, step in enumerate(steps):
            shaken = given.copy()
            shaken[:, channel] += signs * given.dtype.type(step)
            made = visible_outputs(call(batch, shaken), keep)
            answers.append(
                np.concatenate(
                    [(made[key] - reference[key]).ravel()[picks[key]] * (scales[key] / step) for key in reference]
                )
            )
        changes = np.stack(answers)
        total += changes @ changes.T
    return total if np.isfinite(total).all() and np.trace(total) > 0 else None
