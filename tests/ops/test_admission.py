"""Admission checks of lookups whose positions stand for several occurrences."""

import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.admission import BloomCount, MinCount, Probability
from recis_lightning.ops import backend as ops_backend
from recis_lightning.ops import hash_index
from recis_lightning.ops.layout import CHECK_ADMISSION, SEGMENT_FLAGS
from tests.helpers.sample_tables import EXTREMES, same


def look_up(table, ids, occurrences):
    """Look ids up in training, each with a number of occurrences; return their rows."""
    segments = table.storage.segments(ids, insert=True)
    segments[0, SEGMENT_FLAGS] |= CHECK_ADMISSION
    rows, _ = hash_index.find_or_insert(
        segments, ids.numel(), [table.storage], [0], table.device, occurrences=occurrences
    )
    return rows


def test_positions_may_stand_for_several_occurrences(backend):
    """Deduplicated ids count all their occurrences; per batch they count once."""
    for per, expected in (("occurrence", [7]), ("batch", [])):
        table = HashTable(2, admission=MinCount(3, per=per), name="t")
        rows = look_up(table, torch.tensor([5, 7, 8]), torch.tensor([2, 3, 1]))
        assert table.ids().tolist() == expected
        assert (rows >= 0).tolist() == [False, bool(expected), False]
        assert table.statistics().refused == 3 + (0 if expected else 3)


@pytest.mark.parametrize(
    "admission",
    [
        MinCount(3),
        MinCount(2, per="batch"),
        BloomCount(3, 201, 3),
        BloomCount(3, 1600, 2),
        Probability(0.5),
    ],
)
def test_backends_agree_with_the_reference(kernels, admission):
    """Ids, rejections and counts agree, with collisions in the sketch and several occurrences."""
    states = []
    for name in ("reference", kernels):
        with ops_backend.use(name):
            generator = torch.Generator().manual_seed(3)
            table = HashTable(2, admission=admission, name="t")
            for _ in range(3):
                ids = torch.cat([EXTREMES, torch.randint(0, 40, (60,), generator=generator)])
                look_up(table, ids, torch.randint(1, 4, ids.shape, generator=generator))
            counts = table.storage.admission_counter.state()
            states.append({**counts, "ids": table.ids(), "refused": table.statistics().refused})
    wanted, ours = states
    assert wanted["refused"] > 0
    assert len(wanted["ids"])
    assert same(ours, wanted)
