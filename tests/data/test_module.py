"""ColumnarDataModule: a Trainer's parts, YAML, and resuming within an epoch."""

import subprocess
import sys
from contextlib import suppress

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.__main__ import main
from recis_lightning.data import ColumnarDataModule, Id, Label
from recis_lightning.optim import SparseAdam
from tests.helpers.columnar_files import COLUMNS, rows_of, write_files

# A run may go on without the callback that saved it, and save to another folder.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Clicks(L.LightningModule):
    """A model of one table that notes the rows it is trained on, and stops where it is told."""

    def __init__(self, stop_at: int = -1):
        super().__init__()
        self.user, self.stop_at = DynamicEmbedding(4, name="user"), stop_at
        self.rows = []

    def training_step(self, batch):
        if self.global_step == self.stop_at:
            raise KeyboardInterrupt
        self.rows.append((self.current_epoch, batch["row"].tolist()))
        return self.user(batch["user"]).add(1 + batch["click"].unsqueeze(1)).square().mean()

    def configure_optimizers(self):
        return SparseAdam(hash_tables(self), lr=0.1)

    def trained(self, epoch):
        return [rows for e, rows in self.rows if e == epoch]


class Evaluated(Clicks):
    """The same, which notes the rows it is evaluated on, too."""

    def __init__(self):
        super().__init__()
        self.others = []

    def validation_step(self, batch):
        self.others += batch["row"].tolist()

    def test_step(self, batch):
        self.others += batch["row"].tolist()

    def predict_step(self, batch):
        return batch


@pytest.fixture
def pattern(tmp_path):
    return write_files(tmp_path)


def data_of(pattern, **settings):
    given = {"train": pattern, "batch_size": 4, "shuffle_rows": 6, "seed": 1, **settings}
    return ColumnarDataModule(COLUMNS, **given)


def fit(pattern, model, ckpt=None, callbacks=(), max_epochs=2, **settings):
    trainer = L.Trainer(
        **QUIET,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        inference_mode=False,
    )
    trainer.fit(model, data_of(pattern, **settings), ckpt_path=ckpt, weights_only=True)
    return trainer


def weights_of(model):
    return model.user.table.embeddings(model.user.table.ids().sort().values)


def test_all_parts(pattern):
    """Each with all rows, those of evaluation in order; predictions need no labels."""
    model = Evaluated()
    data = data_of(pattern, val=pattern, test=[pattern], predict=pattern)
    trainer = L.Trainer(**QUIET, max_epochs=2, enable_checkpointing=False, num_sanity_val_steps=0)
    trainer.fit(model, data)
    for epoch in range(2):
        assert sorted(row for rows in model.trained(epoch) for row in rows) == list(range(22))
    assert model.trained(0) != model.trained(1)
    assert model.others == 2 * list(range(22))
    model.others = []
    trainer.test(model, data, verbose=False)
    assert model.others == list(range(22))
    predicted = trainer.predict(model, data)
    assert rows_of(predicted) == list(range(22))
    assert "click" not in predicted[0]


@pytest.mark.parametrize(("stop_at", "workers"), [(1, 0), (4, 0), (6, 0), (7, 0), (9, 0), (4, 2)])
@pytest.mark.slow_except(dict(stop_at=6), dict(workers=2))
def test_a_run_that_is_stopped_goes_on_with_the_next_row(tmp_path, pattern, stop_at, workers):
    """From the last checkpoint, bitwise as an undisturbed run, whatever was read ahead."""
    whole = Clicks()
    fit(pattern, whole)
    saver = ModelCheckpoint(
        tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    first = Clicks(stop_at)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(pattern, first, callbacks=[saver], num_workers=workers)
    second = Clicks()
    fit(pattern, second, ckpt=str(tmp_path / f"saved/step={stop_at}.ckpt"), num_workers=workers)
    assert first.rows + second.rows == whole.rows
    assert torch.equal(weights_of(second), weights_of(whole))


@pytest.mark.parametrize(
    ("sizes", "stop_at"), [((4, 2), 3), ((4, 2), 6), ((2, 4), 5), ((2, 4), 11), ((2, 4), 13)]
)
@pytest.mark.slow_except(dict(stop_at=[6, 13]))
def test_a_run_goes_on_with_batches_of_another_size(tmp_path, pattern, sizes, stop_at):
    """Or on other ranks: each row once an epoch, though the epochs' lengths differ.

    Stopped within an epoch, at its last batch (6 of 4 rows, 11 of 2), and within the next.
    """
    saver = ModelCheckpoint(
        tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}"
    )
    first, second = Clicks(stop_at), Clicks()
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(pattern, first, callbacks=[saver], max_epochs=3, batch_size=sizes[0])
    ckpt = str(tmp_path / f"saved/step={stop_at}.ckpt")
    fit(pattern, second, ckpt=ckpt, max_epochs=3, batch_size=sizes[1])
    for epoch in range(3):
        rows = [row for part in (first, second) for batch in part.trained(epoch) for row in batch]
        assert sorted(rows) == list(range(22))


