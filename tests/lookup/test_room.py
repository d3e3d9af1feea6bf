"""MaxRows(when="lookup"): lookups make room before they insert, and nothing in use goes."""

import copy
import io
from collections import Counter

import pytest
import torch

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.admission import MinCount
from recis_lightning.eviction import AnyOf, DistanceLFU, GlobalStepFilter, MaxRows
from recis_lightning.initializers import Uniform
from recis_lightning.ops import row_init
from recis_lightning.optim import SparseAdam, SparseSGD
from tests.helpers.eviction_tables import ids, left
from tests.helpers.limited_tables import (
    LIMITS,
    Loop,
    Truth,
    batches_of,
    expected_weights,
    ranks_train,
)

# ---- exact, against a dict


@pytest.mark.parametrize("limit", LIMITS, ids=repr)
def test_rows_and_weights_are_those_of_a_dict(backend, limit):
    """Never more than n rows; an id that returns starts anew, from its initial row."""
    loop, truth = Loop(limit), Truth(limit)
    for batch in batches_of(5 if backend == "triton" else 9):
        loop.train(batch)
        truth.train(batch)
        assert left(loop.module) == set(truth.rows)
        assert len(loop.table) <= limit.max_rows
    assert loop.table.statistics().evicted == truth.num_evicted > 0
    known = torch.tensor(sorted(truth.rows))
    torch.testing.assert_close(loop.table.embeddings(known), expected_weights(truth, known))


def test_rows_of_memory_do_not_grow(backend):
    """New ids get the rows that were freed for them."""
    loop = Loop(MaxRows(8, when="lookup"))
    for batch in batches_of(6):
        loop.train(batch)
    assert loop.table.storage.rows.num_rows == 8


def test_only_ids_that_are_admitted_need_room():
    """Those that the policy rejects evict nothing."""
    limit, truth = MaxRows(6, when="lookup"), Truth(MaxRows(6, when="lookup"), min_count=2)
    loop = Loop(limit, admission=MinCount(2))
    for batch in batches_of(10):
        loop.train(batch)
        truth.train(batch)
        assert left(loop.module) == set(truth.rows)
    assert truth.num_evicted > 0


def test_a_run_that_is_resumed_goes_on_as_it_would_have():
    """By a state dict, a deep copy and a pickle."""
    limit = MaxRows(8, by="count", half_life=3, when="lookup")
    batches = batches_of(12)
    loop = Loop(limit)
    for batch in batches[:6]:
        loop.train(batch)
    state, pickled = io.BytesIO(), io.BytesIO()
    torch.save(loop.module.state_dict(), state)
    torch.save(loop.module, pickled)
    twins = [Loop(limit), Loop(limit, module=copy.deepcopy(loop.module))]
    twins[0].module.load_state_dict(torch.load(io.BytesIO(state.getvalue()), weights_only=True))
    again = torch.load(io.BytesIO(pickled.getvalue()), weights_only=False)
    twins.append(Loop(limit, module=again))
    for batch in batches[6:]:
        loop.train(batch)
        for twin in twins:
            twin.train(batch)
            assert left(twin.module) == left(loop.module)
    known = loop.table.ids()
    for twin in twins:
        assert torch.equal(twin.table.embeddings(known), loop.table.embeddings(known))


@pytest.mark.parametrize("limit", [LIMITS[0], LIMITS[1], LIMITS[-1]], ids=repr)
def test_two_ranks_keep_what_one_would(ranks, limit):
    """The n rows are those of all shards, whatever the number of ranks."""
    (alone,) = ranks.run(1, ranks_train, limit)
    both = ranks.run(2, ranks_train, limit)
    shards = [set(part) for part, _ in both]
    assert shards[0] | shards[1] == set(alone[0])
    assert len(shards[0]) + len(shards[1]) == len(alone[0])
    assert all(shards)
    weights = {i: row for part in both for i, row in zip(*part, strict=True)}
    for i, row in zip(*alone, strict=True):
        torch.testing.assert_close(torch.tensor(weights[i]), torch.tensor(row))


