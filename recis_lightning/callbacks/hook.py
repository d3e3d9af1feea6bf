"""``Hook``: RecIS's base class for what happens around training, as a Lightning callback."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Hook"]


class _Moment(NamedTuple):
    """Where a RecIS method runs: before or after which of Lightning's, and what that is given."""

    point: str
    before: bool
    arguments: tuple[str, ...] = ()


_EVALUATIONS = ("validation", "test", "predict")
_MOMENTS = {
    "on_train_start": _Moment("before_train", before=True),
    "on_train_end": _Moment("after_train", before=False),
    "on_validation_start": _Moment("before_evaluate", before=True),
    "on_validation_end": _Moment("after_evaluate", before=False),
    "on_test_start": _Moment("before_evaluate", before=True),
    "on_test_end": _Moment("after_evaluate", before=False),
    "on_train_epoch_start": _Moment("before_epoch", before=True),
    "on_train_epoch_end": _Moment("after_epoch", before=False),
    "on_train_batch_start": _Moment("before_step", before=True, arguments=("batch", "batch_idx")),
    "on_train_batch_end": _Moment(
        "after_step", before=False, arguments=("outputs", "batch", "batch_idx")
    ),
    # "end" runs once for each setup, at the first of the other two that comes.
    "teardown": _Moment("end", before=False),
    "on_exception": _Moment("end", before=False),
    "setup": _Moment("end", before=True),
}
_POINTS = tuple(dict.fromkeys(moment.point for moment in _MOMENTS.values()))

# What a parameter of a RecIS method may be called, and the value it is given. RecIS's own pages
# write `after_step(self, _, gstep)`.
_VALUES = {
    "trainer": "trainer",
    "pl_module": "pl_module",
    "batch": "batch",
    "batch_idx": "batch_idx",
    "outputs": "outputs",
    "metrics": "metrics",
    "global_step": "global_step",
    "gstep": "global_step",
    "_": "nothing",
}
_OFFERED = ("trainer", "pl_module", "batch", "batch_idx", "outputs", "metrics", "global_step")


# Lightning's methods of every batch.
_EACH_BATCH = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    *(f"on_{stage}_batch_{end}" for stage in _EVALUATIONS for end in ("start", "end")),
)


class _Plan(NamedTuple):
    """How to call an override: values by position, values by keyword, as (parameter, value)."""

    positional: tuple[str, ...]
    keywords: tuple[tuple[str, str], ...]


