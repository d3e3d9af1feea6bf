"""GlobalStepFilter: RecIS's schedule, driven by HashTableFilterHook or by hand."""

import pytest
import torch

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Uniform
from recis_lightning.optim import SparseAdam, SparseSGD


def ids(*numbers):
    return torch.tensor(numbers)


class Loop:
    """A training loop by hand: a batch is a lookup, a step, and the hook."""

    def __init__(self, filter_step, filter_interval):
        self.module = DynamicEmbedding(
            3, eviction=GlobalStepFilter(filter_step), initializer=Uniform(-1, 1), name="loop"
        )
        self.table = self.module.table
        self.optimizer = SparseAdam(hash_tables(self.module), lr=0.1)
        self.hook = HashTableFilterHook(filter_interval)
        self.batch = 0

    def train(self, *numbers):
        self.module(ids(*numbers)).pow(2).sum().backward()
        self.optimizer.step()
        self.batch += 1
        self.hook.after_step(None, self.batch)
        return set(self.table.ids().tolist())


@pytest.mark.parametrize("filter_step", [1, 2, 5])
def test_an_id_goes_after_the_kth_batch_that_missed_it(filter_step):
    """With an eviction after every batch, and not a batch earlier."""
    loop = Loop(filter_step, 1)
    assert loop.train(7, 8) == {7, 8}
    for missed in range(1, filter_step + 1):
        assert loop.train(8) == ({7, 8} if missed < filter_step else {8})
    loop.train(7)
    for _ in range(filter_step - 1):
        loop.train(8)
    assert loop.train(7, 8) == {7, 8}  # seen in time


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_filtering_keeps_its_distance_from_the_anchor(interval):
    """The first batch anchors; tables act at anchor + n, + 2n and so on."""
    loop = Loop(1, interval)
    expected = 0
    for number in range(1, 18):
        filters = number > 1 and (number - 1) % interval == 0
        expected = 1 if filters else expected + 1
        assert len(loop.train(number)) == expected
    assert loop.hook.last_filter_step == 1 + interval * (16 // interval)


def test_an_evicted_id_that_returns_starts_anew():
    """From its initial row and with empty optimizer state, in the row that was freed first."""
    loop = Loop(1, 1)
    initial = DynamicEmbedding(3, initializer=Uniform(-1, 1), name="loop")(ids(7)).detach()
    loop.train(7)
    (row,) = loop.table.ids_map()[1].tolist()
    assert not torch.equal(loop.table.embeddings(ids(7)), initial)
    loop.train(8)
    assert loop.train(8) == {8}
    with torch.no_grad():
        assert torch.equal(loop.module(ids(7)), initial)
    state = loop.table.get_extra_state()
    place = state["ids"].tolist().index(7)
    assert not state["slots"]["exp_avg"][place].any()
    assert not state["slots"]["exp_avg_sq"][place].any()
    assert loop.table.ids_map()[1][place] == row


def test_rows_freed_are_reused_first():
    """A stream of new ids with a window of old ones needs no more rows than the window."""
    loop = Loop(2, 1)
    for number in range(40):
        loop.train(number, 1000 + number)
    assert loop.table.storage.rows.num_rows <= 8
    assert len(loop.table) <= 6


def test_pending_gradients_keep_their_rows():
    """Gradient accumulation: what waits for a step survives, and goes afterwards."""
    module = DynamicEmbedding(2, eviction=GlobalStepFilter(1), name="pending")
    optimizer = SparseSGD(hash_tables(module), lr=1.0)
    before = module(ids(1, 2, 3)).detach()
    module(ids(1)).sum().backward()
    module.table.update_step(5)
    assert module.table.evict() == 2
    assert module.table.ids().tolist() == [1]
    optimizer.step()
    torch.testing.assert_close(module.table.embeddings(ids(1)), before[:1] - 1)
    assert module.table.evict() == 1
    assert len(module.table) == 0


def test_looking_without_training_stamps_only_in_training_mode():
    """Evaluation ages nothing and keeps nothing alive."""
    module = DynamicEmbedding(2, eviction=GlobalStepFilter(1), name="stamps")
    module(ids(1, 2))
    module.table.update_step(2)
    module.eval()(ids(1))
    with torch.no_grad():
        module.train()(ids(2))
    assert module.table.evict() == 1
    assert module.table.ids().tolist() == [2]


def test_deleting_takes_pending_gradients_along():
    """The row may be another id's when the step comes."""
    module = DynamicEmbedding(2, name="delete")
    optimizer = SparseSGD(hash_tables(module), lr=1.0)
    module(ids(1, 2)).sum().backward()
    assert module.table.delete(ids(1, 9)) == 1
    module.table.insert(ids(5), torch.zeros(1, 2))
    optimizer.step()
    assert module.table.embeddings(ids(5)).tolist() == [[0.0, 0.0]]


def test_a_table_without_a_policy_evicts_nothing():
    """Evict is always there."""
    module = DynamicEmbedding(2)
    module(ids(1))
    module.table.update_step(10**6)
    assert module.table.evict() == 0


def test_nothing_is_rebuilt_for_rows_that_are_free():
    """A freed row does not expire again and again."""
    loop = Loop(1, 1)
    loop.train(1, 2, 3)
    loop.train(4)
    loop.train(4)
    entries = loop.table.storage.entries
    loop.train(4)
    assert loop.table.storage.entries is entries


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_filter_step_is_a_positive_int(value, error):
    """The error names the argument and the value."""
    with pytest.raises(error, match=f"filter_step: expected an int >= 1, got {value}"):
        GlobalStepFilter(filter_step=value)
    assert GlobalStepFilter(filter_step=1).filter_step == 1
