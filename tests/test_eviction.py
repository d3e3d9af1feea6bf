"""Eviction policies on exact small inputs, alone and composed, and the reports of evict()."""

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable, hash_tables
from recis_lightning.distributed import collectives
from recis_lightning.eviction import (
    AllOf,
    AnyOf,
    Eviction,
    GlobalStepFilter,
    MaxRows,
    MinNorm,
    TimeToLive,
)
from recis_lightning.optim import SparseAdam
from tests.helpers.eviction_tables import after_steps, ids, left
from tests.helpers.sample_tables import HIGH, LOW


class Clock:
    """Clock that only tests advance."""

    def __init__(self, now=1e9):
        self.now = now

    def __call__(self):
        return self.now


# ---- MaxRows


def test_the_least_recently_seen_go_first(backend):
    """Exactly n rows are kept; of rows seen in the same step those with lower ids are evicted."""
    module = after_steps(MaxRows(3), [1, 2, LOW], [3, HIGH], [2, 4])
    report = module.table.evict()
    assert report == 3
    assert left(module) == {2, 4, HIGH}
    assert module.table.evict() == 0
    assert module.table.evict(MaxRows(0)) == 3
    assert left(module) == set()


def test_the_least_frequently_seen_go_first(backend):
    """Rows are ranked by occurrences, then by last-seen step, then by id."""
    module = after_steps(MaxRows(2, by="count"), [1, 1, 1, 5], [2, 3, 3], [4, 6, 6, 6, 6])
    assert module.table.evict(dry_run=True) == 4
    assert left(module) == {1, 2, 3, 4, 5, 6}
    assert module.table.evict(MaxRows(3, by="count")) == 3  # 5, 2 and 4 were seen once
    assert left(module) == {1, 3, 6}
    assert module.table.evict() == 1
    assert left(module) == {1, 6}
    module(ids(7, 3, 8))
    module(ids(8))
    assert module.table.evict() == 3
    assert left(module) == {1, 6}  # a count begins anew with a row


def test_known_ids_are_counted_in_every_lookup(backend):
    """Both paths of a lookup count occurrences of known ids, except padding."""
    module = DynamicEmbedding(2, eviction=MaxRows(1, by="count"), padding_idx=0, name="t")
    for _ in range(4):
        module(ids(3, 3, 0, 5))
    rows = module.table._find(ids(3, 5))
    assert module.table.storage.columns["counts"][rows].tolist() == [8, 4]


def test_one_of_equal_counts_is_chosen_by_step_then_by_id(backend):
    """No two rows have the same count, step and id."""
    module = after_steps(MaxRows(1, by="count"), [9, 3], [5, 7])
    assert module.table.evict(MaxRows(3, by="count")) == 1
    assert left(module) == {5, 7, 9}
    assert module.table.evict() == 2
    assert left(module) == {7}


def test_exactly_n_of_many_are_left_and_they_are_the_right_ones():
    """Compare with sorting: many ties, negative ids, and every digit of the keys in use."""
    generator = torch.Generator().manual_seed(3)
    table = HashTable(1, eviction=MaxRows(0, by="count"), name="t")
    many = torch.randint(LOW, HIGH, (5000,), generator=generator).unique()
    table.insert(many, torch.zeros(len(many), 1))
    rows = table._find(many)
    counts = torch.randint(0, 40, (len(many),), generator=generator)
    counts[::50] <<= 33
    steps = torch.randint(0, 3, (len(many),), generator=generator)
    table.storage.columns["counts"][rows], table.storage.columns["last_seen"][rows] = counts, steps
    order = sorted(zip(counts.tolist(), steps.tolist(), many.tolist(), strict=True))
    for n in (4321, 4320, 100, 1):
        table.evict(MaxRows(n, by="count"))
        assert len(table) == n
        assert set(table.ids().tolist()) == {i for _, _, i in order[-n:]}


class Ranks:
    """Threads that sum tensors as ranks do: each gets the sum once all have called."""

    def __init__(self, count):
        self.barrier, self.parts = threading.Barrier(count), []

    def sum(self, tensor, _):
        self.parts.append(tensor.clone())
        self.barrier.wait(60)
        total = torch.stack(self.parts).sum(0)
        if self.barrier.wait(60) == 0:
            self.parts.clear()
        self.barrier.wait(60)
        return total


