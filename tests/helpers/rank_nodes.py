"""What ranks run in the tests of nodes: ids that several ranks of one ask for travel once."""

import re
from unittest.mock import patch

import pytest
import torch
from torch import distributed

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
)
from recis_lightning.admission import MinCount
from recis_lightning.lookup import agreement, finish_evaluation
from recis_lightning.optim import SparseAdam, SparseSGD, clip_grad_norm_
from tests.helpers.rank_messages import counted, sent_bytes
from tests.helpers.rank_traffic import PAGE

SIZE = 2  # ranks of a node


def rank():
    return distributed.get_rank()


def engine(ranks_per_node, **settings):
    """Return an engine of several groups, of which one counts ids before it admits them."""
    torch.manual_seed(0)
    options = {
        "a": EmbeddingOption(3, admission=MinCount(2)),
        "b": EmbeddingOption(3, mode="sum", padding_idx=0),
        "c": EmbeddingOption(2, dtype=torch.bfloat16),
        "d": EmbeddingOption(3, table="b", mode="mean"),
        "e": EmbeddingOption(3, mode="tile", tile_len=2),
    }
    return EmbeddingEngine(options, ranks_per_node=ranks_per_node, **settings)


def batch(step, size=9):
    """Return this rank's batch, with ids that all ranks draw, negative ones too, or with none."""
    if step == 2 and rank() == 1:
        size = 0
    chance = torch.Generator().manual_seed(100 * step + rank())
    ids = torch.randint(-8, 12, (5, size, 4), generator=chance) * 2**40
    offsets = torch.tensor([0, *[2 * size] * (size > 0)])
    return {
        "a": ids[0],
        "b": ids[1],
        "c": ids[2, :, 0],
        "d": ids[3],
        "e": Jagged(ids[4].flatten()[: 2 * size], offsets),
    }


def train(ranks_per_node, weigh, steps=4, optimizer=SparseSGD, lr=0.5, **settings):
    """Train; return what this rank looked up, the norms, and ids and rows of all tables."""
    module = engine(ranks_per_node, **settings)
    sparse, kept = optimizer(hash_tables(module), lr=lr), []
    for step in range(steps):
        outputs = [
            out if torch.is_tensor(out) else out.values for out in module(batch(step)).values()
        ]
        used = outputs[step % 2 :: 1 + (rank() == 3)]  # rank 3 uses other ones
        if step == 3:
            used = used if rank() < 2 else [torch.zeros(1, requires_grad=True)]  # node 1 uses none
        sum((out.float() * weigh(out)).sum() for out in used).backward()
        kept += [out.detach() for out in outputs]
        if step % 2:
            kept.append(clip_grad_norm_(sparse, 1e6))
        sparse.step()
        for table in hash_tables(module):
            table.update_step()
    module.eval()
    if rank() % 2:
        kept += [out.detach() for out in module(batch(9)).values() if torch.is_tensor(out)]
    finish_evaluation(module)
    for table in hash_tables(module):
        ids, rows = table.gather()
        kept += [ids, rows]
    return kept


def ones(out):
    """Weigh with what adds up exactly in any order."""
    return 0.5


def random_weights(out):
    chance = torch.Generator().manual_seed(out.numel() + rank())
    return torch.randn(out.shape, generator=chance)


def same_rows():
    """To the bit, where gradients add up exactly in any order: by a count in a head and without."""
    expected = train(None, ones)
    torch.testing.assert_close(train(SIZE, ones), expected, rtol=0, atol=0)
    with patch.object(agreement, "PAYLOAD_SIZE", 4):
        torch.testing.assert_close(train(SIZE, ones), expected, rtol=0, atol=0)


def sums_in_one_order():
    """Rows of other gradients differ by rounding, and are the same in every run."""
    found = train(SIZE, random_weights, optimizer=SparseAdam, lr=0.01)
    torch.testing.assert_close(train(SIZE, random_weights, optimizer=SparseAdam, lr=0.01), found,
                               rtol=0, atol=0)  # fmt: skip
    expected = train(None, random_weights, optimizer=SparseAdam, lr=0.01)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    rounded = train(SIZE, ones, exchange_dtype="bfloat16")
    assert len(rounded) == len(train(None, ones, exchange_dtype="bfloat16"))


def formulas():
    """Return the formulas of the page for what a rank sends to other nodes, by message."""
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| message between nodes | bytes |") :].split("\n\n")[0]
    return dict(re.findall(r"^\| (.*) \| `(.*)` \|$", table, re.MULTILINE))


def far_bytes():
    """What a node sends to the other one: the formulas of the page, summed over its ranks."""
    node, dim = rank() // SIZE, 5
    ids = torch.arange(40) * 2**33
    # Half of a rank's ids are those of its neighbour as well.
    mine = ids[:20] if rank() % SIZE else ids[10:30]
    found = {}
    for size in (None, SIZE):
        module = EmbeddingEngine(
            {"a": EmbeddingOption(dim), "b": EmbeddingOption(dim)}, ranks_per_node=size
        )
        sparse = SparseSGD(hash_tables(module), lr=0.1)
        with sent_bytes() as forward, counted() as asked:
            outputs = module({"a": mine, "b": mine})
        with sent_bytes() as backward, counted() as updated:
            sum(out.sum() for out in outputs.values()).backward()
            sparse.step()
        assert (asked.total(), updated.total()) == ((3, 2) if size is None else (6, 3))
        own = torch.tensor(
            [
                sum(b for (kind, to), b in sent.items() if kind != "heads" and to // SIZE != node)
                for sent in (forward, backward)
            ]
        )
        distributed.all_reduce(own)  # both nodes ask the same
        found[size] = own.tolist()
    names = {"N": 2, "G": SIZE, "V": 2 * 30, "D": dim, "E": 4, "T": 2}
    by_message = {what: eval(formula, {}, names) for what, formula in formulas().items()}
    forward = by_message["counts"] + by_message["ids"] + by_message["rows"]
    assert found[SIZE] == [4 * forward, 4 * by_message["gradients"]], (found, by_message)
    assert found[SIZE][1] == found[None][1] * 30 // 40


def bad_settings():
    """What does not divide the ranks, and what differs from rank to rank."""
    ids = torch.arange(3)
    with pytest.raises(ValueError, match="ranks_per_node: expected a divisor of the number of"):
        DynamicEmbedding(2, name="t", ranks_per_node=3)(ids)
    module = DynamicEmbedding(2, name="t", ranks_per_node=4 if rank() else 2)
    with pytest.raises(RuntimeError, match=r"rank 0 looks up .* with ranks_per_node 2; ranks 1"):
        module(ids)
