"""Padding is left out where it changes nothing at real positions, and only there."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank_onnx.batches import by_length
from lowrank_onnx.problem import Problem, pose
from lowrank_onnx.statistics import observe
from tests.builders import RUNTIME, Array, build, falling

SAMPLES, LENGTH = 24, 20

TOKENS = "int64[n,s] ids, int64[n,s] attention_mask"
LOOK_UP = "x = Gather(table, ids)  h = MatMul(x, w)"
MASK = "m0 = Cast<to=1>(attention_mask)  m = Unsqueeze(m0, last)"

MODELS = {
    "by position": f"g ({TOKENS}) => (float[n,s,6] y) {{ {LOOK_UP}  y = Tanh(h) }}",
    "pooled": f"""g ({TOKENS}) => (float[n,6] y) {{ {LOOK_UP} {MASK}
        kept = Mul(h, m)  total = ReduceSum<keepdims=0>(kept, middle)
        count = ReduceSum<keepdims=0>(m, middle)  y = Div(total, count) }}""",
}
MINDS = {
    "padding counts": f"g ({TOKENS}) => (float[n,6] y) {{ {LOOK_UP}  y = ReduceMean<axes=[1], keepdims=0>(h) }}",
    "another axis": f"g ({TOKENS}) => (float[n,6,s] y) {{ {LOOK_UP}  y = Transpose<perm=[0,2,1]>(h) }}",
    "fixed": f"g ({TOKENS.replace('s]', '20]')}) => (float[n,20,6] y) {{ {LOOK_UP}  y = Tanh(h) }}",
}


def constants() -> dict[str, Array]:
    table = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    return {"table": table, "w": falling(8, 6), "last": np.array([2]), "middle": np.array([1])}


def sentences(side: str = "right") -> dict[str, Array]:
    rng = np.random.default_rng(1)
    ids, mask = np.zeros((SAMPLES, LENGTH), np.int64), np.zeros((SAMPLES, LENGTH), np.int64)
    for row, length in enumerate(rng.integers(3, 15, SAMPLES)):
        real = slice(0, length) if side == "right" else slice(LENGTH - length, LENGTH)
        ids[row, real], mask[row, real] = rng.integers(1, 50, length), 1
    return {"ids": ids, "attention_mask": mask}


def posed(text: str, data: dict[str, Array]) -> Problem:
    used = {name: value for name, value in constants().items() if name in text}
    return pose(build(text, used, opset=17 if "axes=" in text else 18), RUNTIME, data, augment=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_sums_from_less_work(name: str) -> None:
    problem = posed(MODELS[name], sentences())
    assert problem.training is not None and problem.calibrate is not None
    real = sentences()["attention_mask"].sum(axis=1)
    feeds = problem.training.batch([2, 5])
    assert {value.shape[1] for value in feeds.values()} == {max(real[2], real[5])}
    assert problem.calibrate.batch([2, 5])["ids"].shape[1] == LENGTH, "results are validated on whole samples"
    (site,) = [site for site in problem.sites if site.kind == "linear"]
    (less,) = observe(problem.model, [site], problem.training, RUNTIME)[site.name].values()
    (whole,) = observe(problem.model, [site], problem.calibrate, RUNTIME)[site.name].values()
    assert less.rows == whole.rows == real.sum()
    np.testing.assert_allclose(less.gram, whole.gram, atol=1e-6 * np.trace(whole.gram))  # products are float32
    np.testing.assert_allclose(less.mean, whole.mean, atol=1e-6)


@pytest.mark.parametrize("name", MINDS)
def test_models_that_mind_get_all_of_it(name: str) -> None:
    problem = posed(MINDS[name], sentences())
    assert problem.training is problem.calibrate


def test_padding_in_front_stays() -> None:
    problem = posed(MODELS["by position"], sentences("left"))
    assert problem.training is problem.calibrate


def test_samples_of_like_length_run_together() -> None:
    training = posed(MODELS["by position"], sentences()).training
    assert training is not None and training.lengths is not None
    order = by_length(training, range(SAMPLES))
    assert sorted(order) == list(range(SAMPLES))
    assert (np.diff(training.lengths[order]) >= 0).all()
    part = training.subset([7, 3])
    assert part.lengths is not None and part.lengths.tolist() == training.lengths[[7, 3]].tolist()
    assert by_length(part.untrimmed, [1, 0]) == [1, 0]
