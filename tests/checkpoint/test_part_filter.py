"""Checkpoints that leave parts out, by the functions and by ``CheckpointHook``."""

import copy
import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recis_lightning import HashTable, checkpoint, hash_tables
from recis_lightning.callbacks import CheckpointHook
from recis_lightning.checkpoint.commit import Commit
from recis_lightning.checkpoint.part_filter import PartFilter
from recis_lightning.optim import SparseAdam
from tests.helpers.click_data import ResumableLoader
from tests.helpers.lightning_model import Model, differences, everything, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


def fit(path, hook, model=None, ckpt_path=None):
    """Train sixteen steps, saving after five and at the end; return the model."""
    model = Model() if model is None else model
    keep = ModelCheckpoint(path, "{step}", every_n_train_steps=5, save_top_k=-1)
    run = trainer(path, keep, hook, enable_checkpointing=True, max_epochs=2)
    run.fit(model, ResumableLoader(), ckpt_path=ckpt_path)
    return model


def test_tables_state_and_dense_tensors_are_left_out(tmp_path, caplog):
    """What is left is there to the bit; a run that resumes has its own in place of the rest."""
    exclude = ["*.exp_avg*", "user", "tower.0.*"]
    fit(tmp_path / "whole", CheckpointHook())
    fit(tmp_path / "part", CheckpointHook(exclude=exclude))
    whole, part = (tmp_path / name / "step=5.ckpt" for name in ("whole", "part"))
    contents = checkpoint.inspect(part)
    assert {name: of.slots for name, of in contents.items()} == {"item": {}, "tags": {}}
    assert {of.num_updates for of in contents.values()} == {0}
    assert not any(file.name.startswith("user") for file in (tmp_path / "part").rglob("*"))
    for name in contents:
        one, other = (checkpoint.read_table(file, name) for file in (whole, part))
        assert set(one) - set(other) == {"exp_avg", "exp_avg_sq"}
        assert all((one[key] == other[key]).all() for key in other)
    states = torch.load(part, weights_only=True)["state_dict"]
    assert {name for name in states if name.startswith("tower")} == {
        "tower.2.weight",
        "tower.2.bias",
    }

    class Recording(Model):
        def on_train_start(self):
            self.began = copy.deepcopy(everything(self))

    caplog.set_level(logging.WARNING)
    resumed, fresh = Recording(seed=1), Model(seed=1)
    again = tmp_path / "again"
    fit(again, CheckpointHook(), resumed, ckpt_path=part)
    assert "was saved without item.exp_avg, item.exp_avg_sq, tags.exp_avg" in caplog.text
    began = resumed.began
    assert len(began["user ids"]) == 0
    assert torch.equal(began["dense tower.0.weight"], fresh.tower[0].weight)
    assert torch.equal(began["dense tower.2.weight"], states["tower.2.weight"])
    assert not began["item exp_avg"].any()
    assert not began["item exp_avg_sq"].any()
    assert (began["item num_updates"], began["item step"]) == (0, 5)
    # What resumed is a whole run again.
    assert len(resumed.user.table)
    assert checkpoint.inspect(again / "step=15.ckpt")["user"].slots


def test_a_part_of_the_state_alone_is_no_use(tmp_path):
    """It is in the file; who loads it starts afresh, the bias correction too."""
    table = HashTable(2, name="user")
    optimizer = SparseAdam([table], lr=0.1)
    table.insert(torch.tensor([7]), torch.ones(1, 2))
    weights, slots = table.storage.rows.read(table.ids_map()[1])
    slots = {name: torch.ones_like(slot) for name, slot in slots.items()}
    table.storage.rows.write(table.ids_map()[1], weights, slots)
    checkpoint.save(tmp_path, [table], exclude=["user.exp_avg_sq"])
    assert set(checkpoint.read_table(tmp_path, "user")) == {"ids", "weights", "exp_avg"}
    checkpoint.load(tmp_path, [table])
    _, slots = table.storage.rows.read(table.ids_map()[1])
    assert not any(slot.any() for slot in slots.values())
    assert table.optimizer is optimizer


