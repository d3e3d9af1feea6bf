"""MetricReportHook: logged figures, the page, non-finite rows, and resumed runs."""

import copy
import csv
import logging
import math
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recis_lightning import DynamicEmbedding, hash_tables, report
from recis_lightning.callbacks import HashTableFilterHook, MetricReportHook, training_clock
from recis_lightning.callbacks import report as report_module
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer
from tests.helpers import rank_trainers as lightning_ranks
from tests.helpers.quiet_trainer import quiet_trainer


class Clock:
    """Clock that only tests advance."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (training_clock, report_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    return clock


class Model(L.LightningModule):
    """Looks up ids i and i + 1 twice in batch i; a batch takes 0.5 s, one of validation 2 s."""

    def __init__(self, clock=None, nan_batches=(), num_batches=6):
        super().__init__()
        self.embedding = DynamicEmbedding(2, eviction=GlobalStepFilter(3), name="t")
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.clock, self.nan_batches, self.num_batches = clock or Clock(), nan_batches, num_batches

    def training_step(self, batch, batch_idx):
        self.clock.now += 0.5
        rows = self.embedding(batch)
        if batch_idx in self.nan_batches:
            table = self.embedding.table
            table.insert(batch[:1], torch.full((1, 2), math.nan))
        return (rows.sum() * self.weight).sum() * 0 + batch_idx + 1

    def validation_step(self, batch, batch_idx):
        self.clock.now += 2.0

    test_step = validation_step

    def configure_optimizers(self):
        dense = torch.optim.SGD(self.parameters(), lr=0.1)
        return SparseDenseOptimizer(dense, SparseAdam(hash_tables(self), lr=0.1))

    def train_dataloader(self):
        batches = [torch.tensor([i, i, i + 1, i + 1]) for i in range(self.num_batches)]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(3, 1))

    test_dataloader = val_dataloader


def read_csv(logger, name):
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        return [(int(row["step"]), row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_loggers_get_every_figure_once_for_each_report(tmp_path, clock):
    logger, hook = CSVLogger(tmp_path), MetricReportHook(interval=2, figures=None)
    trainer = quiet_trainer(
        tmp_path, HashTableFilterHook(1), hook, logger=logger, limit_val_batches=0
    )
    trainer.fit(Model(clock))
    # Rows after batches 2, 4 and 6 and at the end: an id goes after three batches without it.
    assert read_csv(logger, "table/t/rows") == [(1, "3"), (3, "4"), (5, "4"), (6, "4")]
    assert read_csv(logger, "tables/admitted")[-1] == (6, "7")
    assert read_csv(logger, "tables/evicted")[-1] == (6, "3")
    assert read_csv(logger, "train_qps") == [(1, "2.0"), (3, "2.0"), (5, "2.0")]
    assert [value for _, value in read_csv(logger, "table/t/unique_share")] == ["0.5"] * 3
    assert read_csv(logger, "table/t/age_max")[-1] == (6, "3")
    assert hook.history.steps == [2, 4, 6]
    assert hook.history.column("loss") == [2, 4, 6]
    assert hook.history.column("table/t/rows") == [3, 4, 4]
    metrics = trainer.callback_metrics
    assert metrics["table/t/rows"].dtype is torch.float64
    assert float(metrics["table/t/capacity"]) == 64


def test_the_first_report_has_every_figure_of_every_table(tmp_path):
    """So a file with one column for each figure never needs new columns."""

    class Other(Model):
        def __init__(self):
            super().__init__()
            self.more = DynamicEmbedding(2, name="more")

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 0 * self.more(batch).sum()

    logger = CSVLogger(tmp_path)
    hook = MetricReportHook(2, figures=None)
    quiet_trainer(tmp_path, hook, logger=logger, limit_val_batches=0).fit(Other())
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        first, *others = csv.DictReader(file)
    assert all(first.values())
    assert len(others) == 3
    for figure in ("norm_mean", "norm_max", "nonfinite_rows", "unique_share"):
        assert first[f"table/more/{figure}"]


def test_train_and_eval_qps_apart(tmp_path, clock):
    logger, hook = CSVLogger(tmp_path), MetricReportHook(interval=2)
    trainer = quiet_trainer(
        tmp_path, hook, logger=logger, val_check_interval=3, num_sanity_val_steps=1
    )
    model = Model(clock)
    trainer.fit(model)
    assert hook.history.column("train_qps")[0] == 2.0
    assert {value for _, value in read_csv(logger, "train_qps")} == {"2.0"}
    assert read_csv(logger, "eval_qps") == [(2, "0.5"), (5, "0.5")]
    assert hook.history.last("eval_qps") == 0.5
    clock.now += 100
    trainer.test(model, verbose=False)
    assert float(trainer.callback_metrics["eval_qps"]) == 0.5


def test_tensorboard_gets_64_bits_and_histograms(tmp_path, monkeypatch):
    rows = 2**24 + 1
    record = report_module.TableMonitor.record

    def many(self, *args, **kwargs):
        figures = record(self, *args, **kwargs)
        figures.values["tables/rows"] = rows
        return figures

    monkeypatch.setattr(report_module.TableMonitor, "record", many)
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    trainer = quiet_trainer(tmp_path, MetricReportHook(3), logger=loggers, limit_val_batches=0)
    trainer.fit(Model())
    events = EventAccumulator(loggers[0].log_dir, {"histograms": 0, "tensors": 0})
    events.Reload()
    points = events.Tensors("tables/rows")
    assert [point.tensor_proto.double_val[0] for point in points] == [rows] * 3
    assert read_csv(loggers[1], "tables/rows")[0] == (2, str(rows))
    assert int(trainer.callback_metrics["tables/rows"]) == rows
    ages, norms = events.Histograms("table/t/ages"), events.Histograms("table/t/norms")
    assert [point.histogram_value.num for point in ages] == [4, 7, 7]
    assert [point.histogram_value.num for point in norms] == [4, 7, 7]
    assert [point.step for point in ages] == [2, 5, 6]


def test_figures_are_few_unless_asked_for(tmp_path, clock):
    logged = {}
    for name, chosen in {"default": {}, "some": {"figures": ["load", "ages"]}}.items():
        hook, loggers = MetricReportHook(3, **chosen), [TensorBoardLogger(tmp_path, name)]
        quiet_trainer(tmp_path, hook, logger=loggers, limit_val_batches=0).fit(Model(clock))
        events = EventAccumulator(loggers[0].log_dir, {"histograms": 0, "tensors": 0})
        tags = events.Reload().Tags()
        logged[name] = set(tags["tensors"]) | set(tags["histograms"])
        assert hook.history.last("table/t/capacity") == 64  # the history has all
    kinds = ("rows", "admitted", "evicted", "nonfinite_rows")
    assert logged["default"] - {"hp_metric"} == {
        *(f"{prefix}/{kind}" for prefix in ("table/t", "tables") for kind in kinds),
        *("table/t/ages", "table/t/norms", "train_qps"),
    }
    assert logged["some"] - {"hp_metric"} == {
        *("table/t/load", "tables/load", "table/t/ages", "train_qps")
    }


def test_a_figure_that_is_none():
    with pytest.raises(
        ValueError,
        match=r"figures: expected some of .*, got \['row'\]; did you mean 'rows'",
    ):
        MetricReportHook(figures=["row"])
    with pytest.raises(TypeError, match="figures: expected a sequence of names or None"):
        MetricReportHook(figures="rows")


def test_a_picture_without_matplotlib_is_refused_at_construction(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="needs matplotlib: pip install"):
        MetricReportHook(report="r.png")
    MetricReportHook(report="r.html")


def test_in_another_trainer_a_hook_starts_anew(tmp_path):
    hook = MetricReportHook(2)
    quiet_trainer(tmp_path, hook, limit_val_batches=0).fit(Model())
    quiet_trainer(tmp_path, hook, limit_val_batches=0).fit(Model(num_batches=4))
    assert hook.history.steps == [2, 4]
    assert hook.history.last("tables/admitted") == 5


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.name == report_module.__name__]


def test_ruined_rows_are_named_in_a_warning(tmp_path, caplog):
    model = Model(nan_batches=[2])
    quiet_trainer(tmp_path, MetricReportHook(3), limit_val_batches=0).fit(model)
    said = warnings_of(caplog)
    assert said[0] == (
        "Table 't' at step 3: 1 or more rows hold NaN or Inf; on this rank 1 of 4, ids [2]"
    )
    assert len(said) == 3  # after batches 3 and 6, and at the end
    assert 2 in model.embedding.table.ids()


def test_ruined_rows_stop_training(tmp_path):
    hook = MetricReportHook(3, on_nan="raise", report=tmp_path / "r.html")
    with pytest.raises(RuntimeError, match=r"'t' at step 3: 1 or more rows hold .* ids \[2\]"):
        quiet_trainer(tmp_path, hook, limit_val_batches=0).fit(Model(nan_batches=[2]))
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_ruined_rows_are_removed(tmp_path, caplog):
    model = Model(nan_batches=[1, 2])
    hook = MetricReportHook(4, on_nan="evict")
    quiet_trainer(tmp_path, hook, limit_val_batches=0).fit(model)
    (said,) = warnings_of(caplog)
    assert said.endswith("ids [1, 2]; removed")
    assert sorted(model.embedding.table.ids().tolist()) == [0, 3, 4, 5, 6]


def test_a_loss_of_nan_has_every_row_looked_at(tmp_path, caplog):
    class Other(Model):
        def __init__(self):
            super().__init__()
            self.more = DynamicEmbedding(2, name="more")

        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                self.more.table.insert(torch.tensor([5]), torch.full((1, 2), math.inf))
            return super().training_step(batch, batch_idx) * (math.nan if batch_idx == 3 else 1)

    # The turn of "more" comes with the third report; the loss brings it forward.
    quiet_trainer(tmp_path, MetricReportHook(2), limit_val_batches=0, max_steps=5).fit(Other())
    assert any("Table 'more' at step 4" in said for said in warnings_of(caplog))


def test_history_goes_on_after_a_resume(tmp_path, clock):
    whole = MetricReportHook(2)
    settings = {"limit_val_batches": 0, "enable_checkpointing": False}
    trainer = quiet_trainer(tmp_path, HashTableFilterHook(1), whole, max_epochs=2, **settings)
    trainer.fit(Model(clock))

    first = quiet_trainer(tmp_path, HashTableFilterHook(1), MetricReportHook(2), **settings)
    first.fit(Model(clock))
    first.save_checkpoint(tmp_path / "a.ckpt")
    second, model = MetricReportHook(2), Model(clock)
    resumed = quiet_trainer(tmp_path, HashTableFilterHook(1), second, max_epochs=2, **settings)
    resumed.fit(model, ckpt_path=tmp_path / "a.ckpt")
    assert second.history.steps == whole.history.steps == [2, 4, 6, 8, 10, 12]
    for name in ("rows", "admitted", "evicted"):
        column = f"table/t/{name}"
        assert second.history.column(column) == whole.history.column(column), name
    page = report(resumed, tmp_path / "resumed.html").read_text()
    assert "steps 2 to 12" in page


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before")
def test_counts_between_two_reports_are_resumed(tmp_path, clock):
    """Each id that was admitted has a row or was evicted, also those since the newest report."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

    def hooks():
        return HashTableFilterHook(1), MetricReportHook(2), Save()

    settings = {"limit_val_batches": 0, "enable_checkpointing": False}
    quiet_trainer(tmp_path, *hooks(), **settings).fit(Model(clock))
    resumed = hooks()
    quiet_trainer(tmp_path, *resumed, max_epochs=2, **settings).fit(
        Model(clock), ckpt_path=tmp_path / "a.ckpt"
    )
    last = {
        name: resumed[1].history.last(f"table/t/{name}") for name in ("admitted", "evicted", "rows")
    }
    assert last["admitted"] - last["evicted"] == last["rows"]


