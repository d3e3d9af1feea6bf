"""Warnings at the start of fit, and tables beside ModelSummary."""

import logging
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding, EmbeddingEngine, EmbeddingOption, HashTable
from recis_lightning.callbacks import (
    CheckpointHook,
    HashTableFilterHook,
    Hook,
    LoggerHook,
    MetricReportHook,
)
from recis_lightning.callbacks.fit_checks import _forgotten, _warnings, check_table_names, summary
from recis_lightning.eviction import GlobalStepFilter
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer, SparseSGD
from tests.helpers.quiet_trainer import quiet_trainer

LOGGER = "recis_lightning.callbacks.fit_checks"


class Model(L.LightningModule):
    """Two tables, of which ``trained`` have an optimizer."""

    def __init__(self, eviction=None, trained=("user", "item"), clip=None):
        super().__init__()
        self.user = DynamicEmbedding(2, name="user", eviction=eviction)
        self.engine = EmbeddingEngine({"history": EmbeddingOption(2, table="item", mode="sum")})
        self.layer = torch.nn.Linear(2, 1)
        self.trained, self.clip = trained, clip

    @property
    def tables(self):
        found = {"user": self.user.table, "item": self.engine.tables["item"]}
        return [found[name] for name in self.trained]

    def training_step(self, batch, batch_idx):
        rows = self.user(batch) if "user" in self.trained else 0
        if "item" in self.trained:
            rows = rows + self.engine({"history": batch[:, None]})["history"]
        return self.layer(rows if torch.is_tensor(rows) else torch.ones(1, 2)).sum()

    def configure_optimizers(self):
        dense = torch.optim.SGD(self.layer.parameters(), lr=0.1)
        if not self.trained:
            return dense
        return SparseDenseOptimizer(dense, SparseAdam(self.tables, clip_grad_norm=self.clip))

    def train_dataloader(self):
        return DataLoader(torch.arange(6), batch_size=2)


@pytest.fixture
def warnings_of(tmp_path, caplog):
    def fit(model, *hooks, **settings):
        caplog.set_level(logging.INFO)
        caplog.clear()
        trainer = quiet_trainer(tmp_path, *hooks, limit_val_batches=0, **settings)
        trainer.fit(model)
        return [record.getMessage() for record in caplog.records if record.name == LOGGER]

    return fit


def test_a_policy_that_nothing_runs(warnings_of):
    policy = GlobalStepFilter(3)
    (warning,) = warnings_of(Model(policy), LoggerHook(2), MetricReportHook(3))
    assert warning == (
        "Table 'user' has an eviction policy that nothing runs: add "
        "HashTableFilterHook(filter_interval=...) to the Trainer's callbacks"
    )
    assert warnings_of(Model(policy), HashTableFilterHook()) == []
    (warning,) = warnings_of(Model(policy), HashTableFilterHook(None))
    assert "that nothing runs" in warning


def test_a_tuner_is_told_nothing(tmp_path, caplog):
    """It tries rates without the Trainer's callbacks; the fit that follows has them."""
    caplog.set_level(logging.INFO)
    trainer = quiet_trainer(
        tmp_path, HashTableFilterHook(2), limit_val_batches=0, max_epochs=1, barebones=False
    )
    model = Model(GlobalStepFilter(100))
    model.lr = 0.1
    Tuner(trainer).lr_find(model, num_training=3)
    assert [record for record in caplog.records if record.name == LOGGER] == []
    trainer.callbacks.clear()
    trainer.fit(model)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert "that nothing runs" in warning


def test_it_is_said_without_any_hook(warnings_of):
    (warning,) = warnings_of(Model(GlobalStepFilter(3)))
    assert warning.startswith("Table 'user' has an eviction policy that nothing runs")


