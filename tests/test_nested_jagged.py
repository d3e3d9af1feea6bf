"""NestedJagged: ragged features of two levels, pooled over the inner one."""

import pickle

import pytest
import torch

from recis_lightning import (
    DynamicEmbeddingBag,
    EmbeddingEngine,
    EmbeddingOption,
    Jagged,
    NestedJagged,
    hash_tables,
)
from recis_lightning.callbacks.empty_batch import without_samples
from recis_lightning.initializers import Constant
from recis_lightning.optim import SparseSGD
from tests.helpers.rank_nested import rows_after_a_step

# Samples of bags: [[1, 2], []], none, [[3]], [[1, 1, 4]].
IDS = torch.tensor([1, 2, 3, 1, 1, 4])
LENGTHS = torch.tensor([2, 0, 1, 3])
OUTER_LENGTHS = torch.tensor([2, 0, 1, 1])
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, -1.0])
OFFSETS, OUTER = torch.tensor([0, 2, 2, 3, 6]), torch.tensor([0, 2, 2, 3, 4])
BAGS = [[1, 2], [], [3], [1, 1, 4]]


def nested(weights=None):
    return NestedJagged.from_lengths(IDS, LENGTHS, OUTER_LENGTHS, weights)


def filled(dim=2):
    """Return a bag whose row of id i is i, 10 i."""
    bag = DynamicEmbeddingBag(dim, mode="sum", initializer=Constant(0.0), name="bag")
    ids = torch.arange(1, 5)
    bag.table.insert(ids, torch.stack([ids.float(), 10.0 * ids], 1))
    return bag


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lengths_make_offsets(dtype):
    made = NestedJagged.from_lengths(IDS, LENGTHS.to(dtype), OUTER_LENGTHS.to(dtype), WEIGHTS)
    assert torch.equal(made.offsets, OFFSETS)
    assert torch.equal(made.outer_offsets, OUTER)
    assert torch.equal(made.lengths(), OUTER_LENGTHS)
    assert (made.num_bags, made.inner().num_bags) == (4, 4)
    assert torch.equal(made.inner().weights, WEIGHTS)


