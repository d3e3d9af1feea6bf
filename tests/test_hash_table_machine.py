"""HashTable against a dict, over any sequence of what one can do to it."""

import copy
import io

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Uniform
from recis_lightning.optim import SparseAdagrad
from tests.tables import EXTREMES

DIM, KEEP, LR, EPS, PADDING = 3, 1, 0.5, 1e-10, 13
some_id = st.sampled_from([*range(16), *EXTREMES.tolist()])
some_ids = st.lists(some_id, max_size=12)


class Entry:
    """What a table should hold of an id."""

    def __init__(self, weights, step):
        self.weights, self.sum, self.last_seen = weights, np.zeros(DIM), step


class TableAgainstDict(RuleBasedStateMachine):
    @initialize(threads=st.sampled_from([1, 2]))
    def start(self, threads):
        torch.set_num_threads(threads)
        self.known, self.gradients, self.step, self.start_of = {}, {}, 0, {}
        self.fresh = self.new_module()  # never trained: tells initial rows
        self.module, self.optimizer = self.new_pair()

    def teardown(self):
        torch.set_num_threads(2)

    def new_module(self):
        return DynamicEmbedding(
            DIM,
            initializer=Uniform(-1.0, 1.0),
            eviction=GlobalStepFilter(KEEP),
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
            entry = self.known[i] = Entry(start, self.step)
        elif weights is not None:
            entry.weights = weights
        entry.last_seen = self.step

    # ---- what one can do

    @rule(
        ids=some_ids, scale=st.integers(-3, 3), backward=st.sampled_from([True, True, True, False])
    )
    def look_up_in_training(self, ids, scale, backward):
        out = self.module(torch.tensor(ids, dtype=torch.int64))
        for i in ids:
            if i != PADDING:
                self.add(i)
        torch.testing.assert_close(out, self.expected(ids))
        if not backward:
            return
        coefficients = scale + torch.arange(out.numel()).view_as(out) % 4
        (out * coefficients).sum().backward()
        for i, gradient in zip(ids, coefficients.double().numpy(), strict=True):
            if i != PADDING:
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

    @rule(steps=st.integers(0, 4))
    def let_time_pass_and_evict(self, steps):
        self.module.table.update_step(steps)
        self.step += steps
        gone = [
            i
            for i, entry in self.known.items()
            if entry.last_seen < self.step - KEEP and i not in self.gradients
        ]
        assert self.module.table.evict() == len(gone)
        for i in gone:
            del self.known[i]

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

    @rule(start=st.integers(-(2**40), 2**40), count=st.integers(30, 200))
    def grow(self, start, count):
        ids = start + torch.arange(count) * 3
        self.module.table.insert(ids, torch.ones(count, DIM))
        for i in ids.tolist():
            self.add(i, np.ones(DIM))

    @rule(how=st.sampled_from(["zero_grad", "clear", "copy", "load", "load into new"]))
    def lose_gradients(self, how):
        if how == "zero_grad":
            self.optimizer.zero_grad()
        elif how == "clear":
            self.module.table.clear()
            self.known = {}
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
        state = table.get_extra_state()
        sums = [self.known[i].sum for i in state["ids"].tolist()]
        expected = torch.tensor(np.array(sums).reshape(-1, DIM), dtype=torch.float32)
        torch.testing.assert_close(state["slots"]["sum"], expected)


TableAgainstDict.TestCase.settings = settings(
    max_examples=200, stateful_step_count=16, deadline=None
)
test_table_against_dict = TableAgainstDict.TestCase
