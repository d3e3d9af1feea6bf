"""sample() and sampling_probabilities(): ids by their counts or uniformly, with replacement."""

import copy
import threading

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.eviction import DistanceLFU, MaxRows
from tests.helpers import rank_sampling
from tests.helpers.eviction_tables import ids
from tests.helpers.sample_tables import HIGH, LOW

OCCURRENCES = {7: 1, -3: 2, LOW: 5, HIGH: 12}
TOTAL = 20


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def counting(policy=None):
    module = DynamicEmbedding(2, eviction=policy or MaxRows(99, by="count"), name="t")
    module(ids(*(id for id, count in OCCURRENCES.items() for _ in range(count)))).detach()
    return module.table


def chi_square(sample, weights):
    """Return Pearson's statistic of a sample's ids against the truth."""
    found = dict(zip(*(x.tolist() for x in sample.ids.unique(return_counts=True)), strict=True))
    assert set(found) <= {id for id, weight in weights.items() if weight}
    total, n = sum(weights.values()), sample.ids.numel()
    expected = {id: n * weight / total for id, weight in weights.items() if weight}
    return sum((found.get(id, 0) - count) ** 2 / count for id, count in expected.items())


@pytest.mark.parametrize("policy", [None, DistanceLFU(99)])
def test_ids_are_drawn_in_proportion_to_their_counts(backend, policy):
    table = counting(policy)
    sample = table.sample(20_000, generator=generator())
    assert (sample.ids.dtype, sample.probabilities.dtype) == (torch.int64, torch.float64)
    assert chi_square(sample, OCCURRENCES) < 16.3  # 3 degrees of freedom: p = 0.001
    shares = {id: count / TOTAL for id, count in OCCURRENCES.items()}
    assert sample.probabilities.tolist() == [shares[id] for id in sample.ids.tolist()]
    asked = table.sampling_probabilities(ids(*OCCURRENCES, 99))
    assert asked.tolist() == [*shares.values(), 0.0]


def test_all_ids_alike_are_drawn_uniformly():
    table = HashTable(2, name="t")  # without any policy
    table.insert(torch.arange(-20, 30), torch.zeros(50, 2))
    sample = table.sample(20_000, by="uniform", generator=generator())
    assert chi_square(sample, dict.fromkeys(range(-20, 30), 1)) < 85.4  # 49 degrees: p = 0.001
    assert sample.probabilities.eq(1 / 50).all()
    assert table.sampling_probabilities(ids(-20, 30), by="uniform").tolist() == [1 / 50, 0]


def test_draws_are_exact_functions_of_the_generators_numbers():
    """By id, ascending: a number falls to the id at which the running sum of counts passes it."""
    table, places = counting(), []
    for id in sorted(OCCURRENCES):
        places += [id] * OCCURRENCES[id]
    numbers = torch.randint(2**62, (1000,), generator=generator(3)) % TOTAL
    wanted = [places[number] for number in numbers.tolist()]
    assert table.sample(1000, generator=generator(3)).ids.tolist() == wanted
    torch.manual_seed(3)
    assert table.sample(1000).ids.tolist() == wanted
    source = generator(3)
    parts = [table.sample(n, generator=source).ids for n in (400, 0, 600)]
    assert torch.cat(parts).tolist() == wanted


def test_neither_history_nor_copies_change_the_draws():
    """Other row numbers, a deep copy, a loaded state, a compaction."""
    table = counting()
    wanted = table.sample(500, generator=generator())
    copied = copy.deepcopy(table)
    loaded = HashTable(2, eviction=MaxRows(99, by="count"), name="t")
    loaded.set_extra_state(table.get_extra_state())
    other = DynamicEmbedding(2, eviction=MaxRows(99, by="count"), name="t")
    other(torch.arange(1000)).detach()
    other.table.delete(torch.arange(1000))
    for id in reversed(OCCURRENCES):
        other(ids(*([id] * OCCURRENCES[id]))).detach()
    other.table.compact()
    for same in (copied, loaded, other.table):
        found = same.sample(500, generator=generator())
        assert all(map(torch.equal, found, wanted))
    copied.delete(ids(HIGH))
    assert HIGH not in copied.sample(500, generator=generator()).ids
    assert all(map(torch.equal, table.sample(500, generator=generator()), wanted))


