"""Deduplication: each id of each table once, by owner, whichever way it is found."""

import numpy as np
import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.lookup import dedup
from recis_lightning.lookup.features import Feature, FeatureLayout
from recis_lightning.ops.layout import PADDING

LEAST, MOST = -(2**63), 2**63 - 1


def deduplicate(layout, ids, num_ranks, monkeypatch, by_sorting):
    """Return what a deduplicator finds that sorts always, or never."""
    monkeypatch.setattr(dedup, "IDS_OF_TABLE", 1 << 20 if by_sorting else 0)
    found = dedup.Deduplicator(
        layout.training,
        layout.segment_sources,
        len(layout.sources),
        num_ranks,
        layout.device,
    ).deduplicate(ids)
    return found.ids.tolist(), found.counts.tolist(), found.inverse.tolist()


@pytest.fixture
def layout():
    """Four features of three tables: one has a padding id, two share a table, one reads only."""
    tables = [HashTable(2, name=name) for name in ("one", "two", "three")]
    return FeatureLayout(
        [
            Feature("a", tables[0], "none", padding_idx=LEAST),
            Feature("b", tables[1], "none"),
            Feature("c", tables[0], "none"),
            Feature("d", tables[2], "sum", padding_idx=7),
        ]
    )


@pytest.mark.parametrize("num_ranks", [1, 3, 16384])
@pytest.mark.parametrize("sizes", [(0, 0, 0, 0), (0, 1, 0, 0), (9, 40, 0, 13), (50, 50, 50, 50)])
def test_sorting_finds_what_an_index_does(layout, sizes, num_ranks, monkeypatch):
    """Ids, their order, their counts and the inverse are the same."""
    generator = torch.Generator().manual_seed(sum(sizes))
    choice = torch.tensor([LEAST, MOST, -1, 0, 7, 8, *range(100, 120)])
    ids = [choice[torch.randint(len(choice), (n,), generator=generator)] for n in sizes]
    one = deduplicate(layout, ids, num_ranks, monkeypatch, by_sorting=True)
    other = deduplicate(layout, ids, num_ranks, monkeypatch, by_sorting=False)
    assert one == other


def test_only_padding(layout, monkeypatch):
    """Then there is no id."""
    ids = [torch.tensor([LEAST, LEAST]), *torch.empty(2, 0, dtype=torch.int64), torch.tensor([7])]
    found, counts, inverse = deduplicate(layout, ids, 2, monkeypatch, by_sorting=True)
    assert (found, counts) == ([], [[0, 0, 0]] * 2)
    assert inverse == [PADDING] * 3


def test_the_inverse_leads_to_the_id(layout, monkeypatch):
    """Each position's id is that at its inverse, among the ids of its table."""
    ids = [torch.arange(5) % 3 + start for start in (10, 10, 11, 50)]
    found, counts, inverse = deduplicate(layout, ids, 2, monkeypatch, by_sorting=True)
    assert [found[i] for i in inverse] == torch.cat(ids).tolist()
    assert np.array(counts).sum(0).tolist() == [4, 3, 3]
    assert len(found) == 10


def test_first_occurrences_of_many_tables():
    """The table counts, beyond 16 bits as well."""
    ids = np.zeros(70_000, np.int64)
    tables = np.arange(70_000)[::-1].copy()
    labels = dedup.first_occurrences(np.append(ids, 0), np.append(tables, 0), 70_000)
    assert (labels[:-1] == np.arange(70_000)).all()
    assert labels[-1] == 69_999
