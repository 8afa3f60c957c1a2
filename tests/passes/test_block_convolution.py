"""Convolutions over groups of channels: exact at full rank in any order, and at home where groups are planted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lowrank_onnx import compress
from lowrank_onnx.base import Moments, RankWish, Site
from lowrank_onnx.conv_chains import multiply_out
from lowrank_onnx.decompositions.grouped_convolution import (
    GroupedTarget,
    clustered,
    full_rank,
    grouped_convolution,
    grouped_weight,
)
from lowrank_onnx.linalg import with_ridge
from lowrank_onnx.passes.block import Block
from lowrank_onnx.passes.block_convolution import BlockConvolution
from lowrank_onnx.passes.channel import Channel
from lowrank_onnx.patches import window
from lowrank_onnx.problem import Problem
from lowrank_onnx.rewrite import rewrite
from tests.builders import Array, answers, build, correlated, difference, furthest, moments, problem
from tests.passes.convolutions import Convolution, model_of

PLAIN = Convolution(12, 8, (3, 3), (1, 1), (1, 1), (0,) * 4, "NOTSET", 1, True, False, (0, 0), (7, 6), 17, True)
GRID = {
    "plain": PLAIN,
    "strides": dataclasses.replace(PLAIN, strides=(2, 1), spatial=(8, 7)),
    "dilations": dataclasses.replace(PLAIN, dilations=(1, 2), spatial=(7, 9)),
    "uneven pads": dataclasses.replace(PLAIN, pads=(2, 0, 1, 1), strides=(1, 2)),
    "same upper": dataclasses.replace(PLAIN, auto_pad="SAME_UPPER", strides=(2, 2)),
    "same lower": dataclasses.replace(PLAIN, auto_pad="SAME_LOWER", strides=(2, 2), bias=False),
    "valid": dataclasses.replace(PLAIN, auto_pad="VALID"),
    "defaults, old": dataclasses.replace(PLAIN, opset=7, spelled=False),
    "sequence": dataclasses.replace(
        PLAIN, kernel=(5,), strides=(2,), dilations=(2,), pads=(3, 1), output_padding=(0,), spatial=(14,)
    ),
    "volume": dataclasses.replace(
        PLAIN,
        kernel=(2, 3, 1),
        strides=(1, 2, 2),
        dilations=(2, 1, 1),
        pads=(1, 0, 0, 0, 2, 0),
        output_padding=(0, 0, 0),
        spatial=(5, 6, 4),
    ),
    "transposed": dataclasses.replace(PLAIN, transposed=True, pads=(1, 0, 0, 1), dilations=(2, 1)),
}
each_layer = pytest.mark.parametrize("entry", GRID.values(), ids=GRID)
each_order = pytest.mark.parametrize("order", ["no", "yes"])


def planted(
    seed: int = 0, groups: int = 4, rank: int = 2, outputs: int = 32, channels: int = 32
) -> tuple[Array, Array]:
    """A 3 x 3 kernel whose shuffled groups of channels have ``rank`` output directions each, and the label of each."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(groups), channels // groups))
    weight = np.zeros((outputs, channels, 3, 3), np.float32)
    for group in range(groups):
        members = np.flatnonzero(labels == group)
        filters = rng.standard_normal((rank, len(members), 3, 3))
        weight[:, members] = np.tensordot(rng.standard_normal((outputs, rank)), filters, axes=1)
    return weight, labels


def image_layer(weight: Array, data: Array | None) -> Problem:
    outputs, channels = weight.shape[:2]
    proto = build(
        f"g (float[n,{channels},h,w] x) => (float[n,{outputs},p,q] y) {{ y = Conv<pads=[1,1,1,1]>(x, w, b) }}",
        {"w": weight, "b": np.linspace(-1, 1, outputs, dtype=np.float32)},
    )
    return problem(proto, None if data is None else {"x": data})


def analysed(technique: BlockConvolution | Block | Channel, posed: Problem) -> tuple[Site, Any]:
    (site,) = posed.sites
    assert technique.refuse(site) is None
    return site, technique.analyse(site, moments(posed).get(site.name))


