"""``CheckpointHook`` under a Trainer on one process; many ranks are in another file."""

import copy
import os
import pickle
import shutil
import threading
import time

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from recis_lightning import checkpoint, hash_tables, report
from recis_lightning.callbacks import CheckpointHook, LoggerHook
from recis_lightning.monitoring.checkpoint_history import read_run
from recis_lightning.optim import SparseAdagrad, SparseDenseOptimizer
from tests.helpers.click_data import ResumableLoader, loader
from tests.helpers.full_disk import largest_file
from tests.helpers.lightning_model import Model, differences, everything, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


def saving(path, *callbacks, every=5, hook=True, settings=None, **kept):
    """Return a Trainer of two epochs of eight batches that saves every few steps."""
    kept = {"save_top_k": -1, **kept}
    keep = ModelCheckpoint(path, "{step}", every_n_train_steps=every, **kept)
    hooks = [CheckpointHook()] if hook else []
    settings = {"enable_checkpointing": True, "max_epochs": 2, **(settings or {})}
    return trainer(path, keep, *hooks, *callbacks, **settings)


def resumed(path, file, hook=True, model=None, **settings):
    """Return a model that went on from a checkpoint to the end."""
    model = Model(seed=1) if model is None else model
    run = saving(path, hook=hook, every=100, settings=settings)
    run.fit(model, ResumableLoader(), ckpt_path=file)
    return model


def files_in(path):
    return sorted(
        os.path.relpath(os.path.join(folder, name), path)
        for folder, _, names in os.walk(path)
        for name in names
    )


def shards_of(path, main):
    """List the tables that a checkpoint has files of."""
    folder = path / f"{main}.tables"
    return sorted(file.name.split(".")[0] for file in folder.iterdir()) if folder.exists() else []


ALL = ["item", "tags", "user"]


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Return a folder with the checkpoints of a run, of every fifth step, which tests copy."""
    path = tmp_path_factory.mktemp("bank")
    saving(path).fit(Model(), ResumableLoader())
    return path


@pytest.fixture
def saved(tmp_path, bank):
    """Return a folder of the test's own with those checkpoints."""
    return shutil.copytree(bank, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def last_step(tmp_path_factory):
    """Return a trained model, and a folder with the checkpoint of its last step."""
    model, path = Model(), tmp_path_factory.mktemp("last")
    saving(path, every=16).fit(model, ResumableLoader())
    return model, path


@pytest.fixture
def ended(tmp_path, last_step):
    """Return that model, which tests do not change, and a folder of the test's own."""
    model, path = last_step
    return model, shutil.copytree(path, tmp_path / "a")


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-true"}]
)
@pytest.mark.slow_except(dict(settings={}))
def test_resuming_is_as_if_nothing_had_happened(tmp_path, settings):
    """With the hook and without it: dense weights, rows, slots, last-seen steps and steps."""
    model = Model()
    saving(tmp_path, LoggerHook(3), settings=settings).fit(model, ResumableLoader())
    assert shards_of(tmp_path, "step=5.ckpt") == ALL
    states = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert "ids" not in states["user.table._extra_state"]
    for hook in (True, False):
        again = resumed(tmp_path / f"{hook}", tmp_path / "step=5.ckpt", hook, **settings)
        assert differences(everything(model), everything(again)) == []


def test_load_from_checkpoint(ended):
    """The module, and the functions of ``checkpoint``, need neither Trainer nor hook."""
    model, path = ended
    file = path / "step=16.ckpt"
    loaded = Model.load_from_checkpoint(file, weights_only=True)
    assert differences(everything(model), everything(loaded)) == []
    assert checkpoint.inspect(file)["user"].rows == [len(model.user.table)]
    assert set(checkpoint.inspect(path / "step=16.ckpt.tables")) == set(ALL)
    assert len(checkpoint.read_table(file, "tags")["ids"]) == len(hash_tables(model)[2])
    other = Model(seed=3)
    checkpoint.load(file, other)
    assert torch.equal(other.user.table.ids(), loaded.user.table.ids())


