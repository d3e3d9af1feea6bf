"""Windows of data: each trained as an epoch, evaluated before, and saved."""

import inspect

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from torch import nn

from recis_lightning.callbacks import (
    CheckpointHook,
    Hook,
    ProgressiveValidation,
    WindowCheckpoint,
    WindowList,
    Windows,
)
from tests.helpers.quiet_trainer import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    # Lightning looks before it asks callbacks.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


class Counting(L.LightningModule):
    """Adds the numbers that it was trained with; its metric is their sum so far."""

    def __init__(self):
        super().__init__()
        self.sum = nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.item())
        return -self.sum * batch.item()

    def validation_step(self, batch, batch_idx):
        self.validated.append((batch.item(), self.sum.item()))
        self.log("val_sum", self.sum.item(), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def days(*windows):
    """Return windows of so many batches, one number each."""
    return WindowList(
        {f"day{n}": [torch.tensor(float(x)) for x in window] for n, window in enumerate(windows)}
    )


class Order(Hook):
    """Records the points of windows and evaluations."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def before_window(self, window, is_train):
        self.calls.append(("before", window, is_train))

    def after_window(self, window, is_train, metrics):
        self.calls.append(("after", window, is_train))


def fit(path, windows, *callbacks, model=None, ckpt_path=None, **settings):
    model = Counting() if model is None else model
    settings = {"max_epochs": -1, "num_sanity_val_steps": 0, **settings}
    run = quiet_trainer(path, *callbacks, **settings)
    run.fit(model, windows, ckpt_path=ckpt_path)
    return model, run


def test_each_window_is_evaluated_before_it_is_learned(tmp_path):
    """Once, by a model that learned all windows before it; lengths differ from each other."""
    order = Order()
    model, run = fit(tmp_path, days([1, 2], [10], [100, 200, 300]), order, ProgressiveValidation())
    assert model.seen == [1, 2, 10, 100, 200, 300]
    assert model.validated == [(1, 0), (2, 0), (10, 3), (100, 13), (200, 13), (300, 13)]
    assert float(run.callback_metrics["val_sum"]) == 13
    assert (run.current_epoch, run.global_step) == (3, 6)
    assert [call for call in order.calls if call[2]] == [
        (when, f"day{n}", True) for n in range(3) for when in ("before", "after")
    ]
    assert len([call for call in order.calls if not call[2]]) == 6
    assert run.limit_val_batches == 1.0


def test_without_the_first_and_without_validation(tmp_path):
    model, _ = fit(tmp_path, days([1], [2]), ProgressiveValidation(first=False))
    assert model.validated == [(2, 1)]
    model = Counting()
    model.validation_step = None
    fit(tmp_path, days([1], [2]), ProgressiveValidation(), model=model, limit_val_batches=0)
    assert model.seen == [1, 2]


def test_max_epochs_ends_a_run_before_its_windows_do(tmp_path):
    model, _ = fit(tmp_path, days([1], [2], [3]), ProgressiveValidation(), max_epochs=2)
    assert model.seen == [1, 2]


def test_checkpoints_of_windows(tmp_path):
    """Named as the last one learned; the newest are kept; a run goes on with the next window."""
    windows = ([1, 2], [10], [100, 200], [1000], [5000])
    keep, settings = WindowCheckpoint(tmp_path, every_n_windows=2, keep=1), {}
    settings["enable_checkpointing"] = True
    whole, _ = fit(
        tmp_path, days(*windows), ProgressiveValidation(), keep, enable_checkpointing=True
    )
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["day3.ckpt"]
    assert keep.paths == [str(tmp_path / "day3.ckpt")]
    some = WindowCheckpoint(tmp_path / "all")
    fit(tmp_path, days(*windows), ProgressiveValidation(), some, **settings)
    assert len(list((tmp_path / "all").glob("*.ckpt"))) == 5
    for last in range(4):
        model, _ = fit(
            tmp_path,
            days(*windows),
            *(ProgressiveValidation(), WindowCheckpoint(tmp_path / "x"), CheckpointHook()),
            ckpt_path=tmp_path / "all" / f"day{last}.ckpt",
            **settings,
        )
        assert model.seen == [x for window in windows[last + 1 :] for x in window]
        assert model.sum.item() == whole.sum.item() == 6313


def test_from_yaml(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  callbacks:
    - class_path: recis_lightning.callbacks.ProgressiveValidation
      init_args: {first: false}
    - class_path: recis_lightning.callbacks.WindowCheckpoint
      init_args: {dirpath: saved, every_n_windows: 24, keep: 7}
"""
    )
    monkeypatch.setattr("sys.argv", ["x"])
    cli = LightningCLI(
        Counting,
        run=False,
        args=["-c", str(config)],
        save_config_callback=None,
        seed_everything_default=1,
    )
    kinds = {type(callback): callback for callback in cli.trainer.callbacks}
    assert not kinds[ProgressiveValidation]._first
    assert (kinds[WindowCheckpoint]._every, kinds[WindowCheckpoint]._keep) == (24, 7)


