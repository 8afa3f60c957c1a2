"""Tucker-2 of a convolution: 1 x 1 into few channels, k x k among few, 1 x 1 back.

    W[o, i, k]   becomes   Σ_pq last[o, p] · core[p, q, k] · first[q, i]

The input channels are chosen in the metric of their covariance, core and output by regression of the output
on what the first 1 x 1 lets through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.conv_chains import Link
from lowrank_onnx.decompositions.tucker import Tucker2, refit_tucker2, tucker2
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.convolution import ConvolutionPass, Form, Target


@dataclass(frozen=True)
class Tucker(ConvolutionPass):
    """Few channels before and after the kernel.

    Options:
        multiple: Channels between are divisible by this; 0 chooses 16, less for layers narrower than 32.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        sweeps: Most rounds of orthogonal iteration.
    """

    name = "tucker"
    reference = "Kim et al. 2016, arXiv:1511.06530; De Lathauwer et al. 2000 (HOOI); fitted to outputs on patches"
    no_form = "a 1 x 1 kernel or one channel"

    def forms(self, shape: Sequence[int]) -> Sequence[Form]:
        """See ConvolutionPass.forms."""
        return [()] if min(shape[:2]) > 1 and math.prod(shape[2:]) > 1 else []

    def structure(self, shape: Sequence[int], form: Form, ranks: tuple[int, ...]) -> tuple[Link, ...]:
        """See ConvolutionPass.structure."""
        r_o, r_i = ranks
        outputs, inputs, *kernel = shape
        one = [1] * len(kernel)
        chain = [Link("core", tuple(range(len(kernel))), (1, r_o, r_i, *kernel))]
        if r_i < inputs:
            chain.insert(0, Link("first", (), (1, r_i, inputs, *one)))
        if r_o < outputs:
            chain.append(Link("last", (), (1, outputs, r_o, *one)))
        return tuple(chain)

    def fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """See ConvolutionPass.fit."""
        pair = (ranks[0], ranks[1])
        if target.gram is None:
            made = tucker2(target.weight, pair, self.sweeps)
        else:
            if target.start is None:
                made = tucker2(target.weight, pair, self.sweeps, _channel_moment(target))
            else:
                made = self._read(target, pair)
            made = refit_tucker2(made, target.weight, target.gram, target.ridge, target.cross, target.energy)
        one = (1,) * (target.weight.ndim - 2)
        core, last = _of_rank(made.core, made.output_factor, ranks[0])
        chain = [core]
        if made.input_factor is not None:
            chain.insert(0, made.input_factor.reshape(*made.input_factor.shape, *one))
        if last is not None:
            chain.append(last.reshape(*last.shape, *one))
        return tuple(chain)

    def _read(self, target: Target, ranks: tuple[int, int]) -> Tucker2:
        """The factors of a refit's start."""
        assert target.start is not None
        roles = [link.role for link in self.structure(target.weight.shape, (), ranks)]
        named = dict(zip(roles, target.start, strict=True))
        first, last = named.get("first"), named.get("last")
        return Tucker2(
            None if last is None else last.reshape(last.shape[:2]),
            named["core"],
            None if first is None else first.reshape(first.shape[:2]),
            0.0,
        )

    def full(self, shape: Sequence[int], form: Form) -> tuple[int, ...]:
        """See ConvolutionPass.full."""
        return (shape[0], shape[1])

    def unfoldings(self, weight: Array, form: Form) -> tuple[Array, ...]:
        """See ConvolutionPass.unfoldings: output channels, input channels."""
        return weight.reshape(len(weight), -1), weight.swapaxes(0, 1).reshape(weight.shape[1], -1)

    def grid(self, shape: Sequence[int], form: Form, step: int) -> Sequence[tuple[int, ...]]:
        """See ConvolutionPass.grid."""
        chosen = dict.fromkeys(
            tuple(min(max(round(share * width / step) * step, step), width) for width in shape[:2])
            for share in np.arange(1, 65) / 64
        )
        return [ranks for ranks in chosen if ranks[0] <= ranks[1] * math.prod(shape[2:])]


def _of_rank(core: Array, last: Array | None, rank: int) -> tuple[Array, Array | None]:
    """Core and output factor of exactly that rank, where the regression found that fewer, or no factor, will do."""
    if last is None and len(core) > rank:  # fewer features than the rank: pass them through
        features = core[0].size
        last = core.reshape(len(core), features)
        core = np.eye(features).reshape(features, *core.shape[1:])
    if last is not None and len(core) < rank:
        core = np.pad(core, [(0, rank - len(core)), *[(0, 0)] * (core.ndim - 1)])
        last = np.pad(last, [(0, 0), (0, rank - last.shape[1])])
    return core, last


def _channel_moment(target: Target) -> Array:
    """(I, I) second moment of the input channels, pooled over the positions under the kernel."""
    assert target.gram is not None
    inputs = target.weight.shape[1]
    positions = len(target.gram) // inputs
    return np.asarray(np.einsum("ikjk->ij", target.gram.reshape(inputs, positions, inputs, positions)))
