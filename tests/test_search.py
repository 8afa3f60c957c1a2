"""How far a search steps back when the evaluation data lose more than the calibration data did."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lowrank_onnx import search
from lowrank_onnx.errors import TargetError

KNOWN = {0.2: 1e-5, 0.4: 1e-3, 0.6: 5e-3, 0.8: 1e-2, 0.9: 3e-2}


def test_steps_back_to_where_the_known_drops_promise_it() -> None:
    assert search._step_back(KNOWN, 0.8, 0.5) == pytest.approx(0.6, rel=1e-3)
    assert search._step_back(KNOWN, 0.6, 0.2) == pytest.approx(0.4, rel=1e-3)
    assert 0.6 < search._step_back(KNOWN, 0.8, 0.8) < 0.8


def test_steps_are_neither_tiny_nor_huge() -> None:
    assert search._step_back(KNOWN, 0.8, 0.999) == pytest.approx(0.95 * 0.8)
    assert search._step_back(KNOWN, 0.8, 1e-9) == pytest.approx(0.5 * 0.8)
    assert search._step_back({0.3: 0.0, 0.5: 0.0}, 0.5, 0.5) < 0.5  # drops that are all the same tell nothing
    assert search._step_back({0.3: 2e-3, 0.5: 1e-3}, 0.5, 0.5) < 0.5  # nor do such that fall


def confirmed(lost: float, attempts: list[float]) -> Any:
    """Search with a drop on the evaluation data of ``lost * share ** 4``; a model is its share."""
    judge = SimpleNamespace(wish=0.01, at_the_end=lambda share: lost * share**4)

    def retry(share: float) -> float:
        attempts.append(share)
        return share

    known = {share: share**4 for share in (0.1, 0.3, 0.5, 0.7, 0.9)}
    problem: Any = None
    return search._confirmed(problem, 0.9, 0.9, known, judge, "macs", retry)  # type: ignore[arg-type]


def test_what_is_found_is_near_the_wish() -> None:
    attempts: list[float] = []
    found = confirmed(0.05, attempts)
    assert 0.8 * 0.01 < 0.05 * found**4 <= 0.01 and len(attempts) == 1


def test_nothing_within_the_wish_tells_the_least_that_was_measured() -> None:
    attempts: list[float] = []
    with pytest.raises(TargetError, match=r"leaves nothing to gain in macs: 3\.0000 is the least drop"):
        confirmed(3e4, attempts)
    assert len(attempts) == search._CONFIRMED
