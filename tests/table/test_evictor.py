"""What evict() spares, tells beforehand and tells listeners, whatever the policy."""

import copy

import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable, hash_tables
from recis_lightning.eviction import Eviction, GlobalStepFilter, MaxRows
from recis_lightning.optim import SparseAdam, SparseSGD
from recis_lightning.table.evictor import CompactionSchedule
from recis_lightning.table.storage import Storage
from tests.helpers.eviction_tables import after_steps, ids, left
from tests.helpers.sample_tables import LOW

# ---- when memory goes back


def test_tables_that_refill_keep_their_memory(monkeypatch):
    """Each eviction finds half of the rows not needed, and the next lookup takes them again."""
    compactions = []
    compact = Storage.compact
    monkeypatch.setattr(Storage, "compact", lambda self: (compactions.append(1), compact(self)))

    class Old(Eviction):
        columns = frozenset({"ids"})
        first = 0

        def expired(self, rows):
            return rows.ids < self.first

    table, old = HashTable(16, name="t"), Old()
    for step in range(60):
        old.first = 60_000 * step
        table.insert(torch.arange(80_000) + old.first - 60_000, torch.zeros(80_000, 16))
        assert table.evict(old) == 60_000
    assert 5 <= len(compactions) <= 9
    assert len(table) == 20_000


def test_pauses_between_compactions():
    schedule = CompactionSchedule()
    assert not schedule.is_due(needed=3, held=5)
    found = [schedule.is_due(needed=2, held=4) for _ in range(8)]
    assert found == [True, False, True, False, False, False, True, False]
    assert schedule.is_due(needed=1, held=8)
    for _ in range(20):
        assert not schedule.is_due(needed=3, held=4)
    assert schedule.is_due(needed=2, held=4)
    assert schedule.is_due(needed=2, held=4)  # the first that follows is taken at once


# ---- who stays whatever a policy says


def test_pinned_ids_stay(backend):
    """Known or not yet; they count among the rows there may be, and delete still removes them."""
    module = after_steps(MaxRows(2), [1, 2, 3], [4], [5])
    table = module.table
    table.pin(ids(1, 2, 77))
    assert table.pinned.tolist() == [1, 2, 77]
    assert table.evict() == 3
    assert left(module) == {1, 2}
    module(ids(77, 78))
    assert table.evict() == 1
    assert left(module) == {1, 2, 77}
    table.unpin(ids(1, 1000))
    assert table.evict() == 1
    assert left(module) == {2, 77}
    assert table.delete(ids(2)) == 1
    module(ids(2, 3))
    assert table.evict() == 1
    assert left(module) == {2, 77}
    table.clear()
    assert table.pinned.tolist() == [2, 77]


@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_pins_are_saved(how):
    """A state that knows of no pins leaves those there are."""
    module = after_steps(MaxRows(0), [1, 2, 3])
    old = module.state_dict()
    module.table.pin(ids(3, LOW))
    twin = DynamicEmbedding(2, eviction=MaxRows(0), name="t")
    if how == "file":
        twin.load_state_dict(module.state_dict())
    else:
        twin = copy.deepcopy(module)
    assert twin.table.pinned.tolist() == [LOW, 3]
    twin.table.evict()
    assert left(twin) == {3}
    twin.load_state_dict(old)
    assert twin.table.pinned.tolist() == [LOW, 3]


def test_rows_that_wait_for_the_optimizer_stay(backend):
    """MaxRows takes others in their place, as far as there are any."""
    module = after_steps(MaxRows(1), [1], [2], [3])
    sparse = SparseSGD(hash_tables(module), lr=1.0)
    module.table.update_step()
    module(ids(1)).sum().backward()
    module.table.storage.columns["last_seen"].zero_()
    assert module.table.evict() == 2
    assert left(module) == {1}
    module(ids(4))
    assert module.table.evict(MaxRows(0)) == 1
    sparse.step()
    assert module.table.evict(MaxRows(0)) == 1


# ---- what evict tells


def test_a_dry_run_says_what_would_go_and_changes_nothing():
    """The same report, but for what was given back."""
    module = after_steps(MaxRows(1), [1, 2, 3])
    called = []
    module.table.on_evict(called.append)
    before = module.table.get_extra_state()
    wished = module.table.evict(dry_run=True)
    assert torch.equal(module.table.get_extra_state()["ids"], before["ids"])
    assert not called
    done = module.table.evict()
    assert wished == done == 2
    assert wished.by_policy == done.by_policy == {"MaxRows(n=1, by='last_seen')": 2}
    assert wished.bytes_freed == done.bytes_freed == 2 * (4 * 2 + 8)
    assert (wished.dry_run, done.dry_run) == (True, False)
    assert "2 rows" in repr(done)
    assert len(called) == 1


def test_listeners_get_what_goes():
    """Ids always, weights and optimizer state if asked; until they are removed."""
    module = DynamicEmbedding(2, eviction=GlobalStepFilter(1), name="t")
    sparse = SparseAdam(hash_tables(module), lr=0.1)
    module(ids(1, LOW)).sum().backward()
    sparse.step()
    before = module.table.get_extra_state()
    plain, rich = [], []
    handle = module.table.on_evict(plain.append)
    module.table.on_evict(rich.append, with_rows=True)
    module.table.update_step(2)
    module(ids(5))
    module.table.evict()
    assert plain[0].table == "t"
    assert plain[0].ids.tolist() == [1, LOW]
    assert plain[0].weights is None
    assert torch.equal(rich[0].weights, before["weights"])
    assert torch.equal(rich[0].slots["exp_avg"], before["slots"]["exp_avg"])
    handle.remove()
    module.table.update_step(2)
    module.table.evict()
    assert len(plain) == 1
    assert rich[1].ids.tolist() == [5]
    assert len(copy.deepcopy(module).table.evictor._listeners) == 0


def test_a_listener_that_fails_keeps_the_rows():
    """What could not be archived is not thrown away."""
    module = after_steps(MaxRows(0), [1, 2])

    def fail(evicted):
        raise OSError("disk full")

    handle = module.table.on_evict(fail)
    with pytest.raises(OSError, match="disk full"):
        module.table.evict()
    assert left(module) == {1, 2}
    assert module.table.statistics().evicted == 0
    handle.remove()
    module.table.on_evict(lambda evicted: module.table.delete(evicted.ids[:1]))
    with pytest.raises(RuntimeError, match="an on_evict callback changed table 't'"):
        module.table.evict()


def test_a_compaction_that_had_to_wait_is_made_up_for():
    table = HashTable(16, name="t", eviction=MaxRows(100))
    table.insert(torch.arange(60_000), torch.zeros(60_000, 16))
    for _ in range(3):  # the next one waits
        table.evictor._compactions.is_due(needed=1, held=4)
    table.eviction = MaxRows(20_000)
    assert table.evict() == 40_000
    held = table.nbytes
    assert [int(table.evict()) for _ in range(3)] == [0, 0, 0]
    assert table.nbytes < held