def test_tables_that_are_left_out_stay_as_they_are(tmp_path):
    """In ``checkpoint.load``, and in a module's state; asked for by name they are an error."""
    tables = [HashTable(2, name="user"), HashTable(2, name="item")]
    for table in tables:
        table.insert(torch.tensor([1]), torch.ones(1, 2))
    checkpoint.save(tmp_path, tables, exclude=["us*"])
    others = [HashTable(2, name="user"), HashTable(2, name="item")]
    others[0].insert(torch.tensor([5]), torch.ones(1, 2))
    checkpoint.load(tmp_path, others)
    assert [table.ids().tolist() for table in others] == [[5], [1]]
    with pytest.raises(ValueError, match=r"tables: .* has the tables \['item'\], got \['user'\]"):
        checkpoint.load(tmp_path, others, tables=["user"])
    checkpoint.save(tmp_path, tables, exclude=["*"])
    assert checkpoint.inspect(tmp_path) == {}
    checkpoint.load(tmp_path, others)
    assert [table.ids().tolist() for table in others] == [[5], [1]]


def test_load_from_checkpoint_without_a_table(tmp_path):
    """Without the hook: Lightning misses only what it knows of."""
    fit(tmp_path, CheckpointHook(exclude=["user"]))
    loaded = Model.load_from_checkpoint(tmp_path / "step=15.ckpt", weights_only=True)
    assert [len(table) > 0 for table in hash_tables(loaded)] == [False, True, True]


def test_save_filter_gets_names_and_returns_those_to_save(tmp_path):
    given = []

    def without_tags(names):
        given.append(names)
        return [name for name in names if name.split(".")[0] != "tags"]

    whole = fit(tmp_path / "whole", CheckpointHook())
    fit(tmp_path / "part", CheckpointHook(exclude=["item"], save_filter=without_tags))
    assert {"user", "user.exp_avg", "tags", "tower.0.weight"} <= set(given[0])
    assert "item" not in given[0]
    assert list(checkpoint.inspect(tmp_path / "part" / "step=15.ckpt")) == ["user"]
    # The run itself is as any other.
    other = fit(tmp_path / "part", CheckpointHook(save_filter=without_tags))
    assert differences(everything(whole), everything(other)) == []


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (["user", "usr"], ValueError, r"save_filter: expected some of the names .* got \['usr'\]"),
        ("user", TypeError, "save_filter: expected a list of names or patterns, got 'user'"),
        (None, TypeError, "save_filter: expected a list of names or patterns, got None"),
    ],
)
def test_what_save_filter_may_not_return(tmp_path, returned, error, message):
    """The checkpoint before stays whole."""
    fit(tmp_path, CheckpointHook())
    before = everything(Model.load_from_checkpoint(tmp_path / "step=5.ckpt"))
    with pytest.raises(error, match=message):
        fit(tmp_path, CheckpointHook(save_filter=lambda names: returned))
    after = everything(Model.load_from_checkpoint(tmp_path / "step=5.ckpt"))
    assert differences(before, after) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": "user"}, r"exclude: expected a list of names .* write \['user'\]"),
        ({"exclude": [3]}, "exclude: expected a list of names or patterns, got"),
        ({"save_filter": "user"}, "save_filter: expected a function"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        CheckpointHook(**arguments)


def test_a_pattern_that_leaves_nothing_out_is_logged(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    fit(tmp_path, CheckpointHook(exclude=["usr", "*.exp_avg*"]))
    assert r"exclude=['usr'] leaves nothing out" in caplog.text


def test_commits_without_exclusions_are_as_before():
    """Older versions read them."""
    commit = Commit("ab", 1, ".", "/x", {})
    assert set(commit.to_state()) == {
        *("format", "save_id", "world_size", "folder", "location", "tables")
    }
    assert Commit.from_state(commit.to_state(), "here") == commit
    with pytest.raises(ValueError, match="its list of tables is damaged"):
        Commit.from_state({**commit.to_state(), "excluded": [1]}, "here")


def test_filters_of_nothing():
    assert not PartFilter(None, None).is_used
    assert PartFilter([], None).excluded([HashTable(2, name="a")], None) == []
