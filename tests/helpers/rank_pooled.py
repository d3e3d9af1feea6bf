"""What ranks run in the tests of rows that their owners add up."""

import re
from unittest.mock import patch

import pytest
import torch
from torch import distributed

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
    look_up_together,
)
from recis_lightning.admission import MinCount
from recis_lightning.distributed.ownership import owner_of
from recis_lightning.lookup import agreement, finish_evaluation
from recis_lightning.optim import SparseAdagrad, SparseSGD
from tests.helpers.rank_messages import counted, sent_bytes
from tests.helpers.rank_traffic import PAGE


def rank():
    return distributed.get_rank()


def engine(pools, **settings):
    """Return an engine with features that owners may pool, beside others of the same tables."""
    torch.manual_seed(0)
    options = {
        "sum": EmbeddingOption(3, mode="sum", pool_at_owner=pools),
        "mean": EmbeddingOption(3, mode="mean", table="sum", padding_idx=0, pool_at_owner=pools),
        "counted": EmbeddingOption(3, mode="mean", admission=MinCount(2), pool_at_owner=pools),
        "other": EmbeddingOption(2, mode="sum", dtype=torch.bfloat16, pool_at_owner=pools),
        "frozen": EmbeddingOption(3, mode="sum", trainable=False, pool_at_owner=pools),
        "row": EmbeddingOption(3),
    }
    return EmbeddingEngine(options, **settings)


def batch(step, num_bags=5):
    """Return this rank's batch: bags of some lengths, empty ones too, once none at all."""
    if step == 1 and rank() == 1:
        num_bags = 0
    chance = torch.Generator().manual_seed(10 * step + rank())
    lengths = torch.randint(0, 9, (num_bags,), generator=chance)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    def ids(*shape):
        return torch.randint(-6, 15, shape, generator=chance) * 2**35

    ragged = Jagged(ids(int(lengths.sum())), offsets)
    return {
        "sum": ragged,
        "mean": ids(num_bags, 7),
        "counted": Jagged(ids(int(lengths.sum())), offsets),
        "other": ids(num_bags, 4).int(),
        "frozen": ids(num_bags),
        "row": ids(num_bags),
    }


def train(pools, steps=4, optimizer=SparseSGD, concat=False, **settings):
    """Train; return what this rank looked up, and ids and rows of all tables."""
    module = engine(pools, **settings)
    sparse, kept = optimizer(hash_tables(module), lr=0.1), []
    for step in range(steps):
        given = batch(step)
        outputs = [module.concat(given)] if concat else list(module(given).values())
        used = outputs if concat or step != 2 else outputs[rank() :: 2]
        chance = torch.Generator().manual_seed(step + rank())
        loss = sum((out.float() * torch.randn(out.shape, generator=chance)).sum() for out in used)
        if step == 3 and rank() == 0:
            loss = torch.zeros(1, requires_grad=True).sum()
        loss.backward()
        kept += [out.detach().float() for out in outputs]
        sparse.step()
    module.eval()
    if rank():
        kept += [out.detach().float() for out in module(batch(9)).values()]
    finish_evaluation(module)
    for table in hash_tables(module):
        ids, rows = table.gather()
        kept += [ids, rows.float()]
    return kept


def as_pooled_here():
    """Outputs and rows are those of the plain exchange, but for rounding; each run has the same."""
    close = {"rtol": 2e-2, "atol": 2e-3}
    expected = train(False)
    found = train(True)
    torch.testing.assert_close(found, expected, **close)
    with patch.object(agreement, "PAYLOAD_SIZE", 2):
        torch.testing.assert_close(train(True), found, rtol=0, atol=0)
    torch.testing.assert_close(train(True, concat=True)[-10:], train(False, concat=True)[-10:],
                               **close)  # fmt: skip
    adagrad = [train(pools, optimizer=SparseAdagrad) for pools in (True, False)]
    torch.testing.assert_close(*adagrad, **close)


def exact():
    """Of float32 rows the difference is rounding alone: sums of halves have none."""
    ids = torch.arange(-20, 30).view(5, 10)
    found = []
    for pools in (True, False):
        bag = DynamicEmbeddingBag(3, mode="sum", name="t", pool_at_owner=pools)
        rows = torch.arange(150.0).view(-1, 3) / 2
        bag.table.insert(ids.flatten(), rows)
        other, sparse = DynamicEmbedding(3, name="o"), SparseSGD([bag.table], lr=0.5)
        for _ in range(2):
            out, _ = look_up_together((bag, ids[rank() :]), (other, ids[0]))
            out.sum().backward()
            sparse.step()
        found.append([out, *bag.table.gather()])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def bytes_sent():
    """Those that the page names, fewer than of rows; and as many messages."""
    dim, num_bags, length = 8, 3, 200
    ids = torch.arange(num_bags * length).view(num_bags, length) + 10_000 * rank()
    totals = {}
    for pools in (True, False):
        bag = DynamicEmbeddingBag(dim, name="t", pool_at_owner=pools)
        sparse = SparseSGD([bag.table], lr=0.1)
        with sent_bytes() as sent, counted() as calls:
            bag(ids).sum().backward()
            sparse.step()
        assert calls.total() == 5
        bytes_of = torch.tensor(sum(size for (kind, _), size in sent.items() if kind != "heads"))
        distributed.all_reduce(bytes_of)
        totals[pools] = int(bytes_of)
    ranks = distributed.get_world_size()
    text = PAGE.read_text(encoding="utf-8")
    formula = re.search(r"^\| pooled at owners \| `(.*)` \|$", text, re.MULTILINE)[1]
    # All ids that others own, and a part of each bag at each of them.
    others = sum(
        int((owner_of(i + 10_000 * r, ranks) != r).sum())
        for r, i in enumerate([ids - 10_000 * rank()] * ranks)
    )
    names = {"n": others, "P": ranks * num_bags * (ranks - 1), "D": dim, "E": 4, "R": 0}
    assert totals[True] == eval(formula.replace(" * (R - 1) / R", ""), {}, names)
    assert totals[True] < totals[False] / 5


def refused():
    """Weights, on every rank that has them; bags that differ in it."""
    bag = DynamicEmbeddingBag(2, mode="sum", name="t", pool_at_owner=True)
    ids = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match="pool_at_owner takes no weights"):
        bag(ids, None, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"offsets: must start at 0"):
        bag.eval()(ids.flatten(), torch.tensor([1, 2]))
    other = DynamicEmbeddingBag(2, mode="sum", name="t", pool_at_owner=rank() == 0)
    with pytest.raises(RuntimeError, match="ranks do different things"):
        other(ids)
