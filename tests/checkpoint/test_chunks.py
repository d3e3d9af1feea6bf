"""Work on chunks: all is done, errors are raised, and threads end."""

import threading
import time

import pytest

from recis_lightning.checkpoint import chunks
from recis_lightning.checkpoint.chunks import parallel_for, prefetch


def test_prefetches_in_order():
    """From the first chunk on; those that are not prepared when the context ends are left."""
    prepared, two = [], threading.Event()

    def prepare(index):
        prepared.append(index)
        if index == 1:
            two.set()

    with prefetch(10**9, prepare):
        assert two.wait(10)
    assert prepared == [*range(len(prepared))]
    count = len(prepared)
    assert count < 10**9
    assert not any(thread.name == "recis_lightning" for thread in threading.enumerate())


def test_works_on_every_chunk_once_and_reports_bytes():
    """With as many threads as there are."""
    done, reported = [], []
    parallel_for(50, lambda index: done.append(index) or index, reported.append)
    assert sorted(done) == [*range(50)]
    assert sum(reported) == sum(range(50))


def test_the_first_error_counts():
    """The rest is left."""

    def work(index):
        raise ValueError(f"chunk {index}")

    with pytest.raises(ValueError, match="chunk"):
        parallel_for(50, work, lambda done: None)


def test_calls_back_when_enough_bytes_are_done(monkeypatch):
    """Each time there are ``every_bytes`` more, while threads still work."""
    monkeypatch.setattr(chunks, "_POLL_SECONDS", 0.001)
    calls = []
    parallel_for(
        50, lambda index: time.sleep(0.002) or 10, int, lambda: calls.append(1), every_bytes=250
    )
    assert 1 <= len(calls) <= 2