def test_a_report_reads_it(ended):
    """A report of tables in shards is that of the same tables in one file."""
    model, path = ended
    plain = {"state_dict": model.state_dict(), "global_step": 16}
    torch.save(plain, path / "plain.ckpt")
    shards, whole = (read_run(path / f"{name}.ckpt") for name in ("step=16", "plain"))
    assert list(shards.tables) == list(whole.tables)
    for one, other in zip(shards.tables.values(), whole.tables.values(), strict=True):
        assert one._replace(num_bytes=0) == other._replace(num_bytes=0)
    assert len(shards.history) == 1
    one, other = shards.history, whole.history
    assert [(key, one.column(key)) for key in one.names] == [
        (key, other.column(key)) for key in other.names
    ]
    assert one.distributions == other.distributions
    assert {"table/user/ages", "table/user/norms"} <= one.distributions.keys()


def test_a_report_reads_lightnings_file_once(ended, monkeypatch):
    """Whether rows are in shards or in the file itself."""
    model, path = ended
    torch.save({"state_dict": model.state_dict()}, path / "plain.ckpt")
    load, files = torch.load, []

    def count(file, *args, **kwargs):
        files.append(file)
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", count)
    mains = [path / "step=16.ckpt", path / "plain.ckpt"]
    for main in mains:
        report(main, path / "report.html")
    assert files == mains


def test_evaluation_from_a_checkpoint(tmp_path):
    """Validate and test read rows; an optimizer is not asked for."""
    model, run = Model(), saving(tmp_path, every=16)
    run.fit(model, ResumableLoader())
    (expected,) = run.test(model, loader(200), verbose=False)
    (got,) = trainer(tmp_path, CheckpointHook()).test(
        Model(seed=1), loader(200), ckpt_path=tmp_path / "step=16.ckpt", verbose=False
    )
    assert got == expected


@pytest.mark.parametrize(
    ("top", "last"),
    [(0, True), (1, None), (1, True), (1, "link"), (2, None), (2, True), (2, "link")],
)
@pytest.mark.slow_except(dict(top=[0, 1], last=True), dict(top=2, last="link"))
def test_removed_checkpoints_take_their_shards_along(tmp_path, last, top):
    """save_top_k and save_last in all forms; every file left belongs to a checkpoint that loads."""
    model = Model()
    run = saving(tmp_path, every=3, save_top_k=top, save_last=last, monitor="step", mode="max")
    run.fit(model, ResumableLoader())
    mains = sorted(file.name for file in tmp_path.glob("*.ckpt"))
    best = [f"step={step}.ckpt" for step in (15, 12)[:top]]
    assert mains == sorted([*best, *(["last.ckpt"] if last else [])])
    linked = os.path.islink(tmp_path / "last.ckpt")
    assert linked == (last == "link")
    folders = sorted(file.name for file in tmp_path.glob("*.tables"))
    assert folders == [f"{name}.tables" for name in mains if not (linked and name == "last.ckpt")]
    assert all(shards_of(tmp_path, name.removesuffix(".tables")) == ALL for name in folders)
    for name in mains:
        again = resumed(tmp_path / "again", tmp_path / name)
        assert differences(everything(model), everything(again)) == []


def test_saving_to_one_path_again(tmp_path):
    """The rows of the checkpoint before go once the new one is whole, after training too."""
    model, run = Model(), saving(tmp_path, hook=True, save_top_k=0)
    run.fit(model, ResumableLoader())
    for _ in range(2):
        run.save_checkpoint(tmp_path / "end.ckpt")
        model.user(torch.tensor([12345]))
        run.save_checkpoint(tmp_path / "end.ckpt")
        assert shards_of(tmp_path, "end.ckpt") == ALL
    loaded = Model.load_from_checkpoint(tmp_path / "end.ckpt")
    assert 12345 in loaded.user.table.ids()


def test_weights_only(tmp_path):
    """Rows are weights; what resumes without Lightning's optimizer states is up to Lightning."""
    model = Model()
    saving(tmp_path, every=16, save_weights_only=True).fit(model, ResumableLoader())
    assert "optimizer_states" not in torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    assert shards_of(tmp_path, "step=16.ckpt") == ALL
    loaded = Model.load_from_checkpoint(tmp_path / "step=16.ckpt", weights_only=True)
    assert differences(everything(model), everything(loaded)) == []


