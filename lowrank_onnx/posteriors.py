"""How sure the calibration data make every factorized layer; see ``decompositions.posterior``.

The layer reads x̂, what the compressed model delivers, as codes z = [1, x̂ E], E an orthonormal basis of what its
factors look at. The target t is what the original layer gave on the original input. The factor behind the codes
has the posterior of a least squares fit of t; the noise of an output is what is left of its error on samples the
factors were not fitted to, so that ``noise (1 + z A⁻¹ zᵀ)`` is the expected square of t - ŷ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lowrank_onnx.batches import batches
from lowrank_onnx.budget import Selection
from lowrank_onnx.data import Dataset
from lowrank_onnx.decompositions.posterior import Posterior, fit_posterior
from lowrank_onnx.linalg import Array
from lowrank_onnx.maps import Map, maps_of
from lowrank_onnx.problem import Problem
from lowrank_onnx.runtime import open_session, run
from lowrank_onnx.statistics import expose, padding_mask, positions_of
from lowrank_onnx.validation import safe_batch

_BATCH = 8
_ELEMENTS = 2**22  # of the outputs of one batch that are looked at; beyond it every second row, or fewer


@dataclass(frozen=True, eq=False)
class LayerPosterior:
    """One factorized layer, or a part of it that is a map of its own; see ``maps``.

    Attributes:
        site: Its name.
        technique: What factorized it.
        input: The tensor of the compressed model that its factors read.
        encoder: (K, k - 1) E.
        posterior: Of the (k, N) factor; the noise is that of held-out samples.
        residual: Root mean square of t - ŷ over that of t around its mean, on held-out samples.
        fitted: The same on the samples the factors were fitted to.
    """

    site: str
    technique: str
    input: str
    encoder: Array
    posterior: Posterior
    residual: float
    fitted: float

    def as_dict(self) -> dict[str, Any]:
        """As the report has it."""
        return {
            "name": self.site,
            "technique": self.technique,
            "codes": len(self.posterior.covariance),
            "rows": self.posterior.rows,
            "determined": self.posterior.known(),
            "factor_spread": self.posterior.relative_spread(),
            "residual": self.residual,
            "residual_fitted": self.fitted,
        }


def layer_posteriors(
    problem: Problem, selection: Selection, held: Dataset, mask: str | None
) -> tuple[list[LayerPosterior], dict[str, str]]:
    """Return the posterior of every factorized layer that has one, and why the others have none.

    Args:
        problem: Its calibration data are what the factors were fitted to.
        held: Samples they were not fitted to.
        mask: As ``observe`` takes it.
    """
    data = problem.calibrate
    assert data is not None
    made = {name for node in selection.built.proto.graph.node for name in node.output}
    made |= {value.name for value in selection.built.proto.graph.input}
    constants: dict[str, Array] = {}
    layers: list[_Layer] = []
    reasons: dict[str, str] = {}
    for choice in selection.choices:
        found, others = maps_of(choice, selection.built.factors[choice.proposal.site.name])
        reasons |= others
        for entry in found:
            fixed = {name: problem.model.constant(problem.model.scopes[0], name) for name in entry.source.tensors}
            constants |= {name: constant.value for name, constant in fixed.items() if constant is not None}
            missing = [name for name in entry.source.tensors if name not in constants and name not in made]
            if missing:
                reasons[entry.name] = f"the compressed model has no tensor '{missing[0]}' any more"
            else:
                layers.append(_Layer(entry))
    if not layers:
        return [], reasons
    names = sorted({name for layer in layers for name in layer.map.source.tensors} - set(constants))
    dense, small = (
        open_session(expose(proto, names), problem.runtime, problem.model.folder, what="the model")
        for proto in (problem.model.proto, selection.built.proto)
    )
    size = min(safe_batch(problem.session, data), _BATCH)
    for samples, kept in ((data, False), (held, True)):
        for indices in batches(len(samples), size):
            feeds = samples.batch(indices) if size > 1 else samples.feeds(indices[0])
            exact, seen = ({**constants, **feeds, **run(session, feeds)} for session in (dense, small))
            keep = padding_mask(feeds, mask)
            count = positions_of(len(indices), len(samples))
            for layer in layers:
                sums = layer.held if kept else layer.seen
                sums.add(layer.map, *layer.map.source.pairs(exact, seen, keep, count, indices[0]))
    return [layer.finish() for layer in layers if layer.seen.rows and layer.held.rows], reasons


def arrays_of(layers: Sequence[LayerPosterior]) -> dict[str, Array]:
    """The posteriors as arrays, for a ``.npz``: ``sites`` (names), and of site i with k codes and N outputs

    ``i/input`` the tensor of the compressed model that is read, ``i/encoder`` (K, k - 1), ``i/mean`` (k, N),
    ``i/covariance`` (k, k), ``i/noise`` (N,), ``i/rows``. With z = [1, x @ encoder] the variance of output j is
    ``noise[j] * (1 + z @ covariance @ z)``. Of a lookup x is the row looked up, of ``(R)`` the states ahead of a step.
    """
    made: dict[str, Array] = {"sites": np.array([layer.site for layer in layers], dtype=np.str_)}
    for place, layer in enumerate(layers):
        entry = layer.posterior
        made |= {
            f"{place}/input": np.array(layer.input, dtype=np.str_),
            f"{place}/encoder": layer.encoder.astype(np.float32),
            f"{place}/mean": entry.mean.astype(np.float32),
            f"{place}/covariance": entry.covariance.astype(np.float32),
            f"{place}/noise": entry.noise.astype(np.float32),
            f"{place}/rows": np.array(entry.rows, np.int64),
        }
    return made


@dataclass
class _Sums:
    """Of codes, of the original output, and of the error."""

    rows: int = 0
    gram: Array | float = 0.0
    cross: Array | float = 0.0
    energy: Array | float = 0.0
    total: Array | float = 0.0
    error: Array | float = 0.0

    def add(self, entry: Map, source: Array, x: Array) -> None:
        step = -(-len(x) * entry.weight.shape[1] // _ELEMENTS) or 1
        source, x = source[::step], x[::step].astype(np.float64)
        t = source @ entry.weight + entry.given
        z = np.concatenate([np.ones((len(x), 1)), x @ entry.encoder], axis=1)
        self.rows += len(x)
        self.gram = self.gram + z.T @ z
        self.cross = self.cross + z.T @ t
        self.energy = self.energy + np.sum(t**2, axis=0)
        self.total = self.total + t.sum(axis=0)
        self.error = self.error + np.sum((t - x @ entry.effective - entry.bias) ** 2, axis=0)

    def relative_error(self) -> float:
        """Root of the squared error over the squared deviation of the original output from its mean."""
        spread = float(np.sum(np.asarray(self.energy) - np.asarray(self.total) ** 2 / self.rows))
        return math.sqrt(float(np.sum(self.error)) / spread) if spread > 0 else 0.0


@dataclass(frozen=True, eq=False)
class _Layer:
    """A map, and what was seen of it."""

    map: Map
    seen: _Sums = field(default_factory=_Sums)
    held: _Sums = field(default_factory=_Sums)

    def finish(self) -> LayerPosterior:
        seen, held = self.seen, self.held
        made = fit_posterior(np.asarray(seen.gram), np.asarray(seen.cross), np.asarray(seen.energy), seen.rows)
        # The error of held-out rows in units of what being unsure of the factor adds to every one of them.
        added = float(np.vdot(made.covariance, np.asarray(held.gram)))
        made = dataclasses.replace(made, noise=np.asarray(held.error) / (held.rows + added))
        entry = self.map
        return LayerPosterior(
            entry.name, entry.technique, entry.input, entry.encoder, made, held.relative_error(),
            seen.relative_error(),
        )  # fmt: skip
