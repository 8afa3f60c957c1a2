"""Queries, keys and values of a few samples, for techniques that replace what lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowrank_onnx.base import Site
from lowrank_onnx.data import Dataset
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model
from lowrank_onnx.runtime import Runtime, open_session, run

SAMPLES = 4


@dataclass(frozen=True, eq=False)
class Seen:
    """What one sample brings to a block: queries (N, H, S, d), keys turned (N, H, d, T), values (N, H, T, e)."""

    query: Array
    key: Array
    value: Array


def observe_matrices(
    model: Model, sites: Sequence[Site], dataset: Dataset, runtime: Runtime
) -> dict[str, dict[str, tuple[Seen, ...]]]:
    """What the first ``SAMPLES`` samples bring to every attention matrix among ``sites``, by site and input.

    Raises:
        ModelError: onnxruntime cannot run the model on the data.
    """
    chosen = [site for site in sites if is_matrix(site) and not site.uses[0].scope]
    if not chosen:
        return {}
    names = {site.name: site.attributes["region"][0] for site in chosen}
    wanted = sorted({name for entry in names.values() for name in entry})
    proto = type(model.proto)()
    proto.CopyFrom(model.proto)
    known = {value.name for value in (*proto.graph.output, *proto.graph.input)}
    for name in wanted:
        if name not in known:
            proto.graph.output.add().name = name
    session = open_session(proto, runtime, model.folder)
    found: dict[str, list[Seen]] = {site.name: [] for site in chosen}
    for place in range(min(SAMPLES, len(dataset))):
        feeds = dataset.feeds(place)
        values = {**feeds, **run(session, feeds, [name for name in wanted if name not in feeds])}
        for site in chosen:
            found[site.name].append(Seen(*(values[name] for name in names[site.name])))
    return {site.name: {site.uses[0].input: tuple(found[site.name])} for site in chosen}


def is_matrix(site: Site) -> bool:
    """Whether a site is what lies between the heads of an attention block: no layer, no weight."""
    return site.kind == "attention" and site.attributes["half"] == "matrix"
