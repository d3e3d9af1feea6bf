"""Small tables take at most 4 kB and 1.5 times their payload."""

import copy

import numpy as np
import pytest
import torch

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.admission import MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops import hash_index
from recis_lightning.optim import SparseAdagrad, SparseAdam, SparseSGD
from recis_lightning.table import sizing
from tests.helpers.sample_tables import EXTREMES, by_id, same

SIZES = (1, 7, 19, 100, 1211, 9999)
OPTIMIZERS = (SparseSGD, SparseAdagrad, SparseAdam)


def _bound(table):
    """Return the bytes that a table may take: columns of policies are a part of its payload."""
    words = table.embedding_dim + sum(table.storage.rows.slots.values())
    return 4096 + 1.5 * len(table) * (8 + 4 * words + 8 * len(table.storage.columns))


def _train(module, optimizer, batches):
    for ids in batches:
        module(ids).sum().backward()
        optimizer.step()


def _batches(num_rows, kind):
    """Return batches of ``num_rows`` ids, spread, with the extreme ones among them."""
    ids = torch.arange(num_rows) * 7919 - 5
    ids[0] = EXTREMES[0]
    again = ids[torch.randint(0, num_rows, (6000,), generator=torch.Generator().manual_seed(0))]
    return {
        "at once": [ids],
        "among many": [torch.cat([again, ids])],
        "bit by bit": [*ids.chunk(40), again],
    }[kind]


@pytest.mark.parametrize("kind", ["at once", "among many", "bit by bit"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dim", [4, 16, 64])
def test_a_small_table_takes_little_more_than_its_payload(dim, optimizer, kind):
    """Whether ids come at once, often or a few in each batch."""
    for num_rows in SIZES:
        module = DynamicEmbedding(dim, name="t")
        (table,) = hash_tables(module)
        _train(module, optimizer([table], lr=0.1), _batches(num_rows, kind))
        assert len(table) == num_rows
        assert table.nbytes <= _bound(table), num_rows
        sizes = table.statistics()
        assert sizes.index_bytes + sizes.weight_bytes + sizes.state_bytes == table.nbytes


@pytest.mark.parametrize("num_rows", SIZES)
def test_so_does_one_with_columns_another_layout_or_from_a_state(num_rows):
    """Columns of policies, rows laid out for less state, a copy, a loaded state."""
    module = DynamicEmbedding(4, eviction=GlobalStepFilter(5), name="t")
    (table,) = hash_tables(module)
    _train(module, SparseAdam([table], lr=0.1), _batches(num_rows, "bit by bit"))
    assert table.nbytes <= _bound(table)
    before = by_id(table)
    loaded = DynamicEmbedding(4, eviction=GlobalStepFilter(5), name="t")
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), loaded):
        (copied,) = hash_tables(other)
        assert same(by_id(copied), before)
        assert copied.nbytes <= _bound(copied)
    table.storage.set_slots({}, 0.0)
    assert table.nbytes <= _bound(table)
    assert torch.equal(by_id(table)["weights"], before["weights"])


@pytest.mark.parametrize("row_bytes", [16, 24, 40, 64, 192, 768, 4096])
def test_the_bound_holds_at_every_size(row_bytes):
    """Index and rows as they are after growth by one, of all numbers of rows."""
    capacities = [sizing.index_capacity(num_ids, row_bytes) for num_ids in range(10_001)]
    for num_ids, capacity in enumerate(capacities):
        assert num_ids <= 0.87 * capacity
        assert capacity % 4 == 0
        rows = num_ids + max(sizing.row_growth(num_ids, row_bytes) - 1, 0)
        block_addresses = 8 * (1 + rows * row_bytes // (1 << 17))
        taken = 16 * (capacity + 1) + rows * row_bytes + block_addresses
        assert taken <= 4096 + 1.5 * num_ids * (8 + row_bytes)
    assert capacities == sorted(capacities)
    assert len(set(capacities)) < 100  # growth by a sixteenth, not by each id


def test_large_tables_have_indexes_of_powers_of_two():
    """From 16,385 ids on, as long as there are as many."""
    for num_ids in (sizing.SMALL_IDS + 1, 1 << 20, 1 << 22):
        assert sizing.index_capacity(num_ids, 16) == hash_index.capacity_for(num_ids)
    module = DynamicEmbedding(1, name="t")
    (table,) = hash_tables(module)
    for num_ids in (16_384, 16_385, 40_000):
        module(torch.arange(num_ids))
        assert table.capacity == sizing.index_capacity(num_ids, 4)
        assert (table.storage.find(torch.arange(50_000)) >= 0).sum() == num_ids


def test_repeated_new_ids_beside_known_ones_do_not_grow_an_index():
    """The distinct ones count, in each of a group's tables and over its features."""
    engine = EmbeddingEngine(
        {
            "a": EmbeddingOption(4, table="t"),
            "b": EmbeddingOption(4, table="t"),
            "c": EmbeddingOption(4),
        }
    )
    known, few = torch.arange(53), torch.arange(40)
    engine({"a": known, "b": known[:0], "c": few})
    capacities = [table.capacity for table in engine.tables.values()]
    new = torch.tensor([EXTREMES[0], 1000, EXTREMES[0], 1000] * 5)
    engine({"a": new, "b": new, "c": few})
    assert [len(table) for table in engine.tables.values()] == [55, 40]
    engine({"a": known, "b": known, "c": new})
    assert [len(table) for table in engine.tables.values()] == [55, 42]
    assert capacities == [table.capacity for table in engine.tables.values()]
    for table in engine.tables.values():
        assert sorted(table.ids_map()[1].tolist()) == list(range(len(table)))


@pytest.mark.parametrize("row_bytes", [16, 40])
def test_indexes_of_any_capacity_agree_with_a_dict(backend, row_bytes):
    """Growth, eviction and searches for known and unknown ids, with each backend."""
    table = HashTable(row_bytes // 4, name="t")
    generator, known = torch.Generator().manual_seed(1), {}
    for size in (1, 60, 3, 200, 1, 400):
        ids = torch.randint(0, 2000, (size,), generator=generator) * (2**53 + 11)
        table.insert(ids, ids[:, None].expand(-1, row_bytes // 4) % 997.0)
        known |= dict.fromkeys(ids.tolist())
        if size == 200:
            gone = list(known)[::3]
            table.delete(torch.tensor(gone))
            known = {key: None for key in known if key not in set(gone)}
        assert sorted(table.ids().tolist()) == sorted(known)
    asked = torch.arange(2000) * (2**53 + 11)
    expected = np.isin(asked.numpy(), list(known))
    assert (table.storage.find(asked).numpy() >= 0).tolist() == expected.tolist()
    read = table.embeddings(asked)[:, 0]
    assert torch.equal(read, torch.where(torch.from_numpy(expected), asked % 997.0, 0.0))


def test_rejected_and_counted_ids_take_no_room_in_an_index():
    """With an admission policy only the ids that it admits count."""
    module = DynamicEmbedding(16, admission=MinCount(3), name="t")
    (table,) = hash_tables(module)
    module(torch.arange(3000))
    assert (len(table), table.capacity) == (0, 64)
    module(torch.arange(20).repeat(2))
    assert (len(table), table.capacity) == (20, 64)
