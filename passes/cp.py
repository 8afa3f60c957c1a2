"""Canonical polyadic form of a convolution: 1 x 1 into r channels, depthwise k x k, 1 x 1 back.

    W[o, i, k]   becomes   Σ_r last[o, r] · middle[r, k] · first[r, i]

Not in use unless asked for: a depthwise convolution moves much memory for few products, so that what it
saves in multiply-accumulates seldom shows in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_onnx.conv_chains import Link
from lowrank_onnx.decompositions.cp import cp
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.convolution import ConvolutionPass, Form, Target, refit_last


@dataclass(frozen=True)
class CP(ConvolutionPass):
    """A sum of rank-one kernels, with bounded terms; the last 1 x 1 is fitted to the data.

    Options:
        multiple: Channels between are divisible by this; 0 chooses 16, less for layers narrower than 32.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        sweeps: Most rounds of alternating least squares on the weight.
        restarts: Random starts tried beside singular vectors.
    """

    name = "cp"
    reference = "Lebedev et al. 2015, arXiv:1412.6553; bounded terms: Phan et al. 2020 (CPD-EPC)"
    default = False
    no_form = "a 1 x 1 kernel or one channel"
    sweeps: int = 100
    restarts: int = 1

    def forms(self, shape: Sequence[int]) -> Sequence[Form]:
        """See ConvolutionPass.forms."""
        return [()] if min(shape[:2]) > 1 and math.prod(shape[2:]) > 1 else []

    def structure(self, shape: Sequence[int], form: Form, ranks: tuple[int, ...]) -> tuple[Link, ...]:
        """See ConvolutionPass.structure."""
        (rank,) = ranks
        outputs, inputs, *kernel = shape
        one = [1] * len(kernel)
        return (
            Link("first", (), (1, rank, inputs, *one)),
            Link("middle", tuple(range(len(kernel))), (rank, 1, 1, *kernel)),
            Link("last", (), (1, outputs, rank, *one)),
        )

    def fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """See ConvolutionPass.fit."""
        (rank,) = ranks
        chain = target.start or self._chain_of(target.weight, rank)
        return chain if target.gram is None else refit_last(target, chain)

    def _chain_of(self, weight: Array, rank: int) -> tuple[Array, ...]:
        outputs, inputs, *kernel = weight.shape
        one = (1,) * len(kernel)
        if rank == self.full(weight.shape, ())[0]:  # one term per entry of the patch, no search needed
            first = np.repeat(np.eye(inputs), math.prod(kernel), axis=0)
            middle = np.tile(np.eye(math.prod(kernel)), (inputs, 1))
            last = weight.reshape(outputs, -1)
        else:
            made = cp(weight, rank, restarts=self.restarts, iterations=max(self.sweeps, 1))
            first, middle, last = made.input.T, made.spatial[0].T, made.output
        return (
            np.ascontiguousarray(first).reshape(rank, inputs, *one),
            np.ascontiguousarray(middle).reshape(rank, 1, *kernel),
            last.reshape(outputs, rank, *one),
        )

    def full(self, shape: Sequence[int], form: Form) -> tuple[int, ...]:
        """See ConvolutionPass.full."""
        return (math.prod(shape[1:]),)

    def grid(self, shape: Sequence[int], form: Form, step: int) -> Sequence[tuple[int, ...]]:
        """See ConvolutionPass.grid."""
        return [(rank,) for rank in range(step, self.full(shape, form)[0] + 1, step)]