# ---- what stays


def some(numbers):
    return torch.tensor(numbers, dtype=torch.int64)


def test_rows_stay_until_their_gradients_are_used(backend):
    """Of lookups whose backward pass is to come, and of gradients that wait for the optimizer."""
    loop = Loop(MaxRows(4, when="lookup"))
    first = loop.module(ids(1, 2))
    second = loop.module(ids(3, 4))
    with pytest.raises(RuntimeError, match=r"table 't': MaxRows\(n=4.*no room for 1 new ids: of 4"):
        loop.module(ids(5))
    assert left(loop.module) == {1, 2, 3, 4}
    first.sum().backward()
    with pytest.raises(RuntimeError, match="no room for 1 new ids"):
        loop.module(ids(5))
    loop.step()
    third = loop.module(ids(5))  # second's are still to come
    assert left(loop.module) == {2, 3, 4, 5}
    (second.sum() + third.sum()).backward()
    loop.step()
    initial = DynamicEmbedding(3, initializer=Uniform(-1, 1), name="t")(ids(2, 3, 4, 5)).detach()
    torch.testing.assert_close(loop.table.embeddings(ids(2, 3, 4, 5)), initial - 0.5)
    del second, third
    assert loop.module(ids(6, 7, 8, 9)).shape == (4, 3)


def test_a_second_backward_pass_finds_its_rows_or_says_so():
    """A graph that is kept after its gradients were used keeps no rows."""
    loop = Loop(MaxRows(2, when="lookup"))
    kept = loop.module(ids(1, 2))
    kept.sum().backward(retain_graph=True)
    kept.sum().backward(retain_graph=True)
    loop.step()
    kept.sum().backward(retain_graph=True)
    loop.step()
    loop.module(ids(3)).sum().backward()
    with pytest.raises(RuntimeError, match="table 't' lost rows between a lookup and its backward"):
        kept.sum().backward()
    loop.step()
    assert left(loop.module) == {2, 3}


def test_pinned_ids_stay_and_too_many_ids_are_an_error():
    """A batch of more distinct ids than rows leaves the rows as they were."""
    loop = Loop(MaxRows(3, when="lookup"))
    loop.table.pin(ids(1))
    loop.train([1, 2, 3])
    with pytest.raises(RuntimeError, match="no room for 4 new ids: of 3 rows 2 may go"):
        loop.module(ids(4, 5, 6, 7))
    assert left(loop.module) == {1, 2, 3}
    loop.train([4, 5])
    assert left(loop.module) == {1, 4, 5}
    with torch.no_grad():
        loop.module(ids(6))
    assert left(loop.module) == {1, 5, 6}
    loop.module.eval()(ids(8, 9))
    assert left(loop.module) == {1, 5, 6}


def test_features_that_share_a_table_keep_each_others_ids(backend):
    """A lookup of an engine is one; its limited tables make room, others do not."""
    options = {
        "item": EmbeddingOption(2, table="item", eviction=MaxRows(4, when="lookup")),
        "seen": EmbeddingOption(2, table="item", eviction=MaxRows(4, when="lookup"), mode="sum"),
        "user": EmbeddingOption(2),
    }
    engine = EmbeddingEngine(options)
    sparse = SparseSGD(hash_tables(engine), lr=0.1)

    def train(item, seen, user):
        found = engine({"item": some(item), "seen": some(seen).view(-1, 1), "user": some(user)})
        sum(part.sum() for part in found.values()).backward()
        sparse.step()
        sparse.zero_grad()

    train([1, 2], [3, 3], [1, 2])
    train([4, 4], [1, 5], [3, 4])
    train([], [], [])
    assert set(engine.tables["item"].ids().tolist()) == {1, 3, 4, 5}  # 2 was the lowest unseen
    assert len(engine.tables["user"]) == 4


