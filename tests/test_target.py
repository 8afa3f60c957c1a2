"""Wishes: read, or refused with the range they must be in."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lowrank_onnx.base import RankWish
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.selectors import Selector
from lowrank_onnx.target import DEFAULT_DROP, read_rank, read_target


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("64", RankWish(absolute=64)),
        ("1", RankWish(absolute=1)),
        ("0.25", RankWish(fraction=0.25)),
        ("1.0", RankWish(fraction=1.0)),
        ("1e-1", RankWish(fraction=0.1)),
        ("energy=0.95", RankWish(energy=0.95)),
        ("energy=1", RankWish(energy=1.0)),
        ("evbmf", RankWish(selector=Selector("evbmf"))),
        ("ard:weaken=0.3,floor=0", RankWish(selector=Selector("ard", 0.3, 0.0))),
    ],
)
def test_rank_wishes(text: str, wish: RankWish) -> None:
    assert read_rank(text) == wish


NOTHING = ["", "0", "-3", "1.5", "0.0", "-0.5", "nan", "inf", "energy", "energy=", "energy=x", "energy=0", "4,8", "²"]
NO_SELECTORS = ["magic", "evbmf:w=1", "evbmf:weaken=x", "evbmf:weaken=1", "ard:floor=2", "evbmf=3", "evbmf:floor"]


@pytest.mark.parametrize("text", [*NOTHING, *NO_SELECTORS])
def test_rank_wishes_that_mean_nothing(text: str) -> None:
    with pytest.raises(LowRankError, match="--rank") as caught:
        read_rank(text)
    assert text in str(caught.value) or "energy" in text


@pytest.mark.parametrize(
    ("kind", "low", "high", "wrong"),
    [
        ("keep_params", 1e-9, 1.0, (0.0, 1.0001, -1.0, math.nan, math.inf)),
        ("keep_macs", 1e-9, 1.0, (0.0, 1.0001, -1.0, math.nan, math.inf)),
        ("keep_size", 1e-9, 1.0, (0.0, 1.0001, -1.0, math.nan, math.inf)),
        ("speedup", 1.0001, 100.0, (1.0, 0.5, 0.0, -2.0, math.nan, math.inf)),
        ("max_drop", 0.0, 0.999, (1.0, -0.001, math.nan, math.inf)),
    ],
)
def test_ranges(kind: str, low: float, high: float, wrong: tuple[float, ...]) -> None:
    for value in (low, high):
        target = read_target({kind: value})
        assert (target.kind, target.value, target.as_dict()) == (kind, value, {kind: value})
    for value in wrong:
        with pytest.raises(LowRankError, match=f"--{kind.replace('_', '-')} must be"):
            read_target({kind: value})


def test_no_wish_is_one_percent() -> None:
    assert read_target({"rank": None}).as_dict() == {"max_drop": DEFAULT_DROP}


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"rank": 4, "keep_macs": 0.5}, "exactly one"),
        ({"keep_flops": 0.5}, "keep_flops"),
        ({"keep_macs": "half"}, "number"),
    ],
)
def test_wrong_wishes(wishes: dict[str, Any], says: str) -> None:
    with pytest.raises(LowRankError, match=says):
        read_target(wishes)


@pytest.mark.parametrize(
    ("value", "told"), [(64, {"rank": 64}), (0.25, {"rank": 0.25}), ("energy=0.9", {"rank": "energy=0.9"})]
)
def test_a_rank_reads_back_as_it_is_told(value: Any, told: dict[str, Any]) -> None:
    target = read_target({"rank": value})
    assert target.as_dict() == told
    assert read_target(target.as_dict()) is not target and read_target(target.as_dict()).rank == target.rank
    assert target.option == f"--rank {value}"
