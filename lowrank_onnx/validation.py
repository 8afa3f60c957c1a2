"""Accuracy and speed of models side by side: same inputs, one process, interleaved runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank_onnx.batches import batches, can_batch
from lowrank_onnx.data import Dataset
from lowrank_onnx.errors import MetricError, ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.metrics import Fidelity, FidelityAccumulator, Metric, relative_drop
from lowrank_onnx.runtime import Runtime, fit_empty, one_line, onnxruntime, run
from lowrank_onnx.statistics import Progress
from lowrank_onnx.stddev import stddev_outputs

_BATCH_BYTES = 64 * 2**20  # of inputs and outputs at one time
_RESAMPLES = 1000
_WARM_UPS = 3
_GPU_WARM_UPS = 20  # until the clock of an idle GPU has risen and a graph is captured


@dataclass(frozen=True)
class MetricResult:
    """A metric of both models, on the same samples; ``relative_drop`` is positive where it got worse."""

    name: str
    before: float
    after: float
    relative_drop: float
    samples: int


@dataclass(frozen=True)
class Accuracy:
    """How the candidate answers, against the reference; ``metric`` is None where none was asked for."""

    fidelity: Fidelity
    metric: MetricResult | None


class Outputs:
    """What a session answers to a data set, batch by batch.

    Args:
        session: An open session.
        dataset: The samples.
        size: Batch size; None finds the largest that is safe.
    """

    def __init__(self, session: Any, dataset: Dataset, size: int | None = None) -> None:
        self.session = session
        self.dataset = dataset
        self.size = size if size is not None else safe_batch(session, dataset)

    def __iter__(self) -> Any:
        for indices in batches(len(self.dataset), self.size):
            feeds = self.dataset.batch(indices) if self.size > 1 else self.dataset.feeds(indices[0])
            yield run(self.session, feeds)


def safe_batch(session: Any, dataset: Dataset) -> int:
    """The batch size for a data set: 1 where samples may not be joined, else what memory allows, at most 32."""
    if not can_batch(session, dataset):
        return 1
    feeds = dataset.feeds(0)
    one = sum(value.nbytes for value in (*feeds.values(), *run(session, feeds).values()))
    return int(np.clip(_BATCH_BYTES // max(one, 1), 1, 32))


def compare(
    reference: Any,
    candidate: Any,
    dataset: Dataset,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> Accuracy:
    """Run two sessions on the same data and compare their answers.

    Raises:
        ModelError: One of them cannot run on the data, or their outputs differ in name or shape.
        MetricError: The metric fails, or an output holds NaN.
    """
    size = min(safe_batch(reference, dataset), safe_batch(candidate, dataset))
    names, other = (
        [output.name for output in session.get_outputs() if output.name not in stddev_outputs(session)]
        for session in (reference, candidate)
    )
    if names != other:
        raise ModelError(f"the models differ in their outputs: {', '.join(names)} and {', '.join(other)}")
    other_width = _resized(reference, candidate)
    names = [name for name in names if name not in other_width] or names
    sums = FidelityAccumulator()
    kept = (Collector(len(dataset)), Collector(len(dataset)))
    done = 0
    for before, after in zip(Outputs(reference, dataset, size), Outputs(candidate, dataset, size), strict=True):
        for name in names:
            if before[name].shape != after[name].shape:
                raise ModelError(
                    f"output '{name}' of the candidate has shape {list(after[name].shape)}, that of the reference "
                    f"{list(before[name].shape)}"
                )
        before, after = ({name: entry[name] for name in names} for entry in (before, after))
        sums.update(before, after)
        if metric is not None:
            kept[0].add(before, size)
            kept[1].add(after, size)
        done += size
        if progress is not None:
            progress("validate", min(done, len(dataset)), len(dataset))
    return Accuracy(sums.result(), None if metric is None else _measured(metric, kept, dataset))


def _resized(reference: Any, candidate: Any) -> set[str]:
    """Outputs that were given another size together with an input, such as a cache: they cannot be compared."""
    shapes: list[dict[str, Any]] = [
        {value.name: value.shape for value in (*session.get_inputs(), *session.get_outputs())}
        for session in (reference, candidate)
    ]
    differ = {
        name
        for name in shapes[0].keys() & shapes[1].keys()
        if any(
            isinstance(a, int) and isinstance(b, int) and a != b
            for a, b in zip(shapes[0][name], shapes[1][name], strict=False)
        )
    }
    inputs = {value.name for value in reference.get_inputs()}
    return differ - inputs if differ & inputs else set()


def _measured(metric: Metric, kept: tuple[Collector, Collector], dataset: Dataset) -> MetricResult:
    before = metric.score(kept[0].take(), dataset.arrays)
    after = metric.score(kept[1].take(), dataset.arrays)
    return MetricResult(metric.name, before, after, relative_drop(before, after, metric), len(dataset))


class Collector:
    """Outputs of all samples, joined on axis 0 as they come, so that no second copy of them is ever needed.

    Args:
        samples: How many samples there will be.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._whole: dict[str, Array] = {}
        self._filled: dict[str, int] = {}
        self._odd: dict[str, list[Array]] = {}

    def add(self, outputs: Mapping[str, Array], size: int) -> None:
        """Add the outputs of the next batch, of ``size`` samples or fewer if it is the last one."""
        for name, value in outputs.items():
            rows = value[None] if value.ndim == 0 else value
            if name not in self._whole and name not in self._odd:
                count = -(-len(rows) * self._samples // min(size, self._samples))
                self._whole[name] = np.empty((count, *rows.shape[1:]), rows.dtype)
                self._filled[name] = 0
            whole = self._whole.get(name)
            start = self._filled.get(name, 0)
            if whole is not None and rows.shape[1:] == whole.shape[1:] and start + len(rows) <= len(whole):
                whole[start : start + len(rows)] = rows
                self._filled[name] = start + len(rows)
                continue
            if whole is not None:  # samples of several sizes: joined at the end, or not at all
                self._odd[name] = [whole[:start].copy()]
                del self._whole[name]
            self._odd[name].append(rows)

    def take(self) -> dict[str, Array]:
        """Give the arrays away."""
        made = {name: whole[: self._filled[name]] for name, whole in self._whole.items()}
        for name, parts in self._odd.items():
            made[name] = _stacked(name, [part for part in parts if len(part)])
        self._whole, self._odd = {}, {}
        return made


def _stacked(name: str, parts: Sequence[Array]) -> Array:
    try:
        return np.concatenate(parts)
    except ValueError as error:
        shapes = ", ".join(sorted({str(list(part.shape[1:])) for part in parts}))
        raise MetricError(
            f"output '{name}' differs in shape from sample to sample ({shapes}); a metric needs samples of one size"
        ) from error


@dataclass(frozen=True)
class Latency:
    """Wall time of one run in milliseconds.

    Attributes:
        median, iqr: Over the runs.
        runs: How many.
        quiet: The tenth percentile: what a run takes when nothing else does. On a busy machine times have two modes,
            and on which of them a median falls is chance; 0 where it was not measured.
    """

    median: float
    iqr: float
    runs: int
    quiet: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """As the report has it."""
        return {"median": self.median, "iqr": self.iqr, "runs": self.runs}


@dataclass(frozen=True)
class Ratio:
    """Latency of the first model over that of another: point, and bootstrap 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Interleaved timing of several models; ``ratios[i]`` compares model i with the first."""

    latencies: tuple[Latency, ...]
    ratios: tuple[Ratio, ...]


def benchmark(
    sessions: Sequence[Any],
    feeds: Mapping[str, Array] | Sequence[Mapping[str, Array]],
    runtime: Runtime,
    seed: int = 0,
    seconds: float = 6.0,
    runs: int = 200,
    fewest: int = 15,
) -> Timing:
    """Time models side by side.

    Every round runs each model once, in random order, with inputs and outputs bound. The bootstrap draws
    rounds, so that what slows a whole round down cancels.

    Args:
        sessions: Open sessions; the first is the reference.
        feeds: Inputs for all, or one set per session.
        runtime: Where the sessions run.
        seed: Order of the runs and draws of the bootstrap.
        seconds: Stop after that long, but not before ``fewest`` rounds.
        runs: At most that many rounds.
        fewest: At least that many rounds.
    """
    each = [feeds] * len(sessions) if isinstance(feeds, Mapping) else list(feeds)
    calls = [_bound(session, inputs, runtime) for session, inputs in zip(sessions, each, strict=True)]
    for call in calls:
        for _ in range(_GPU_WARM_UPS if runtime.on_gpu else _WARM_UPS):
            call()
    rng = np.random.default_rng(seed)
    times: list[list[float]] = []
    start = time.perf_counter()
    while len(times) < runs and (len(times) < fewest or time.perf_counter() - start < seconds):
        row = [0.0] * len(calls)
        for place in rng.permutation(len(calls)):
            begin = time.perf_counter()
            calls[place]()
            row[place] = 1000 * (time.perf_counter() - begin)
        times.append(row)
    table = np.array(times)  # (rounds, models)
    return Timing(tuple(_latency(column) for column in table.T), tuple(_ratios(table, rng)))


def expected_timing(
    sessions: Sequence[Any],
    kinds: Sequence[Sequence[Mapping[str, Array]]],
    shares: Sequence[float],
    seed: int = 0,
    seconds: float = 5.0,
) -> Timing:
    """The first model against each, in expectation over the kinds of input; see ``time_kinds``.

    Returns:
        ``median`` and ``quiet`` of each latency are expected ones; ``quiet`` is of lower quartiles, as the ratios are.
    """
    return time_kinds(sessions, kinds, shares, seed, seconds).against(0)


@dataclass(frozen=True, eq=False)
class Paces:
    """What runs of models took that were timed side by side.

    Attributes:
        table: (rounds, kinds, models) in ms.
        shares: (kinds,) how often each kind of input comes.
        seed: Of the intervals.
    """

    table: Array
    shares: Array
    seed: int

    def against(self, reference: int) -> Timing:
        """Expected latencies, and one of the models against each; see ``expected_timing``."""
        quiet, middle, high = (np.percentile(self.table, q, axis=0).T @ self.shares for q in (25, 50, 75))
        rounds = len(self.table)
        draws = np.random.default_rng(self.seed).integers(0, rounds, (_RESAMPLES, rounds))
        drawn = np.einsum("dks,k->ds", np.percentile(self.table[draws], 25, axis=1), self.shares)
        spreads = np.percentile(drawn[:, reference, None] / drawn, [2.5, 97.5], axis=0)
        places = range(self.table.shape[2])
        ratios = (Ratio(float(quiet[reference] / quiet[i]), float(spreads[0, i]), float(spreads[1, i])) for i in places)
        latencies = (Latency(float(middle[i]), float(high[i] - quiet[i]), rounds, float(quiet[i])) for i in places)
        return Timing(tuple(latencies), tuple(ratios))


def time_kinds(
    sessions: Sequence[Any],
    kinds: Sequence[Sequence[Mapping[str, Array]]],
    shares: Sequence[float],
    seed: int = 0,
    seconds: float = 5.0,
) -> Paces:
    """Time models whose work follows the input, side by side: each kind of input, weighted by its share.

    A mean over all runs would be a mean over whatever else the machine did: the lower quartile of each kind tells what
    a run takes when little else runs. Before its timed runs a model runs an input of the first kind, the usual
    one, untimed: a model that is served finds its own weights in the cache, not those of another.

    Args:
        kinds: Inputs of each kind, the usual one first; an empty kind does not count.
        shares: How often each kind comes.
    """
    present = [(entries, share) for entries, share in zip(kinds, shares, strict=True) if entries and share > 0]
    weights = np.array([share for _, share in present])
    rng = np.random.default_rng(seed)
    for entries, _ in present:
        for session in sessions:
            for feeds in entries[:3]:
                run(session, feeds)
    outputs = [[output.name for output in session.get_outputs()] for session in sessions]
    rounds: list[Array] = []
    start = time.perf_counter()
    while len(rounds) < 2000 and (len(rounds) < 20 or time.perf_counter() - start < seconds):
        taken = np.empty((len(present), len(sessions)))
        chosen = [entries[int(rng.integers(len(entries)))] for entries, _ in present]
        for place in rng.permutation(len(sessions)):
            sessions[place].run(outputs[place], chosen[0])
            for kind, feeds in enumerate(chosen):
                begin = time.perf_counter()
                sessions[place].run(outputs[place], feeds)
                taken[kind, place] = 1000 * (time.perf_counter() - begin)
        rounds.append(taken)
    return Paces(np.array(rounds), weights, seed)


def _bound(session: Any, feeds: Mapping[str, Array], runtime: Runtime) -> Any:
    """A call that runs the session once, with inputs on the device and outputs left there."""
    shapes = {value.name: tuple(value.shape) for value in session.get_inputs()}
    fitted = fit_empty(feeds, shapes)
    text = any(value.dtype.kind in "OSU" for value in fitted.values())
    if text or _is_misdeclared(session, fitted):  # text has no device to be on

        def call() -> None:
            session.run(None, fitted)

    else:
        call = _on_device(session, fitted, runtime)

    try:
        call()
    except Exception as error:  # onnxruntime raises a class of its own for each status code
        raise ModelError(f"onnxruntime could not run the model on the given shapes: {one_line(error)}") from error
    return call


def _is_misdeclared(session: Any, feeds: Mapping[str, Array]) -> bool:
    """Whether an output has another shape than the model says: onnxruntime warns, but reuses no buffer for it."""
    made = run(session, feeds)
    for output in session.get_outputs():
        declared, shape = output.shape, np.shape(made[output.name]) if hasattr(made[output.name], "dtype") else ()
        if declared and (
            len(declared) != len(shape)
            or any(isinstance(size, int) and size != real for size, real in zip(declared, shape, strict=True))
        ):
            return True
    return False


def _on_device(session: Any, feeds: Mapping[str, Array], runtime: Runtime) -> Callable[[], None]:
    ort = onnxruntime()
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(value, runtime.memory, 0))
    if runtime.on_gpu:  # in buffers of their own: a captured graph writes to the same addresses every time
        for name, value in run(session, feeds).items():
            binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(value, runtime.memory, 0))
    else:
        for output in session.get_outputs():
            binding.bind_output(output.name, runtime.memory)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def _latency(column: Array) -> Latency:
    quiet, low, middle, high = np.percentile(column, [10, 25, 50, 75])
    return Latency(float(middle), float(high - low), len(column), float(quiet))


def _ratios(table: Array, rng: np.random.Generator) -> list[Ratio]:
    """The first model against each, of (rounds, models).

    A median over rounds, each against itself, so that what slows a whole round down cancels: where half of the runs
    meet other work, on which side of it the median time of one model falls is chance.
    """
    draws = rng.integers(0, len(table), (_RESAMPLES, len(table)))
    ratios = []
    for column in table.T:
        paired = table[:, 0] / column
        low, high = np.percentile(np.median(paired[draws], axis=1), [2.5, 97.5])
        ratios.append(Ratio(float(np.median(paired)), float(low), float(high)))
    return ratios
