"""Batch: what an update reads later is a copy, and malformed offsets are found."""

import pytest
import torch

from recis_lightning import (
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    hash_tables,
)
from recis_lightning.initializers import Constant
from recis_lightning.jagged import FeatureBags, read_bags
from recis_lightning.lookup.batch import join_offsets, malformed_feature
from recis_lightning.lookup.features import Feature, FeatureLayout
from recis_lightning.optim import SparseDenseOptimizer, SparseSGD
from recis_lightning.table.hash_table import HashTable

IDS = torch.tensor([5, 6, 5, 9, 7])
OFFSETS = torch.tensor([0, 2, 2, 5])


def engine_of(mode):
    option = {"initializer": Constant(0.0), "mode": mode, "tile_len": 2 if mode == "tile" else None}
    return EmbeddingEngine({name: EmbeddingOption(4, **option) for name in "ab"})


def rows_after(mode, overwrite, when):
    engine = engine_of(mode)
    optimizer = SparseSGD(hash_tables(engine), lr=1.0)
    buffers = {
        name: Jagged(IDS.clone(), OFFSETS.clone(), torch.arange(1.0, 6.0) * scale)
        for name, scale in zip("ab", (1, 10), strict=True)
    }
    out = engine(buffers)
    parts = [part.values if isinstance(part, Jagged) else part for part in out.values()]
    loss = sum((part * torch.arange(1.0, 1 + len(part))[:, None]).sum() for part in parts)
    if when == "before backward":
        overwrite(buffers)
    loss.backward()
    if when == "before step":
        overwrite(buffers)
    optimizer.step()
    return [table.embeddings(IDS) for table in hash_tables(engine)]


def overwrite(buffers):
    """Load the next batch into the same buffers."""
    for ids, offsets, weights in buffers.values():
        ids.fill_(77)
        offsets.fill_(1 << 40)
        weights.fill_(1000)


@pytest.mark.parametrize("mode", ["none", "sum", "mean", "tile"])
@pytest.mark.parametrize("when", ["before backward", "before step"])
def test_a_loader_may_reuse_its_buffers(mode, when):
    """Ids, offsets and weights are those of the lookup."""
    expected = rows_after(mode, lambda buffers: None, when)
    for mine, its in zip(rows_after(mode, overwrite, when), expected, strict=True):
        assert torch.equal(mine, its)
        assert (its != 0).any()


def test_learned_weights_step_before_the_table():
    """SparseDenseOptimizer changes the weights first; the table's gradient is of the old ones."""
    bag = DynamicEmbeddingBag(2, mode="sum", initializer=Constant(1.0), name="learned")
    weights = torch.nn.Parameter(torch.full((5,), 2.0))
    optimizer = SparseDenseOptimizer(
        torch.optim.SGD([weights], lr=1.0), SparseSGD([bag.table], lr=1.0)
    )
    bag(torch.arange(5), torch.tensor([0, 2]), weights).sum().backward()
    optimizer.step()
    assert torch.equal(weights.detach(), torch.zeros(5))  # 2 - 1 * (1 + 1)
    assert (bag.table.embeddings(torch.arange(5)) == -1).all()  # 1 - 1 * 2


def test_gradients_of_weights_are_of_the_lookup():
    """Bags and weights that the caller overwrote before backward count as they were."""
    bag = DynamicEmbeddingBag(2, mode="sum", initializer=Constant(3.0), include_last_offset=True)
    offsets, weights = OFFSETS.clone(), torch.ones(5, requires_grad=True)
    out = bag(IDS, offsets, weights)
    offsets.zero_()
    with torch.no_grad():
        weights.zero_()
    (out * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert weights.grad.tolist() == [6, 6, 600, 600, 600]


@pytest.mark.parametrize(
    ("offsets", "malformed"),
    [
        ([[0, 2, 5], [0, 5], [0, 0, 5]], None),
        ([[0, 5, 5], [0, 5], [0, 5]], None),
        ([[1, 5], [0, 5], [0, 5]], 0),
        ([[0, 5], [0, 4], [0, 5]], 2),
        ([[0, 5], [0, 5], [0, 3, 2, 5]], 3),
        ([[0, 5], [0, 6, 5], [0, 5]], 2),
        ([[0, -1, 5], [0, 5], [0, 5]], 0),
    ],
)
def test_malformed_offsets_are_found(offsets, malformed):
    """Of ragged features beside plain ones, whichever it is."""
    names = ["p", "q", "r", "s"]
    layout = FeatureLayout([Feature(name, HashTable(2, name=name), "sum") for name in names])
    ragged = [Jagged(IDS, torch.tensor(part)) for part in offsets]
    given = [ragged[0], IDS, ragged[1], ragged[2]]
    bags = FeatureBags.of(list(map(read_bags, given, names)))
    lines = layout.lines_for(bags)
    assert lines is layout.lines_for(bags)
    assert malformed_feature(join_offsets(bags, lines), lines) == malformed
