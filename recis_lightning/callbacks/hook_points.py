"""Points of a run at which a ``Hook`` is called: RecIS's methods, by Lightning's."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CALLERS", "HOOK_POINTS", "METHODS", "OPEN", "HookPoint"]


class HookPoint(NamedTuple):
    """A RecIS method that is called from one of Lightning's.

    Attributes:
        caller: Lightning's method.
        method: The RecIS method.
        before: Whether it runs before Lightning's method, or after it.
        is_train: Whether it is about training; None if the run tells.
        arguments: Names of the arguments that Lightning's method gets, after trainer and module.
        asked_for: Whether it runs only for a method that has a parameter ``is_train``.
    """

    caller: str
    method: str
    before: bool
    is_train: bool | None
    arguments: tuple[str, ...] = ()
    asked_for: bool = False


def _evaluation_points(stage: str) -> list[HookPoint]:
    """Return the points of validation or test, in the order in which they run."""
    start, end = f"on_{stage}_start", f"on_{stage}_end"
    batch, batch_end = f"on_{stage}_batch_start", f"on_{stage}_batch_end"
    given = ("batch", "batch_idx")
    return [
        HookPoint(start, "before_evaluate", True, False),
        HookPoint(start, "before_epoch", True, False, (), True),
        HookPoint(start, "before_window", True, False, (), True),
        HookPoint(batch, "before_step", True, False, given, True),
        HookPoint(batch, "after_data", True, False, given, True),
        HookPoint(batch_end, "after_step", False, False, ("outputs", *given), True),
        HookPoint(end, "after_window", False, False, (), True),
        HookPoint(end, "after_epoch", False, False, (), True),
        HookPoint(end, "after_evaluate", False, False),
        HookPoint(end, "after_eval", False, False),
    ]


# Of those of one caller and side, the order is that in which they run.
HOOK_POINTS = [
    HookPoint("setup", "start", True, None),
    HookPoint("on_train_start", "before_train", True, True),
    HookPoint("on_train_epoch_start", "before_epoch", True, True),
    HookPoint("on_train_epoch_start", "before_window", True, True),
    HookPoint("on_train_batch_start", "before_step", True, True, ("batch", "batch_idx")),
    HookPoint("on_train_batch_start", "after_data", True, True, ("batch", "batch_idx")),
    HookPoint("on_after_backward", "after_backward", False, True),
    HookPoint("on_train_batch_end", "after_step", False, True, ("outputs", "batch", "batch_idx")),
    HookPoint("on_train_epoch_end", "after_window", False, True),
    HookPoint("on_train_epoch_end", "after_epoch", False, True),
    HookPoint("on_train_end", "after_train", False, True),
    *_evaluation_points("validation"),
    *_evaluation_points("test"),
    # "end" runs once after each setup, at teardown or at an exception.
    HookPoint("teardown", "end", False, None),
    HookPoint("on_exception", "end", False, None),
]
OPEN = HookPoint("setup", "end", True, None)  # not called; it lets "end" run
METHODS = tuple(dict.fromkeys(point.method for point in HOOK_POINTS))
CALLERS = tuple(dict.fromkeys(point.caller for point in HOOK_POINTS))
