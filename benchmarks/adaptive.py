"""Whether AdaptiveSession keeps a latency while other work on the machine comes and goes.

    python benchmarks/adaptive.py LEVELS.onnx --latency 12 --data DATA --threads 1

LEVELS.onnx is a file that ``compress --levels`` wrote. Phases without and with busy processes alternate; one line a
phase: the latencies of the session, and those of its highest and lowest level in the same phase, request by request in
turn.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lowrank_onnx import AdaptiveSession


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--latency", type=float, required=True, help="milliseconds")
    parser.add_argument("--data", type=Path, required=True, help=".npz; its first sample is every request")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--busy", default="0,1,2,4,2,0", help="busy processes in each phase")
    parser.add_argument("--seconds", type=float, default=15.0, help="of a phase")
    options = parser.parse_args()
    session = AdaptiveSession(options.model, options.latency, threads=options.threads)
    names = {entry.name for entry in session.get_inputs()}
    with np.load(options.data, allow_pickle=False) as arrays:
        feeds = {name: arrays[name][:1] for name in arrays.files if name in names}
    fixed = {"highest": session.sessions[-1], "lowest": session.sessions[0]}
    failed, everything = 0, []
    print("| busy | requests | by level | session p50 / p95 ms | highest p50 / p95 | lowest p50 / p95 |")
    print("|---|---|---|---|---|---|")
    for count in map(int, options.busy.split(",")):
        taken: dict[str, list[float]] = {"session": [], "highest": [], "lowest": []}
        before = session.served
        with _busy(count):
            end = time.perf_counter() + options.seconds
            while time.perf_counter() < end:
                begin = time.perf_counter()
                try:
                    session.run(None, feeds)
                except Exception as error:  # counted, not hidden
                    failed += 1
                    print(error)
                taken["session"].append(1000 * (time.perf_counter() - begin))
                if len(taken["session"]) % 5 == 0:  # now and then, so that they are little load themselves
                    for name, level in fixed.items():
                        begin = time.perf_counter()
                        level.run(None, feeds)
                        taken[name].append(1000 * (time.perf_counter() - begin))
        everything += taken["session"]
        served = [now - then for now, then in zip(session.served, before, strict=True)]
        cells = [f"{np.median(values):.1f} / {np.percentile(values, 95):.1f}" for values in taken.values()]
        print(f"| {count} | {sum(served)} | {served} | " + " | ".join(cells) + " |", flush=True)
    within = np.mean(np.array(everything) <= 1.2 * options.latency)
    print(f"\n{len(everything)} requests, {failed} failed, {100 * within:.1f} % within 1.2 times the wish of "
          f"{options.latency:g} ms; p95 {np.percentile(everything, 95):.1f} ms")  # fmt: skip


@contextmanager
def _busy(count: int) -> Iterator[None]:
    started = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.join()


def _spin() -> None:
    side = np.random.default_rng(0).standard_normal((256, 256))
    while True:
        side = np.tanh(side @ side)


if __name__ == "__main__":
    main()
