"""Where decompositions run: here, in processes on this machine, or on a Dask cluster that is there already."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import joblib

from lowrank_onnx.errors import LowRankError
from lowrank_onnx.version import __version__

_PATIENCE = 15.0  # seconds, to reach a scheduler


@dataclass(frozen=True)
class Workers:
    """Who decomposes.

    Attributes:
        jobs: Processes on this machine; 1 is this one.
        scheduler: Address of a Dask scheduler, ``tcp://host:8786``; its workers need this package, in this version.
    """

    jobs: int = 1
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise LowRankError(f"--jobs must be at least 1, got {self.jobs}; it is the number of processes")

    def run(self, function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Return what a function gives for each tuple of arguments, in their order.

        What comes back from another process is a copy, also of the arguments in it.

        Raises:
            LowRankError: The cluster cannot be used.
        """
        if self.scheduler is None:
            work = (joblib.delayed(function)(*arguments) for arguments in calls)
            return list(joblib.Parallel(n_jobs=self.jobs)(work))
        with _cluster(self.scheduler) as client:
            # Weights and moments are large: sent by themselves, not inside the tasks.
            sent = client.scatter(list(calls), hash=False)
            futures = [client.submit(_call, function, arguments, pure=False) for arguments in sent]
            return list(client.gather(futures))


HERE = Workers()


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
        from distributed.comm.core import CommClosedError, connect
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise LowRankError(
            f"--scheduler {address} needs the package distributed; install lowrank-onnx[cluster]"
        ) from error

    async def greet() -> None:
        await (await connect(address, timeout=_PATIENCE)).close()  # type: ignore[no-untyped-call]

    try:
        # A client that finds nobody leaves its thread behind, which can stop the next client from starting. The loop
        # has a thread of its own, since that of a notebook runs already.
        with ThreadPoolExecutor(1) as alone:
            alone.submit(asyncio.run, greet()).result()
        client = Client(address, timeout=_PATIENCE, set_as_default=True)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LowRankError(
            f"--scheduler {address} cannot be reached ({reason}); expected a running Dask scheduler, "
            "as in tcp://host:8786"
        ) from error
    with client:
        try:
            found = client.run(_version)
        except ImportError as error:
            raise LowRankError(
                f"--scheduler {address}: its workers lack a package ({error}); install lowrank-onnx {__version__} there"
            ) from error
        if not found:
            raise LowRankError(f"--scheduler {address} has no workers; start some, as with 'dask worker {address}'")
        for worker, version in found.items():
            if version != __version__:
                raise LowRankError(
                    f"--scheduler {address}: worker {worker} has lowrank-onnx {version}, expected {__version__}; "
                    "install the same version there"
                )
        try:
            yield client
        except (KilledWorker, CommClosedError) as error:
            raise LowRankError(
                f"--scheduler {address}: workers died ({error}); give them more memory, or leave --scheduler out"
            ) from error


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


def _version() -> str:
    return __version__
