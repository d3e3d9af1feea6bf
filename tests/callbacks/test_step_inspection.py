"""Hooks that inspect one step: which one, beside whom, and what they leave."""

import json
import logging

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.profilers import PyTorchProfiler, SimpleProfiler

from recis_lightning.callbacks import (
    AutoProfilerHook,
    MemoryAccessHook,
    MetricReportHook,
    ModuleFlopsHook,
    ProfilerHook,
)
from recis_lightning.ops import backend
from tests.helpers.click_data import loader
from tests.helpers.lightning_model import Model, differences, everything
from tests.helpers.quiet_trainer import quiet_trainer


def fit(path, *hooks, **kwargs):
    model = Model()
    settings = {"limit_train_batches": 6, "limit_val_batches": 1, **kwargs}
    trainer = quiet_trainer(path, *hooks, **settings)
    trainer.fit(model, loader(batch_size=8), loader(batch_size=8))
    assert not backend.has_meters()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    return model, trainer


def test_both_hooks_share_a_step_and_write_one_report_each(tmp_path):
    flops, memory = ModuleFlopsHook(step=3), MemoryAccessHook(3, tmp_path / "deep" / "folder")
    page = tmp_path / "page.html"
    fit(tmp_path, flops, MetricReportHook(2, report=page), memory)
    assert flops.costs.step == memory.costs.step == 3
    assert not flops.costs.operators
    assert not memory.costs.modules
    found = {cost.name: cost for cost in flops.costs.modules}
    tower = 2 * 8 * (15 * 8 + 8)
    assert (found["tower"].forward_flops, found["tower"].backward_flops) == (tower, 2 * tower)
    assert found["user"].table_ms > 0
    names = {cost.name for cost in memory.costs.operators}
    assert {"recis::row_update", "aten::addmm"} <= names
    saved = json.loads((tmp_path / "module_flops.json").read_text())
    assert [module["name"] for module in saved["modules"]] == [*found]
    folder = tmp_path / "deep" / "folder"
    assert "recis::row_update" in (folder / "memory_access.txt").read_text()
    assert sorted(file.name for file in folder.iterdir()) == [
        "memory_access.json",
        "memory_access.txt",
    ]
    text = page.read_text()
    assert text.count("of the step that ended with batch 3") == 2
    assert "recis::row_update" in text


def test_no_bit_changes(tmp_path):
    plain, _ = fit(tmp_path)
    inspected, _ = fit(tmp_path, ModuleFlopsHook(2), MemoryAccessHook(4))
    assert not differences(everything(plain), everything(inspected))


def test_accumulated_gradients_make_one_step(tmp_path):
    hook = ModuleFlopsHook(step=3)
    fit(tmp_path, hook, accumulate_grad_batches=2, val_check_interval=1)
    found = {cost.name: cost for cost in hook.costs.modules}
    assert hook.costs.step == 4
    assert found["tower"].forward_flops == 2 * 2 * 8 * (15 * 8 + 8)  # without validation's


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (lambda path: {"hooks": [ProfilerHook(0, 2, 1, 1, path)]}, 4),  # records the third
        (lambda path: {"hooks": [AutoProfilerHook(wait=1, output_dir=path)]}, 4),
        (lambda path: {"hooks": [MetricReportHook(3, phases=True)]}, 4),  # measures the third
        (lambda path: {"profiler": SimpleProfiler()}, 3),
    ],
)
def test_beside_others(tmp_path, make, step):
    given = make(tmp_path / "others")
    hooks = given.pop("hooks", [])
    for order in (1, -1):
        flops = ModuleFlopsHook(3)
        made = [*make(tmp_path / f"others{order}").get("hooks", []), flops][::order]
        fit(tmp_path, *made, **given)
        assert flops.costs.step == step
        for hook in made:
            assert not hasattr(hook, "trace_paths") or hook.trace_paths
    assert hooks == [] or len(hooks) == 1


def test_a_profiler_that_never_ends_is_told_of(tmp_path, caplog):
    profiler = PyTorchProfiler(dirpath=tmp_path, filename="p", schedule=None)
    hook = MemoryAccessHook(2)
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, hook, profiler=profiler)
    assert hook.costs is None
    assert "MemoryAccessHook inspected no step" in caplog.text


def test_a_short_or_failing_run_leaves_nothing(tmp_path):
    hook = ModuleFlopsHook(100)
    fit(tmp_path, hook)
    assert hook.costs is None

    class Failing(Model):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        quiet_trainer(tmp_path, ModuleFlopsHook(1)).fit(Failing(), loader(8), loader(8))
    assert not backend.has_meters()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not torch.nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("hook", [ModuleFlopsHook, MemoryAccessHook])
@pytest.mark.parametrize("step", [0, 1.5, "2"])
def test_bad_arguments(hook, step):
    with pytest.raises((TypeError, ValueError), match="step"):
        hook(step=step)


def test_yaml(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(
        "seed_everything: 0\ntrainer:\n  callbacks:\n"
        "    - class_path: recis_lightning.callbacks.ModuleFlopsHook\n"
        "      init_args: {step: 5}\n"
        "    - class_path: recis_lightning.callbacks.MemoryAccessHook\n"
        "      init_args: {step: 7, output_dir: costs}\n"
    )
    monkeypatch.setattr("sys.argv", ["cli", "--config", str(config)])
    callbacks = LightningCLI(Model, run=False, save_config_callback=None).trainer.callbacks
    (flops,) = [hook for hook in callbacks if isinstance(hook, ModuleFlopsHook)]
    (memory,) = [hook for hook in callbacks if isinstance(hook, MemoryAccessHook)]
    assert (flops._inspection.step, flops._inspection.output_dir) == (5, None)
    assert (memory._inspection.step, memory._inspection.output_dir) == (7, "costs")
