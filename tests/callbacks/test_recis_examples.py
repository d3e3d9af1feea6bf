"""Examples of RecIS's pages, with our import: each use of a hook runs unchanged.

``trainer.add_hook(hook)`` is ``Trainer(callbacks=[hook])``, and ``trainer.state.global_step`` is
``trainer.global_step``.
"""

import json
import logging
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding, add_metric, hash_tables
from recis_lightning.callbacks import HashTableFilterHook, Hook, LoggerHook, ProfilerHook
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.metrics import clear_metrics
from recis_lightning.optim import SparseAdam


class Model(pl.LightningModule):
    def __init__(self, num_batches):
        super().__init__()
        self.embedding = DynamicEmbedding(2, eviction=GlobalStepFilter(filter_step=50), name="item")
        self.num_batches = num_batches

    def training_step(self, batch, batch_idx):
        return self.embedding(batch).square().sum()

    def configure_optimizers(self):
        return SparseAdam(hash_tables(self), lr=0.01)

    def train_dataloader(self):
        return DataLoader(torch.arange(self.num_batches))


def train(hook, num_batches, folder):
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[hook],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=folder,
    )
    model = Model(num_batches)
    trainer.fit(model)
    return model


@pytest.fixture(autouse=True)
def _empty_registry():
    clear_metrics()
    yield
    clear_metrics()


def test_a_custom_hook_without_parameters(tmp_path, capsys):
    class CustomHook(Hook):
        def __init__(self, custom_param):
            self.custom_param = custom_param

        def before_train(self):
            print(f"start: {self.custom_param}")

        def after_step(self):
            pass

    custom_hook = CustomHook("my_parameter")
    train(custom_hook, 2, tmp_path)
    assert capsys.readouterr().out == "start: my_parameter\n"


def test_a_custom_hook_that_is_given_the_trainer(tmp_path, capsys):
    class CustomHook(Hook):
        def __init__(self, custom_param):
            super().__init__()
            self.custom_param = custom_param

        def before_train(self, trainer):
            print(f"start: {self.custom_param}")

        def after_step(self, trainer):
            if trainer.global_step % 1000 == 0:
                self.custom_logic(trainer)

        def custom_logic(self, trainer):
            print(f"step: {trainer.global_step}")

    custom_hook = CustomHook("my_parameter")
    train(custom_hook, 1001, tmp_path)
    assert capsys.readouterr().out == "start: my_parameter\nstep: 1000\n"


def test_logger_hook_and_add_metric(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    add_metric("loss", 0.123)
    add_metric("accuracy", 0.95)
    logger_hook = LoggerHook(log_step=50)
    train(logger_hook, 100, tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.name == "recis_lightning.callbacks.logger"]
    for line, step in zip(lines, (50, 100), strict=True):
        gstep, lstep, qps, *metrics = line.split()
        assert (gstep, lstep) == (f"<gstep={step}>", f"<lstep={step}>")
        assert float(qps.removeprefix("<qps=").removesuffix(">")) > 0
        assert metrics == ["<loss=0.123>", "<accuracy=0.95>"]


def test_add_metric_takes_the_newest_value(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    add_metric("accuracy", 0.95)
    add_metric("loss", 0.05)
    add_metric("learning_rate", 0.001)
    add_metric("accuracy", 0.96)
    train(LoggerHook(log_step=1), 1, tmp_path)
    line = next(r for r in caplog.records if r.name == "recis_lightning.callbacks.logger")
    assert line.getMessage().endswith("<accuracy=0.96> <loss=0.05> <learning_rate=0.001>")


def test_profiler_hook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APP_ID", raising=False)
    profiler_hook = ProfilerHook(wait=1, warmup=28, active=2, repeat=1, output_dir="./timeline/")
    train(profiler_hook, 40, tmp_path)
    trace = Path("timeline/local-timeline-31.json")
    assert [str(path) for path in Path("timeline").iterdir()] == [str(trace)]
    assert json.loads(trace.read_text())["traceEvents"]


def test_filter_hook_in_a_loop_by_hand():
    embedding = DynamicEmbedding(2, eviction=GlobalStepFilter(filter_step=50), name="item")
    table = hash_tables(embedding)[0]
    optimizer = SparseAdam([table], lr=0.01)
    dataloader = DataLoader(torch.arange(300))
    filter_hook = HashTableFilterHook(filter_interval=200)
    num_epochs, global_step, sizes = 1, 1, []
    for _epoch in range(num_epochs):
        for _step, batch in enumerate(dataloader):
            optimizer.zero_grad()
            embedding(batch).square().sum().backward()
            optimizer.step()

            filter_hook.after_step(None, global_step)
            sizes.append(len(table))

            global_step += 1
    # After step 201 the ids of the last 50 steps stay.
    assert sizes[199:202] == [200, 50, 51]
    assert sizes[-1] == 149


def test_filter_hook_under_a_trainer(tmp_path):
    model = train(HashTableFilterHook(filter_interval=100), 250, tmp_path)
    assert hash_tables(model)[0].ids().sort().values.tolist() == list(range(151, 250))
