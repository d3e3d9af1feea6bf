"""``recis-lightning export``: settings and a checkpoint to a served folder."""

import sys
from pathlib import Path

import lightning as L
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import nn
from torch.utils.data import DataLoader

from recis_lightning import DynamicEmbedding, hash_tables, serving
from recis_lightning.cli import main
from recis_lightning.cli.model_export import example_of, load_model
from recis_lightning.optim import SparseAdamW, SparseDenseOptimizer

SETTINGS = """
model: {class_path: tests.cli.test_model_export.Model}
data:
  class_path: ColumnarDataModule
  init_args:
    train: clicks.parquet
    batch_size: 8
    columns:
      - {class_path: recis_lightning.data.Id, init_args: {name: user, hash: xxh64}}
      - {class_path: recis_lightning.data.Label, init_args: {name: click}}
trainer:
  max_epochs: 1
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: {class_path: CSVLogger, init_args: {save_dir: ., name: run, version: 0}}
"""


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.user, self.tower = DynamicEmbedding(4, name="user"), nn.Linear(4, 1)

    def forward(self, batch):
        return self.tower(self.user(batch["user"])).squeeze(1)

    def training_step(self, batch, batch_idx):
        return nn.functional.binary_cross_entropy_with_logits(self(batch), batch["click"])

    def configure_optimizers(self):
        dense = torch.optim.SGD(self.parameters(), lr=0.1)
        return SparseDenseOptimizer(dense, SparseAdamW(hash_tables(self), lr=0.1))


class Pairs(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader([(torch.tensor(n), torch.tensor(1.0)) for n in range(4)], 4)


class OfIds(Model):
    def forward(self, ids):
        return super().forward({"user": ids})


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Run in a folder with data and settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recis-lightning", "export", "-c", "settings.yaml"])
    users = pa.table(
        {"user": [f"user {n % 9}" for n in range(40)], "click": [n % 2 for n in range(40)]}
    )
    parquet.write_table(users, "clicks.parquet")
    Path("settings.yaml").write_text(SETTINGS)


@pytest.mark.usefixtures("here")
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_from_strings_in_a_file_to_served_scores(capsys):
    model = main(["fit", "-c", "settings.yaml"]).model.eval()
    saved = next(Path("run").rglob("*.ckpt"))
    # The run's own settings, which name its checkpoint too, serve as well.
    main(
        ["export", "-c", "run/version_0/config.yaml", "--ckpt_path", str(saved), "--folder", "out"]
    )
    assert capsys.readouterr().out.splitlines()[-1] == "out"
    served = serving.load("out")
    users = ["user 3", "user 8", "nobody"]
    ids = torch.tensor([served._reader.read({"user": [name]})[0].item() for name in users])
    assert torch.equal(served({"user": users}), model({"user": ids}).detach())
    assert len(served.tables["user"]) == 9


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "ckpt_path: expected the checkpoint of a trained model, got None"),
        (["--ckpt_path", "none.ckpt"], "ckpt_path: there is no file none.ckpt"),
        (["--ckpt_path", "settings.yaml"], "settings.yaml"),
        (["--rows", "int9"], "int9"),
        (["--folder", "."], "folder: . is no export and has other files, such as clicks.parquet"),
        (["--fodler", "x"], "fodler: there is no such setting"),
    ],
)
def test_a_mistake_is_two_lines(args, words, capsys):
    if args[:1] == ["--rows"]:
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(Model())
        trainer.save_checkpoint("new.ckpt")
        args = [*args, "--ckpt_path", "new.ckpt"]
    with pytest.raises(SystemExit) as done:
        main(["export", "-c", "settings.yaml", *args])
    assert done.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("recis-lightning export: error: ")
    assert words in error
    assert hint.startswith("hint: ")


def test_a_batch_of_other_data_is_cut_to_what_forward_takes():
    (ids,) = example_of(OfIds(), Pairs())["example"]
    assert ids.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no batch of validation or training"):
        example_of(OfIds(), L.LightningDataModule())


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(Model())
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    other = Model()
    other.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"more\.weight"):
        load_model(other, str(tmp_path / "new.ckpt"))
