"""The linear maps that factorized layers are made of, and how the rows that meet them are read off a run.

    t = x W + b of the original model, on what it delivers;   ŷ = x̂ Ŵ + b̂ of the compressed one

Of a cell there is one map of its inputs, and one of its states for every direction; of a lookup, t is the row of the
table and x̂ = ŷ the row that the factors give instead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from lowrank_onnx.base import Dense, Site
from lowrank_onnx.building import Choice
from lowrank_onnx.linalg import Array
from lowrank_onnx.lookups import as_rows
from lowrank_onnx.patches import as_linear
from lowrank_onnx.recurrent_statistics import observable_cell, read_cell, walked
from lowrank_onnx.sites.recurrent import operand
from lowrank_onnx.statistics import choose_rows, row_layout

Values = Mapping[str, Array]
_RANK = 1e-6  # of the largest singular value; what is below is rounding


class Source(ABC):
    """Where the rows of a map come from."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[str, ...]:
        """What has to be read of both models; constants may be among them."""

    @abstractmethod
    def pairs(self, exact: Values, seen: Values, keep: Array | None, count: int, seed: int) -> tuple[Array, Array]:
        """Rows (n, K) of the original and of the compressed model, of one batch.

        Args:
            exact, seen: Tensors of both.
            keep: (batch, positions) False at padding; None keeps everything.
            count: Most output positions of a convolution.
            seed: Of the choice among them.
        """


@dataclass(frozen=True, eq=False)
class Map:
    """One map with factors.

    Attributes:
        name: Of its site, with the part where it is one of several.
        input: The tensor of the compressed model that x̂ is.
        weight: (K, N) W, and ``given`` (N,) b.
        effective: (K, N) Ŵ, and ``bias`` (N,) b̂.
        encoder: (K, k - 1) orthonormal basis of what the factors look at.
    """

    name: str
    technique: str
    input: str
    source: Source
    weight: Array
    given: Array
    effective: Array
    bias: Array
    encoder: Array


def maps_of(choice: Choice, factors: Mapping[str, Array]) -> tuple[list[Map], dict[str, str]]:
    """Return the maps of a factorized site, and why others of its parts have none."""
    entry = choice.proposal
    site, technique = entry.site, entry.technique
    members = tuple(as_linear(part) for part in technique.targets(site))
    if members:
        effective, bias = technique.effective(site, choice.candidate, factors)
        found: list[Map | tuple[str, str]] = [_linear(site.name, technique.name, members, effective, bias)]
    elif site.kind not in ("linear", "recurrent", "embedding", "tied") or site.weight.ndim == 1:
        found = [(site.name, f"{technique.name} of kind {site.kind} is no least squares fit of one map")]
    else:
        found = list(_plain(site, technique.name, technique.dense_equivalent(site, choice.candidate, factors)))
    return [one for one in found if isinstance(one, Map)], dict(one for one in found if not isinstance(one, Map))


def _plain(site: Site, technique: str, dense: Mapping[str, Dense]) -> Iterator[Map | tuple[str, str]]:
    """The maps of a site that is not refitted."""
    if site.kind == "recurrent":
        yield from _cell(site, technique, dense[site.name])
        return
    tied = site.kind == "tied"
    for part in site.attributes["parts"] if tied else (site,):
        made, told = dense[part.name], f" ({'lookup' if part.kind == 'embedding' else 'head'})" if tied else ""
        if part.kind == "embedding":
            yield _table(part, f"{site.name}{told}", technique, made)
        elif len(part.uses) > 1 or part.weight.ndim != 2:
            yield f"{site.name}{told}", "several nodes read it, or it is a stack of matrices"
        else:
            found = _linear(f"{site.name}{told}", technique, (part,), made.weight, made.biases.get(part.uses[0].node))
            if isinstance(found, Map) and found.encoder.shape[1] == min(found.weight.shape):
                found = (found.name, f"the factors of {technique} make a map of full rank, which has no codes")
            yield found


def _made(
    name: str, technique: str, tensor: str, source: Source, weights: Sequence[Array], biases: Sequence[Array]
) -> Map | tuple[str, str]:
    """A map of W and Ŵ, b and b̂; or that nothing was lost of W."""
    weight, effective = (entry.astype(np.float64) for entry in weights)
    u, sigma, _ = scipy.linalg.svd(effective, full_matrices=False)
    rank = int(np.sum(sigma > _RANK * sigma[0]))
    if np.linalg.norm(weight - effective) <= _RANK * np.linalg.norm(weight):
        return name, "its weight is still that of the original"
    given, bias = (entry.astype(np.float64) for entry in biases)
    return Map(name, technique, tensor, source, weight, given, effective, bias, u[:, :rank])


# --- linear layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rows(Source):
    """Of a linear layer or a convolution."""

    site: Site

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.site.uses[0].input,)

    def pairs(self, exact: Values, seen: Values, keep: Array | None, count: int, seed: int) -> tuple[Array, Array]:
        name = self.site.uses[0].input
        rows = choose_rows(row_layout(self.site), exact[name].shape, keep, count, seed)
        return rows.of_input(exact[name]), rows.of_input(seen[name])


