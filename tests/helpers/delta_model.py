"""A small model whose tables have all kinds of state, and a way to train it by hand."""

import torch
from torch import nn

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.admission import MinCount
from recis_lightning.eviction import AnyOf, GlobalStepFilter, MaxRows
from recis_lightning.optim import SparseAdam


class Model(nn.Module):
    """Two tables and a tower: one counts, evicts and admits, one keeps bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        policy = AnyOf([GlobalStepFilter(3), MaxRows(10**6, by="count")])
        self.user = DynamicEmbedding(4, name="user", admission=MinCount(2), eviction=policy)
        self.item = DynamicEmbedding(3, name="item", dtype="bfloat16")
        self.tower = nn.Linear(7, 1)

    def forward(self, batch):
        rows = torch.cat([self.user(batch["user"]), self.item(batch["item"]).float()], 1)
        return self.tower(rows).squeeze(1)


class Run:
    """Training of a model, some ids a step."""

    def __init__(self, seed=0, num_ids=120):
        self.model, self.num_ids = Model(), num_ids
        self.generator = torch.Generator().manual_seed(seed)
        self.tables = hash_tables(self.model)
        self.sparse = SparseAdam(self.tables, lr=0.1)
        self.dense = torch.optim.SGD(self.model.tower.parameters(), lr=0.1)

    def batch(self, count=40):
        ids = torch.randint(0, self.num_ids, (2, count), generator=self.generator)
        return {"user": ids[0], "item": ids[1]}

    def step(self, batch=None):
        self.model.train()
        loss = self.model(self.batch() if batch is None else batch).sigmoid().mean()
        self.dense.zero_grad()
        loss.backward()
        self.sparse.step()
        self.dense.step()
        for table in self.tables:
            table.update_step()
        self.model.user.table.evict()

    def states(self):
        return {table.name: table.get_extra_state() for table in self.tables}


def assert_same(one, other, where="state"):
    """Fail unless two states are the same, bit for bit."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype is other.dtype, where
        assert one.shape == other.shape, where
        assert one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8)), where
    else:
        assert one == other, where
