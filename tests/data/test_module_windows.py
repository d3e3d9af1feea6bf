"""Windows and followed files under a Trainer: epochs are windows, and a stream ends the run."""

import threading
from contextlib import suppress
from pathlib import Path

import lightning as L
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint

from recis_lightning.callbacks import ProgressiveValidation, WindowCheckpoint, WindowList
from recis_lightning.data import ColumnarDataModule, ColumnarDataset, Follow
from recis_lightning.distributed import collectives
from tests.data.test_module import QUIET, Clicks, weights_of
from tests.helpers.columnar_files import COLUMNS, table_of, write_files

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def write(folder, day, first, size):
    """Write a day's rows, in one move."""
    path = folder / f"day=2026-11-{day:02}/part.parquet"
    path.parent.mkdir(exist_ok=True)
    pa.parquet.write_table(table_of(first, size), path.with_suffix(".tmp"), row_group_size=3)
    path.with_suffix(".tmp").rename(path)


class Windows(Callback):
    """Names of the windows trained; calls a function after each."""

    def __init__(self, after=lambda epoch: None):
        self.after, self.names = after, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.names.append(trainer.datamodule.window)
        self.after(trainer.current_epoch)


def fit(folder, model, callbacks=(), ckpt=None, max_epochs=-1, follow=True, **settings):
    if follow is True:
        follow = Follow(poll_seconds=0.01, stop_file=str(folder / "STOP"))
    data = ColumnarDataModule(
        COLUMNS, str(folder / "*/*.parquet"), batch_size=4, follow=follow, **settings
    )
    trainer = L.Trainer(
        **QUIET,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in callbacks),
    )
    with suppress(KeyboardInterrupt, SystemExit):
        trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
    return trainer


def trained(model):
    return [(epoch, rows) for epoch, batch in model.rows for rows in batch]


def feed(folder, epoch):
    """After each window write more, and the end after the third."""
    if epoch < 2:
        write(folder, 10 + epoch, 10 * (epoch + 1), 7)
    else:
        (folder / "STOP").touch()


def test_a_stream_ends_the_run(tmp_path):
    """After its last window, as max_epochs does; callbacks that need metrics see no empty epoch."""

    class Logs(Clicks):
        def training_step(self, batch):
            self.log("loss", 1.0)
            return super().training_step(batch)

    write(tmp_path, 1, 0, 5)
    windows, model = Windows(lambda epoch: feed(tmp_path, epoch)), Logs()
    stopper = EarlyStopping("loss", patience=100, check_on_train_epoch_end=True)
    trainer = fit(tmp_path, model, [windows, stopper])
    assert windows.names == [f"day=2026-11-{day}/part.parquet" for day in ("01", "10", "11")]
    assert trainer.current_epoch == 3
    expected = [(0, range(5)), (1, range(10, 17)), (2, range(20, 27))]
    assert trained(model) == [(epoch, row) for epoch, rows in expected for row in rows]


@pytest.mark.parametrize("window", [None, "1d"])
@pytest.mark.slow_except(dict(window="1d"))
def test_a_stream_is_resumed_with_files_that_appeared_meanwhile(tmp_path, window):
    """From every checkpoint, those of a window's end included: each row once, in one order."""
    for day in (1, 2, 3):
        write(tmp_path, day, 10 * day, 6)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1)
    ends = ModelCheckpoint(
        tmp_path / "saved", filename="end-{step}", save_on_train_epoch_end=True, save_top_k=-1
    )
    follow = Follow(poll_seconds=0.01, timeout_seconds=0.0)
    first = Clicks(stop_at=5)
    fit(tmp_path, first, [saver, ends], follow=follow, window=window)
    write(tmp_path, 4, 40, 6)
    checkpoints = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(checkpoints) >= 6
    for path in checkpoints:
        steps = int(path.stem.split("step=")[1])
        second = Clicks()
        fit(tmp_path, second, ckpt=str(path), follow=follow, window=window)
        rows = [row for _, batch in first.rows[:steps] for row in batch]
        rows += [row for _, row in trained(second)]
        assert rows == [10 * day + k for day in (1, 2, 3, 4) for k in range(6)], path


