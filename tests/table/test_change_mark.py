import copy

import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.admission import MinCount
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Constant
from recis_lightning.optim import SparseAdam, SparseSGD
from recis_lightning.table.change_mark import ChangeMark
from recis_lightning.table.row_changes import RowChanges


class _Follower:
    """Copy of a table that knows nothing but a mark's changes."""

    def __init__(self, table, state=False):
        self.table, self.mark, self.rows = table, ChangeMark(table, state), {}
        self.steps = {}

    def follow(self):
        changes = self.mark.take()
        if changes.is_whole:
            self.rows.clear()
            self.steps.clear()
        for id in changes.removed.tolist():
            self.rows.pop(id, None)
            self.steps.pop(id, None)
        weights = self.table.embeddings(changes.ids).tolist()
        self.rows.update(zip(changes.ids.tolist(), weights, strict=True))
        if self.mark.state:
            seen = self.table.last_seen(changes.ids).tolist()
            self.steps.update(zip(changes.ids.tolist(), seen, strict=True))
        return changes

    def check(self):
        ids = self.table.ids()
        wanted = dict(zip(ids.tolist(), self.table.embeddings(ids).tolist(), strict=True))
        assert self.rows == wanted
        if self.mark.state:
            assert self.steps == dict(
                zip(ids.tolist(), self.table.last_seen(ids).tolist(), strict=True)
            )


def _train(module, optimizer, ids):
    module(ids).pow(2).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("seed", range(3))
def test_changes_are_all_there_is_to_know(seed):
    """Whatever is done to a table, who follows its changes has its rows; so has another."""
    generator = torch.Generator().manual_seed(seed)
    module = DynamicEmbedding(3, eviction=GlobalStepFilter(2), name="t", admission=MinCount(2))
    table, optimizer = module.table, SparseAdam([module.table], lr=0.1)
    often, seldom = _Follower(table, state=True), _Follower(table)

    def some(n):
        return torch.randint(0, 4000, (n,), generator=generator)

    def lookup():
        module(some(300))
        module.zero_grad()

    calls = {
        "train": lambda: _train(module, optimizer, some(500)),
        "grow": lambda: _train(module, optimizer, some(1500).repeat(2)),
        "lookup": lookup,
        "insert": lambda: table.insert(ids := some(20), torch.rand(len(ids), 3)),
        "delete": lambda: table.delete(some(200)),
        "evict": lambda: (table.update_step(), table.evict()),
        "compact": table.compact,
        "clear": table.clear,
        "load": lambda: table.set_extra_state(table.get_extra_state()),
        "convert": lambda: module.to(torch.bfloat16).to(torch.float32),
        "nothing": lambda: None,
    }
    names = list(calls)
    odds = torch.tensor([6, 2, 3, 3, 3, 4, 2, 0.3, 0.5, 0.3, 1])
    for _ in range(60):
        calls[names[int(torch.multinomial(odds, 1, generator=generator))]]()
        often.follow()
        often.check()
        if torch.rand((), generator=generator) < 0.2:
            seldom.follow()
            seldom.check()


def test_only_what_changed_is_taken():
    """A step of some rows makes those rows change, and no others."""
    module = DynamicEmbedding(4, name="t")
    optimizer = SparseAdam([module.table], lr=0.1)
    _train(module, optimizer, torch.arange(5000))
    mark, other = ChangeMark(module.table), ChangeMark(module.table)
    assert mark.take().is_whole
    _train(module, optimizer, torch.tensor([7, 9, 7, 4999]))
    changes = mark.take()
    assert not changes.is_whole
    assert changes.ids.tolist() == [7, 9, 4999]
    assert not mark.take().ids.numel()
    assert other.take().ids.numel() == 5000
    _train(module, optimizer, torch.tensor([8, 6000]))
    assert mark.take().ids.tolist() == other.take().ids.tolist() == [8, 6000]


def test_interpreted_updates_are_marked_too(backend):
    module = DynamicEmbedding(4, name="t")
    optimizer = SparseSGD([module.table], lr=0.1)
    mark = ChangeMark(module.table)
    _train(module, optimizer, torch.arange(40))
    assert mark.take().ids.numel() == 40
    _train(module, optimizer, torch.tensor([3, 5]))
    assert mark.take().ids.tolist() == [3, 5]


def test_what_nobody_got_is_put_back():
    """Changes that are put back come again, with those since."""
    table = HashTable(2, initializer=Constant(1.0))
    mark = ChangeMark(table)
    mark.put_back(mark.take())
    table.insert(torch.arange(5), torch.ones(5, 2))
    assert mark.take().is_whole
    table.insert(torch.tensor([1]), torch.zeros(1, 2))
    table.delete(torch.tensor([0, 2]))
    mark.put_back(mark.take())
    table.insert(torch.tensor([2, 3]), torch.zeros(2, 2))
    changes = mark.take()
    assert not changes.is_whole
    assert sorted(changes.ids.tolist()) == [1, 2, 3]
    assert changes.removed.tolist() == [0]


def test_an_interrupted_take_loses_nothing(monkeypatch):
    table = HashTable(2)
    mark = ChangeMark(table)
    table.insert(torch.arange(5), torch.ones(5, 2))
    mark.take()
    table.delete(torch.tensor([3]))

    take_removed = RowChanges.take_removed

    def interrupt(self, bit):
        take_removed(self, bit)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RowChanges, "take_removed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mark.take()
    changes = mark.take()
    assert changes.is_whole
    assert changes.ids.tolist() == [0, 1, 2, 4]


def test_a_closed_mark_costs_nothing():
    """The last mark takes the rows' bytes with it; a copy of the table never has them."""
    table = HashTable(2)
    table.insert(torch.arange(5), torch.ones(5, 2))
    before = table.nbytes
    marks = [ChangeMark(table) for _ in range(8)]
    assert table.nbytes > before
    with pytest.raises(RuntimeError, match="8 consumers"):
        ChangeMark(table)
    assert copy.deepcopy(table).nbytes == before
    for mark in marks:
        mark.close()
    assert table.nbytes == before
    assert table.storage.changes is None
    ChangeMark(table).close()


def test_an_empty_table_has_no_changes():
    table = HashTable(2)
    mark = ChangeMark(table, state=True)
    assert mark.take().is_whole
    changes = mark.take()
    assert (changes.is_whole, changes.ids.numel(), changes.removed.numel()) == (False, 0, 0)


def test_rows_that_start_anew_have_changed(backend):
    """Who follows a table gets the new initial rows of ``reinitialize``, all but those evicted."""
    module = DynamicEmbedding(3, name="t")
    follower = _Follower(module.table)
    module(torch.tensor([7, -1, 8]))
    module.table.delete(torch.tensor([8]))
    follower.follow()
    module.table.reinitialize()
    changes = follower.follow()
    assert changes.ids.tolist() == [7, -1]
    assert not changes.is_whole
    follower.check()
    assert follower.follow().ids.numel() == 0
