"""The session that adapts: decisions with a clock of our own, then a real load, with generous bounds."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_onnx import AdaptiveSession
from lowrank_onnx.adaptive import Governor
from lowrank_onnx.errors import LowRankError
from lowrank_onnx.levels import build_levels
from lowrank_onnx.model import from_proto
from tests.builders import build, falling

COSTS = (1.0, 2.0, 4.0)  # ms of each level on an idle machine


def drive(governor: Governor, load: float, requests: int, costs: tuple[float, ...] = COSTS) -> list[int]:
    """The level of every request under a load that makes everything that much slower."""
    seen = []
    for _ in range(requests):
        seen.append(governor.level)
        governor.observe(load * costs[governor.level])
    return seen


def test_it_starts_at_the_most_exact_level_and_stays_while_there_is_time() -> None:
    governor = Governor(3, 5.0)
    assert set(drive(governor, 1.0, 500)) == {2}


def test_it_goes_down_within_a_few_requests_of_a_load() -> None:
    governor = Governor(3, 5.0)
    drive(governor, 1.0, 100)
    seen = drive(governor, 4.0, 100)
    assert seen[-1] == 0 and seen.index(0) <= 10


def test_it_comes_back_when_the_load_goes() -> None:
    governor = Governor(3, 5.0, patience=30)
    drive(governor, 4.0, 200)
    assert governor.level == 0
    seen = drive(governor, 1.0, 400)
    assert seen[-1] == 2 and seen == sorted(seen)


def test_a_level_that_just_misses_is_tried_ever_more_rarely() -> None:
    """Level 2 costs 6 of 5 ms: without hysteresis it would be tried every few requests."""
    governor = Governor(3, 5.0, patience=20)
    seen = drive(governor, 1.5, 5000)
    late = [seen[place : place + 1000].count(2) for place in range(0, 5000, 1000)]
    rises = [place for place in range(1, 5000) if seen[place] > seen[place - 1]]
    assert len(rises) <= 8 and late[-1] <= 10
    gaps = np.diff(rises)
    assert (np.diff(gaps) >= 0).all()


@pytest.mark.parametrize("percentile", [90.0, 95.0])
def test_one_slow_request_is_no_reason(percentile: float) -> None:
    """However slow it is, and not even where it is one of every window of the default 20."""
    governor = Governor(3, 5.0, percentile=percentile)
    for place in range(400):
        assert governor.observe(1e4 if place % 20 == 15 else 2.0) is None


def test_more_slow_requests_than_the_percentile_lets_pass_are_one() -> None:
    governor = Governor(3, 5.0)
    seen = [governor.observe(6.0 if place in (4, 19) else 2.0) for place in range(20)]
    assert seen[:19] == [None] * 19 and seen[19] == 6.0 and governor.level == 1


def test_at_the_lowest_level_it_stays_and_goes_on() -> None:
    governor = Governor(2, 0.5)
    assert drive(governor, 1.0, 300)[-1] == 0


@settings(max_examples=60)
@given(
    st.integers(2, 5),
    st.lists(st.floats(0.01, 50.0), min_size=1, max_size=400),
    st.integers(2, 20),
    st.integers(1, 30),
)
def test_it_moves_one_level_at_a_time_inside_the_levels(
    levels: int, latencies: list[float], window: int, patience: int
) -> None:
    governor = Governor(levels, 5.0, window=window, patience=patience)
    for latency in latencies:
        before = governor.level
        told = governor.observe(latency)
        assert 0 <= governor.level < levels and abs(governor.level - before) <= 1
        assert (told is not None) == (governor.level != before)
        if latency <= 5.0 * 0.5 and max(latencies) <= 5.0:
            assert governor.level >= before


@pytest.mark.parametrize(
    "changed", [{"latency_ms": 0.0}, {"percentile": 0.0}, {"window": 1}, {"patience": 0}, {"headroom": 1.0}]
)
def test_settings_out_of_range_are_told(changed: dict[str, float]) -> None:
    with pytest.raises(LowRankError, match="must be"):
        Governor(**({"levels": 3, "latency_ms": 1.0} | changed))  # type: ignore[arg-type]


# --- around a session ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three levels of one wide layer, far apart in cost."""
    u, v = falling(1024, 512, seed=1), falling(512, 1024, seed=2)
    graph = "g (float[n,1024] x) => (float[n,1024] y) { a = MatMul(x, u) y = MatMul(a, v) }"
    models = [from_proto(build(graph, {"u": u[:, :rank], "v": v[:rank]})).proto for rank in (16, 96, 512)]
    file = tmp_path_factory.mktemp("levels") / "m.onnx"
    onnx.save(build_levels(models), file)
    return file


