import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from recis_lightning import DynamicEmbedding, hash_tables, serving
from recis_lightning.callbacks import DeltaHook
from recis_lightning.serving.chain import chain_folder, read_head
from tests.helpers.click_data import loader
from tests.helpers.delta_model import assert_same
from tests.helpers.lightning_model import Model, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Kept:
    """Sink that keeps what it gets."""

    def __init__(self):
        self.deltas, self.closed = [], 0

    def write(self, delta):
        self.deltas.append(delta)

    def close(self):
        self.closed += 1


def test_a_base_then_deltas_then_the_last_one(tmp_path):
    """Every third batch, and what is left at the end; each consumer by its own interval."""
    sinks = Kept(), Kept()
    hooks = [DeltaHook(every_n_batches=n, sink=s) for n, s in zip((3, 5), sinks, strict=True)]
    model = Model()
    trainer(tmp_path, *hooks, max_steps=8).fit(model, loader())
    assert [delta.step for delta in sinks[0].deltas] == [0, 3, 6, 8]
    assert [delta.step for delta in sinks[1].deltas] == [0, 5, 8]
    assert [sink.closed for sink in sinks] == [1, 1]
    for table in hash_tables(model):
        rows = {}
        for delta in sinks[0].deltas:
            of_table = delta.tables[table.name]
            for id in of_table.removed.tolist():
                rows.pop(id, None)
            pairs = zip(of_table.ids.tolist(), of_table.weights.tolist(), strict=True)
            rows.update(pairs)
        ids = table.ids()
        assert rows == dict(zip(ids.tolist(), table.embeddings(ids).tolist(), strict=True))
        assert table.storage.changes is None


def test_a_chain_is_restored_as_a_checkpoint_is(tmp_path):
    """What the hook wrote at the last batch is what Lightning's checkpoint of it has."""
    model = Model()
    fitted = trainer(
        tmp_path, DeltaHook(tmp_path / "c", every_n_batches=2, state=True), max_steps=7
    )
    fitted.fit(model, loader())
    fitted.save_checkpoint(tmp_path / "full.ckpt")
    loaded = Model.load_from_checkpoint(tmp_path / "full.ckpt")
    restored = Model(seed=5)
    assert serving.restore(tmp_path / "c", restored) == 7
    assert_same(dict(restored.state_dict()), dict(loaded.state_dict()))


def test_by_the_clock(tmp_path, monkeypatch):
    """Batches that take a second each, deltas each 2.5 seconds."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    sink = Kept()
    hook = DeltaHook(seconds=2.5, sink=sink)

    class Slow(Model):
        def training_step(self, batch, batch_idx):
            now[0] += 1
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, hook, max_steps=8).fit(Slow(), loader())
    assert [delta.step for delta in sink.deltas] == [0, 3, 6, 8]


def test_a_failing_sink_stops_training(tmp_path):
    class Failing(Kept):
        def write(self, delta):
            super().write(delta)
            if len(self.deltas) == 2:
                raise OSError("no more")

    sink = Failing()
    model = Model()
    with pytest.raises(OSError, match="no more"):
        trainer(tmp_path, DeltaHook(every_n_batches=1, sink=sink), max_steps=8).fit(model, loader())
    assert sink.closed == 1
    assert all(table.storage.changes is None for table in hash_tables(model))


def test_a_second_run_begins_the_chain_anew(tmp_path):
    hook = DeltaHook(tmp_path / "c", every_n_batches=2)
    for _ in range(2):
        trainer(tmp_path, hook, max_steps=4).fit(Model(), loader())
    head = read_head(chain_folder(tmp_path / "c"))
    assert (head.base_seq, head.seq) == (3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"every_n_batches": 1}, ValueError, "a folder or a sink"),
        ({"folder": "x", "sink": Kept(), "seconds": 1}, ValueError, "a folder or a sink"),
        ({"folder": "x"}, ValueError, "every_n_batches or seconds"),
        ({"folder": "x", "seconds": 1, "every_n_batches": 1}, ValueError, "one of them"),
        ({"folder": "x", "every_n_batches": 0}, ValueError, "every_n_batches"),
        ({"folder": "x", "seconds": -1}, ValueError, "seconds"),
        ({"folder": "x", "seconds": 0}, ValueError, "seconds: expected a number > 0"),
        ({"folder": "x", "seconds": 0.0}, ValueError, "seconds"),
        ({"folder": "x", "seconds": 1, "state": 1}, TypeError, "state"),
        ({"sink": print, "seconds": 1}, TypeError, "sink"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        DeltaHook(**arguments)


def test_a_module_without_tables_has_only_parameters():
    """A module without tables has nothing to write, and that is fine."""
    mark = serving.ModelMark(torch.nn.Linear(2, 1))
    assert mark.take(0).num_rows == mark.take(0).num_removed == 0
    assert sorted(mark.take(0).dense) == ["bias", "weight"]


def test_a_base_waits_for_parameters_that_wait_for_a_batch():
    model = nn.Sequential(DynamicEmbedding(2, name="user"), nn.LazyLinear(1))
    sink, fit = Kept(), SimpleNamespace(global_step=0)
    hook = DeltaHook(every_n_batches=2, sink=sink)
    hook.on_train_start(fit, model)
    assert sink.deltas == []
    for step in range(1, 4):
        model(torch.arange(step))
        fit.global_step = step
        hook.on_train_batch_end(fit, model, None, None, step - 1)
    hook.on_train_end(fit, model)
    assert [(delta.step, delta.num_rows) for delta in sink.deltas] == [(1, 1), (3, 2)]
    assert set(sink.deltas[0].dense) == {"1.weight", "1.bias"}
    unused = nn.Sequential(model, nn.LazyLinear(1))
    hook.on_train_start(fit, unused)
    with pytest.raises(ValueError, match=r"its module '1' \(LazyLinear\) has no values yet"):
        hook.on_train_batch_end(fit, unused, None, None, 0)
    hook.on_exception(fit, unused, ValueError())
    assert sink.closed == 2
