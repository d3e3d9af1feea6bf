import numpy as np
import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.initializers import Normal
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import embedding_bag
from recis_lightning.ops.embedding_bag import gather_rows, write_rows_
from recis_lightning.ops.layout import PADDING, UNKNOWN
from tests.helpers.gather_plans import Feature, mixed_features, ragged_offsets, random_rows
from tests.helpers.sample_tables import insert_initial

DIMS = [1, 2, 3, 7, 8, 10, 16, 24, 33, 64, 128]
NAN = float("nan")
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (2**-7, 1e-6)}


def _table(dim, dtype=torch.float32, num_rows=500, state=0):
    """Return a table whose row r has id r, so that rows are known without a lookup."""
    table = HashTable(dim, dtype=dtype, initializer=Normal(), name=f"{dim}")
    if state:
        table.storage.rows.relayout({"state": state}, 0.0)
    insert_initial(table, torch.arange(num_rows))
    return table


def _gather(*features):
    table = features[0].table
    plan = np.stack([feature.line() for feature in features])
    embedding_bag.gather(plan, table.embedding_dim, table.dtype, table.device)
    return [feature.output() for feature in features]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.slow_except(
    dict(kernels="cpu", dtype=torch.float32), dict(dim=[7, 64]), dict(dim=1, dtype=torch.float32)
)
def test_kernels_agree_with_the_reference(kernels, dim, dtype):
    """All modes, layouts, weights and holes in one call give the reference's outputs."""
    table = _table(dim, dtype, state=3)
    outputs = {}
    num_bags = 300 if kernels == "cpu" else 30
    for name in ("reference", kernels):
        generator = torch.Generator().manual_seed(dim)
        with ops_backend.use(name):
            outputs[name] = _gather(*mixed_features(table, generator, num_bags))
    rtol, atol = TOLERANCE[dtype]
    for ours, wanted in zip(outputs[kernels], outputs["reference"], strict=True):
        assert not wanted.isnan().any()
        torch.testing.assert_close(ours, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dim", [1, 7, 16])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.slow_except(
    dict(backend=["reference", "cpu"]),
    dict(mode="sum", ragged=False, dim=[1, 16]),
    dict(mode="mean", ragged=True, dim=[1, 16]),
    dict(mode="sum", ragged=True, dim=7),
    dict(mode="mean", ragged=False, dim=7),
)
def test_bags_are_those_of_torch(backend, dim, mode, ragged):
    """``nn.EmbeddingBag`` over the same rows pools to the same values, padding included."""
    generator = torch.Generator().manual_seed(dim)
    table = _table(dim)
    weight = table.storage.rows.read(torch.arange(500))[0]
    offsets = ragged_offsets(generator, 50) if ragged else torch.arange(51) * 6
    ids = torch.randint(0, 20, (int(offsets[-1]),), generator=generator)
    rows = torch.where(ids == 3, PADDING, ids)
    theirs = torch.nn.functional.embedding_bag(
        ids, weight, offsets, mode=mode, include_last_offset=True, padding_idx=3
    )
    length, bounds = (-1, offsets) if ragged else (6, None)
    (ours,) = _gather(Feature(table, rows, mode, length, bounds))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_weighted_sums_are_those_of_torch(backend):
    """``per_sample_weights`` multiply rows before they are added."""
    generator = torch.Generator().manual_seed(0)
    table, offsets = _table(8), ragged_offsets(generator, 50)
    weight = table.storage.rows.read(torch.arange(500))[0]
    rows = random_rows(generator, int(offsets[-1]), holes=False)
    weights = torch.randn(rows.numel(), generator=generator)
    theirs = torch.nn.functional.embedding_bag(
        rows, weight, offsets, mode="sum", include_last_offset=True, per_sample_weights=weights
    )
    (ours,) = _gather(Feature(table, rows, "sum", offsets=offsets, weights=weights))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_without_pooling_are_exact_copies(backend):
    """``none`` and ``gather_rows`` copy bit by bit, and give zeros for negative rows."""
    generator = torch.Generator().manual_seed(0)
    for dim in DIMS:
        table = _table(dim)
        weight = table.storage.rows.read(torch.arange(500))[0]
        rows = random_rows(generator, 700)
        wanted = torch.where((rows >= 0)[:, None], weight[rows.clamp(min=0)], 0)
        assert torch.equal(_gather(Feature(table, rows, "none"))[0], wanted)
        assert torch.equal(gather_rows(table.storage.header, rows, dim, torch.float32), wanted)


