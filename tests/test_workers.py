"""Decompositions in other processes and on a cluster give what they give here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto

from lowrank_onnx import apply, compress, workers
from lowrank_onnx.errors import LowRankError
from tests.builders import Array, build, correlated, falling

distributed = pytest.importorskip("distributed")

DATA: dict[str, Array] = {"x": correlated((60, 32))}


def two_layers() -> ModelProto:
    text = "g (float[n,32] x) => (float[n,24] y) { h = MatMul(x, v)  r = Relu(h)  y = MatMul(r, w) }"
    return build(text, {"v": falling(32, 40), "w": falling(40, 24, seed=3)})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as made:
        yield made


def test_a_cluster_gives_the_same_bytes(cluster: Any) -> None:
    options: dict[str, Any] = {"keep_params": 0.6, "calibrate": DATA, "technique": ["svd"], "cache": False}
    here = compress(two_layers(), **options)
    there = compress(two_layers(), scheduler=cluster.scheduler_address, **options)
    assert there.model.SerializeToString() == here.model.SerializeToString()
    assert there.plan["sites"] == here.plan["sites"]


def test_a_plan_is_carried_out_by_processes_and_by_a_cluster(cluster: Any) -> None:
    made = compress(two_layers(), rank=8, technique=["svd"])
    for where in ({"jobs": 2}, {"scheduler": cluster.scheduler_address}):
        again = apply(two_layers(), made.plan, **where)
        assert again.model.SerializeToString() == made.model.SerializeToString()


def test_the_work_is_done_there(cluster: Any) -> None:
    (told,) = workers.Workers(scheduler=cluster.scheduler_address).run(_process, [()])
    assert told != _process()


def _process() -> int:
    import os

    return os.getpid()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://a", "127.0.0.1"])
def test_a_scheduler_that_is_not_there(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PATIENCE", 2.0)
    before = threading.active_count()
    with pytest.raises(LowRankError, match=f"--scheduler {address} cannot be reached .*expected a running Dask"):
        compress(two_layers(), rank=4, scheduler=address)
    assert threading.active_count() <= before, "a thread is left behind"


def test_workers_of_another_version(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "__version__", "9.9")
    with pytest.raises(LowRankError, match=r"has lowrank-onnx \S+, expected 9\.9; install the same version"):
        compress(two_layers(), rank=4, scheduler=cluster.scheduler_address)


def test_a_cluster_without_workers() -> None:
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=None) as empty,
        pytest.raises(LowRankError, match="has no workers; start some"),
    ):
        compress(two_layers(), rank=4, scheduler=empty.scheduler_address)


def test_order_is_kept() -> None:
    assert workers.Workers(2).run(np.negative, [(value,) for value in range(5)]) == [0, -1, -2, -3, -4]


def test_workers_that_die() -> None:
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as mortal:
        mortal.scheduler.allowed_failures = 0
        with pytest.raises(LowRankError, match="workers died"):
            workers.Workers(scheduler=mortal.scheduler_address).run(_die, [()])


def _die() -> None:
    import os

    os._exit(1)
