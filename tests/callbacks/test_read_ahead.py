"""The next batch, seen before it is asked for."""

import pytest
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from recis_lightning.callbacks.read_ahead import next_batch, stop_reading_ahead


class Numbers:
    """A loader that tells its place, and whose length may be wrong."""

    def __init__(self, count, length, broken=None):
        self.count, self.length, self.broken, self.place = count, length, broken, 0

    def __len__(self):
        return self.length

    def __iter__(self):
        for number in range(self.count):
            self.place = number + 1
            if number == self.broken:
                raise OSError("unreadable")
            yield number

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def fetcher_of(loader):
    found = _PrefetchDataFetcher()
    found.setup(CombinedLoader(loader, "max_size_cycle"))
    return iter(found)


def places(fetcher):
    return fetcher.combined_loader._state_dicts()


def test_each_batch_comes_once_and_places_count_those_given():
    """Whether or not it was looked at, and however often."""
    fetcher = fetcher_of(Numbers(4, 4))
    assert next(fetcher)[0] == 0
    assert [next_batch(fetcher), next_batch(fetcher)] == [1, 1]
    assert places(fetcher) == [{"place": 1}]
    assert [next(fetcher)[0], next(fetcher)[0]] == [1, 2]
    assert places(fetcher) == [{"place": 3}]
    assert next_batch(fetcher) == 3
    assert not fetcher.done
    stop_reading_ahead(fetcher)
    assert places(fetcher) == [{"place": 4}]


def test_the_end_is_where_it_was():
    """Also if the length was wrong; nothing is read behind it."""
    fetcher = fetcher_of(Numbers(9, 2))
    assert [next(fetcher)[0], next_batch(fetcher), next(fetcher)[0]] == [0, 1, 1]
    assert fetcher.done
    assert next_batch(fetcher) is None
    assert places(fetcher) == [{"place": 2}]
    fetcher = fetcher_of(Numbers(1, 2))
    assert next(fetcher)[0] == 0
    assert next_batch(fetcher) is None
    with pytest.raises(StopIteration):
        next(fetcher)
    assert fetcher.done


def test_an_error_comes_in_its_turn():
    """Where the batch would have been asked for."""
    fetcher = fetcher_of(Numbers(3, 3, broken=1))
    assert next(fetcher)[0] == 0
    assert next_batch(fetcher) is None
    with pytest.raises(OSError, match="unreadable"):
        next(fetcher)


def test_what_lightning_has_fetched_is_not_read_again():
    """Without a length it fetches a batch ahead itself."""
    fetcher = fetcher_of(iter(range(3)))
    assert [next(fetcher)[0], next_batch(fetcher), next(fetcher)[0]] == [0, 1, 1]
    assert next(fetcher)[0] == 2
    assert next_batch(fetcher) is None