def test_windows_of_fixed_files_are_epochs(tmp_path):
    """Of their own lengths; then the first comes again; and a resumed run ends as the whole one."""
    for day, size in ((1, 9), (2, 3), (3, 6)):
        write(tmp_path, day, 10 * day, size)
    settings = {"follow": False, "window": "1d", "max_epochs": 4}
    windows, whole = Windows(), Clicks()
    trainer = fit(tmp_path, whole, [windows], **settings)
    assert windows.names == [f"2026-11-{day}" for day in ("01", "02", "03", "01")]
    assert trainer.datamodule.num_windows == 3
    assert [epoch for epoch, _ in whole.rows] == [0, 0, 0, 1, 2, 2, 3, 3, 3]
    assert whole.trained(2) == [[30, 31, 32, 33], [34, 35]]
    for stop_at in (3, 5):
        first, second, folder = Clicks(stop_at), Clicks(), tmp_path / f"{stop_at}"
        saver = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        fit(tmp_path, first, [saver], **settings)
        fit(tmp_path, second, ckpt=str(folder / f"step={stop_at}.ckpt"), **settings)
        assert first.rows + second.rows == whole.rows
        assert torch.equal(weights_of(second), weights_of(whole))


def test_a_run_that_is_stopped_does_not_wait_for_files(tmp_path):
    write(tmp_path, 1, 0, 5)
    model, windows = Clicks(), Windows()
    follow = Follow(poll_seconds=1000)
    timers = []

    class StopsLater(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            timers.append(threading.Timer(0.3, setattr, (trainer, "should_stop", True)))
            timers[-1].start()

    fit(tmp_path, model, [windows, StopsLater()], follow=follow)
    assert [row for _, row in trained(model)] == [0, 1, 2, 3, 4]
    assert len(windows.names) == 1
    timers[0].join()


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
def test_a_stream_without_files_trains_nothing(tmp_path):
    (tmp_path / "STOP").touch()
    model = Clicks()
    assert fit(tmp_path, model).global_step == 0


def test_ranks_with_other_files_are_refused(tmp_path, monkeypatch):
    data = ColumnarDataModule(COLUMNS, write_files(tmp_path))
    monkeypatch.setattr(collectives, "gather", lambda value: [value, "another"])
    with pytest.raises(ValueError, match=r"train: the files, .* differ between ranks: .*\[1\]"):
        data.train_dataloader()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_each_window_is_evaluated_before_it_is_trained(tmp_path, num_workers):
    """By ProgressiveValidation, which takes the windows of the data module."""

    class Both(Clicks):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch):
            self.seen.append(("train", sorted(batch["user"].tolist())))
            return super().training_step(batch)

        def validation_step(self, batch):
            self.seen.append(("evaluate", sorted(batch["user"].tolist())))

    for day in (1, 2, 3):
        write(tmp_path, day, 10 * day, 4)
    model = Both()
    saved = WindowCheckpoint(tmp_path / "saved", every_n_windows=2)
    hooks = [ProgressiveValidation(), saved]
    fit(tmp_path, model, hooks, follow=False, window="1d", num_workers=num_workers)
    seen = model.seen[1:]  # without the sanity check's
    parts, rows = [part for part, _ in seen], [rows for _, rows in seen]
    assert parts == ["evaluate", "train"] * 3
    assert rows[::2] == rows[1::2]
    assert len({tuple(window) for window in rows}) == 3
    assert [Path(path).stem for path in saved.paths] == ["2026-11-02"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_an_evaluated_run_goes_on_within_its_window(tmp_path):
    """And with the evaluation that was due, where the last step of a window was saved."""

    class Both(Clicks):
        def __init__(self):
            super().__init__()
            self.seen = []

        def training_step(self, batch):
            self.seen.append(("train", self.current_epoch, batch["row"].tolist()))
            return super().training_step(batch)

        def validation_step(self, batch):
            if not self.trainer.sanity_checking:
                self.seen.append(("evaluate", None, batch["row"].tolist()))

    def run(model, callbacks, ckpt=None):
        callbacks = [ProgressiveValidation(), *callbacks]
        settings = {"follow": False, "window": "1d", "shuffle_rows": 6, "max_epochs": -1}
        fit(tmp_path, model, callbacks, ckpt, **settings)
        return model.seen

    for day in (1, 2, 3):
        write(tmp_path, day, 10 * day, 6)
    saver = ModelCheckpoint(tmp_path / "ck", every_n_train_steps=1, save_top_k=-1)
    whole = run(Both(), [saver])
    trains = [index for index, (part, *_) in enumerate(whole) if part == "train"]
    for path in sorted((tmp_path / "ck").glob("*.ckpt"))[1:4]:
        step = int(path.stem.split("step=")[1])
        assert run(Both(), [], str(path)) == whole[trains[step - 1] + 1 :], path


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
def test_a_resumed_run_that_evaluates_within_windows_saves_the_place_it_trains(tmp_path):
    """Lightning, resuming where an evaluation was due, asks for its data while it is training."""

    class Both(Clicks):
        def validation_step(self, batch):
            """Count nothing."""

    def run(saver, ckpt=None):
        data = ColumnarDataModule(
            COLUMNS, str(tmp_path / "*/*.parquet"), batch_size=4, window="1d", shuffle_rows=6
        )
        quiet = {**QUIET, "enable_checkpointing": True}
        hooks = [ProgressiveValidation(first=False), saver]
        trainer = L.Trainer(
            **quiet, max_epochs=1, val_check_interval=2, callbacks=hooks, num_sanity_val_steps=0
        )
        model = Both()
        trainer.fit(model, data, ckpt_path=ckpt, weights_only=True)
        return [row for _, batch in model.rows for row in batch]

    for day in (1, 2):
        write(tmp_path, day, 20 * day, 14)
    savers = [
        ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)
        for name in "abc"
    ]
    whole = run(savers[0])
    assert run(savers[1], str(tmp_path / "a/step=2.ckpt")) == whole[8:]
    assert run(savers[2], str(tmp_path / "b/step=3.ckpt")) == whole[12:]


