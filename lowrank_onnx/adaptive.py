"""A session that keeps a wished latency by choosing the level of a file with several (``compress --levels``)."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_onnx.errors import LowRankError, ModelError
from lowrank_onnx.level_files import level_openers
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import load
from lowrank_onnx.runtime import Runtime

_KEPT_DECISIONS = 1000


@dataclass(frozen=True, slots=True)
class Decision:
    """One change of level.

    Attributes:
        request: How many requests had been answered.
        level, before: The new level, and the one it was.
        latency_ms: The latency that made it, as ``AdaptiveSession`` watches it.
    """

    request: int
    level: int
    before: int
    latency_ms: float


class Governor:
    """Decides the level from latencies alone; no threads, no clock of its own.

    Down one level as soon as the watched percentile of the last ``window`` requests at this level is above the
    wish. Up one level when it has stayed below ``headroom`` of what the higher level is expected to leave of the
    wish, for ``patience`` requests; a higher level that had to be left again at once is waited for twice as long
    the next time, at most ``64 * patience`` requests, so that a steady load ends at one level.

    Args:
        levels: How many there are; the highest is the most exact and the slowest.
        latency_ms: The wish.
        percentile: Share of the requests, in percent, that have to be within it, in (0, 100].
        window: Requests that are looked at; of 20, a percentile of 95 lets one be as slow as it likes.
        patience: Requests before the first step up.
        headroom: Share of the wish that the higher level may be expected to take, in (0, 1).
    """

    def __init__(
        self,
        levels: int,
        latency_ms: float,
        percentile: float = 95.0,
        window: int = 20,
        patience: int = 50,
        headroom: float = 0.8,
    ) -> None:
        if not latency_ms > 0:
            raise LowRankError(f"latency_ms must be above 0, got {latency_ms:g}; it is what one request may take")
        if not 0 < percentile <= 100 or window < 2 or patience < 1 or not 0 < headroom < 1:
            raise LowRankError(
                "percentile must be in (0, 100], window at least 2, patience at least 1 and headroom in (0, 1), got "
                f"{percentile:g}, {window}, {patience}, {headroom:g}"
            )
        self.level = levels - 1
        self.levels, self.latency_ms, self.percentile = levels, latency_ms, percentile
        self.headroom, self.patience = headroom, patience
        self._recent: deque[float] = deque(maxlen=window)
        self._typical: dict[int, float] = {}
        self._waits = dict.fromkeys(range(levels), patience)
        self._calm = 0
        self._since_rise: int | None = None

    def observe(self, latency_ms: float) -> float | None:
        """Take in one latency of the present level; return the watched latency where it changed the level."""
        self._recent.append(latency_ms)
        self._since_rise = None if self._since_rise is None else self._since_rise + 1
        full = len(self._recent) == self._recent.maxlen
        # A few far too slow requests tell enough: waiting for a full window would make all of it late.
        late = sum(value > self.latency_ms for value in self._recent)
        tolerated = (1 - self.percentile / 100) * (self._recent.maxlen or 0)
        # A latency that was seen, not one between two: else a single request, slow enough, moves any percentile.
        watched = float(np.percentile(list(self._recent), self.percentile, method="inverted_cdf"))
        if late > tolerated + 1 or (full and watched > self.latency_ms):
            return self._move(-1, watched)
        if not full:
            return None
        self._typical[self.level] = statistics.median(self._recent)
        self._calm = self._calm + 1 if self._fits_above(watched) else 0
        if self._calm >= self._waits.get(self.level + 1, self.patience):
            return self._move(1, watched)
        return None

    def _fits_above(self, watched: float) -> bool:
        """Whether the next level is expected to leave room: by what it took against this one when last seen."""
        if self.level + 1 >= self.levels:
            return False
        here, above = self._typical[self.level], self._typical.get(self.level + 1)
        # What was seen there under another load says little of this one; never expect more than twice.
        growth = 1.0 if above is None else min(max(above / max(here, 1e-9), 1.0), 2.0)
        return watched * growth <= self.headroom * self.latency_ms

    def _move(self, step: int, watched: float) -> float | None:
        target = self.level + step
        if not 0 <= target < self.levels:
            return None
        window = self._recent.maxlen or 0
        if step < 0 and self._since_rise is not None:
            hasty = self._since_rise <= 4 * window
            self._waits[self.level] = min(2 * self._waits[self.level], 64 * self.patience) if hasty else self.patience
        self._since_rise = 0 if step > 0 else None
        self.level, self._calm = target, 0
        self._recent.clear()
        return watched


class AdaptiveSession:
    """An ``onnxruntime.InferenceSession`` that moves between levels to keep a wished latency.

    Works like the session it wraps: ``run(output_names, feeds)``. Requests may come from several threads; each
    runs at the level that is present when it begins, and only requests that ran at the present level count for
    the next decision. Nothing is refused and no request waits for another: at the lowest level the latency is
    what the machine gives.

    Args:
        path: What ``compress --levels`` wrote: the file with several levels, or that of the highest one, beside
            which the others lie. All levels are opened.
        latency_ms: Wished latency of one request.
        percentile, window, patience, headroom: See ``Governor``.
        provider, threads: Where it runs; see ``compress``.
        clock: Seconds, rising; for tests.

    Attributes:
        levels: How many levels the file has; ``levels - 1`` is the most exact.
        sessions: What answers at each level, the smallest first.

    Raises:
        ModelError: The file cannot be opened, or has no levels.
        LowRankError: The wish or a setting of the ``Governor`` is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        latency_ms: float,
        *,
        percentile: float = 95.0,
        window: int = 20,
        patience: int = 50,
        headroom: float = 0.8,
        provider: str = "cpu",
        threads: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        openers = level_openers(load(path), Runtime(provider, threads))
        if not openers:
            raise ModelError(f"'{path}' has one level; make a file with several with compress --levels")
        self.levels = len(openers)
        self._governor = Governor(self.levels, latency_ms, percentile, window, patience, headroom)
        self.sessions: tuple[Any, ...] = tuple(open_level() for open_level in openers)
        self._clock, self._lock = clock, threading.Lock()
        self._served = [0] * self.levels
        self._decisions: deque[Decision] = deque(maxlen=_KEPT_DECISIONS)

    @property
    def level(self) -> int:
        """The level the next request gets."""
        return self._governor.level

    @property
    def served(self) -> tuple[int, ...]:
        """Requests answered so far, by level."""
        with self._lock:
            return tuple(self._served)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The last thousand changes of level."""
        with self._lock:
            return tuple(self._decisions)

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array], run_options: Any = None) -> Any:
        """Answer one request at the present level; as ``InferenceSession.run``."""
        level = self._governor.level
        session = self.sessions[level]
        begin = self._clock()
        answer = session.run(output_names, input_feed, run_options)
        took = 1000 * (self._clock() - begin)
        with self._lock:
            self._served[level] += 1
            # A request that began before a change of level tells of a level that is left.
            if level == self._governor.level:
                watched = self._governor.observe(took)
                if watched is not None:
                    self._decisions.append(Decision(sum(self._served), self._governor.level, level, watched))
        return answer

    def get_inputs(self) -> list[Any]:
        """The inputs a caller has to feed; the level is none of them."""
        return list(self.sessions[-1].get_inputs())

    def get_outputs(self) -> list[Any]:
        """The outputs of the session."""
        return list(self.sessions[-1].get_outputs())
