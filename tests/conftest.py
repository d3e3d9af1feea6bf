from collections.abc import Iterator

import pytest

from recis_lightning.ops import backend as ops_backend
from tests.ranks import Ranks


@pytest.fixture(params=["reference", "cpu"])
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
