"""ShardedEvaluation: added to a Trainer once, before callbacks that use collectives."""

from types import SimpleNamespace

from lightning.pytorch import Callback

from recis_lightning.callbacks.sharded_evaluation import ShardedEvaluation


def test_it_is_attached_once_and_first():
    others = [Callback(), Callback()]
    trainer = SimpleNamespace(callbacks=[*others])
    ShardedEvaluation.attach(trainer)
    ShardedEvaluation.attach(trainer)
    first, *rest = trainer.callbacks
    assert isinstance(first, ShardedEvaluation)
    assert rest == others
