"""A convolution over groups of channels, then a 1 x 1 that mixes what all groups give.

    W[o, i, k] ≈ Σ_r second[o, (g, r)] · first[(g, r), i, k],   g the group of channel i

Patches x (F,) are ordered as ``weight.reshape(O, -1)``, so that a group is a run of F / G of their numbers. Every
group has directions of its own: a mix of G·r channels costs G·r·O and each of them looks at F / G numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.optimize

from lowrank_onnx.decompositions.output_metric import checked_rank, gentle_root, gentle_solve
from lowrank_onnx.linalg import Array, finite_svd, psd_root, right_basis

_ROUNDS = 10  # of moving channels between groups; mostly three suffice


@dataclass(frozen=True, slots=True, eq=False)
class GroupedTarget:
    """What a grouped convolution is fitted to: the least ``tr (wanted - Ŵ) metric (wanted - Ŵ)ᵀ``.

    Attributes:
        wanted: (O, F).
        metric: (F, F) positive semi-definite.
        roots: Per group (F / G, F / G), lower Cholesky factor of its part of the metric.
    """

    wanted: Array
    metric: Array
    roots: tuple[Array, ...]

    @classmethod
    def of(cls, wanted: Array, metric: Array, groups: int) -> GroupedTarget:
        """Factor the parts of the metric once, for all ranks."""
        parts = runs(wanted.shape[1], groups)
        return cls(wanted, metric, tuple(gentle_root(metric[part, part]) for part in parts))

    @property
    def parts(self) -> tuple[slice, ...]:
        """Where each group is in a patch."""
        return runs(self.wanted.shape[1], len(self.roots))


@dataclass(frozen=True, slots=True, eq=False)
class GroupedConvolution:
    """The factors.

    Attributes:
        first: (G, r, F / G) filters of each group.
        second: (O, G, r) the mix.
        history: Squared error in the metric at the start and after each sweep.
    """

    first: Array
    second: Array
    history: tuple[float, ...] = ()

    def weight(self) -> Array:
        """The product (O, F)."""
        return np.concatenate([self.second[:, g] @ filters for g, filters in enumerate(self.first)], axis=1)


def runs(length: int, groups: int) -> tuple[slice, ...]:
    """Equal runs of 0..length."""
    width = length // groups
    return tuple(slice(g * width, (g + 1) * width) for g in range(groups))


def full_rank(outputs: int, patch: int, groups: int) -> int:
    """Directions per group that give any weight (O, F) back."""
    return min(outputs, patch // groups)


def grouped_weight(wanted: Array, groups: int, rank: int) -> GroupedConvolution:
    """The best factors of a weight (O, F) in Frobenius norm: an SVD for every group by itself.

    Args:
        rank: Per group, 1 ≤ rank ≤ ``full_rank``.
    """
    checked_rank(
        rank, full_rank(len(wanted), wanted.shape[1], groups), f"rank of {groups} groups of a weight {wanted.shape}"
    )
    pairs = [_leading(finite_svd(wanted[:, part])[0], wanted[:, part], rank) for part in runs(wanted.shape[1], groups)]
    return _joined(pairs)


def grouped_convolution(
    target: GroupedTarget, rank: int, sweeps: int, start: GroupedConvolution | None = None, tolerance: float = 1e-3
) -> GroupedConvolution:
    """Fit the factors in the metric of the patches.

    Args:
        rank: Per group, 1 ≤ rank ≤ ``full_rank``.
        sweeps: Most rounds, ≥ 0.
        start: The factors so far; None: the leading directions of what each group contributes by itself.
        tolerance: Stop when a sweep lowers the error by less than this share of it.

    Returns:
        Factors; no sweep makes the error larger.

    Method: block coordinate descent. In one sweep every group in turn gets both of its factors at once, the best of
    their rank for what the others leave over (a reduced-rank regression, closed form); then the mix is regressed
    on the filters of all groups together. Source: reduced-rank regression, Izenman 1975,
    doi:10.1016/0047-259X(75)90042-1; backfitting, Buja, Hastie & Tibshirani 1989; the form: ALDS, Liebenwein et al.
    2021, arXiv:2107.11442, which takes every group's SVD alone.
    """
    wanted, metric = target.wanted, target.metric
    checked_rank(
        rank, full_rank(len(wanted), wanted.shape[1], len(target.roots)), f"rank of groups of a weight {wanted.shape}"
    )
    made = start or _joined(
        [_best(root, wanted[:, part], rank) for root, part in zip(target.roots, target.parts, strict=True)]
    )
    made = _mixed(target, made)
    history = [_lost(target, made)]
    floor = 1e-20 * float(np.vdot(wanted @ metric, wanted))
    for _ in range(sweeps):
        if history[-1] <= floor:
            break
        made = _mixed(target, _backfitted(target, made))
        history.append(_lost(target, made))
        if history[-2] - history[-1] <= 2 * tolerance * history[-2]:
            break
    return GroupedConvolution(made.first, made.second, tuple(history))


def _backfitted(target: GroupedTarget, made: GroupedConvolution) -> GroupedConvolution:
    """Give every group in turn the best factors for what the others leave over."""
    now = made.weight()
    pull = (target.wanted - now) @ target.metric
    pairs = []
    for root, part in zip(target.roots, target.parts, strict=True):
        aim = now[:, part] + scipy.linalg.cho_solve((root, True), pull[:, part].T).T
        mix, filters = _best(root, aim, made.first.shape[1])
        pull -= (mix @ filters - now[:, part]) @ target.metric[part]
        pairs.append((mix, filters))
    return _joined(pairs)


def _mixed(target: GroupedTarget, made: GroupedConvolution) -> GroupedConvolution:
    """Regress the mix on what all groups give."""
    columns = [target.metric[:, part] @ filters.T for part, filters in zip(target.parts, made.first, strict=True)]
    mapped = np.concatenate(columns, axis=1)  # (F, G·r)
    gram = np.concatenate([f @ mapped[part] for part, f in zip(target.parts, made.first, strict=True)])
    step = gentle_solve((gram + gram.T) / 2, ((target.wanted - made.weight()) @ mapped).T).T
    return GroupedConvolution(made.first, made.second + step.reshape(made.second.shape))


def _best(root: Array, aim: Array, rank: int) -> tuple[Array, Array]:
    return _leading(right_basis(root, aim.T)[1], aim, rank)


def _leading(basis: Array, aim: Array, rank: int) -> tuple[Array, Array]:
    return basis[:, :rank], basis[:, :rank].T @ aim


def _joined(pairs: list[tuple[Array, Array]]) -> GroupedConvolution:
    return GroupedConvolution(np.stack([f for _, f in pairs]), np.stack([mix for mix, _ in pairs], axis=1))


def _lost(target: GroupedTarget, made: GroupedConvolution) -> float:
    apart = target.wanted - made.weight()
    return max(float(np.vdot(apart @ target.metric, apart)), 0.0)


# --- which channels belong together ------------------------------------------------------------------


def clustered(weight: Array, gram: Array | None, groups: int, rank: int) -> Array:
    """Return an order of the input channels whose equal runs are groups with few output directions each.

    Args:
        weight: (O, I, *kernel), I divisible by ``groups``, a power of two.
        gram: (F, F) centred second moment of the patches; None: the identity.
        rank: Directions per group.

    Returns:
        (I,) channel by place; groups by their first channel, channels of a group rising.

    Channels are alike where the covariances of what they add to the output are (``tr P_i P_j``, normalised); the
    likeness is halved along its second eigenvector again and again. Then groups keep ``rank`` directions each, and
    every channel goes where most of what it adds is kept, groups staying equal in size (balanced k-subspaces).

    Source: spectral bisection as in ``seriation``; k-subspaces: Bradley & Mangasarian 2000,
    doi:10.1023/A:1008324625522, here with groups of equal size by the Hungarian method.
    """
    outputs, channels = weight.shape[:2]
    flat = weight.reshape(outputs, channels, -1)
    added = _added(flat, gram)  # (I, O, K)
    whole = added.transpose(1, 0, 2).reshape(outputs, -1)
    alike = ((whole.T @ whole) ** 2).reshape(channels, flat.shape[2], channels, -1).sum(axis=(1, 3))
    size = np.sqrt(np.maximum(alike.diagonal(), 1e-300))
    labels = _halved(alike / np.outer(size, size), np.arange(channels), groups)
    best, most = labels, -1.0
    for _ in range(_ROUNDS):
        bases, kept = _directions(flat, gram, labels, groups, rank)
        if kept <= most * (1 + 1e-9):
            break
        best, most = labels, kept
        gains = np.stack([np.sum((basis.T @ added) ** 2, axis=(1, 2)) for basis in bases])  # (G, I)
        places = scipy.optimize.linear_sum_assignment(np.repeat(gains, channels // groups, axis=0).T, maximize=True)[1]
        labels = places // (channels // groups)
    members = sorted((np.flatnonzero(best == g) for g in range(groups)), key=lambda group: int(group[0]))
    return np.concatenate(members)


def _added(flat: Array, gram: Array | None) -> Array:
    """(I, O, K) what every channel adds to the output, as a root of its covariance."""
    moved = flat.transpose(1, 0, 2)
    if gram is None:
        return moved
    length = flat.shape[2]
    starts = range(0, len(gram), length)
    return np.stack([m @ psd_root(gram[s : s + length, s : s + length]) for m, s in zip(moved, starts, strict=True)])


def _halved(alike: Array, members: Array, groups: int) -> Array:
    """(I,) labels by spectral bisection into equal halves."""
    labels = np.zeros(len(alike), int)
    if groups == 1:
        return labels
    inner = alike[np.ix_(members, members)]
    scale = 1 / np.sqrt(np.maximum(inner.sum(axis=1), 1e-300))
    _, vectors = scipy.linalg.eigh(scale[:, None] * inner * scale)
    order = np.argsort(scale * vectors[:, -2], kind="stable")
    for half, side in enumerate(np.split(members[order], 2)):
        labels[side] = half * (groups // 2) + _halved(alike, side, groups // 2)[side]
    return labels


def _directions(flat: Array, gram: Array | None, labels: Array, groups: int, rank: int) -> tuple[list[Array], float]:
    """Per group the (O, r) leading directions of its contribution, and how much all of them keep."""
    length = flat.shape[2]
    bases, kept = [], 0.0
    for g in range(groups):
        channels = np.flatnonzero(labels == g)
        matrix = flat[:, channels].reshape(len(flat), -1)
        if gram is not None:
            places = (channels[:, None] * length + np.arange(length)).ravel()
            matrix = matrix @ psd_root(gram[np.ix_(places, places)])
        basis, sigma, _ = finite_svd(matrix)
        bases.append(basis[:, :rank])
        kept += float(np.sum(sigma[:rank] ** 2))
    return bases, kept