@each_layer
@each_order
@pytest.mark.parametrize("data", [True, False], ids=["data", "weight"])
@pytest.mark.parametrize(("form", "groups"), [("rows", 2), ("rows", 4), ("columns", 2), ("columns", 4)])
def test_full_rank_is_the_original(entry: Convolution, order: str, data: bool, form: str, groups: int) -> None:
    proto, x = model_of(entry)
    posed = problem(proto, {"x": x} if data else None)
    technique = BlockConvolution(form=form, groups=groups, order=order)
    site, analysis = analysed(technique, posed)
    ranks = technique.spell_rank(site, analysis, RankWish(fraction=1.0))
    assert not isinstance(ranks, str)
    candidate = technique.candidate(site, analysis, ranks)
    factors = technique.factorize(site, analysis, candidate)
    made = rewrite(posed.model, technique.emit(site, candidate, factors))
    assert furthest(answers(made, {"x": x}), answers(proto, {"x": x})) < 1e-5
    operators = [node.op_type for node in made.graph.node]
    assert operators == ["Gather"] * ("order" in factors) + [site.op, site.op]
    assert candidate.nodes == len(operators) - 1
    assert ("order" in factors) <= (order == "yes" and form == "rows")


@each_layer
def test_what_is_told_of_clustered_channels_is_what_the_graph_does(entry: Convolution) -> None:
    proto, x = model_of(entry)
    posed = problem(proto, {"x": x})
    technique = BlockConvolution(form="rows", groups=2, order="yes", multiple=1)
    site, analysis = analysed(technique, posed)
    candidate = technique.candidate(site, analysis, (2,))
    factors = technique.factorize(site, analysis, candidate)
    assert "order" in factors, "the case does not move any channel"
    made = rewrite(posed.model, technique.emit(site, candidate, factors))
    measured, expected = answers(made, {"x": x})["y"], answers(proto, {"x": x})["y"]
    bias = 0.0 if site.uses[0].bias is None else site.uses[0].bias.reshape(-1, *[1] * len(entry.kernel))
    lost = np.linalg.norm(measured - expected) / np.linalg.norm(expected - bias)
    assert candidate.output_error == pytest.approx(lost, rel=1e-3)
    dense = technique.dense_equivalent(site, candidate, factors)[site.name]
    assert candidate.weight_error == pytest.approx(difference(dense.weight, site.weight), rel=1e-3)
    matrix, whole = technique.effective(site, candidate, factors)
    assert whole is not None
    moves = window(site)
    places = moves.draw(x.shape, 10**6, [0])
    rows = moves.patches(x, places) @ matrix + whole
    assert difference(rows, places.rows(measured)) < 1e-5


def test_planted_groups_are_found_and_err_far_less_than_few_channels_at_equal_cost() -> None:
    weight, labels = planted()
    posed = image_layer(weight, correlated((8, 32, 10, 10), axis=1))
    technique = BlockConvolution(groups=4, multiple=1)
    site, analysis = analysed(technique, posed)
    assert analysis.form == (1, 4, 1)
    for group in np.split(analysis.order, 4):
        assert len(set(labels[group])) == 1
    block = technique.candidate(site, analysis, (2,))
    plain, basis = Channel(multiple=1), analysed(Channel(multiple=1), posed)[1]
    rivals = [plain.candidate(site, basis, rank) for rank in plain.ranks(site, basis)]
    costs = [rival.parameters for rival in rivals]
    rival = rivals[int(np.searchsorted(costs, block.parameters))]  # costs as much or more
    assert block.parameters <= rival.parameters < 1.5 * block.parameters
    assert block.output_error is not None and rival.output_error is not None
    assert block.output_error < 0.01 < 0.2 < rival.output_error


