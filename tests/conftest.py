"""What every test can ask for: the models of the repository and, where it is there, the folder of larger ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

# As lowrank_onnx.threads does for users: a spinning pool is what makes a suite of small products slow.
threadpool_limits(limits=1, user_api="blas")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def models() -> Path:
    """The folder ``models/``."""
    return REPOSITORY / "models"


@pytest.fixture(scope="session")
def zoo() -> Path:
    """A folder of third-party models with data; tests that ask for it are skipped where it is absent."""
    folder = Path(os.environ.get("LOWRANK_ONNX_ZOO", REPOSITORY.parent / "shared" / "zoo"))
    if not folder.is_dir():
        pytest.skip("the folder of third-party models is absent; LOWRANK_ONNX_ZOO names it")
    return folder
