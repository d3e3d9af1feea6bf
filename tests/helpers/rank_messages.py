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
from recis_lightning.lookup import finish_evaluation, gradient_exchange
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


def train(model, is_together, num_steps=3):
    """Train; return the collectives of the last lookup and of its step, and the outputs."""
    sparse = SparseAdam(hash_tables(model), lr=0.1)
    generator = torch.Generator().manual_seed(rank())
    for step in range(num_steps):
        ids = torch.randint(9, (3, 4) if step else (1, 4), generator=generator)
        with counted() as forward:
            outputs = model.together(ids) if is_together else model(ids)
        with counted() as backward:
            sum(out.float().square().sum() for out in outputs).backward()
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


def of_more_tables_than_a_head_has_bits_for():
    """Then a step asks which tables have gradients, and is the same."""
    model, other = Separate(5), Separate(5)
    with patch.object(gradient_exchange, "_WINDOW", 4):
        _, backward, *found = train(model, is_together=True)
    assert backward == 2 + 2  # another head and a reduction
    *_, outputs, tables = train(other, is_together=True)
    torch.testing.assert_close(found, [outputs, tables], rtol=0, atol=0)


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
