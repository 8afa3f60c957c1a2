"""Ranks and layers that are worth a try on a device, as ``crossovers.py`` measured it or as a start.

A GPU rounds a rank up to its tiles: one past a multiple costs as much as the next. And a further kernel
costs its launch: below some size no factorization is quicker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_onnx.base import Candidate, Site
from lowrank_onnx.cache import Cache
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.runtime import Runtime, gpu_libraries, onnxruntime

_START = {"float16": 64, "float32": 32}  # on a GPU, until it is calibrated
_FEWEST = 3  # ranks that a layer keeps: a narrow one gets a finer grid
GRID_KINDS = ("linear", "shared_input", "feedforward", "convolution")


@dataclass(frozen=True)
class Crossover:
    """One shape of layer on one device.

    Attributes:
        dtype: ``float16`` or ``float32``.
        rows, inputs, outputs: Of the product.
        dense_us: Microseconds of the dense layer.
        speedups: At shares of break-even, rising: share, point, ends of the 95 % interval.
    """

    dtype: str
    rows: int
    inputs: int
    outputs: int
    dense_us: float
    speedups: tuple[tuple[float, float, float, float], ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer."""
        return self.rows * self.inputs * self.outputs

    @property
    def gains(self) -> bool:
        """Whether any share is quicker for certain."""
        return any(low > 1 for _, _, low, _ in self.speedups)

    @property
    def share(self) -> float | None:
        """The share of break-even below which the factorized layer is quicker; None where it never is."""
        if self.speedups[0][1] <= 1:
            return None
        for (near, above, *_), (far, below, *_) in zip(self.speedups, self.speedups[1:], strict=False):
            if below <= 1:
                return float(near + (far - near) * np.log(above) / np.log(above / below))
        return 1.0


@dataclass(frozen=True)
class DeviceTable:
    """What is known of a device.

    Attributes:
        steps: Grid of ranks by dtype; a dtype that is missing has no grid but that of the technique.
        crossovers: What was measured; empty before ``calibrate-device``.
    """

    steps: Mapping[str, int]
    crossovers: tuple[Crossover, ...] = field(default=())

    def least_macs(self, dtype: str) -> int:
        """Multiply-accumulates up to which every layer measured was slower, at every share; 0 if unknown."""
        measured = sorted((entry for entry in self.crossovers if entry.dtype == dtype), key=lambda entry: entry.macs)
        least = 0
        for entry in measured:
            if entry.gains:
                break
            least = entry.macs
        return least

    def as_dict(self) -> dict[str, Any]:
        """As the table of measurements stores it."""
        return {"steps": dict(self.steps), "crossovers": [dataclasses.asdict(entry) for entry in self.crossovers]}


def device_table(runtime: Runtime, cache: Cache) -> DeviceTable:
    """What was measured of the device, or what to start with."""
    known = cache.get(_key(runtime))
    if known is None:
        return DeviceTable(_START if runtime.on_gpu else {})
    rows = [{**entry, "speedups": tuple(tuple(row) for row in entry["speedups"])} for entry in known["crossovers"]]
    return DeviceTable(known["steps"], tuple(Crossover(**row) for row in rows))


def remember(runtime: Runtime, table: DeviceTable, cache: Cache) -> None:
    """Store what was measured, for every later run on this device with these libraries."""
    cache.put(_key(runtime), table.as_dict())


def _key(runtime: Runtime) -> dict[str, Any]:
    return {
        "what": "device 1",
        "onnxruntime": onnxruntime().__version__,
        "provider": runtime.provider,
        "device": runtime.device,
        "threads": 0 if runtime.on_gpu else runtime.used_threads,
        "libraries": gpu_libraries() if runtime.on_gpu else {},
    }


def large_enough(sites: Sequence[Site], table: DeviceTable) -> tuple[list[Site], dict[str, str]]:
    """Leave out linear layers of a size at which none was quicker factorized; for targets of time.

    Returns:
        The sites that are left, and a reason for every other one.
    """
    left, reasons = [], {}
    for site in sites:
        least = table.least_macs(site.weight.dtype.name) if site.kind == "linear" else 0
        if site.macs is not None and site.macs <= least:
            reasons[site.name] = f"layers up to {least:.1e} multiply-accumulates are slower factorized on this device"
        else:
            left.append(site)
    return left, reasons


def on_grid(proposals: Sequence[Proposal], table: DeviceTable) -> list[Proposal]:
    """Keep the candidates whose ranks are multiples of the device's step.

    A layer too narrow for a few of them gets half the step, and so on; ``multiple`` of a technique that was
    set by hand is left alone.
    """
    return [
        dataclasses.replace(entry, candidates=_chosen(entry.candidates, table.steps[entry.site.weight.dtype.name]))
        if entry.site.kind in GRID_KINDS
        and entry.site.weight.dtype.name in table.steps
        and not getattr(entry.technique, "multiple", 0)
        else entry
        for entry in proposals
    ]


def _chosen(candidates: tuple[Candidate, ...], step: int) -> tuple[Candidate, ...]:
    while step > 1:
        kept = tuple(entry for entry in candidates if all(rank % step == 0 for rank in entry.ranks))
        if len(kept) >= _FEWEST:
            return kept
        step //= 2
    return candidates
