import numpy as np
import pytest
import torch

from recis_lightning.ops import host_memory
from recis_lightning.ops.header import Header
from recis_lightning.ops.layout import BLOCKS, NEXT_ROW, NUM_FREE
from recis_lightning.table import row_store
from recis_lightning.table.row_store import RowStore

LAYOUTS = [
    (1, torch.float32, {}),
    (7, torch.float32, {"sum": 1}),
    (16, torch.float32, {"exp_avg": 16, "exp_avg_sq": 16}),
    (1, torch.bfloat16, {}),
    (5, torch.bfloat16, {"sum": 5}),
    (8, torch.bfloat16, {"exp_avg": 8, "exp_avg_sq": 8}),
    (300_000, torch.float32, {}),
]


def _store(dim=4, dtype=torch.float32, slots=None, fill=0.0, num_rows=0):
    store = RowStore(Header(torch.device("cpu"), False), dim, dtype, slots, fill)
    _hand_out(store, num_rows)
    return store


def _hand_out(store, num_rows):
    """Do what an insertion does: reserve, take freed rows, then rows never used."""
    store.reserve(num_rows)
    reused = min(num_rows, int(store.header.fields[NUM_FREE]))
    store.header.fields[NUM_FREE] -= reused
    store.header.fields[NEXT_ROW] += num_rows - reused


def _fill(store, seed=0):
    """Give all rows random content; return what ``read`` should answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(store.num_rows)
    weights = torch.randn(store.num_rows, store.embedding_dim, generator=generator)
    weights = weights.to(store.dtype)
    slots = {
        name: torch.randn(store.num_rows, words, generator=generator)
        for name, words in store.slots.items()
    }
    store.write(rows, weights, slots)
    return weights, slots


def _assert_reads(store, rows, weights, slots):
    got_weights, got_slots = store.read(rows)
    assert torch.equal(got_weights, weights)
    assert got_slots.keys() == slots.keys() == store.slots.keys()
    assert all(torch.equal(got_slots[name], slots[name]) for name in slots)


@pytest.mark.parametrize(("dim", "dtype", "slots"), LAYOUTS)
def test_rows_read_as_written(backend, dim, dtype, slots):
    """Weights and every slot come back bit by bit, in any order, also in part."""
    store = _store(dim, dtype, slots, num_rows=20 if dim > 1000 else 3000)
    weights, state = _fill(store)
    order = torch.randperm(store.num_rows, generator=torch.Generator().manual_seed(0))
    _assert_reads(store, order, weights[order], {k: v[order] for k, v in state.items()})
    _assert_reads(store, order[:0], weights[:0], {k: v[:0] for k, v in state.items()})
    half = order[: len(order) // 2]
    weights[half] = 1.5
    for name in state:
        state[name][half] = -2.5
    store.write(half, weights[half], {name: value[half] for name, value in state.items()})
    _assert_reads(store, torch.arange(store.num_rows), weights, state)


def test_slots_that_are_not_given_start_afresh(backend):
    """A row written without a slot has that slot's first value."""
    store = _store(3, slots={"sum": 3, "count": 1}, fill=0.125, num_rows=10)
    _fill(store)
    store.write(torch.tensor([2, 5]), torch.zeros(2, 3), {"count": torch.ones(2, 1)})
    _, slots = store.read(torch.tensor([5, 2]))
    assert (slots["sum"] == 0.125).all()
    assert (slots["count"] == 1).all()


@pytest.mark.parametrize(("dim", "dtype", "slots"), LAYOUTS)
def test_growth_moves_no_whole_block(dim, dtype, slots):
    """Whole blocks keep their addresses and rows their content while the store grows."""
    store = _store(dim, dtype, slots, num_rows=5)
    weights, state = _fill(store)
    for num_new in (1, store.capacity, 2 << store.block_shift, 3, 1 << store.block_shift):
        before = store.addresses[: store.capacity >> store.block_shift].copy()
        _hand_out(store, num_new)
        assert store.capacity >= store.num_rows
        assert len(store.addresses) == -(-store.capacity >> store.block_shift)
        assert (store.addresses[: len(before)] == before).all()
        assert store.header.fields[BLOCKS] == store.addresses.ctypes.data
    assert len(set(store.addresses.tolist())) == len(store.addresses)
    _assert_reads(store, torch.arange(5), weights, state)


def test_blocks_start_on_a_cache_line_and_do_not_overlap():
    """The first row of every chunk is aligned, and blocks lie at least their size apart."""
    store = _store(5, slots={"sum": 5})
    for _ in range(30):
        _hand_out(store, 3000)
    for chunk in store._allocations:
        assert chunk.ctypes.data % 64 == 0
    gaps = np.diff(np.sort(store.addresses))
    assert gaps.min() >= 4 * store.row_words << store.block_shift


@pytest.mark.parametrize(("dim", "dtype", "slots"), LAYOUTS[:-1])
@pytest.mark.parametrize("num_rows", [0, 3000])
def test_many_rows_are_read_into_huge_pages(monkeypatch, num_rows, dim, dtype, slots):
    """What malloc would ask the system for comes from where tables have their memory."""
    store = _store(dim, dtype, slots, num_rows=num_rows)
    weights, state = _fill(store)
    asked, empty = [], host_memory.empty
    monkeypatch.setattr(row_store, "_MAPPED_BYTES", 0)
    monkeypatch.setattr(host_memory, "empty", lambda size: asked.append(size) or empty(size))
    _assert_reads(store, torch.arange(num_rows), weights, state)
    assert asked == [tensor.nbytes for tensor in (weights, *state.values())]


