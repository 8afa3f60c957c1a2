"""The input weight of a recurrent cell factorized: one thin product for all time steps in front of it.

LSTM(x, W, R)   becomes   LSTM(x A, U, R),   W_d ≈ U_d Aᵀ,   A (I, r) shared by the directions
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowrank_onnx.base import Factors, Replacement, Site, Use
from lowrank_onnx.passes.recurrent import RecurrentPass
from lowrank_onnx.recurrent_chains import fused


@dataclass(frozen=True)
class RecurrentInput(RecurrentPass):
    """W ≈ U Aᵀ, A applied to the whole sequence in front of the fused operator; R stays."""

    name = "recurrent_input"
    reference = "Prabhavalkar et al. 2016, arXiv:1603.08042 (input weights), in the metric of the data"
    takes_state: ClassVar[bool] = False

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        if site.attributes["inputs"] < 2:
            return "one input only: no rank below full"
        return super().refuse(site)

    def replace(self, site: Site, use: Use, factors: Factors) -> Replacement:
        """See RecurrentPass.replace."""
        return fused(site, use, factors)
