"""What ranks run in the tests of exchange dtypes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, DynamicEmbeddingBag, EmbeddingEngine, EmbeddingOption
from recis_lightning.distributed.process_group import rank
from recis_lightning.optim import SparseAdam, SparseSGD
from recis_lightning.table.listing import hash_tables
from tests.helpers.rank_messages import sent_bytes


class Model(nn.Module):
    """An engine with a bfloat16 table, and a bag of the same dim as its float32 table."""

    def __init__(self, exchange_dtype):
        super().__init__()
        options = {"a": EmbeddingOption(5), "b": EmbeddingOption(4, dtype=torch.bfloat16)}
        self.engine = EmbeddingEngine(options, exchange_dtype=exchange_dtype)
        self.bag = DynamicEmbeddingBag(5, name="bag", mode="sum")

    def forward(self, ids):
        return [*self.engine({"a": ids, "b": ids[0]}).values(), self.bag(ids)]


def trained(exchange_dtype, num_steps=4):
    """Return the rows of all tables after some steps, and the bytes that were sent, heads apart."""
    model = Model(exchange_dtype)
    sparse = SparseAdam(hash_tables(model), lr=0.01)
    generator = torch.Generator().manual_seed(rank())
    with sent_bytes() as sent:
        for step in range(num_steps):
            ids = torch.randint(40, (8 if step else 0, 6), generator=generator)
            outputs = model(ids if step else ids.new_zeros(1, 0))
            if step != 2 or rank():  # on one rank alone
                sum((out.float() + 1).square().sum() for out in outputs).backward()
            else:
                outputs[0].sum().backward()
            sparse.step()
    num_bytes = sum(size for (kind, _), size in sent.items() if kind != "heads")
    return [table.gather() for table in hash_tables(model)], num_bytes, model


def within_rounding():
    """Fewer bytes, rows that differ by rounding, the same in every run; tables stay float32."""
    exact, bytes_exact, _ = trained(None)
    rounded, bytes_rounded, model = trained("bfloat16")
    again, _, _ = trained(torch.bfloat16)
    torch.testing.assert_close(rounded, again, rtol=0, atol=0)
    assert bytes_rounded < 0.85 * bytes_exact, (bytes_rounded, bytes_exact)
    a, _, bag = hash_tables(model)
    assert (a.exchange_dtype, a.dtype) == (torch.bfloat16, torch.float32)
    assert bag.exchange_dtype is None
    (ids, found), (wanted_ids, wanted) = rounded[0], exact[0]
    torch.testing.assert_close(ids, wanted_ids, rtol=0, atol=0)
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-10)
    torch.testing.assert_close(rounded[2], exact[2], rtol=0, atol=0)  # its own are exact


def gradients_are_rounded_once():
    """Owners add up in float32 what each rank has rounded; so are the rows that a lookup gets."""
    table = DynamicEmbedding(3, name="t", exchange_dtype="bfloat16")
    sparse = SparseSGD([table.table], lr=1.0)
    ids, start = torch.arange(4), torch.full((4, 3), 0.1)
    table.table.insert(ids, start)
    out = table(ids)
    torch.testing.assert_close(out, start.bfloat16().float(), rtol=0, atol=0)
    gradient = torch.full((4, 3), 0.3 if rank() else 0.7)
    out.backward(gradient)
    sparse.step()
    halves = torch.tensor([0.35, 0.15]).bfloat16().float()
    wanted = torch.full((4, 3), 0.1) - halves.sum()
    torch.testing.assert_close(table.table.gather()[1], wanted, rtol=0, atol=1e-7)


def ranks_that_disagree():
    """An error on both, which names the argument and the table."""
    table = DynamicEmbedding(3, name="user", exchange_dtype="bfloat16" if rank() else None)
    with pytest.raises(RuntimeError, match=r"exchange_dtype 'bfloat16' of \['user'\]"):
        table(torch.arange(4))


def copies_have_it():
    """Deep copies and pickles."""
    table = DynamicEmbedding(3, name="user", exchange_dtype="bfloat16").table
    for copied in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert copied.exchange_dtype is torch.bfloat16