def test_async_checkpoints(tmp_path):
    """Rows as they were when the save was asked for; old shards go when the new file is whole."""
    model = Model()
    run = saving(
        tmp_path,
        every=1,
        save_top_k=2,
        monitor="step",
        mode="max",
        save_last=True,
        settings={"plugins": [AsyncCheckpointIO()]},
    )
    run.fit(model, ResumableLoader())
    run.strategy.checkpoint_io.teardown()
    mains = sorted(file.name for file in tmp_path.glob("*.ckpt"))
    assert mains == ["last.ckpt", "step=15.ckpt", "step=16.ckpt"]
    assert all(shards_of(tmp_path, name) == ALL for name in mains)
    for name in mains:
        again = resumed(tmp_path / "again", tmp_path / name)
        assert differences(everything(model), everything(again)) == []


class HeldIO(TorchCheckpointIO):
    """Writes files; from the second on, waits for ``go``, and raises ``error`` if there is one."""

    def __init__(self):
        self.files, self.go, self.error = 0, threading.Event(), None

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.files += 1
        assert self.files == 1 or self.go.wait(60)
        if self.error is not None:
            raise self.error
        super().save_checkpoint(checkpoint, path, storage_options)


def test_an_async_checkpoint_ends_while_the_next_is_written(tmp_path, monkeypatch):
    """It removes files of the checkpoints before it, never those of the next."""
    model, held = Model(), HeldIO()
    run = saving(tmp_path, every=100, save_top_k=0, settings={"plugins": [AsyncCheckpointIO(held)]})
    run.fit(model, ResumableLoader())
    folder, replace = tmp_path / "end.ckpt.tables", os.replace

    def replace_later(source, target):
        # A shard of the third save is written, and has no name yet: now the second one ends.
        if held.files == 2 and not held.go.is_set() and str(source).startswith(str(folder)):
            held.go.set()
            deadline = time.monotonic() + 60
            while any(file.name in first for file in folder.iterdir()):
                assert time.monotonic() < deadline, "the first save's shards stayed"
                time.sleep(0.001)
        replace(source, target)

    io = run.strategy.checkpoint_io
    run.save_checkpoint(tmp_path / "end.ckpt")
    first = {file.name for file in folder.glob("*.safetensors")}
    run.save_checkpoint(tmp_path / "end.ckpt")
    while held.files < 2:
        time.sleep(0.001)
    monkeypatch.setattr(os, "replace", replace_later)
    model.user(torch.tensor([12345]))
    run.save_checkpoint(tmp_path / "end.ckpt")
    io.teardown()
    assert held.go.is_set()
    assert shards_of(tmp_path, "end.ckpt") == ALL
    assert 12345 in Model.load_from_checkpoint(tmp_path / "end.ckpt").user.table.ids()


def test_a_checkpoint_removed_before_it_was_written(tmp_path):
    """It does not come back when its turn comes, and its shards are gone."""
    held = HeldIO()
    run = saving(tmp_path, every=100, save_top_k=0, settings={"plugins": [AsyncCheckpointIO(held)]})
    run.fit(Model(), ResumableLoader())
    for name in ("a.ckpt", "b.ckpt", "c.ckpt"):
        run.save_checkpoint(tmp_path / name)
    run.strategy.remove_checkpoint(tmp_path / "b.ckpt")
    held.go.set()
    run.strategy.checkpoint_io.teardown()
    names = {name.split("/")[0] for name in files_in(tmp_path)}
    assert names == {"a.ckpt", "a.ckpt.tables", "c.ckpt", "c.ckpt.tables"}
    assert shards_of(tmp_path, "a.ckpt") == shards_of(tmp_path, "c.ckpt") == ALL


def test_an_async_checkpoint_that_fails(tmp_path):
    """The next save raises its error and fails too; the checkpoint before both stays whole."""
    held = HeldIO()
    run = saving(tmp_path, every=100, save_top_k=0, settings={"plugins": [AsyncCheckpointIO(held)]})
    run.fit(Model(), ResumableLoader())
    io = run.strategy.checkpoint_io
    run.save_checkpoint(tmp_path / "end.ckpt")
    run.save_checkpoint(tmp_path / "end.ckpt")
    held.error = OSError("the disk is gone")
    held.go.set()
    io._executor.submit(int).result()
    held.error = None
    held.go.clear()
    with pytest.raises(OSError, match="the disk is gone"):
        run.save_checkpoint(tmp_path / "end.ckpt")
    held.go.set()
    with pytest.raises(OSError, match="the disk is gone"):
        io.teardown()
    assert shards_of(tmp_path, "end.ckpt") == ALL
    assert len(hash_tables(Model.load_from_checkpoint(tmp_path / "end.ckpt"))) == 3


