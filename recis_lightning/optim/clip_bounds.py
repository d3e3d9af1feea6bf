"""Bounds of gradients, as the optimizers of tables take them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from recis_lightning.arguments import check_bound


def check_clip_bound(name: str, bound: float | None) -> float | None:
    """Return ``bound`` if it is a number > 0 or None, else raise."""
    if bound is not None and not hasattr(bound, "__float__"):
        raise TypeError(f"{name}: expected a number > 0 or None, got {bound!r}")
    if bound is not None and not bound > 0:
        raise ValueError(f"{name}: expected a number > 0 or None, got {bound!r}")
    return bound


def check_cow_clip(given: Sequence[float] | None) -> tuple[float, float] | None:
    """Return CowClip's two numbers, or None, else raise."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != 2:
        raise TypeError(f"cow_clip: expected two numbers (r, zeta) or None, got {given!r}")
    ratio, least = given
    check_bound("cow_clip[0]", ratio)
    error: type[Exception] | None = None if hasattr(least, "__float__") else TypeError
    if error is None and not 0 < least < math.inf:  # with 0, rows of zeros would stay zeros
        error = ValueError
    if error is not None:
        raise error(f"cow_clip[1]: expected a number > 0, got {least!r}")
    return float(ratio), float(least)


__all__ = ["check_clip_bound", "check_cow_clip"]
