"""Sources of a run: ``CheckpointHook(sources=[...], reload_every=...)``."""

import copy
import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from recis_lightning import hash_tables
from recis_lightning.callbacks import CheckpointHook
from recis_lightning.checkpoint import Source
from tests.helpers.click_data import ResumableLoader, loader
from tests.helpers.lightning_model import Model, differences, everything, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


class Recording(Model):
    """Keeps what it had when training began, and lengths of its tables before each batch."""

    def on_train_start(self):
        self.began = copy.deepcopy(everything(self))
        self.began_with = [len(table) for table in hash_tables(self)]


def run_with(path, hook, *callbacks, model=None, ckpt_path=None, **settings):
    """Train two epochs of eight batches, saving every fifth step; return the model."""
    model = Recording(seed=1) if model is None else model
    keep = ModelCheckpoint(path, "{step}", every_n_train_steps=5, save_top_k=-1)
    settings = {"enable_checkpointing": True, "max_epochs": 2, **settings}
    trainer(path, keep, hook, *callbacks, **settings).fit(
        model, ResumableLoader(), ckpt_path=ckpt_path
    )
    return model


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """Return the folder of a run's checkpoints, after 5, 10 and 15 steps."""
    folder = tmp_path_factory.mktemp("bank")
    run_with(folder, CheckpointHook(), model=Model())
    return folder


def loaded(file):
    return everything(Model.load_from_checkpoint(file, weights_only=True))


def test_a_run_begins_with_its_sources(tmp_path, bank, capsys):
    """Before the sanity check; once for a module, and not to evaluate it."""
    hook = CheckpointHook(sources=[Source(bank / "step=5.ckpt")])
    model = run_with(tmp_path, hook, max_epochs=1)
    assert capsys.readouterr().out.startswith("Loading from 1 source:\n  1. ")
    assert differences(model.began, loaded(bank / "step=5.ckpt")) == []
    after = copy.deepcopy(everything(model))
    run = trainer(tmp_path, hook)
    run.test(model, loader(), verbose=False)
    assert differences(after, everything(model)) == []
    run_with(tmp_path, hook, model=model, max_epochs=1)
    assert differences(after, model.began) == []
    assert capsys.readouterr().out == ""
    other = run_with(tmp_path, hook, max_epochs=1)
    assert differences(other.began, loaded(bank / "step=5.ckpt")) == []


def test_the_runs_own_checkpoint_comes_last(tmp_path, bank, capsys):
    """It wins where it has a part; parts that it leaves out come from the sources."""
    whole = bank / "step=10.ckpt"
    hook = CheckpointHook(sources=[Source(bank / "step=5.ckpt")])
    model = run_with(tmp_path / "a", hook, ckpt_path=whole)
    assert differences(model.began, loaded(whole)) == []
    assert f"then this run's own checkpoint: {whole}" in capsys.readouterr().out
    # And the run goes on as without sources.
    plain = run_with(tmp_path / "b", CheckpointHook(), ckpt_path=whole)
    assert differences(everything(model), everything(plain)) == []
    exclude = ["user", "tower.0.weight"]
    run_with(tmp_path / "part", CheckpointHook(exclude=exclude))
    part = tmp_path / "part" / "step=5.ckpt"
    model = run_with(tmp_path / "c", hook, ckpt_path=part)
    own = run_with(tmp_path / "d", CheckpointHook(), ckpt_path=part).began
    source = loaded(bank / "step=5.ckpt")
    for key, value in model.began.items():
        of_source = key.startswith("user ") or key == "dense tower.0.weight"
        expected = source[key] if of_source else own[key]
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected)), key


def test_a_checkpoint_without_shards_comes_last_too(tmp_path, bank):
    """One that was saved without the hook."""
    run = trainer(tmp_path, max_epochs=1)
    run.fit(Model(seed=4), ResumableLoader())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    hook = CheckpointHook(sources=[Source(bank / "step=5.ckpt")])
    model = run_with(tmp_path, hook, ckpt_path=tmp_path / "plain.ckpt")
    assert differences(model.began, loaded(tmp_path / "plain.ckpt")) == []


def test_a_source_that_fails_ends_the_run_before_it_begins(tmp_path, bank):
    model = Recording(seed=1)
    before = copy.deepcopy(everything(model))
    sources = [Source(bank / "step=5.ckpt"), Source(tmp_path / "none.ckpt")]
    with pytest.raises(FileNotFoundError, match=r"none.ckpt: no such file or folder"):
        run_with(tmp_path, CheckpointHook(sources=sources), model=model)
    for table in hash_tables(model):
        assert len(table) == 0
    state = everything(model)
    assert all(torch.equal(state[key], before[key]) for key in state if key.startswith("dense"))