def test_growth_is_geometric_and_small_tables_are_small():
    """Ten rows take what they need; a hundred thousand rows take few allocations."""
    store = _store(16, num_rows=10)
    assert store.nbytes == 10 * 64 + 8
    for _ in range(1000):
        _hand_out(store, 100)
    assert store.num_rows == 100_010
    assert store.capacity < 1.3 * store.num_rows
    large = _store(16)
    for _ in range(2000):
        _hand_out(large, 2000)
    assert len(large._allocations) < 60
    assert large.capacity < 1.2 * large.num_rows


@pytest.mark.parametrize("num_new", [0, 1, 3, 4, 1000])
def test_reserve_counts_freed_rows_as_room(num_new):
    """Nothing is allocated for rows that freed ones can serve."""
    store = _store(4, num_rows=5)
    _hand_out(store, store.capacity - 5)
    full = store.capacity
    store.set_free_rows(torch.tensor([3, 1, 2]))
    store.reserve(num_new)
    assert (store.capacity > full) == (num_new > 3)
    assert store.capacity - full + 3 >= num_new


def test_free_rows_are_a_stack_of_what_is_left():
    """``free_rows`` shrinks from the end as an insertion takes rows."""
    store = _store(4, num_rows=8)
    store.set_free_rows(torch.tensor([6, 2, 5]))
    assert store.free_rows.tolist() == [6, 2, 5]
    _hand_out(store, 2)
    assert store.free_rows.tolist() == [6]
    assert store.num_rows == 8
    store.set_free_rows(torch.cat([store.free_rows, torch.tensor([0])]))
    _hand_out(store, 3)
    assert store.free_rows.tolist() == []
    assert store.num_rows == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 3, 8])
@pytest.mark.parametrize("num_rows", [0, 1, 5000, 70_000])
def test_relayout_keeps_weights_and_the_slots_that_stay(dim, dtype, num_rows):
    """Slots that go are gone, new ones start from the fill, the rest keep every bit."""
    store = _store(dim, dtype, {"a": dim, "b": 1}, 0.0, num_rows)
    weights, slots = _fill(store)
    rows = torch.arange(num_rows)
    free = rows[: num_rows // 2]
    store.set_free_rows(free)
    store.relayout({"b": 1, "c": 2 * dim}, 0.5)
    assert list(store.slots) == ["b", "c"]
    new = torch.full((num_rows, 2 * dim), 0.5)
    _assert_reads(store, rows, weights, {"b": slots["b"], "c": new})
    assert (store.num_rows, store.free_rows.tolist()) == (num_rows, free.tolist())
    assert store.capacity >= num_rows
    store.relayout({}, 0.0)
    _assert_reads(store, rows, weights, {})


def test_relayout_to_the_same_slots_touches_no_row():
    """Only the fill of rows to come changes."""
    store = _store(3, slots={"sum": 3}, fill=1.0, num_rows=100)
    weights, slots = _fill(store)
    before = store.addresses.copy()
    store.relayout({"sum": 3}, 2.0)
    assert (store.addresses == before).all()
    _assert_reads(store, torch.arange(100), weights, slots)
    store.write(torch.tensor([4]), torch.zeros(1, 3), {})
    assert store.read(torch.tensor([4]))[1]["sum"].tolist() == [[2.0] * 3]


def test_nbytes_counts_blocks_addresses_and_freed_rows():
    """The sum of what the store holds, to the byte."""
    store = _store(3, torch.bfloat16, {"sum": 3}, num_rows=20_000)
    store.set_free_rows(torch.arange(50))
    row_bytes = 4 * (2 + 3)
    blocks = len(store.addresses)
    assert blocks == -(-store.capacity >> store.block_shift)
    assert store.nbytes == store.capacity * row_bytes + blocks * 8 + 50 * 8


@pytest.mark.parametrize("num_rows", [0, 1, 4096, 5000, 9000, 10_000])
def test_shrinking_leaves_a_part_that_grows_again(num_rows):
    """What is kept of an allocation of several blocks and of a part, to the row."""
    store = _store(16, num_rows=5000)
    _hand_out(store, 5000)
    weights, _ = _fill(store)
    assert len(store.addresses) == 3
    store.shrink(num_rows)
    assert store.capacity == num_rows
    _assert_reads(store, torch.arange(num_rows), weights[:num_rows], {})
    _hand_out(store, 5000)
    _assert_reads(store, torch.arange(num_rows), weights[:num_rows], {})


def test_stores_of_many_blocks_have_whole_ones_only():
    """From sixteen blocks on; the part that was there goes into the next one."""
    store = _store(16, num_rows=15 * 4096 + 7)
    assert store.capacity == 15 * 4096 + 7
    weights, _ = _fill(store)
    _hand_out(store, 4096)
    assert store.capacity % 4096 == 0
    _assert_reads(store, torch.arange(len(weights)), weights, {})
    store.shrink(16 * 4096 + 1)
    assert store.capacity == 17 * 4096