def test_means_count_unknown_ids_but_no_padding(backend):
    """An unknown id pulls a mean towards zero; a bag of nothing but padding is zero."""
    table = _table(2)
    first, second = table.storage.rows.read(torch.arange(2))[0]
    rows = torch.tensor([0, 1, UNKNOWN, PADDING, PADDING, PADDING, UNKNOWN])
    offsets = torch.tensor([0, 2, 4, 6, 6, 7])
    (pooled,) = _gather(Feature(table, rows, "mean", offsets=offsets))
    zero = torch.zeros(2)
    torch.testing.assert_close(pooled, torch.stack([(first + second) / 2, zero, zero, zero, zero]))
    rows = torch.tensor([0, 1, UNKNOWN, PADDING])
    weights = torch.tensor([1.0, 2.0, 5.0, 100.0])
    (pooled,) = _gather(Feature(table, rows, "mean", 4, weights=weights))
    torch.testing.assert_close(pooled[0], (first + 2 * second) / 8)


def test_means_by_count_divide_by_the_number_of_ids(backend):
    """Weights multiply rows, and the divisor is the number of ids that are not padding."""
    table = _table(2)
    first, second = table.storage.rows.read(torch.arange(2))[0]
    rows = torch.tensor([0, 1, UNKNOWN, PADDING])
    weights = torch.tensor([1.0, 2.0, 5.0, 100.0])
    (pooled,) = _gather(Feature(table, rows, "mean_by_count", 4, weights=weights))
    torch.testing.assert_close(pooled[0], (first + 2 * second) / 3)
    weights = torch.tensor([0.5, -0.5])
    (pooled,) = _gather(Feature(table, torch.arange(2), "mean_by_count", 2, weights=weights))
    torch.testing.assert_close(pooled[0], (first - second) / 4)
    (pooled,) = _gather(Feature(table, rows, "mean_by_count", 4))
    torch.testing.assert_close(pooled[0], (first + second) / 3)


def test_weights_that_add_up_to_nothing_give_zeros(backend):
    """A weighted mean over a total of zero is zero, not NaN."""
    table = _table(3)
    weights = torch.tensor([0.0, 0.0, 1.0, -1.0])
    (pooled,) = _gather(Feature(table, torch.arange(4), "mean", 2, weights=weights))
    assert torch.equal(pooled, torch.zeros(2, 3))


def test_tiles_stand_side_by_side(backend):
    """Short bags are padded with zeros, long bags are cut, and ids without a row give zeros."""
    table = _table(2)
    weight = table.storage.rows.read(torch.arange(500))[0]
    rows = torch.tensor([5, 6, 7, 8, 9, PADDING, 4])
    offsets = torch.tensor([0, 4, 4, 5, 7])
    (tiles,) = _gather(Feature(table, rows, "tile", offsets=offsets, tile_len=3, gap=1))
    zero = torch.zeros(2)
    wanted = [weight[5], weight[6], weight[7], zero, zero, zero]
    wanted += [weight[9], zero, zero, zero, weight[4], zero]
    assert torch.equal(tiles.reshape(-1, 2), torch.stack(wanted))


