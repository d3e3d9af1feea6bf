"""Memory after a large eviction: blocks, columns and index go back, and every row is in place."""

import copy

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable, hash_tables
from recis_lightning.admission import MinCount
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows
from recis_lightning.optim import SparseAdam, SparseSGD
from tests.helpers.sample_tables import EXTREMES, by_id, same

DIM = 64  # 341 rows a block with Adam's state, so a few thousand rows are many blocks


def large(count=6000, pieces=6, admission=None):
    """Return an embedding with many blocks, in several allocations, and its optimizer."""
    policy = AnyOf([GlobalStepFilter(1), MaxRows(10**9, by="count")])
    module = DynamicEmbedding(DIM, eviction=policy, admission=admission, name="t")
    sparse = SparseAdam(hash_tables(module), lr=0.1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    for part in order.chunk(pieces):
        module(torch.cat([part, part[:3]])).pow(2).sum().backward()
        sparse.step()
    return module, sparse


@pytest.mark.parametrize("pieces", [1, 6])
@pytest.mark.parametrize("kept", [0, 1, 341, 342, 700, 2000])
@pytest.mark.slow_except(
    dict(backend="cpu"), dict(pieces=6, kept=[0, 342]), dict(backend="reference", pieces=6)
)
def test_what_stays_is_what_it_was(backend, pieces, kept):
    """Weights, state, stamps and counts of the ids that stay, whichever rows they lay in."""
    module, sparse = large(3000, pieces)
    table, stay = module.table, torch.arange(kept)
    table.update_step(2)
    module(stay)
    expected = {
        key: value[:kept] if not isinstance(value, dict) else value
        for key, value in by_id(table).items()
    }
    before, size = table.storage.rows.capacity, table.nbytes
    report = table.evict()
    assert report == 3000 - kept
    assert len(table) == kept
    assert same(by_id(table), expected)
    assert sorted(table.ids().tolist()) == list(range(kept))
    if kept <= 700:
        assert table.storage.rows.capacity < before / 2
        assert table.nbytes < size / 2
        assert report.bytes_returned == size - table.nbytes
        assert sorted(table.ids_map()[1].tolist()) == list(range(kept))
    module(torch.arange(-50, 50)).pow(2).sum().backward()
    sparse.step()
    assert len(table) == kept + 50 + max(50 - kept, 0)


def test_compacted_and_not_train_alike():
    """Row numbers differ, and nothing else does."""
    module, sparse = large()
    twin, twin_sparse = copy.deepcopy((module, sparse))
    stay = torch.arange(0, 6000, 9)
    for embedding in (module, twin):
        embedding.table.update_step(2)
        embedding(stay)
    module.table.evict()
    twin.table.delete(torch.tensor([i for i in range(6000) if i % 9]))
    assert module.table.storage.rows.capacity < twin.table.storage.rows.capacity / 2
    later = torch.cat([torch.arange(2000), EXTREMES])
    for embedding, optimizer in ((module, sparse), (twin, twin_sparse)):
        for _ in range(3):
            embedding(later).pow(2).sum().backward()
            optimizer.step()
    assert same(by_id(module.table), by_id(twin.table))


def test_a_pending_gradient_puts_it_off():
    """Its rows are noted by number; the next eviction makes up for it."""
    module, sparse = large()
    table = module.table
    table.update_step(2)
    module(torch.arange(10)).sum().backward()
    capacity = table.storage.rows.capacity
    assert table.evict() == 5990
    assert table.storage.rows.capacity == capacity
    sparse.step()
    table.update_step(2)
    module(torch.arange(5))
    assert table.evict() == 5
    assert table.storage.rows.capacity < capacity / 10


def test_backward_through_a_compaction_is_an_error():
    """Rows that a lookup noted are void."""
    module, _ = large()
    module.table.update_step(2)
    loss = module(torch.arange(10)).sum()
    module.table.evict()
    with pytest.raises(RuntimeError, match="'t' lost rows between a lookup and its backward"):
        loss.backward()


def test_sightings_that_say_nothing_go_too():
    """The memory of admission is part of what is given back."""
    module, _ = large(2000, 1, MinCount(1))
    table = module.table
    assert table.storage.admission_counter.nbytes > 2000 * 16
    table.update_step(2)
    module(torch.arange(3))
    table.evict()
    assert table.storage.admission_counter.nbytes == 16 * 65


def test_small_tables_are_left_alone():
    """A block is the least there is."""
    table = HashTable(2, eviction=GlobalStepFilter(1))
    table.insert(torch.arange(100), torch.ones(100, 2))
    table.update_step(2)
    table.insert(torch.arange(3), torch.ones(3, 2))
    capacity = table.storage.rows.capacity
    assert table.evict() == 97
    assert table.storage.rows.capacity == capacity


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_the_process_shrinks():
    """Nine tenths of the rows go: 80% of the rows' bytes go back, counted and resident."""
    table = HashTable(32, eviction=MaxRows(30_000), name="large")
    SparseAdam([table], lr=0.1)
    start = resident_bytes()
    for part in np.array_split(np.arange(300_000), 30):
        table.insert(torch.from_numpy(part), torch.ones(len(part), 32))
    grown, size = resident_bytes(), table.nbytes
    share = 300_000 * (3 * 32 * 4)
    assert grown - start > 0.95 * share
    table.evict()
    assert size - table.nbytes >= 0.8 * share
    assert grown - resident_bytes() >= 0.8 * share


def test_compact_waits_for_pending_gradients():
    module = DynamicEmbedding(1, name="t")
    optimizer = SparseSGD(hash_tables(module), lr=1.0)
    module(torch.arange(8))
    module.table.delete(torch.arange(4))
    module(torch.tensor([6, 7])).sum().backward()
    with pytest.raises(RuntimeError, match="table 't': compact moves rows, and gradients"):
        module.table.compact()
    before = module.table.embeddings(torch.tensor([6, 7]))
    optimizer.step()
    module.table.compact()
    assert torch.equal(module.table.embeddings(torch.tensor([6, 7])), before - 1)
