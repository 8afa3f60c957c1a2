"""Both weights of a recurrent cell factorized, the cell spelled out so that the thin products are what runs.

    a_t = U (Aᵀ x_t) + S (V h_{t-1}) + b

For all steps at once up to the state; then one step in plain operators where every sequence is one step long,
a Scan otherwise. Faster than the fused operator for wide cells only; what is measured decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lowrank_onnx.base import Factors, Replacement, Site, Use
from lowrank_onnx.passes.recurrent import RecurrentPass
from lowrank_onnx.recurrent_chains import spelled, unspoken


@dataclass(frozen=True)
class RecurrentCell(RecurrentPass):
    """W ≈ U Aᵀ and R ≈ S V in an explicit cell: plain operators for one step, a Scan for sequences."""

    name = "recurrent_cell"
    reference = "Prabhavalkar et al. 2016, arXiv:1603.08042, in the metric of the running cell"
    spells_out: ClassVar[bool] = True

    def refuse(self, site: Site) -> str | None:
        """See Pass.refuse."""
        return unspoken(site) or super().refuse(site)

    def replace(self, site: Site, use: Use, factors: Factors) -> Replacement:
        """See RecurrentPass.replace."""
        return spelled(site, use, factors)
