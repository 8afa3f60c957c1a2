"""One of two convolutions over groups of channels, the other 1 x 1: every group has directions of its own.

    rows      W[o, i, k]   becomes   Σ_r second[o, (g, r)] · first[(g, r), i, k],   g the group of input i
    columns   W[o, i, k]   becomes   Σ_r second[o, r, k] · first[(g, r), i],        g the group of output o

Inputs are clustered first where that helps; a Gather then brings those of a group together. Outputs stay as they
come, since a Gather behind them would part the convolution from what is fused with it. Not in use unless asked for.
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
    runs,
)
from lowrank_onnx.decompositions.output_metric import Felt, layer_output
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.channel import Channel
from lowrank_onnx.passes.convolution import ConvolutionPass, Form, Layer, Target, channel_step
from lowrank_onnx.passes.spatial import WIDE

_OUTPUTS, _INPUTS = 0, 1  # axes of a weight
SIDES = {"rows": (_INPUTS,), "columns": (_OUTPUTS,), "auto": (_OUTPUTS, _INPUTS)}
_GROUPS = (2, 4, 8)
_WORTH = 0.9  # what an order must bring the error down to: to move the map takes 4 to 8 % of the layer's time


@dataclass(frozen=True, eq=False)
class GroupedLayer(Layer):
    """The analysis of one site with its inputs in order.

    Its ``form`` is (axis of the weight that is in groups, groups, 1 where inputs are clustered).

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
        multiple: Channels of a group between are divisible by this; 0 chooses 16, less for layers narrower than 32.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        sweeps: Most rounds of fitting.
        form: rows: inputs in groups; columns: outputs in groups; auto: the one that errs least at half of the work.
        groups: 2, 4, 8, or 0: of those with wide enough groups the best, as for the form.
        order: yes, no, or auto: cluster the inputs where that lowers the error.
    """

    name = "block"
    reference = "ALDS: Liebenwein et al. 2021, arXiv:2107.11442; fitted to outputs on patches"
    default = False
    no_form = "a 1 x 1 kernel"
    form: str = "auto"
    groups: int = 0
    order: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in SIDES:
            raise ValueError(f"form must be auto, rows or columns, got '{self.form}'")
        if self.groups not in (0, *_GROUPS):
            raise ValueError(f"groups must be 0, 2, 4 or 8, got {self.groups}")
        if self.order not in ("auto", "yes", "no"):
            raise ValueError(f"order must be auto, yes or no, got '{self.order}'")

    def forms(self, shape: Sequence[int]) -> Sequence[Form]:
        """See ConvolutionPass.forms."""
        if math.prod(shape[2:]) == 1:
            return []
        # Clustering takes minutes where patches are wide, and seldom lowers the error by a tenth.
        both = (0, 1) if math.prod(shape[1:]) <= WIDE else (0,)
        orders = {"auto": both, "yes": (1,), "no": (0,)}[self.order]
        return [
            (axis, groups, order)
            for axis in SIDES[self.form]
            for groups in self._fitting(shape, axis)
            for order in (orders if axis == _INPUTS else (0,))
        ]

    def _fitting(self, shape: Sequence[int], axis: int) -> list[int]:
        """Into how many groups one side can be cut."""
        if min(shape[:2]) == 1:
            return []
        fit = [groups for groups in _GROUPS if shape[axis] % groups == 0 and shape[axis] >= 2 * groups]
        if self.groups:
            return [groups for groups in fit if groups == self.groups]
        # Narrower groups leave the fast kernels: 64 channels in 8 groups take 1.5 times as long as in 4.
        block = channel_step(shape[0], shape[1])
        most = max(_GROUPS) if math.prod(shape[1:]) <= WIDE else 4  # every group of outputs takes sweeps of its own
        return [groups for groups in fit if groups == 2 or (groups <= most and shape[axis] // groups >= block)]

    def structure(self, shape: Sequence[int], form: Form, ranks: tuple[int, ...]) -> tuple[Link, ...]:
        """See ConvolutionPass.structure."""
        (rank,), (axis, groups, _) = ranks, form
        outputs, inputs, *kernel = shape
        whole, one = tuple(range(len(kernel))), [1] * len(kernel)
        if axis == _INPUTS:
            return (
                Link("first", whole, (groups, rank, inputs // groups, *kernel)),
                Link("second", (), (1, outputs, groups * rank, *one)),
            )
        return (
            Link("first", (), (1, groups * rank, inputs, *one)),
            Link("second", whole, (groups, outputs // groups, rank, *kernel)),
        )

    def fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """See ConvolutionPass.fit. Of outputs in groups that of one group."""
        (rank,), (axis, groups, _) = ranks, form
        if axis == _OUTPUTS:
            return self._channel().fit(target, (), ranks)
        outputs, inputs, *kernel = target.weight.shape
        if target.gram is None:
            made = grouped_weight(target.weight.reshape(outputs, -1), groups, rank)
        else:
            start = None
            if target.start is not None:
                first, second = target.start
                start = GroupedConvolution(first.reshape(groups, rank, -1), second.reshape(outputs, groups, rank))
            sweeps = self.sweeps if len(target.gram) <= WIDE else min(self.sweeps, 2)
            made = grouped_convolution(_aim(target, groups), rank, sweeps, start)
        one = [1] * len(kernel)
        return (
            made.first.reshape(groups * rank, inputs // groups, *kernel),
            made.second.reshape(outputs, groups * rank, *one),
        )

    def _fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """Fit outputs in groups group by group: no group can make up for what another one loses."""
        axis, groups, _ = form
        if axis == _INPUTS:
            return super()._fit(target, form, ranks)
        parts = runs(len(target.weight), groups)
        chains = [super(BlockConvolution, self)._fit(_part(target, part, ranks[0]), form, ranks) for part in parts]
        first, second = zip(*chains, strict=True)
        return np.concatenate(first), np.concatenate(second)

    def _channel(self) -> Channel:
        return Channel(self.multiple, self.ridge, self.sweeps)

    def full(self, shape: Sequence[int], form: Form) -> tuple[int, ...]:
        """See ConvolutionPass.full."""
        axis, groups, _ = form
        if axis == _OUTPUTS:
            return self._channel().full((shape[0] // groups, *shape[1:]), ())
        return (full_rank(shape[0], math.prod(shape[1:]), groups),)

    def grid(self, shape: Sequence[int], form: Form, step: int) -> Sequence[tuple[int, ...]]:
        """See ConvolutionPass.grid."""
        return [(rank,) for rank in range(step, self.full(shape, form)[0] + 1, step)]

    # --- channels in order -------------------------------------------------------------------------------

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        group, shape = int(site.attributes["group"]), self._shape(site)
        reason = super().refuse(site)
        if group > 1 and min(shape[:2]) > 1:
            return f"its channels are in {group} groups already"
        if group == 1 and math.prod(shape[2:]) > 1 and not self.forms(shape):
            sides = {_INPUTS: f"{shape[1]} inputs", _OUTPUTS: f"{shape[0]} outputs"}
            told = " or ".join(sides[axis] for axis in SIDES[self.form])
            return f"{told} of a {shape[1]} to {shape[0]} convolution do not fall into {self.groups or 2} equal groups"
        return reason

    def analyse(self, site: Site, moments: Mapping[str, Moments] | None) -> GroupedLayer:
        """See Pass.analyse."""

        def key(layer: GroupedLayer) -> tuple[bool, float]:
            rank = self._rank_at_half(site, layer.form)  # off the grid, so that all cost the same
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
        _, groups, ordered = form
        layer = self._layer(site, moments, self.ridge)
        order = np.arange(layer.shape[1])
        if ordered:
            (target,) = layer.targets
            felt = target.weight if target.felt is None else target.felt.turn(target.weight)
            order = clustered(felt, target.gram, groups, self._rank_at_half(site, form))
            if _moves(order):
                turned, seen = _reordered(site, (moments or {}).values(), order)
                named = None if moments is None else dict(zip(moments, seen, strict=True))
                layer = self._layer(turned, named, self.ridge)
        return GroupedLayer(layer.targets, layer.means, layer.energy, form, layer.felt, order=order, moments=moments)

    def _rank_at_half(self, site: Site, form: Form) -> int:
        """The rank at half of the work, where forms are compared."""
        (full,) = self.full(self._shape(site), form)
        return min(max(round(0.5 / self._cost(site, form, (1,))), 1), full)


def _part(target: Target, part: slice, rank: int) -> Target:
    """What one group of outputs is fitted to; ``target`` with the start of this group alone."""
    start, felt = target.start, target.felt
    if start is not None:
        place = part.start // (part.stop - part.start)
        start = (start[0][place * rank : (place + 1) * rank], start[1][part])
    if felt is not None:
        felt = Felt.of((felt.root.T @ felt.root)[part, part], share=0.0)
    cross = None if target.cross is None else target.cross[part]
    return dataclasses.replace(target, weight=target.weight[part], cross=cross, start=start, felt=felt, memo={})


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
