"""Figures of a step: FLOPs, MFU, bandwidth and bytes exchanged, on one rank and on two."""

import copy
import csv
import math

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger

from recis_lightning.callbacks import MetricReportHook, step_report
from recis_lightning.monitoring.phases import PHASES
from tests.helpers import rank_trainers
from tests.helpers.click_data import loader
from tests.helpers.lightning_model import Model
from tests.helpers.quiet_trainer import quiet_trainer

_TOWER_FLOPS = 2 * (15 * 8 + 8 * 1)  # of a sample, forward


def fit(path, **kwargs):
    hook = MetricReportHook(2, **{"phases": True, **kwargs})
    logger = CSVLogger(path)
    trainer = quiet_trainer(path, hook, logger=logger, limit_train_batches=4, limit_val_batches=0)
    trainer.fit(Model(), loader(batch_size=8), loader(batch_size=8))
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    return hook, trainer, lines


@pytest.fixture
def copies(monkeypatch):
    """Let the machine copy 10 GB/s."""
    monkeypatch.setattr(step_report, "copy_rate", lambda device: 1e10)


def test_flops_mfu_and_bandwidth(tmp_path, copies):
    hook, trainer, lines = fit(tmp_path, tflops_peak=0.5)
    history = hook.history
    # Gradients of the inputs and of the weights, besides the forward pass.
    flops = 8 * 3 * _TOWER_FLOPS
    assert history.column("step/dense_flops") == [flops] * 2
    for point, qps in enumerate(history.column("train_qps")):
        assert history.column("step/dense_tflops")[point] == pytest.approx(flops * qps / 1e12)
        assert history.column("step/mfu")[point] == pytest.approx(flops * qps / 0.5e12)
        spent = [history.column(f"step/{name}_ms")[point] for name in ("lookup", "table_step")]
        moved = history.column("step/table_bytes")[point]
        rate = history.column("step/table_gb_per_sec")[point]
        assert rate == pytest.approx(moved / sum(spent) / 1e6)
        assert history.column("step/bandwidth_utilisation")[point] == pytest.approx(rate / 10)
    assert history.column("step/exchanged_bytes") == [0, 0]
    assert history.last("tables/ids") == 8 * 2 + int(history.last("table/tags/ids"))
    assert history.last("tables/distinct_ids") <= history.last("tables/ids")
    logged = trainer.callback_metrics
    for name in (*(f"step/{phase}_ms" for phase in PHASES), "step/mfu", "tables/ids"):
        assert float(logged[name]) == history.last(name)
        assert any(line.get(name) for line in lines), name


def test_no_peak_no_mfu_and_off_by_default(tmp_path, copies):
    hook, _, _ = fit(tmp_path)
    assert "step/mfu" not in hook.history.names
    assert "step/dense_tflops" in hook.history.names
    hook, _, _ = fit(tmp_path, phases=False)
    assert not [name for name in hook.history.names if name.startswith("step/")]


def test_a_hook_is_used_again_and_copied(tmp_path, copies):
    hook = MetricReportHook(2, phases=True)
    for used in (hook, hook, copy.deepcopy(hook)):
        trainer = quiet_trainer(tmp_path, used, limit_train_batches=4, limit_val_batches=0)
        trainer.fit(Model(), loader(batch_size=8), loader(batch_size=8))
        assert len(used.history) == 2
        assert math.isfinite(used.history.column("step/total_ms")[0])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"phases": 1}, "phases"),
        ({"tflops_peak": 0}, "tflops_peak: expected a number above 0"),
        ({"tflops_peak": "fast"}, "tflops_peak"),
        ({"tflops_peak": math.nan}, "tflops_peak"),
    ],
)
def test_bad_arguments(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        MetricReportHook(**arguments)


def test_two_ranks_report_the_same_of_both(ranks, tmp_path):
    one, other = ranks.run(2, rank_trainers.phases, tmp_path)
    assert str(one) == str(other)
    assert one["step/exchange_ms"][-1] > 0
    assert one["step/exchanged_bytes"][-1] > 0
    total = sum(one[f"step/{phase}_ms"][-1] for phase in PHASES)
    assert one["step/total_ms"][-1] == pytest.approx(total)


def test_yaml(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(
        "seed_everything: 0\ntrainer:\n  callbacks:\n"
        "    - class_path: recis_lightning.callbacks.MetricReportHook\n"
        "      init_args: {interval: 5, phases: true, tflops_peak: 1.5}\n"
    )
    monkeypatch.setattr("sys.argv", ["cli", "--config", str(config)])
    cli = LightningCLI(Model, run=False, save_config_callback=None)
    (hook,) = [hook for hook in cli.trainer.callbacks if isinstance(hook, MetricReportHook)]
    assert (hook.phases, hook.tflops_peak) == (True, 1.5)
