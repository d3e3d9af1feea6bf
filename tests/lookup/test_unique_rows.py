"""Mode "unique": its rows stand for repeated ones in values, gradients and counts."""

import copy

import pytest
import torch

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
)
from recis_lightning.admission import MinCount, ReadOnly
from recis_lightning.eviction import MaxRows
from recis_lightning.initializers import Uniform
from recis_lightning.optim import SparseAdam
from tests.helpers.rank_unique import BATCHES, train_on_ranks

POLICIES = {
    "plain": {},
    "padding": {"padding_idx": 3},
    "admission": {"admission": MinCount(3)},
    "read only": {"admission": ReadOnly()},
    "counts": {"eviction": MaxRows(100, by="count")},
}


def gathered(found):
    """Return what mode "none" would."""
    return found.rows[found.inverse]


@pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.slow_except(
    dict(backend=["reference", "cpu"]),
    dict(policies=[POLICIES["admission"], POLICIES["padding"]]),
)
def test_values_gradients_and_counts_are_those_of_repeated_rows(backend, policies):
    """Over steps of training, for ids of any shape, int32 and none at all."""
    same = {"initializer": Uniform(-1, 1), "name": "t", **policies}
    modules = [DynamicEmbedding(4, **same), DynamicEmbedding(4, mode="unique", **same)]
    for module in modules:
        module.table.insert(torch.tensor([3, 5, 11]), torch.full((3, 4), 0.5))
    optimizers = [SparseAdam(hash_tables(module), lr=0.1) for module in modules]
    batches = BATCHES[:3] if backend == "triton" else BATCHES
    for batch in batches:
        plain = modules[0](batch)
        rows, inverse, offsets = found = modules[1](batch)
        assert torch.equal(gathered(found), plain)
        assert inverse.shape == batch.shape
        assert len(rows) == len(batch.unique())
        assert offsets[-1] == batch.numel()
        for out in (plain, gathered(found)):
            (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    tables = [module.table for module in modules]
    known = tables[0].ids().sort().values
    assert torch.equal(tables[1].ids().sort().values, known)
    torch.testing.assert_close(tables[1].embeddings(known), tables[0].embeddings(known))
    assert tables[0].statistics().refused == tables[1].statistics().refused
    if "eviction" in policies:
        counts = [t.storage.columns["counts"][t._find(known)].tolist() for t in tables]
        assert counts[0] == counts[1]
    for module in modules:
        module.eval()
    batch = torch.tensor([[5, 999], [3, 5]])
    assert torch.equal(gathered(modules[1](batch)), modules[0](batch))
    assert not modules[1](batch).rows.requires_grad


@pytest.mark.parametrize("kind", ["dense", "ragged", "nested", "flat"])
def test_an_engine_gives_inverse_and_offsets_of_the_bags(kind):
    """Ragged features have theirs; features of one table may have other modes."""
    ids, offsets = torch.tensor([7, 9, 7, 7, 8, 9]), torch.tensor([0, 2, 2, 6])
    given = {
        "dense": ids.view(3, 2),
        "ragged": Jagged(ids.int(), offsets.int()),
        "nested": torch.nested.nested_tensor_from_jagged(ids, offsets),
        "flat": ids,
    }[kind]
    engine = EmbeddingEngine(
        {
            "item": EmbeddingOption(4, table="item"),
            "seen": EmbeddingOption(4, table="item", mode="unique"),
            "user": EmbeddingOption(2),
        }
    )
    found = engine({"item": torch.tensor([7, 8]), "seen": given, "user": torch.tensor([1, 2])})
    rows, inverse, bounds = found["seen"]
    assert inverse.flatten().tolist() == [0, 2, 0, 0, 1, 2]
    expected = {"dense": [0, 2, 4, 6], "flat": [0, 1, 2, 3, 4, 5, 6]}.get(kind, [0, 2, 2, 6])
    assert bounds.tolist() == expected
    assert inverse.shape == (given.shape if kind in ("dense", "flat") else (6,))
    assert torch.equal(rows[:2], found["item"])
    assert bounds.data_ptr() != offsets.data_ptr()
    assert engine.eval()({"seen": given})["seen"].rows.equal(rows)


def test_copies_and_changes_of_the_mode():
    """A deep copy looks up as the module does; the mode may be changed."""
    module = DynamicEmbedding(2, mode="unique", name="t")
    batch = torch.tensor([[4, 4, 2]])
    rows = module(batch).rows
    assert copy.deepcopy(module).eval()(batch).rows.equal(rows)
    module.mode = "none"
    assert torch.equal(module(batch), rows[torch.tensor([[1, 1, 0]])])
    empty = torch.empty(0, 5, dtype=torch.int64)
    module.mode = "unique"
    rows, inverse, offsets = module(empty)
    assert (rows.shape, inverse.shape, offsets.tolist()) == ((0, 2), (0, 5), [0])
    rows, inverse, offsets = module(torch.tensor(4))
    assert (rows.shape, inverse.shape, offsets.tolist()) == ((1, 2), (), [0, 1])


def test_weights_and_concat_are_refused():
    """The errors name the feature; nothing is inserted."""
    engine = EmbeddingEngine({"seen": EmbeddingOption(4, mode="unique")})
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match=r"seen: mode 'unique' .* takes no weights"):
        engine({"seen": (ids, torch.ones(1, 2))})
    with pytest.raises(ValueError, match="seen: mode 'unique' returns rows of distinct ids"):
        engine.concat({"seen": ids})
    assert len(engine.tables["seen"]) == 0
    unweighted = EmbeddingEngine({"seen": EmbeddingOption(4, mode="unique", use_weights=False)})
    assert unweighted({"seen": (ids, torch.ones(1, 2))})["seen"].rows.shape == (2, 4)
    with pytest.raises(ValueError, match="mode: expected 'none' or 'unique', got 'sum'; Dynamic"):
        DynamicEmbedding(4, mode="sum")


def test_a_compiled_module_looks_up_as_the_module_does():
    """In evaluation, where other modes are recorded."""
    module = DynamicEmbedding(2, mode="unique", name="compiled unique")
    batch = torch.tensor([[4, 4, 2]])
    rows = module(batch).rows
    module.eval()
    compiled = torch.compile(lambda ids: module(ids).rows * 2, backend="eager")
    assert torch.equal(compiled(batch), rows * 2)


@pytest.mark.parametrize("admission", [None, MinCount(3)])
def test_two_ranks_train_as_one(ranks, admission):
    """Owners count the occurrences of all ranks; rows equal those of repeated ids."""
    (alone,) = ranks.run(1, train_on_ranks, "none", admission)
    both = ranks.run(2, train_on_ranks, "unique", admission)
    merged = {i: row for part in both for i, row in part.items()}
    assert merged.keys() == alone.keys()
    for i, row in alone.items():
        torch.testing.assert_close(torch.tensor(merged[i]), torch.tensor(row))
