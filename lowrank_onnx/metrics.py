"""Metrics: how good a model's outputs are, by labels or references in the data, or by a user's own function.

Outputs of all samples are joined on axis 0. A reference array of the data belongs to the output of its name;
``target`` belongs to the first output it fits, ``output_K`` to the K-th.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_onnx.data import describe, is_function, load_function
from lowrank_onnx.errors import MetricError
from lowrank_onnx.linalg import Array

Outputs = Mapping[str, Array]
Function = Callable[[dict[str, Array], Mapping[str, Array]], Any]

CEILING_DB = 300.0  # of SQNR and PSNR: equal outputs have no noise, and a report holds finite numbers only

_BLOCK = 2**22  # elements that are taken to float64 at a time
_WIDEST = 300_000  # classes; the largest vocabularies stay below
_NAMED_SCORES = re.compile(r"logit|score|prob|class|softmax|label", re.IGNORECASE)
_NAMED_FEATURES = re.compile(r"embed|hidden|pool|feature", re.IGNORECASE)


@dataclass(frozen=True)
class Metric:
    """A figure for a model's outputs.

    Attributes:
        name: As the user named it.
        function: Takes the outputs by name and all arrays of the data, returns a number.
        higher_is_better: False for costs: perplexity, mse, mae.
    """

    name: str
    function: Function
    higher_is_better: bool = True

    def score(self, outputs: Outputs, data: Mapping[str, Array]) -> float:
        """Return the raw figure; a cost keeps its sign.

        Args:
            outputs: Outputs of all samples joined on axis 0, by name, in the model's order. The arrays are
                given away: a user's function may write into them.
            data: All arrays of the evaluation data, inputs among them.

        Raises:
            MetricError: Arrays are missing or do not fit, the function fails or returns no finite number.
        """
        value = self.function(dict(outputs), data)
        if isinstance(value, list | tuple | dict) or np.ndim(value) or np.asarray(value).dtype.kind not in "fiu":
            raise MetricError(f"metric {self.name} returned a {type(value).__name__}; expected one number")
        number = float(value)
        if not np.isfinite(number):
            raise MetricError(f"metric {self.name} returned {number}; expected a finite number")
        return number


def relative_drop(before: float, after: float, metric: Metric) -> float:
    """Return how much worse ``after`` is as a share of ``|before|``; positive is worse, for costs too.

    Of ``before == 0`` no share can be taken: the absolute difference stands in for it.
    """
    loss = before - after if metric.higher_is_better else after - before
    return loss / abs(before) if before != 0 else loss


def resolve_metric(name: str) -> Metric:
    """Return a metric by its name, or a user's ``path.py:function`` or ``module:function``.

    Raises:
        MetricError: The name is unknown or no text, or the function cannot be imported.
    """
    if not isinstance(name, str):
        raise MetricError(f"metric must be a name or path.py:function as text, got {type(name).__name__}")
    if name in METRICS:
        return METRICS[name]
    if is_function(name):
        return Metric(name, _guarded(name, load_function(name, "--metric", MetricError)))
    if name.endswith(".py"):
        raise MetricError(f"--metric {name} names a file but no function; expected {name}:function")
    known = ", ".join(METRICS)
    raise MetricError(f"--metric '{name}' is unknown; expected {known}, or path.py:function")


def _guarded(name: str, function: Function) -> Function:
    def call(outputs: dict[str, Array], data: Mapping[str, Array]) -> Any:
        try:
            return function(outputs, data)
        except (Exception, SystemExit) as failure:
            raise MetricError(f"metric {name} raised {describe(failure)}") from failure

    return call


# Class scores against labels


def top1(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Share of labels whose class has the highest score; the first of equal ones counts."""
    return _top(outputs, data, 1, "top1")


