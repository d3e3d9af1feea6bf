"""An iterator that runs ahead: order, errors, and its end."""

import threading

import pytest

from recis_lightning.data.background import in_background


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_items_and_errors_come_in_order(depth):
    def items():
        yield from range(20)
        raise OSError("disk")

    found = []
    with pytest.raises(OSError, match="disk"):
        found.extend(item for item in in_background(items(), depth) if found.append(item))
    assert found == list(range(20))


def test_it_runs_ahead_no_further_than_asked_and_ends_when_dropped():
    made, closed = [], threading.Event()

    def items():
        try:
            for item in range(1000):
                made.append(item)
                yield item
        finally:
            closed.set()

    reader = in_background(items(), 3)
    assert next(reader) == 0
    reader.close()
    assert closed.is_set()
    assert len(made) <= 6
    assert not [t for t in threading.enumerate() if t.name == "recis_lightning.data"]
