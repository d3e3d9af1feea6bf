"""Saves between a batch's step and its end: a resumed run goes on as an undisturbed one."""

from contextlib import suppress

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

from recis_lightning import DynamicEmbedding, HashTable, hash_tables
from recis_lightning.admission import MinCount
from recis_lightning.callbacks import HashTableFilterHook, MLTrackerHook, TraceHook
from recis_lightning.callbacks import finished_batches as module
from recis_lightning.eviction import GlobalStepFilter, MaxRows
from recis_lightning.metrics import add_to_ml_tracker
from recis_lightning.optim import SparseAdam, SparseDenseOptimizer
from recis_lightning.trace import add_to_trace
from tests.helpers.quiet_trainer import quiet_trainer
from tests.helpers.trace_data import read_trace

# The resumed run has other callbacks than the one that saved.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

BATCHES = [[1, 2, 3], [2, 3], [3, 4], [4, 5], [5, 1], [6, 2], [6, 7], [7, 8]]


class Batches(torch.utils.data.Dataset):
    """As many batches as there are; the model reads them by their numbers."""

    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, index):
        return torch.zeros(1)


class Resumable(torch.utils.data.DataLoader):
    """A loader that Lightning takes for one that goes on where it was."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Model(L.LightningModule):
    """Trains each batch's ids; stale ones are evicted."""

    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.user = DynamicEmbedding(2, eviction=GlobalStepFilter(2), name="user", **settings)
        self.item = DynamicEmbedding(2, eviction=GlobalStepFilter(1), name="item")
        self.tower = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        ids = torch.tensor(BATCHES[batch_idx])
        add_to_ml_tracker("batch", batch_idx)
        add_to_trace("id", ids)
        return self.tower(self.user(ids) + self.item(ids)).square().sum()

    def configure_optimizers(self):
        dense = torch.optim.SGD(self.parameters(), lr=0.1)
        return SparseDenseOptimizer(dense, SparseAdam(hash_tables(self), lr=0.1))

    def train_dataloader(self):
        return Resumable(Batches())


class Act(L.Callback):
    """Does something at the end of a batch, before hooks that come behind it do."""

    def __init__(self, at, act):
        self.at, self.act = at, act

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.at:
            self.act(trainer)


def fail(trainer):
    raise ArithmeticError


def interrupt(trainer):
    raise KeyboardInterrupt


def state_of(model, hook):
    found = [hook.state_dict()]
    for table in hash_tables(model):
        ids = table.ids().sort().values
        found.append((table.step, ids.tolist(), table.last_seen(ids).tolist()))
        found.append(table.embeddings(ids).tolist())
    return found


def run(path, *callbacks, model=None, ckpt=None, **settings):
    """Fit, and return the state of tables and hook after it, however it ended."""
    hook, model = HashTableFilterHook(2), model or Model()
    settings["enable_checkpointing"] = any(isinstance(one, Checkpoint) for one in callbacks)
    trainer = quiet_trainer(path, *callbacks, hook, **settings)
    with suppress(ArithmeticError, KeyboardInterrupt, SystemExit):
        trainer.fit(model, ckpt_path=ckpt, weights_only=True)
    return state_of(model, hook)


def on_exception(path):
    """Return what saves ``saved/stop.ckpt``, and nothing else, where a run fails."""
    return ModelCheckpoint(path / "saved", "stop", save_on_exception=True, every_n_epochs=9)


@pytest.fixture
def whole(tmp_path):
    return run(tmp_path / "whole")


@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("act", [fail, interrupt])
@pytest.mark.slow_except(dict(at=[2, 7], act=fail), dict(at=3, act=interrupt))
def test_a_run_that_another_callback_ended_goes_on(tmp_path, whole, at, act):
    saver = on_exception(tmp_path)
    run(tmp_path, Act(at, act), saver)
    assert run(tmp_path, ckpt=tmp_path / "saved/stop.ckpt") == whole


@pytest.mark.filterwarnings("ignore:.*ckpt_path=:UserWarning")  # Lightning looks for an older one
def test_lightnings_own_checkpoint_of_an_exception_is_level_too(tmp_path, whole):
    run(tmp_path, Act(4, fail), OnExceptionCheckpoint(tmp_path / "saved", "stop"))
    assert run(tmp_path, ckpt=tmp_path / "saved/stop.ckpt") == whole


@pytest.mark.parametrize("at", [1, 3, 7])
@pytest.mark.slow_except(dict(at=3))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_callback_saves_before_the_hook(tmp_path, at, accumulate):
    """The run that saved goes on, too, and counts no batch twice."""
    settings = {"accumulate_grad_batches": accumulate}
    whole = run(tmp_path / "whole", **settings)
    save = Act(at, lambda trainer: trainer.save_checkpoint(tmp_path / "c.ckpt"))
    assert run(tmp_path / "first", save, **settings) == whole
    assert run(tmp_path / "second", ckpt=tmp_path / "c.ckpt", **settings) == whole


