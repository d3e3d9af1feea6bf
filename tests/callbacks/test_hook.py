"""Hook: RecIS's nine methods, called from Lightning's."""

import copy
import pickle
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from recis_lightning.callbacks import Hook
from recis_lightning.metrics import add_metric, clear_metrics
from tests.helpers.quiet_trainer import quiet_trainer

POINTS = (
    "before_train",
    "after_train",
    "before_evaluate",
    "after_evaluate",
    "before_epoch",
    "after_epoch",
    "before_step",
    "after_step",
    "end",
)


@pytest.fixture
def make_trainer(tmp_path):
    limits = {"limit_train_batches": 2, "limit_val_batches": 1, "limit_test_batches": 1}
    return partial(quiet_trainer, tmp_path, **limits)


class Everything(Hook):
    """Records each hook point, through overrides without parameters."""

    def __init__(self):
        self.calls = []  # no super().__init__(), as in RecIS's example


def _recording(point):
    def method(self):
        self.calls.append(point)

    return method


Everything = type("Everything", (Everything,), {point: _recording(point) for point in POINTS})


def test_order_of_the_points(make_trainer):
    hook = Everything()
    make_trainer(hook, max_epochs=2).fit(BoringModel())
    step = ["before_step", "after_step"]
    epoch = ["before_epoch", *step, *step, "before_evaluate", "after_evaluate", "after_epoch"]
    assert hook.calls == ["before_train", *epoch, *epoch, "after_train", "end"]


def test_test_and_validate_are_evaluations_and_predict_is_none(make_trainer):
    hook = Everything()
    trainer = make_trainer(hook, limit_predict_batches=1)
    trainer.validate(BoringModel(), verbose=False)
    trainer.test(BoringModel(), verbose=False)
    trainer.predict(BoringModel())
    assert hook.calls == ["before_evaluate", "after_evaluate", "end"] * 2 + ["end"]


def test_the_sanity_check_is_no_evaluation(make_trainer):
    hook = Everything()
    make_trainer(hook, num_sanity_val_steps=1, check_val_every_n_epoch=9).fit(BoringModel())
    assert "before_evaluate" not in hook.calls
    assert "after_evaluate" not in hook.calls


def test_end_runs_once_when_training_fails(make_trainer):
    class Failing(Everything):
        def after_step(self):
            raise RuntimeError("no more")

    hook = Failing()
    with pytest.raises(RuntimeError, match="no more"):
        make_trainer(hook).fit(BoringModel())
    assert hook.calls == ["before_train", "before_epoch", "before_step", "end"]


def test_end_runs_once_when_end_fails(make_trainer):
    class Failing(Hook):
        count = 0

        def end(self):
            self.count += 1
            raise RuntimeError("at the end")

    hook = Failing()
    with pytest.raises(RuntimeError, match="at the end"):
        make_trainer(hook).fit(BoringModel())
    assert hook.count == 1


def test_a_method_is_given_what_it_names(make_trainer):
    class Greedy(Hook):
        def __init__(self):
            self.seen = []

        def before_step(self, batch_idx, batch, outputs):
            self.seen.append(("before", batch_idx, tuple(batch.shape), outputs))

        def after_step(self, global_step, metrics, outputs, batch, batch_idx, pl_module, trainer):
            assert trainer.lightning_module is pl_module
            assert isinstance(metrics, dict)
            assert outputs["loss"].shape == ()
            self.seen.append(("after", batch_idx, tuple(batch.shape), global_step))

        def before_train(self, batch, trainer):
            assert batch is None
            assert isinstance(trainer, pl.Trainer)

    hook = Greedy()
    make_trainer(hook).fit(BoringModel())
    assert hook.seen == [
        ("before", 0, (1, 32), None),
        ("after", 0, (1, 32), 1),
        ("before", 1, (1, 32), None),
        ("after", 1, (1, 32), 2),
    ]


def test_metrics_are_a_copy_with_the_values_of_the_evaluation(make_trainer):
    class Model(BoringModel):
        def validation_step(self, batch, batch_idx):
            self.log("auc", 0.75)

    class Reading(Hook):
        def after_evaluate(self, metrics):
            self.auc = metrics.pop("auc").item()

    hook = Reading()
    trainer = make_trainer(hook)
    trainer.fit(Model())
    assert hook.auc == 0.75
    assert trainer.callback_metrics["auc"] == 0.75


