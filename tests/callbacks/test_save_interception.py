"""Interception of ``trainer.save_checkpoint``: who comes first, and the Trainer afterwards."""

from itertools import permutations, product

import pytest
import torch

from recis_lightning.callbacks import CheckpointHook, Hook, LoggerHook, MetricReportHook
from recis_lightning.callbacks.save_interception import intercept_saves, release_saves
from tests.helpers.click_data import ResumableLoader
from tests.helpers.lightning_model import Model, trainer
from tests.helpers.quiet_trainer import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


class Recorded:
    """An interceptor that notes when it is entered and left."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __call__(self, save, filepath, **kwargs):
        self.calls.append(f"{self.name} {filepath}")
        save(filepath, **kwargs)
        self.calls.append(f"{self.name} ends")


@pytest.fixture(params=["the class's method", "one of its own"])
def saver(request, tmp_path):
    """Return a Trainer, with a method of its own or not, that notes what it saves."""
    run = quiet_trainer(tmp_path)
    if request.param == "one of its own":
        run.save_checkpoint = lambda filepath, **kwargs: None
    return run


def originals(run):
    return vars(run).get("save_checkpoint"), run.save_checkpoint


def test_the_trainer_is_as_it_was(saver):
    """In whatever order interceptors come and go, with repetitions."""
    before = originals(saver)
    interceptors = {name: Recorded(name, []) for name in "abc"}
    for added, removed in product(permutations("abc"), repeat=2):
        for name in (*added, *added):
            intercept_saves(saver, interceptors[name], innermost=name == "b")
        for name in removed:
            assert originals(saver) != before
            release_saves(saver, interceptors[name])
            release_saves(saver, interceptors[name])
        assert originals(saver) == before
        assert not any(key.startswith("_recis_lightning") for key in vars(saver))


@pytest.mark.parametrize("added", [*permutations("abc")])
def test_the_innermost_stands_next_to_the_save(tmp_path, added):
    """The others stand around each other as they came."""
    run, calls = quiet_trainer(tmp_path), []
    run.save_checkpoint = lambda filepath, weights_only: calls.append(f"{filepath}, {weights_only}")
    for name in added:
        intercept_saves(run, Recorded(name, calls), innermost=name == "b")
    run.save_checkpoint("x", weights_only=True)
    first, second = (name for name in reversed(added) if name != "b")
    entered = [f"{name} x" for name in (first, second, "b")]
    left = [f"{name} ends" for name in ("b", second, first)]
    assert calls == [*entered, "x, True", *left]


def test_another_wrapper_around_ours_stays(saver):
    """It goes on to the Trainer's method, with what is intercepted anew inside or around it."""
    original, calls = saver.save_checkpoint, []
    one, two = Recorded("one", calls), Recorded("two", calls)
    intercept_saves(saver, one)
    ours = saver.save_checkpoint

    def theirs(*args, **kwargs):
        calls.append("theirs")
        ours(*args, **kwargs)

    saver.save_checkpoint = theirs
    release_saves(saver, one)
    assert saver.save_checkpoint is theirs
    intercept_saves(saver, two)
    release_saves(saver, two)
    assert saver.save_checkpoint is theirs
    assert ours._original == original


class Failing(Hook):
    """Fails at a hook point."""

    def __init__(self, point):
        super().__init__()
        if point is not None:
            setattr(self, point, self.fail)

    def fail(self, *args):
        raise KeyError("stop")


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("point", [None, "on_train_start", "on_train_batch_end", "on_train_end"])
@pytest.mark.slow_except(dict(point="on_train_batch_end"), dict(point=None, turn=1))
def test_clocks_are_gone_after_a_run(tmp_path, turn, point):
    """In either order of the hooks, however the run ended; and after the next one."""
    hooks = [LoggerHook(2), Failing(point), MetricReportHook(2)]
    run = trainer(tmp_path, *hooks[::turn], filters=False, max_steps=3)
    for _ in range(2):
        try:
            run.fit(Model(), ResumableLoader())
        except KeyError:
            assert point is not None
        assert "save_checkpoint" not in vars(run)


@pytest.mark.parametrize("first", range(4))
@pytest.mark.slow_except(dict(first=[0, 3]))
def test_rows_are_saved_after_a_run(tmp_path, first):
    """``CheckpointHook`` alone stays, once, wherever among the hooks it is."""
    hooks = [LoggerHook(2), CheckpointHook(), MetricReportHook(2), CheckpointHook()]
    run = trainer(tmp_path, *hooks[first:], *hooks[:first], filters=False, max_steps=3)
    run.fit(Model(), ResumableLoader())
    assert len(run.save_checkpoint._interceptors) == 1
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert len(list((tmp_path / "a.ckpt.tables").iterdir())) == 3
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert "ids" not in state["user.table._extra_state"]
