"""Few channels between two convolutions: k x k into r channels then 1 x 1, or 1 x 1 then k x k.

    W[o, i, k]   becomes   Σ_r second[o, r] · first[r, i, k]   or   Σ_r second[o, r, k] · first[r, i]

The first is the projection on the leading directions of the output; for a 1 x 1 kernel both are the plain
low-rank layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_onnx.passes.convolution import Form
from lowrank_onnx.passes.spatial import Spatial


@dataclass(frozen=True)
class Channel(Spatial):
    """All of the kernel in the first or in the second convolution, the other one is 1 x 1.

    Options:
        multiple: Channels between are divisible by this; 0 chooses 16, less for layers narrower than 32.
        ridge: Pull towards the original weight, in units of the mean variance of the patch.
        sweeps: Most rounds of alternating least squares.
    """

    name = "channel"
    reference = "Zhang et al. 2016, arXiv:1505.06798 (linear case); DRONE, NeurIPS 2021"
    no_form = "one side of the weight has one channel"

    def forms(self, shape: Sequence[int]) -> Sequence[Form]:
        """See ConvolutionPass.forms."""
        kernel = shape[2:]
        whole = tuple(range(len(kernel)))
        forms: list[Form] = []
        if shape[0] > 1:
            forms.append(whole)
        if shape[1] > 1 and any(length > 1 for length in kernel):
            forms.append(())
        return forms
