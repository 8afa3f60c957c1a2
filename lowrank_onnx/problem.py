"""What a run is about: the model, its data, its sites and what it costs now. Made once, never changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from lowrank_onnx.augment import exchange_tokens
from lowrank_onnx.base import Site
from lowrank_onnx.cost import Cost, model_cost
from lowrank_onnx.data import Dataset, InputSpec, load_data
from lowrank_onnx.errors import DataError, LowRankError, MetricError, ModelError
from lowrank_onnx.feeds import Feeds, choose_feeds, read_shapes
from lowrank_onnx.metrics import Metric, resolve_metric
from lowrank_onnx.mirror import mirror_images
from lowrank_onnx.model import Model, from_proto, load
from lowrank_onnx.runtime import Runtime, input_specs, open_session
from lowrank_onnx.shapes import Shapes, measure_shapes, static_shapes
from lowrank_onnx.sites import find_sites
from lowrank_onnx.sites.recurrent import GATES
from lowrank_onnx.trimming import trimmed

Source = str | os.PathLike[str] | onnx.ModelProto | Model
Data = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Dataset


@dataclass(frozen=True, eq=False)
class Problem:
    """One model, ready to be worked on.

    Attributes:
        session: The original model, open on the chosen provider.
        calibrate, evaluate: Data; None where none were given.
        training: What statistics are taken from: the calibration data without needless padding, and behind them
            what was made of them.
        feeds: The inputs for shapes and timing; None where the model leaves axes open and nothing fixes them.
        unfed: Why there are no feeds.
        shapes: Shapes of tensors with those inputs.
        sites: Every site, in the order of the nodes.
        cost: What the model weighs now.
        seed: Of everything random.
        allow_io_change: Whether inputs and outputs that hold a cache may change their shape.
    """

    model: Model
    runtime: Runtime
    session: Any
    calibrate: Dataset | None
    evaluate: Dataset | None
    training: Dataset | None
    metric: Metric | None
    feeds: Feeds | None
    unfed: str
    shapes: Shapes
    sites: tuple[Site, ...]
    cost: Cost
    seed: int
    allow_io_change: bool = False

    def require_feeds(self, what: str) -> Feeds:
        """The feeds, or an error that says what they are needed for.

        Raises:
            DataError: The model leaves axes open.
        """
        if self.feeds is None:
            raise DataError(f"{what} needs the shapes of a run: {self.unfed}")
        return self.feeds

    @property
    def by_name(self) -> dict[str, Site]:
        """The sites by name."""
        return {site.name: site for site in self.sites}

    @property
    def genuine(self) -> Dataset | None:
        """The calibration samples among ``training``."""
        if self.training is None or self.calibrate is None:
            return None
        return self.training.subset(range(len(self.calibrate)))

    @property
    def judged_on(self) -> Dataset | None:
        """The data of the last line: evaluation data, or calibration data where there are no others."""
        return self.evaluate if self.evaluate is not None else self.calibrate


def open_model(source: Source) -> Model:
    """Load a model from a file, or wrap one from memory.

    Raises:
        ModelError: It is neither, or cannot be read.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return from_proto(source)
    if not isinstance(source, str | os.PathLike):
        raise ModelError(
            f"the model must be a file or an onnx.ModelProto, got {type(source).__name__}; bytes are read with "
            "onnx.load_model_from_string"
        )
    return load(source)


def read_data(source: Data | None, specs: Sequence[InputSpec], option: str) -> Dataset | None:
    """Load data, unless there are none or they are loaded already."""
    return source if source is None or isinstance(source, Dataset) else load_data(source, specs, option)


