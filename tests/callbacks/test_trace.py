"""TraceHook: every row of every traced step, in order, over failures and resumes."""

import copy
import errno
import pickle
import sys

import lightning as L
import pyarrow.parquet
import pytest
import torch

from recis_lightning.callbacks import TraceHook, add_to_trace
from recis_lightning.trace import collect
from recis_lightning.trace import files as trace_files
from tests.helpers.quiet_trainer import quiet_trainer
from tests.helpers.trace_data import limited_file_size, read_trace


class Model(L.LightningModule):
    """Traces the ids 10 * i + row in batch i of 3 rows; fails in batch ``fails_in``."""

    def __init__(self, fails_in=None, names=("id", "score")):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fails_in, self.names, self.num_batches = fails_in, names, 0

    def training_step(self, batch, batch_idx):
        self.num_batches += 1
        if self.num_batches == self.fails_in:
            raise KeyError("a bug in the model")
        if "id" in self.names:
            add_to_trace("id", batch)
        if "score" in self.names:
            add_to_trace("score", self.weight.expand(3) * 0 + 0.5)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        batches = [10 * i + torch.arange(3) for i in range(4)]
        return torch.utils.data.DataLoader(batches, batch_size=None)


def test_every_step_of_every_epoch_in_order(tmp_path):
    hook = TraceHook(["id", "score"], tmp_path / "trace")
    quiet_trainer(tmp_path, hook, max_epochs=2).fit(Model())
    found = read_trace(tmp_path / "trace")
    assert found["step"] == [step for step in range(1, 9) for _ in range(3)]
    assert found["id"] == [10 * i + row for _ in range(2) for i in range(4) for row in range(3)]
    assert found["epoch"] == [0] * 12 + [1] * 12
    assert set(found["rank"]) == {0}
    assert set(found["score"]) == {0.5}
    assert [path.name for path in sorted((tmp_path / "trace").iterdir())] == ["epoch=0", "epoch=1"]
    schema = pyarrow.parquet.read_schema(next((tmp_path / "trace").rglob("*.parquet")))
    assert [str(field.type) for field in schema] == ["int64", "int32", "int64", "float"]


def test_only_every_second_step_and_only_what_is_named(tmp_path):
    quiet_trainer(tmp_path, TraceHook(["id"], tmp_path / "t", every=2)).fit(Model())
    found = read_trace(tmp_path / "t")
    assert sorted(found) == ["epoch", "id", "rank", "step"]
    assert found["step"] == [2] * 3 + [4] * 3
    assert found["id"] == [10, 11, 12, 30, 31, 32]


def test_files_are_completed_while_the_run_goes_on(tmp_path):
    hook = TraceHook(["id"], tmp_path / "t", flush_rows=6, flush_seconds=1000)
    quiet_trainer(tmp_path, hook).fit(Model())
    names = sorted(path.name for path in (tmp_path / "t").rglob("*.parquet"))
    assert names == [f"rank-00000-step-{step:012d}.parquet" for step in (1, 3)]
    assert read_trace(tmp_path / "t")["step"] == [step for step in range(1, 5) for _ in range(3)]
    with pytest.raises(ValueError, match="flush_rows: expected an int >= 1 or None, got 0"):
        TraceHook(["id"], tmp_path / "t", flush_rows=0)


def test_without_names_the_first_step_decides(tmp_path):
    quiet_trainer(tmp_path, TraceHook(None, tmp_path / "t")).fit(Model())
    assert {"id", "score"} < set(read_trace(tmp_path / "t"))


def test_a_tensor_that_is_missing_stops_training(tmp_path):
    hook = TraceHook(["id", "scores"], tmp_path / "t")
    with pytest.raises(ValueError, match=r"step 1 added no \['scores'\]"):
        quiet_trainer(tmp_path, hook).fit(Model())


def test_a_run_that_fails_leaves_its_finished_steps(tmp_path):
    with pytest.raises(KeyError, match="a bug in the model"):
        quiet_trainer(tmp_path, TraceHook(["id"], tmp_path / "t")).fit(Model(fails_in=3))
    assert read_trace(tmp_path / "t")["id"] == [0, 1, 2, 10, 11, 12]
    assert not list((tmp_path / "t").rglob("*.part"))
    assert not collect._collections


