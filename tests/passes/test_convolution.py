"""Factorized convolutions: exact at full rank whatever the attributes, and at home with odd inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from lowrank_onnx.base import Pass, RankWish
from lowrank_onnx.passes import PASSES
from tests.builders import Array, answers, build, difference, factorized, furthest, moments, problem
from tests.passes.convolutions import Convolution, convolutions, model_of

TECHNIQUES = [kind for kind in PASSES if "convolution" in kind.kinds]
each_technique = pytest.mark.parametrize("technique", TECHNIQUES, ids=lambda kind: kind.name)


def full_rank(proto: ModelProto, technique: Pass, x: Array | None) -> ModelProto | None:
    """The model with its one convolution at full rank; None where the technique does not take it."""
    posed = problem(proto, None if x is None else {"x": x})
    (site,) = posed.sites
    if technique.refuse(site):
        return None
    analysis = technique.analyse(site, moments(posed).get(site.name))
    ranks = technique.spell_rank(site, analysis, RankWish(fraction=1.0))
    assert not isinstance(ranks, str)
    return factorized(posed, technique, site, ranks)


@each_technique
@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(), st.booleans())
def test_full_rank_is_the_original(technique: type[Pass], entry: Convolution, data: bool) -> None:
    proto, x = model_of(entry)
    made = full_rank(proto, technique(), x if data else None)
    if made is not None:
        onnx.checker.check_model(made, full_check=True)
        assert furthest(answers(made, {"x": x}), answers(proto, {"x": x})) < 1e-5


@each_technique
@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions(transposed=True))
def test_full_rank_of_a_transposed_one_is_the_original(technique: type[Pass], entry: Convolution) -> None:
    proto, x = model_of(entry)
    made = full_rank(proto, technique(), None)
    if made is not None:
        assert furthest(answers(made, {"x": x}), answers(proto, {"x": x})) < 1e-5


@each_technique
def test_another_size_of_map_gives_the_original_as_well(technique: type[Pass]) -> None:
    for padding in ("pads=[1,1,1,1]", 'auto_pad="SAME_UPPER"', 'auto_pad="SAME_LOWER"'):
        proto = build(
            f"g (float[n,8,h,w] x) => (float[n,8,p,q] y) {{ y = Conv<strides=[2,2], {padding}>(x, w) }}",
            {"w": np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32)},
        )
        made = full_rank(proto, technique(), np.ones((2, 8, 6, 6), np.float32))
        assert made is not None
        for size in (5, 6, 11):
            x = np.random.default_rng(1).standard_normal((1, 8, size, size + 1)).astype(np.float32)
            assert furthest(answers(made, {"x": x}), answers(proto, {"x": x})) < 1e-5


def image_layer(weight: Array, extra: str = "") -> ModelProto:
    outputs, inputs = weight.shape[0], weight.shape[1]
    return build(
        f"g (float[n,{inputs},h,w] x) => (float[n,{outputs},p,q] y) {{ y = Conv<{extra}pads=[1,1,1,1]>(x, w) }}",
        {"w": weight},
    )


@each_technique
@pytest.mark.parametrize(
    "shape", [(1, 8, 3, 3), (8, 1, 3, 3), (1, 1, 3, 3), (8, 8, 5, 1)], ids=lambda shape: "x".join(map(str, shape))
)
def test_one_channel_or_one_row_is_refused_or_exact(technique: type[Pass], shape: Sequence[int]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    proto = image_layer(weight)
    x = np.random.default_rng(1).standard_normal((2, shape[1], 6, 6)).astype(np.float32)
    made = full_rank(proto, technique(), x)
    assert made is None or furthest(answers(made, {"x": x}), answers(proto, {"x": x})) < 1e-5


@each_technique
def test_kernel_larger_than_the_map(technique: type[Pass]) -> None:
    proto = image_layer(np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32))
    x = np.random.default_rng(1).standard_normal((4, 8, 1, 2)).astype(np.float32)
    made = full_rank(proto, technique(), x)
    assert made is not None
    assert furthest(answers(made, {"x": x}), answers(proto, {"x": x})) < 1e-5


@each_technique
def test_constant_data_do_no_harm(technique: type[Pass]) -> None:
    proto = image_layer(np.random.default_rng(0).standard_normal((8, 8, 3, 3)).astype(np.float32))
    x = np.zeros((4, 8, 5, 5), np.float32)
    made = full_rank(proto, technique(), x)
    assert made is not None
    assert np.isfinite(answers(made, {"x": x + 1})["y"]).all()


@each_technique
def test_unknown_size_leaves_the_multiply_accumulates_open(technique: type[Pass]) -> None:
    proto = image_layer(np.random.default_rng(0).standard_normal((32, 32, 3, 3)).astype(np.float32))
    posed = problem(proto)
    (site,) = posed.sites
    assert site.macs is None
    analysis = technique().analyse(site, None)
    ranks = technique().ranks(site, analysis)
    assert ranks
    assert all(technique().candidate(site, analysis, rank).macs is None for rank in (ranks[0], ranks[-1]))


@each_technique
def test_ranks_are_on_the_grid(technique: type[Pass]) -> None:
    for (outputs, inputs), step in {(64, 64): 16, (64, 32): 16, (32, 32): 16, (16, 16): 8, (8, 8): 4}.items():
        proto = image_layer(np.random.default_rng(0).standard_normal((outputs, inputs, 3, 3)).astype(np.float32))
        (site,) = problem(proto).sites
        analysis = technique().analyse(site, None)
        offered = technique().ranks(site, analysis)
        assert offered
        assert all(rank % step == 0 for ranks in offered for rank in ranks)


@each_technique
def test_a_bias_computed_at_run_time_stays(technique: type[Pass]) -> None:
    rng = np.random.default_rng(0)
    proto = build(
        """g (float[n,8,h,w] x, float[8] b) => (float[n,8,p,q] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }""",
        {"w": rng.standard_normal((8, 8, 3, 3)).astype(np.float32)},
    )
    x = rng.standard_normal((4, 8, 6, 6)).astype(np.float32) + 1
    feeds = {"x": x, "b": np.arange(8, dtype=np.float32)}
    posed = problem(proto, {"x": x, "b": np.tile(feeds["b"], (4, 1))})
    (site,) = posed.sites
    analysis = technique().analyse(site, moments(posed).get(site.name))
    ranks = technique().spell_rank(site, analysis, RankWish(fraction=1.0))
    assert not isinstance(ranks, str)
    made = factorized(posed, technique(), site, ranks)
    assert furthest(answers(made, feeds), answers(proto, feeds)) < 1e-5


@each_technique
def test_batch_normalization_behind_is_fused_still(technique: type[Pass], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    statistics = {name: np.full(8, 0.5 + place, np.float32) for place, name in enumerate(("s", "b", "m", "v"))}
    proto = build(
        """g (float[1,8,6,6] x) => (float[1,8,6,6] y) {
            t = Conv<pads=[1,1,1,1]>(x, w)  u = BatchNormalization(t, s, b, m, v)  y = Relu(u) }""",
        {"w": rng.standard_normal((8, 8, 3, 3)).astype(np.float32), **statistics},
    )
    posed = problem(proto, {"x": rng.standard_normal((4, 8, 6, 6)).astype(np.float32)})
    (site,) = posed.sites
    analysis = technique().analyse(site, moments(posed).get(site.name))
    made = factorized(posed, technique(), site, technique().ranks(site, analysis)[0])
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert left == {"Conv", "FusedConv"}


@each_technique
def test_data_lower_the_error_on_them(technique: type[Pass]) -> None:
    rng = np.random.default_rng(0)
    proto = image_layer(rng.standard_normal((16, 16, 3, 3)).astype(np.float32))
    mixing = rng.standard_normal((16, 16)) * np.arange(1, 17) ** -1.0
    x = np.einsum("ij,njhw->nihw", mixing, rng.standard_normal((20, 16, 8, 8))).astype(np.float32) + 1
    expected = answers(proto, {"x": x})["y"]
    errors = []
    for data in ({"x": x}, None):
        posed = problem(proto, data)
        (site,) = posed.sites
        analysis = technique().analyse(site, moments(posed).get(site.name))
        made = factorized(posed, technique(), site, technique().ranks(site, analysis)[0])
        errors.append(difference(answers(made, {"x": x})["y"], expected))
    assert errors[0] < 0.9 * errors[1], errors


@pytest.mark.parametrize("technique", [kind for kind in TECHNIQUES if kind.default], ids=lambda kind: kind.name)
def test_half_precision_factors_share_their_scale(technique: type[Pass]) -> None:
    """A kernel near the largest half number does not push either factor over it."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((8, 8, 3, 3)) * 1e4).clip(-6e4, 6e4).astype(np.float16)
    proto = build("g (float16[n,8,h,w] x) => (float16[n,8,p,q] y) { y = Conv<pads=[1,1,1,1]>(x, w) }", {"w": weight})
    x = (rng.standard_normal((4, 8, 6, 6)) * 1e-4).astype(np.float16)
    posed = problem(proto, {"x": x})
    (site,) = posed.sites
    analysis = technique().analyse(site, moments(posed).get(site.name))
    candidate = technique().candidate(site, analysis, technique().ranks(site, analysis)[-1])
    factors = technique().factorize(site, analysis, candidate)
    sizes = [float(np.abs(factor).max()) for role, factor in factors.items() if not role.startswith("bias")]
    assert max(sizes) < 6e3 and max(sizes) / min(sizes) < 100


@each_technique
@settings(max_examples=25, deadline=None, derandomize=True)
@given(convolutions())
def test_multiply_accumulates_told_are_those_of_the_model(technique: type[Pass], entry: Convolution) -> None:
    proto, x = model_of(entry)
    posed = problem(proto, {"x": x})
    (site,) = posed.sites
    if technique().refuse(site):
        return
    analysis = technique().analyse(site, moments(posed).get(site.name))
    ranks = technique().spell_rank(site, analysis, RankWish(fraction=0.5))
    assert not isinstance(ranks, str)
    made = problem(factorized(posed, technique(), site, ranks), {"x": x})
    assert technique().candidate(site, analysis, ranks).macs == made.cost.macs