def test_a_hook_with_nothing_to_do(warnings_of):
    assert warnings_of(Model(), HashTableFilterHook()) == [
        "HashTableFilterHook has nothing to do: no table of the module has an eviction policy"
    ]
    assert warnings_of(Model(), HashTableFilterHook(None)) == []

    class Plain(Model):
        def __init__(self):
            super().__init__(trained=())
            del self.user, self.engine

    assert warnings_of(Plain(), CheckpointHook(), MetricReportHook()) == [
        "CheckpointHook has nothing to do: the module has no tables",
        "MetricReportHook has nothing to do: the module has no tables",
    ]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_that_skips_tables(warnings_of, algorithm):
    fit = partial(warnings_of, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    hook = "use ClipGradNormHook(0.5) in its place, or " if algorithm == "norm" else ""
    assert fit(Model(), LoggerHook()) == [
        f"gradient_clip_val=0.5 clips dense parameters and no tables: {hook}give SparseAdam "
        f"clip_grad_{algorithm}=0.5 too"
    ]
    assert fit(Model(clip=0.5), LoggerHook()) == []


def test_tables_without_an_optimizer(warnings_of):
    assert warnings_of(Model(trained=("user",)), LoggerHook()) == [
        "Table 'item' has no optimizer and will not be trained (features 'history' too): give it "
        "to a sparse optimizer, SparseAdamW(hash_tables(self), lr=...), or set trainable=False"
    ]
    (warning,) = warnings_of(Model(trained=()), LoggerHook())
    assert warning.startswith("Tables 'user', 'item' have no optimizer")


def test_each_fit_warns_once(tmp_path, caplog):
    model, trainer = Model(GlobalStepFilter(3)), quiet_trainer(tmp_path, LoggerHook())
    trainer.fit(model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert len([record for record in caplog.records if record.name == LOGGER]) == 1


def test_tables_stand_beside_model_summary(warnings_of):
    model = Model()
    (text,) = warnings_of(model, LoggerHook(), enable_model_summary=True)
    assert [line.split() for line in text.splitlines()[2:]] == [
        ["0", "|", "user", "|", "0", "|", "2", "|", f"{summary_bytes(model, 0):,}"],
        ["1", "|", "item", "|", "0", "|", "2", "|", f"{summary_bytes(model, 1):,}"],
    ]


def summary_bytes(model, index):
    return HashTable(2, eviction=model.tables[index].eviction).nbytes


def test_a_summary_shows_rows_and_bytes():
    table = HashTable(2, name="user")
    table.insert(torch.arange(2000), torch.ones(2000, 2))
    assert "user  | 2,000 | 2" in summary([table])
    assert f"{table.nbytes:,}" in summary([table])


@pytest.mark.parametrize("hook", [CheckpointHook, MetricReportHook])
def test_duplicate_names_are_found_at_setup(tmp_path, hook):
    class Twice(Model):
        def __init__(self):
            super().__init__()
            self.other = DynamicEmbedding(2, name="user")

        def training_step(self, batch, batch_idx):
            raise AssertionError("too late")

    with pytest.raises(ValueError, match=rf"{hook.__name__}: .* got \['user'\] more than once"):
        quiet_trainer(tmp_path, hook()).fit(Twice())


def test_names_of_tables():
    check_table_names("x", [HashTable(2, name="a"), HashTable(2, name="b")])
    with pytest.raises(ValueError, match="x: expected tables of different names"):
        check_table_names("x", [HashTable(2, name="a"), HashTable(2, name="a")])


def test_users_hooks_warn_too(warnings_of):
    class Mine(Hook):
        def after_step(self, metrics):
            pass

    (warning,) = warnings_of(Model(GlobalStepFilter(3)), Mine())
    assert "that nothing runs" in warning


@pytest.mark.filterwarnings("ignore:`parameters` is an empty generator")
def test_a_lone_sparse_optimizer(warnings_of):
    class Lone(Model):
        def configure_optimizers(self):
            return SparseSGD(self.tables, lr=0.1)

    clipped, forgotten = warnings_of(Lone(), LoggerHook(), gradient_clip_val=2)
    assert "give SparseSGD clip_grad_norm=2 too" in clipped
    assert forgotten.startswith("No optimizer trains layer.weight, layer.bias: return SparseDense")


class Optimizers:
    """What the check reads of a Trainer."""

    callbacks, gradient_clip_val = (), None

    def __init__(self, *optimizers):
        self.optimizers = optimizers


def test_dense_parameters_without_an_optimizer():
    def said(*optimizers):
        return [text for text in _warnings(Optimizers(*optimizers), model) if "No optim" in text]

    model = Model()
    sparse, layer = SparseSGD(model.tables, lr=0.1), model.layer
    weight = torch.optim.SGD([layer.weight], lr=0.1)
    both = torch.optim.SGD(layer.parameters(), lr=0.1)
    assert "trains layer.bias: return" in said(SparseDenseOptimizer(weight, sparse))[0]
    assert "trains layer.bias: return" in said(weight, sparse)[0]
    assert "trains layer.weight, layer.bias: return" in said(sparse)[0]
    assert said(SparseDenseOptimizer(both, sparse)) == said(sparse, both) == said(both) == []
    model.more = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    assert "more.2.weight and 1 more: return" in said(both, sparse)[0]
    model.more.requires_grad_(False)
    model.average = torch.optim.swa_utils.AveragedModel(layer)
    assert said(both, sparse) == []
    elsewhere = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert said(elsewhere, sparse) == []  # a strategy has replaced the parameters


def test_a_lazy_module_is_no_obstacle():
    module = L.LightningModule()
    module.embedding, module.tower = DynamicEmbedding(2), torch.nn.LazyLinear(1)
    trainer = SimpleNamespace(optimizers=[SparseSGD([module.embedding.table], lr=0.1)])
    assert _forgotten(trainer, module) == ["tower.weight", "tower.bias"]
