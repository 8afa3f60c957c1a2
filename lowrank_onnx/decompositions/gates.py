"""How strongly a recurrent cell's state answers to errors in its gates. Arrays only.

An error in a forget gate lives on in the cell state, one in a saturated gate does nothing; so the rows of
W and R are weighed by the mean squared derivative of all later hidden states with respect to the
pre-activation, through the cell's own memory (not through R). Sizes: time T, batch B, hidden H.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_onnx.linalg import Array


@dataclass(frozen=True, eq=False)
class Preactivations:
    """What goes into the gates of one direction, in the order of its own time.

    Attributes:
        inputs: (T, B, gates * H) W x + Wb.
        states: (T, B, gates * H) R h + Rb, h the state before the step.
        before: (T, B, H) h before the step.
        cell: (B, H) initial cell state of an LSTM.
    """

    inputs: Array
    states: Array
    before: Array
    cell: Array


def sigmoid(x: Array) -> Array:
    """The logistic function, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def sensitivity(op: str, pre: Preactivations, linear_before_reset: bool) -> tuple[Array, Array]:
    """Return squared sensitivities (T, B, gates * H) to errors in W x and in R h.

    The default activations are assumed: sigmoid for gates, tanh for values.

    Source: the weight E[σ'(a)²] of algorithms for recurrent cells, carried on through the memory.
    """
    if op == "LSTM":
        both = _lstm(pre)
        return both, both
    if op == "GRU":
        return _gru(pre, linear_before_reset)
    slope = (1 - np.tanh(pre.inputs + pre.states) ** 2) ** 2
    return slope, slope


def _lstm(pre: Preactivations) -> Array:
    i, o, f, g = np.split(pre.inputs + pre.states, 4, axis=-1)
    i, o, f, g = sigmoid(i), sigmoid(o), sigmoid(f), np.tanh(g)
    earlier = np.empty_like(g)  # the cell state before each step
    cell = pre.cell
    for t in range(len(g)):
        earlier[t] = cell
        cell = f[t] * cell + i[t] * g[t]
    shown = np.tanh(f * earlier + i * g)
    felt = _carried((o * (1 - shown**2)) ** 2, f**2)
    return np.concatenate(
        [
            felt * (i * (1 - i) * g) ** 2,
            (o * (1 - o) * shown) ** 2,
            felt * (f * (1 - f) * earlier) ** 2,
            felt * (i * (1 - g**2)) ** 2,
        ],
        axis=-1,
    )


def _gru(pre: Preactivations, linear_before_reset: bool) -> tuple[Array, Array]:
    zx, rx, nx = np.split(pre.inputs, 3, axis=-1)
    zh, rh, nh = np.split(pre.states, 3, axis=-1)
    z, r = sigmoid(zx + zh), sigmoid(rx + rh)
    # With the reset in front of R its input is not known here; r R h stands for R (r h).
    n = np.tanh(nx + r * nh)
    felt = _carried(np.ones_like(z), z**2)
    slope = felt * ((1 - z) * (1 - n**2)) ** 2
    gates = [felt * (z * (1 - z) * (pre.before - n)) ** 2, slope * (r * (1 - r) * nh) ** 2]
    inside = slope * r**2 if linear_before_reset else slope
    return np.concatenate([*gates, slope], axis=-1), np.concatenate([*gates, inside], axis=-1)


def _carried(now: Array, kept: Array) -> Array:
    """What a change of the memory does from this step on: ``now[t] + kept[t + 1] * (the same at t + 1)``."""
    total = np.array(now)
    for t in range(len(now) - 2, -1, -1):
        total[t] += kept[t + 1] * total[t + 1]
    return total
