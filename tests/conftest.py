import gc
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from recis_lightning.ops import backend as ops_backend
from tests.helpers.interpreting import quicken_interpreter
from tests.helpers.rank_pool import Ranks


@pytest.hookimpl(tryfirst=True)  # before what is slow is deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what ``slow_except`` does not except, and skip what cannot run here.

    That is what needs a GPU, or kernels that are interpreted, where there are none.
    A process interprets all kernels or none: beside a GPU they are compiled, and tested with it,
    unless TRITON_INTERPRET=1 says not to.
    """
    compiled = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    for item in items:
        if (quick := item.get_closest_marker("slow_except")) and not _is_one_of(quick.args, item):
            item.add_marker(pytest.mark.slow)
        if not compiled and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU and compiled kernels"))
        if item.get_closest_marker("interpreted"):
            if compiled:
                why = "compiled in this process; TRITON_INTERPRET=1 interprets the kernels"
                item.add_marker(pytest.mark.skip(reason=why))
            elif importlib.util.find_spec("triton") is None:
                item.add_marker(pytest.mark.skip(reason="needs Triton"))


def pytest_collection_finish() -> None:
    """Keep what was imported out of the collector's walks: of the whole heap, each takes 0.2 s.

    The package walks the heap itself where it looks for a LightningModule or an open region.
    """
    quicken_interpreter()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter clear all at its end: what it leaves, extensions report as leaks."""
    gc.unfreeze()


def _is_one_of(cases: tuple[dict[str, Any], ...], item: pytest.Item) -> bool:
    """Return whether all parameters that one of the cases names have a value it lists."""
    spec = item.callspec  # type: ignore[attr-defined]
    values = {**spec.params, "id": spec.id}
    return any(
        all(
            values[name] in wanted if isinstance(wanted, list) else values[name] == wanted
            for name, wanted in case.items()
        )
        for case in cases
    )


_BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton", marks=pytest.mark.interpreted),
]


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once under each backend of the ops."""
    with ops_backend.use(request.param):
        yield request.param


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Return processes that act as ranks of a gloo group; they start when a test first asks."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture(params=_BACKENDS[1:])
def kernels(request: pytest.FixtureRequest) -> str:
    """Name each backend with kernels in turn, for a test that compares it with the reference.

    Interpreted, a program takes as long as thousands on a GPU: "triton" gets fewer and smaller
    cases, which reach every branch all the same.
    """
    return str(request.param)
