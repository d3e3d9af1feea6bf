"""Policies, options and initializers in hyperparameters: checkpoints load with weights_only."""

import io
import subprocess
import sys

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from recis_lightning import EmbeddingEngine, EmbeddingOption, hash_tables
from recis_lightning.admission import BloomCount, MinCount, Probability, ReadOnly
from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.eviction import (
    AllOf,
    AnyOf,
    GlobalStepFilter,
    MaxRows,
    MinNorm,
    TimeToLive,
)
from recis_lightning.initializers import (
    Constant,
    KaimingNormal,
    KaimingUniform,
    Normal,
    TruncatedNormal,
    Uniform,
    XavierNormal,
    XavierUniform,
)
from recis_lightning.optim import SparseAdam
from tests.helpers.quiet_trainer import quiet_trainer

SETTINGS = [
    *(ReadOnly(), MinCount(2), Probability(0.5), BloomCount(2, 64)),
    *(GlobalStepFilter(3), TimeToLive(60), MaxRows(5), MinNorm(0.1)),
    AnyOf([GlobalStepFilter(3), AllOf([MaxRows(5, by="count"), TimeToLive(60)])]),
    *(Constant(1.0), Uniform(-1, 1), Normal(0, 0.1), TruncatedNormal()),
    *(XavierNormal(), XavierUniform(gain=2.0)),
    *(KaimingNormal(mode="fan_out"), KaimingUniform(nonlinearity="tanh")),
    EmbeddingOption(4, "t", "tile", tile_len=3, dtype=torch.bfloat16, device=torch.device("cpu")),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=repr)
def test_a_setting_loads_with_weights_only(setting):
    file = io.BytesIO()
    torch.save({"hyper_parameters": {"setting": setting}}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["hyper_parameters"]["setting"]
    assert type(loaded) is type(setting)
    assert repr(loaded) == repr(setting)


class Model(L.LightningModule):
    def __init__(self, options, extra):
        super().__init__()
        self.save_hyperparameters()
        self.engine = EmbeddingEngine(options)

    def training_step(self, batch, batch_idx):
        return self.engine({"user": batch})["user"].sum()

    def configure_optimizers(self):
        return SparseAdam(hash_tables(self))

    def train_dataloader(self):
        return DataLoader(torch.arange(8), batch_size=2)


def test_a_run_with_settings_as_hyperparameters_resumes(tmp_path):
    options = {"user": EmbeddingOption(2, eviction=AnyOf([GlobalStepFilter(9), TimeToLive(60)]))}
    trainer = quiet_trainer(tmp_path, HashTableFilterHook())
    trainer.fit(Model(options, MinCount(2)))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = quiet_trainer(tmp_path, HashTableFilterHook(), max_epochs=2)
    resumed.fit(Model(options, MinCount(2)), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.global_step == 8
    loaded = Model.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.hparams.extra == MinCount(2)
    assert loaded.hparams.options == options


def test_another_process_needs_the_import_only(tmp_path):
    torch.save({"policy": GlobalStepFilter(3)}, tmp_path / "a.pt")
    script = (
        "import recis_lightning, sys, torch; "
        "print(torch.load(sys.argv[1], weights_only=True)['policy'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "GlobalStepFilter(filter_step=3)"
