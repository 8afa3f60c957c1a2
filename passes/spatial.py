"""Separable convolution: k x 1 into r channels, then 1 x k, or the other way round.

    W[o, i, a, b]   becomes   Σ_r second[o, r, b] · first[r, i, a]

Without data the optimum is an SVD; with data alternating least squares in the metric of the patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from lowrank_onnx.conv_chains import Link
from lowrank_onnx.decompositions.separable import Separable, separable, separable_als
from lowrank_onnx.linalg import Array
from lowrank_onnx.passes.convolution import ConvolutionPass, Form, Target, output_basis

WIDE = 1536  # numbers of a patch; beyond, a sweep takes seconds and the first ones do nearly all


@dataclass(frozen=True)
class Spatial(ConvolutionPass):
    """A kernel over some axes, then one over the others: k x 1, 1 x k.

    Options:
        multiple: Channels between are divisible by this; 0 chooses 16, less for layers narrower than 32.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        sweeps: Most rounds of alternating least squares.
    """

    name = "spatial"
    reference = "Jaderberg, Vedaldi & Zisserman 2014, arXiv:1405.3866, scheme 2; fitted to outputs on patches"

    def forms(self, shape: Sequence[int]) -> Sequence[Form]:
        """See ConvolutionPass.forms."""
        long = [axis for axis, length in enumerate(shape[2:]) if length > 1]
        return [axes for count in range(1, len(long)) for axes in combinations(long, count)]

    def structure(self, shape: Sequence[int], form: Form, ranks: tuple[int, ...]) -> tuple[Link, ...]:
        """See ConvolutionPass.structure."""
        (rank,) = ranks
        outputs, inputs, *kernel = shape
        one = [length if axis in form else 1 for axis, length in enumerate(kernel)]
        two = [1 if axis in form else length for axis, length in enumerate(kernel)]
        # An axis of length 1 may have a stride: the first link takes it, so that the second sees a smaller map.
        first = tuple(axis for axis, length in enumerate(kernel) if axis in form or (form and length == 1))
        second = tuple(axis for axis in range(len(kernel)) if axis not in first)
        return (
            Link("first", first, (1, rank, inputs, *one)),
            Link("second", second, (1, outputs, rank, *two)),
        )

    def fit(self, target: Target, form: Form, ranks: tuple[int, ...]) -> tuple[Array, ...]:
        """See ConvolutionPass.fit."""
        (rank,) = ranks
        if target.gram is None:
            made = separable(target.weight, rank, form)
            return made.first, made.second
        if len(form) == target.weight.ndim - 2:  # the optimum is closed form
            wanted, basis = output_basis(target)
            one = (1,) * len(form)
            first = (basis[:, :rank].T @ wanted).reshape(rank, *target.weight.shape[1:])
            return first, basis[:, :rank].reshape(-1, rank, *one)
        made = separable_als(
            target.weight,
            rank,
            target.gram,
            form,
            sweeps=self.sweeps if len(target.gram) <= WIDE else min(self.sweeps, 2),
            ridge=target.ridge,
            cross=target.cross,
            energy=target.energy,
            tolerance=1e-3,
            start=None if target.start is None else Separable(target.start[0], target.start[1], 0.0),
        )
        return made.first, made.second

    def full(self, shape: Sequence[int], form: Form) -> tuple[int, ...]:
        """See ConvolutionPass.full."""
        covered = math.prod(shape[2 + axis] for axis in form)
        return (min(shape[1] * covered, shape[0] * (math.prod(shape[2:]) // covered)),)

    def unfoldings(self, weight: Array, form: Form) -> tuple[Array, ...]:
        """See ConvolutionPass.unfoldings: the input channels and one part of the kernel, by the rest."""
        covered = [2 + axis for axis in form]
        others = [axis for axis in range(2, weight.ndim) if axis not in covered]
        turned = weight.transpose(1, *covered, 0, *others)
        return (turned.reshape(math.prod(turned.shape[: 1 + len(covered)]), -1),)

    def grid(self, shape: Sequence[int], form: Form, step: int) -> Sequence[tuple[int, ...]]:
        """See ConvolutionPass.grid."""
        return [(rank,) for rank in range(step, self.full(shape, form)[0] + 1, step)]