class Validated(Clicks):
    """Clicks, validated with a metric for each checkpoint."""

    def validation_step(self, batch):
        self.log("loss", float(self.global_step), batch_size=1)


class Fails(Clicks):
    """Clicks, but it fails instead of stopping, so that a checkpoint is made on the exception."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            raise ArithmeticError


def live(pattern, folder, ckpt, stop_at, on_exception=False, val=None):
    """Train from a checkpoint to the end, or up to a step, and keep the checkpoints made."""
    model = (Fails if on_exception else Validated if val else Clicks)(stop_at)
    steps = ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=100 if on_exception else 1,
        save_top_k=-1,
        save_on_exception=on_exception,
    )
    ends = ModelCheckpoint(
        folder, filename="end-{step}", save_on_train_epoch_end=True, save_top_k=-1
    )
    savers = [steps, ends]
    if val:
        savers.append(
            ModelCheckpoint(
                folder,
                filename="val-{step}",
                monitor="loss",
                save_on_train_epoch_end=False,
                save_top_k=-1,
            )
        )
    with suppress(KeyboardInterrupt, SystemExit, ArithmeticError):
        fit(pattern, model, ckpt, callbacks=savers, val=val)
    return model


def step_of(path):
    return int(path.stem.split("=")[1])


@pytest.mark.parametrize("first", ["step=6", "end-step=6", "val-step=6"])
@pytest.mark.slow_except(dict(first="step=6"))
def test_a_resumed_run_is_resumed_from_each_checkpoint(tmp_path, pattern, first):
    """Twice, from all that is saved about an epoch's end and in the two steps after it."""
    val = pattern if first.startswith("val") else None
    whole = live(pattern, tmp_path / "whole", None, -1, val=val)

    def go_on(path, lives):
        done, folder = step_of(path), path.parent / path.stem
        model = live(pattern, folder, str(path), done + 3 if lives else -1, val=val)
        assert model.rows == whole.rows[done : done + 3 if lives else None], str(path)
        if not lives:
            assert torch.equal(weights_of(model), weights_of(whole)), str(path)
            return
        made = [ckpt for ckpt in folder.glob("*.ckpt") if step_of(ckpt) <= done + 2]
        assert len(made) >= 2
        for ckpt in made:
            go_on(ckpt, lives - 1)

    go_on(tmp_path / "whole" / f"{first}.ckpt", 2)


@pytest.mark.parametrize("failed_at", [2, 6])
@pytest.mark.slow_except(dict(failed_at=6))
def test_a_run_that_failed_is_resumed_again_and_again(tmp_path, pattern, failed_at):
    """From what was saved on an exception, then from what the run after it saved in either way."""
    whole = live(pattern, tmp_path / "whole", None, -1)
    live(pattern, tmp_path / "failed", None, failed_at, on_exception=True)
    ckpt, rows = tmp_path / f"failed/step={failed_at}.ckpt", whole.rows[:failed_at]
    for stop_at, on_exception in ((failed_at + 1, False), (failed_at + 3, True), (-1, False)):
        folder = tmp_path / f"{stop_at}"
        model = live(pattern, folder, str(ckpt), stop_at, on_exception)
        rows, ckpt = rows + model.rows, folder / f"step={stop_at}.ckpt"
    assert rows == whole.rows
    assert torch.equal(weights_of(model), weights_of(whole))


def test_a_run_goes_on_after_a_whole_epoch(tmp_path, pattern):
    """From the checkpoint of an epoch's end, and from one made after fit."""
    whole = Clicks()
    fit(pattern, whole)
    saver = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", save_on_train_epoch_end=True)
    first = Clicks()
    trainer = fit(pattern, first, callbacks=[saver], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "saved/after.ckpt")
    for name in ("epoch=0.ckpt", "after.ckpt"):
        second = Clicks()
        fit(pattern, second, ckpt=str(tmp_path / "saved" / name))
        assert first.rows + second.rows == whole.rows
        assert torch.equal(weights_of(second), weights_of(whole))


