"""Convolution over groups of channels, then 1 x 1: every group has output directions of its own.

    W[o, i, k]   becomes   Σ_r second[o, (g, r)] · first[(g, r), i, k],   g the group of channel i

Channels are clustered first where that helps; a Gather then brings those of a group together. Not in use unless
asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from lowrank_onnx.base import Candidate, Dense, Factors, Moments, Replacement, Site
from lowrank_onnx.conv_chains import Link
from lowrank_onnx.decompositions.grouped_convolution import (
    GroupedConvolution,
    GroupedTarget,
    clustered,
    full_rank,
    grouped_convolution,
    grouped_weight,
)
from lowrank_onnx.decompositions.output_metric import layer_output
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.convolution import ConvolutionPass, Form, Layer, Target, channel_step

_GROUPS = (2, 4, 8)
_WORTH = 0.9  # what an order must bring the error down to: to move the map takes 4 to 8 % of the layer's time


@dataclass(frozen=True, eq=False)
class GroupedLayer(Layer):
    """The analysis of one site with its channels in order; ``form`` is (groups, 1 where channels are clustered).

    Attributes:
        order: (C,) which channel is at each place.
        moments: What it was made of, for another form.
    """

    order: Array = field(default_factory=lambda: np.zeros(0, int))
    moments: Mapping[str, Moments] | None = None


@dataclass(frozen=True)
class BlockConvolution(ConvolutionPass):
    """A grouped convolution and a 1 x 1, fitted to the output on patches.

    Options:
        multiple: Channels that a group gives are divisible by this; 0 chooses 16, less for layers narrower than 32.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        sweeps: Most rounds of fitting group by group.
        groups: Of input channels: 2, 4, 8, or 0: of those wide enough the one with the least error at half of the work.
        order: yes, no, or auto: cluster the channels where that lowers the error.
    """

    name = "block"
    reference = "ALDS: Liebenwein et al. 2021, arXiv:2107.11442; fitted to outputs on patches"
    default = False
    no_form = "a 1 x 1 kernel or one output channel"
    sweeps: int = 3
    groups: int = 0
    order: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.groups not in (0, *_GROUPS):
            raise ValueError(f"groups must be 0, 2, 4 or 8, got {self.groups}")
        if self.order not in ("auto", "yes", "no"):
            raise ValueError(f"order must be auto, yes or no, got '{self.order}'")

    def forms(self, shape: Sequence[int]) -> Sequence[Form]:
        """See ConvolutionPass.forms."""
        if shape[0] == 1 or math.prod(shape[2:]) == 1:
            return []
        orders = {"auto": (0, 1), "yes": (1,), "no": (0,)}[self.order]
        fit = [groups for groups in _GROUPS if shape[1] % groups == 0 and shape[1] >= 2 * groups]
        if self.groups:
            fit = [groups for groups in fit if groups == self.groups]
        else:  # Narrower groups leave the fast kernels: 64 channels in 8 groups take 1.5 times as long as in 4.
            block = channel_step(shape[0], shape[1])
            fit = [groups for groups in fit if groups == 2 or shape[1] // groups >= block]
        return [(groups, order) for groups in fit for order in orders]

    def structure(self, shape: Sequence[int], form: Form, ranks: tuple[int, ...]) -> tuple[Link, ...]:
        """See ConvolutionPass.structure."""
        (rank,), groups = ranks, form[0]
        outputs, inputs, *kernel = shape
        return (
            Link("first", tuple(range(len(kernel))), (groups, rank, inputs // groups, *kernel)),
            Link("second", (), (1, outputs, groups * rank, *[1] * len(kernel))),
        )

    def fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """See ConvolutionPass.fit."""
        (rank,), groups = ranks, form[0]
        outputs, inputs, *kernel = target.weight.shape
        if target.gram is None:
            made = grouped_weight(target.weight.reshape(outputs, -1), groups, rank)
        else:
            start = None
            if target.start is not None:
                first, second = target.start
                start = GroupedConvolution(first.reshape(groups, rank, -1), second.reshape(outputs, groups, rank))
            made = grouped_convolution(_aim(target, groups), rank, self.sweeps, start)
        one = [1] * len(kernel)
        return (
            made.first.reshape(groups * rank, inputs // groups, *kernel),
            made.second.reshape(outputs, groups * rank, *one),
        )

    def full(self, shape: Sequence[int], form: Form) -> tuple[int, ...]:
        """See ConvolutionPass.full."""
        return (full_rank(shape[0], math.prod(shape[1:]), form[0]),)

    def grid(self, shape: Sequence[int], form: Form, step: int) -> Sequence[tuple[int, ...]]:
        """See ConvolutionPass.grid."""
        return [(rank,) for rank in range(step, self.full(shape, form)[0] + 1, step)]

    # --- channels in order -------------------------------------------------------------------------------

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        shape, group = self._shape(site), int(site.attributes["group"])
        least = self.groups or 2
        if group == 1 and (shape[1] < 2 * least or shape[1] % least):
            return f"its {shape[1]} input channels do not fall into {least} equal groups of two or more"
        reason = super().refuse(site)
        if reason is not None:
            return reason
        if group > 1:
            return f"its channels are in {group} groups already"
        if site.attributes["transposed"] and max(site.attributes["strides"]) > 1:
            return "a transposed convolution with strides: the 1 x 1 would run on the larger map"
        return None

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> GroupedLayer:
        """See Pass.analyse."""

        def key(layer: GroupedLayer) -> tuple[bool, float]:
            rank = self._rank_at_half(layer.shape, layer.form[0])  # off the grid, so that all cost the same
            error = self.candidate(site, layer, (rank,)).error
            return not self.ranks(site, layer), error / _WORTH if _moves(layer.order) else error

        return min((self._grouped(site, moments, form) for form in self.forms(self._shape(site))), key=key)

    def candidate(self, site: Site, analysis: Layer, ranks: tuple[int, ...]) -> Candidate:
        """See Pass.candidate."""
        assert isinstance(analysis, GroupedLayer)
        made = super().candidate(site, analysis, ranks)
        return dataclasses.replace(made, nodes=made.nodes + _moves(analysis.order) * len(site.uses))

    def factorize(self, site: Site, analysis: Layer, candidate: Candidate) -> Factors:
        """See Pass.factorize."""
        if not isinstance(analysis, GroupedLayer):  # that of a refit, whose channels are in order
            return super().factorize(site, analysis, candidate)
        form = tuple(candidate.options["form"])
        layer = analysis if form == analysis.form else self._grouped(site, analysis.moments, form)
        factors = super().factorize(site, layer, candidate)
        return {**factors, "order": layer.order} if _moves(layer.order) else factors

    def emit(self, site: Site, candidate: Candidate, factors: Factors) -> Sequence[Replacement]:
        """See Pass.emit."""
        if "order" not in factors:
            return super().emit(site, candidate, factors)
        turned = dataclasses.replace(
            site, uses=tuple(dataclasses.replace(use, input=f"{use.node}/ordered") for use in site.uses)
        )
        made = []
        for use, entry in zip(site.uses, super().emit(turned, candidate, factors), strict=True):
            order = gs.Constant(f"{site.name}/order", factors["order"])
            inputs, outputs = [gs.Variable(use.input), order], [gs.Variable(f"{use.node}/ordered")]
            gather = gs.Node("Gather", f"{use.node}/gather", {"axis": 1}, inputs, outputs)
            made.append(dataclasses.replace(entry, nodes=(gather, *entry.nodes)))
        return made

    def refit(self, site: Site, candidate: Candidate, factors: Factors, moments: Moments, ridge: float) -> Factors:
        """See Pass.refit. Groups and their order stay."""
        if "order" not in factors:
            return super().refit(site, candidate, factors, moments, ridge)
        turned, (seen,) = _reordered(site, [moments], factors["order"])
        return {**super().refit(turned, candidate, factors, seen, ridge), "order": factors["order"]}

    def effective(self, site: Site, candidate: Candidate, factors: Factors) -> tuple[Array, Array | None]:
        """See Pass.effective."""
        matrix, bias = super().effective(site, candidate, factors)
        if "order" not in factors:
            return matrix, bias
        back = np.empty_like(matrix)
        back[_rows(site, factors["order"])] = matrix
        return back, bias

    def dense_equivalent(self, site: Site, candidate: Candidate, factors: Factors) -> Mapping[str, Dense]:
        """See Pass.dense_equivalent."""
        made = super().dense_equivalent(site, candidate, factors)
        if "order" not in factors:
            return made
        inverse = np.argsort(factors["order"])
        return {
            name: dataclasses.replace(entry, weight=np.take(entry.weight, inverse, axis=_input_axis(site)))
            for name, entry in made.items()
        }

    def _grouped(self, site: Site, moments: Mapping[str, Moments] | None, form: Form) -> GroupedLayer:
        """The analysis for one form."""
        groups, ordered = form
        layer = self._layer(site, moments, self.ridge)
        order = np.arange(layer.shape[1])
        if ordered:
            (target,) = layer.targets
            felt = target.weight if target.felt is None else target.felt.turn(target.weight)
            order = clustered(felt, target.gram, groups, self._rank_at_half(layer.shape, groups))
            if _moves(order):
                turned, seen = _reordered(site, (moments or {}).values(), order)
                named = None if moments is None else dict(zip(moments, seen, strict=True))
                layer = self._layer(turned, named, self.ridge)
        return GroupedLayer(layer.targets, layer.means, layer.energy, form, layer.felt, order=order, moments=moments)

    def _rank_at_half(self, shape: Sequence[int], groups: int) -> int:
        """Directions per group at half of the work, where forms are compared."""
        patch = math.prod(shape[1:])
        rank = round(0.5 * shape[0] * patch / (patch + shape[0] * groups))
        return min(max(rank, 1), full_rank(shape[0], patch, groups))


def _aim(target: Target, groups: int) -> GroupedTarget:
    """What the factors are fitted to; made once for all ranks."""
    assert target.gram is not None
    if not target.memo:
        wanted, metric = layer_output(target.weight, target.gram, target.cross, target.energy).regularised(target.ridge)
        made = GroupedTarget.of(wanted, metric, groups)
        target.memo.update({"wanted": wanted, "metric": metric})
        target.memo.update({f"root{place}": root for place, root in enumerate(made.roots)})
    roots = tuple(target.memo[f"root{place}"] for place in range(groups))
    return GroupedTarget(target.memo["wanted"], target.memo["metric"], roots)


def _moves(order: Array) -> bool:
    return bool((order != np.arange(len(order))).any())


def _input_axis(site: Site) -> int:
    return 0 if site.attributes["transposed"] else 1


def _rows(site: Site, order: Array) -> Array:
    """Where in a patch the numbers of the ordered channels are."""
    length = math.prod(site.weight.shape[2:])
    return np.asarray((order[:, None] * length + np.arange(length)).ravel())


def _reordered(site: Site, moments: Iterable[Moments], order: Array) -> tuple[Site, list[Moments]]:
    """The site with its input channels in another order, and what it sees."""
    rows = _rows(site, order)
    turned = dataclasses.replace(site, weight=np.take(site.weight, order, axis=_input_axis(site)))
    return turned, [
        dataclasses.replace(
            entry,
            mean=entry.mean[rows],
            gram=entry.gram[np.ix_(rows, rows)],
            target_cross=None if entry.target_cross is None else entry.target_cross[rows],
        )
        for entry in moments
    ]