def pose(
    source: Source,
    runtime: Runtime,
    calibrate: Data | None = None,
    evaluate: Data | None = None,
    metric: str | Metric | None = None,
    shape: Sequence[str] = (),
    seed: int = 0,
    mask: str | None = None,
    augment: bool = True,
    allow_io_change: bool = False,
    matrices: bool = False,
) -> Problem:
    """Load everything a run needs, and check it.

    Args:
        allow_io_change: Whether inputs and outputs that hold a cache may change their shape.
        matrices: Whether attention without its layers is a site too.
        augment: Whether samples may be made of the given ones, where those show little of a vocabulary or few
            positions of images.

    Raises:
        LowRankError: Model, data, metric or shapes are wrong; see the modules that load them.
    """
    if seed < 0:
        raise LowRankError(f"--seed must not be negative, got {seed}")
    model = open_model(source)
    what = f"model '{model.path or 'in memory'}'"
    session = open_session(model.original, runtime, model.folder, what=what, timed=True)
    specs = input_specs(session)
    if mask is not None and mask not in {spec.name for spec in specs}:
        raise DataError(f"--mask '{mask}' is no input of the model; inputs: {', '.join(spec.name for spec in specs)}")
    chosen = metric if metric is None or isinstance(metric, Metric) else resolve_metric(metric)
    data = {
        option: read_data(entry, specs, option)
        for option, entry in (("--calibrate", calibrate), ("--evaluate", evaluate))
    }
    if chosen is not None and data["--evaluate"] is None and data["--calibrate"] is None:
        raise MetricError(f"--metric {chosen.name} needs data to be measured on; give --evaluate DATA")
    for option, entry in data.items():
        _require_steps(model, entry, option)
    sample = data["--evaluate"] or data["--calibrate"]
    fixed = read_shapes(shape, specs)
    feeds, unfed = None, ""
    try:
        feeds = choose_feeds(specs, fixed, sample, seed)
        shapes = measure_shapes(model, feeds.values, runtime)
    except (DataError, ModelError) as error:
        if sample is not None or fixed:
            raise
        # Made-up inputs need not suit a model; parameters and size can be counted all the same.
        feeds, unfed, shapes = None, str(error), static_shapes(model)
    sites = tuple(find_sites(model, shapes, allow_io_change, matrices))
    if allow_io_change:
        _require_empty_caches(sites, data)
    known = data["--calibrate"]
    training = None if known is None else training_data(session, known, sites, mask, seed, augment)
    return Problem(
        model=model,
        runtime=runtime,
        session=session,
        calibrate=data["--calibrate"],
        evaluate=data["--evaluate"],
        training=training,
        metric=chosen,
        feeds=feeds,
        unfed=unfed,
        shapes=shapes,
        sites=sites,
        cost=model_cost(model, shapes, model.size_bytes),
        seed=seed,
        allow_io_change=allow_io_change,
    )


def _require_empty_caches(sites: Sequence[Site], data: Mapping[str, Dataset | None]) -> None:
    """Refuse data with a filled cache: another model cannot read it once its width has changed.

    Raises:
        DataError: A sample has past keys or values.
    """
    names = {cache.name for site in sites if site.kind == "attention" for cache in site.attributes["caches"]}
    for option, entry in data.items():
        for place in range(len(entry)) if entry is not None and names else ():
            assert entry is not None
            for name, value in entry.feeds(place).items():
                if name in names and value.size:
                    raise DataError(
                        f"sample {place} of {option} holds a cache '{name}' {list(value.shape)}, whose width "
                        "--allow-io-change lets change; give samples that start with an empty cache"
                    )


def training_data(
    session: Any, calibrate: Dataset, sites: Sequence[Site], mask: str | None, seed: int, augment: bool
) -> Dataset:
    """The calibration data without needless padding, and behind them copies where those help."""
    shorter = trimmed(session, calibrate, mask)
    if not augment:
        return shorter
    return exchange_tokens(shorter, sites, mask, seed) or mirror_images(session, shorter, sites) or shorter


def _require_steps(model: Model, data: Dataset | None, option: str) -> None:
    """Refuse empty inputs of recurrent models: onnxruntime ends the whole process on a sequence of no steps.

    Raises:
        DataError: An input has an axis of length 0.
    """
    cells = [node for scope in model.scopes for node in scope.graph.node if node.op_type in GATES]
    for place in range(len(data)) if data is not None and cells else ():
        assert data is not None
        for name, value in data.feeds(place).items():
            if 0 in value.shape:
                raise DataError(
                    f"sample {place} of {option} holds no step of a sequence: '{name}' has shape {list(value.shape)}; "
                    f"{cells[0].op_type} '{cells[0].name}' needs at least one, leave such samples out"
                )
