"""HashTable.statistics(): sizes that add up, and counts of who came, went and came back."""

import copy

import pytest
import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, HashTable
from recis_lightning.admission import ReadOnly
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.table.statistics import ReadmissionTracker
from tests.helpers.sample_tables import filled, trained


def ids(*numbers):
    return torch.tensor(numbers)


def test_sizes_add_up():
    """Bytes by kind are those of the table in all."""
    module, _ = trained()
    table = module.table
    table.track_readmissions()
    statistics = table.statistics()
    assert statistics.rows == len(table) == 7
    assert statistics.capacity == table.capacity == 64
    assert statistics.load == 7 / 64
    assert sum(statistics[3:7]) == table.nbytes
    assert statistics.index_bytes == 16 * 65
    assert statistics.state_bytes == 2 * 4 * 3 * table.storage.rows.capacity
    assert statistics.weight_bytes >= 4 * 3 * table.storage.rows.capacity
    assert statistics.column_bytes == 8 * table.storage.rows.capacity


def test_rows_are_admitted_and_evicted(backend):
    """Whoever came is admitted, only what a policy threw out is evicted."""
    module = DynamicEmbedding(2, eviction=GlobalStepFilter(1))
    table = module.table
    assert table.statistics()[7:] == (0, 0, 0, 0)
    module(ids(1, 2, 2, 3))
    table.insert(ids(3, 4), torch.zeros(2, 2))
    assert table.statistics()[7:] == (4, 0, 0, 0)
    table.delete(ids(4, 5))
    table.update_step(2)
    module(ids(1, 6))
    assert table.evict() == 2
    module(ids(2))
    assert table.statistics()[7:] == (6, 0, 2, 0)
    table.clear()
    module(ids(1))
    assert table.statistics()[7:] == (7, 0, 2, 0)


def test_every_occurrence_without_a_row_is_refused(backend):
    """In training lookups; padding and evaluation do not count."""
    module = DynamicEmbedding(2, admission=ReadOnly(), padding_idx=0)
    module.table.insert(ids(7), torch.zeros(1, 2))
    module(ids(7, 8, 8, 9, 0))
    module(torch.arange(100_000, 200_000))
    module.eval()(ids(11))
    assert module.table.statistics().refused == 100_003
    assert module.table.statistics().admitted == 1


def test_a_large_insertion_beside_a_frozen_table_counts_once():
    """Insertion in rounds looks ids up again; what is refused is counted in the first."""
    options = {
        "open": EmbeddingOption(2, mode="sum"),
        "frozen": EmbeddingOption(2, admission=ReadOnly(), mode="sum"),
    }
    engine = EmbeddingEngine(options)
    many = torch.arange(200_000).view(2, -1)
    engine({"open": many, "frozen": many[:, :5]})
    assert engine.tables["open"].statistics().admitted == 200_000
    assert engine.tables["frozen"].statistics().refused == 10


def test_loading_and_copying_count_nothing():
    """Counts are of what this table did."""
    module, _ = trained()
    twin = copy.deepcopy(module)
    assert twin.table.statistics()[7:] == (0, 0, 0, 0)
    other = filled(count=2)
    other.load_state_dict(module.table.state_dict())
    assert other.statistics().admitted == 2
    other.insert(ids(1000), torch.zeros(1, 3))
    assert other.statistics().admitted == 3


def test_evicted_ids_that_return_are_counted_once():
    """From track_readmissions() on, whichever feature of a group brings them back."""
    options = {
        "a": EmbeddingOption(2, table="t", eviction=GlobalStepFilter(1)),
        "b": EmbeddingOption(2, table="t", eviction=GlobalStepFilter(1)),
        "c": EmbeddingOption(2),
    }
    engine = EmbeddingEngine(options)
    table = engine.tables["t"]

    def look_up(a, b):
        engine({"a": ids(*a), "b": ids(*b), "c": ids(5)})

    def evict_all():
        table.update_step(2)
        table.evict()

    look_up([1], [2])
    evict_all()
    look_up([1], [2])
    assert table.statistics().readmitted == 0
    table.track_readmissions()
    evict_all()
    look_up([3, 1, 1], [1, 2])
    look_up([1], [4])
    assert table.statistics().readmitted == 2
    assert engine.tables["c"].statistics().readmitted == 0
    evict_all()
    table.insert(ids(4, 1), torch.zeros(2, 2))
    table.track_readmissions()
    assert table.statistics().readmitted == 4


def test_the_memory_of_the_evicted_is_bounded():
    """Of too many, those that went first are forgotten."""
    memory = ReadmissionTracker(capacity=3)
    memory.note_evicted(ids(5))
    memory.note_evicted(ids(1, 7))
    memory.note_evicted(ids(9))
    assert memory.nbytes == 3 * 17
    memory.note_new(ids(5, 3, 9))
    memory.note_new(ids(9, 1))
    assert memory.count == 2  # not 5
    memory.note_evicted(ids(1))
    memory.note_new(ids(7, 9, 1))
    assert memory.count == 4  # 9 has not left again


@pytest.mark.parametrize(("capacity", "error"), [(0, ValueError), (2.5, TypeError)])
def test_the_bound_is_a_positive_int(capacity, error):
    """The error names the argument and the value."""
    with pytest.raises(error, match=f"capacity: expected an int >= 1, got {capacity}"):
        HashTable(2).track_readmissions(capacity)
