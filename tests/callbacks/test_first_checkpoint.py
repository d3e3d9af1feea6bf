"""A run that ends in the first save of its last checkpoint."""

from unittest.mock import patch

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from recis_lightning.callbacks import CheckpointHook, checkpoint, first_checkpoint
from tests.helpers.click_data import loader
from tests.helpers.lightning_model import Model
from tests.helpers.quiet_trainer import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Tables .* have an eviction policy"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]


def run(path, **kwargs):
    """Return a Trainer of four batches that saves twice after each second one."""
    keep = ModelCheckpoint(path, "{step}", every_n_train_steps=2, **{"save_last": True, **kwargs})
    return quiet_trainer(path, keep, CheckpointHook(), enable_checkpointing=True)


def names(path):
    return sorted(found.name for found in path.glob("*.ckpt"))


def test_a_kill_before_the_last_checkpoint_is_whole(tmp_path):
    """The link leads to the first one; a run resumes from it, and leaves no link."""
    write, killed = checkpoint.write_shards, run(tmp_path)

    def kill_in_last(folder, *args):
        if folder.name.startswith("last"):
            raise InterruptedError("killed")
        return write(folder, *args)

    dies = patch.object(checkpoint, "write_shards", kill_in_last)
    with dies, pytest.raises(InterruptedError):
        killed.fit(Model(), loader(32))
    assert names(tmp_path) == ["last-whole.ckpt", "step=2.ckpt"]

    again = run(tmp_path)
    with patch.object(Model, "on_train_start", lambda model: steps.append(model.global_step)):
        steps = []
        again.fit(Model(seed=1), loader(32), ckpt_path="last")
    assert steps == [2]
    assert names(tmp_path) == ["last.ckpt", "step=4.ckpt"]


@pytest.mark.parametrize("kwargs", [{}, {"save_last": None}, {"save_weights_only": True}])
def test_no_link_is_left(tmp_path, kwargs):
    """Nor is there one in a run that asks for no last checkpoint, or cannot be resumed."""
    seen, link = set(), first_checkpoint.link_first

    def look(trainer, path):
        link(trainer, path)
        seen.update(names(tmp_path))

    with patch.object(checkpoint, "link_first", look):
        run(tmp_path, **kwargs).fit(Model(), loader(32))
    last = [] if kwargs.get("save_last", True) is None else ["last.ckpt"]
    assert names(tmp_path) == [*last, "step=4.ckpt"]
    assert ("last-whole.ckpt" in seen) == (not kwargs)