def test_evicted_and_deleted_ids_are_never_drawn(backend):
    table = counting()
    assert table.evict(MaxRows(2, by="count")) == 2
    assert set(table.sample(2000, generator=generator()).ids.tolist()) == {LOW, HIGH}
    for by, weights in (("count", {LOW: 5, HIGH: 12}), ("uniform", {LOW: 1, HIGH: 1})):
        assert chi_square(table.sample(5000, by, generator()), weights) < 10.9
        total = sum(weights.values())
        found = table.sampling_probabilities(ids(LOW, HIGH, 7), by)
        assert found.tolist() == [weights[LOW] / total, weights[HIGH] / total, 0]
    table.delete(ids(HIGH))
    assert table.sample(50).ids.eq(LOW).all()
    table.clear()
    with pytest.raises(RuntimeError, match="table 't' has no rows to sample"):
        table.sample(1)
    assert table.sampling_probabilities(ids(LOW)).tolist() == [0]


def test_none_are_drawn_of_any_table():
    for table in (HashTable(2, eviction=MaxRows(9, by="count")), counting()):
        sample = table.sample(0)
        assert [(x.dtype, x.shape) for x in sample] == [
            (torch.int64, (0,)),
            (torch.float64, (0,)),
        ]
    with pytest.raises(RuntimeError, match="no rows"):
        HashTable(2).sample(1, by="uniform")


def test_probabilities_keep_the_shape_of_ids_and_take_int32():
    table = counting()
    asked = torch.tensor([[7, -3, 7], [0, -1, -3]], dtype=torch.int32)
    wanted = [[1 / 20, 2 / 20, 1 / 20], [0, 0, 2 / 20]]
    assert table.sampling_probabilities(asked).tolist() == wanted
    assert table.sampling_probabilities(asked[:, ::2]).tolist() == [[0.05, 0.05], [0, 0.1]]
    assert table.sampling_probabilities(torch.tensor(7)).item() == 1 / 20
    assert table.sampling_probabilities(asked[:0]).shape == (0, 3)


def test_large_counts_are_exact():
    table = counting()
    rows = table._find(ids(7, HIGH))
    table.storage.columns["counts"][rows] = torch.tensor([2**50, 3 * 2**50])
    sample = table.sample(4000, generator=generator())
    weights = {**OCCURRENCES, 7: 2**50, HIGH: 3 * 2**50}
    both = {id: weights[id] for id in (7, HIGH)}
    assert chi_square(sample, both) < 10.9
    total = sum(weights.values())
    assert {weights[id] / total for id in both} == set(sample.probabilities.tolist())


def test_halved_counts_draw_as_they_are_now():
    module = DynamicEmbedding(2, eviction=MaxRows(9, by="count", half_life=1), name="t")
    module(ids(1, 2, 2)).detach()
    module.table.update_step()
    assert module.table.sample(50).ids.eq(2).all()
    module.table.update_step()
    with pytest.raises(RuntimeError, match="no id has a count"):
        module.table.sample(1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1,), ValueError, "n: expected an int >= 0"),
        ((1.0,), TypeError, "n: expected an int"),
        ((True,), TypeError, "n: expected an int"),
        ((1, "counts"), ValueError, "by: expected 'count' or 'uniform', got 'counts'"),
        ((1, "count", 7), TypeError, "generator: expected a torch.Generator or None, got 7"),
    ],
)
def test_wrong_arguments_are_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        counting().sample(*arguments)


def test_a_table_without_counts_names_the_policy_that_keeps_them():
    for policy in (None, MaxRows(9)):
        table = HashTable(2, eviction=policy, name="item")
        table.insert(ids(1), torch.zeros(1, 2))
        for call in (lambda t=table: t.sample(0), lambda t=table: t.sampling_probabilities(ids(1))):
            with pytest.raises(RuntimeError, match=r"'item' keeps no counts; .*MaxRows\(n=\.\.\."):
                call()


def test_threads_that_train_and_draw_see_whole_tables():
    module = DynamicEmbedding(2, eviction=MaxRows(300, by="count"), name="t")
    module(torch.arange(10)).detach()
    failed, done = [], threading.Event()

    def draw():
        while not done.is_set():
            try:
                sample = module.table.sample(64)
                assert sample.ids.min() >= 0
                assert sample.probabilities.min() > 0
            except BaseException as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for step in range(12):
            module(torch.arange(step * 50, step * 50 + 100)).detach()
            module.table.evict()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failed


def test_each_rank_draws_from_its_shard_and_probabilities_are_of_all(ranks):
    [(_, _, wanted)] = ranks.run(1, rank_sampling.draw)
    for world_size in (2, 4):
        answers = ranks.run(world_size, rank_sampling.draw)
        seen = [set(drawn) for drawn, _, _ in answers]
        assert sum(map(len, seen)) == len(set.union(*seen)) > 30
        for drawn, shard, found in answers:
            assert set(drawn) <= set(shard)
            np.testing.assert_array_equal(found, wanted[: len(found)])
