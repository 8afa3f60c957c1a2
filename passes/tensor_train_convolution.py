"""Tensor train of a convolution: 1 x 1, one convolution per kernel axis, 1 x 1.

    W[o, i, a, b]   becomes   Σ last[o, t] · height[s, r, a] · width[t, s, b] · first[r, i]

Not in use unless asked for: four nodes for one pay for themselves in wide layers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.conv_chains import Link
from lowrank_onnx.decompositions.tensor_train import tt_convolution
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.convolution import ConvolutionPass, Form, Target, refit_last


@dataclass(frozen=True)
class TensorTrainConvolution(ConvolutionPass):
    """A chain cut at every bond by a truncated SVD; the last 1 x 1 is fitted to the data.

    Options:
        multiple: Channels between are divisible by this; 0 chooses 16, less for layers narrower than 32.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        sweeps: Not used; the train is found in one pass.
    """

    name = "tensor_train"
    reference = "Oseledets 2011, doi:10.1137/090752286; Garipov et al. 2016, arXiv:1611.03214"
    default = False
    no_form = "a 1 x 1 kernel or one channel"

    def forms(self, shape: Sequence[int]) -> Sequence[Form]:
        """See ConvolutionPass.forms."""
        return [()] if min(shape[:2]) > 1 and math.prod(shape[2:]) > 1 else []

    def structure(self, shape: Sequence[int], form: Form, ranks: tuple[int, ...]) -> tuple[Link, ...]:
        """See ConvolutionPass.structure."""
        outputs, inputs, *kernel = shape
        one = [1] * len(kernel)
        chain = [Link("first", (), (1, ranks[0], inputs, *one))]
        for axis, length in enumerate(kernel):
            lengths = [length if place == axis else 1 for place in range(len(kernel))]
            chain.append(Link(f"axis{axis}", (axis,), (1, ranks[axis + 1], ranks[axis], *lengths)))
        return (*chain, Link("last", (), (1, outputs, ranks[-1], *one)))

    def fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """See ConvolutionPass.fit."""
        if target.start is None:
            made = tt_convolution(target.weight, ranks, split_kernel=True)
            bonds = [target.weight.shape[1], *ranks, len(target.weight)]
            # A bond that needs less gets less; what is missing is zero.
            chain = tuple(
                np.pad(weight, [(0, high - weight.shape[0]), (0, low - weight.shape[1]), *[(0, 0)] * (weight.ndim - 2)])
                for weight, low, high in zip(made, bonds, bonds[1:], strict=False)
            )
        else:
            chain = target.start
        return chain if target.gram is None else refit_last(target, chain)

    def full(self, shape: Sequence[int], form: Form) -> tuple[int, ...]:
        """See ConvolutionPass.full."""
        outputs, inputs, *kernel = shape
        before = np.cumprod([inputs, *kernel])
        after = np.cumprod([outputs, *kernel[::-1]])[::-1]
        return tuple(int(min(low, high)) for low, high in zip(before, after, strict=True))

    def grid(self, shape: Sequence[int], form: Form, step: int) -> Sequence[tuple[int, ...]]:
        """See ConvolutionPass.grid."""
        chosen = dict.fromkeys(
            tuple(min(max(round(share * most / step) * step, step), most) for most in self.full(shape, form))
            for share in np.arange(1, 65) / 64
        )
        return list(chosen)
