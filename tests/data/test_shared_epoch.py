"""Epochs that persistent workers are told: batches are of the epoch, or there is an error."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from recis_lightning.data import ColumnarDataset, MixedDataset
from recis_lightning.data.shared_epoch import SharedEpoch
from tests.helpers.columnar_files import COLUMNS, write_files


def rows(batches):
    return [batch["row"].tolist() for batch in batches]


@pytest.mark.parametrize("is_mixed", [False, True])
def test_persistent_workers_go_where_their_parent_does(tmp_path, is_mixed):
    """Forwards and back; a place that is loaded while they live is refused."""
    pattern = write_files(tmp_path)

    def make():
        data = ColumnarDataset(pattern, COLUMNS, 4, shuffle_rows=6, seed=1, prefetch=0)
        return MixedDataset({"a": data}, {"a": 1}, 4) if is_mixed else data

    data, alone = make(), make()
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 1, 5, 0, 0, 3):
        data.set_epoch(epoch)
        alone.set_epoch(epoch)
        assert rows(loader) == rows(alone)
    state = data.state_dict(2)
    data.load_state_dict(state)
    with pytest.raises(RuntimeError, match="load_state_dict: worker processes that were there"):
        rows(loader)
    loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
    alone.load_state_dict(state)
    data.set_epoch(3)  # as Lightning does: the place is kept
    assert rows(loader) == rows(alone)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_have_epochs_of_their_own(tmp_path, copied):
    data = ColumnarDataset(write_files(tmp_path), COLUMNS)
    other = copied(data)
    data.set_epoch(4)
    data.forget_workers()
    assert other._shared_epoch.news() is None


def test_it_may_be_made_in_inference_mode():
    """As a Trainer makes it when it validates before it trains."""
    with torch.inference_mode():
        parent = SharedEpoch()
    parent.tell(2)
    assert copy.copy(parent).news() is None
    with torch.inference_mode():
        parent.tell(3)
        parent.tell_loaded()


def test_news_come_once():
    parent = SharedEpoch()
    worker = copy.copy(parent)  # of the same memory, as after a fork
    assert worker.news() is None
    parent.tell(7)
    parent.tell(8)
    assert (worker.news(), worker.news()) == (8, None)
    parent.tell_loaded()
    with pytest.raises(RuntimeError, match="make a new DataLoader"):
        worker.news()