def test_evict_works_as_ever_beside_it():
    """With a lower limit there, lookups need to make room less often."""
    policy = AnyOf([MaxRows(3), MaxRows(6, when="lookup")])
    loop = Loop(policy)
    loop.train([1, 2, 3, 4, 5])
    assert loop.table.evict() == 2
    loop.train([6, 7, 8])
    assert left(loop.module) == {3, 4, 5, 6, 7, 8}
    loop.train([9])
    assert left(loop.module) == {4, 5, 6, 7, 8, 9}
    loop.table.eviction = AnyOf([MaxRows(4, when="lookup"), GlobalStepFilter(100)])
    loop.train([10])
    assert left(loop.module) == {7, 8, 9, 10}
    loop.table.eviction = None
    loop.train([11, 12])
    assert len(loop.table) == 6


def test_listeners_and_counts_are_told():
    """As by an eviction between lookups; a listener that raises keeps all rows."""
    loop = Loop(MaxRows(2, when="lookup"))
    loop.table.track_readmissions()
    told = []
    loop.table.on_evict(told.append, with_rows=True)
    loop.train([1, 2])
    loop.train([3])
    assert [(one.table, one.ids.tolist(), one.weights.shape) for one in told] == [
        ("t", [1], (1, 3))
    ]
    loop.train([1])
    assert loop.table.statistics().readmitted == 1

    def refuse(_):
        raise ValueError("keep them")

    loop.table.on_evict(refuse)
    with pytest.raises(ValueError, match="keep them"):
        loop.module(ids(9))
    assert left(loop.module) == {1, 3}


@pytest.mark.parametrize("where", ["init_rows_", "touch"])
def test_a_lookup_that_fails_leaves_all_rows(monkeypatch, backend, where):
    """Weights, optimizer state and columns of evicted rows are back, and no new id is there."""
    loop = Loop(MaxRows(4, by="count", when="lookup"), optimizer=SparseAdam)
    loop.table.track_readmissions()
    loop.train([1, 2, 2])
    loop.train([3, 4, 4])
    before = loop.table.get_extra_state()

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    if where == "init_rows_":
        real = row_init.init_rows_
        monkeypatch.setattr(row_init, "init_rows_", lambda *a: (real(*a), fail()))
    else:
        monkeypatch.setattr(type(loop.table.storage), "reserve_rows", fail)
        monkeypatch.setattr(type(loop.table.storage), "guaranteed_free", lambda self: 0)
    with pytest.raises(KeyboardInterrupt):
        loop.module(ids(5, 6))
    monkeypatch.undo()
    after = loop.table.get_extra_state()
    assert after["ids"].tolist() == before["ids"].tolist()
    assert torch.equal(after["weights"], before["weights"])
    for name, slot in before["slots"].items():
        assert torch.equal(after["slots"][name], slot)
    assert torch.equal(after["counts"], before["counts"])
    assert torch.equal(after["last_seen"], before["last_seen"])
    assert loop.table.statistics().evicted == 0
    loop.train([5, 6])
    assert left(loop.module) == {2, 4, 5, 6}


def test_the_truth_is_one():
    """The dict keeps n rows, and the most frequent of those that may go."""
    truth = Truth(DistanceLFU(2, when="lookup"))
    for batch in ([1, 1, 1], [2], [3]):
        truth.train(batch)
    assert set(truth.rows) == {1, 3}
    assert Counter(truth.rows)[1]


def test_a_limit_that_is_set_later_holds():
    module = DynamicEmbedding(4, name="t", eviction=GlobalStepFilter(5))
    module(torch.arange(8))
    module.table.eviction = MaxRows(10, when="lookup")
    module(torch.arange(100, 106))
    assert len(module.table) <= 10


def test_lookups_before_a_limit_are_void():
    """Nobody noted their rows: those might be other ids' by the backward pass."""
    module = DynamicEmbedding(1, name="t", eviction=MaxRows(3))
    SparseSGD(hash_tables(module), lr=1.0)
    out = module(torch.tensor([1, 2, 3]))
    module.table.eviction = MaxRows(3, when="lookup")
    module(torch.tensor([4, 5, 6]))
    with pytest.raises(RuntimeError, match="table 't' lost rows between a lookup and its backward"):
        out.sum().backward()
