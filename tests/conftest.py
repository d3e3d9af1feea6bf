import os
from collections.abc import Iterator

import pytest
import torch

from recis_lightning.ops import backend as ops_backend
from tests.ranks import Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, or where its kernels are interpreted."""
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU and compiled kernels"))


def _skip_without_interpreter(backend: str) -> None:
    """Skip where Triton's kernels cannot run over the CPU's memory.

    A process interprets all of them or none: beside a GPU they are compiled, and tested with it,
    unless TRITON_INTERPRET=1 says not to.
    """
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("compiled in this process; TRITON_INTERPRET=1 interprets the kernels")


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once under each backend of the ops."""
    _skip_without_interpreter(request.param)
    with ops_backend.use(request.param):
        yield request.param


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Return processes that act as ranks of a gloo group; they start when a test first asks."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(params=["cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Name each backend with kernels in turn, for a test that compares it with the reference.

    Interpreted, a program takes as long as thousands on a GPU: "triton" gets fewer and smaller
    cases, which reach every branch all the same.
    """
    _skip_without_interpreter(request.param)
    return str(request.param)
