"""Both weights of a recurrent cell factorized, the fused operator kept: R is stored as a product.

onnxruntime multiplies the factors of R when it loads the model: the file is smaller, a step takes as long as
before. The projection of the input stands in front of the operator and saves time.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_onnx.base import Factors, Replacement, Site, Use
from lowrank_onnx.passes.recurrent import RecurrentPass
from lowrank_onnx.recurrent_chains import fused


@dataclass(frozen=True)
class RecurrentStored(RecurrentPass):
    """W ≈ U Aᵀ in front of the fused operator, R ≈ S V stored as two factors that are multiplied at load."""

    name = "recurrent_stored"
    reference = "Prabhavalkar et al. 2016, arXiv:1603.08042, in the metric of the running cell"

    def replace(self, site: Site, use: Use, factors: Factors) -> Replacement:
        """See RecurrentPass.replace."""
        return fused(site, use, factors)