@pytest.mark.parametrize("method", ["update_step", "evict"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [5, 6])
def test_an_interrupted_filtering_is_finished(tmp_path, whole, monkeypatch, method, after, number):
    """Before or after one of the tables has counted or evicted, in the third or a later batch."""
    saver = on_exception(tmp_path)
    original, calls = getattr(HashTable, method), []

    def interrupting(table, *args):
        calls.append(table)
        if after or len(calls) != number:
            result = original(table, *args)
        if len(calls) == number:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(HashTable, method, interrupting)
    run(tmp_path, saver)
    monkeypatch.undo()
    assert len(calls) >= number
    assert run(tmp_path, ckpt=tmp_path / "saved/stop.ckpt") == whole


def test_each_step_is_traced_and_tracked_once(tmp_path):
    """Also that of the batch in whose end the run failed, in which the hooks had no turn."""
    saver = on_exception(tmp_path)
    written = []

    class Logger(L.pytorch.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            written.extend(int(metrics[name]) for name in ("batch",) if name in metrics)

    for act, ckpt in ((fail, None), (lambda trainer: None, tmp_path / "saved/stop.ckpt")):
        hooks = [Act(3, act), TraceHook(["id"], tmp_path / "trace"), MLTrackerHook(), saver]
        run(tmp_path, *hooks, ckpt=ckpt, logger=Logger(tmp_path))
    found = read_trace(tmp_path / "trace")
    steps = [step for step, ids in enumerate(BATCHES, 1) for _ in ids]
    assert (found["step"], found["id"]) == (steps, [i for ids in BATCHES for i in ids])
    assert written == list(range(8))


class Manual(Model):
    """Fails in a batch, before or after its optimizer has stepped."""

    def __init__(self, at, after, **settings):
        super().__init__(**settings)
        self.automatic_optimization, self.at, self.after = False, at, after

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == self.at and not self.after:
            raise ArithmeticError
        self.manual_backward(loss)
        self.optimizers().step()
        self.optimizers().zero_grad()
        if batch_idx == self.at:
            raise ArithmeticError


def said(caplog):
    return [r.getMessage() for r in caplog.records if r.name == module.__name__]


@pytest.mark.parametrize("after", [False, True])
def test_weights_that_will_be_updated_twice_are_named(tmp_path, caplog, after):
    saver = on_exception(tmp_path)
    whole = run(tmp_path / "whole", model=Manual(-1, True))
    run(tmp_path, saver, model=Manual(3, after))
    path = tmp_path / "saved/stop.ckpt"
    assert said(caplog) == after * [
        f"{path} is saved within training batch 4, which a run that resumes from it trains again: "
        "an optimizer has updated weights in it already; one saved at a batch's end has it once"
    ]
    assert (run(tmp_path, ckpt=path, model=Manual(-1, True)) == whole) == (not after)
    assert len(said(caplog)) == after


def test_a_step_that_lightning_has_not_counted_yet_is_named(tmp_path, caplog):
    """In automatic optimization, after the optimizer's step or within it."""

    class Fails(Model):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer.step(closure=optimizer_closure)
            if batch_idx == 3:
                raise ArithmeticError

    run(tmp_path, on_exception(tmp_path), model=Fails())
    assert len(said(caplog)) == 1
    assert "batch 4, which a run that resumes from it trains again: an optimizer" in said(caplog)[0]


def test_ids_that_will_be_counted_twice_are_named(tmp_path, caplog):
    model = Manual(3, False, admission=MinCount(2))
    model.item = DynamicEmbedding(2, eviction=MaxRows(4, by="count"), name="item")
    saver = on_exception(tmp_path)
    run(tmp_path, saver, model=model)
    assert len(said(caplog)) == 1
    assert "tables ['user', 'item'] have counted ids of its lookups already" in said(caplog)[0]


def test_a_save_at_another_time_says_and_finishes_nothing(tmp_path, whole, caplog):
    """Before training, between batches, in validation, and after it."""

    class Save(L.Callback):
        def save(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "c.ckpt")

        on_train_start = on_train_epoch_start = on_train_batch_start = save
        on_train_epoch_end = on_train_end = save

    assert run(tmp_path, Save()) == whole
    saver = on_exception(tmp_path)
    run(tmp_path, Act(3, fail), saver)
    assert run(tmp_path, Save(), ckpt=tmp_path / "saved/stop.ckpt") == whole
    assert not said(caplog)


def test_a_run_that_resumes_says_nothing_before_its_first_batch(tmp_path, caplog):
    """Lightning has then the counts of the batch within which the other run was saved."""
    settings = {"admission": MinCount(2)}
    run(tmp_path, on_exception(tmp_path), model=Manual(3, False, **settings))

    class Save(L.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "c.ckpt")

    model = Manual(-1, False, **settings)
    hook = HashTableFilterHook(2)
    trainer = quiet_trainer(tmp_path, hook, Save())
    trainer.fit(model, ckpt_path=tmp_path / "saved/stop.ckpt", weights_only=True)
    assert hook.state_dict()["num_batches"] == 8
    assert len(said(caplog)) == 1
