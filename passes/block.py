"""Block low rank, of matrices and of convolutions: see the two files named after them.

Not in use unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_onnx.base import Pass, Site
from lowrank_onnx.passes.block_convolution import SIDES, BlockConvolution
from lowrank_onnx.passes.block_linear import BlockLinear
from lowrank_onnx.passes.by_kind import ByKind


@dataclass(frozen=True)
class Block(ByKind):
    """Blocks with directions of their own: of a matrix, or of the channels of a convolution, clustered if that helps.

    Options:
        ridge: Pull towards the original weight, in units of the mean input variance.
        form: rows, columns, of matrices also grid and diagonal, or auto: the one that errs least at half of the work.
        blocks: Of matrices: groups along each side that is cut.
        order: yes, no, or auto: try both.
        multiple: Of convolutions: channels of a group between are divisible by this; 0 chooses.
        groups: Of convolutions: 2, 4 or 8; 0 chooses.
    """

    name = "block"
    kinds = ("linear", "convolution")
    reference = "Amestoy et al. 2015, doi:10.1137/120903476; groups of inputs: ALDS 2021, arXiv:2107.11442"
    default = False
    ridge: float = 0.01
    form: str = "auto"
    blocks: int = 4
    order: str = "auto"
    multiple: int = 0
    groups: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        # Each checks its own options.
        self._linear()
        if self.form in SIDES:
            self._convolution()

    def _linear(self) -> BlockLinear:
        return BlockLinear(self.ridge, self.form, self.blocks, self.order)

    def _convolution(self) -> BlockConvolution:
        return BlockConvolution(self.multiple, self.ridge, form=self.form, groups=self.groups, order=self.order)

    def of(self, site: Site) -> Pass:
        """See ByKind.of."""
        return self._convolution() if site.kind == "convolution" else self._linear()

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.kind == "convolution" and self.form not in SIDES:
            return f"form '{self.form}' is for matrices only"
        return super().refuse(site)