def test_outputs_that_read_channels_of_their_own_err_far_less_than_few_channels_at_equal_cost() -> None:
    rng = np.random.default_rng(0)
    parts = [np.tensordot(rng.standard_normal((8, 2, 3, 3)), rng.standard_normal((2, 32)), (1, 0)) for _ in range(4)]
    weight = np.concatenate([np.moveaxis(part, 3, 1) for part in parts]).astype(np.float32)
    posed = image_layer(weight, correlated((8, 32, 10, 10), axis=1))
    technique = BlockConvolution(groups=4, multiple=1)
    site, analysis = analysed(technique, posed)
    assert analysis.form == (0, 4, 0)
    block = technique.candidate(site, analysis, (2,))
    plain, basis = Channel(multiple=1), analysed(Channel(multiple=1), posed)[1]
    rivals = [plain.candidate(site, basis, rank) for rank in plain.ranks(site, basis)]
    rival = rivals[int(np.searchsorted([rival.parameters for rival in rivals], block.parameters))]
    assert block.parameters <= rival.parameters < 1.5 * block.parameters
    assert block.output_error is not None and rival.output_error is not None
    assert block.output_error < 0.01 < 0.2 < rival.output_error


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_what_is_felt_counts(form: str) -> None:
    rng = np.random.default_rng(0)
    posed = image_layer(rng.standard_normal((16, 16, 3, 3)).astype(np.float32), correlated((8, 16, 8, 8), axis=1))
    (site,) = posed.sites
    mixing = rng.standard_normal((16, 16)) * np.arange(1, 17) ** -1.0
    ((name, seen),) = moments(posed)[site.name].items()
    technique = BlockConvolution(form=form, groups=2, multiple=1)
    errors = []
    for felt in (mixing @ mixing.T, None):
        analysis = technique.analyse(site, {name: dataclasses.replace(seen, felt=felt)})
        made = technique.dense_equivalent(
            site, candidate := technique.candidate(site, analysis, (3,)), technique.factorize(site, analysis, candidate)
        )
        apart = (made[site.name].weight - site.weight).reshape(16, -1).astype(np.float64)
        centred = seen.gram - np.outer(seen.mean, seen.mean)
        errors.append((float(np.sum((apart @ centred) * (mixing @ (mixing.T @ apart)))), candidate.output_error or 0.0))
    (weighed, told), (plain, least) = errors
    assert weighed < 0.9 * plain
    assert told > least


def test_forms_are_compared_at_half_of_the_work() -> None:
    for extra in ("", "strides=[2,2], "):
        proto = build(
            f"g (float[n,32,12,12] x) => (float[n,48,p,q] y) {{ y = Conv<{extra}pads=[1,1,1,1]>(x, w) }}",
            {"w": np.random.default_rng(0).standard_normal((48, 32, 3, 3)).astype(np.float32)},
        )
        posed = problem(proto, {"x": correlated((2, 32, 12, 12), axis=1)})
        (site,) = posed.sites
        assert site.macs is not None
        for form in BlockConvolution().forms(site.weight.shape):
            technique = BlockConvolution(form="rows" if form[0] else "columns", groups=form[1], multiple=1)
            analysis = technique.analyse(site, None)
            macs = technique.candidate(site, analysis, (technique._rank_at_half(site, form),)).macs
            assert macs is not None and macs / site.macs == pytest.approx(0.5, abs=0.03)


def test_as_channels_come_groups_that_are_shuffled_are_not_found() -> None:
    posed = image_layer(planted()[0], correlated((8, 32, 10, 10), axis=1))
    errors = []
    for order in ("yes", "no", "auto"):
        technique = BlockConvolution(form="rows", groups=4, multiple=1, order=order)
        site, analysis = analysed(technique, posed)
        errors.append(technique.candidate(site, analysis, (2,)).error)
    assert errors[0] < 0.01 < 0.2 < errors[1]
    assert errors[2] == errors[0]


def test_groups_are_found_in_correlated_patches_and_with_noise() -> None:
    weight, labels = planted(seed=3, groups=8, rank=3, outputs=48, channels=64)
    rng = np.random.default_rng(0)
    weight = weight + 0.3 * rng.standard_normal(weight.shape)
    mixing = rng.standard_normal((576, 576)) * np.arange(1, 577) ** -0.5
    for gram in (None, mixing @ mixing.T / 576 + 0.1 * np.eye(576)):
        order = clustered(weight, gram, 8, 3)
        assert sorted(order) == list(range(64))
        assert [len(set(labels[group])) for group in np.split(order, 8)] == [1] * 8


def a_target(groups: int) -> GroupedTarget:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((40, 40)) * np.arange(1, 41) ** -0.7
    return GroupedTarget.of(rng.standard_normal((12, 40)), with_ridge(mixing @ mixing.T, 1e-3), groups)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sweeps_lower_the_error_they_tell(groups: int) -> None:
    target = a_target(groups)
    for rank in (1, 3, 5):
        made = grouped_convolution(target, rank, 30, tolerance=0.0)
        apart = target.wanted - made.weight()
        assert made.history[-1] == pytest.approx(np.trace(apart @ target.metric @ apart.T), rel=1e-9)
        for before, after in zip(made.history, made.history[1:], strict=False):
            assert after <= before * (1 + 1e-9)
        alone = grouped_convolution(target, rank, 0).history[0]
        assert made.history[-1] <= alone
        assert groups == 1 or made.history[-1] < 0.97 * alone, "inputs of the groups are correlated"