def test_lengths_that_do_not_fit_are_refused():
    for lengths, outer, error, words in [
        (LENGTHS[:3], OUTER_LENGTHS, ValueError, "^lengths: expected none negative and a sum of 6"),
        (
            LENGTHS,
            OUTER_LENGTHS[:2],
            ValueError,
            "^outer_lengths: expected .* a sum of 4",
        ),
        (LENGTHS, OUTER_LENGTHS.float(), TypeError, "^outer_lengths: "),
    ]:
        with pytest.raises(error, match=words):
            NestedJagged.from_lengths(IDS, lengths, outer)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "tile", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_the_engine_pools_the_inner_level(mode, weighted, training):
    """As it does the inner bags alone; what is around them stays."""
    option = EmbeddingOption(3, mode=mode, tile_len=2 if mode == "tile" else None)
    engine = EmbeddingEngine({"item": option, "user": EmbeddingOption(3)})
    given = nested(WEIGHTS if weighted else None)
    batch = {"item": given, "user": torch.arange(4), "other": 5}
    engine(batch)
    engine.train(training)
    out = engine(batch)
    expected = engine({**batch, "item": given.inner()})
    if mode == "none":
        assert isinstance(out["item"], NestedJagged)
        assert torch.equal(out["item"].values, expected["item"].values)
        assert torch.equal(out["item"].offsets, OFFSETS)
    else:
        assert isinstance(out["item"], Jagged)
        assert torch.equal(out["item"].values, expected["item"])
        assert out["item"].values.shape == (4, 6 if mode == "tile" else 3)
    assert torch.equal(out["item"][-2 if mode == "none" else 1], OUTER)
    assert torch.equal(out["user"], expected["user"])
    assert (list(out), out["other"]) == (["item", "user", "other"], 5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_bag_pools_the_inner_level(dtype):
    given = NestedJagged(*(part.to(dtype) for part in nested()[:3]), WEIGHTS)
    out = filled()(given)
    sums = [[5.0, 50.0], [0.0, 0.0], [1.5, 15.0], [0.0, 0.0]]
    assert out.values.tolist() == sums
    assert torch.equal(out.offsets, OUTER)
    values, mask = out.to_padded(value=9.0)
    assert values.tolist() == [
        sums[:2],
        [[9.0, 9.0]] * 2,
        [sums[2], [9.0] * 2],
        [sums[3], [9.0] * 2],
    ]
    assert mask.tolist() == [[True, True], [False, False], [True, False], [True, False]]


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_gradients_reach_rows_and_weights(mode):
    """Those of nn.EmbeddingBag over the inner bags."""
    engine = EmbeddingEngine({"item": EmbeddingOption(2, mode=mode, initializer=Constant(0.5))})
    weights = WEIGHTS.clone().requires_grad_()
    out = engine({"item": nested(weights)})["item"]
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    (out.values * scale).sum().backward()
    SparseSGD(hash_tables(engine), lr=1.0).step()
    rows = torch.full((5, 2), 0.5, requires_grad=True)
    mine = WEIGHTS.clone().requires_grad_()
    pooled = []
    for ids, part in zip(BAGS, mine.split(LENGTHS.tolist()), strict=True):
        total = (rows[ids] * part.unsqueeze(1)).sum(0)
        pooled.append(total / part.sum() if mode == "mean" and ids else total)
    (torch.stack(pooled) * scale).sum().backward()
    got = engine.tables["item"].embeddings(torch.arange(1, 5))
    torch.testing.assert_close(got, (rows - rows.grad)[1:].detach())
    torch.testing.assert_close(weights.grad, mine.grad)


def test_empty_levels():
    """No samples, samples without bags, bags without ids."""

    def numbers(values):
        return torch.tensor(values, dtype=torch.int64)

    for lengths, outer in (([], []), ([], [0, 0]), ([0, 0, 0], [1, 2]), ([0], [0, 1, 0])):
        given = NestedJagged.from_lengths(numbers([]), numbers(lengths), numbers(outer))
        out = filled()(given)
        assert out.values.tolist() == [[0.0, 0.0]] * len(lengths)
        assert out.lengths().tolist() == outer
        assert given.to_padded(2, 3)[0].shape == (len(outer), 2, 3)
        out.values.sum().backward()


def test_padding_of_both_levels():
    values, mask = nested().to_padded(value=-1)
    assert values.shape == mask.shape == (4, 2, 3)
    assert values[0].tolist() == [[1, 2, -1], [-1, -1, -1]]
    assert values[3].tolist() == [[1, 1, 4], [-1, -1, -1]]
    assert mask.sum().item() == 6
    assert nested().to_padded(1, 2)[0].tolist() == [[[1, 2]], [[0, 0]], [[3, 0]], [[1, 1]]]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (torch.tensor([3, 0, 3]), [[[1, 1, 4]], [[1, 2], []], [[1, 1, 4]]]),
        (slice(1, 3), [[], [[3]]]),
        (slice(0, 0), []),
        (torch.tensor([True, False, False, True]), [[[1, 2], []], [[1, 1, 4]]]),
    ],
)
def test_samples(samples, expected):
    found = nested(WEIGHTS).select(samples)
    bags = [bag.tolist() for bag in found.values.split(found.inner().lengths().tolist())]
    counts = found.lengths().tolist()
    assert [[bags.pop(0) for _ in range(count)] for count in counts] == expected
    assert found.weights.numel() == found.values.numel()


def test_it_moves_and_is_a_plain_tuple():
    moved = nested(WEIGHTS).to("meta")
    assert {part.device.type for part in moved} == {"meta"}
    assert nested().to("meta").weights is None
    copy = pickle.loads(pickle.dumps(nested(WEIGHTS)))
    assert isinstance(copy, NestedJagged)
    assert torch.equal(copy.outer_offsets, OUTER)
    assert without_samples({"item": nested(WEIGHTS)})["item"].num_bags == 0


def test_outer_offsets_that_do_not_fit_change_nothing():
    engine = EmbeddingEngine({"item": EmbeddingOption(2, mode="sum")})
    for outer, error, words in [
        (
            torch.tensor([0, 2, 3]),
            ValueError,
            "ascending numbers from 0 to 4, .* up to 3$",
        ),
        (torch.tensor([1, 4]), ValueError, "item.outer_offsets: expected ascending"),
        (torch.tensor([0, 3, 2, 4]), ValueError, "item.outer_offsets: expected ascending"),
        (torch.tensor(0), ValueError, r"item.outer_offsets: expected shape \[B \+ 1\]"),
        (torch.tensor([0.0, 4.0]), TypeError, "item.outer_offsets"),
    ]:
        with pytest.raises(error, match=words):
            engine({"item": NestedJagged(IDS, OFFSETS, outer)})
    with pytest.raises(TypeError, match=r"item: .* got NestedJagged"):
        engine.concat({"item": nested()})
    assert len(engine.tables["item"]) == 0
    with pytest.raises(ValueError, match="offsets, per_sample_weights: expected None"):
        filled()(nested(), torch.tensor([0]))


def test_ranks_share_the_rows(ranks):
    """Two ranks with different samples, one without any: rows as one process has them."""
    one = rows_after_a_step(alone=True)
    for found in ranks.run(2, rows_after_a_step):
        torch.testing.assert_close(found, one)
