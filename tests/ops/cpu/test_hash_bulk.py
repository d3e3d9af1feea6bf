"""Bulk insertion of ids, against the reference."""

import functools

import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import hash_index
from recis_lightning.ops.cpu import hash_bulk as hash_bulk_cpu
from recis_lightning.ops.cpu import hash_index as hash_index_cpu
from recis_lightning.ops.cpu import hash_partition
from recis_lightning.ops.layout import HAS_PADDING, PADDING, SEGMENT_FLAGS, SEGMENT_PADDING
from recis_lightning.table import sizing
from tests.helpers.sample_tables import insert_initial

CPU = torch.device("cpu")
LOWEST, HIGHEST = -(2**63), 2**63 - 1
PADDING_ID = 12345


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch):
    monkeypatch.setattr(hash_index_cpu, "_BULK", 300)
    # Tables of many ids have an index whose size is a power of two, and so have these few.
    monkeypatch.setattr(sizing, "SMALL_IDS", -1)
    monkeypatch.setattr(hash_index_cpu, "_FIRST_ROUND", 100)
    monkeypatch.setattr(hash_partition, "_REGION_SHIFT", 4)  # ids often find a region full


@pytest.fixture
def partitioned(monkeypatch):
    """List what was partitioned."""
    listed = []
    partition = hash_bulk_cpu.partition

    def listing(*args):
        listed.append(partition(*args))
        return listed[-1]

    monkeypatch.setattr(hash_bulk_cpu, "partition", listing)
    return listed


@pytest.fixture
def calls(monkeypatch):
    """Count the bulk insertions."""
    counted = []
    bulk_insert = hash_index_cpu.bulk_insert

    def counting(*args):
        counted.append(args)
        return bulk_insert(*args)

    monkeypatch.setattr(hash_index_cpu, "bulk_insert", counting)
    return counted


def _table(known):
    table = HashTable(4, eviction=GlobalStepFilter(5), name="user")
    insert_initial(table, known)
    return table


def _look_up(table, ids):
    segments = table.storage.segments(ids, insert=True)
    segments[0, SEGMENT_FLAGS] |= HAS_PADDING
    segments[0, SEGMENT_PADDING] = PADDING_ID
    return hash_index.find_or_insert(segments, ids.numel(), [table.storage], [0], CPU)


def _ids(kind, count=8_000):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(LOWEST, HIGHEST, (count,), generator=generator)
    if kind == "duplicates":
        half = count // 2
        ids[half:] = ids[torch.randint(0, half, (count - half,), generator=generator)]
    if kind == "known":
        ids[200::3] = torch.arange(ids[200::3].numel()) % 1000
    if kind == "special":
        ids[150::7], ids[151::11], ids[300::1000] = PADDING_ID, LOWEST, HIGHEST
    if kind == "patterned":
        ids = torch.arange(count) * 3 - 17
    if kind == "crowded":  # one region of the index is asked for more than it holds
        ids[200::2] = 4711
    return ids


KINDS = ["new", "duplicates", "known", "special", "patterned", "crowded"]


def _found(kind, freed, backend):
    """Return all that a lookup of new ids changes."""
    ids = _ids(kind)
    with ops_backend.use(backend):
        table = _table(torch.arange(1000))
        table.delete(torch.arange(freed) * 2)
        table.update_step(7)
        rows, new = _look_up(table, ids)
        again = _look_up(table, ids)
        assert torch.equal(again[0], rows)
        assert again[1] is None
        everything = torch.cat([ids.unique(), torch.arange(1000), torch.tensor([LOWEST])])
        return rows, new, table.ids(), table.last_seen(everything)


_wanted = functools.cache(_found)