@pytest.mark.parametrize("by", ["last_seen", "count"])
@pytest.mark.parametrize("n", [0, 40, 123])
def test_n_rows_are_left_over_all_ranks(monkeypatch, by, n):
    """Three ranks, one of them empty, together evict the rows that one table would evict."""
    ranks = Ranks(3)
    generator = torch.Generator().manual_seed(n)
    batches = (torch.rand(6, 60, generator=generator) ** 2 * 400 - 100).long()
    whole = DynamicEmbedding(2, eviction=MaxRows(n, by), name="t")
    shards = [DynamicEmbedding(2, eviction=MaxRows(n, by), name="t") for _ in range(3)]
    for module, part in [(whole, None), *zip(shards, range(3), strict=True)]:
        for batch in batches:
            module(batch if part is None else batch[batch % 2 == part])
            module.table.update_step()
    whole.table.evict()
    assert len(whole.table) == n
    monkeypatch.setattr(collectives, "sum_over_ranks", ranks.sum)
    with ThreadPoolExecutor(3) as pool:
        reports = [*pool.map(lambda module: module.table.evict(), shards)]
    assert set().union(*map(left, shards)) == left(whole)
    assert sum(reports) == len(batches.unique()) - n


# ---- TimeToLive


def test_rows_live_for_seconds(backend):
    """Age is counted from the last training lookup, by the policy's clock, not from evaluation."""
    clock = Clock()
    module = DynamicEmbedding(2, eviction=TimeToLive(10, clock=clock), name="t")
    module(ids(1, 2))
    clock.now += 6
    module(ids(2, 3))
    module.eval()(ids(1))
    module.train()
    clock.now += 4
    assert module.table.evict() == 0  # 1 is ten seconds old: not older
    clock.now += 0.001
    assert module.table.evict() == 1
    assert left(module) == {2, 3}
    module(ids(1))
    clock.now += 8
    assert module.table.evict() == 2
    assert left(module) == {1}


@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_time_between_runs_does_not_age_rows(how):
    """A saved table holds ages, not times."""
    clock = Clock()
    module = DynamicEmbedding(2, eviction=TimeToLive(10, clock=clock), name="t")
    module(ids(1))
    clock.now += 7
    module(ids(2))
    if how == "file":
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        clock.now += 86_400
        twin = DynamicEmbedding(2, eviction=TimeToLive(10, clock=clock), name="t")
        twin.load_state_dict(torch.load(file, weights_only=True))
    else:
        twin = copy.deepcopy(module)
        clock = twin.table.eviction.clock
    clock.now += 5
    assert twin.table.evict() == 1
    assert left(twin) == {2}


def test_the_usual_clock_is_that_on_the_wall():
    """``time.time`` is the clock of a policy without one of its own."""
    module = DynamicEmbedding(2, eviction=TimeToLive(3600), name="t")
    module(ids(1))
    assert module.table.evict() == 0
    module.table.storage.columns["last_time"] -= 3601 * 10**6
    assert module.table.evict() == 1


# ---- MinNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_small_norm_go(backend, dtype):
    """The L2 norm of the weights is compared; a row at the threshold is kept."""
    module = DynamicEmbedding(2, eviction=MinNorm(5.0), name="t", dtype=dtype)
    SparseAdam(hash_tables(module), lr=0.1)
    weights = torch.tensor([[3.0, 4.0], [3.0, 3.875], [-5.0, 0.0], [0.0, 0.0], [torch.nan, 0]])
    module.table.insert(ids(1, 2, 3, 4, 5), weights)
    report = module.table.evict()
    assert report == 2
    assert left(module) == {1, 3, 5}
    assert not module.table.storage.columns


# ---- composition


def test_any_of_asks_each_of_what_is_left(backend):
    """So a row counts once, and MaxRows evicts only rows that are still too many."""
    policy = AnyOf([GlobalStepFilter(2), MaxRows(3), MinNorm(0.0)])
    module = after_steps(policy, [1, 2], [3, 4], [5, 6])
    report = module.table.evict(dry_run=True)
    assert report == 3
    assert report.by_policy == {
        "GlobalStepFilter(filter_step=2)": 2,
        "MaxRows(n=3, by='last_seen')": 1,
        "MinNorm(threshold=0.0)": 0,
    }
    assert report.dry_run
    assert module.table.evict() == 3
    assert left(module) == {4, 5, 6}


def test_all_of_evicts_what_each_would(backend):
    """The report has the number of rows that each policy evicts by itself."""
    policy = AllOf([GlobalStepFilter(2), MaxRows(5)])
    module = after_steps(policy, [1, 2], [3, 4], [5, 6])
    report = module.table.evict()
    assert report == 1
    assert report.by_policy == {
        "GlobalStepFilter(filter_step=2)": 2,
        "MaxRows(n=5, by='last_seen')": 1,
    }
    assert left(module) == {2, 3, 4, 5, 6}