def test_resuming_replaces_the_steps_after_the_checkpoint(tmp_path):
    """Steps 1 to 6, a checkpoint after 4 (the epoch), then again from 5: each step once."""
    folder, checkpoint = tmp_path / "t", tmp_path / "c.ckpt"

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(checkpoint)

    with pytest.raises(KeyError):
        quiet_trainer(tmp_path, TraceHook(["id"], folder), Save(), max_epochs=2).fit(Model(7))
    assert max(read_trace(folder)["step"]) == 6
    trainer = quiet_trainer(tmp_path, TraceHook(["id"], folder), max_epochs=3)
    trainer.fit(Model(), ckpt_path=checkpoint)
    assert read_trace(folder)["step"] == [step for step in range(1, 13) for _ in range(3)]
    with pytest.raises(FileExistsError, match="holds the trace of another run"):
        quiet_trainer(tmp_path, TraceHook(["id"], folder)).fit(Model())
    assert len(read_trace(folder)["step"]) == 36


def test_a_checkpoint_makes_the_files_whole(tmp_path):
    seen = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "c.ckpt")
            seen.append(len(read_trace(tmp_path / "t")["step"]))

    quiet_trainer(tmp_path, TraceHook(["id"], tmp_path / "t"), Save()).fit(Model())
    assert seen == [3, 6, 9, 12]


@pytest.fixture
def small_disk():
    """Let no file of this process grow beyond 20 kB."""
    with limited_file_size():
        yield


def test_a_disk_that_is_full_stops_training(tmp_path, small_disk, monkeypatch):
    """Training raises the error, which names the folder and keeps its cause."""
    monkeypatch.setattr(trace_files, "_GROUP_BYTES", 1 << 14)

    class Big(Model):
        def training_step(self, batch, batch_idx):
            add_to_trace("big", torch.randn(4000))
            return super().training_step(batch, batch_idx)

        def train_dataloader(self):
            return torch.utils.data.DataLoader([torch.arange(3)] * 10**5, batch_size=None)

    model = Big()
    with pytest.raises(
        RuntimeError, match=r"could not be written; .* from step 1 on is lost"
    ) as error:
        quiet_trainer(tmp_path, TraceHook(["big"], tmp_path / "t")).fit(model)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno in (errno.EFBIG, errno.ENOSPC)
    assert model.num_batches < 1000
    assert not list((tmp_path / "t").rglob("*.part"))


def test_arguments_are_checked(tmp_path):
    for names in ([], ["step"], ["a", "a"]):
        with pytest.raises(ValueError, match="tensors: expected"):
            TraceHook(names, tmp_path)
    with pytest.raises(TypeError, match="tensors: expected a sequence of names, got 'id'"):
        TraceHook("id", tmp_path)
    with pytest.raises(ValueError, match="every: expected an int >= 1, got 0"):
        TraceHook(["id"], tmp_path, every=0)


def test_a_hook_can_be_copied_and_pickled(tmp_path):
    hook = TraceHook(["id"], tmp_path / "t")
    for other in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert (other.tensors, other.path, other.every) == (["id"], hook.path, 1)


def test_a_name_that_no_step_adds_is_named_once_with_those_that_are(tmp_path, caplog):
    words = r"tensors: step 1 added no \['nope'\] by add_to_trace.*; it added \['id', 'score'\]"
    with pytest.raises(ValueError, match=words):
        quiet_trainer(tmp_path, TraceHook(["nope", "id"], tmp_path / "t")).fit(Model())
    assert not [record for record in caplog.records if "trace" in record.name]


def test_nothing_to_trace_is_said_once(tmp_path, caplog):
    quiet_trainer(tmp_path, TraceHook(None, tmp_path / "t")).fit(Model(names=()))
    said = [r.getMessage() for r in caplog.records if r.name.endswith("callbacks.trace")]
    assert said == ["Nothing to trace: step 1 called no add_to_trace"]


def test_missing_pyarrow_is_found_at_construction(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="needs pyarrow: pip install"):
        TraceHook(["id"], tmp_path / "t")
