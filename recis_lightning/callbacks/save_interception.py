"""Interception of ``trainer.save_checkpoint``, the one place that replaces it.

Lightning calls no callback after it wrote a checkpoint, and none at all when it saves weights only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["intercept_saves", "release_saves"]

# Takes the save it stands in for, which it may call, and that one's arguments.
Interceptor = Callable[..., None]

_KEY = "_recis_lightning_interception"


def intercept_saves(trainer: Trainer, interceptor: Interceptor, innermost: bool = False) -> None:
    """Let a function stand in for ``trainer.save_checkpoint``; once, if it does already.

    Args:
        trainer: The Trainer.
        interceptor: Called with the save that it stands in for, and the arguments of that one.
        innermost: Whether it stands within all others, next to the Trainer's own; else around them.
    """
    interception = vars(trainer).get(_KEY)
    if interception is None:
        interception = vars(trainer)[_KEY] = _Interception(trainer)
    interception.add(interceptor, innermost)


def release_saves(trainer: Trainer, interceptor: Interceptor) -> None:
    """Undo ``intercept_saves``; with the last interceptor the Trainer has its own method again."""
    interception = vars(trainer).get(_KEY)
    if interception is not None and interception.remove(interceptor):
        del vars(trainer)[_KEY]
        interception.uninstall(trainer)


class _Interception:
    """Replacement of one Trainer's ``save_checkpoint``, through which all interceptors go."""

    def __init__(self, trainer: Trainer) -> None:
        # Set on the Trainer itself, by others; None where it is the class's method.
        self._attribute = vars(trainer).get("save_checkpoint")
        self._original = trainer.save_checkpoint
        self._interceptors: list[Interceptor] = []  # the innermost first
        vars(trainer)["save_checkpoint"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        save: Callable[..., None] = self._original
        for interceptor in self._interceptors:
            save = partial(interceptor, save)
        save(*args, **kwargs)

    def add(self, interceptor: Interceptor, innermost: bool) -> None:
        """Add an interceptor that is not there."""
        if interceptor not in self._interceptors:
            place = 0 if innermost else len(self._interceptors)
            self._interceptors.insert(place, interceptor)

    def remove(self, interceptor: Interceptor) -> bool:
        """Remove an interceptor if it is there; return whether none is left."""
        if interceptor in self._interceptors:
            self._interceptors.remove(interceptor)
        return not self._interceptors

    def uninstall(self, trainer: Trainer) -> None:
        """Give the Trainer its method back, unless others replaced it since: they may call this."""
        if vars(trainer).get("save_checkpoint") is not self:
            return
        if self._attribute is None:
            del vars(trainer)["save_checkpoint"]
        else:
            vars(trainer)["save_checkpoint"] = self._attribute
