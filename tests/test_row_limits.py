"""Policies that keep a number of rows: decay of counts, DistanceLFU, and what they refuse."""

import copy

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.eviction import AllOf, AnyOf, DistanceLFU, GlobalStepFilter, MaxRows
from tests.helpers.eviction_tables import after_steps, ids, left
from tests.helpers.sample_tables import HIGH, LOW


def counts_of(module, *numbers):
    table = module.table
    return table.storage.columns["counts"][table._find(ids(*numbers))].tolist()


# ---- decay of counts


def test_counts_are_halved_at_multiples_of_the_half_life(backend):
    """Rounding down, whatever the number of steps at once; what is seen later counts whole."""
    module = DynamicEmbedding(2, eviction=MaxRows(1, by="count", half_life=4), name="t")
    module(ids(*[1] * 13, *[2] * 5, 3))
    for _ in range(3):
        module.table.update_step()
    assert counts_of(module, 1, 2, 3) == [13, 5, 1]
    module.table.update_step()
    assert counts_of(module, 1, 2, 3) == [6, 2, 0]
    module(ids(3, 3, 3))
    assert module.table.evict() == 2
    assert left(module) == {1}
    module.table.update_step(7)  # to step 11: one multiple
    assert counts_of(module, 1) == [3]
    module.table.update_step(1 + 64 * 4)
    assert counts_of(module, 1) == [0]
    assert module.table.step == 12 + 64 * 4


def test_an_id_of_long_ago_goes_before_one_of_now():
    """Without decay the one that was frequent once stays for good."""
    for half_life, stays in ((None, 1), (2, 2)):
        policy = MaxRows(1, by="count", half_life=half_life)
        module = after_steps(policy, [1] * 10, [2], [2], [2], [2], [2], [2])
        module.table.evict()
        assert left(module) == {stays}


def test_decay_is_saved_and_no_load_decays():
    """Counts are those of the saved step; the hook's steps decay them further."""
    module = DynamicEmbedding(2, eviction=AnyOf([MaxRows(9, by="count", half_life=3)]), name="t")
    hook = HashTableFilterHook(None)
    module(ids(1, 1, 1, 1, 1, 1, 1, 1))
    for step in range(4):
        hook.after_step(None, step)
    assert counts_of(module, 1) == [4]
    state, copied = module.state_dict(), copy.deepcopy(module)
    twin = DynamicEmbedding(2, eviction=MaxRows(9, by="count", half_life=3), name="t")
    twin.load_state_dict(state)
    for one in (twin, copied):
        assert one.table.step == 4
        assert counts_of(one, 1) == [4]
        one.table.update_step(2)
        assert counts_of(one, 1) == [2]


def test_a_step_that_is_no_int64_changes_nothing():
    """Neither step nor counts."""
    module = DynamicEmbedding(2, eviction=MaxRows(9, by="count", half_life=3), name="t")
    module(ids(1, 1))
    with pytest.raises(ValueError, match=r"n: expected an int that keeps the step below 2\*\*63"):
        module.table.update_step(2**63)
    assert module.table.step == 0
    assert counts_of(module, 1) == [2]


# ---- DistanceLFU


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 1.3])
def test_scores_are_those_of_torchrec(backend, exponent):
    """Counts over a power of the distance; compared with sorting in NumPy, ties and all."""
    generator = np.random.default_rng(3)
    table = HashTable(1, eviction=DistanceLFU(0, exponent), name="t")
    many = np.unique(generator.integers(LOW, HIGH, 200))
    table.insert(torch.from_numpy(many), torch.zeros(len(many), 1))
    counts, steps = generator.integers(0, 9, len(many)), generator.integers(0, 30, len(many))
    rows = table._find(torch.from_numpy(many))
    table.storage.columns["counts"][rows] = torch.from_numpy(counts)
    table.storage.columns["last_seen"][rows] = torch.from_numpy(steps)
    table.update_step(29)
    scores = counts / np.power((29 - steps + 1).astype(float), exponent)
    order = np.lexsort([many, steps, scores])
    for n in (150, 149, 3):
        table.evict(DistanceLFU(n, exponent))
        assert set(table.ids().tolist()) == set(many[order[-n:]].tolist())


def test_distance_lfu_composes_and_reports():
    """As any other policy does."""
    module = after_steps(AnyOf([GlobalStepFilter(2), DistanceLFU(2)]), [1], [2], [3, 3, 4, 5])
    report = module.table.evict(dry_run=True)
    assert report.by_policy == {
        "GlobalStepFilter(filter_step=2)": 1,
        "DistanceLFU(n=2, decay_exponent=1.0, when='evict')": 2,
    }
    assert module.table.evict() == 3
    assert left(module) == {3, 5}


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MaxRows(2, when="always"), ValueError, "when: expected 'evict' or 'lookup', got"),
        (lambda: MaxRows(0, when="lookup"), ValueError, "n: expected an int >= 1, got 0"),
        (lambda: DistanceLFU(0, when="lookup"), ValueError, "n: expected an int >= 1, got 0"),
        (lambda: MaxRows(2, half_life=3), ValueError, "half_life: only by='count' takes one"),
        (lambda: MaxRows(2, "count", 0), ValueError, "half_life: expected an int >= 1 or None"),
        (lambda: MaxRows(2, "count", 2.0), TypeError, "half_life: expected an int >= 1 or None"),
        (lambda: DistanceLFU(2, -1.0), ValueError, "decay_exponent: expected a number >= 0.0"),
        (lambda: DistanceLFU(2, float("nan")), ValueError, "decay_exponent: expected a number"),
        (
            lambda: AnyOf([MaxRows(2, when="lookup"), DistanceLFU(3, when="lookup")]),
            ValueError,
            "policies: expected one with when='lookup' at most",
        ),
        (
            lambda: AllOf([GlobalStepFilter(2), AnyOf([MaxRows(2, when="lookup")])]),
            ValueError,
            "policies: a lookup cannot ask others",
        ),
        (
            lambda: AnyOf([MaxRows(2, "count", 5), MaxRows(1, "count", 6)]),
            ValueError,
            "policies: expected one half_life",
        ),
    ],
)
def test_wrong_arguments(make, error, words):
    """An error names the argument, its value and the expected one."""
    with pytest.raises(error, match=words):
        make()


def test_limits_are_values_and_say_what_they_are():
    """Features that share a table compare their policies; reports name them."""
    assert MaxRows(2, when="lookup") == MaxRows(2, when="lookup") != MaxRows(2)
    assert repr(MaxRows(2)) == "MaxRows(n=2, by='last_seen')"
    assert repr(MaxRows(2, "count", 7, "lookup")) == (
        "MaxRows(n=2, by='count', half_life=7, when='lookup')"
    )