def _linear(
    name: str, technique: str, members: Sequence[Site], effective: Array, bias: Array | None
) -> Map | tuple[str, str]:
    if members[0].uses[0].scope:
        return name, "its input is inside a subgraph"
    weight = np.concatenate([part.weight.astype(np.float64) for part in members], axis=1)
    given = np.concatenate([_bias(part) for part in members])
    whole = given if bias is None else bias
    tensor = members[0].uses[0].input
    return _made(name, technique, tensor, _Rows(members[0]), (weight, effective), (given, whole))


def _bias(part: Site) -> Array:
    bias = part.uses[0].bias
    return np.zeros(part.weight.shape[1]) if bias is None else np.asarray(bias, np.float64)


# --- lookups ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Looked(Source):
    """Of a lookup: rows of the table, and of the one the factors make."""

    site: Site
    table: Array
    made: Array

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(use.input for use in self.site.uses)

    def pairs(self, exact: Values, seen: Values, keep: Array | None, count: int, seed: int) -> tuple[Array, Array]:
        parts = []
        for use in self.site.uses:
            value = exact[use.input]
            parts.append(choose_rows(row_layout(self.site), value.shape, keep, count, seed).of_input(value))
        rows = np.concatenate(parts)
        return self.table[rows], self.made[rows]


def _table(site: Site, name: str, technique: str, dense: Dense) -> Map | tuple[str, str]:
    if any(use.scope for use in site.uses):
        return name, "it is looked up inside a subgraph"
    table = as_rows(site).astype(np.float64)
    axis = site.attributes["axis"]
    made = np.moveaxis(np.asarray(dense.weight, np.float64), axis, 0).reshape(table.shape)
    same = np.eye(table.shape[1])
    values, vectors = scipy.linalg.eigh(made.T @ made)
    encoder = vectors[:, values > _RANK**2 * values[-1]][:, ::-1]
    none = np.zeros(table.shape[1])
    return Map(name, technique, site.uses[0].output, _Looked(site, table, made), same, none, same, none, encoder)


# --- recurrent cells -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Steps(Source):
    """Of a cell: what goes into every step, or the states of one direction ahead of it."""

    site: Site
    direction: int | None

    @property
    def tensors(self) -> tuple[str, ...]:
        nodes = [self.site.attributes[use.node] for use in self.site.uses]
        read = [operand(node, place) for node in nodes for place in (0, 4, 5, 6)]
        return tuple(name for name in (*read, *(node.output[0] for node in nodes)) if name)

    def pairs(self, exact: Values, seen: Values, keep: Array | None, count: int, seed: int) -> tuple[Array, Array]:
        return self._rows(exact, keep), self._rows(seen, keep)

    def _rows(self, values: Values, keep: Array | None) -> Array:
        parts = []
        for use in self.site.uses:
            node = self.site.attributes[use.node]
            walk = walked(self.site, node, values, node.output[0], keep)
            rows = walk.inputs if self.direction is None else walk.before[self.direction]
            parts.append(rows[walk.valid])
        return np.concatenate(parts)


def _cell(site: Site, technique: str, dense: Dense) -> Iterator[Map | tuple[str, str]]:
    nodes: list[Any] = [site.attributes[use.node] for use in site.uses]
    if not observable_cell(site):
        yield site.name, "its states are inside a subgraph, or its bias is not constant"
        return
    if dense.behind is not None:
        yield site.name, "it keeps other states than the original's, which no map tells of"
        return
    if not all(node.output[0] for node in nodes):
        yield site.name, "its states of every step are no output of the cell"
        return
    inputs, hidden = site.attributes["inputs"], site.attributes["hidden"]
    directions, rows, _ = site.weight.shape
    own = site.attributes["bias"]
    given = np.zeros((directions, 2 * rows)) if own is None else np.asarray(own, np.float64)
    bias = np.asarray(dense.biases.get(site.uses[0].node, given), np.float64)
    both = site.weight.astype(np.float64), np.asarray(dense.weight, np.float64)
    yield _made(
        f"{site.name} (W)", technique, site.uses[0].input, _Steps(site, None),
        [entry[:, :, :inputs].reshape(-1, inputs).T for entry in both],
        [entry[:, :rows].reshape(-1) for entry in (given, bias)],
    )  # fmt: skip
    # R meets the state behind the reset in a GRU's new state, which is seen nowhere.
    behind_reset = site.op == "GRU" and not read_cell(site, nodes[0]).linear_before_reset
    seen = 2 * hidden if behind_reset else rows
    for d in range(directions):
        yield _made(
            f"{site.name} (R)" if directions == 1 else f"{site.name} (R, direction {d})", technique,
            nodes[0].output[0], _Steps(site, d), [entry[d, :seen, inputs:].T for entry in both],
            [entry[d, rows : rows + seen] for entry in (given, bias)],
        )  # fmt: skip
