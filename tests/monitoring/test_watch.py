"""TableMonitor: exact figures of tables, without a Trainer too, and over ranks."""

import math

import pytest
import torch

from recis_lightning import (
    DynamicEmbedding,
    EmbeddingEngine,
    EmbeddingOption,
    HashTable,
    hash_tables,
)
from recis_lightning.admission import ReadOnly
from recis_lightning.distributed import collectives
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.monitoring import TableMonitor, TableReport, TableWatch
from recis_lightning.optim import SparseSGD


def filled(name, count, **kwargs):
    table = HashTable(2, name=name, **kwargs)
    table.insert(torch.arange(count), torch.ones(count, 2))
    return table


def test_every_figure_of_two_tables():
    user = filled("user", 6, eviction=GlobalStepFilter(1))
    item = filled("item", 3)
    user.track_readmissions()
    monitor = TableMonitor([user, item])
    user.update_step(2)
    assert user.evict() == 6
    user.insert(torch.tensor([1, 2, 70]), torch.ones(3, 2))
    user.update_step(5)
    found = monitor.record(10, {"loss": 0.5}, full=True).values
    statistics = user.statistics()
    expected = {
        **{name: getattr(statistics, name) for name in ("capacity", "load")},
        **{f"{kind}_bytes": getattr(statistics, f"{kind}_bytes") for kind in ("index", "weight")},
        **{f"{kind}_bytes": getattr(statistics, f"{kind}_bytes") for kind in ("state", "column")},
        **{"rows": 3, "admitted": 9, "refused": 0, "evicted": 6, "readmitted": 2},
        **{"nonfinite_rows": 0, "norm_mean": 2**0.5, "norm_max": 2**0.5},
        **{"age_mean": 5.0, "age_max": 5},
    }
    mine = {k.removeprefix("table/user/"): v for k, v in found.items() if "/user/" in k}
    assert mine == pytest.approx(expected)
    assert "table/item/age_mean" not in found
    assert found["tables/rows"] == 6
    assert found["tables/load"] == 6 / (user.capacity + item.capacity)
    assert found["tables/evicted"] == 6
    assert monitor.history.last("loss") == 0.5
    assert monitor.history.last("table/user/rows") == 3
    assert monitor.history.distributions["table/user/ages"][3] == 3
    assert "table/item/ages" not in monitor.history.distributions


def test_refused_ids_are_counted():
    module = DynamicEmbedding(2, admission=ReadOnly(), name="t")
    module(torch.tensor([1, 1, 2]))
    assert TableMonitor([module.table]).record(1).values["table/t/refused"] == 3


def test_unique_share_is_that_of_the_batch_alone():
    engine = EmbeddingEngine(
        {
            "a": EmbeddingOption(2, table="t"),
            "b": EmbeddingOption(2, table="t", mode="sum", padding_idx=0),
            "c": EmbeddingOption(2),
        }
    )
    optimizer = SparseSGD(hash_tables(engine), lr=0.1)
    monitor = TableMonitor(hash_tables(engine))
    first = {"a": torch.tensor([7, 7]), "b": torch.zeros(2, 2, dtype=torch.int64)}
    sum(o.sum() for o in engine({**first, "c": torch.tensor([1, 2])}).values()).backward()
    monitor.start_batch()
    batch = {"a": torch.tensor([1, 2]), "b": torch.tensor([[1, 0], [3, 1]])}
    sum(o.sum() for o in engine({**batch, "c": torch.tensor([9, 9])}).values()).backward()
    monitor.note_batch()
    found = monitor.record(1).values
    assert found["table/t/unique_share"] == 3 / 5  # 1 2 1 3 1, without the padding
    assert found["table/c/unique_share"] == 1 / 2
    assert found["tables/unique_share"] == 4 / 7
    assert "table/t/unique_share" not in monitor.record(2).values
    optimizer.step()


def test_every_row_comes_up_in_turn():
    """Partial scans, of all tables first and then of one after the other, cover each row once."""
    tables = [filled("a", 100), filled("b", 40)]
    tables[0].insert(torch.tensor([55]), torch.tensor([[math.nan, 0.0]]))
    monitor = TableMonitor(tables, survey_rows=25)
    records = [monitor.record(step) for step in range(16)]
    assert [record.surveyed for record in records[:4]] == [["a", "b"], ["a"], ["b"], ["a"]]
    for first, last in ((0, 7), (7, 15)):  # four parts of "a" for each round
        assert sum(record.nonfinite.get("a", 0) for record in records[first:last]) == 1
    assert monitor.nonfinite_ids(tables[0]).tolist() == [55]


def test_counts_go_on_after_a_resume():
    old = filled("t", 5)
    monitor = TableMonitor([old])
    monitor.record(1)
    resumed = HashTable(2, name="t")
    resumed.set_extra_state(old.get_extra_state())
    other = TableMonitor([])
    other.history.load_state_dict(monitor.history.state_dict())
    other.watch([resumed], resumed=True)
    resumed.insert(torch.tensor([100]), torch.ones(1, 2))
    assert other.record(2).values["table/t/admitted"] == 6


def test_figures_of_several_ranks(monkeypatch):
    """Counts are sums, means are weighted, and skew is the fullest rank over the mean."""
    table = filled("t", 6, eviction=GlobalStepFilter(9))
    other = filled("t", 2, eviction=GlobalStepFilter(9))
    other.insert(torch.tensor([50]), torch.tensor([[3.0, math.nan]]))
    other.update_step(4)
    read = {}
    monkeypatch.setattr(collectives, "gather_numbers", lambda mine: read.update(x=mine) or [mine])
    TableMonitor([other]).record(1, full=True)
    theirs = read["x"]
    monkeypatch.setattr(collectives, "gather_numbers", lambda mine: [mine, theirs])
    record = TableMonitor([table]).record(1, full=True)
    found = record.values
    assert found["table/t/rows"] == 9
    assert found["table/t/rank_skew"] == found["tables/rank_skew"] == 6 / 4.5
    assert found["table/t/age_mean"] == 12 / 9
    assert found["table/t/age_max"] == 4
    assert found["table/t/norm_mean"] == pytest.approx(2**0.5)
    assert record.nonfinite == {"t": 1}


def test_names_must_differ():
    with pytest.raises(ValueError, match=r"tables: expected different names, got \['t', 't'\]"):
        TableMonitor([HashTable(1, name="t"), HashTable(1, name="t")])
    with pytest.raises(ValueError, match="survey_rows: expected an int >= 1, got 0"):
        TableMonitor([], survey_rows=0)


def test_no_tables():
    found = TableMonitor([]).record(1, full=True)
    assert found.values["tables/rows"] == 0
    assert found.nonfinite == {}


def test_former_names_stay():
    assert TableWatch is TableMonitor
    assert TableMonitor.look is TableMonitor.record
    assert TableReport.of_watch.__func__ is TableReport.of_monitor.__func__