def test_a_plain_loader_has_no_windows(tmp_path):
    with pytest.raises(MisconfigurationException, match="expected windows of data in fit"):
        fit(tmp_path, [torch.ones(1)], ProgressiveValidation())


def test_a_data_module_gives_its_windows(tmp_path):
    class Data(L.LightningDataModule):
        windows = days([1], [2])

        def train_dataloader(self):
            raise AssertionError("the windows take its place")

    assert isinstance(Data.windows, Windows)
    model, _ = fit(tmp_path, Data(), ProgressiveValidation())
    assert model.seen == [1, 2]


def test_the_state_of_windows_is_found_without_getattr(tmp_path):
    """As runtime protocols look from Python 3.12 on; windows without a state have none."""

    class Stateful:
        def __init__(self):
            self.list, self.loaded = days([1], [2]), None

        def __iter__(self):
            return iter(self.list)

        def set_epoch(self, epoch):
            self.list.set_epoch(epoch)

        @property
        def window(self):
            return self.list.window

        def state_dict(self):
            return {"place": 3}

        def load_state_dict(self, state):
            self.loaded = state

    callback, windows, names = (
        ProgressiveValidation(),
        Stateful(),
        ("state_dict", "load_state_dict"),
    )
    fit(tmp_path, windows, callback)
    found = [inspect.getattr_static(callback._training, name) for name in names]
    assert found[0]() == {"place": 3}
    found[1]({"place": 4})
    assert windows.loaded == {"place": 4}
    fit(tmp_path, days([1]), callback)
    assert not any(hasattr(callback._training, name) for name in names)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: WindowList([]), ValueError, "loaders: expected at least one window, got none"),
        (lambda: WindowList(3), TypeError, "loaders: expected a list of loaders"),
        (lambda: WindowList([1]), TypeError, "loaders: expected loaders, got int for window '0'"),
        (lambda: WindowCheckpoint("a", 0), ValueError, "every_n_windows: expected an int >= 1"),
        (lambda: WindowCheckpoint("a", keep=0), ValueError, "keep: expected an int >= 1 or None"),
        (lambda: WindowCheckpoint(3), TypeError, "dirpath: expected the path of a folder"),
        (lambda: ProgressiveValidation(first=2), TypeError, "first: expected"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_checkpoints_of_windows_without_windows_are_announced(tmp_path, caplog):
    """Once, when training starts; with windows nothing is said."""
    saved = WindowCheckpoint(tmp_path / "saved")
    fit(tmp_path, days([1], [10]), ProgressiveValidation(), saved, enable_checkpointing=True)
    assert "WindowCheckpoint saves nothing" not in caplog.text
    loader = torch.utils.data.DataLoader(torch.ones(2), batch_size=None)
    saved = WindowCheckpoint(tmp_path / "none")
    fit(tmp_path, loader, saved, enable_checkpointing=True, max_epochs=1, limit_val_batches=0)
    assert caplog.text.count("WindowCheckpoint saves nothing: this run has no windows") == 1
