"""``Hook``: RecIS's base class of training hooks, as a Lightning callback."""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from recis_lightning.callbacks.fit_checks import check_fit
from recis_lightning.callbacks.uneven_batches import UnevenBatches
from recis_lightning.metrics import get_metrics

__all__ = ["Hook"]


class _HookPoint(NamedTuple):
    """A RecIS method that is called from one of Lightning's.

    Attributes:
        method: Its name.
        before: Whether it runs before Lightning's method, or after it.
        arguments: Names of the arguments that Lightning's method gets, after trainer and module.
    """

    method: str
    before: bool
    arguments: tuple[str, ...] = ()


_TRAINER = "_recis_lightning_trainer"  # on a Trainer and a hook: a name of the Trainer

_EVALUATIONS = ("validation", "test", "predict")
_HOOK_POINTS = {
    "on_train_start": _HookPoint("before_train", before=True),
    "on_train_end": _HookPoint("after_train", before=False),
    "on_validation_start": _HookPoint("before_evaluate", before=True),
    "on_validation_end": _HookPoint("after_evaluate", before=False),
    "on_test_start": _HookPoint("before_evaluate", before=True),
    "on_test_end": _HookPoint("after_evaluate", before=False),
    "on_train_epoch_start": _HookPoint("before_epoch", before=True),
    "on_train_epoch_end": _HookPoint("after_epoch", before=False),
    "on_train_batch_start": _HookPoint(
        "before_step", before=True, arguments=("batch", "batch_idx")
    ),
    "on_train_batch_end": _HookPoint(
        "after_step", before=False, arguments=("outputs", "batch", "batch_idx")
    ),
    # "end" runs once after each setup, at teardown or at an exception.
    "teardown": _HookPoint("end", before=False),
    "on_exception": _HookPoint("end", before=False),
    "setup": _HookPoint("end", before=True),
}
_METHODS = tuple(dict.fromkeys(point.method for point in _HOOK_POINTS.values()))

# Names that a parameter of a RecIS method may have, and the value it gets. RecIS's own pages write
# `after_step(self, _, gstep)`.
_PARAMETERS = {
    "trainer": "trainer",
    "pl_module": "pl_module",
    "batch": "batch",
    "batch_idx": "batch_idx",
    "outputs": "outputs",
    "metrics": "metrics",
    "global_step": "global_step",
    "gstep": "global_step",
    "_": "none",
}
_KEYWORDS = ("trainer", "pl_module", "batch", "batch_idx", "outputs", "metrics", "global_step")


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


class Hook(Callback):
    """Base class of RecIS's hooks, usable wherever Lightning takes a callback.

    A subclass overrides any of the nine RecIS methods below, any of Lightning's own
    ``on_*``, ``setup`` and ``teardown``, or both; each runs once, whether or not an override
    calls ``super()``. A ``before_*`` method runs before the subclass's own Lightning method of
    the same hook point, an ``after_*`` method and ``end`` after it.

    Hooks written for RecIS call no ``super()``: RecIS calls their methods itself. Lightning calls
    only its own methods, so each of these must dispatch the RecIS method of its hook point. Plain
    methods of this class could not do that: a subclass that overrides ``on_train_start`` without
    ``super()`` would silently lose its ``before_train``, and with ``super()`` the subclass would
    decide which of the two runs first. So the dispatch is wrapped around a subclass's Lightning
    methods when the subclass is defined, and only around those whose RecIS method it overrides:
    Lightning spends 12 us on each method in each batch.

    ============================  ==========================================================
    ``before/after_train``        ``on_train_start`` / ``on_train_end``
    ``before/after_epoch``        ``on_train_epoch_start`` / ``on_train_epoch_end``
    ``before/after_step``         ``on_train_batch_start`` / ``on_train_batch_end``
    ``before/after_evaluate``     start and end of validation and test, not of the sanity check
    ``end``                       the last call of each ``fit``, ``validate``, ``test`` or
                                  ``predict``: at ``teardown``, or at ``on_exception`` when the
                                  run fails (then ``after_train`` does not run, ``end`` does)
    ============================  ==========================================================

    A RecIS method gets the values that its parameters name, in any order: ``trainer``,
    ``pl_module``, ``batch``, ``batch_idx``, ``outputs``, ``metrics`` (a copy of
    ``trainer.callback_metrics``, and what ``add_metric`` registered, as it was given),
    ``global_step`` (also as ``gstep``); ``_`` is None, and so is ``batch``, ``batch_idx`` or
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
        for method in _METHODS:
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

    def before_train(self, *args: Any, **kwargs: Any) -> None:
        """Run once before training, after the sanity check."""

    def after_train(self, *args: Any, **kwargs: Any) -> None:
        """Run once after training, unless training failed."""

    def before_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Run before each validation and test, but not before the sanity check."""

    def after_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Run after each validation and test, but not after the sanity check."""

    def before_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run before each training epoch."""

    def after_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run after each training epoch."""

    def before_step(self, *args: Any, **kwargs: Any) -> None:
        """Run before each training batch."""

    def after_step(self, *args: Any, **kwargs: Any) -> None:
        """Run after each training batch."""

    def end(self, *args: Any, **kwargs: Any) -> None:
        """Run as the last method of each fit, validate, test or predict, even if it failed."""

    def _call(
        self, method: str, trainer: Trainer, pl_module: LightningModule, arguments: dict[str, Any]
    ) -> None:
        wanted = self._overrides.get(method)
        if wanted is None or (method.endswith("_evaluate") and trainer.sanity_checking):
            return

        def value(name: str) -> Any:
            if name == "metrics":
                return {**trainer.callback_metrics, **get_metrics()}
            if name == "global_step":
                return trainer.global_step
            return values.get(name)

        values = {"trainer": trainer, "pl_module": pl_module, **arguments}
        getattr(self, method)(
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
    return _Arguments(tuple(positional), tuple(keywords))


def _add_dispatch(cls: type[Hook]) -> None:
    """Make Lightning's methods dispatch their hook points, where ``cls`` overrides those."""
    for name, point in _HOOK_POINTS.items():
        method = inspect.getattr_static(cls, name)
        if point.method in cls._overrides and not getattr(method, "_dispatches", False):
            inherited = name not in vars(cls)
            setattr(cls, name, _dispatching(cls, name, point, None if inherited else method))


def _dispatching(cls: type[Hook], name: str, point: _HookPoint, method: Any) -> Callable[..., Any]:
    """Return Lightning's method ``name``, which also calls the RecIS method of its hook point.

    An override and the methods it reaches by ``super()`` are one hook point: only the outermost
    dispatches it.
    """

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
            if point.before:
                call_override(self, state, trainer, pl_module, args, kwargs)
            result = own(trainer, pl_module, *args, **kwargs)
            if not point.before:
                call_override(self, state, trainer, pl_module, args, kwargs)
        finally:
            state["inside"].discard(name)
        return result

    def call_override(
        self: Hook,
        state: dict[str, Any],
        trainer: Trainer,
        pl_module: LightningModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if name == "setup":
            state["open"] = True
        elif point.method != "end":
            arguments = dict(zip(point.arguments, args, strict=False), **kwargs)
            self._call(point.method, trainer, pl_module, arguments)
        elif state["open"]:
            state["open"] = False
            self._call("end", trainer, pl_module, {})

    dispatch._dispatches = True  # type: ignore[attr-defined]
    return dispatch