def _agrees_with_the_reference(kind, freed):
    found = _found(kind, freed, "cpu")
    assert (_ids(kind) == PADDING_ID).equal(found[0] == PADDING)
    for one, two in zip(found, _wanted(kind, freed, "reference"), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("freed", [0, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_reference(kind, freed, calls):
    """Rows, new positions, stamps and every later lookup agree, freed rows reused first."""
    _agrees_with_the_reference(kind, freed)
    assert calls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("region_shift", [2, 3, 8, 30])
@pytest.mark.parametrize("max_overflow", [0, 64])
def test_regions_of_any_size(kind, region_shift, max_overflow, monkeypatch, partitioned):
    """Ids lie in their own regions or apart, and few of a region's, or all, overflow."""
    monkeypatch.setattr(hash_partition, "_REGION_SHIFT", region_shift)
    monkeypatch.setattr(hash_partition, "_MAX_REGIONS", 1 << 20)
    monkeypatch.setattr(hash_bulk_cpu, "_MAX_OVERFLOW", max_overflow)
    _agrees_with_the_reference(kind, 37)
    if (kind == "crowded" and region_shift < 30) or region_shift == 2:
        assert partitioned[-1].items is not None
    elif kind == "new" and region_shift >= 8:
        assert partitioned[-1].items is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_is_large_enough(kind, partitioned):
    """Ids are entered beside those that are there."""
    ids = _ids(kind)
    for name in ("reference", "cpu"):
        with ops_backend.use(name):
            table = _table(torch.arange(1000))
            table.storage.reserve_ids(30_000)
            capacity = table.capacity
            found = _look_up(table, ids)
            assert table.capacity == capacity
            if name == "reference":
                wanted = found
    assert partitioned[-1].items is not None
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("special", [False, True])
def test_old_entries_move_to_the_larger_index(special, partitioned):
    """Also those of a large table, shared by several threads, and that of the id ``EMPTY``."""
    known = torch.arange(300_000) * 7 + 1
    table = HashTable(4, name="user")
    insert_initial(table, torch.cat([known, torch.tensor([LOWEST])]) if special else known)
    partitioned.clear()
    ids = _ids("new", 300_000)
    count, capacity = len(table), table.capacity
    rows, new = _look_up(table, ids)
    assert table.capacity > capacity
    assert partitioned
    assert new.tolist() == list(range(len(ids)))
    assert rows.tolist() == list(range(count, count + len(ids)))
    assert torch.equal(table.ids()[: len(known)], known)
    assert len(table) == count + len(ids)
    found = hash_index.find(table.storage.segments(known), len(known), CPU)
    assert found.tolist() == list(range(len(known)))
    assert table.ids()[count - 1] == (LOWEST if special else known[-1])


def test_mostly_known_ids_go_the_usual_way(calls):
    """No room is reserved for many new ids where the first of them are known."""
    ids = _ids("new")
    table = _table(ids)
    calls.clear()
    capacity = table.capacity
    rows, new = _look_up(table, ids)
    assert rows.tolist() == list(range(ids.numel()))
    assert new is None
    assert not calls
    assert table.capacity == capacity


@pytest.mark.parametrize("what", ["larger_index", "reserve_rows"])
def test_no_room_leaves_the_table_as_it_was(what, monkeypatch, calls):
    """A failed insertion is rolled back, and the next one works."""
    table, ids = _table(torch.arange(1000)), _ids("duplicates")
    reserve = getattr(table.storage, what)

    def fail(count):
        if count > 1000:
            raise MemoryError(f"no room for {count}")
        return reserve(count)

    monkeypatch.setattr(table.storage, what, fail)
    with pytest.raises(MemoryError, match="no room"):
        _look_up(table, ids)
    assert calls
    assert len(table) == 1000
    assert table.ids().tolist() == list(range(1000))
    assert torch.equal(table.embeddings(ids[ids > 1000]), torch.zeros(int((ids > 1000).sum()), 4))
    monkeypatch.undo()
    _, new = _look_up(table, ids)
    assert len(table) == 1000 + new.numel() == ids.unique().numel() + 1000