def test_yaml(tmp_path, pattern, monkeypatch):
    """Columns are named by class; settings that do not fit are named in a line."""
    config = {
        "seed_everything": 1,
        "model": {"class_path": "tests.data.test_module.Clicks"},
        "data": {
            "class_path": "recis_lightning.data.module.ColumnarDataModule",
            "init_args": {
                "train": pattern,
                "batch_size": 8,
                "columns": [
                    {"class_path": "Id", "init_args": {"name": "row"}},
                    {"class_path": "Id", "init_args": {"name": "user", "hash": "farmhash64"}},
                    {"class_path": "Label", "init_args": {"name": "click"}},
                ],
            },
        },
        "trainer": {
            **QUIET,
            "max_epochs": 1,
            "enable_checkpointing": False,
            "default_root_dir": str(tmp_path / "run"),
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["recis_lightning"])
    cli = main(["fit", "--config", str(path)])
    assert cli.model.trained(0) == [list(range(8)), list(range(8, 16)), list(range(16, 22))]
    assert cli.datamodule.columns == [Id("row"), Id("user", hash="farmhash64"), Label("click")]


def test_yaml_of_features(tmp_path, pattern, monkeypatch):
    """Columns and transforms are named by class."""
    named = {
        "columns": [
            {"class_path": "Id", "init_args": {"name": "row"}},
            {"class_path": "Id", "init_args": {"name": "user", "hash": "xxh64"}},
            {"class_path": "Label", "init_args": {"name": "click"}},
        ],
        "transforms": [
            {"class_path": "Cross", "init_args": {"name": "user", "sources": ["user", "row"]}},
            {"class_path": "Mod", "init_args": {"name": "user", "modulus": 5}},
        ],
    }
    init = {"train": pattern, "batch_size": 8}
    init["features"] = {"class_path": "recis_lightning.data.Features", "init_args": named}
    config = {
        "seed_everything": 1,
        "model": {"class_path": "tests.data.test_module.Clicks"},
        "data": {
            "class_path": "recis_lightning.data.module.ColumnarDataModule",
            "init_args": init,
        },
        "trainer": {
            **QUIET,
            "max_epochs": 1,
            "enable_checkpointing": False,
            "default_root_dir": str(tmp_path / "run"),
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["recis_lightning"])
    cli = main(["fit", "--config", str(path)])
    assert [one.name for one in cli.datamodule.features.transforms] == ["user", "user"]
    assert set(cli.model.user.table.ids().tolist()) <= set(range(5))
    assert len(cli.model.trained(0)) == 3


def test_bad_arguments(pattern):
    with pytest.raises(ValueError, match="batch_size: expected an int >= 1, got 0"):
        data_of(pattern, batch_size=0)
    with pytest.raises(ValueError, match="train: expected files or patterns, got None"):
        data_of(None).train_dataloader()


def test_lightning_is_imported_when_the_module_is_asked_for():
    """And the package names the extra where pyarrow is missing."""
    code = (
        "import sys\n"
        "from recis_lightning import data\n"
        "assert not {'lightning', 'pytorch_lightning'} & set(sys.modules)\n"
        "assert data.ColumnarDataModule.__name__ == 'ColumnarDataModule'\n"
        "assert 'lightning' in sys.modules\n"
        "for name in [name for name in sys.modules if name.startswith('recis_lightning.data')]:\n"
        "    del sys.modules[name]\n"
        "sys.modules['pyarrow'] = None\n"
        "try:\n"
        "    import recis_lightning.data\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'recis-lightning[data]'\" in str(error)\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("window", [None, "1d"])
def test_fit_refuses_to_train_on_nothing(tmp_path, window):
    """It did nothing, and ended well."""
    pattern, condition = write_files(tmp_path), "country == 'XX'"
    for number, path in enumerate(sorted(tmp_path.glob("part*"))):
        path.rename(tmp_path / f"part-2026-12-0{number + 1}.parquet")
    nothing = "train: there is nothing to train on: "
    with pytest.raises(ValueError, match=f'^{nothing}filter: "{condition}" keeps none of 22 rows'):
        fit(pattern, Clicks(), filter=condition, window=window)
    with pytest.raises(ValueError, match=f"^{nothing}drop_last: 22 rows are fewer"):
        fit(pattern, Clicks(), batch_size=64, drop_last=True)
    mixed = {"train": {"a": pattern, "b": pattern}, "mix": {"a": 1.0, "b": 1.0}}
    with pytest.raises(ValueError, match=r"^sources\['a'\]: it has no rows: filter: .*keeps none"):
        data_of(None, filter=condition, **mixed).dataset("train")
    with pytest.raises(ValueError, match=r"^train: expected files or patterns, got \[\]"):
        data_of([]).train_dataloader()


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
def test_validation_on_nothing_is_a_warning(pattern, tmp_path, caplog):
    (tmp_path / "empty").mkdir()
    empty = write_files(tmp_path / "empty", sizes=(0,))
    fit(pattern, Evaluated(), max_epochs=1, val=empty)
    assert f"Nothing to read: paths: 1 file without rows, the first is {tmp_path}/empty" in (
        caplog.text
    )
