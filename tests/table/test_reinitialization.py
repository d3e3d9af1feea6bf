"""reinitialize(): all rows start anew, as those of another seed would."""

import copy

import pytest
import torch

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.eviction import MaxRows
from recis_lightning.initializers import Uniform
from recis_lightning.ops import row_init
from recis_lightning.optim import SparseAdam
from tests.helpers.eviction_tables import ids
from tests.helpers.sample_tables import LOW

MANY = ids(7, -3, LOW, 12)


def trained(seed, dtype=torch.float32, steps=2):
    module = DynamicEmbedding(
        *(3,),
        initializer=Uniform(-1, 1),
        eviction=MaxRows(9, by="count"),
        dtype=dtype,
        seed=seed,
        name="t",
    )
    sparse = SparseAdam(hash_tables(module), lr=0.1)
    for _ in range(steps):
        step(module, sparse)
    return module, sparse


def step(module, sparse):
    module(MANY).float().pow(2).sum().backward()
    sparse.step()
    sparse.zero_grad()
    module.table.update_step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_training_are_those_of_a_new_table(backend, dtype):
    """Adam's bias correction begins anew too; ids, counts and steps stay."""
    module, sparse = trained(4, dtype)
    table = module.table
    columns = {name: column.clone() for name, column in table.storage.columns.items()}
    table.reinitialize()
    assert table.seed == 5
    assert len(table) == 4
    other, other_sparse = trained(5, dtype, steps=0)
    other(MANY)
    assert torch.equal(table.embeddings(MANY), other.table.embeddings(MANY))
    for name, column in columns.items():
        assert torch.equal(table.storage.columns[name], column)
    for _ in range(2):
        step(module, sparse)
        step(other, other_sparse)
    assert torch.equal(table.embeddings(MANY), other.table.embeddings(MANY))
    assert torch.equal(module(ids(99)), other(ids(99)))  # new ids go by the new seed


def test_pending_gradients_go_and_old_graphs_are_told():
    """A gradient of the weights before is for none of those now."""
    module, sparse = trained(4)
    kept = module(MANY)
    module(MANY).sum().backward()
    module.table.reinitialize(seed=-1)
    before = module.table.embeddings(MANY)
    sparse.step()
    assert torch.equal(module.table.embeddings(MANY), before)
    with pytest.raises(RuntimeError, match="table 't' lost rows between a lookup"):
        kept.sum().backward()


def test_empty_tables_copies_and_the_last_seed():
    """An empty table has a new seed; a copy of a table is let alone."""
    empty = DynamicEmbedding(2, seed=2**64 - 1, name="t").table
    empty.reinitialize()
    assert empty.seed == 0
    module, _ = trained(4)
    twin = copy.deepcopy(module)
    before = twin.table.embeddings(MANY)
    module.table.reinitialize()
    assert torch.equal(twin.table.embeddings(MANY), before)
    for seed, error in ((1.5, TypeError), (2**64, ValueError)):
        with pytest.raises(error, match="seed: expected"):
            module.table.reinitialize(seed)
    assert module.table.seed == 5


def test_an_interrupt_leaves_all_rows_new(monkeypatch):
    """It goes on to the end, and then raises."""
    module, _ = trained(4)
    real, calls = row_init.init_rows_, []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(row_init, "init_rows_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.table.reinitialize()
    other, _ = trained(5, steps=0)
    assert torch.equal(module.table.embeddings(MANY), other(MANY).detach())