def test_one_group_is_the_best_of_its_rank() -> None:
    target = a_target(1)
    root = np.linalg.cholesky(target.metric)
    sigma = np.linalg.svd(target.wanted @ root, compute_uv=False)
    for rank in (1, 4, 12):
        lost = grouped_convolution(target, rank, 3).history[-1]
        assert lost == pytest.approx(np.sum(sigma[rank:] ** 2), abs=1e-9)


def test_no_change_of_the_filters_or_of_the_mix_errs_less() -> None:
    """What it ends at is a minimum: finite differences in every factor are not negative."""
    target = a_target(4)
    made = grouped_convolution(target, 3, 2000, tolerance=0.0)
    rng = np.random.default_rng(0)

    def lost(first: Array, second: Array) -> float:
        apart = target.wanted - np.concatenate([second[:, g] @ first[g] for g in range(4)], axis=1)
        return float(np.trace(apart @ target.metric @ apart.T))

    for _ in range(20):
        first, second = rng.standard_normal(made.first.shape), rng.standard_normal(made.second.shape)
        step = 1e-4
        slope = lost(made.first + step * first, made.second + step * second)
        slope -= lost(made.first - step * first, made.second - step * second)
        assert abs(slope) / (2 * step) < 1e-3 * made.history[0]


def test_factors_of_a_weight_alone_are_those_of_every_group() -> None:
    wanted = a_target(4).wanted
    made = grouped_weight(wanted, 4, 5)
    tails = [np.linalg.svd(part, compute_uv=False)[5:] for part in np.split(wanted, 4, axis=1)]
    assert np.linalg.norm(wanted - made.weight()) ** 2 == pytest.approx(sum(np.sum(tail**2) for tail in tails))
    with pytest.raises(ValueError, match=r"must be in 1\.\.10, got 11"):
        grouped_weight(wanted, 4, full_rank(12, 40, 4) + 1)


def test_more_groups_behind_fewer_share_their_channels_out() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 12, 5, 1, 2)), rng.standard_normal((6, 7, 4, 3, 1))
    made = multiply_out([first, second])
    assert made.shape == (2, 21, 5, 3, 2)
    for group in range(2):
        for part in range(3):
            inner, outer = first[group, 4 * part : 4 * part + 4], second[3 * group + part]
            expected = np.einsum("ork,ril->oikl", outer[..., 0], inner[:, :, 0])
            assert np.allclose(made[group, 7 * part : 7 * part + 7], expected)


def test_fewer_groups_behind_more_read_them_side_by_side() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((6, 4, 5, 3, 1)), rng.standard_normal((2, 7, 12, 1, 2))
    made = multiply_out([first, second])
    assert made.shape == (2, 7, 15, 3, 2)
    for group in range(2):
        for part in range(3):
            inner, outer = first[3 * group + part], second[group, :, 4 * part : 4 * part + 4]
            expected = np.einsum("orkl,rimn->oimn", outer[..., :1], inner)
            assert np.allclose(made[group, :, 5 * part : 5 * part + 5, :, :1], expected)


@pytest.mark.parametrize(("form", "order"), [("rows", "no"), ("rows", "yes"), ("columns", "no")])
def test_a_refit_aims_at_another_output_and_keeps_the_order(form: str, order: str) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    x = correlated((12, 16, 8, 8), axis=1)
    posed = image_layer(weight, x)
    technique = BlockConvolution(form=form, order=order, groups=2, multiple=1)
    site, analysis = analysed(technique, posed)
    candidate = technique.candidate(site, analysis, (6,))
    factors = technique.factorize(site, analysis, candidate)
    moves = window(site)
    rows = moves.patches(x.astype(np.float64), moves.draw(x.shape, 10**6, [0]))
    delivered = rows + 0.3 * np.random.default_rng(1).standard_normal(rows.shape) + 0.2
    wanted = rows @ weight.reshape(16, -1).T.astype(np.float64)
    count = len(rows)
    seen = Moments(
        count,
        delivered.mean(axis=0),
        delivered.T @ delivered / count,
        delivered.T @ wanted / count,
        wanted.mean(axis=0),
        float(np.sum(wanted**2)) / count,
    )
    made = technique.refit(site, candidate, factors, seen, 1e-4)
    assert list(made) == list(factors) or set(made) == set(factors)
    assert order == "no" or np.array_equal(made["order"], factors["order"])
    bias = site.uses[0].bias
    assert bias is not None

    def lost(entry: Any) -> float:
        matrix, whole = technique.effective(site, candidate, entry)
        assert whole is not None
        return difference(delivered @ matrix + whole - bias, wanted)

    assert lost(made) < 0.97 * lost(factors)


