"""What goes through every step of a run: the problem, the options, the clock, and where progress is told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from lowrank_onnx.base import Counts, Moments, Pass
from lowrank_onnx.felt import felt_of, left_out
from lowrank_onnx.problem import Problem
from lowrank_onnx.statistics import Progress, observe
from lowrank_onnx.workers import HERE, Workers

_FEW = 0.25  # rows for each input of a layer
STEPS = ("observe", "propose", "allocate", "rewrite", "refine", "validate")  # a report tells of each


class Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time of a block to a step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def total(self) -> dict[str, float]:
        """All steps, those of ``STEPS`` also where they took no time of their own, and the time since the start."""
        return {"total": time.perf_counter() - self.start, **dict.fromkeys(STEPS, 0.0), **self.seconds}


@dataclass(frozen=True)
class Settings:
    """The options of a run that decide what comes out, besides model, data and target.

    Attributes:
        techniques: Those in use, configured.
        include, exclude: Patterns of node names.
        mask: Input that marks real rows.
        workers: Who decomposes.
        refine: Refit the factors on what the compressed model delivers.
        augment: Calibrate on samples with exchanged tokens or mirrored images as well.
        minimize: What ``max_drop`` makes as small as it can: latency, macs, size or params.
        cache: Use and keep what was measured in earlier runs.
        felt: Fit convolutions to what the outputs feel of their errors.
    """

    techniques: tuple[Pass, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    mask: str | None = None
    workers: Workers = HERE
    refine: bool = True
    augment: bool = True
    minimize: str = "latency"
    cache: bool = True
    felt: bool = True

    @property
    def matrices(self) -> bool:
        """Whether a technique takes attention without its layers."""
        return any(entry.name == "nystrom" for entry in self.techniques)


@dataclass(frozen=True, eq=False)
class Run:
    """One run of the tool on one model; what the user should know of it besides figures collects in ``notes``."""

    problem: Problem
    settings: Settings
    clock: Clock = field(default_factory=Clock)
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)

    def observe(self) -> dict[str, dict[str, Moments | Counts]]:
        """Statistics by site and input, on the calibration data, what is felt of errors among them; empty without."""
        problem = self.problem
        if problem.training is None:
            return {}
        with self.clock.step("observe"):
            copies = len(problem.training) - len(problem.calibrate or ())
            data, mask = problem.training, self.settings.mask
            seen = observe(problem.model, problem.sites, data, problem.runtime, mask, self.progress, copies)
            self.notes[:] = _scarce(seen)
            if not self.settings.felt:
                return seen
            takers = [entry for entry in self.settings.techniques if "convolution" in entry.kinds]
            fitted = [
                site
                for site in problem.sites
                if site.kind == "convolution"
                and site.name in seen
                and any(entry.refuse(site) is None for entry in takers)
            ]
            if told := left_out(problem, fitted):
                self.notes.append(told)
            for name, felt in felt_of(problem, fitted, mask, self.progress).items():
                seen[name] = {key: dataclasses.replace(entry, felt=felt) for key, entry in seen[name].items()}
            return seen


def _scarce(seen: Mapping[str, Mapping[str, Moments | Counts]]) -> list[str]:
    """Tell of layers that saw so few rows that factors which are exact on all of them are wrong on others."""
    rows = {
        name: (entry.rows, len(entry.gram))
        for name, entries in seen.items()
        for entry in entries.values()
        if isinstance(entry, Moments) and entry.rows < len(entry.gram) * _FEW
    }
    if not rows:
        return []
    name, (found, width) = min(rows.items(), key=lambda item: item[1][0] / item[1][1])
    layers = "1 layer" if len(rows) == 1 else f"{len(rows)} layers"
    return [
        f"the calibration data are few for {layers}: {'' if len(rows) == 1 else 'at worst '}{found} rows for the "
        f"{width} inputs of '{name}'; errors on them say little of other data, give more samples"
    ]
