"""TraceHook and TraceWriter: every row in order, and no row lost without a word."""

import copy
import errno
import pickle
import resource
import threading
import time

import lightning as L
import numpy as np
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch

from recis_lightning.callbacks import TraceHook, add_to_trace
from recis_lightning.jagged import Jagged
from recis_lightning.trace import TraceWriter, collect, collect_trace
from recis_lightning.trace import files as trace_files
from tests.helpers.quiet_trainer import quiet_trainer


def read(path):
    """Return the whole data set, in the order of its steps, as columns."""
    table = pyarrow.dataset.dataset(path, partitioning="hive").to_table()
    return table.sort_by([("step", "ascending"), ("rank", "ascending")]).to_pydict()


class Model(L.LightningModule):
    """Traces, in batch i of 3 rows, ids 10 * i + row; fails in batch ``fails_in``."""

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
    found = read(tmp_path / "trace")
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
    found = read(tmp_path / "t")
    assert sorted(found) == ["epoch", "id", "rank", "step"]
    assert found["step"] == [2] * 3 + [4] * 3
    assert found["id"] == [10, 11, 12, 30, 31, 32]


def test_without_names_the_first_step_decides(tmp_path):
    quiet_trainer(tmp_path, TraceHook(None, tmp_path / "t")).fit(Model())
    assert {"id", "score"} < set(read(tmp_path / "t"))


def test_a_tensor_that_is_missing_stops_training(tmp_path):
    hook = TraceHook(["id", "scores"], tmp_path / "t")
    with pytest.raises(ValueError, match=r"step 1: .*missing \['scores'\], not known \[\]"):
        quiet_trainer(tmp_path, hook).fit(Model())


def test_a_run_that_fails_leaves_its_finished_steps(tmp_path):
    with pytest.raises(KeyError, match="a bug in the model"):
        quiet_trainer(tmp_path, TraceHook(["id"], tmp_path / "t")).fit(Model(fails_in=3))
    assert read(tmp_path / "t")["id"] == [0, 1, 2, 10, 11, 12]
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
    assert max(read(folder)["step"]) == 6
    trainer = quiet_trainer(tmp_path, TraceHook(["id"], folder), max_epochs=3)
    trainer.fit(Model(), ckpt_path=checkpoint)
    assert read(folder)["step"] == [step for step in range(1, 13) for _ in range(3)]
    with pytest.raises(FileExistsError, match="holds the trace of another run"):
        quiet_trainer(tmp_path, TraceHook(["id"], folder)).fit(Model())
    assert len(read(folder)["step"]) == 36


def test_a_checkpoint_makes_the_files_whole(tmp_path):
    seen = []

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "c.ckpt")
            seen.append(len(read(tmp_path / "t")["step"]))

    quiet_trainer(tmp_path, TraceHook(["id"], tmp_path / "t"), Save()).fit(Model())
    assert seen == [3, 6, 9, 12]