class Hook(Callback):
    """Base class of RecIS's hooks, usable wherever Lightning takes a callback.

    A subclass overrides any of the nine RecIS methods below, any of Lightning's own
    ``on_*``, ``setup`` and ``teardown``, or both; each runs once, whether or not an override
    calls ``super()``. A ``before_*`` method runs before the subclass's own Lightning method of
    the same moment, an ``after_*`` method and ``end`` after it.

    ============================  ==========================================================
    ``before/after_train``        ``on_train_start`` / ``on_train_end``
    ``before/after_epoch``        ``on_train_epoch_start`` / ``on_train_epoch_end``
    ``before/after_step``         ``on_train_batch_start`` / ``on_train_batch_end``
    ``before/after_evaluate``     start and end of validation and test, not of the sanity check
    ``end``                       the last call of each ``fit``, ``validate``, ``test`` or
                                  ``predict``: at ``teardown``, or at ``on_exception`` when the
                                  run fails (then ``after_train`` does not run, ``end`` does)
    ============================  ==========================================================

    A RecIS method is given what its parameters name, in any order: ``trainer``,
    ``pl_module``, ``batch``, ``batch_idx``, ``outputs``, ``metrics`` (a copy of
    ``trainer.callback_metrics``), ``global_step`` (also as ``gstep``); ``_`` is given None,
    and so is ``batch``, ``batch_idx`` or ``outputs`` where there is none (``outputs`` exist in
    ``after_step`` only). Other parameters keep their defaults; ``**kwargs`` receives whatever
    of these values the method does not name, ``*args`` nothing. Parameters are read once,
    when the class is defined.

    Raises:
        TypeError: When a subclass is defined: one of its RecIS methods has a parameter that
            cannot be filled.

    Example:
        >>> class Counting(Hook):
        ...     def before_train(self):
        ...         self.batches = 0
        ...
        ...     def after_step(self, trainer, global_step):
        ...         self.batches += 1
    """

    _plans: ClassVar[dict[str, _Plan]] = {}
    # Points that a class calls by itself, which are therefore not called here.
    _self_called: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._plans = {}
        for point in _POINTS:
            override = inspect.getattr_static(cls, point)
            if point not in cls._self_called and override is not vars(Hook)[point]:
                cls._plans[point] = _plan(cls, point, override)
        _announce_moments(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Lightning calls every method of every callback, each in a region of its profiler, whether
        # or not it does anything: 12 us a batch and callback. It passes over what is not callable.
        for name in _EACH_BATCH:
            if getattr(type(self), name) is getattr(Callback, name):
                vars(self)[name] = None

    def before_train(self, *args: Any, **kwargs: Any) -> None:
        """Called once before training, after the sanity check."""

    def after_train(self, *args: Any, **kwargs: Any) -> None:
        """Called once after training, unless training failed."""

    def before_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called before each validation (the sanity check is none) and test."""

    def after_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Called after each validation (the sanity check is none) and test."""

    def before_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Called before each training epoch."""

    def after_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Called after each training epoch."""

    def before_step(self, *args: Any, **kwargs: Any) -> None:
        """Called before each training batch."""

    def after_step(self, *args: Any, **kwargs: Any) -> None:
        """Called after each training batch."""

    def end(self, *args: Any, **kwargs: Any) -> None:
        """Called last, also when the run failed."""

    def _call(
        self, point: str, trainer: Trainer, pl_module: LightningModule, arguments: dict[str, Any]
    ) -> None:
        plan = self._plans.get(point)
        if plan is None or (point.endswith("_evaluate") and trainer.sanity_checking):
            return

        def value(name: str) -> Any:
            if name == "metrics":
                return dict(trainer.callback_metrics)
            if name == "global_step":
                return trainer.global_step
            return values.get(name)

        values = {"trainer": trainer, "pl_module": pl_module, **arguments}
        getattr(self, point)(
            *[value(name) for name in plan.positional],
            **{parameter: value(name) for parameter, name in plan.keywords},
        )


def batches_done(trainer: Any) -> int:
    """Return the number of training batches done, those before a resume included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def _plan(owner: type, point: str, override: Any) -> _Plan:
    """Read an override's parameters."""
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
            keywords += [(name, name) for name in _OFFERED if name not in named]
        elif parameter.name not in _VALUES:
            if parameter.default is parameter.empty:
                raise TypeError(
                    f"{owner.__qualname__}.{point}: nothing to give parameter {parameter.name!r}; "
                    f"expected any of {', '.join(_VALUES)}, or no parameters"
                )
            skipped = True
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            if not skipped:
                positional.append(_VALUES[parameter.name])
        else:
            keywords.append((parameter.name, _VALUES[parameter.name]))
    return _Plan(tuple(positional), tuple(keywords))


def _announce_moments(cls: type[Hook]) -> None:
    """Make each Lightning method announce its moment, where ``cls`` has something to call then."""
    for name, moment in _MOMENTS.items():
        method = inspect.getattr_static(cls, name)
        if moment.point in cls._plans and not getattr(method, "_announces", False):
            inherited = name not in vars(cls)
            setattr(cls, name, _announcing(cls, name, moment, None if inherited else method))


def _announcing(cls: type[Hook], name: str, moment: _Moment, method: Any) -> Callable[..., Any]:
    """Return Lightning's method ``name``, which also calls the RecIS method of its moment.

    An override and the methods it reaches by ``super()`` are one moment: only the outermost
    announces it.
    """

    @functools.wraps(method or getattr(Callback, name))
    def announce(
        self: Hook, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> Any:
        own = method.__get__(self, type(self)) if method else getattr(super(cls, self), name)
        state = vars(self).setdefault("_hook_state", {"open": False, "inside": set()})
        if name in state["inside"]:
            return own(trainer, pl_module, *args, **kwargs)
        state["inside"].add(name)
        try:
            if moment.before:
                recis(self, state, trainer, pl_module, args, kwargs)
            result = own(trainer, pl_module, *args, **kwargs)
            if not moment.before:
                recis(self, state, trainer, pl_module, args, kwargs)
        finally:
            state["inside"].discard(name)
        return result

    def recis(
        self: Hook,
        state: dict[str, Any],
        trainer: Trainer,
        pl_module: LightningModule,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        if name == "setup":
            state["open"] = True
        elif moment.point != "end":
            arguments = dict(zip(moment.arguments, args, strict=False), **kwargs)
            self._call(moment.point, trainer, pl_module, arguments)
        elif state["open"]:
            state["open"] = False
            self._call("end", trainer, pl_module, {})

    announce._announces = True  # type: ignore[attr-defined]
    return announce