def test_page_is_written_when_training_ends_and_when_it_fails(tmp_path):
    class Failing(Model):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4:
                raise KeyError("a bug")
            return super().training_step(batch, batch_idx)

    hook = MetricReportHook(2, report=tmp_path / "deep" / "report.html")
    with pytest.raises(KeyError):
        quiet_trainer(tmp_path, hook, limit_val_batches=0).fit(Failing())
    assert "Tables of Failing" in (tmp_path / "deep" / "report.html").read_text()
    assert not list((tmp_path / "deep").glob(".*"))


def test_gradients_accumulate(tmp_path):
    hook = MetricReportHook(3)
    quiet_trainer(tmp_path, hook, accumulate_grad_batches=2, limit_val_batches=0).fit(Model())
    assert hook.history.column("table/t/unique_share") == [0.5, 0.5]
    assert hook.history.column("loss") == [3.0, 6.0]


def test_a_module_without_tables(tmp_path):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    hook = MetricReportHook(1, report=tmp_path / "r.html")
    data = torch.utils.data.DataLoader(torch.zeros(2, 1))
    quiet_trainer(tmp_path, hook).fit(Plain(), data)
    assert hook.history.last("tables/rows") == 0


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="interval: expected an int >= 1, got 0"):
        MetricReportHook(0)
    with pytest.raises(ValueError, match=r"on_nan: expected one of .*, got 'ignore'"):
        MetricReportHook(on_nan="ignore")
    with pytest.raises(ValueError, match=r"report: expected a path ending in .html or .png"):
        MetricReportHook(report="report.pdf")
    with pytest.raises(ValueError, match="survey_rows: expected an int >= 1, got 0"):
        MetricReportHook(survey_rows=0)