class Replacing(Callback):
    """Puts something at a path after some batches, and notes how a tensor stands after each."""

    def __init__(self, actions):
        self.actions, self.seen = actions, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(module.tower[2].bias.item())
        action = self.actions.get(len(self.seen))
        if action is not None:
            action()


def put(path, value):
    """Write a state_dict with one tensor, whole at once."""
    torch.save({"tower.2.bias": torch.full((1,), float(value))}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_newer_sources_are_loaded_while_the_run_goes_on(tmp_path, accumulate, caplog):
    """At the looks after they came, after a step; one that cannot be read waits for the next."""
    file = tmp_path / "new.pt"
    put(file, 100)
    writes = Replacing(
        {
            3 * accumulate: lambda: put(file, 200),
            7 * accumulate: lambda: file.write_bytes(b"half of it"),
            9 * accumulate: lambda: put(file, 300),
        }
    )
    hook = CheckpointHook(sources=[Source(file)], reload_every=2)
    caplog.set_level(logging.WARNING)
    run_with(tmp_path, writes, hook, max_epochs=2 * accumulate, accumulate_grad_batches=accumulate)
    steps = writes.seen[::accumulate]
    # Looks are after steps 2, 4, 6, ...; steps move the value by less than one each.
    expected = [100] * 4 + [200] * 6 + [300] * 6
    assert [round(value / 100) * 100 for value in steps] == expected
    assert (
        caplog.text.count("Newer sources were not loaded at step 8, and nothing has changed") == 1
    )


def test_a_resumed_run_knows_what_it_had_loaded(tmp_path, capsys):
    """What came while it was down is newer; with nothing new it goes on as it was."""
    file = tmp_path / "new.pt"
    put(file, 100)
    hook = CheckpointHook(sources=[Source(file)], reload_every=100)
    run_with(tmp_path / "a", hook)
    saved = tmp_path / "a" / "step=5.ckpt"
    bias = torch.load(saved, weights_only=True)["state_dict"]["tower.2.bias"]
    again = CheckpointHook(sources=[Source(file)], reload_every=100)
    assert run_with(tmp_path / "b", again, ckpt_path=saved).began["dense tower.2.bias"] == bias
    put(file, 200)
    again = CheckpointHook(sources=[Source(file)], reload_every=100)
    assert run_with(tmp_path / "c", again, ckpt_path=saved).began["dense tower.2.bias"] == 200


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reload_every": 5}, ValueError, r"reload_every: expected sources=\[...\] to reload"),
        (
            {"sources": [Source("a")], "reload_every": 0},
            ValueError,
            "reload_every: expected an int",
        ),
        ({"sources": "a.ckpt"}, TypeError, "sources: expected a list of Source"),
        ({"sources": ["a.ckpt"]}, TypeError, "sources: expected a list of Source"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        CheckpointHook(**arguments)


def test_without_reloading_no_batch_pays_for_it():
    assert CheckpointHook().on_train_batch_end is None
    assert CheckpointHook(sources=[Source("a")], reload_every=2).on_train_batch_end is not None
    assert CheckpointHook().state_dict() == {}


def keep_tables(names):
    """Drop what has a dot in its name; named in a file of settings."""
    return [name for name in names if "." not in name]


CLI = {"run": False, "save_config_callback": None, "seed_everything_default": 1}


def test_from_yaml(tmp_path, monkeypatch):
    """Sources are mappings, without a class; functions go by their import path."""
    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  callbacks:
    class_path: recis_lightning.callbacks.CheckpointHook
    init_args:
      exclude: ["*.exp_avg*", user]
      save_filter: tests.callbacks.test_source_reload.keep_tables
      reload_every: 100
      sources:
        - path: bank/a.ckpt
        - path: bank
          load: [user, "tower.*"]
          exclude: ["*.bias"]
          rename: {"old_*": "new_*"}
          clear: false
          skip_missing: true
"""
    )
    monkeypatch.setattr("sys.argv", ["x"])
    cli = LightningCLI(Model, **CLI, args=["-c", str(config)])
    (hook,) = [one for one in cli.trainer.callbacks if isinstance(one, CheckpointHook)]
    assert hook._sources._loader.sources == [
        Source("bank/a.ckpt"),
        Source("bank", ["user", "tower.*"], ["*.bias"], {"old_*": "new_*"}, False, True),
    ]
    assert hook._parts.patterns == ["*.exp_avg*", "user"]
    assert hook._parts._save_filter(["a", "a.b"]) == ["a"]