def test_every_kind_of_parameter(make_trainer):
    class Kinds(Hook):
        def before_train(self, *args, **kwargs):
            self.train = (args, sorted(kwargs))

        def before_epoch(self, trainer, /, pl_module, *, global_step, note="kept"):
            self.epoch = (type(trainer), type(pl_module), global_step, note)

        @staticmethod
        def before_step(trainer, **rest):
            Kinds.step = (type(trainer), sorted(rest))

        @classmethod
        def after_step(cls, _, gstep):
            cls.recis = (_, gstep)

        def after_epoch(self, unknown=1, trainer=None, /):
            self.skipped = (unknown, trainer)

    hook = Kinds()
    make_trainer(hook, limit_train_batches=1).fit(BoringModel())
    offered = ["batch", "batch_idx", "global_step", "metrics", "outputs", "pl_module", "trainer"]
    assert hook.train == ((), offered)
    assert hook.epoch == (pl.Trainer, BoringModel, 0, "kept")
    assert Kinds.step == (pl.Trainer, [name for name in offered if name != "trainer"])
    assert Kinds.recis == (None, 1)
    assert hook.skipped == (1, None)


def test_an_unknown_parameter_is_refused_when_the_class_is_defined():
    with pytest.raises(
        TypeError, match=r"Wrong\.after_step: nothing to give parameter 'model'; expected any of"
    ):

        class Wrong(Hook):
            def after_step(self, trainer, model):
                pass


class Parent(Hook):
    """Overrides RecIS's and Lightning's method of a hook point, without super()."""

    def __init__(self):
        self.calls = []

    def before_train(self):
        self.calls.append("before_train")

    def on_train_start(self, trainer, pl_module):
        self.calls.append("Parent.on_train_start")

    def after_step(self):
        self.calls.append("after_step")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.calls.append("Parent.on_train_batch_end")

    def end(self):
        self.calls.append("end")

    def setup(self, trainer, pl_module, stage):
        self.calls.append("setup")

    def teardown(self, trainer, pl_module, stage):
        self.calls.append("teardown")


class Silent(Parent):
    """Hides the parent's Lightning methods."""

    def on_train_batch_end(self, *args):
        self.calls.append("Silent.on_train_batch_end")


