"""``Hook``: RecIS's base class of training hooks, as a Lightning callback."""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from recis_lightning.callbacks.fit_checks import check_fit
from recis_lightning.callbacks.hook_points import CALLERS, HOOK_POINTS, METHODS, OPEN, HookPoint
from recis_lightning.callbacks.uneven_batches import UnevenBatches
from recis_lightning.callbacks.windows import current_window
from recis_lightning.metrics import get_metrics

__all__ = ["Hook"]


_TRAINER = "_recis_lightning_trainer"  # on a Trainer and a hook: a name of the Trainer

# Names that a parameter of a RecIS method may have, and the value it gets. RecIS's own pages write
# `after_step(self, _, gstep)`.
_PARAMETERS = {
    "trainer": "trainer",
    "pl_module": "pl_module",
    "batch": "batch",
    "batch_idx": "batch_idx",
    "data": "batch",
    "outputs": "outputs",
    "is_train": "is_train",
    "window": "window",
    "metrics": "metrics",
    "global_step": "global_step",
    "gstep": "global_step",
    "_": "none",
}
_KEYWORDS = ("trainer", "pl_module", "batch", "batch_idx", "outputs", "metrics", "global_step")


_EVALUATIONS = ("validation", "test", "predict")
# Lightning's methods that run in every batch.
_EACH_BATCH = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    *(f"on_{stage}_batch_{end}" for stage in _EVALUATIONS for end in ("start", "end")),
)


class _Arguments(NamedTuple):
    """Arguments of an override: values by position, and (parameter, value) pairs by keyword."""

    positional: tuple[str, ...]
    keywords: tuple[tuple[str, str], ...]
    named: frozenset[str]

    def names(self, value: str) -> bool:
        """Return whether a parameter of its own gets a value."""
        return value in self.named


