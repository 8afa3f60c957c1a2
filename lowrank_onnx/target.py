"""What the user wishes for: exactly one target, checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_onnx.base import RankWish
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.selectors import read_selector

BUDGETS = ("keep_params", "keep_macs", "keep_size")
KINDS = (*BUDGETS, "speedup", "max_drop", "rank")
OBJECTIVES = ("latency", "macs", "size", "params")
DEFAULT_DROP = 0.01


@dataclass(frozen=True, slots=True)
class Target:
    """One wish.

    Attributes:
        kind: One of ``KINDS``.
        value: The number; NaN for ``rank``.
        rank: The rank wish; None for every other kind.
        text: The wish as it was written.
    """

    kind: str
    value: float
    rank: RankWish | None = None
    text: str = ""

    @property
    def option(self) -> str:
        """The wish as an option of the command line."""
        return f"--{self.kind.replace('_', '-')} {self.text}"

    def as_dict(self) -> dict[str, Any]:
        """As the report has it."""
        if self.rank is None:
            return {self.kind: self.value}
        whole = self.rank.absolute if self.rank.absolute is not None else self.rank.fraction
        return {"rank": self.text if whole is None else whole}


def read_target(wishes: Mapping[str, Any]) -> Target:
    """Return the one target among the wishes that are not None; ``max_drop=0.01`` where there is none.

    Raises:
        LowRankError: More than one wish, an unknown one, or a value out of range.
    """
    given = {name: value for name, value in wishes.items() if value is not None}
    unknown = sorted(set(given) - set(KINDS))
    if unknown:
        raise LowRankError(f"unknown target '{unknown[0]}'; targets are {', '.join(KINDS)}")
    if len(given) > 1:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise LowRankError(f"exactly one target may be given, got {options}")
    kind, value = next(iter(given.items()), ("max_drop", DEFAULT_DROP))
    if kind == "rank":
        return Target("rank", math.nan, read_rank(str(value)), str(value))
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise LowRankError(f"--{kind.replace('_', '-')} must be a number, got '{value}'") from error
    ranges = {
        "keep_params": (0 < number <= 1, "in (0, 1]; it is the share of the parameters to keep"),
        "keep_macs": (0 < number <= 1, "in (0, 1]; it is the share of the multiply-accumulates to keep"),
        "keep_size": (0 < number <= 1, "in (0, 1]; it is the share of the file size to keep"),
        "speedup": (1 < number < math.inf, "above 1; it is latency before / after"),
        "max_drop": (0 <= number < 1, "in [0, 1); it is the relative loss of the metric"),
    }
    fits, text = ranges[kind]
    if not fits:
        raise LowRankError(f"--{kind.replace('_', '-')} must be {text}; got {number:g}")
    return Target(kind, number, None, f"{number:g}")


def read_rank(text: str) -> RankWish:
    """Read ``64``, ``0.25``, ``energy=0.95`` or a selector such as ``evbmf:weaken=0.3``.

    Raises:
        LowRankError: It is none of these, or out of range.
    """
    expected = "an integer ≥ 1, a fraction in (0, 1] such as 0.25, energy=0.95, or a selector such as evbmf"
    name, _, value = text.partition("=")
    try:
        if name == "energy" and value:
            energy = float(value)
            if not 0 < energy <= 1:
                raise LowRankError(f"--rank energy must be in (0, 1], got {energy:g}")
            return RankWish(energy=energy)
        if text.lstrip("+-").isdigit():
            if int(text) < 1:
                raise LowRankError(f"--rank must be at least 1, got {text}")
            return RankWish(absolute=int(text))
        fraction = float(text)
    except ValueError as error:
        if text.partition(":")[0].isidentifier() and name != "energy":
            return RankWish(selector=read_selector(text))
        raise LowRankError(f"--rank must be {expected}; got '{text}'") from error
    if not 0 < fraction <= 1:
        raise LowRankError(f"--rank as a fraction of full rank must be in (0, 1], got {text}")
    return RankWish(fraction=fraction)