class Polite(Silent):
    """Calls super() everywhere."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.calls.append("Polite.on_train_start")

    def on_train_batch_end(self, *args):
        super().on_train_batch_end(*args)
        self.calls.append("Polite.on_train_batch_end")

    def after_step(self, trainer):
        super().after_step()
        self.calls.append("Polite.after_step")


BOTH_FACES = {
    Parent: """
        setup
        before_train Parent.on_train_start
        Parent.on_train_batch_end after_step
        teardown end
    """,
    Silent: """
        setup
        before_train Parent.on_train_start
        Silent.on_train_batch_end after_step
        teardown end
    """,
    Polite: """
        setup
        before_train Parent.on_train_start Polite.on_train_start
        Silent.on_train_batch_end Polite.on_train_batch_end after_step Polite.after_step
        teardown end
    """,
}


@pytest.mark.parametrize(("cls", "expected"), BOTH_FACES.items())
def test_both_faces_run_once_through_any_inheritance(make_trainer, cls, expected):
    hook = cls()
    make_trainer(hook, limit_train_batches=1, limit_val_batches=0).fit(BoringModel())
    assert hook.calls == expected.split()


class Mixin(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.calls = [*getattr(self, "calls", []), "mixin"]


class Before(Mixin, Hook):
    def before_train(self):
        self.calls = [*getattr(self, "calls", []), "before_train"]


class After(Hook, Mixin):
    def before_train(self):
        self.calls = [*getattr(self, "calls", []), "before_train"]


@pytest.mark.parametrize("cls", [Before, After])
def test_a_mixin_that_is_no_hook(make_trainer, cls):
    hook = cls()
    make_trainer(hook, limit_train_batches=1).fit(BoringModel())
    assert hook.calls == ["before_train", "mixin"]


def test_a_hook_may_log_and_save_state_like_any_callback(make_trainer):
    class Logging(Hook):
        def after_step(self, global_step):
            self.log("twice", 2.0 * global_step)

        def state_dict(self):
            return {"kept": 1}

    trainer = make_trainer(Logging())
    trainer.fit(BoringModel())
    assert trainer.callback_metrics["twice"] == 4.0


def test_lightnings_own_points_are_there_too(make_trainer):
    """RecIS's ``after_data`` and ``after_backward`` by Lightning's names, beside its own."""

    class Both(Hook):
        def __init__(self):
            super().__init__()
            self.calls = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.calls.append(f"data {tuple(batch.shape)}")

        def on_after_backward(self, trainer, pl_module):
            has_gradient = any(p.grad is not None for p in pl_module.parameters())
            self.calls.append(f"backward {has_gradient}")

        def after_step(self):
            self.calls.append("step")

    hook = Both()
    make_trainer(hook).fit(BoringModel())
    assert hook.calls == ["data (1, 32)", "backward True", "step"] * 2


def test_a_hook_can_be_copied_and_pickled_after_a_run(make_trainer):
    hook = Parent()
    make_trainer(hook).fit(BoringModel())
    assert copy.deepcopy(hook).calls == hook.calls
    assert pickle.loads(pickle.dumps(hook)).calls == hook.calls


def test_a_hook_without_overrides_does_nothing(make_trainer):
    trainer = make_trainer(Hook())
    trainer.fit(BoringModel())
    assert trainer.global_step == 2
    assert torch.is_grad_enabled()


def test_lightning_passes_over_what_a_hook_does_not_override():
    """Lightning times each callable method in each batch, so empty ones are None."""

    class Mine(Hook):
        def on_before_backward(self, trainer, pl_module, loss):
            super().on_before_backward(trainer, pl_module, loss)
            self.seen = loss

    hook = Mine()
    assert not callable(hook.on_after_backward)
    hook.on_before_backward(None, None, 3)
    assert hook.seen == 3


def test_metrics_hold_what_add_metric_registered(tmp_path):
    class Reading(Hook):
        def __init__(self):
            super().__init__()
            self.seen = []

        def after_step(self, metrics):
            self.seen.append((metrics["auc"], "own" in metrics))

    class Registering(BoringModel):
        def training_step(self, batch, batch_idx):
            add_metric("auc", batch_idx / 2)
            self.log("own", 1.0)
            return super().training_step(batch, batch_idx)

    hook = Reading()
    try:
        quiet_trainer(tmp_path, hook, limit_train_batches=3, limit_val_batches=0).fit(Registering())
    finally:
        clear_metrics()
    assert hook.seen == [(0.0, True), (0.5, True), (1.0, True)]


V1_2_POINTS = (
    "start",
    "after_data",
    "after_backward",
    "before_window",
    "after_window",
    "after_eval",
)


def test_points_of_recis_v1_2(make_trainer):
    """Without windows, those of windows do not come."""
    made = {point: _recording(point) for point in (*POINTS, *V1_2_POINTS)}
    hook = type("More", (Hook,), {"__init__": Everything.__init__, **made})()
    trainer = make_trainer(hook, max_epochs=1)
    trainer.fit(BoringModel())
    step = ["before_step", "after_data", "after_backward", "after_step"]
    evaluation = ["before_evaluate", "after_evaluate", "after_eval"]
    epoch = ["before_epoch", *step, *step, *evaluation, "after_epoch"]
    assert hook.calls == ["start", "before_train", *epoch, "after_train", "end"]
    hook.calls.clear()
    trainer.test(BoringModel(), verbose=False)
    assert hook.calls == ["start", *evaluation, "end"]


def test_methods_that_ask_for_is_train_run_in_evaluation_too(make_trainer):
    """Epochs do so in ``validate`` and ``test`` alone, as in RecIS."""

    def recording(point):
        def method(self, is_train=True, *args, **kwargs):
            self.calls.append((point, is_train))

        return method

    points = ("start", "before_epoch", "before_step", "after_data", "after_step", "end")
    made = {point: recording(point) for point in points}
    hook = type("Asking", (Hook,), {"__init__": Everything.__init__, **made})()
    trainer = make_trainer(hook, max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(BoringModel())
    steps = [("before_step", True), ("after_data", True), ("after_step", True)] * 2
    evaluation = [("before_step", False), ("after_data", False), ("after_step", False)]
    assert hook.calls == [
        *(("start", True), ("before_epoch", True)),
        *(*steps, *evaluation),
        ("end", True),
    ]
    hook.calls.clear()
    trainer.validate(BoringModel(), verbose=False)
    assert hook.calls == [("start", False), ("before_epoch", False), *evaluation, ("end", False)]


def test_data_is_the_batch(make_trainer):
    class Keeping(Hook):
        def after_data(self, data, batch, batch_idx, window):
            self.same = data is batch and batch_idx == 1 and window is None

    hook = Keeping()
    make_trainer(hook, max_epochs=1).fit(BoringModel())
    assert hook.same
