"""Tensor trains, of convolutions and of tables of embeddings: see the two files named after them.

Not in use unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_onnx.base import Pass, Site
from lowrank_onnx.passes.by_kind import ByKind
from lowrank_onnx.passes.tensor_train_convolution import TensorTrainConvolution
from lowrank_onnx.passes.tensor_train_embedding import TensorTrainEmbedding


@dataclass(frozen=True)
class TensorTrain(ByKind):
    """A chain of cores cut at every bond by a truncated SVD: of a kernel over its axes, of a table over digits.

    Options:
        multiple: Ranks are divisible by this; 0 chooses.
        ridge: Of convolutions: pull towards the original weight, in units of the mean variance of the patch.
        cores: Of tables: into how many digits rows and features are split.
        smoothing: Of tables: lookups added to the count of every row; 0 chooses on held-out calibration data.
    """

    name = "tensor_train"
    kinds = ("convolution", "embedding")
    reference = (
        "Oseledets 2011, doi:10.1137/090752286; Garipov et al. 2016, arXiv:1611.03214; TT-Rec 2021, arXiv:2101.11714"
    )
    default = False
    multiple: int = 0
    ridge: float = 0.001
    cores: int = 2
    smoothing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cores < 2:
            raise ValueError("cores must be 2 or more")

    def of(self, site: Site) -> Pass:
        """See ByKind.of."""
        if site.kind == "embedding":
            return TensorTrainEmbedding(self.multiple, self.cores, self.smoothing)
        return TensorTrainConvolution(self.multiple, self.ridge)