@pytest.mark.parametrize("settings", [{"follow": True, "window": "1d"}, {"follow": False}])
def test_windows_that_cannot_be_evaluated_first_are_refused(tmp_path, settings):
    write(tmp_path, 1, 0, 4)
    with pytest.raises(ValueError, match=r"windows: .* files must be there and in windows"):
        fit(tmp_path, Clicks(), [ProgressiveValidation()], **settings)


def test_a_data_set_goes_on_for_ever_and_is_refused(tmp_path):
    """Its windows come again and again; the data module's do not."""
    write(tmp_path, 1, 0, 4)
    data = ColumnarDataset(str(tmp_path / "*/*.parquet"), COLUMNS, window="1d")
    run = L.Trainer(**QUIET, max_epochs=-1, callbacks=[ProgressiveValidation()])
    with pytest.raises(MisconfigurationException, match=r"ColumnarDataModule.*got Columnar"):
        run.fit(Clicks(), data)


def test_a_number_of_steps_is_refused_beside_windows(tmp_path):
    """A resumed run would leave a window out."""
    run = L.Trainer(**QUIET, max_steps=9, callbacks=[ProgressiveValidation()])
    with pytest.raises(MisconfigurationException, match=r"expected Trainer\(max_steps=-1\), got 9"):
        run.fit(Clicks(), WindowList([[]]))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_a_quick_run_over_windows():
    """By ``fast_dev_run``, which sets ``max_steps``."""
    run = L.Trainer(**QUIET, fast_dev_run=1, callbacks=[ProgressiveValidation()])
    batch = {"row": torch.tensor([1]), "user": torch.tensor([1]), "click": torch.tensor([1.0])}
    run.fit(Clicks(), WindowList([[batch] * 2] * 2))
    assert run.global_step == 1
