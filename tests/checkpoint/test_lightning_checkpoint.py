"""Checkpoints under Lightning: resuming is as if nothing had happened."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recis_lightning.callbacks import HashTableFilterHook
from recis_lightning.table.listing import hash_tables
from tests.helpers.click_data import ResumableLoader, loader
from tests.helpers.lightning_model import Model, differences, everything, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


class Scheduled(Model):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def saving(path, every=5, **kwargs):
    """Return a Trainer of two epochs of eight batches that saves every few steps."""
    keep = ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_train_steps=every)
    return trainer(path, keep, enable_checkpointing=True, max_epochs=2, **kwargs)


def count_of(run):
    return next(c for c in run.callbacks if isinstance(c, HashTableFilterHook)).state_dict()


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        (5, {}),
        (10, {}),
        (4, {"every": 4, "accumulate_grad_batches": 2}),
        (5, {"precision": "bf16-mixed"}),
        (5, {"precision": "bf16-true"}),
    ],
)
@pytest.mark.slow_except(dict(settings={}, step=5), dict(step=4))
def test_resuming_is_as_if_nothing_had_happened(tmp_path, step, settings):
    """Mid-epoch: dense weights, rows, slots, last-seen steps, rates and counts, bit by bit."""
    whole, model = saving(tmp_path, **settings), Scheduled()
    whole.fit(model, ResumableLoader())
    again, resumed = saving(tmp_path / "again", **settings), Scheduled(seed=1)
    again.fit(resumed, ResumableLoader(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert differences(everything(model), everything(resumed)) == []
    assert again.global_step == whole.global_step
    assert count_of(again) == count_of(whole)
    groups, expected = again.optimizers[0].param_groups, whole.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [group["lr"] for group in expected]
    one, other = (run.optimizers[0].dense.state_dict()["state"] for run in (whole, again))
    assert str(one) == str(other)


def test_a_crash_and_a_second_try(tmp_path):
    """A run that dies between backward and step, with gradients pending, and one that resumes."""

    class Crashing(Scheduled):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 7:
                raise RuntimeError("no more")

    whole = Scheduled()
    saving(tmp_path / "whole").fit(whole, ResumableLoader())
    model = Crashing()
    with pytest.raises(RuntimeError, match="no more"):
        saving(tmp_path).fit(model, ResumableLoader())
    assert model.user.table.pending
    model.on_before_optimizer_step = lambda optimizer: None
    saving(tmp_path / "again").fit(model, ResumableLoader(), ckpt_path=tmp_path / "step=5.ckpt")
    assert differences(everything(model), everything(whole)) == []


def test_checkpoints_load_safely(tmp_path):
    """weights_only=True reads them: tensors and primitives only."""
    model = Model()
    run = saving(tmp_path)
    run.fit(model, ResumableLoader())
    file = tmp_path / "step=10.ckpt"
    saved = torch.load(file, weights_only=True)
    assert saved["state_dict"]["user.table._extra_state"]["ids"].dtype is torch.int64
    again, resumed = saving(tmp_path / "again"), Model()
    again.fit(resumed, ResumableLoader(), ckpt_path=file, weights_only=True)
    assert differences(everything(model), everything(resumed)) == []


def test_load_from_checkpoint(tmp_path):
    """Rows are loaded with the weights, and evaluation gives the same figures."""
    model, run = Model(), trainer(tmp_path)
    run.fit(model, loader())
    file = tmp_path / "model.ckpt"
    run.save_checkpoint(file)
    loaded = Model.load_from_checkpoint(file, weights_only=True)
    one, other = everything(model), everything(loaded)
    assert one["dense tower.0.weight"].equal(other["dense tower.0.weight"])
    assert differences(one, other) == []
    batch = next(iter(loader()))
    assert torch.equal(model.eval()(batch), loaded.eval()(batch))


def test_weights_without_optimizers(tmp_path):
    """save_checkpoint(weights_only=True) leaves out optimizers; rows are weights."""
    model, run = Model(), trainer(tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "optimizer_states" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)
    other = Model.load_from_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert differences(everything(model), everything(other)) == []


def test_evaluation_from_a_checkpoint(tmp_path):
    """test(ckpt_path=...) reads rows from the file."""
    model, run = Model(), saving(tmp_path)
    run.fit(model, loader())
    (expected,) = run.test(model, loader(200), verbose=False)
    (got,) = trainer(tmp_path).test(
        Model(seed=1), loader(200), ckpt_path=tmp_path / "step=15.ckpt", verbose=False
    )
    assert got != expected
    run.save_checkpoint(tmp_path / "end.ckpt")
    (got,) = trainer(tmp_path).test(
        Model(seed=1), loader(200), ckpt_path=tmp_path / "end.ckpt", verbose=False
    )
    assert got == expected


def test_a_foreign_checkpoint_is_refused(tmp_path):
    """The error names the table and what does not fit."""
    model, run = Model(), trainer(tmp_path)
    run.fit(model, loader())
    run.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    del saved["state_dict"]["user.table._extra_state"]["weights"]
    torch.save(saved, tmp_path / "torn.ckpt")
    with pytest.raises(ValueError, match="state of table 'table': weights is missing"):
        Model.load_from_checkpoint(tmp_path / "torn.ckpt", weights_only=True)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_trained_module(tmp_path, copier):
    """A copy holds the same rows, and trains on as the original does, apart from it."""
    model = Model()
    trainer(tmp_path).fit(model, loader())
    model.trainer = None
    twin = copier(model)
    assert differences(everything(model), everything(twin)) == []
    for module in (model, twin):
        trainer(tmp_path).fit(module, loader())
    assert differences(everything(model), everything(twin)) == []
    optimizer = model.configure_optimizers()
    model_twin, optimizer_twin = copier((twin, optimizer))
    assert optimizer_twin.dense.param_groups[0] is optimizer_twin.param_groups[0]
    assert optimizer_twin.sparse[0].param_groups[0] is optimizer_twin.param_groups[1]
    assert len(hash_tables(model_twin)) == 3
    assert optimizer_twin.state is optimizer_twin.dense.state


def test_a_second_fit_goes_on(tmp_path):
    """Moments and update counts are part of a table; a new optimizer continues from them."""
    model = Model()
    trainer(tmp_path).fit(model, loader())
    held = everything(model)
    assert held["user exp_avg"].any()
    model.configure_optimizers()
    assert differences(held, everything(model)) == []
    trainer(tmp_path).fit(model, loader())
    assert everything(model)["user num_updates"] == 2 * held["user num_updates"] == 16
