"""What ranks run in the tests that count messages."""

from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import distributed, nn

from recis_lightning import (
    DynamicEmbedding,
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    hash_tables,
    look_up_together,
)
from recis_lightning.admission import MinCount
from recis_lightning.distributed.process_group import rank
from recis_lightning.lookup import agreement, finish_evaluation, table_bits
from recis_lightning.optim import SparseAdam

COLLECTIVES = ("all_to_all_single", "all_reduce", "all_gather", "all_gather_object", "broadcast")


@contextmanager
def counted():
    """Count the collectives of torch that are called meanwhile."""
    calls = Counter()

    def count(name, original, *args, **kwargs):
        calls[name] += 1
        return original(*args, **kwargs)

    with patch.multiple(
        distributed, **{n: partial(count, n, getattr(distributed, n)) for n in COLLECTIVES}
    ):
        yield calls


class Separate(nn.Module):
    """Modules of one feature each."""

    def __init__(self, num_tables):
        super().__init__()
        self.parts = nn.ModuleList(
            DynamicEmbedding(4, name=f"t{i}") if i % 2 else DynamicEmbeddingBag(4, name=f"t{i}")
            for i in range(num_tables)
        )

    def forward(self, ids):
        return [part(ids + i) for i, part in enumerate(self.parts)]

    def together(self, ids):
        return look_up_together(*((part, ids + i) for i, part in enumerate(self.parts)))


class Engines(nn.Module):
    """Engines of three groups each: of other dims and dtypes, with an admission policy."""

    def __init__(self, num_engines):
        super().__init__()
        options = {
            "a": EmbeddingOption(3, admission=MinCount(2)),
            "b": EmbeddingOption(5, dtype=torch.bfloat16, mode="sum"),
            "c": EmbeddingOption(3, dtype=torch.bfloat16),
        }
        self.parts = nn.ModuleList(
            EmbeddingEngine(
                {
                    name: EmbeddingOption(**{**vars(option), "table": f"{name}{i}"})
                    for name, option in options.items()
                }
            )
            for i in range(num_engines)
        )

    def forward(self, ids):
        return [out for part in self.parts for out in part(self._features(ids)).values()]

    def together(self, ids):
        asked = ((part, self._features(ids)) for part in self.parts)
        return [out for found in look_up_together(*asked) for out in found.values()]

    def _features(self, ids):
        return {"a": ids[0], "b": ids, "c": ids[:0]}


class Counted(nn.Module):
    """Features whose tables count ids before they admit them."""

    def __init__(self, num_tables):
        super().__init__()
        option = EmbeddingOption(3, admission=MinCount(2))
        self.engine = EmbeddingEngine({f"c{i}": option for i in range(num_tables)})

    def together(self, ids):
        given = {name: ids + i for i, name in enumerate(self.engine.options)}
        return list(self.engine(given).values())


def train(model, is_together, num_steps=3, uses=lambda outputs: outputs):
    """Train; return the collectives of the last lookup and of its step, and the outputs."""
    sparse = SparseAdam(hash_tables(model), lr=0.1)
    generator = torch.Generator().manual_seed(rank())
    for step in range(num_steps):
        ids = torch.randint(9, (3, 4) if step else (1, 4), generator=generator)
        with counted() as forward:
            outputs = model.together(ids) if is_together else model(ids)
        with counted() as backward:
            sum(out.float().square().sum() for out in uses(outputs)).backward()
            sparse.step()
    tables = [table.gather() for table in hash_tables(model)]
    return forward.total(), backward.total(), outputs, tables


def counts_of(kind, size, expected):
    """Separately and together: the wanted numbers of messages, and the same numbers to the bit."""
    found = [train(kind(size), is_together) for is_together in (False, True)]
    assert [(forward, backward) for forward, backward, _, _ in found] == expected
    torch.testing.assert_close(found[0][2:], found[1][2:], rtol=0, atol=0)


def of_engines():
    """Three messages for a lookup, whatever the number of groups, and two for all gradients."""
    counts_of(Engines, 1, [(3, 2), (3, 2)])
    counts_of(Engines, 2, [(6, 2), (3, 2)])


def of_embeddings():
    """As many for all modules together as for one of them."""
    counts_of(Separate, 26, [(78, 2), (3, 2)])


def of_more_tables_than_a_head_has_counts_for():
    """Then counts travel with the ids; with more groups than that, before them."""
    for kind, size, room, forward in ((Separate, 5, 4, 3), (Counted, 5, 4, 3), (Engines, 2, 2, 4)):
        with patch.object(agreement, "PAYLOAD_SIZE", room):
            first, second, *found = train(kind(size), is_together=True)
        assert (first, second) == (forward, 2), kind
        _, _, *expected = train(kind(size), is_together=True)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def of_tables(size):
    """As many messages as of one."""
    forward, backward, *_ = train(Separate(size), is_together=True, num_steps=2)
    assert (forward, backward) == (3, 2)


def of_more_tables_than_a_head_has_bits_for():
    """Then bits travel with the gradients where they differ; messages and rows are the same."""
    for uses in (lambda outputs: outputs, lambda outputs: outputs[rank() :: 3]):
        with patch.object(table_bits, "BITS", 1):
            _, backward, *found = train(Separate(16), is_together=True, uses=uses)
        assert backward == 2
        _, _, *expected = train(Separate(16), is_together=True, uses=uses)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def of_bits_alone():
    """Where tables have gradients that travelled before, the bits travel without any."""
    parts = Separate(16).parts
    sparse, alone = SparseAdam([part.table for part in parts], lr=0.1), torch.tensor([[5]])
    look_up_together(*((part, alone) for part in parts))[rank()].sum().backward()
    with patch.object(table_bits, "BITS", 1):
        parts[0].table.evict()
        with counted() as calls:
            sparse.step()
    assert calls.total() == 2
    steps = [part.table.num_updates for part in parts]
    assert steps == [1, 1] + [0] * 14, steps


def of_evaluation():
    """Modules are called one after the other, so that a rank without a batch can answer."""
    model = Separate(3)
    train(model, is_together=True)
    model.eval()
    if rank() == 0:
        expected, found = model(torch.arange(3)[None]), model.together(torch.arange(3)[None])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    finish_evaluation(model)


def of_malformed_input():
    """Both ranks raise."""
    model = Separate(2)
    ids = torch.ones(2, 3) if rank() else torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises((TypeError, RuntimeError), match="ids"):
        model.together(ids)


@contextmanager
def sent_bytes():
    """Count the bytes that this rank sends to others by all-to-all.

    Yields a Counter by ("heads", which have no splits, or a dtype, and the rank they go to).
    """
    sent, original = Counter(), distributed.all_to_all_single

    def count(output, message, output_splits=None, input_splits=None, group=None):
        size, own = distributed.get_world_size(), distributed.get_rank()
        kind = str(message.dtype).removeprefix("torch.") if input_splits else "heads"
        item = message.nbytes // max(len(message), 1)
        for to, items in enumerate(input_splits or [len(message) // size] * size):
            sent[kind, to] += item * items * (to != own)
        return original(output, message, output_splits, input_splits, group)

    with patch.object(distributed, "all_to_all_single", count):
        yield sent