def test_compositions_nest(backend):
    """AnyOf in AllOf in AnyOf works, with a clock at the innermost level."""
    clock = Clock()
    policy = AnyOf(
        [
            AllOf([AnyOf([TimeToLive(5, clock=clock), MinNorm(0.0)]), GlobalStepFilter(2)]),
            MaxRows(4),
        ]
    )
    assert policy.columns == {"last_time", "norms", "last_seen", "ids"}
    module = after_steps(policy, [1, 2], [2, 3], [4])
    clock.now += 6
    module(ids(5, 6))
    report = module.table.evict()
    assert report == 2  # 1 is old and unseen for long, then 2 is one too many
    assert left(module) == {3, 4, 5, 6}
    assert report.by_policy == {
        "TimeToLive(seconds=5)": 4,
        "MinNorm(threshold=0.0)": 0,
        "GlobalStepFilter(filter_step=2)": 1,
        "MaxRows(n=4, by='last_seen')": 1,
    }


# ---- policies of the user's own


def test_a_policy_of_the_users_own(backend):
    """A policy is two members: its columns, and a mask."""

    class Rare(Eviction):
        columns = frozenset({"counts", "ids", "norms"})

        def expired(self, rows):
            assert rows.norms.shape == rows.ids.shape == rows.counts.shape
            return (rows.counts < 2) & (rows.ids > 0)

    module = after_steps(AnyOf([Rare(), MaxRows(10)]), [1, 2, 2, -3], [4])
    assert module.table.evict() == 2
    assert left(module) == {2, -3}


# ---- what is refused


def test_a_policy_may_ask_only_for_what_is_kept():
    """The error names policy, column and table."""
    table = HashTable(2, eviction=GlobalStepFilter(1), name="t")
    with pytest.raises(
        ValueError, match=r"policy: MaxRows.* asks for \['counts'\], which table 't'"
    ):
        table.evict(MaxRows(1, by="count"))
    assert HashTable(2).evict(MinNorm(1.0)) == 0
    with pytest.raises(TypeError, match="policy: expected Eviction, got 3"):
        table.evict(3)


def test_a_policy_that_answers_nonsense_is_an_error():
    """The error names the policy and the expected shape."""

    class Wrong(Eviction):
        def expired(self, rows):
            return torch.zeros(3)

    class Asks(Wrong):
        columns = frozenset({"weights"})

    table = HashTable(2, eviction=Wrong())
    table.insert(ids(1), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"Wrong.expired: expected bool \[1\], got torch.float32"):
        table.evict()
    with pytest.raises(ValueError, match=r"eviction: columns are .* got \['weights'\]"):
        HashTable(2, eviction=Asks())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: MaxRows(-1), ValueError, "n: expected an int >= 0, got -1"),
        (lambda: MaxRows(2.5), TypeError, r"n: expected an int >= 0, got 2\.5"),
        (
            lambda: MaxRows(2, by="age"),
            ValueError,
            "by: expected 'last_seen' or 'count', got 'age'",
        ),
        (lambda: MaxRows(2**63), ValueError, r"n: expected an int <= 2\*\*63 - 1, got 9223"),
        (lambda: GlobalStepFilter(2**64), ValueError, r"filter_step: expected an int <= 2\*\*63"),
        (lambda: TimeToLive(5, max_jump=0), ValueError, "max_jump: expected a number > 0, got 0"),
        (lambda: TimeToLive(5, clock=3.0), TypeError, r"clock: expected a function .* got 3\.0"),
        (lambda: TimeToLive(0), ValueError, "seconds: expected a number > 0, got 0"),
        (lambda: TimeToLive(float("nan")), ValueError, "seconds: expected a number"),
        (lambda: MinNorm(-1.0), ValueError, r"threshold: expected a number >= 0.0, got -1\.0"),
        (lambda: AnyOf([]), ValueError, "policies: expected at least one policy"),
        (lambda: AllOf([MaxRows(1), 3]), TypeError, "policies: expected Eviction, got 3"),
        (
            lambda: AnyOf([TimeToLive(1, clock=Clock()), TimeToLive(1)]),
            ValueError,
            "policies: expected one clock",
        ),
    ],
)
def test_wrong_arguments(make, error, words):
    """An error names the argument, its value and the expected one."""
    with pytest.raises(error, match=words):
        make()


def test_policies_are_values():
    """Features that share a table compare their policies."""
    assert AnyOf([MaxRows(2), GlobalStepFilter(1)]) == AnyOf((MaxRows(2), GlobalStepFilter(1)))
    assert AnyOf([MaxRows(2)]) != AllOf([MaxRows(2)])
    assert TimeToLive(5) == TimeToLive(5)


@pytest.mark.parametrize("compose", [AnyOf, AllOf])
def test_compositions_say_what_to_write(compose):
    """A policy by itself, by its name or as its class."""
    with pytest.raises(TypeError, match="policies: expected a list of Eviction, got MinNorm"):
        compose(MinNorm(1.0))
    for policy in ("min_norm", MinNorm):
        with pytest.raises(TypeError, match=r"; write policies=MinNorm\(threshold=\.\.\.\)"):
            compose([policy])
