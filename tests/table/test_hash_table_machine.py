"""HashTable against a dict, over any sequence of what one can do to it, under any policy."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.admission import BloomCount, MinCount, Probability, ReadOnly
from recis_lightning.eviction import AllOf, AnyOf, GlobalStepFilter, MaxRows, MinNorm, TimeToLive
from recis_lightning.initializers import Uniform
from recis_lightning.ops.layout import ADMISSION_NUM_LOOKUPS
from recis_lightning.optim import SparseAdagrad
from tests.helpers.sample_tables import EXTREMES

DIM, KEEP, LR, EPS, PADDING = 3, 1, 0.5, 1e-10, 13
some_id = st.sampled_from([*range(16), *EXTREMES.tolist()])
some_ids = st.lists(some_id, max_size=12)
NOW = [0]  # what the clock of all tables says


def clock():
    return NOW[0]


# Evicts nothing, and so keeps all columns for what is passed to evict().
KEEPS_ALL = AllOf([GlobalStepFilter(10**9), TimeToLive(10**9, clock), MaxRows(10**9, by="count")])
ADMISSIONS = [
    None,
    ReadOnly(),
    MinCount(3, forget_after=2),
    MinCount(2, per="batch"),
    Probability(0.5),
    BloomCount(3, num_counters=10**6),  # so many that no two ids collide and nothing fades
]
simple_policies = st.one_of(
    st.just(GlobalStepFilter(KEEP)),
    st.just(TimeToLive(5, clock)),
    st.builds(MaxRows, st.integers(0, 20), st.sampled_from(["last_seen", "count"])),
    st.just(MinNorm(0.73)),
)
some_policy = st.one_of(
    simple_policies,
    st.builds(AnyOf, st.lists(simple_policies, min_size=1, max_size=3)),
    st.builds(AllOf, st.lists(simple_policies, min_size=1, max_size=3)),
)


class Entry:
    """What a table should hold of an id."""

    def __init__(self, weights):
        self.weights, self.sum, self.count = weights, np.zeros(DIM), 0

    def see(self, step):
        self.last_seen, self.last_time, self.count = step, NOW[0], self.count + 1


def named(policy, rows, evictable, step):
    """Say which of ``evictable`` ids a policy evicts from ``rows``, id -> Entry."""
    if isinstance(policy, AllOf):
        return set.intersection(*(named(p, rows, evictable, step) for p in policy.policies))
    if isinstance(policy, AnyOf):
        gone = set()
        for part in policy.policies:
            left = {i: entry for i, entry in rows.items() if i not in gone}
            gone |= named(part, left, evictable - gone, step)
        return gone
    if isinstance(policy, MaxRows):
        by_count = policy.by == "count"
        order = sorted((rows[i].count * by_count, rows[i].last_seen, i) for i in evictable)
        return {i for _, _, i in order[: max(len(rows) - policy.n, 0)]}
    tests = {
        GlobalStepFilter: lambda entry: entry.last_seen < step - KEEP,
        TimeToLive: lambda entry: NOW[0] - entry.last_time > 5,
        MinNorm: lambda entry: np.linalg.norm(entry.weights) < 0.73,
    }
    return {i for i in evictable if tests[type(policy)](rows[i])}


class TableAgainstDict(RuleBasedStateMachine):
    @initialize(threads=st.sampled_from([1, 2]), admission=st.sampled_from(ADMISSIONS))
    def start(self, threads, admission):
        torch.set_num_threads(threads)
        self.known, self.gradients, self.step, self.start_of = {}, {}, 0, {}
        self.sighted, self.num_lookups, self.pinned = {}, 0, set()
        self.admission = None
        self.fresh = self.new_module()  # never trained: tells initial rows
        self.admission = admission
        self.module, self.optimizer = self.new_pair()

    def teardown(self):
        torch.set_num_threads(2)

    def new_module(self):
        return DynamicEmbedding(
            DIM,
            initializer=Uniform(-1.0, 1.0),
            admission=self.admission,
            eviction=KEEPS_ALL,
            padding_idx=PADDING,
            name="machine",
        )

    def new_pair(self):
        module = self.new_module()
        return module, SparseAdagrad(hash_tables(module), lr=LR, eps=EPS)

    def initial(self, i):
        if i not in self.start_of:
            self.start_of[i] = self.fresh(torch.tensor([i]))[0].detach().double().numpy()
        return self.start_of[i]

    def expected(self, ids, padding=PADDING):
        rows = [
            self.known[i].weights if i in self.known and i != padding else np.zeros(DIM)
            for i in ids
        ]
        return torch.tensor(np.array(rows).reshape(len(ids), DIM), dtype=torch.float32)

    def add(self, i, weights=None):
        entry = self.known.get(i)
        if entry is None:
            start = self.initial(i) if weights is None else weights
            entry = self.known[i] = Entry(start)
        elif weights is not None:
            entry.weights = weights
        entry.see(self.step)

    def admitted(self, ids):
        """Sight unknown ids and say which of them come in."""
        self.num_lookups += 1
        policy, now = self.admission, self.num_lookups
        if policy is None or not policy.admits:
            return set(ids) if policy is None else set()
        if isinstance(policy, Probability):
            probe = self.new_module()
            probe.table.storage.admission_counter.header.fields[ADMISSION_NUM_LOOKUPS] = now - 1
            probe(torch.tensor(ids, dtype=torch.int64))
            return set(probe.table.ids().tolist())
        per_batch = getattr(policy, "per", "") == "batch"
        forget_after = getattr(policy, "forget_after", 10**9)
        for i in set(ids) if per_batch else ids:
            count, last = self.sighted.get(i, (0, now))
            self.sighted[i] = ((count if now - last <= forget_after else 0) + 1, now)
        came = {i for i in ids if self.sighted[i][0] >= policy.k}
        if isinstance(policy, MinCount):
            for i in came:
                del self.sighted[i]
        return came

    # ---- what one can do

    @rule(
        ids=some_ids, scale=st.integers(-3, 3), backward=st.sampled_from([True, True, True, False])
    )
    def look_up_in_training(self, ids, scale, backward):
        out = self.module(torch.tensor(ids, dtype=torch.int64))
        came = self.admitted([i for i in ids if i != PADDING and i not in self.known])
        for i in ids:
            if i != PADDING and (i in self.known or i in came):
                self.add(i)
        torch.testing.assert_close(out, self.expected(ids))
        if not backward:
            return
        coefficients = scale + torch.arange(out.numel()).view_as(out) % 4
        (out * coefficients).sum().backward()
        for i, gradient in zip(ids, coefficients.double().numpy(), strict=True):
            if i != PADDING and i in self.known:
                self.gradients[i] = self.gradients.get(i, 0) + gradient

    @rule(ids=some_ids)
    def look_up_in_evaluation(self, ids):
        out = self.module.eval()(torch.tensor(ids, dtype=torch.int64))
        self.module.train()
        torch.testing.assert_close(out, self.expected(ids))
        assert not out.requires_grad

    @rule()
    def take_a_step(self):
        self.optimizer.step()
        for i, gradient in self.gradients.items():
            entry = self.known[i]
            entry.sum = entry.sum + gradient**2
            entry.weights = entry.weights - LR * gradient / (np.sqrt(entry.sum) + EPS)
        self.gradients = {}

    @rule(steps=st.integers(0, 4), seconds=st.integers(0, 4), policy=some_policy)
    def let_time_pass_and_evict(self, steps, seconds, policy):
        table = self.module.table
        table.update_step(steps)
        self.step += steps
        NOW[0] += seconds
        evictable = self.known.keys() - self.gradients.keys() - self.pinned
        gone = named(policy, self.known, evictable, self.step)
        wished = table.evict(policy, dry_run=True)
        done = table.evict(policy)
        assert wished == done == len(gone)
        assert wished.by_policy == done.by_policy
        for i in gone:
            del self.known[i]

    @rule(ids=some_ids, keep=st.booleans())
    def pin_or_unpin(self, ids, keep):
        change = self.module.table.pin if keep else self.module.table.unpin
        change(torch.tensor(ids, dtype=torch.int64))
        self.pinned = self.pinned | set(ids) if keep else self.pinned - set(ids)

    @rule(ids=some_ids)
    def delete(self, ids):
        present = set(ids) & self.known.keys()
        assert self.module.table.delete(torch.tensor(ids, dtype=torch.int64)) == len(present)
        for i in present:
            del self.known[i]
            self.gradients.pop(i, None)

    @rule(ids=some_ids, value=st.integers(-5, 5))
    def insert(self, ids, value):
        values = value + torch.arange(float(len(ids)))[:, None].expand(-1, DIM)
        self.module.table.insert(torch.tensor(ids, dtype=torch.int64), values)
        for i, row in zip(ids, values.double().numpy(), strict=True):
            self.add(i, row)
            if isinstance(self.admission, MinCount):
                self.sighted.pop(i, None)

    @rule(start=st.integers(-(2**40), 2**40), count=st.integers(30, 200))
    def grow(self, start, count):
        ids = start + torch.arange(count) * 3
        self.module.table.insert(ids, torch.ones(count, DIM))
        for i in ids.tolist():
            self.add(i, np.ones(DIM))
            if isinstance(self.admission, MinCount):
                self.sighted.pop(i, None)

    @rule(how=st.sampled_from(["zero_grad", "clear", "copy", "load", "load into new"]))
    def lose_gradients(self, how):
        if how == "zero_grad":
            self.optimizer.zero_grad()
        elif how == "clear":
            self.module.table.clear()
            self.known, self.sighted = {}, {}
        elif how == "copy":
            self.module, self.optimizer = copy.deepcopy((self.module, self.optimizer))
        else:
            file = io.BytesIO()
            torch.save(self.module.state_dict(), file)
            file.seek(0)
            if how == "load into new":
                self.module, self.optimizer = self.new_pair()
            self.module.load_state_dict(torch.load(file, weights_only=True))
        self.gradients = {}

    # ---- what must always hold

    @invariant()
    def agrees(self):
        if not hasattr(self, "known"):
            return
        table, ids = self.module.table, list(self.known)
        assert len(table) == len(ids)
        assert sorted(table.ids().tolist()) == sorted(ids)
        asked = torch.tensor(ids, dtype=torch.int64)
        torch.testing.assert_close(table.embeddings(asked), self.expected(ids, None))
        assert table.last_seen(asked).tolist() == [e.last_seen for e in self.known.values()]
        assert table.step == self.step
        assert table.pinned.tolist() == sorted(self.pinned)
        rows = table._find(asked)
        assert table.storage.columns["counts"][rows].tolist() == [
            e.count for e in self.known.values()
        ]
        state = table.get_extra_state()
        sums = [self.known[i].sum for i in state["ids"].tolist()]
        expected = torch.tensor(np.array(sums).reshape(-1, DIM), dtype=torch.float32)
        torch.testing.assert_close(state["slots"]["sum"], expected)


class TestTableAgainstDict(TableAgainstDict.TestCase):
    settings = settings(max_examples=20, stateful_step_count=16, deadline=None)


@pytest.mark.slow
class TestTableAgainstDictForLonger(TableAgainstDict.TestCase):
    settings = settings(max_examples=200, stateful_step_count=16, deadline=None)