def top5(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Share of labels whose class is among the five highest scores."""
    return _top(outputs, data, 5, "top5")


def perplexity(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """exp of the mean negative log-likelihood of the labels; a cost.

    Scores are logits, or probabilities if no score is negative and every row sums to one. The mean is cut at
    700 nats and a probability of zero counts as 1e-38, so that a ruined model has a finite figure.
    """
    scores, labels = _scores_and_labels(outputs, data, "perplexity")
    probabilities = all(is_distribution(block) for block, _ in _blocks(scores, labels))
    nats = 0.0
    for block, wanted in _blocks(scores, labels):
        rows = block.astype(np.float64)
        chosen = np.take_along_axis(rows, wanted[:, None], axis=1)[:, 0]
        if probabilities:
            nats -= np.log(np.maximum(chosen, 1e-38)).sum()
        else:
            top = rows.max(axis=1, keepdims=True)
            nats += (np.log(np.exp(rows - top).sum(axis=1)) + top[:, 0] - chosen).sum()
    return float(np.exp(min(nats / len(labels), 700.0)))


def _top(outputs: Outputs, data: Mapping[str, Array], count: int, metric: str) -> float:
    scores, labels = _scores_and_labels(outputs, data, metric)
    right = 0
    for block, wanted in _blocks(scores, labels):
        own = np.take_along_axis(block, wanted[:, None], axis=1)
        ahead = (block > own) | ((block == own) & (np.arange(block.shape[1]) < wanted[:, None]))
        right += int((ahead.sum(axis=1) < count).sum())
    return right / len(labels)


def _scores_and_labels(outputs: Outputs, data: Mapping[str, Array], metric: str) -> tuple[Array, Array]:
    """Return scores (n, classes) and labels (n,), without the labels that are negative.

    Scores are the float output that fits the labels, (N, T..., C), (N, C, T...) or (N, C, 1, 1) for labels
    (N, T...). Of several the first that looks like class scores (see ``Fidelity``), else the first.

    Raises:
        MetricError: Nothing fits, a label is no class, or an output holds NaN.
    """
    labels = _labels(data, metric)
    fitting = {
        name: rows
        for name, value in outputs.items()
        if value.dtype.kind == "f" and (rows := _class_rows(value, labels.shape)) is not None
    }
    if not fitting:
        raise MetricError(
            f"metric {metric} found no class scores for labels {list(labels.shape)}; expected a float output "
            f"{_wanted(labels.shape)}, found {_told(outputs)}"
        )
    likely = [name for name in fitting if looks_like_scores(name, outputs[name])]
    name = (likely or list(fitting))[0]
    scores, flat = fitting[name], labels.reshape(-1)
    counted = flat >= 0
    if not counted.all():
        scores, flat = scores[counted], flat[counted]
    if len(flat) == 0:
        raise MetricError(f"metric {metric} has nothing to count: every label is negative, which means ignored")
    if flat.max() >= scores.shape[1]:
        raise MetricError(
            f"metric {metric}: label {flat.max()} is no class of output '{name}', which has {scores.shape[1]}"
        )
    _refuse_nan(name, scores)
    return scores, flat.astype(np.int64)


def _labels(data: Mapping[str, Array], metric: str) -> Array:
    for name in ("labels", "label", "target"):
        if name in data and (data[name].dtype.kind in "iub" or name != "target"):
            labels = data[name]
            if labels.dtype.kind not in "iub" or labels.ndim == 0:
                raise MetricError(
                    f"metric {metric}: '{name}' must hold whole numbers, one label a sample, found {_told(data, name)}"
                )
            return labels.astype(np.int64)
    raise MetricError(f"metric {metric} needs an array 'labels' in the evaluation data; found {_told(data)}")


def _class_rows(scores: Array, shape: tuple[int, ...]) -> Array | None:
    """Return scores as (labels, classes) where their shape fits labels of ``shape``, else None."""
    single = shape[:1] if all(size == 1 for size in shape[1:]) else shape  # labels (N, 1) are labels (N,)
    if scores.ndim == len(shape) + 1 and scores.shape[:-1] == shape:
        rows = scores.reshape(-1, scores.shape[-1])
    elif scores.ndim == len(shape) + 1 and scores.shape[:1] + scores.shape[2:] == shape:
        rows = np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1])
    elif len(single) == 1 and scores.ndim > 1 and len(scores) == single[0] and _flat(scores):
        rows = scores.reshape(len(scores), -1)
    else:
        return None
    return rows if rows.shape[1] > 1 else None


def _flat(array: Array) -> bool:
    """Whether only one axis beside the first is longer than 1."""
    longer = [size for size in array.shape[1:] if size != 1]
    return len(longer) <= 1


def _wanted(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}, classes]"


def _blocks(scores: Array, labels: Array) -> Iterator[tuple[Array, Array]]:
    step = max(1, _BLOCK // scores.shape[1])
    for start in range(0, len(scores), step):
        yield scores[start : start + step], labels[start : start + step]


# Values against a target


def psnr(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Peak signal-to-noise ratio in dB, mean over samples, peak 1.0, output cut to [0, 1]; at most 300 dB."""
    return min(float(_decibels(pair).mean()) for pair in _pairs(outputs, data, "psnr").values())


def mse(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Mean squared error, of the worst output; a cost."""
    pairs = _pairs(outputs, data, "mse").values()
    return max(float(np.mean((value.astype(np.float64) - wanted) ** 2)) for value, wanted in pairs)


def mae(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Mean absolute error, of the worst output; a cost."""
    pairs = _pairs(outputs, data, "mae").values()
    return max(float(np.mean(np.abs(value.astype(np.float64) - wanted))) for value, wanted in pairs)


def spearman(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Rank correlation of ``score`` or ``target`` with the output that holds one number a sample.

    Equal values share their mean rank. An output that is the same for every sample correlates 0.
    """
    found = [name for name in ("score", "target") if name in data]
    if not found:
        raise MetricError(f"metric spearman needs an array 'score' in the evaluation data; found {_told(data)}")
    wanted = data[found[0]].reshape(-1)
    fitting = [name for name, value in outputs.items() if value.dtype.kind == "f" and value.size == len(wanted)]
    if not fitting or len(wanted) < 2:
        raise MetricError(
            f"metric spearman needs a float output of one number for each of {len(wanted)} scores (two at least), "
            f"found {_told(outputs)}"
        )
    value = outputs[fitting[0]].reshape(-1)
    _refuse_nan(fitting[0], value)
    if (wanted == wanted[0]).all():
        raise MetricError(f"metric spearman has nothing to rank: all of '{found[0]}' are {wanted[0]}")
    if (value == value[0]).all():
        return 0.0
    return float(np.corrcoef(_ranks(value), _ranks(wanted))[0, 1])


def cosine(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Mean over samples of the cosine with the reference arrays, of the worst output; see ``Fidelity``."""
    return _required(_against(outputs, data, "cosine").cosine, "cosine")


def sqnr(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Signal-to-noise ratio in dB against the reference arrays, of the worst output; see ``Fidelity``."""
    return _required(_against(outputs, data, "sqnr").sqnr_db, "sqnr")


def agreement(outputs: Outputs, data: Mapping[str, Array]) -> float:
    """Share of arg-max equal to that of the reference arrays, of the worst output; see ``Fidelity``."""
    return _required(_against(outputs, data, "agreement").agreement, "agreement")


def _pairs(outputs: Outputs, data: Mapping[str, Array], metric: str) -> dict[str, tuple[Array, Array]]:
    """Return (output, reference) of equal shape by output name; see the module for what belongs together."""
    floats = {name: value for name, value in outputs.items() if value.dtype.kind == "f"}
    numbered = {name: f"output_{place}" for place, name in enumerate(outputs)}
    named = {n: data[key] for n in floats for key in (numbered[n], n) if key in data}
    if not named and "target" in data:
        fitting = [n for n, value in floats.items() if _alike(value, data["target"])]
        if not fitting:
            raise MetricError(
                f"metric {metric}: no float output has the shape of 'target' {list(data['target'].shape)}; "
                f"found {_told(outputs)}"
            )
        named = {fitting[0]: data["target"]}
    if not named:
        raise MetricError(
            f"metric {metric} needs an array 'target', or one named as an output ({', '.join(outputs)}), in the "
            f"evaluation data; found {_told(data)}"
        )
    for name, wanted in named.items():
        if not _alike(floats[name], wanted):
            raise MetricError(
                f"metric {metric}: output '{name}' has shape {list(floats[name].shape)}, its reference "
                f"{_told({name: wanted}, name)}"
            )
        _refuse_nan(name, floats[name])
    return {name: (floats[name], wanted.reshape(floats[name].shape)) for name, wanted in named.items()}


def _alike(value: Array, wanted: Array) -> bool:
    """Whether two arrays of numbers have the same axes, but for axes of length 1 after the first."""
    if wanted.dtype.kind not in "fiub" or value.shape[:1] != wanted.shape[:1]:
        return False
    return [n for n in value.shape[1:] if n != 1] == [n for n in wanted.shape[1:] if n != 1]


def _against(outputs: Outputs, data: Mapping[str, Array], metric: str) -> Fidelity:
    pairs = _pairs(outputs, data, metric)
    reference = {name: wanted.astype(value.dtype) for name, (value, wanted) in pairs.items()}
    return fidelity(reference, {name: value for name, (value, _) in pairs.items()})


def _required(value: float | None, metric: str) -> float:
    if value is None:
        raise MetricError(f"metric {metric}: no output with a reference looks like class scores; use cosine or sqnr")
    return value


def _decibels(pair: tuple[Array, Array]) -> Array:
    value, wanted = (side.reshape(len(side), -1) for side in pair)
    error = np.array(
        [np.mean((np.clip(a.astype(np.float64), 0, 1) - b) ** 2) for a, b in zip(value, wanted, strict=True)]
    )
    return np.asarray(-10 * np.log10(np.maximum(error, 10 ** (-CEILING_DB / 10))))


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[place])


METRICS = {
    "top1": Metric("top1", top1),
    "top5": Metric("top5", top5),
    "agreement": Metric("agreement", agreement),
    "perplexity": Metric("perplexity", perplexity, higher_is_better=False),
    "psnr": Metric("psnr", psnr),
    "mse": Metric("mse", mse, higher_is_better=False),
    "mae": Metric("mae", mae, higher_is_better=False),
    "spearman": Metric("spearman", spearman),
    "cosine": Metric("cosine", cosine),
    "sqnr": Metric("sqnr", sqnr),
}


# Outputs against those of the original


@dataclass(frozen=True)
class Fidelity:
    """How close a rewritten model's outputs are to the original's. Each figure is that of the worst output.

    Attributes:
        cosine: Mean over samples (axis 0) of the cosine between the outputs, -1 to 1. Two zero vectors count
            1, a zero vector against another 0. None if no output holds floats.
        sqnr_db: ``10 log10(sum reference^2 / sum difference^2)`` over all samples, cut to ±``CEILING_DB``:
            300 for equal outputs, -300 where a reference of zeros meets anything else. None as above.
        max_abs_error: Largest absolute difference; None as above.
        agreement: Share of equal arg-max over the outputs that look like class scores; if there is none, share
            of equal elements of the outputs that hold no floats; None if there is neither.

    The class axis is the last of rank 2 and 3, axis 1 of rank 4 and more ((N, C, H, W), (N, C, 1, 1)). A float
    output looks like class scores if that axis is 2 to 300,000 long and one of these holds:

    * its name contains logit, score, prob, class, softmax or label;
    * every row is a probability distribution: nothing negative, sum 1 within 0.01;
    * it has rank 2, or trailing axes of length 1, is at most 1000 wide, and its name contains none of embed,
      hidden, pool, feature.

    By shape alone an embedding (N, 384) looks like 384 classes: a name tells them apart, or nothing does.
    """

    cosine: float | None
    sqnr_db: float | None
    max_abs_error: float | None
    agreement: float | None


def fidelity(reference: Outputs, candidate: Outputs) -> Fidelity:
    """Compare the outputs of two models on the same samples; see ``FidelityAccumulator``.

    Raises:
        MetricError: Names or shapes differ, or an output holds NaN.
    """
    sums = FidelityAccumulator()
    sums.update(reference, candidate)
    return sums.result()


class FidelityAccumulator:
    """Fidelity from sums, batch by batch, so that the outputs need not be kept."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def update(self, reference: Outputs, candidate: Outputs) -> None:
        """Add the outputs of some samples, by name, samples on axis 0; a scalar is one sample.

        Raises:
            MetricError: Names or shapes differ, or the candidate is not finite where the reference is.
        """
        if set(reference) != set(candidate):
            raise MetricError(
                f"the models differ in their outputs: the original has {', '.join(reference)}, the rewritten "
                f"{', '.join(candidate)}"
            )
        for name in reference:
            before, after = np.atleast_1d(reference[name]), np.atleast_1d(candidate[name])
            if before.shape != after.shape or before.dtype.kind != after.dtype.kind:
                raise MetricError(
                    f"output '{name}' of the rewritten model is {_told(candidate, name)}, that of the original "
                    f"{_told(reference, name)}"
                )
            self._sums.setdefault(name, _Sums(name)).add(before, after)

    def result(self) -> Fidelity:
        """Return the fidelity over everything added.

        Raises:
            MetricError: Nothing was added.
        """
        entries = [entry for entry in self._sums.values() if entry.elements]
        if not entries:
            raise MetricError("there are no outputs to compare; expected one sample at least")
        floats = [entry for entry in entries if entry.samples]
        scores = [entry for entry in floats if entry.looks_like_scores]
        voting = scores or [entry for entry in entries if not entry.samples]
        return Fidelity(
            cosine=min((entry.cosines / entry.samples for entry in floats), default=None),
            sqnr_db=min((entry.sqnr_db for entry in floats), default=None),
            max_abs_error=max((entry.largest for entry in floats), default=None),
            agreement=min((entry.equal / entry.votes for entry in voting), default=None),
        )


@dataclass
class _Sums:
    """Running sums of one output. ``samples`` stays 0 for an output that holds no floats."""

    name: str
    elements: int = 0
    samples: int = 0
    signal: float = 0.0
    noise: float = 0.0
    cosines: float = 0.0
    largest: float = 0.0
    votes: int = 0
    equal: int = 0
    looks_like_scores: bool = field(default=True)

    @property
    def sqnr_db(self) -> float:
        if self.noise == 0:
            return CEILING_DB
        if self.signal == 0:
            return -CEILING_DB
        return float(np.clip(10 * (np.log10(self.signal) - np.log10(self.noise)), -CEILING_DB, CEILING_DB))

    def add(self, before: Array, after: Array) -> None:
        self.elements += before.size
        if before.dtype.kind != "f":
            self.votes += before.size
            self.equal += int((before == after).sum())
            return
        rows = max(1, _BLOCK // max(1, before[:1].size))
        for start in range(0, len(before) if before.size else 0, rows):
            self._add_floats(before[start : start + rows], after[start : start + rows])

    def _add_floats(self, before: Array, after: Array) -> None:
        self.looks_like_scores = self.looks_like_scores and looks_like_scores(self.name, before)
        if self.looks_like_scores:
            axis = class_axis(before)
            same = before.argmax(axis) == after.argmax(axis)
            self.votes += same.size
            self.equal += int(same.sum())
        x, y = _finite(self.name, before, after)
        inner, xx, yy = (np.einsum("ij,ij->i", a, b) for a, b in ((x, y), (x, x), (y, y)))
        norms = np.sqrt(xx) * np.sqrt(yy)
        both_zero = (xx == 0) & (yy == 0)
        cosines = np.divide(inner, norms, out=both_zero.astype(np.float64), where=norms > 0)
        np.subtract(x, y, out=x)
        self.samples += len(x)
        self.cosines += float(np.clip(cosines, -1, 1).sum())
        self.signal += float(xx.sum())
        self.noise += float(np.einsum("ij,ij->", x, x))
        self.largest = max(self.largest, float(np.abs(x).max()))


def _finite(name: str, before: Array, after: Array) -> tuple[Array, Array]:
    """Return both as float64 (samples, values); infinities that both have (masked logits) become 0."""
    x, y = (side.reshape(len(side), -1).astype(np.float64) for side in (before, after))
    if np.isnan(x).any():
        raise MetricError(f"output '{name}' of the original model holds NaN on these data; nothing compares to it")
    if np.isnan(y).any():
        raise MetricError(f"output '{name}' of the rewritten model holds NaN")
    odd = ~np.isfinite(x) | ~np.isfinite(y)
    if odd.any():
        if not np.array_equal(x[odd], y[odd]):
            raise MetricError(f"output '{name}' is infinite in one model and not in the other")
        x[odd] = y[odd] = 0
    return x, y


def class_axis(value: Array) -> int:
    return value.ndim - 1 if value.ndim <= 3 else 1


def named_scores(name: str, value: Array) -> int | None:
    """Return the axis of the classes of an output that is called scores or logits; None if it is not."""
    return class_axis(value) if value.ndim >= 2 and called_scores(name) else None


def called_scores(name: str) -> bool:
    """Whether the name of an output says that it holds scores of classes."""
    return bool(_NAMED_SCORES.search(name))


def looks_like_scores(name: str, value: Array) -> bool:
    """See ``Fidelity``."""
    if value.ndim < 2 or not 2 <= value.shape[class_axis(value)] <= _WIDEST:
        return False
    if called_scores(name):
        return True
    narrow = value.shape[1] <= 1000 and all(size == 1 for size in value.shape[2:])
    if narrow and not _NAMED_FEATURES.search(name):
        return True
    return is_distribution(np.moveaxis(value, class_axis(value), -1))


def is_distribution(rows: Array) -> bool:
    """Whether every row (..., classes) is a probability distribution; half precision sums to one within 0.01."""
    if (rows < 0).any():
        return False
    return bool((np.abs(rows.sum(axis=-1, dtype=np.float64) - 1) <= 0.01).all())


def _refuse_nan(name: str, value: Array) -> None:
    if np.isnan(value).any():
        raise MetricError(f"output '{name}' holds NaN")


def _told(arrays: Mapping[str, Array], *names: str) -> str:
    chosen = names or tuple(arrays)
    return ", ".join(f"'{n}' {arrays[n].dtype} {list(arrays[n].shape)}" for n in chosen) or "nothing"