def test_a_wish_that_is_none_is_told_before_the_levels_are_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr("lowrank_onnx.adaptive.level_openers", lambda *_: [lambda: opened.append(1)] * 3)
    with pytest.raises(LowRankError, match="must be above 0, got 0"):
        AdaptiveSession(path, latency_ms=0.0)
    assert not opened


FEEDS = {"x": np.ones((16, 1024), np.float32)}


class Ticks:
    """A clock that makes every request take what its level costs."""

    session: AdaptiveSession | None = None

    def __init__(self) -> None:
        self.now, self.load, self.begun = 0.0, 1.0, False

    def __call__(self) -> float:
        self.begun = not self.begun
        if not self.begun and self.session is not None:
            self.now += self.load * COSTS[self.session.level] / 1000
        return self.now


def test_levels_decisions_and_requests_can_be_watched(path: Path) -> None:
    clock = Ticks()
    session = AdaptiveSession(path, latency_ms=5.0, patience=10, threads=1, clock=clock)
    clock.session = session
    assert (session.levels, session.level, session.decisions) == (3, 2, ())
    assert [value.name for value in session.get_inputs()] == ["x"]
    exact = session.run(None, FEEDS)[0]
    clock.load = 4.0
    for _ in range(60):
        session.run(None, FEEDS)
    assert session.level == 0
    assert [(entry.before, entry.level) for entry in session.decisions] == [(2, 1), (1, 0)]
    assert all(entry.latency_ms > 5.0 for entry in session.decisions)
    assert sum(session.served) == 61 and session.decisions[0].request == session.served[2]
    rough = session.run(None, FEEDS)[0]
    assert np.abs(rough - exact).max() > 0


def test_requests_from_many_threads_are_all_answered(path: Path) -> None:
    session = AdaptiveSession(path, latency_ms=1e-6, window=4, threads=1)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: session.run(["y"], FEEDS)[0].shape, range(200)))
    assert set(found) == {(16, 1024)} and sum(session.served) == 200
    assert session.level == 0 and [entry.level for entry in session.decisions] == [1, 0]


def test_it_keeps_the_wish_while_a_load_comes_and_goes(path: Path) -> None:
    """Half-way other threads take the cores. The bound is generous: the machine does other things as well."""
    session = AdaptiveSession(path, latency_ms=1e9, threads=1)
    idle = [_took(session) for _ in range(30)]
    wish = 2.5 * float(np.median(idle))
    session = AdaptiveSession(path, latency_ms=wish, patience=20, threads=1)
    stop = threading.Event()
    load = [threading.Thread(target=_burn, args=(stop,)) for _ in range(6)]
    latencies = [_took(session) for _ in range(60)]
    for thread in load:
        thread.start()
    latencies += [_took(session) for _ in range(150)]
    stop.set()
    for thread in load:
        thread.join()
    latencies += [_took(session) for _ in range(60)]
    assert sum(session.served) == 270, "no request fails"
    assert float(np.median(latencies)) <= 1.2 * wish


def _took(session: AdaptiveSession) -> float:
    begin = time.perf_counter()
    session.run(None, FEEDS)
    return 1000 * (time.perf_counter() - begin)


def _burn(stop: threading.Event) -> None:
    a = np.ones((300, 300))
    while not stop.is_set():
        a = np.tanh(a @ a)