@pytest.mark.parametrize("form", ["rows", "columns"])
def test_a_refit_starts_at_the_factors_so_far(form: str) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    posed = image_layer(weight, correlated((12, 16, 8, 8), axis=1))
    technique = BlockConvolution(form=form, groups=2, multiple=1)
    site, analysis = analysed(technique, posed)
    candidate = technique.candidate(site, analysis, (6,))
    factors = technique.factorize(site, analysis, candidate)
    (seen,) = moments(posed)[site.name].values()
    made = BlockConvolution(form=form, groups=2, multiple=1, sweeps=0).refit(site, candidate, factors, seen, 0.001)
    before, after = (technique.effective(site, candidate, entry)[0] for entry in (factors, made))
    assert difference(after, before) < 1e-4


def test_inputs_that_gain_little_by_an_order_stay_as_they_come() -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    posed = image_layer(weight, correlated((12, 16, 8, 8), axis=1))
    made = {order: BlockConvolution(form="rows", groups=2, order=order) for order in ("auto", "yes", "no")}
    found = {order: analysed(technique, posed) for order, technique in made.items()}
    errors = {order: made[order].candidate(*found[order], (8,)).error for order in made}
    assert 0.9 * errors["no"] < errors["yes"] < errors["no"] == errors["auto"]
    assert found["auto"][1].form == (1, 2, 0)


def test_a_plan_of_another_form_is_carried_out() -> None:
    posed = image_layer(planted()[0], correlated((8, 32, 10, 10), axis=1))
    technique = BlockConvolution(multiple=1)
    site, analysis = analysed(technique, posed)
    other = {"rows": "columns", "columns": "rows"}["rows" if analysis.form[0] else "columns"]
    by_name = BlockConvolution(form=other, groups=2, multiple=1)
    candidate = by_name.candidate(site, analysed(by_name, posed)[1], (2,))
    assert tuple(candidate.options["form"]) != analysis.form
    factors = technique.factorize(site, analysis, candidate)
    expected = by_name.factorize(site, analysed(by_name, posed)[1], candidate)
    assert all(np.array_equal(factors[name], entry) for name, entry in expected.items())


@each_order
def test_fewer_positions_than_numbers_in_a_patch_and_no_ridge_do_no_harm(order: str) -> None:
    x = correlated((1, 16, 3, 3), axis=1)
    posed = image_layer(np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32), x)
    technique = BlockConvolution(ridge=0.0, form="rows", order=order, multiple=1)
    site, analysis = analysed(technique, posed)
    assert technique.candidate(site, analysis, (9,)).error < 1e-4, "nine positions have nine directions"
    factors = technique.factorize(site, analysis, technique.candidate(site, analysis, (2,)))
    assert all(np.isfinite(factor).all() for factor in factors.values())


def test_half_precision_factors_are_finite() -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((8, 8, 3, 3)) * 1e4).clip(-6e4, 6e4).astype(np.float16)
    proto = build("g (float16[n,8,h,w] x) => (float16[n,8,p,q] y) { y = Conv(x, w) }", {"w": weight})
    posed = problem(proto, {"x": (rng.standard_normal((4, 8, 6, 6)) * 1e-4).astype(np.float16)})
    technique = BlockConvolution(form="rows", order="yes")
    site, analysis = analysed(technique, posed)
    candidate = technique.candidate(site, analysis, technique.ranks(site, analysis)[-1])
    for name, factor in technique.factorize(site, analysis, candidate).items():
        assert np.isfinite(factor).all() and factor.dtype == (np.int64 if name == "order" else np.float16)


