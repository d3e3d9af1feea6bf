"""Runs that are killed and started again find the newest whole checkpoint."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from recis_lightning.callbacks import CheckpointHook
from tests.helpers.click_data import ResumableLoader
from tests.helpers.lightning_model import Model, differences, everything, trainer
from tests.helpers.rank_checkpoints import joined, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


def run(path):
    """Train from the newest whole checkpoint on, with a save after every second step."""
    keep = ModelCheckpoint(path, "last-{step}", every_n_train_steps=2)
    fit = trainer(path, keep, CheckpointHook(), enable_checkpointing=True)
    model = Model(seed=5)
    fit.fit(model, ResumableLoader(), ckpt_path="last", weights_only=False)
    return model, fit


def killed_in_save(path, number, torn):
    """Fork a run that ends within its save of that number, before or within Lightning's file."""
    pid = os.fork()
    if pid:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        return
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        write, left = TorchCheckpointIO.save_checkpoint, [number]

        def save_checkpoint(self, checkpoint, path, *args, **kwargs):
            left[0] -= 1
            if left[0]:
                return write(self, checkpoint, path, *args, **kwargs)
            if torn:
                Path(path).write_bytes(b"PK half of a file")
            os._exit(9)

        TorchCheckpointIO.save_checkpoint = save_checkpoint
        run(path)
    finally:
        os._exit(1)


@pytest.mark.parametrize("torn", [False, True])
def test_last_is_the_newest_whole_checkpoint(tmp_path, torn):
    """None after a kill in the first save, which Lightning says; then the one before the kill."""
    whole, _ = run(tmp_path / "whole")
    killed_in_save(tmp_path, 1, torn)
    killed_in_save(tmp_path, 2, torn)
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last-step=2.ckpt"]
    model, fit = run(tmp_path)
    assert fit.ckpt_path == str(tmp_path / "last-step=2.ckpt")
    assert differences(everything(model), everything(whole)) == []
    (tmp_path / "none").mkdir()
    killed_in_save(tmp_path / "none", 1, torn)
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        model, fit = run(tmp_path / "none")
    assert fit.ckpt_path is None
    assert differences(everything(model), everything(whole)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_starts_killed_ranks_again(tmp_path, ranks):
    """The recipe of docs/many_ranks.md: killed in a batch, then in a save, and as undisturbed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "tests.helpers.restarted_run", str(tmp_path)]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=False) for rank in range(2)]
    assert [(Path(ckpt).name, life) for _, ckpt, life in found] == [("last-step=6.ckpt", "2")] * 2
    (tmp_path / "whole").mkdir()
    whole = ranks.run(2, undisturbed, tmp_path / "whole", timeout_s=200)
    assert same(joined([shards for shards, _, _ in found]), joined(whole))


def undisturbed(path):
    """Return what a rank of a run that nothing disturbs has."""
    from recis_lightning.table.listing import hash_tables
    from tests.helpers import restarted_run
    from tests.helpers.rank_checkpoints import held
    from tests.helpers.rank_trainers import as_torchrun

    with as_torchrun() as settings:
        model, _ = restarted_run.run(path, **settings)
    return held(hash_tables(model))