@pytest.mark.filterwarnings("ignore:.*update_bn")
def test_weight_averaging(tmp_path):
    """The averaged model shares the tables: both refer to one set of shards."""
    model = Model()
    saving(tmp_path, WeightAveraging(), every=16).fit(model, ResumableLoader())
    loaded = Model.load_from_checkpoint(tmp_path / "step=16.ckpt")
    assert torch.equal(loaded.user.table.ids(), model.user.table.ids())


def test_a_moved_checkpoint(tmp_path):
    """A folder is found beside its file, with the hook and without it, and nowhere else."""
    model = Model()
    saving(tmp_path / "a", every=5).fit(model, ResumableLoader())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    # Where it was written there is now another checkpoint.
    saving(tmp_path / "a", every=5).fit(Model(seed=9), ResumableLoader())
    file = tmp_path / "b" / "step=5.ckpt"
    for hook in (True, False):
        again = resumed(tmp_path / f"again {hook}", file, hook)
        assert differences(everything(model), everything(again)) == []
    expected = everything(Model.load_from_checkpoint(file))
    other = Model(seed=3)
    checkpoint.load(file, other)
    assert torch.equal(other.user.table.ids(), Model.load_from_checkpoint(file).user.table.ids())
    # Renamed together.
    renamed = file.rename(tmp_path / "b" / "best.ckpt")
    (tmp_path / "b" / "step=5.ckpt.tables").rename(f"{renamed}.tables")
    assert differences(expected, everything(Model.load_from_checkpoint(renamed))) == []
    shutil.rmtree(f"{renamed}.tables")
    missing = r"b/step=5.ckpt.tables: this folder .* is missing: copy or move it together"
    for hook in (True, False):
        with pytest.raises(ValueError, match=missing):
            resumed(tmp_path / "again", renamed, hook)
    with pytest.raises(ValueError, match=missing):
        Model.load_from_checkpoint(renamed)


@pytest.mark.parametrize("how", ["link", "url", "open file", "fabric"])
def test_a_moved_checkpoint_by_other_names(tmp_path, ended, how):
    """By a link, a URL or an open file, and with Lightning's Fabric."""
    model, path = ended
    path.rename(tmp_path / "b")
    file = (tmp_path / "b" / "step=16.ckpt").rename(tmp_path / "b" / "best.ckpt")
    (tmp_path / "b" / "step=16.ckpt.tables").rename(f"{file}.tables")
    if how == "fabric":
        loaded = Model(seed=3)
        Fabric(accelerator="cpu").load(file, {"state_dict": loaded})
    elif how == "open file":
        with file.open("rb") as opened:
            loaded = Model.load_from_checkpoint(opened)
    else:
        link = tmp_path / "last.ckpt"
        link.symlink_to(file)
        loaded = Model.load_from_checkpoint(link if how == "link" else f"file://{file}")
    assert differences(everything(model), everything(loaded)) == []


