"""How sure the calibration data make every factorized layer; see ``decompositions.posterior``.

The layer reads x̂, what the compressed model delivers, as codes z = [1, x̂ E], E an orthonormal basis of what its
factors look at. The target t is what the original layer gave on the original input. The factor behind the codes
has the posterior of a least squares fit of t; the noise of an output is what is left of its error on samples the
factors were not fitted to, so that ``noise (1 + z A⁻¹ zᵀ)`` is the expected square of t - ŷ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from lowrank_onnx.base import Site
from lowrank_onnx.batches import batches
from lowrank_onnx.budget import Selection
from lowrank_onnx.building import Choice
from lowrank_onnx.data import Dataset
from lowrank_onnx.decompositions.posterior import Posterior, fit_posterior
from lowrank_onnx.linalg import Array
from lowrank_onnx.patches import as_linear
from lowrank_onnx.problem import Problem
from lowrank_onnx.runtime import open_session, run
from lowrank_onnx.statistics import choose_rows, expose, padding_mask, positions_of, row_layout
from lowrank_onnx.validation import safe_batch

_BATCH = 8
_RANK = 1e-6  # of the largest singular value; what is below is rounding


@dataclass(frozen=True, eq=False)
class LayerPosterior:
    """One factorized layer.

    Attributes:
        site: Its name.
        technique: What factorized it.
        input: The tensor of the compressed model that its factors read.
        encoder: (K, k - 1) E.
        posterior: Of the (k, N) factor; the noise is that of held-out samples.
        residual: Root mean square of t - ŷ over that of t around its mean, on held-out samples.
        fitted: The same on the samples the factors were fitted to.
        held_rows: Rows of the held-out samples.
    """

    site: str
    technique: str
    input: str
    encoder: Array
    posterior: Posterior
    residual: float
    fitted: float
    held_rows: int

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
    layers: list[_Layer] = []
    reasons: dict[str, str] = {}
    for choice in selection.choices:
        site = choice.proposal.site
        members = tuple(as_linear(part) for part in choice.proposal.technique.targets(site))
        if not members:
            reasons[site.name] = f"{choice.candidate.technique} of kind {site.kind} is no least squares fit of one map"
        elif members[0].uses[0].scope or members[0].uses[0].input not in made:
            reasons[site.name] = "its input is inside a subgraph"
        else:
            layers.append(_layer(choice, members, selection))
    if not layers:
        return [], reasons
    names = sorted({layer.input for layer in layers})
    dense, small = (
        open_session(expose(proto, names), problem.runtime, problem.model.folder, what="the model")
        for proto in (problem.model.proto, selection.built.proto)
    )
    size = min(safe_batch(problem.session, data), _BATCH)
    for samples, kept in ((data, False), (held, True)):
        for indices in batches(len(samples), size):
            feeds = samples.batch(indices) if size > 1 else samples.feeds(indices[0])
            exact, seen = ({**feeds, **run(session, feeds)} for session in (dense, small))
            keep = padding_mask(feeds, mask)
            for layer in layers:
                value = exact[layer.input]
                count = positions_of(len(indices), len(samples))
                rows = choose_rows(row_layout(layer.members[0]), value.shape, keep, count, indices[0])
                sums = layer.held if kept else layer.seen
                sums.add(layer, rows.of_input(value), rows.of_input(seen[layer.input]))
    return [layer.finish() for layer in layers if layer.seen.rows and layer.held.rows], reasons


def arrays_of(layers: Sequence[LayerPosterior]) -> dict[str, Array]:
    """The posteriors as arrays, for a ``.npz``: ``sites`` (names), and of site i with k codes and N outputs

    ``i/input`` the tensor of the compressed model that is read, ``i/encoder`` (K, k - 1), ``i/mean`` (k, N),
    ``i/covariance`` (k, k), ``i/noise`` (N,), ``i/rows``. With z = [1, x @ encoder] the variance of output j is
    ``noise[j] * (1 + z @ covariance @ z)``.
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

    def add(self, layer: _Layer, source: Array, x: Array) -> None:
        x = x.astype(np.float64)
        t = np.concatenate([source @ part.weight.astype(np.float64) for part in layer.members], axis=1) + layer.given
        z = np.concatenate([np.ones((len(x), 1)), x @ layer.encoder], axis=1)
        self.rows += len(x)
        self.gram = self.gram + z.T @ z
        self.cross = self.cross + z.T @ t
        self.energy = self.energy + np.sum(t**2, axis=0)
        self.total = self.total + t.sum(axis=0)
        self.error = self.error + np.sum((t - x @ layer.effective - layer.bias) ** 2, axis=0)

    def relative_error(self) -> float:
        """Root of the squared error over the squared deviation of the original output from its mean."""
        spread = float(np.sum(np.asarray(self.energy) - np.asarray(self.total) ** 2 / self.rows))
        return math.sqrt(float(np.sum(self.error)) / spread) if spread > 0 else 0.0


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer in the making: its map, and what was seen of it."""

    choice: Choice
    members: tuple[Site, ...]
    effective: Array
    encoder: Array
    bias: Array
    given: Array
    seen: _Sums
    held: _Sums

    @property
    def input(self) -> str:
        return self.members[0].uses[0].input

    def finish(self) -> LayerPosterior:
        seen, held = self.seen, self.held
        made = fit_posterior(np.asarray(seen.gram), np.asarray(seen.cross), np.asarray(seen.energy), seen.rows)
        # The error of held-out rows in units of what being unsure of the factor adds to every one of them.
        added = float(np.vdot(made.covariance, np.asarray(held.gram)))
        made = dataclasses.replace(made, noise=np.asarray(held.error) / (held.rows + added))
        name, technique = self.choice.proposal.site.name, self.choice.candidate.technique
        return LayerPosterior(
            name, technique, self.input, self.encoder, made, held.relative_error(), seen.relative_error(), held.rows
        )


def _layer(choice: Choice, members: tuple[Site, ...], selection: Selection) -> _Layer:
    site = choice.proposal.site
    factors: Mapping[str, Array] = selection.built.factors[site.name]
    effective, bias = choice.proposal.technique.effective(site, choice.candidate, factors)
    given = np.concatenate(list(_biases(members)))
    u, sigma, _ = scipy.linalg.svd(effective.astype(np.float64), full_matrices=False)
    encoder = u[:, : int(np.sum(sigma > _RANK * sigma[0]))]
    whole = given if bias is None else bias.astype(np.float64)
    return _Layer(choice, members, effective.astype(np.float64), encoder, whole, given, _Sums(), _Sums())


def _biases(members: Sequence[Site]) -> Iterator[Array]:
    for part in members:
        bias = part.uses[0].bias
        yield np.zeros(part.weight.shape[1]) if bias is None else np.asarray(bias, np.float64)
