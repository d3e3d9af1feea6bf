"""Hooks, policies, initializers and optimizers of tables by YAML: each argument arrives."""

from collections.abc import Callable, Iterable

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import recis_lightning.optim
from recis_lightning import EmbeddingOption, HashTable
from recis_lightning.callbacks import (
    CheckpointHook,
    ClipGradNormHook,
    Lookahead,
    MetricReportHook,
    ReinitializeRowsHook,
    TraceHook,
    UnevenBatches,
)
from recis_lightning.eviction import AnyOf, DistanceLFU, GlobalStepFilter, MaxRows
from recis_lightning.initializers import KaimingNormal, KaimingUniform
from recis_lightning.optim import SparseOptimizer


class Tables(L.LightningModule):
    """Has options of tables, and makes optimizers for a table."""

    def __init__(
        self,
        options: dict[str, EmbeddingOption] | None = None,
        optimizers: list[Callable[[Iterable[HashTable]], SparseOptimizer]] | None = None,
    ) -> None:
        super().__init__()
        self.options = options
        self.optimizers_ = [make([HashTable(2)]) for make in optimizers or []]


def without_user(names: list[str]) -> list[str]:
    """Return the names to save."""
    return [name for name in names if name != "user"]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function that makes what a YAML file says."""

    def read(text):
        config = tmp_path / "config.yaml"
        config.write_text("seed_everything: 0\n" + text)
        monkeypatch.setattr("sys.argv", ["cli", "--config", str(config)])
        return LightningCLI(Tables, run=False, save_config_callback=None)

    return read


def test_hooks(read, tmp_path):
    cli = read(f"""
trainer:
  callbacks:
    - class_path: recis_lightning.callbacks.ClipGradNormHook
      init_args: {{max_norm: 2, norm_type: 1, error_if_nonfinite: true}}
    - class_path: recis_lightning.callbacks.ReinitializeRowsHook
      init_args: {{every_n_epochs: 2, tables: [user]}}
    - class_path: recis_lightning.callbacks.TraceHook
      init_args:
        {{tensors: [id], path: {tmp_path}, every: 3, flush_rows: 100, flush_seconds: 1.5}}
    - class_path: recis_lightning.callbacks.CheckpointHook
      init_args:
        exclude: ["*.exp_avg*", user]
        save_filter: tests.callbacks.test_hooks_in_yaml.without_user
    - class_path: recis_lightning.callbacks.UnevenBatches
      init_args: {{on_uneven: pad}}
    - class_path: recis_lightning.callbacks.Lookahead
      init_args: {{inputs: lookups_of, gradients: true}}
    - class_path: recis_lightning.callbacks.MetricReportHook
      init_args: {{interval: 5, phases: true, tflops_peak: 312}}
""")
    found = {type(callback): callback for callback in cli.trainer.callbacks}
    clip, trace = found[ClipGradNormHook], found[TraceHook]
    assert (clip.max_norm, clip.norm_type, clip.error_if_nonfinite) == (2.0, 1.0, True)
    assert (trace.tensors, trace.path, trace.every) == (["id"], str(tmp_path), 3)
    assert (trace.flush_rows, trace.flush_seconds) == (100, 1.5)
    rows = found[ReinitializeRowsHook]
    assert (rows.every_n_epochs, rows.tables) == (2, ["user"])
    parts = found[CheckpointHook]._parts
    assert parts.patterns == ["*.exp_avg*", "user"]
    assert parts._save_filter is without_user
    assert found[UnevenBatches].on_uneven == "pad"
    assert found[MetricReportHook].interval == 5
    assert (found[Lookahead].inputs, found[Lookahead].gradients) == ("lookups_of", True)


def test_policies_initializers_and_modes(read):
    cli = read("""
model:
  options:
    decayed:
      embedding_dim: 2
      eviction:
        class_path: recis_lightning.eviction.MaxRows
        init_args: {n: 9, by: count, half_life: 50, when: lookup}
      initializer: {class_path: recis_lightning.initializers.KaimingUniform}
    distance:
      embedding_dim: 2
      mode: unique
      eviction:
        class_path: recis_lightning.eviction.DistanceLFU
        init_args: {n: 7, decay_exponent: 0.5, when: lookup}
      initializer: {class_path: recis_lightning.initializers.KaimingNormal}
    floor:
      embedding_dim: 2
      eviction:
        class_path: recis_lightning.eviction.AnyOf
        init_args:
          policies:
            - class_path: recis_lightning.eviction.GlobalStepFilter
              init_args: {filter_step: 3}
            - {class_path: recis_lightning.eviction.DistanceLFU, init_args: {n: 5}}
""")
    options = cli.model.options
    assert options["decayed"].eviction == MaxRows(9, "count", half_life=50, when="lookup")
    assert options["distance"].eviction == DistanceLFU(7, 0.5, when="lookup")
    assert options["distance"].mode == "unique"
    assert options["floor"].eviction == AnyOf([GlobalStepFilter(3), DistanceLFU(5)])
    assert isinstance(options["decayed"].initializer, KaimingUniform)
    assert isinstance(options["distance"].initializer, KaimingNormal)


ARGUMENTS = {
    "SparseFTRL": {"lr": 0.5, "l1": 0.25, "l2": 0.125, "beta": 2.0},
    "SparseLion": {"lr": 0.5, "weight_decay": 0.25},
    "SparseRMSprop": {"lr": 0.5, "alpha": 0.75, "weight_decay": 0.25},
    "SparseRowwiseAdam": {"lr": 0.5, "weight_decay": 0.25},
    "SparseSGD": {"lr": 0.5, "momentum": 0.75, "nesterov": True, "weight_decay": 0.25},
    "SparseAdagrad": {"lr": 0.5, "weight_decay": 0.25},
    "SparseRowwiseAdagrad": {"lr": 0.5, "weight_decay": 0.25},
    "SparseAdamW": {"lr": 0.5, "eps_before_correction": True},
}


def test_optimizers(read):
    lines = ["model:", "  optimizers:"]
    for name, arguments in ARGUMENTS.items():
        lines.append(f"    - class_path: recis_lightning.optim.{name}")
        given = ", ".join(f"{key}: {str(value).lower()}" for key, value in arguments.items())
        lines.append(f"      init_args: {{{given}}}")
    made = read("\n".join(lines)).model.optimizers_
    assert [type(optimizer).__name__ for optimizer in made] == [*ARGUMENTS]
    for optimizer, arguments in zip(made, ARGUMENTS.values(), strict=True):
        assert isinstance(optimizer, torch.optim.Optimizer)
        (group,) = optimizer.param_groups
        assert arguments.items() <= group.items()
    assert set(ARGUMENTS) <= set(recis_lightning.optim.__all__)