def test_only_files_of_ours_are_removed(tmp_path):
    """Others in the folder of shards, or with names like those of our unfinished files, stay."""
    model, run = Model(), saving(tmp_path, every=100, save_top_k=0)
    run.fit(model, ResumableLoader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    others = ["end.ckpt.tables/model.safetensors", "end.ckpt.tables/model-00001-of-2.safetensors",
              "end.ckpt.backup.part", "end.ckpt.0123456789abcdef.part"]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("mine")
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert set(others) <= set(files_in(tmp_path))
    assert len(files_in(tmp_path)) == len(others) + 4
    run.strategy.remove_checkpoint(tmp_path / "end.ckpt")
    assert sorted(files_in(tmp_path)) == sorted(others)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_kill_while_a_checkpoint_is_removed(tmp_path):
    """Lightning's file goes first; the next save beside it removes the shards."""
    model, run = Model(), saving(tmp_path, every=100, save_top_k=0)
    run.fit(model, ResumableLoader())
    run.save_checkpoint(tmp_path / "old.ckpt")
    io = run.strategy.checkpoint_io.io
    remove = io.remove_checkpoint

    def remove_and_die(path):
        remove(path)
        os._exit(9)

    child = os.fork()
    if not child:
        io.remove_checkpoint = remove_and_die
        run.strategy.remove_checkpoint(tmp_path / "old.ckpt")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert shards_of(tmp_path, "old.ckpt") == sorted(["", *ALL])  # with the lock
    run.save_checkpoint(tmp_path / "new.ckpt")
    assert not (tmp_path / "old.ckpt.tables").exists()
    assert shards_of(tmp_path, "new.ckpt") == ALL


class Settings:
    """An object that torch does not load unless one trusts the file."""


def test_a_checkpoint_with_objects_takes_its_shards_along(tmp_path):
    """A file that is not read without trusting it: the shards' headers tell whose they are."""
    model, run = Model(), saving(tmp_path, every=100, save_top_k=0)
    model.on_save_checkpoint = lambda checkpoint: checkpoint.update(settings=Settings())
    run.fit(model, ResumableLoader())
    for _ in range(2):
        run.save_checkpoint(tmp_path / "end.ckpt")
        (tmp_path / "end.ckpt.tables" / "model.safetensors").write_text("mine")
        assert shards_of(tmp_path, "end.ckpt") == sorted([*ALL, "model"])
    run.strategy.remove_checkpoint(tmp_path / "end.ckpt")
    assert files_in(tmp_path) == ["end.ckpt.tables/model.safetensors"]


def test_two_trainers_that_save_to_one_path(tmp_path):
    """While one has a save under way, the other's is an error that names it."""
    held = HeldIO()
    run = saving(tmp_path, every=100, save_top_k=0, settings={"plugins": [AsyncCheckpointIO(held)]})
    run.fit(Model(), ResumableLoader())
    other = saving(tmp_path, every=100, save_top_k=0)
    other.fit(Model(seed=1), ResumableLoader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    run.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(RuntimeError, match=rf"another save of this process \({os.getpid()} on "):
        other.save_checkpoint(tmp_path / "end.ckpt")
    held.go.set()
    run.strategy.checkpoint_io.teardown()
    checkpoint.read_table(tmp_path / "end.ckpt", "user")
    other.save_checkpoint(tmp_path / "end.ckpt")
    assert shards_of(tmp_path, "end.ckpt") == ALL


def harm(file, table):
    shard = next(file.with_name(file.name + ".tables").glob(f"{table}.*"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 64
    shard.write_bytes(content)


@pytest.mark.parametrize("table", ALL)
@pytest.mark.parametrize("hook", [True, False])
def test_a_damaged_shard_changes_nothing(saved, table, hook):
    """No other table is loaded before the damage is found."""
    harm(saved / "step=5.ckpt", table)
    model = Model(seed=1)
    with pytest.raises(ValueError, match=f"{table}.*(damaged|of another save)"):
        resumed(saved / "again", saved / "step=5.ckpt", hook, model)
    assert [len(held) for held in hash_tables(model)] == [0, 0, 0]
    assert model.user.table.step == 0


class OtherOptimizer(Model):
    def configure_optimizers(self):
        dense = torch.optim.AdamW(self.parameters(), lr=0.05)
        return SparseDenseOptimizer(dense, SparseAdagrad(hash_tables(self), 0.05))


class OtherDim(Model):
    def __init__(self, seed):
        super().__init__(seed=seed)
        self.user = type(self.user)(5)


class OtherTables(Model):
    def __init__(self, seed):
        super().__init__(seed=seed)
        self.more = nn.ModuleList([type(self.user)(2, name="more")])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherOptimizer, "exp_avg_sq.*SparseAdagrad keeps .*resume with the optimizer"),
        (OtherDim, "table 'user': .* has embedding_dim=4, the model's 5"),
        (OtherTables, r"\['more'\] would get no rows"),
    ],
)
def test_another_model_is_refused(saved, kind, message):
    """The error comes before the first step."""
    model = kind(seed=1)
    model.on_train_batch_start = lambda *_: pytest.fail("it trains")
    with pytest.raises(ValueError, match=message):
        resumed(saved / "again", saved / "step=5.ckpt", model=model)


class FewerTables(Model):
    def __init__(self, seed):
        super().__init__(seed=seed)
        self.more = nn.ModuleList([type(self.user)(2, name="more")])
        del self.engine

    def forward(self, batch):
        user = self.user(batch["user"])
        return self.tower(torch.cat([batch["numbers"], user, user, user], 1)).squeeze(1)


@pytest.mark.parametrize("hook", [True, False])
def test_other_tables_without_strict_loading(saved, caplog, hook):
    """Those of both are loaded, others stay as they are, and the log says which."""
    other, loaded = FewerTables(seed=1), {}
    other.strict_loading = False
    other.on_test_start = lambda: loaded.update(user=other.user.table.ids())
    hooks = [CheckpointHook()] if hook else []
    trainer(saved, *hooks).test(other, loader(200), ckpt_path=saved / "step=10.ckpt", verbose=False)
    rows = checkpoint.inspect(saved / "step=10.ckpt")["user"].rows
    assert [len(loaded["user"])] == rows
    assert len(other.more[0].table) == 0
    if hook:
        assert "loaded the tables ['user'] of" in caplog.text
        assert "no rows of ['more'], and the model has no tables ['item', 'tags']" in caplog.text


def test_another_table_in_its_place_without_strict_loading(saved):
    """Tables are told apart by their names: one gets no rows of the table that was there."""
    other, loaded = Model(seed=1), {}
    other.user.table.given_name = "customer"
    other.strict_loading = False
    other.on_test_start = lambda: loaded.update({t.name: len(t) for t in hash_tables(other)})
    trainer(saved, CheckpointHook()).test(
        other, loader(200), ckpt_path=saved / "step=10.ckpt", verbose=False
    )
    assert loaded.pop("customer") == 0
    assert all(loaded.values())


def test_another_precision_is_refused(saved):
    """Rows of float32 would lose bits; those of bfloat16 stay such."""
    with pytest.raises(ValueError, match=r"has dtype torch.float32, the model's torch.bfloat16"):
        resumed(saved / "again", saved / "step=5.ckpt", precision="bf16-true")


def test_a_full_disk(tmp_path):
    """The save is an error; the checkpoint before it is whole, and nothing else is left."""
    model, run = Model(), saving(tmp_path, save_top_k=0)
    run.fit(model, ResumableLoader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    files, before = files_in(tmp_path), everything(model)
    model.user(torch.arange(500))
    for room in (1000, 9000):  # not for the rows, not for Lightning's file
        with largest_file(room), pytest.raises(OSError, match="Errno 27"):
            run.save_checkpoint(tmp_path / "end.ckpt")
        assert files_in(tmp_path) == files
    assert differences(everything(Model.load_from_checkpoint(tmp_path / "end.ckpt")), before) == []


def test_what_the_hook_refuses(tmp_path):
    """Strategies that bypass Lightning's file, and files that are not local."""

    class Sharded(SingleDeviceStrategy):
        def save_checkpoint(self, checkpoint, filepath, storage_options=None):
            pass

    with pytest.raises(Exception, match="CheckpointHook: Sharded writes checkpoints in its own"):
        saving(tmp_path, settings={"strategy": Sharded("cpu")}).fit(Model(), ResumableLoader())
    run = saving(tmp_path, save_top_k=0)
    run.fit(Model(), ResumableLoader())
    with pytest.raises(ValueError, match=r"expected a local file, got 's3://bucket/a.ckpt'"):
        run.save_checkpoint("s3://bucket/a.ckpt")


def test_several_hooks_leave_out_what_each_names(tmp_path):
    """A copy of a hook that ran is one that has not run."""
    hooks = [CheckpointHook(exclude=["*.exp_avg*"]), CheckpointHook()]
    run = saving(tmp_path, *hooks, hook=False, save_top_k=0, settings={"max_epochs": 1})
    run.fit(Model(), ResumableLoader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert not any(table.slots for table in checkpoint.inspect(tmp_path / "end.ckpt").values())
    for again in (copy.deepcopy(hooks[0]), pickle.loads(pickle.dumps(hooks[0]))):
        saving(tmp_path, again, hook=False, save_top_k=0).fit(Model(), ResumableLoader())


def test_a_model_without_tables(tmp_path):
    """It is saved by Lightning alone."""
    run = saving(tmp_path, every=5)
    run.fit(Model(tables=False, separate=True), ResumableLoader())
    assert not list(tmp_path.glob("*.tables"))
    saving(tmp_path / "again").fit(
        Model(tables=False, separate=True), ResumableLoader(), ckpt_path=tmp_path / "step=5.ckpt"
    )
