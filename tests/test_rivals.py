"""The static model a cascade has to beat: judged by the rule of the cascade, found by bisection, the fastest of all."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_onnx import rivals
from lowrank_onnx.budget import Selection, carry_out
from lowrank_onnx.building import Built
from lowrank_onnx.cascade import agrees, common_threshold
from lowrank_onnx.data import Dataset
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.rivals import Exam, Static, advice, answers, find_static, judge
from tests.builders import RUNTIME, build

GRAPH = "g (float[n,4] x) => (float[n,4] y) { y = MatMul(x, w) }"
SAMPLES = 200


def one_hot() -> np.ndarray:
    return np.eye(4, dtype=np.float32)[np.arange(SAMPLES) % 4]


def exam(evaluate: np.ndarray | None = None, agreement: float = 0.95) -> Exam:
    data = {} if evaluate is None else {"x": evaluate}
    problem = pose(build(GRAPH, {"w": np.eye(4, dtype=np.float32)}), RUNTIME, {"x": one_hot()}, data or None)
    assert problem.calibrate is not None
    found = answers(problem.session, problem.calibrate)
    return Exam(problem, problem.calibrate, ("y",), agreement, found, found)


def other(problem: Problem, *rows: int) -> Selection:
    """A model that gives another answer to some of the four kinds of samples."""
    weight = np.eye(4, dtype=np.float32)
    weight[list(rows)] = np.roll(weight[list(rows)], 1, axis=1)
    same = carry_out(problem, [])
    return Selection((), Built(build(GRAPH, {"w": weight}), {}, 0), same.cost)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0]), min_size=9, max_size=60), min_size=1, max_size=2))
def test_a_model_agrees_where_a_cascade_of_it_would_send_nothing_on(entries: list[list[float]]) -> None:
    losses = [np.array(entry) for entry in entries]
    rng = np.random.default_rng(0)
    nothing = common_threshold([(rng.random(len(lost)), lost) for lost in losses], 0.9) == -np.inf
    assert agrees(losses, 0.9) == nothing


def test_the_samples_of_the_fit_the_others_and_the_evaluation_data_all_have_to_agree() -> None:
    given = exam()
    static = judge(given, "macs", other(given.problem))
    assert static is not None and static.agreement == 1 and static.evaluated is None
    assert judge(given, "macs", other(given.problem, 0)) is None
    held = given.held.subset([place for place in range(SAMPLES) if place % 4])  # none of the first kind
    exact = answers(given.problem.session, held)
    assert judge(Exam(given.problem, held, ("y",), 0.95, given.seen, exact), "macs", other(given.problem, 0)) is None
    swapped = Exam(_fitted_to(given.problem, held), given.held, ("y",), 0.95, exact, given.reference)
    assert judge(swapped, "macs", other(given.problem, 0)) is None
    both = Exam(_fitted_to(given.problem, held), held, ("y",), 0.95, exact, exact)
    assert judge(both, "macs", other(given.problem, 0)) is not None
    told = exam(one_hot())
    last = Exam(_fitted_to(told.problem, held), held, ("y",), 0.95, exact, exact)
    assert judge(last, "macs", other(told.problem, 0)) is None, "the evaluation data have the first kind"


def _fitted_to(problem: Problem, data: Dataset) -> Problem:
    return dataclasses.replace(problem, calibrate=data)


def test_the_largest_saving_that_agrees_is_bisected_and_the_fastest_of_all_wins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, list[float]] = {"macs": [], "latency": []}
    limits = {"macs": 0.3, "latency": 0.8}

    def frontier(unit: str) -> Any:
        def at(share: float) -> Any:
            asked[unit].append(share)
            return (unit, share)

        return at

    def judged(given: Any, unit: str, selection: Any) -> Any:
        return SimpleNamespace(session=selection) if selection[1] <= limits[unit] else None

    def timed(sessions: list[Any], *rest: Any) -> Any:
        ms = {"original": 9.0, ("macs", 0.25): 3.0, ("macs", 0.28125): 4.0, "level": 3.5}
        return SimpleNamespace(latencies=[SimpleNamespace(quiet=ms.get(entry, 8.0)) for entry in sessions])

    monkeypatch.setattr(rivals, "judge", judged)
    monkeypatch.setattr(rivals, "expected_timing", timed)
    given: Any = SimpleNamespace(problem=SimpleNamespace(session="original", seed=0), held=[])
    level: Any = SimpleNamespace(session="level")
    found, tried = find_static(given, [(unit, frontier(unit)) for unit in limits], [level])
    assert asked == {"macs": [0.5, 0.25, 0.375, 0.3125, 0.28125], "latency": [0.5, 0.75, 0.875, 0.8125, 0.78125]}
    assert tried == 11 and found is not None and found.session == ("macs", 0.25)
    assert find_static(given, [], []) == (None, 0)
    assert find_static(given, [], [level]) == (level, 1)


def test_the_advice_asks_for_such_a_model() -> None:
    problem = exam().problem
    static = Static("macs", other(problem), None, 1.0, None)
    assert advice(static, problem, 2.0) == "--keep-macs 1"
    assert advice(Static("latency", static.selection, None, 1.0, None), problem, 2.0) == "--speedup 2.00"
    assert advice(Static("--keep-size 0.5", static.selection, None, 1.0, None), problem, 2.0) == "--keep-size 0.5"
