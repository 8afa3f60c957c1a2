"""Measured cost of a candidate: the nodes of its site cut out of the model, dense and factorized, timed side by side.

A few ranks of each technique are timed and remembered; those between follow their multiply-accumulates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from lowrank_onnx.base import Candidate, Pass, Site
from lowrank_onnx.cache import Cache
from lowrank_onnx.errors import ModelError
from lowrank_onnx.linalg import Array
from lowrank_onnx.model import Model, reads
from lowrank_onnx.problem import Problem
from lowrank_onnx.proposals import Proposal
from lowrank_onnx.rewrite import rewrite
from lowrank_onnx.runtime import gpu_libraries, onnxruntime, open_session
from lowrank_onnx.sites.recurrent import has_lengths, state_inputs
from lowrank_onnx.statistics import Progress
from lowrank_onnx.validation import Timing, benchmark

TIMED_RANKS = 6
TIMED_RANKS_GPU = 16  # time there does not follow work: it falls and rises with the tiles that a rank fills
_SECONDS = 0.4  # for one site and technique, all ranks together
_ROUNDS = 80


@dataclass(frozen=True)
class LatencyCurve:
    """Latency of one technique at one site.

    Attributes:
        dense_us: The site as it is.
        work: Multiply-accumulates of the ranks timed, rising.
        times_us: Their latency.
    """

    dense_us: float
    work: tuple[float, ...]
    times_us: tuple[float, ...]

    def at(self, candidate: Candidate) -> float:
        """Microseconds of a candidate."""
        return float(np.interp(float(candidate.macs or 0), self.work, self.times_us))


def measure_latencies(
    problem: Problem, proposals: Sequence[Proposal], cache: Cache, progress: Progress | None
) -> dict[int, LatencyCurve]:
    """Time candidates of every proposal, in units of one run of the model at the problem's shapes.

    Returns:
        Curves by position in ``proposals``; a site inside a subgraph, or of unknown shape, has none. Nor has
        an embedding: a lookup in a thin table and a product are never faster than the lookup, and what makes a
        tied table faster is its head, which is timed as a layer.
    """
    curves: dict[int, LatencyCurve] = {}
    for place, entry in enumerate(proposals):
        region = None if entry.site.kind in ("embedding", "tied") else _region(problem, entry.site)
        if region is not None and all(candidate.macs is not None for candidate in entry.candidates):
            curves[place] = _curve(problem, entry, region, cache)
        if progress is not None:
            progress("time layers", place + 1, len(proposals))
    return curves


def latency_saving(
    proposals: Sequence[Proposal], curves: dict[int, LatencyCurve]
) -> Callable[[Site, Candidate], float]:
    """Return how many microseconds a candidate takes off; 0 where it was not timed."""
    by_candidate = {
        id(candidate): curves[place].dense_us - curves[place].at(candidate)
        for place, entry in enumerate(proposals)
        if place in curves
        for candidate in entry.candidates
    }
    return lambda site, candidate: by_candidate.get(id(candidate), 0.0)


def _curve(problem: Problem, proposal: Proposal, region: ModelProto, cache: Cache) -> LatencyCurve:
    site, technique = proposal.site, proposal.technique
    most = TIMED_RANKS_GPU if problem.runtime.on_gpu else TIMED_RANKS
    places = np.unique(np.linspace(0, len(proposal.candidates) - 1, most).round().astype(int))
    timed = sorted((proposal.candidates[place] for place in places), key=lambda entry: entry.macs or 0)
    key = {
        "what": "latency 2",
        **({"libraries": gpu_libraries()} if problem.runtime.on_gpu else {}),
        "onnxruntime": onnxruntime().__version__,
        "provider": problem.runtime.provider,
        "device": problem.runtime.device,
        "threads": problem.runtime.used_threads,
        "region": _structure(region),
        "technique": technique.name,
        "ranks": [list(entry.ranks) + sorted(map(str, entry.options.values())) for entry in timed],
    }
    known = cache.get(key)
    if known is None:
        entries = [(technique, proposal.analysis, candidate) for candidate in timed]
        timing = _timed(problem, site, region, entries, _SECONDS)
        known = [1000 * latency.quiet for latency in timing.latencies]
        cache.put(key, known)
    work = tuple(float(entry.macs or 0) for entry in timed)
    return LatencyCurve(known[0], work, tuple(known[1:]))


def race(problem: Problem, proposals: Sequence[Proposal], seconds: float = 1.0) -> Timing | None:
    """Time the only candidates of some proposals at one site side by side, the dense layer last.

    Returns:
        Ratios are against the first proposal; None where the site cannot be timed alone.
    """
    site = proposals[0].site
    region = _region(problem, site)
    if region is None:
        return None
    entries = [(entry.technique, entry.analysis, entry.candidates[0]) for entry in proposals]
    return _timed(problem, site, region, entries, seconds, dense_first=False)


def _timed(
    problem: Problem,
    site: Site,
    region: ModelProto,
    entries: Sequence[tuple[Pass, Any, Candidate]],
    seconds: float,
    dense_first: bool = True,
) -> Timing:
    """Time a site as it is and some replacements, all in every round."""
    small = Model(region, problem.model.path, "", "", 0)
    models = [
        rewrite(small, technique.emit(site, candidate, technique.factorize(site, analysis, candidate)))
        for technique, analysis, candidate in entries
    ]
    models = [region, *models] if dense_first else [*models, region]
    sessions = [
        open_session(entry, problem.runtime, problem.model.folder, what="a layer", timed=True) for entry in models
    ]
    rng = np.random.default_rng(0)
    fed = _fed(problem)
    feeds: dict[str, Array] = {
        value.name: fed[value.name]
        if value.name in fed
        else rng.standard_normal([dim.dim_value for dim in value.type.tensor_type.shape.dim]).astype(
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        )
        for value in region.graph.input
    }
    return benchmark(sessions, feeds, problem.runtime, 0, seconds, int(_ROUNDS * seconds / _SECONDS), 10)


def _fed(problem: Problem) -> Mapping[str, Array]:
    """What the inputs of the model are given."""
    return {} if problem.feeds is None else problem.feeds.values


def _region(problem: Problem, site: Site) -> ModelProto | None:
    """The nodes of a site as a model of its own, from its input to its outputs; None if that cannot be cut."""
    if any(use.scope for use in site.uses):
        return None
    model, shapes = problem.model, problem.shapes
    main = model.scopes[0]
    members = (*site.attributes.get("into", ()), site)
    inputs = {use.input for member in members for use in member.uses} - set(site.attributes.get("between", ()))
    if site.kind == "recurrent":
        inputs |= set(state_inputs(site)) - set(main.initializers)
        if has_lengths(site):
            return None  # made-up lengths would be timed, not those of the data
    outputs = [use.output for use in site.uses]
    if "region" in site.attributes:
        inputs, outputs = set(site.attributes["region"][0]), [site.attributes["region"][1]]
    wanted: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        node = main.producers.get(name)
        if name in inputs or node is None or node.name in wanted:
            continue
        wanted.add(node.name)
        stack += reads(node)
    nodes = [node for node in main.graph.node if node.name in wanted]
    needed = {name for node in nodes for name in reads(node)}
    made = {name for node in nodes for name in node.output}
    loose = needed - made - set(main.initializers) - inputs
    fed = _fed(problem)
    around = sorted(loose & set(fed))  # such as the mask of an attention block, with what is computed from it
    if loose - set(around) or any(shapes.get(("", name)) is None for name in inputs):
        return None
    element = onnx.helper.np_dtype_to_tensor_dtype(site.weight.dtype)
    graph = onnx.helper.make_graph(
        nodes,
        "region",
        [onnx.helper.make_tensor_value_info(name, element, shapes[("", name)]) for name in sorted(inputs)]
        + [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(fed[name].dtype), fed[name].shape
            )
            for name in around
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
    )
    graph.initializer.extend(tensor for name, tensor in main.initializers.items() if name in needed)
    made_model = onnx.helper.make_model(graph, opset_imports=list(model.proto.opset_import))
    made_model.ir_version = max(model.proto.ir_version, 4)
    made_model.functions.extend(model.proto.functions)
    return made_model


def _structure(region: ModelProto) -> str:
    """A digest of what decides the time: operators, attributes, wiring, shapes and types; no values, no names."""
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    described = [
        (entry.name and number(entry.name), [dim.dim_value for dim in entry.type.tensor_type.shape.dim])
        for entry in region.graph.input
    ]
    constants = sorted((number(entry.name), entry.data_type, list(entry.dims)) for entry in region.graph.initializer)
    nodes = [
        (
            node.domain,
            node.op_type,
            [number(name) for name in (*node.input, *node.output)],
            sorted(
                (entry.name, entry.type, list(entry.ints), entry.i, entry.f, entry.s.hex(), list(entry.t.dims))
                for entry in node.attribute
            ),
        )
        for node in region.graph.node
    ]
    opsets = [(entry.domain, entry.version) for entry in region.opset_import]
    text = json.dumps([described, constants, nodes, opsets])
    return hashlib.sha256(text.encode()).hexdigest()


def total_latency_us(problem: Problem, seconds: float = 1.5) -> float:
    """Microseconds of one run of the original model.

    Raises:
        ModelError: There is nothing to run it on.
    """
    if problem.feeds is None:
        raise ModelError(f"the model cannot be timed: {problem.unfed}")
    timing = benchmark([problem.session], problem.feeds.values, problem.runtime, problem.seed, seconds)
    return 1000 * timing.latencies[0].quiet
