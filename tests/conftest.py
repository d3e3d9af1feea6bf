from collections.abc import Iterator

import pytest

from recis_lightning.ops import backend as ops_backend


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once under each backend of the ops."""
    with ops_backend.use(request.param):
        yield request.param
