"""Searches of a full index end: a fault of the host's bookkeeping must not hang a GPU."""

from unittest.mock import patch

import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.admission import MinCount
from recis_lightning.ops import backend, hash_index
from recis_lightning.table.admission_counter import AdmissionCounter
from recis_lightning.table.storage import Storage

pytestmark = [pytest.mark.interpreted, pytest.mark.timeout(60)]


def _full(admission=None):
    """Return an embedding whose index of 64 entries has no empty one, by a fault."""
    module = DynamicEmbedding(2, admission=admission, name="t")
    module.table.storage.reserve_rows(200)
    with patch.object(Storage, "guaranteed_free", lambda self: 10**6):
        module(torch.arange(64))
    assert module.table.capacity == 64
    return module


def test_a_search_of_a_full_index_ends():
    """Known ids are found, and others are unknown."""
    with backend.use("triton"):
        module = _full()
        rows = module.table.storage.find(torch.arange(50, 80))
        assert rows.tolist() == [*range(50, 64), *[-1] * 16]
        assert module.eval()(torch.arange(60, 70))[4:].eq(0).all()


def test_an_id_without_room_is_reported():
    """Such an id gets no row and no gradient, whatever its duplicates; the next lookup raises."""
    with backend.use("triton"):
        module = _full()
        ids = torch.tensor([3, 70, -(2**63), 71, 70])
        with patch.object(Storage, "guaranteed_free", lambda self: 10**6):
            out = module(ids)
        assert out[[1, 3, 4]].eq(0).all()
        assert out[[0, 2]].ne(0).all()
        out.sum().backward()
        assert module.table.pending[0].rows.tolist() == [3, -1, 64, -1, -1]
        with pytest.raises(RuntimeError, match=r"an index of 64 entries, with 65 ids .* no room"):
            len(module.table)


def test_an_admission_count_without_room_is_reported():
    """The id counts as not seen."""
    with backend.use("triton"):
        module = DynamicEmbedding(2, admission=MinCount(2), name="t")
        module.table.storage.reserve_ids(500)
        module.table.storage.reserve_rows(500)
        with patch.object(AdmissionCounter, "reserve", lambda *args: None):
            module(torch.arange(80).repeat(2))
        assert module.table.storage.find(torch.arange(80)).ge(0).sum() == 64
        with pytest.raises(RuntimeError, match=r"an index of 64 entries, with 64 ids .* no room"):
            module.table.storage.admission_counter.header.read_counts()


def test_an_index_too_small_for_its_ids_is_refused():
    """The table keeps the index it had."""
    with backend.use("triton"):
        table = HashTable(2, name="t")
        table.insert(torch.arange(100), torch.ones(100, 2))
        with pytest.raises(RuntimeError, match="no room for an id"):
            hash_index.rebuild(table.storage.header, 64)
        assert sorted(table.ids().tolist()) == list(range(100))
        assert len(table) == 100
