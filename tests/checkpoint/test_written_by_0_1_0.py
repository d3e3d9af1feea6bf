"""Checkpoints and pickles of commit 749f7fc load, every id, weight, slot and step as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recis_lightning import checkpoint, hash_tables
from recis_lightning.callbacks import CheckpointHook
from recis_lightning.monitoring.report import TableReport
from recis_lightning.optim import SparseAdamW
from tests.checkpoint.written_by_0_1_0.write import Written, batches, contents
from tests.helpers.quiet_trainer import quiet_trainer

FOLDER = Path(__file__).with_name("written_by_0_1_0")
CONTENTS = json.loads((FOLDER / "contents.json").read_text())
CHECKPOINTS = {
    "state_dict.ckpt": "one_rank",
    "saved": "one_rank",
    "one_rank.ckpt": "one_rank",
    "two_ranks.ckpt": "two_ranks",
}


def test_the_files_hold_what_they_are_to_show():
    """Last-seen steps, counts, pins, pending counts, slots and bfloat16."""
    user, bf16 = CONTENTS["one_rank"]["user"], CONTENTS["one_rank"]["bf16"]
    kept = {"last_seen", "counts", "pinned_ids", "pending_ids", "exp_avg", "exp_avg_sq"}
    assert kept <= user.keys()
    assert bf16["dtype"] == "bfloat16"
    assert all(user[key] for key in kept)
    assert user["ids"][0] == -(2**63)
    assert user["ids"][-1] == 2**63 - 1


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_load_without_a_trainer(name):
    model = Written(seed=1)
    checkpoint.load(FOLDER / name, model)
    assert contents(model) == CONTENTS[CHECKPOINTS[name]]


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("state_dict.ckpt", []),
        ("state_dict.ckpt", [CheckpointHook]),
        ("one_rank.ckpt", [CheckpointHook]),  # finds files that were moved
        ("two_ranks.ckpt", [CheckpointHook]),
    ],
)
def test_training_goes_on(tmp_path, name, hooks):
    """A Trainer resumes from Lightning's file, with the hook and without it."""
    model, loaded = Written(seed=1), {}
    run = quiet_trainer(tmp_path, *(hook() for hook in hooks), max_epochs=2)
    model.on_train_start = lambda: loaded.update(contents(model))
    run.fit(model, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=FOLDER / name)
    assert loaded == CONTENTS[CHECKPOINTS[name]]
    assert model.user.table.step == 8


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_read_table_by_table(name):
    """By ``inspect``, ``read_table`` and a report."""
    for table, expected in CONTENTS[CHECKPOINTS[name]].items():
        found = checkpoint.inspect(FOLDER / name)[table]
        assert sum(found.rows) == len(expected["ids"])
        assert (found.step, found.num_updates) == (expected["step"], expected["num_updates"])
        arrays = checkpoint.read_table(FOLDER / name, table)
        order = arrays["ids"].argsort()
        for key, array in arrays.items():
            np.testing.assert_array_equal(array[order], expected[key], err_msg=key)


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "saved"])
def test_a_report_shows_them(name):
    history = TableReport.of_checkpoint(FOLDER / name).history
    rows = sum(len(table["ids"]) for table in CONTENTS[CHECKPOINTS[name]].values())
    assert history.last("tables/rows") == rows


@pytest.mark.parametrize(("file", "table"), [("embedding.pt", "user"), ("engine.pt", "bf16")])
def test_pickled_modules(file, table):
    """``torch.save(module)``: the module is whole, looks up, and trains on."""
    module = torch.load(FOLDER / file, weights_only=False)
    expected = CONTENTS["one_rank"][table]
    assert contents(module)[table] == expected
    ids = torch.tensor(expected["ids"])
    weights = torch.tensor(expected["weights"])
    found = module(ids) if file == "embedding.pt" else module({table: ids})[table]
    assert torch.equal(found.float(), weights)
    optimizer = SparseAdamW(hash_tables(module), lr=0.1)
    found.float().sum().backward()
    optimizer.step()
    after = contents(module)[table]
    assert after["num_updates"] == expected["num_updates"] + 1
    assert after["ids"] == expected["ids"]
    assert after["weights"] != expected["weights"]
    assert module.training
