"""TrainerBridge: strategies that are refused, and the callback that a Trainer gets."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)

from recis_lightning import DynamicEmbedding, hash_tables
from recis_lightning.callbacks.sharded_evaluation import ShardedEvaluation
from recis_lightning.trainer_bridge import TrainerBridge


class Model(L.LightningModule):
    """A model of one table, below a module of its own."""

    def __init__(self):
        super().__init__()
        self.tower = torch.nn.Sequential(DynamicEmbedding(2))


def runner_under(strategy):
    """Return what runs the lookups of a model whose Trainer has ``strategy``."""
    model = Model()
    model._trainer = SimpleNamespace(strategy=strategy, callbacks=[])
    return model, TrainerBridge().runner_of(hash_tables(model))


@pytest.mark.parametrize(
    ("kind", "attributes", "message"),
    [
        (DeepSpeedStrategy, {}, "DeepSpeedStrategy: its engine owns.*strategy='ddp'"),
        (FSDPStrategy, {}, "FSDPStrategy: .*strategy='ddp'"),
        (ModelParallelStrategy, {}, "ModelParallelStrategy: .*strategy='ddp'"),
        (DDPStrategy, {"_start_method": "spawn"}, "started by 'spawn' .ddp_spawn.*strategy='ddp'"),
    ],
)
def test_strategies_that_cannot_train_tables_are_refused(kind, attributes, message):
    """The error says what to use; nothing of ours need be a callback of the Trainer."""
    strategy = kind.__new__(kind)
    vars(strategy).update({"_root_device": None, "parallel_devices": [None], **attributes})
    strategy.__class__ = type(kind.__name__, (kind,), {"root_device": None})
    with pytest.raises(RuntimeError, match=message):
        runner_under(strategy)


def test_ddp_is_accepted():
    """As is a lookup outside Lightning."""
    TrainerBridge().runner_of(hash_tables(DynamicEmbedding(2))).join_evaluation()
    strategy = type("DDPStrategy", (DDPStrategy,), {"root_device": None})()
    runner_under(strategy)


def test_a_trainer_gets_the_callback_that_serves_other_ranks():
    """Once, however often it evaluates; the next Trainer of the model gets its own."""
    model, runner = runner_under(SimpleNamespace())
    first = model._trainer
    for trainer in (first, first, SimpleNamespace(strategy=None, callbacks=[])):
        model._trainer = trainer
        runner.join_evaluation()
        assert [type(callback) for callback in trainer.callbacks] == [ShardedEvaluation]
    model._trainer = None
    runner.join_evaluation()
