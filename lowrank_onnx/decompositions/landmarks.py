"""The attention matrix through landmarks: means of segments of the queries and of the keys."""

from __future__ import annotations

import numpy as np

from lowrank_onnx.linalg import Array


def segments(length: int, landmarks: int) -> Array:
    """(m, S) matrix that takes the means of m segments of S positions, of one length but for rounding."""
    which = (np.arange(length) * landmarks) // length
    chosen = (which[None, :] == np.arange(landmarks)[:, None]).astype(np.float64)
    return np.asarray(chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1))


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def inverse(matrix: Array, steps: int) -> Array:
    """The pseudo-inverse of (..., m, m) with rows that sum to one, by an iteration of third order.

    Source: Razavi et al. 2014, as in Xiong et al. 2021, arXiv:2102.03902, eq. 11; started from the largest sum
    of a column of each matrix by itself. Six steps leave 2 % where the matrix is badly conditioned, twelve 1e-5.
    """
    unit = np.eye(matrix.shape[-1])
    z = np.swapaxes(matrix, -1, -2) / matrix.sum(axis=-2, keepdims=True).max(axis=-1, keepdims=True)
    for _ in range(steps):
        az = matrix @ z
        z = 0.25 * z @ (13 * unit - az @ (15 * unit - az @ (7 * unit - az)))
    return np.asarray(z)


def approximate(query: Array, key: Array, value: Array, scale: float, landmarks: int, steps: int) -> Array:
    """``softmax(q k̃) pinv(softmax(q̃ k̃)) (softmax(q̃ k) v)``, with m landmarks q̃, k̃.

    Args:
        query: (..., S, d).
        key: (..., d, T).
        value: (..., T, e).
        scale: Of the scores.

    Returns:
        (..., S, e).

    Source: Xiong et al. 2021, Nyströmformer, arXiv:2102.03902.
    """
    q, k, v = (part.astype(np.float64) for part in (query, key, value))
    few_q = segments(q.shape[-2], landmarks) @ q * scale
    few_k = k @ segments(k.shape[-1], landmarks).T
    middle = inverse(softmax(few_q @ few_k), steps)
    return np.asarray(softmax(q * scale @ few_k) @ (middle @ (softmax(few_q @ k) @ v)))


def exact(query: Array, key: Array, value: Array, scale: float) -> Array:
    """``softmax(q k) v`` of the same arguments."""
    q, k, v = (part.astype(np.float64) for part in (query, key, value))
    return softmax(q * scale @ k) @ v