class Hook(Callback):
    """Base class of RecIS's hooks, usable wherever Lightning takes a callback.

    A subclass overrides any of the RecIS methods below, any of Lightning's own
    ``on_*``, ``setup`` and ``teardown``, or both; each runs once, whether or not an override
    calls ``super()``. A ``before_*`` method, ``start`` and ``after_data`` run before the subclass's
    own Lightning method of the same hook point, the others after it.

    Hooks written for RecIS call no ``super()``: RecIS calls their methods itself. Lightning calls
    only its own methods, so each of these must dispatch the RecIS methods of its hook points. Plain
    methods of this class could not do that: a subclass that overrides ``on_train_start`` without
    ``super()`` would silently lose its ``before_train``, and with ``super()`` the subclass would
    decide which of the two runs first. So the dispatch is wrapped around a subclass's Lightning
    methods when the subclass is defined, and only around those whose RecIS method it overrides:
    Lightning spends 12 us on each method in each batch.

    ============================  ==========================================================
    ``start``                     ``setup``: the first call of each ``fit``, ``validate``,
                                  ``test`` or ``predict``
    ``before/after_train``        ``on_train_start`` / ``on_train_end``
    ``before/after_epoch``        ``on_train_epoch_start`` / ``on_train_epoch_end``
    ``before/after_window``       the same, where the data comes in windows, of which each is an
                                  epoch (``ProgressiveValidation``)
    ``before/after_step``         ``on_train_batch_start`` / ``on_train_batch_end``
    ``after_data``                ``on_train_batch_start``, after ``before_step``
    ``after_backward``            ``on_after_backward``
    ``before/after_evaluate``     start and end of validation and test, not of the sanity check;
                                  ``after_eval`` is ``after_evaluate``
    ``end``                       the last call of each ``fit``, ``validate``, ``test`` or
                                  ``predict``: at ``teardown``, or at ``on_exception`` when the
                                  run fails (then ``after_train`` does not run, ``end`` does)
    ============================  ==========================================================

    A method of epochs, windows, steps and ``after_data`` is about training. If it has a parameter
    ``is_train``, it runs in validation and test too, with False (as in RecIS, epochs do so in
    ``validate`` and ``test``, and not where ``fit`` validates). ``start`` and ``end`` run in any
    case; there it tells whether the run is a ``fit``.

    A RecIS method gets the values that its parameters name, in any order: ``trainer``,
    ``pl_module``, ``batch`` (also as ``data``), ``batch_idx``, ``outputs``, ``metrics`` (a copy of
    ``trainer.callback_metrics``, and what ``add_metric`` registered, as it was given),
    ``global_step`` (also as ``gstep``), ``is_train``, ``window`` (the name of the current one; None
    without windows); ``_`` is None, and so is ``batch``, ``batch_idx`` or
    ``outputs`` where there is none (``outputs`` exist in ``after_step`` only). Other parameters
    keep their defaults; ``**kwargs`` receives those of these values that the method does not name,
    ``*args`` nothing. Parameters are read once, when the class is defined.

    Raises:
        TypeError: A subclass is defined whose RecIS method has a parameter that cannot be
            filled.

    Example:
        >>> class Counting(Hook):
        ...     def before_train(self):
        ...         self.batches = 0
        ...
        ...     def after_step(self, trainer, global_step):
        ...         self.batches += 1
    """

    _overrides: ClassVar[dict[str, _Arguments]] = {}
    # RecIS methods that a class calls by itself, which are therefore not dispatched.
    _self_called: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._overrides = {}
        for method in METHODS:
            override = inspect.getattr_static(cls, method)
            if method not in cls._self_called and override is not vars(Hook)[method]:
                cls._overrides[method] = _arguments(cls, method, override)
        _add_dispatch(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Lightning calls every method of every callback, each in a region of its profiler, even if
        # it is empty: 12 us for each batch and callback. It skips attributes that are not callable.
        for name in _EACH_BATCH:
            if getattr(type(self), name) is getattr(Callback, name):
                vars(self)[name] = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn once of settings that nothing acts on; let ranks end their epochs together."""
        check_fit(trainer, pl_module)
        UnevenBatches.attach(trainer)

    def start(self, *args: Any, **kwargs: Any) -> None:
        """Run as the first method of each fit, validate, test or predict."""

    def before_train(self, *args: Any, **kwargs: Any) -> None:
        """Run once before training, after the sanity check."""

    def after_train(self, *args: Any, **kwargs: Any) -> None:
        """Run once after training, unless training failed."""

    def before_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Run before each validation and test, but not before the sanity check."""

    def after_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Run after each validation and test, but not after the sanity check."""

    def after_eval(self, *args: Any, **kwargs: Any) -> None:
        """Run as ``after_evaluate``, by the name that RecIS v1.2 gives it."""

    def before_window(self, *args: Any, **kwargs: Any) -> None:
        """Run before each window of training data."""

    def after_window(self, *args: Any, **kwargs: Any) -> None:
        """Run after each window of training data."""

    def before_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run before each training epoch."""

    def after_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run after each training epoch."""

    def before_step(self, *args: Any, **kwargs: Any) -> None:
        """Run before each training batch."""

    def after_data(self, *args: Any, **kwargs: Any) -> None:
        """Run when a training batch is there, before it is used."""

    def after_backward(self, *args: Any, **kwargs: Any) -> None:
        """Run after each backward pass, before gradients are clipped and used."""

    def after_step(self, *args: Any, **kwargs: Any) -> None:
        """Run after each training batch."""

    def end(self, *args: Any, **kwargs: Any) -> None:
        """Run as the last method of each fit, validate, test or predict, even if it failed."""

    def _call(
        self,
        point: HookPoint,
        trainer: Trainer,
        pl_module: LightningModule,
        arguments: dict[str, Any],
    ) -> None:
        wanted = self._overrides.get(point.method)
        if wanted is None or (point.asked_for and not wanted.names("is_train")):
            return
        fits, is_train = trainer.state.fn is TrainerFn.FITTING, point.is_train
        if is_train is False and (
            trainer.sanity_checking or (point.method.endswith("_epoch") and fits)
        ):
            return
        window = current_window(trainer)
        if point.method.endswith("_window") and window is None:
            return

        def value(name: str) -> Any:
            if name == "metrics":
                return {**trainer.callback_metrics, **get_metrics()}
            if name == "global_step":
                return trainer.global_step
            return values.get(name)

        values = {"trainer": trainer, "pl_module": pl_module, "window": window, **arguments}
        values["is_train"] = fits if is_train is None else is_train
        getattr(self, point.method)(
            *[value(name) for name in wanted.positional],
            **{parameter: value(name) for parameter, name in wanted.keywords},
        )


def is_new_trainer(hook: Hook, trainer: Trainer) -> bool:
    """Return whether a hook that had another Trainer is used in this one; to be asked in ``setup``.

    Its state is then that of a finished run. What ``load_state_dict`` restores comes later.
    """
    token = vars(trainer).setdefault(_TRAINER, uuid.uuid4().hex)
    before, vars(hook)[_TRAINER] = vars(hook).get(_TRAINER), token
    return before is not None and before != token


def batches_done(trainer: Any) -> int:
    """Return the number of training batches done, those before a resume included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def _arguments(owner: type, method: str, override: Any) -> _Arguments:
    """Return the arguments of an override, from the names of its parameters."""
    bound = override.__get__(object(), owner) if hasattr(type(override), "__get__") else override
    parameters = inspect.signature(bound).parameters.values()
    positional: list[str] = []
    keywords: list[tuple[str, str]] = []
    skipped = False  # a positional-only parameter kept its default, so those after it must too
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            named = {p.name for p in parameters}
            keywords += [(name, name) for name in _KEYWORDS if name not in named]
        elif parameter.name not in _PARAMETERS:
            if parameter.default is parameter.empty:
                raise TypeError(
                    f"{owner.__qualname__}.{method}: nothing to give parameter {parameter.name!r}; "
                    f"expected any of {', '.join(_PARAMETERS)}, or no parameters"
                )
            skipped = True
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            if not skipped:
                positional.append(_PARAMETERS[parameter.name])
        else:
            keywords.append((parameter.name, _PARAMETERS[parameter.name]))
    by_name = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    return _Arguments(tuple(positional), tuple(keywords), by_name)


def _add_dispatch(cls: type[Hook]) -> None:
    """Make Lightning's methods dispatch their hook points, where ``cls`` overrides those."""
    for name in CALLERS:
        points = [
            point
            for point in HOOK_POINTS
            if point.caller == name
            and point.method in cls._overrides
            and (not point.asked_for or cls._overrides[point.method].names("is_train"))
        ]
        if name == "setup" and "end" in cls._overrides:
            points = points or [OPEN]
        method = inspect.getattr_static(cls, name)
        if points and not getattr(method, "_dispatches", False):
            inherited = name not in vars(cls)
            setattr(cls, name, _dispatching(cls, name, None if inherited else method))


def _dispatching(cls: type[Hook], name: str, method: Any) -> Callable[..., Any]:
    """Return Lightning's method ``name``, which also calls the RecIS methods of its hook points.

    An override and the methods it reaches by ``super()`` are one hook point: only the outermost
    dispatches it.
    """
    points = [point for point in HOOK_POINTS if point.caller == name]
    before = [point for point in points if point.before]
    after = [point for point in points if not point.before]

    @functools.wraps(method or getattr(Callback, name))
    def dispatch(
        self: Hook, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> Any:
        own = method.__get__(self, type(self)) if method else getattr(super(cls, self), name)
        state = vars(self).setdefault("_hook_state", {"open": False, "inside": set()})
        if name in state["inside"]:
            return own(trainer, pl_module, *args, **kwargs)
        state["inside"].add(name)
        try:
            if name == "setup":
                state["open"] = True
            for point in before:
                call_override(self, point, state, trainer, pl_module, args, kwargs)
            result = own(trainer, pl_module, *args, **kwargs)
            for point in after:
                call_override(self, point, state, trainer, pl_module, args, kwargs)
        finally:
            state["inside"].discard(name)
        return result

    def call_override(
        self: Hook,
        point: HookPoint,
        state: dict[str, Any],
        trainer: Trainer,
        pl_module: LightningModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if point.method == "end":
            if not state["open"]:
                return
            state["open"] = False
        arguments = dict(zip(point.arguments, args, strict=False), **kwargs)
        self._call(point, trainer, pl_module, arguments)

    dispatch._dispatches = True  # type: ignore[attr-defined]
    return dispatch
