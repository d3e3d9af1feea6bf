"""Many ids at once go another way through the index, and come to the same end."""

import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import hash_bulk_cpu, hash_index, hash_index_cpu
from recis_lightning.ops.table_header import (
    HAS_PADDING,
    PADDING,
    SEGMENT_FLAGS,
    SEGMENT_PADDING,
)

CPU = torch.device("cpu")
LOWEST, HIGHEST = -(2**63), 2**63 - 1
PADDING_ID = 12345


@pytest.fixture(autouse=True)
def _few_are_many(monkeypatch):
    monkeypatch.setattr(hash_index_cpu, "_BULK", 300)
    monkeypatch.setattr(hash_index_cpu, "_FIRST_ROUND", 100)
    monkeypatch.setattr(hash_bulk_cpu, "_REGION_SHIFT", 4)  # ids often find a region full


@pytest.fixture
def calls(monkeypatch):
    """Count the calls that went the other way."""
    counted = []
    insert_many = hash_index_cpu.insert_many

    def counting(*args):
        counted.append(args)
        return insert_many(*args)

    monkeypatch.setattr(hash_index_cpu, "insert_many", counting)
    return counted


def _table(known):
    table = HashTable(4, eviction=GlobalStepFilter(5), name="user")
    table._insert(known)
    return table


def _look_up(table, ids):
    segments = table.segments(ids, insert=True)
    segments[0, SEGMENT_FLAGS] |= HAS_PADDING
    segments[0, SEGMENT_PADDING] = PADDING_ID
    return hash_index.find_or_insert(segments, ids.numel(), [table], [0], CPU)


def _ids(kind, count=20_000):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(LOWEST, HIGHEST, (count,), generator=generator)
    if kind == "duplicates":
        ids[count // 2 :] = ids[torch.randint(0, count // 2, (count - count // 2,))]
    if kind == "known":
        ids[200::3] = torch.arange(ids[200::3].numel()) % 1000
    if kind == "special":
        ids[150::7], ids[151::11], ids[300::1000] = PADDING_ID, LOWEST, HIGHEST
    if kind == "crowded":  # one region of the index is asked for more than it holds
        ids = torch.arange(count) * 3 - 17
    return ids


@pytest.mark.parametrize("freed", [0, 37])
@pytest.mark.parametrize("kind", ["new", "duplicates", "known", "special", "crowded"])
def test_rows_are_those_of_the_reference(kind, freed, calls):
    """Rows, new positions, stamps and every later lookup agree, freed rows reused first."""
    ids, found = _ids(kind), {}
    for name in ("reference", "cpu"):
        with ops_backend.use(name):
            table = _table(torch.arange(1000))
            table.delete(torch.arange(freed) * 2)
            table.update_step(7)
            rows, new = _look_up(table, ids)
            again = _look_up(table, ids)
            assert torch.equal(again[0], rows)
            assert again[1] is None
            everything = torch.cat([ids.unique(), torch.arange(1000)])
            seen = table.last_seen(everything)
            found[name] = rows, new, len(table), table.ids(), seen
    assert calls
    assert (ids == PADDING_ID).equal(found["cpu"][0] == PADDING)
    for one, two in zip(found["cpu"], found["reference"], strict=True):
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


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


@pytest.mark.parametrize("what", ["reserve_ids", "reserve_rows"])
def test_no_room_leaves_the_table_as_it_was(what, monkeypatch, calls):
    """A failed insertion takes back all of its ids, and the next one works."""
    table, ids = _table(torch.arange(1000)), _ids("duplicates")
    reserve = getattr(table, what)

    def fail(count):
        if count > 1000:
            raise MemoryError(f"no room for {count}")
        reserve(count)

    monkeypatch.setattr(table, what, fail)
    with pytest.raises(MemoryError, match="no room"):
        _look_up(table, ids)
    assert calls
    assert len(table) == 1000
    assert table.ids().tolist() == list(range(1000))
    assert torch.equal(table.embeddings(ids[ids > 1000]), torch.zeros(int((ids > 1000).sum()), 4))
    monkeypatch.undo()
    _, new = _look_up(table, ids)
    assert len(table) == 1000 + new.numel() == ids.unique().numel() + 1000
