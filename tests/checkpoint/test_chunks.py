"""Work in pieces: all is done, what goes wrong is told, and threads end."""

import threading

import pytest

from recis_lightning.checkpoint.chunks import ahead, in_pieces


def test_prepares_ahead_in_order():
    """From the first piece on; what is not prepared at the end is left."""
    prepared, two = [], threading.Event()

    def prepare(number):
        prepared.append(number)
        if number == 1:
            two.set()

    with ahead(10**9, prepare):
        assert two.wait(10)
    assert prepared == [*range(len(prepared))]
    count = len(prepared)
    assert count < 10**9
    assert not any(thread.name == "recis_lightning" for thread in threading.enumerate())


def test_does_every_piece_once_and_tells_of_it():
    """With as many threads as there are."""
    done, told = [], []
    in_pieces(50, lambda number: done.append(number) or number, told.append)
    assert sorted(done) == [*range(50)]
    assert sum(told) == sum(range(50))


def test_the_first_error_counts():
    """The rest is left."""

    def work(number):
        raise ValueError(f"piece {number}")

    with pytest.raises(ValueError, match="piece"):
        in_pieces(50, work, lambda done: None)
