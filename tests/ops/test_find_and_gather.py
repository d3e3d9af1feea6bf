"""Finding and gathering in one pass, compared with the two ops one after the other."""

import numpy as np
import pytest
import torch

from recis_lightning import DynamicEmbedding, HashTable
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.initializers import Normal
from recis_lightning.ops import backend, embedding_bag, hash_index
from recis_lightning.ops.layout import PADDING, SEGMENT_SIZE, UNKNOWN
from recis_lightning.table.segment import write_segment
from tests.helpers.gather_plans import Feature, mixed_features, ragged_offsets
from tests.helpers.sample_tables import insert_initial

CPU = torch.device("cpu")
LOWEST = -(2**63)
PADDING_ID, UNKNOWN_ID = 10**9, 10**9 + 1


def _table(dim, dtype=torch.float32):
    table = HashTable(
        dim, dtype=dtype, initializer=Normal(), eviction=GlobalStepFilter(5), name="user"
    )
    insert_initial(table, torch.cat([torch.tensor([LOWEST]), torch.arange(1, 500) * 77]))
    table.update_step(3)
    return table


def _ids(table, rows):
    """Return ids that have these rows."""
    known = table.ids()[rows.clamp(min=0)]
    known[rows == PADDING] = PADDING_ID
    known[rows == UNKNOWN] = UNKNOWN_ID
    return known


def _described(table, features, ids, insert):
    segments = np.zeros((len(features), SEGMENT_SIZE), np.int64)
    for line in segments:
        write_segment(line, table, insert, PADDING_ID)
    hash_index.describe(segments, ids)
    return segments, np.stack([feature.line() for feature in features])


def _in_one_pass(table, features, training):
    """Return the number of misses; rows and outputs are written to the features."""
    ids = [_ids(table, feature.rows) for feature in features]
    segments, plan = _described(table, features, ids, training)
    for feature in features:
        feature.rows.fill_(-99)
    layout = (table.embedding_dim, table.dtype, CPU)
    return embedding_bag.find_and_gather(plan, segments, training, *layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 128])
@pytest.mark.parametrize("num_bags", [0, 3, 700])
def test_outputs_and_rows_are_those_of_the_two_ops(dim, dtype, num_bags):
    """All modes, layouts, weights and holes agree bit by bit; reading leaves last-seen steps."""
    _compare(dim, dtype, num_bags)


@pytest.mark.interpreted
@pytest.mark.parametrize(("dim", "num_bags"), [(1, 3), (7, 0), (33, 60), (300, 5), (16, 5000)])
@pytest.mark.slow_except(dict(dim=[1, 7, 33]))
def test_triton_finds_and_gathers_in_one_launch(dim, num_bags):
    """As above; the last case has several programs, and several tiles in each."""
    dtype = torch.bfloat16 if dim == 33 else torch.float32
    with backend.use("triton"):
        _compare(dim, dtype, num_bags)


def _compare(dim, dtype, num_bags):
    table = _table(dim, dtype)
    both = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(dim)
        both.append(mixed_features(table, generator, num_bags))
    together, apart = both
    plan = np.stack([feature.line() for feature in apart])
    embedding_bag.gather(plan, dim, dtype, CPU)
    stamps = table.last_seen(table.ids())
    assert _in_one_pass(table, together, False) == 0
    for one, two in zip(together, apart, strict=True):
        assert torch.equal(one.rows, two.rows)
        assert torch.equal(one.output(), two.output())
    assert torch.equal(table.last_seen(table.ids()), stamps)


def test_training_stamps_what_it_finds_and_counts_what_it_misses():
    """Rows found carry the table's step; ids to insert are counted once an occurrence."""
    table = _table(8)
    rows = torch.tensor([0, 5, 5, UNKNOWN, PADDING, UNKNOWN, 499])
    offsets = torch.tensor([0, 3, 3, 7])
    features = [Feature(table, rows.clone(), "sum", offsets=offsets), Feature(table, rows, "none")]
    assert _in_one_pass(table, features, True) == 4
    seen = table.storage.columns["last_seen"][: table.storage.rows.num_rows]
    assert (seen == 3).nonzero().squeeze(1).tolist() == [0, 5, 499]
    assert len(table) == 500


def test_many_ids_in_one_feature():
    """Chunks of a long feature do not lose an id at their ends."""
    table = _table(4)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 500, (70_001,), generator=generator)
    feature = Feature(table, rows.clone(), "none")
    assert _in_one_pass(table, [feature], False) == 0
    assert torch.equal(feature.rows, rows)
    assert torch.equal(feature.output(), table.storage.rows.read(torch.arange(500))[0][rows])


@pytest.mark.parametrize("bad", ["descends", "starts late", "ends early"])
def test_malformed_offsets_are_refused(bad, kernels):
    """No bag is pooled over ids that were not found."""
    with backend.use(kernels):
        table, generator = _table(8), torch.Generator().manual_seed(0)
        num_bags = 3000 if kernels == "cpu" else 60
        offsets = ragged_offsets(generator, num_bags)
        rows = torch.randint(0, 500, (int(offsets[-1]),), generator=generator)
        place, value = {
            "descends": (num_bags // 2, 0),
            "starts late": (0, 1),
            "ends early": (-1, 2),
        }[bad]
        offsets[place] = value
        with pytest.raises(ValueError, match="offsets: of the call's feature number 0"):
            _in_one_pass(table, [Feature(table, rows, "sum", offsets=offsets)], False)


def test_a_lookup_tries_one_pass_once_all_ids_are_known():
    """A training lookup with an unknown id inserts it, whether or not the last one had any."""
    module = DynamicEmbedding(4, name="user")
    lookups = [torch.arange(5), torch.arange(5), torch.arange(7), torch.arange(9), torch.arange(9)]
    for ids in lookups:
        out = module(ids)
        assert torch.equal(out, module.table.embeddings(ids))
        assert len(module.table) == int(ids.max()) + 1
