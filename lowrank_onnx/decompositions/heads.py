"""Fewer columns in every head of an attention block: joint factors of query and key, and of value and output.

Everything happens inside the heads, d columns each: queries (n, d), keys, values; no matrix is larger than
all heads side by side. The narrower head keeps r < d columns, the same r in every head.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from lowrank_onnx.linalg import Array, psd_root

_FLOOR = 1e-10  # of the mean variance, so that a dead column of a head leaves the roots regular
_SWEEPS = 3


def score_bases(queries: Array, keys: Array) -> tuple[Array, Array, Array]:
    """Return the mixings that keep the scores ``q kᵀ`` of every head best, all ranks nested.

    Args:
        queries: (H, d, d) E[qᵀ q] per head; the mean of the queries counts.
        keys: (H, d, d) of the keys, centred: what is the same for all keys cancels in the softmax.

    Returns:
        A, B (H, d, d), and sigma (H, d) falling. With r columns of both, ``(q A[:, :r]) (k B[:, :r])ᵀ`` is the
        best rank-r score of independent queries and keys; all columns give ``q kᵀ`` back.

    With roots S Sᵀ of both moments and U Σ Vᵀ = S_qᵀ S_k, the optimum is A = S_k V Σ^-½ and B = S_q U Σ^-½:
    no inverse is needed.

    Source: MoDeGPT, ICLR 2025, arXiv:2408.09632 and CLOVER, arXiv:2411.17426 for the joint product; the query
    moment with its mean and the centred key moment are ours.
    """
    heads, width, _ = queries.shape
    mixed_q, mixed_k, sigmas = np.empty_like(queries), np.empty_like(keys), np.empty((heads, width))
    for head in range(heads):
        root_q, root_k = psd_root(_lifted(queries[head])), psd_root(_lifted(keys[head]))
        u, sigma, vt = np.linalg.svd(root_q.T @ root_k)
        share = 1 / np.sqrt(sigma)
        mixed_q[head], mixed_k[head] = root_k @ vt.T * share, root_q @ u * share
        sigmas[head] = sigma
    return mixed_q, mixed_k, sigmas


def score_error(queries: Array, keys: Array, mixed_q: Array, mixed_k: Array) -> float:
    """Relative error of all scores, ``sqrt(E|q kᵀ - (q A)(k B)ᵀ|² / E|q kᵀ|²)``, of independent q and k.

    Args:
        queries, keys: (H, d, d) as in ``score_bases``.
        mixed_q, mixed_k: (H, d, r).
    """
    lost = np.eye(queries.shape[1]) - mixed_q @ np.swapaxes(mixed_k, 1, 2)
    error = float(np.sum((queries @ lost @ keys) * lost))
    total = float(np.sum(queries * keys))
    return float(np.sqrt(max(error, 0.0) / total)) if total > 0 else 0.0


def best_pairs(queries: Array, keys: Array, interleaved: bool = False) -> Array:
    """The pairs (d / 2,) of columns that rotary positions turn together, by what the scores owe them.

    Args:
        queries, keys: (H, d, d) moments; all heads turn the same pairs.
        interleaved: Whether pair i is the columns (2 i, 2 i + 1), instead of (i, i + d / 2).

    Returns:
        Numbers of the pairs, the best first: by the sum over heads of ``E|q_i|² E|k_i|²``.

    Source: MoDeGPT, ICLR 2025, arXiv:2408.09632, type II, by whole pairs.
    """
    heads, width, _ = queries.shape
    shape, axis = ((heads, width // 2, 2), 2) if interleaved else ((heads, 2, width // 2), 1)
    energy = [np.diagonal(moment, axis1=1, axis2=2).reshape(shape).sum(axis=axis) for moment in (queries, keys)]
    return np.argsort(-(energy[0] * energy[1]).sum(axis=0), kind="stable")


def value_factors(
    gram: Array, weight: Array, heads: int, rank: int, ridge: float, shared: int = 1
) -> tuple[Array, Array]:
    """Return the mixing of the values and the output weight that reads fewer of them.

    What a head delivers is a mean of values with weights that sum to one, so that mixing the columns of the
    values mixes the columns of what is delivered, c: minimise ``E|c W - Σ_h c_h B_h W'_h|²``. One head after
    the other is given the best rank-r map of what the other heads leave (reduced-rank regression), a few
    sweeps; the output weight is then refitted to all of them together.

    Args:
        gram: (H·d, H·d) of c, centred or not.
        weight: (H·d, N) of the output layer.
        heads: Those of the values.
        rank: r, at most d.
        ridge: Of the refits, in units of the mean diagonal of gram; they are pulled to ``weight``.
        shared: How many heads of the queries one of the values serves; H is the product.

    Returns:
        B (heads, d, r), and W' (H·r, N).

    Source: reduced-rank regression (Izenman 1975) by blocks.
    """
    width = len(gram) // (heads * shared)
    weight = np.asarray(weight, np.float64)
    penalty = max(ridge, _FLOOR) * float(np.trace(gram)) / len(gram) or 1.0
    metric = gram + penalty * np.eye(len(gram))
    places = [slice(head * width, (head + 1) * width) for head in range(heads * shared)]
    mixing = np.empty((heads, width, rank))
    made = weight.copy()
    lost = np.zeros_like(weight)  # metric @ (weight - made)
    for _ in range(_SWEEPS if rank < width else 1):
        for head in range(heads):
            served = places[head * shared : (head + 1) * shared]
            root = scipy.linalg.cholesky(sum(metric[place, place] for place in served) / shared, lower=True)
            # (d, shared·N) cross moment with what is left, of all that share the head
            wanted = [lost[place] + metric[place, place] @ made[place] for place in served]
            whitened = scipy.linalg.solve_triangular(root, np.concatenate(wanted, axis=1), lower=True)
            _, vectors = scipy.linalg.eigh(whitened @ whitened.T)
            leading = vectors[:, ::-1][:, :rank]
            mixed = mixing[head] = scipy.linalg.solve_triangular(root, leading, lower=True, trans="T")
            for place, cross in zip(served, wanted, strict=True):
                best = mixed @ np.linalg.solve(mixed.T @ metric[place, place] @ mixed, mixed.T @ cross)
                lost += metric[:, place] @ (made[place] - best)
                made[place] = best
    spread = block_diagonal(np.repeat(mixing, shared, axis=0))
    inner = spread.T @ metric @ spread
    start = scipy.linalg.solve(inner, spread.T @ metric @ weight, assume_a="pos")
    return mixing, np.asarray(start)


def block_diagonal(blocks: Array) -> Array:
    """Put (H, d, r) blocks on the diagonal of a matrix (H·d, H·r)."""
    return np.asarray(scipy.linalg.block_diag(*blocks))


def _lifted(moment: Array) -> Array:
    scale = float(np.trace(moment)) / len(moment)
    return np.asarray(moment + (_FLOOR * scale or 1.0) * np.eye(len(moment)))