def test_long_bags_and_many_bags(backend):
    """One bag of 5,000 ids beside 5,000 bags of one id: the split of the work changes no result."""
    count = 5000 if backend != "triton" else 200  # interpreted, each id of a bag takes a while
    table = _table(10)
    weight = table.storage.rows.read(torch.arange(500))[0].double()
    generator = torch.Generator().manual_seed(0)
    rows = random_rows(generator, count, holes=False)
    offsets = torch.cat([torch.zeros(count // 2), torch.full((count // 2,), count)]).long()
    sums, single, late = _gather(
        Feature(table, rows, "sum", count),
        Feature(table, rows, "sum", 1),
        Feature(table, rows, "mean", offsets=offsets),
    )
    assert torch.equal(single, weight[rows].float())
    total = weight[rows].sum(0)
    torch.testing.assert_close(sums[0].double(), total, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(late[count // 2 - 1].double(), total / count, rtol=1e-4, atol=1e-6)
    assert late.count_nonzero() == 10


def test_nothing_to_do_is_done(backend):
    """No ids, no bags and only empty bags are legal, alone and beside other features."""
    table, empty = _table(3), torch.empty(0, dtype=torch.int64)
    nothing = [
        Feature(table, empty, "none"),
        Feature(table, empty, "sum", offsets=torch.zeros(1, dtype=torch.int64)),
        Feature(table, empty, "mean", offsets=torch.zeros(6, dtype=torch.int64)),
        Feature(table, empty, "tile", offsets=torch.zeros(3, dtype=torch.int64), tile_len=4),
        Feature(table, empty, "sum", 4),
        Feature(table, torch.arange(0), "tile", 3, tile_len=0),
    ]
    for feature in nothing:
        assert not _gather(feature)[0].any()
    outputs = _gather(*nothing[:3], Feature(table, torch.arange(4), "sum", 2), *nothing[3:])
    assert [tuple(out.shape) for out in outputs[:3]] == [(0, 3), (0, 3), (5, 3)]
    assert not torch.cat([out.flatten() for out in outputs[:3] + outputs[4:]]).any()
    weight = table.storage.rows.read(torch.arange(4))[0]
    torch.testing.assert_close(outputs[3], weight.reshape(2, 2, 3).sum(1))
    assert gather_rows(table.storage.header, empty, 3, torch.float32).shape == (0, 3)


@pytest.mark.parametrize(
    "offsets",
    [
        [1, 4, 10],
        [0, 4, 9],
        [0, 4, 11],
        [0, 7, 4, 10],
        [0, -1, 10],
        [0, 2**62, 10],
        [0, -(2**63), 10],
        [-1, 10],
        [10],
        [0],
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["sum", "mean", "tile"])
@pytest.mark.slow_except(
    dict(backend=["reference", "cpu"]), dict(mode="mean"), dict(offsets=[[0, 4, 11]])
)
def test_malformed_offsets_are_refused(backend, offsets, mode):
    """Offsets that do not ascend from 0 to the number of ids raise; nothing outside is read."""
    table = _table(4)
    good = Feature(table, torch.arange(10), "sum", 5)
    bad = Feature(table, torch.arange(10), mode, offsets=torch.tensor(offsets), tile_len=2)
    with pytest.raises(ValueError, match=r"offsets: .* feature number 1 .* 10"):
        _gather(good, bad, good)


def test_rows_of_many_blocks(backend):
    """Rows far apart, in blocks that were allocated at different times, are found."""
    table = HashTable(64, initializer=Normal())
    for batch in torch.arange(6000).split(1000):
        insert_initial(table, batch)
    assert len(table.storage.rows.addresses) > 4
    rows = torch.tensor([0, 5999, 1023, 1024, 4095, 3000])
    copies = gather_rows(table.storage.header, rows, 64, torch.float32)
    fresh = HashTable(64, initializer=Normal())
    insert_initial(fresh, rows)
    assert torch.equal(copies, fresh.embeddings(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 3, 8, 33])
@pytest.mark.slow_except(
    dict(backend=["reference", "cpu"]),
    dict(dim=[1, 8], dtype=torch.float32),
    dict(dim=[3, 33], dtype=torch.bfloat16),
)
def test_write_rows_overwrites_the_front(backend, dim, dtype):
    """The weights of the named rows change, bit by bit; their state and other rows do not."""
    table = _table(dim, dtype, num_rows=3000, state=2)
    everything = torch.arange(3000)
    weights, slots = table.storage.rows.read(everything)
    rows = torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:1500]
    values = torch.randn(1500, dim).to(dtype)
    values[0] = NAN
    write_rows_(table.storage.header, rows, values)
    weights[rows] = values
    after, slots_after = table.storage.rows.read(everything)
    torch.testing.assert_close(after, weights, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(slots_after["state"], slots["state"])
    write_rows_(table.storage.header, rows[:0], values[:0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_behind_a_row_on_a_gpu_is_not_reckoned_with(dtype):
    """Four words are loaded at once, also those that no weight fills."""
    with ops_backend.use("triton"):
        table = _table(5, dtype)
        rows = table.storage.rows
        for allocation in map(np.asarray, rows._allocations):
            words = allocation.reshape(-1)[: rows.capacity * rows.row_words]
            words.reshape(-1, rows.row_words)[:, rows.weight_words :] = np.inf
        outputs = _gather(*mixed_features(table, torch.Generator().manual_seed(5), 8))
    assert all(output.isfinite().all() for output in outputs)