@pytest.fixture
def small_disk():
    """Let no file of this process grow beyond 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_stops_training(tmp_path, small_disk, monkeypatch):
    """The error comes up in training, names the folder and keeps its cause."""
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


def test_a_full_disk_is_noticed_at_the_end(tmp_path, small_disk):
    """Nothing is written before the end, and the run does not end well."""
    with pytest.raises(RuntimeError, match="could not be written"), TraceWriter(tmp_path) as writer:
        writer.write(1, {"big": np.random.default_rng(0).random(100_000)})


def test_a_dead_writer_stops_the_next_step(tmp_path):
    writer = TraceWriter(tmp_path, ["id"])
    writer.write(1, {"id": torch.arange(3)})
    writer._queue.put(None)  # as if its thread had ended
    writer._thread.join()
    with pytest.raises(RuntimeError, match="could not be written"):
        writer.write(2, {"id": torch.arange(3)})


def test_the_queue_is_bounded(tmp_path, monkeypatch):
    """A slow writer holds the caller up; no more steps wait than were allowed."""
    gate, depth = threading.Semaphore(0), []
    append = trace_files.TraceFiles.append

    def slow(self, step):
        gate.acquire()
        append(self, step)

    monkeypatch.setattr(trace_files.TraceFiles, "append", slow)
    writer = TraceWriter(tmp_path, ["id"], queue_size=2)

    def produce():
        for step in range(1, 9):
            writer.write(step, {"id": torch.tensor([step])})
            depth.append(step)

    thread = threading.Thread(target=produce)
    thread.start()
    deadline = time.monotonic() + 60
    while len(depth) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.1)
    assert depth[-1] == 3  # one being written, two waiting
    gate.release(8)
    thread.join()
    writer.close()
    assert read(tmp_path)["id"] == list(range(1, 9))


def test_columns_of_all_kinds(tmp_path):
    nested = torch.nested.nested_tensor(
        [torch.tensor([1, 2]), torch.tensor([3])], layout=torch.jagged
    )
    columns = {
        "matrix": torch.arange(6).view(2, 3),
        "cube": np.arange(8, dtype=np.float32).reshape(2, 2, 2),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "jagged": Jagged(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 0, 3])),
        "nested": nested,
        "text": ["a", "bc"],
        "loss": torch.tensor(0.25),
        "name": "run",
        "lr": 1e-3,
    }
    with TraceWriter(tmp_path, rank=3) as writer, collect_trace() as found:
        for name, value in columns.items():
            add_to_trace(name, value)
        writer.write(7, found)
        writer.write(8, {**found, "matrix": torch.full((2, 3), 9)})
    rows = read(tmp_path)
    assert rows["matrix"] == [[0, 1, 2], [3, 4, 5], [9, 9, 9], [9, 9, 9]]
    assert rows["cube"][1] == [[4.0, 5.0], [6.0, 7.0]]
    assert rows["half"][0] == 1.5
    assert rows["half"][1] != rows["half"][1]
    assert rows["flag"][:2] == [True, False]
    assert rows["jagged"][:2] == [[], [5.0, 6.0, 7.0]]
    assert rows["nested"][:2] == [[1, 2], [3]]
    assert rows["text"][:2] == ["a", "bc"]
    assert rows["loss"] == [0.25] * 4
    assert rows["name"] == ["run"] * 4
    assert rows["lr"] == [1e-3] * 4
    assert rows["rank"] == [3] * 4
    assert rows["step"] == [7, 7, 8, 8]


def test_values_are_those_of_the_moment(tmp_path):
    """What is added may be changed afterwards, in place, as optimizers do."""
    value = torch.tensor([1.0])
    with collect_trace(["a"]) as found:
        add_to_trace("a", value)
        add_to_trace("b", value)
        value.fill_(2.0)
    add_to_trace("a", value)
    assert found == {"a": torch.tensor([1.0])}


def test_ranks_write_apart_and_no_rows_are_rows_too(tmp_path):
    for rank in (1, 0):
        with TraceWriter(tmp_path, ["id"], rank=rank) as writer:
            writer.write(1, {"id": torch.arange(2) + rank}, {"part": "a"})
            writer.write(2, {"id": torch.empty(0, dtype=torch.int64)}, {"part": "a"})
    found = read(tmp_path)
    assert (found["rank"], found["id"]) == ([0, 0, 1, 1], [0, 1, 1, 2])
    assert found["part"] == ["a"] * 4


def test_many_row_groups_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_files, "_GROUP_BYTES", 200)
    monkeypatch.setattr(trace_files, "_FILE_BYTES", 1000)
    with TraceWriter(tmp_path, ["id"]) as writer:
        for step in range(1, 101):
            writer.write(step, {"id": torch.tensor([step, -step])})
    files = sorted(tmp_path.glob("*.parquet"))
    assert len(files) > 3
    steps = [pyarrow.parquet.read_table(path)["step"].to_pylist() for path in files]
    assert [step for file in steps for step in file] == [
        step for step in range(1, 101) for _ in range(2)
    ]


def test_rewind_keeps_what_came_before(tmp_path):
    for rank in range(3):
        with TraceWriter(tmp_path, ["id"], rank=rank) as writer:
            for step in range(1, 5):
                writer.write(step, {"id": torch.arange(2)}, {"half": (step - 1) // 2})
    (tmp_path / "half=0" / ".rank-00000-step-000000000009.parquet.part").touch()
    (tmp_path / "half=0" / "notes.txt").touch()
    with TraceWriter(tmp_path, ["id"], rank=0) as writer:
        assert writer.rewind(3, ranks=2) == 4  # of ranks 0 and 2
    found = read(tmp_path / "half=1")
    assert list(zip(found["rank"], found["step"], strict=True)) == [
        *[(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (1, 4), (1, 4)]
    ]
    assert not list(tmp_path.rglob("*.part"))
    assert (tmp_path / "half=0" / "notes.txt").exists()


def test_a_column_that_changes_its_type_is_refused_and_the_rest_is_kept(tmp_path):
    writer = TraceWriter(tmp_path, ["id"])
    writer.write(1, {"id": torch.arange(2)})
    writer.write(2, {"id": torch.rand(2)})
    with pytest.raises(
        RuntimeError, match=r"step 2 on is lost: .*'id' was int64 before, is float now"
    ):
        writer.close()
    assert read(tmp_path)["id"] == [0, 1]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": torch.arange(2), "b": torch.arange(3)}, "as many rows everywhere"),
        ({"a": torch.arange(2)}, r"missing \['b'\]"),
        ({"a": 1, "b": 2, "c": 3}, r"not known \['c'\]"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, words):
    with TraceWriter(tmp_path, ["a", "b"]) as writer, pytest.raises(ValueError, match=words):
        writer.write(1, columns)


def test_arguments_are_checked(tmp_path, monkeypatch):
    for names in ([], ["step"], ["a", "a"]):
        with pytest.raises(ValueError, match="tensors: expected"):
            TraceHook(names, tmp_path)
    with pytest.raises(TypeError, match="tensors: expected a sequence of names, got 'id'"):
        TraceHook("id", tmp_path)
    with pytest.raises(ValueError, match="every: expected an int >= 1, got 0"):
        TraceHook(["id"], tmp_path, every=0)
    with pytest.raises(TypeError, match="name: expected a str"):
        add_to_trace(3, torch.zeros(1))
    with collect_trace(), pytest.raises(TypeError, match=r"'x': expected a tensor, .* got object"):
        add_to_trace("x", object())
    with TraceWriter(tmp_path / "t", ["x"]) as writer, pytest.raises(TypeError, match="complex64"):
        writer.write(1, {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(RuntimeError, match="is closed"):
        writer.write(1, {"x": torch.zeros(2)})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'recis-lightning\[trace\]'"):
        TraceWriter(tmp_path / "u")


def test_a_hook_can_be_copied_and_pickled(tmp_path):
    hook = TraceHook(["id"], tmp_path / "t")
    for other in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert (other.tensors, other.path, other.every) == (["id"], hook.path, 1)