def test_two_hooks_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="unique"):
        quiet_trainer(tmp_path, MetricReportHook(), MetricReportHook())


def test_a_hook_can_be_copied():
    assert copy.deepcopy(MetricReportHook(7)).interval == 7


def test_it_reports_at_info(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    hook = MetricReportHook(3, report=tmp_path / "r.html")
    quiet_trainer(tmp_path, hook, limit_val_batches=0).fit(Model())
    assert warnings_of(caplog) == [f"Wrote the report {tmp_path / 'r.html'}"]


def test_two_ranks_report_the_same_figures_of_all(ranks, tmp_path):
    """Counts are sums, rank_skew is logged, and a non-finite row on one rank stops both."""
    one, other = ranks.run(2, lightning_ranks.report, tmp_path, "warn", 1)
    assert one["steps"] == other["steps"] == [1, 2, 3, 4]
    assert one["columns"].keys() == other["columns"].keys()
    for name in one["columns"]:
        if name not in ("loss", "train_qps"):  # each rank's own
            assert str(one["columns"][name]) == str(other["columns"][name]), name
    for table, rows in one["rows"].items():
        both = [rows, other["rows"][table]]
        assert one["columns"][f"table/{table}/rows"][-1] == sum(both)
        assert one["columns"][f"table/{table}/rank_skew"][-1] == max(both) * 2 / sum(both)
    assert one["columns"]["table/user/nonfinite_rows"][-1] == 1
    assert "Tables of" in (tmp_path / "report.html").read_text()
    for rank in ranks.run(2, lightning_ranks.report, tmp_path, "raise", 1):
        assert "table 'user' at step" in rank["error"]
        assert "1 or more rows hold NaN or Inf" in rank["error"]