def test_a_model_is_compressed_and_refitted() -> None:
    weight = planted()[0] / 12
    proto = build(
        """g (float[n,32,10,10] x) => (float[n,32,10,10] y) {
            a = Conv<pads=[1,1,1,1]>(x, v)  b = Relu(a)  y = Conv<pads=[1,1,1,1]>(b, w) }""",
        {"v": weight, "w": planted(seed=1)[0] / 12},
    )
    x = correlated((12, 32, 10, 10), axis=1)
    result = compress(
        proto,
        keep_macs=0.6,
        technique=["block:form=rows,groups=4,order=yes,multiple=2"],
        calibrate={"x": x},
        cache=False,
    )
    made = answers(result.model, {"x": x})
    assert [node.op_type for node in result.model.graph.node].count("Gather") == 2
    assert difference(made["y"], answers(proto, {"x": x})["y"]) < 0.01


def refusal(text: str, weight: Array, **options: Any) -> str:
    (site,) = problem(build(text, {"w": weight})).sites
    reason = Block(**options).refuse(site)
    assert reason is not None
    return reason


def test_refusals_tell_why() -> None:
    def noise(*shape: int) -> Array:
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    eight = "g (float[n,8,h,w] x) => (float[n,8,p,q] y) "
    conv = eight + "{ y = Conv(x, w) }"
    assert "channels are in 2 groups already" in refusal(eight + "{ y = Conv<group=2>(x, w) }", noise(8, 4, 3, 3))
    assert "channels are in 4 groups already" in refusal(eight + "{ y = Conv<group=4>(x, w) }", noise(8, 2, 1, 3))
    assert "depthwise" in refusal(eight + "{ y = Conv<group=8>(x, w) }", noise(8, 1, 3, 3))
    assert "all zeros" in refusal(conv, np.zeros((8, 8, 3, 3), np.float32))
    assert "a 1 x 1 kernel" in refusal(conv, noise(8, 8, 1, 1))
    for outputs, channels, options, message in (
        (1, 8, {}, "1 outputs or 8 inputs of a 8 to 1 convolution do not fall into 2 equal groups"),
        (8, 1, {}, "8 outputs or 1 inputs of a 1 to 8 convolution do not fall into 2 equal groups"),
        (9, 3, {}, "9 outputs or 3 inputs of a 3 to 9 convolution do not fall into 2 equal groups"),
        (9, 8, {"form": "columns"}, "9 outputs of a 8 to 9 convolution do not fall into 2 equal groups"),
        (8, 9, {"form": "rows", "groups": 4}, "9 inputs of a 9 to 8 convolution do not fall into 4 equal groups"),
        (8, 8, {"groups": 8}, "8 outputs or 8 inputs of a 8 to 8 convolution do not fall into 8 equal groups"),
        (8, 8, {"form": "grid"}, "form 'grid' is for matrices only"),
    ):
        text = f"g (float[n,{channels},h,w] x) => (float[n,{outputs},p,q] y) {{ y = Conv(x, w) }}"
        assert refusal(text, noise(outputs, channels, 3, 3), **options) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "whole"}, "form must be auto"),
        ({"groups": 3}, "groups must be 0, 2, 4 or 8, got 3"),
        ({"order": "maybe"}, "order must be auto, yes or no, got 'maybe'"),
        ({"multiple": -1}, "must not be negative"),
        ({"ridge": -0.1}, "must not be negative"),
        ({"blocks": 1}, "blocks must be at least 2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Block(**options)


def test_groups_that_leave_the_fast_kernels_are_taken_by_name_only() -> None:
    def groups(technique: BlockConvolution, *shape: int) -> dict[int, set[int]]:
        forms = technique.forms(shape)
        return {axis: {form[1] for form in forms if form[0] == axis} for axis in (0, 1)}

    assert groups(BlockConvolution(), 64, 64, 3, 3) == {0: {2, 4}, 1: {2, 4}}
    assert groups(BlockConvolution(), 16, 128, 3, 3) == {0: {2}, 1: {2, 4, 8}}
    assert groups(BlockConvolution(groups=8), 64, 64, 3, 3) == {0: {8}, 1: {8}}
    assert groups(BlockConvolution(), 256, 256, 3, 3) == {0: {2, 4}, 1: {2, 4}}, "eight groups take minutes"
    assert all(order == 0 for _, _, order in BlockConvolution().forms((256, 256, 3, 3)))
    assert {order for _, _, order in BlockConvolution(order="yes", form="rows").forms((256, 256, 3, 3))} == {1}
