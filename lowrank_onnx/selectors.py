"""Rules that read a rank off the spectrum of a layer: ``--rank evbmf``, ``--rank ard:weaken=0.3``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lowrank_onnx.decompositions.ard import relevance
from lowrank_onnx.decompositions.evbmf import evidence
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.linalg import Array

RULES: Mapping[str, Callable[[Array, tuple[int, int]], int]] = {
    "evbmf": lambda sigma, shape: evidence(sigma, shape).rank,
    "ard": lambda sigma, shape: relevance(sigma, shape).rank,
}


@dataclass(frozen=True)
class Selector:
    """A rule and how far it is followed.

    Attributes:
        rule: One of ``RULES``.
        weaken: Share of the way from the rank of the rule to full rank, in [0, 1).
        floor: Least share of the squared spectrum that must be kept; below it the layer is refused.
    """

    rule: str
    weaken: float = 0.0
    floor: float = 0.5

    def rank(self, sigma: Array, shape: tuple[int, int]) -> int | str:
        """Return the rank for a matrix (m, n) with singular values sigma (min(m, n),), or why none is taken.

        The rule takes what does not stand out of even noise for noise. Weights are no noisy data: where their spectrum
        falls slowly, that would be most of a layer, hence the floor.
        """
        total = float(sigma @ sigma)
        if total == 0:
            return f"{self.rule}: the spectrum is all zeros"
        found = RULES[self.rule](sigma, shape)
        rank = math.ceil(found + self.weaken * (len(sigma) - found))
        kept = float(sigma[:rank] @ sigma[:rank]) / total
        if rank == 0:
            return f"{self.rule} finds rank 0: hardly anything stands out of the noise; try {self.rule}:weaken=0.3"
        if rank == 1:
            return (
                f"{self.rule} gives rank 1, which keeps {100 * kept:.0f} % of the energy; "
                f"try {self.rule}:weaken=0.3, or --rank 1 if that is enough"
            )
        if kept < self.floor:
            return (
                f"rank {rank} of {self.rule} keeps {100 * kept:.0f} % of the energy, below the floor of "
                f"{100 * self.floor:g} %"
            )
        return rank


def read_selector(text: str) -> Selector:
    """Read ``evbmf`` or ``evbmf:weaken=0.3,floor=0.6``.

    Raises:
        LowRankError: There is no such rule or option, or a number is out of range.
    """
    rule, _, rest = text.partition(":")
    if rule not in RULES:
        raise LowRankError(f"--rank {text}: unknown selector '{rule}'; there are {', '.join(RULES)}")
    numbers = {"weaken": 0.0, "floor": 0.5}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in numbers:
            raise LowRankError(f"--rank {text}: {rule} takes weaken= and floor=, got '{part}'")
        try:
            numbers[name] = float(value)
        except ValueError as error:
            raise LowRankError(f"--rank {text}: {name} must be a number, got '{value}'") from error
    if not 0 <= numbers["weaken"] < 1 or not 0 <= numbers["floor"] <= 1:
        raise LowRankError(f"--rank {text}: weaken must be in [0, 1) and floor in [0, 1]")
    return Selector(rule, **numbers)
