"""HashTable.survey: what it says of rows, by hand and whole."""

import math
from itertools import pairwise

import pytest
import torch

from recis_lightning import HashTable
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.table.scan import AGE_EDGES, NORM_EDGES
from tests.helpers.sample_tables import EXTREMES


def bin_of(edges, value):
    return max(place for place, edge in enumerate(edges) if edge <= value)


def counts(edges, values):
    found = [0] * (len(edges) - 1)
    for value in values:
        found[bin_of(edges, value)] += 1
    return found


def test_norms_and_rows_that_are_ruined(backend):
    table = HashTable(2, name="t")
    rows = [[3.0, 4.0], [0.0, 0.0], [math.nan, 1.0], [1.0, math.inf], [3e38, 3e38], [0.0, 1e-9]]
    table.insert(EXTREMES[:6], torch.tensor(rows))
    found = table.survey()
    assert found.num_rows == 6
    assert set(table.ids()[found.nonfinite_rows].tolist()) == set(EXTREMES[2:4].tolist())
    large = math.hypot(3e38, 3e38)
    assert found.norms == counts(NORM_EDGES, [5.0, 0.0, large, 1e-9])
    assert found.norm_max == pytest.approx(large, rel=1e-6)
    assert found.norm_sum == pytest.approx(large, rel=1e-6)
    assert (found.ages, found.age_sum, found.age_max) == (None, 0, 0)


def test_nan_in_optimizer_state_ruins_a_row(backend):
    table = HashTable(2, name="t")
    table.storage.set_slots({"exp_avg": 2, "exp_avg_sq": 2}, 0.0)
    table.insert(torch.arange(4), torch.ones(4, 2))
    weights, slots = table.storage.rows.read(torch.arange(4))
    slots["exp_avg_sq"][1, 1] = math.nan
    slots["exp_avg"][3, 0] = -math.inf
    slots["exp_avg"][0] = 3e38  # its sum overflows, and it is finite
    table.storage.rows.write(torch.arange(4), weights, slots)
    found = table.survey()
    assert found.nonfinite_rows.sort().values.tolist() == [1, 3]
    assert sum(found.norms) == 4
    assert found.norm_mean == pytest.approx(2**0.5)


def test_ages(backend):
    table = HashTable(2, eviction=GlobalStepFilter(100), name="t")
    for step, ids in ((0, [1, 2]), (3, [3]), (6, [4]), (7, [5, 6, 7])):
        table.update_step(step - table.step)
        table.insert(torch.tensor(ids), torch.ones(len(ids), 2))
    table.delete(torch.tensor([2]))
    found = table.survey()
    assert found.ages == counts(AGE_EDGES, [7, 4, 1, 0, 0, 0])
    assert found.ages[:5] == [3, 1, 0, 2, 0]
    assert (found.num_rows, found.age_sum, found.age_max) == (6, 12, 7)
    assert found.age_mean == 2.0


def test_parts_of_the_index_hold_each_id_once(backend, monkeypatch):
    monkeypatch.setattr("recis_lightning.table.scan._CHUNK_ENTRIES", 7)
    table = HashTable(1, name="t")
    ids = torch.cat([EXTREMES, torch.arange(100, 160)])
    table.insert(ids, torch.arange(1, len(ids) + 1)[:, None].float())
    ends = [0.0, 0.1, 0.5, 0.75, 1.0]
    parts = [table.survey(*span) for span in pairwise(ends)]
    assert sum(part.num_rows for part in parts) == len(ids)
    assert sum(part.norm_sum for part in parts) == table.survey().norm_sum == sum(range(70))
    assert max(part.num_rows for part in parts) < len(ids) / 2


def test_named_rows_only(backend):
    table = HashTable(1, name="t")
    table.insert(torch.arange(5), torch.tensor([[1.0], [2.0], [math.nan], [4.0], [5.0]]))
    found = table.survey(rows=torch.tensor([-1, 0, 3, -2]))
    assert (found.num_rows, found.norm_sum) == (2, 5.0)
    assert table.survey(rows=torch.tensor([2])).nonfinite_rows.tolist() == [2]


def test_bfloat16_and_empty_tables(backend):
    table = HashTable(3, dtype=torch.bfloat16, name="t")
    empty = table.survey()
    assert (empty.num_rows, sum(empty.norms), empty.norm_mean, empty.age_mean) == (0, 0, 0.0, 0.0)
    table.insert(torch.tensor([1, 2]), torch.tensor([[2.0, 1.0, 2.0], [math.inf, 0.0, 0.0]]))
    found = table.survey()
    assert (found.norm_max, found.nonfinite_rows.tolist()) == (3.0, [1])


def test_spans_are_checked():
    for start, stop in ((-0.1, 1.0), (0.5, 0.4), (0.0, 1.1)):
        with pytest.raises(ValueError, match="expected 0 <= start <= stop <= 1, got start="):
            HashTable(1).survey(start, stop)
